"""One folder, one run: what it holds, and who may continue it."""

import json
from pathlib import Path

import pytest
import yaml


def test_a_folder_holds_what_is_promised(train, read, tmp_path: Path, capsys) -> None:
    """Eight names, metrics.jsonl with its documented keys and types, and a finished run that says so."""
    assert train(tmp_path) == 0
    said = capsys.readouterr().out
    names = {
        "config.yaml",
        "run_id",
        "plan.txt",
        "facts.json",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "exit_code",
    }
    assert {p.name for p in tmp_path.iterdir()} == names
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["train"]["steps"] == 8 and config["run"]["dir"] == str(tmp_path)
    assert config["model"]["vocab_size"] == 320, "256 bytes and the end of text, in whole 64s: what was trained"
    assert len((tmp_path / "run_id").read_text().strip()) == 8
    assert (tmp_path / "plan.txt").read_text().strip() in said
    assert json.loads((tmp_path / "data.json").read_text())["tokenizer"]["vocab_size"] == 257

    always = {"step": int, "tokens": int, "loss": float, "lr": float, "grad_norm": float, "tokens_per_s": float,
              "step_s": float, "data_s": float, "mem_bytes": int, "plan": str, "attempt": int}  # fmt: skip
    validation = {"val_loss": float, "val_loss_high_precision": float}
    for record in read(tmp_path):
        expected = always | (validation if record["step"] in (4, 8) else {})
        assert {key: type(value) for key, value in record.items()} == expected
        assert record["tokens"] == record["step"] * 4 * 64
        assert record["plan"] in (tmp_path / "plan.txt").read_text()
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 9))

    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tmp_path) == 0
    assert "is finished: 8 of 8 steps are done; nothing to do" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_validation_with_the_recipe_differs_from_validation_without(train, read, tmp_path: Path) -> None:
    """Quantised and unquantised forward passes of the same weights give two losses in NVFP4, and one in bf16."""
    assert train(tmp_path / "nvfp4") == 0
    assert train(tmp_path / "bf16", "recipe=bf16_tiny") == 0
    nvfp4, bf16 = read(tmp_path / "nvfp4")[-1], read(tmp_path / "bf16")[-1]
    assert nvfp4["val_loss"] != nvfp4["val_loss_high_precision"]
    assert nvfp4["val_loss"] == pytest.approx(nvfp4["val_loss_high_precision"], rel=0.02)
    assert bf16["val_loss"] == bf16["val_loss_high_precision"]
    assert nvfp4["loss"] < read(tmp_path / "nvfp4")[0]["loss"] - 0.1, "it learns"


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "optim.lr=0.1",
        "model.qk_norm=true",
        "data.seq_len=32",
        "train.global_batch=8",
        "schedule.final_frac=0.5",
    ],
)
def test_other_settings_are_refused_by_name(train, tmp_path: Path, capsys, change: str) -> None:
    """What would have given other numbers does not continue a folder; the sentence names the key and both values."""
    assert train(tmp_path, "train.steps=1", "schedule.decay_frac=0") == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "exit_code"}
    capsys.readouterr()
    assert train(tmp_path, "train.steps=1", "schedule.decay_frac=0", change) == 2
    error = capsys.readouterr().err
    assert f"holds a run with other settings: {change.split('=')[0]} (" in error and error.count("\n") == 1
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "exit_code"}
    assert after == before and (tmp_path / "exit_code").read_text() == "2\n"


def test_harmless_settings_may_change(train, read, tmp_path: Path) -> None:
    """Logging, saving, monitoring and recomputation do not change numbers: a run goes on with others."""
    constant = ("schedule=constant", "train.eval_every=0")
    assert train(tmp_path, *constant, "train.steps=4") == 0
    harmless = (
        f"data.cache_dir={tmp_path}",
        "train.log_every=2",
        "train.keep_last=1",
        "parallel=fsdp_recompute",
        "name=renamed",
    )
    assert train(tmp_path, *constant, "train.steps=8", *harmless) == 0
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4, 6, 8]


def test_more_steps_are_taken_only_if_the_past_stays_true(train, compare, tmp_path: Path, capsys) -> None:
    """A constant schedule goes on (with the numbers of a run that was long from the start), a decayed one does not."""
    constant = ("schedule=constant", "schedule.warmup_frac=null", "schedule.warmup_steps=2", "train.eval_every=4")
    assert train(tmp_path / "long", *constant, "train.steps=8") == 0
    assert train(tmp_path / "grown", *constant, "train.steps=4") == 0
    assert train(tmp_path / "grown", *constant, "train.steps=8") == 0
    assert compare(tmp_path / "grown") == compare(tmp_path / "long")

    assert train(tmp_path / "decayed", "train.eval_every=0") == 0
    capsys.readouterr()
    assert train(tmp_path / "decayed", "train.eval_every=0", "train.steps=12") == 2
    assert (
        "train.steps (8 -> 12); with another train.steps the 8 steps done would have had other"
        in capsys.readouterr().err
    )
    assert train(tmp_path / "decayed", "train.eval_every=0", "train.steps=12", "run.allow_change=true") == 0


def test_a_precision_schedule_counts_as_the_past(train, tmp_path: Path, capsys) -> None:
    """With a switch at half time, twice the steps would have switched later: refused; before it, accepted."""
    switch = ("schedule=constant", "schedule.warmup_frac=0", "train.eval_every=0")
    late = "precision.schedule=[{from: 0.9, set: {nvfp4.fprop: bf16}}]"
    early = "precision.schedule=[{from: 0.5, set: {nvfp4.fprop: bf16}}]"
    assert train(tmp_path / "early", *switch, early, "train.steps=4") == 0
    assert train(tmp_path / "early", *switch, early, "train.steps=8") == 2
    assert "train.steps (4 -> 8)" in capsys.readouterr().err
    assert train(tmp_path / "late", *switch, late, "train.steps=4") == 0
    assert train(tmp_path / "late", *switch, late, "train.steps=8") == 0


def test_other_text_is_refused(train, tmp_path: Path, settings: list[str], capsys) -> None:
    """A source that changed under a run is noticed by its fingerprint."""
    (text := tmp_path / "text").mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"{i} some words " * 60)
    mine = (f"data.sources.0.path={text}", "schedule=constant", "train.eval_every=0")
    assert train(tmp_path / "run", *mine, "train.steps=1") == 0
    (text / "0.txt").write_text("other words entirely " * 60)
    assert train(tmp_path / "run", *mine, "train.steps=2") == 2
    assert "the text or tokenizer is not the one" in capsys.readouterr().err
