"""lowprec-eval: the losses that training logged, what a recipe costs after training, tasks of one's own, offline."""

import json
import math
from pathlib import Path

import pytest
import torch

from lowprec.launch import evaluate
from lowprec.launch import train as launch
from lowprec.launch.evaluate import main
from lowprec.launch.harness import Harness
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.train.loaded import open_run

SMALL = "recipe=nvfp4_tiny model.dim=64 model.layers=2 model.heads=2 model.kv_heads=2 model.ffn_dim=128 train.steps=200"
DATA = "data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.validation_sequences=6"
BATCH = "data.validation_batch=2 train.global_batch=8 train.micro_batch=4 train.eval_every=0 train.checkpoint_every=150"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt that ab is followed by c, and xy by z."""
    folder, text = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("text")
    for i in range(40):
        (text / f"{i}.txt").write_text(("abc" if i % 2 else "xyz") * (60 + i))
    words = [*SMALL.split(), *DATA.split(), *BATCH.split(), f"data.sources.0.path={text}", f"run.dir={folder}",
             f"data.cache_dir={tmp_path_factory.mktemp('cache')}", "optim.lr=1e-2"]  # fmt: skip
    assert launch.main(words) == 0
    (folder / "words").write_text("\n".join(words))
    return folder


def scores(capsys: pytest.CaptureFixture[str]) -> dict:
    found = json.loads(capsys.readouterr().out)
    return found | {"scores": {s["precision"]: s for s in found["scores"]}}


def test_the_losses_are_those_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit what the last line of metrics.jsonl says; perplexity is exp of it."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert main([str(run), "--json"]) == 0
    found = scores(capsys)
    assert found["step"] == 200 and set(found["scores"]) == {"as trained", "high precision"}
    assert found["scores"]["as trained"]["loss"] == last["val_loss"]
    assert found["scores"]["high precision"]["loss"] == last["val_loss_high_precision"]
    assert found["scores"]["as trained"]["perplexity"] == math.exp(last["val_loss"])


def test_the_precision_of_the_last_step(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At a checkpoint on the edge of a schedule's switch, and with a product that a probe had raised, as training."""
    words = [line for line in (run / "words").read_text().splitlines() if not line.startswith(("run.dir", "train."))]
    rule = "probe.rules=[{match: '*.up_proj', gemm: fprop, measure: sqnr_db, below: 99}]"
    sizes = "train.steps=8 train.checkpoint_every=4 train.eval_every=4 train.global_batch=8 train.micro_batch=4"
    switch = "precision.schedule=[{from: 0.5, set: {nvfp4.wgrad: bf16, nvfp4.fprop: bf16}}]"
    more = [*sizes.split(), switch, "probe.every=3", rule]
    assert launch.main([*words, *more, f"run.dir={tmp_path}"]) == 0
    logged = {r["step"]: r for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    capsys.readouterr()
    assert main([str(tmp_path), "--step", "4", "--json"]) == 0
    found = scores(capsys)["scores"]
    assert found["as trained"]["loss"] == logged[4]["val_loss"] != logged[4]["val_loss_high_precision"]


def test_another_precision_after_training(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """bf16 is the unquantised row; ternary weights cost more than eight bits; a file by path; an earlier checkpoint."""
    coarse = tmp_path / "coarse.yaml"
    coarse.write_text((RECIPES_FOLDER / "bitnet_158.yaml").read_text())
    assert main([str(run), "--json", "--precision", "bf16", "mxfp8", str(coarse)]) == 0
    s = scores(capsys)["scores"]
    plain = s["high precision"]["loss"]
    assert s["bf16"]["loss"] == plain
    assert abs(s["mxfp8"]["loss"] - plain) < 0.05 < s[str(coarse)]["loss"] - plain
    assert main([str(run), "--step", "150"]) == 0
    assert "checkpoint of step 150" in capsys.readouterr().out


def test_a_task_of_ones_own(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Multiple choice, a perplexity and generated text, from files alone: the model knows what follows."""
    rows = [{"q": "abcab", "choices": ["c", "z", "b"], "a": 0, "text": "abc" * 8},
            {"q": "xyzxy", "choices": ["c", "z", "y"], "a": 1, "text": "xyz" * 8}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    choice = 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: a\ndoc_to_choice: "{{choices}}"\n'
    choice += 'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    (tmp_path / "next.yaml").write_text(f"task: next_letter\n{data}{choice}")
    text = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    text += "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    (tmp_path / "text.yaml").write_text(f"task: letters\n{data}{text}")
    write = 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{choices[a]}}"\n'
    write += "generation_kwargs: {until: [a, x], max_gen_toks: 4}\n"
    write += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    (tmp_path / "write.yaml").write_text(f"task: writes\n{data}{write}")
    assert (
        main([str(run), "--json", "--tasks", "next_letter", "letters", "writes", "--include-path", str(tmp_path)]) == 0
    )
    for name, s in scores(capsys)["scores"].items():
        assert s["tasks"]["next_letter"]["acc"] == 1.0, name
        assert 0 < s["tasks"]["letters"]["bits_per_byte"] < 2
        assert s["tasks"]["writes"]["exact_match"] == 1.0


def test_likelihoods_by_hand(run: Path) -> None:
    """One token after another: the sum of log-softmax, also for a text longer than the model's window."""
    loaded = open_run(run)
    model = Harness(loaded)
    model.longest = 16
    tokens = model.tok_encode("abcabcabc")
    with torch.no_grad():
        logp = loaded.model(torch.tensor([tokens[:-1]]))[0].float().log_softmax(-1)
    expected = sum(logp[i, tokens[i + 1]].item() for i in range(5, 8))
    ((value, greedy),) = model._loglikelihood_tokens([(("", ""), tokens[:6], tokens[6:])])
    assert value == pytest.approx(expected, rel=1e-5) and greedy
    request = type("Request", (), {"args": ("abc" * 20,)})
    (total,) = model.loglikelihood_rolling([request])
    assert total < 0 and math.isfinite(total)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--precision", "nvfp5"], "nvfp5"),
        (["--step", "7"], "has no checkpoint of step 7; it has 150, 200"),
        (["--tasks", "no_such_task"], "knows no task no_such_task; add --include-path"),
        (["--tasks", "next_letter", "--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_what_is_not_there(run: Path, capsys, monkeypatch, words: list[str], sentence: str) -> None:
    real = evaluate._tasks
    monkeypatch.setattr(evaluate, "_tasks", lambda path, defaults: real(path, False))  # all of them take half a minute
    assert main([str(run), *words]) == 2 and sentence in capsys.readouterr().err


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2 and "holds no config.yaml" in capsys.readouterr().err
