"""Run folders become rows: the right numbers, the last attempt, and a reason for every run that is left out."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.scaling.read import read, read_curve
from lowprec.scaling.sources.facts import ending_of, last_attempt, row_of
from lowprec.scaling.sources.folders import parse, read_ending, unique_tokens
from lowprec.scaling.table import OPERANDS, RunTable
from tests.scaling.made_runs import NVFP4, PER_STEP, STEPS, facts, log, make_run, text


def reasons(table: RunTable) -> dict[str, str]:
    return {lost.run: lost.reason for lost in table.dropped}


def test_a_run_folder_is_a_row(tmp_path: Path) -> None:
    """Every column of a finished run is what its facts and the last validation say."""
    folder = make_run(tmp_path / "d64_nvfp4", facts("nvfp4", seed=3), log(level=2.5))
    data = {"sources": [{"tokens": 10_000, "weight": 1.0}], "validation": {"frac": 0.1}}
    (folder / "data.json").write_text(json.dumps(data))
    table = read([str(tmp_path)])
    assert table.n_kind == "non_embedding" and not table.dropped
    row = table.frame.iloc[0]
    D = STEPS * PER_STEP
    assert (row["run"], row["N"], row["N_total"], row["D"]) == ("d64_nvfp4", 100_000, 150_000, D)
    assert row["C"] == 660_000.0 * D and row["N_mean"] == 100_000 and row["unique_tokens"] == 9_000
    assert row["loss"] == 2.51 and row["loss_hp"] == 2.5
    assert row["precision"] == "nvfp4" and all(row[name] == "nvfp4" for name in OPERANDS)
    assert (row["bits_w"], row["bits_a"], row["bits_g"], row["block"]) == (4, 4, 4, 16)
    assert (row["exponent_bits"], row["mantissa_bits"], row["gmse_w"]) == (2, 1, 0.009)
    assert (row["schedule"], row["optimizer"], row["lr"], row["seed"]) == ("wsd", "AdamW", 0.002, 3)
    assert row["data"] == "7585c6b6946120de bpe:1024" and row["plan"] == "58ed10e8d6b1"
    assert row["source"] == str(folder) and row["curve"] == str(folder / "metrics.jsonl")
    assert not [name for name in table.frame if name.startswith("_")] and "bits_kv" not in table


def test_unquantised_operands_are_16_bits_without_error() -> None:
    """bf16 is E8M7, a scale of its own for each value, and no error."""
    row = row_of(facts("bf16"), ending_of(log()))
    assert (row["bits_w"], row["bits_a"], row["bits_g"]) == (16, 16, 16)
    assert (row["exponent_bits"], row["mantissa_bits"], row["block"], row["gmse_w"]) == (8, 7, 1, 0.0)
    operands = {"fprop.w": NVFP4 | {"block": [16, 16]}, "dgrad.dy": NVFP4 | {"bits": 8, "gaussian_mse": 0.001}}
    row = row_of(facts("nvfp4") | {"operands": dict.fromkeys(OPERANDS) | operands}, ending_of(log()))
    assert (row["bits_w"], row["bits_a"], row["bits_g"]) == (4, 16, 8) and row["wgrad.dy"] == "bf16"
    assert (row["gmse_w"], row["gmse_a"], row["gmse_g"], row["block"]) == (0.009, 0.0, 0.001, 256)
    operands["fprop.w"] |= {"block": [1, 0]}
    row = row_of(facts("nvfp4") | {"operands": dict.fromkeys(OPERANDS) | operands}, ending_of(log()))
    assert row["block"] is None  # a whole axis, of unknown length


@pytest.mark.parametrize(
    "about, label",
    [
        (facts("nvfp4"), "nvfp4"),
        (facts("my_recipe") | {"operands": dict.fromkeys(OPERANDS), "quantized_frac": 0.0}, "bf16"),
        (facts("bf16", quantized_frac=0.4), "bf16 and others"),
        (
            facts("nvfp4", precision_schedule=[{"from": 0.82, "recipe": "bf16", "gemm": "fprop"}]),
            "nvfp4, fprop bf16 from 0.82",
        ),
        (facts("nvfp4", precision_schedule=[{"from": 0.5, "recipe": "bf16", "gemm": ""}]), "nvfp4, bf16 from 0.5"),
        (facts("bf16", attention={"k": NVFP4}), "bf16 with attention"),
    ],
)
def test_bf16_means_that_nothing_is_quantised(about: dict, label: str) -> None:
    """A run that is quantised in part, or for a while, does not count as a bf16 run, nor as one of its recipe."""
    assert row_of(about, ending_of(log()))["precision"] == label


def test_what_is_left_out_has_a_reason(tmp_path: Path) -> None:
    """Each kind of unusable run is dropped for its own reason, and the sound ones stay."""
    make_run(tmp_path / "sound")
    make_run(tmp_path / "code70", records=log()[:7], exit_code=70)
    make_run(tmp_path / "nan", records=[*log()[:-1], log()[-1] | {"loss": math.nan, "val_loss": math.nan}])
    up = [record | {"loss": record["loss"] + 2 * (record["step"] > 30)} for record in log()]
    make_run(tmp_path / "rises", records=up)
    make_run(tmp_path / "stopped", records=log()[:15], exit_code=75)
    make_run(tmp_path / "flat", records=[record | {"lr": 0.002} for record in log()])
    unjudged = [{k: v for k, v in record.items() if not k.startswith("val")} for record in log()]
    make_run(tmp_path / "unjudged", records=unjudged)
    make_run(tmp_path / "judged_early", records=log()[:20] + unjudged[20:])
    make_run(tmp_path / "empty", records="")
    make_run(tmp_path / "torn_facts").joinpath("facts.json").write_text('{"version": 1, "na')
    make_run(tmp_path / "other_version", facts(version=2))
    make_run(tmp_path / "in_bits", facts(loss_unit="bits per byte"))
    make_run(tmp_path / "half_facts", {"version": 1, "loss_unit": "nats per token"})
    make_run(tmp_path / "no_facts").joinpath("facts.json").unlink()
    table = read([str(tmp_path)])
    assert list(table.frame["run"]) == ["sound"]
    assert reasons(table) == {
        "code70": "diverged: loss or gradient became NaN or infinite after 7 of 40 steps",
        "nan": "diverged: loss or gradient became NaN or infinite after 40 of 40 steps",
        "rises": "diverged: its training loss ends 2 nats above its lowest",
        "stopped": "unfinished: 15 of 40 steps",
        "flat": "its schedule has not decayed: the last learning rate is 1 of the peak",
        "unjudged": "it has no validation loss",
        "judged_early": "it has no validation loss at its last step 40 (the last one is of step 20)",
        "empty": "its metrics.jsonl holds no step",
        "torn_facts": "its facts.json is damaged",
        "other_version": "its facts are of version 2, and this reads version 1",
        "in_bits": "its loss is in bits per byte, not in nats per token",
        "half_facts": "its facts are not whole (KeyError: 'operands')",
        "no_facts": "it has no facts.json, which says its size and its operands: start it once more with this version "
        "of lowprec, which writes it, or give a table",
    }
    assert all(Path(lost.source).name == lost.run for lost in table.dropped)


def test_unfinished_runs_can_be_kept(tmp_path: Path) -> None:
    """They stay with the tokens of their last validation, not of their last step."""
    make_run(tmp_path / "stopped", records=log()[:15], exit_code=75)
    row = read([str(tmp_path)], keep_unfinished=True).frame.iloc[0]
    assert row["D"] == 10 * PER_STEP and row["loss"] == log()[9]["val_loss"] and row["C"] == 660_000.0 * row["D"]


def test_a_constant_schedule_needs_no_decay(tmp_path: Path) -> None:
    """What was planned without a decay is finished without one; beside runs with one a note says so."""
    constant = {"shape": "constant", "warmup_steps": 0, "decay_steps": 0, "final_frac": 0.01}
    make_run(tmp_path / "flat", facts(schedule=constant), [record | {"lr": 0.002} for record in log()])
    assert len(read([str(tmp_path)])) == 1
    make_run(tmp_path / "wsd")
    assert any("stay constant" in note for note in read([str(tmp_path)]).notes)


def test_a_folder_named_for_a_precision_that_did_not_run(tmp_path: Path) -> None:
    """A bf16 run in a folder called fp8 is left out, and the reverse; the recipe's own name accuses nobody."""
    make_run(tmp_path / "d64_fp8_s0", facts("bf16"))
    make_run(tmp_path / "d64_bf16_s0", facts("nvfp4"))
    make_run(tmp_path / "baseline", facts("bf16", name="nvfp4_tiny"))
    make_run(tmp_path / "nvfp4_late_bf16", facts("nvfp4"))
    table = read([str(tmp_path)])
    assert set(table.frame["run"]) == {"baseline", "nvfp4_late_bf16"}
    lost = reasons(table)
    assert "'d64_fp8_s0' says fp8, but nothing in it is quantised" in lost["d64_fp8_s0"]
    assert "'d64_bf16_s0' says bf16, but something in it is quantised" in lost["d64_bf16_s0"]


def test_the_same_run_counts_once(tmp_path: Path) -> None:
    """A folder given twice is read once; a copy is dropped; the copy that went on is the one that stays."""
    first = make_run(tmp_path / "a")
    assert len(read([str(first), str(tmp_path), str(first / "metrics.jsonl")]).frame) == 1
    copy = make_run(tmp_path / "z", facts(steps=80), log(80, level=2.9))
    (copy / "run_id").write_text("id-a")
    table = read([str(tmp_path)])
    assert list(table.frame["run"]) == ["z"] and "the same run id" in reasons(table)["a"]
    anew = make_run(tmp_path / "copied_without_id", facts(steps=80), log(80, level=2.9))
    (anew / "run_id").unlink()
    table = read([str(tmp_path)])
    assert list(table.frame["run"]) == ["copied_without_id"] and "the same numbers" in reasons(table)["z"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A link to a folder elsewhere is read, and a link to the folder itself ends."""
    make_run(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "runs" / "link")
    os.symlink(tmp_path / "runs", tmp_path / "runs" / "loop")
    assert len(read([str(tmp_path / "runs")])) == 1


@pytest.mark.parametrize("end", ["", "\n", '\n{"step": 41, "lo', "\n{"])
def test_a_torn_last_line_is_ignored(tmp_path: Path, end: str) -> None:
    """Whatever a kill leaves behind the last whole record, that record is the last."""
    make_run(tmp_path / "a", records=text(log()).rstrip("\n") + end)
    assert read([str(tmp_path)]).frame["loss"][0] == log()[-1]["val_loss"]


def test_steps_that_were_done_again(tmp_path: Path) -> None:
    """A log that was appended to after a resume gives what the last attempt says, and a note."""
    again = [record | {"loss": record["loss"] - 0.1, "attempt": 2} for record in log()[20:]]
    again[-1] |= {"val_loss": 2.0}
    folder = make_run(tmp_path / "a", records=text(log()[:28]) + '{"step": 29, "lo' + "\n" + text(again))
    table = read([str(tmp_path)])
    assert table.frame["loss"][0] == 2.0
    assert any("8 lines of steps that were done again" in note for note in table.notes)
    curve = read_curve(table.frame["curve"][0])
    assert list(curve["step"]) == list(range(1, STEPS + 1))
    assert curve["loss"][25] == again[5]["loss"] and curve["loss"][5] == log()[5]["loss"]
    assert curve["val_loss"].notna().sum() == 4 and curve["lr"].iloc[-1] == 0.002 * 0.01
    pd.testing.assert_frame_equal(read_curve(f"{folder}/./metrics.jsonl"), curve)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.one_of(st.none(), st.floats(0.5, 12, allow_nan=False)),
            st.one_of(st.none(), st.floats(0.5, 12), st.just(math.nan)),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(["", "\n", '\n{"step": 99, "to']),
    st.booleans(),
)
def test_reading_bytes_equals_parsing(lines: list, end: str, in_order: bool) -> None:
    """The shortcut through the bytes of a log finds what a full parse finds, resumed or not."""
    if in_order:
        lines = [(step, *rest) for step, (_, *rest) in enumerate(lines, 1)]
    records = []
    for step, loss, val_loss in lines:
        record = {"step": step, "tokens": 8 * step, "loss": loss, "lr": 0.1}
        records.append(record if val_loss is None else record | {"val_loss": val_loss})
    data = (text(records).rstrip("\n") + end).encode()
    fast, slow = read_ending(data), ending_of(*last_attempt(parse(data)))
    for name in vars(fast):
        np.testing.assert_equal(getattr(fast, name), getattr(slow, name), name)


def test_unique_tokens_of_a_mixture() -> None:
    """Each source gives its share of D, or all that it has."""
    about = {
        "sources": [{"tokens": 1000, "weight": 3.0}, {"tokens": 1000, "weight": 1.0}],
        "validation": {"frac": 0.0},
    }
    assert unique_tokens(json.dumps(about).encode(), 2000.0) == 1000 + 500
    assert unique_tokens(json.dumps(about | {"sources": [{"weight": 1.0}]}).encode(), 2000.0) is None
    assert unique_tokens(None, 2000.0) is None


def test_n_kind_total_counts_all_parameters(tmp_path: Path) -> None:
    """N becomes the total, and the column that held it stays."""
    make_run(tmp_path / "a")
    table = read([str(tmp_path)], n_kind="total")
    assert table.n_kind == "total" and table.frame["N"][0] == table.frame["N_total"][0] == 150_000


def test_progress_and_empty_folders(tmp_path: Path) -> None:
    """Progress ends at the number of runs; a folder without runs is an error with the fix."""
    with pytest.raises(
        ValueError, match=r"no metrics.jsonl and no .wandb file under .*: a table is given by its own path"
    ):
        read([str(tmp_path)])
    for name in "ab":
        make_run(tmp_path / name)
    seen: list[tuple[int, int]] = []
    read([str(tmp_path)], progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 2) and seen[-1] == (2, 2)
    with pytest.raises(ValueError, match="is not there"):
        read([str(tmp_path / "nowhere")])


def test_when_nothing_is_left_the_reasons_are_told(tmp_path: Path) -> None:
    """A table without rows helps nobody: the commonest reasons are the error."""
    for name in "abc":
        make_run(tmp_path / name, records=log()[:15], exit_code=75)
    with pytest.raises(ValueError, match="no run can be used: a and 2 more: unfinished: 15 of 40 steps"):
        read([str(tmp_path)])
