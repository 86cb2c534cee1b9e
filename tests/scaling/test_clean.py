"""What is left out of a table and what is only remarked on, whatever source the rows came from."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.scaling.clean import ABOVE, clean, contradiction, worse_than_smaller
from lowprec.scaling.sources.facts import rise_of
from lowprec.scaling.table import Dropped, RunTable


def table(*rows: dict[str, Any], **same: Any) -> RunTable:
    """Sound runs, changed by `rows`."""
    base = {"N": 1e6, "D": 1e9, "loss": 3.0, "source": "s.csv"}
    return RunTable(
        pd.DataFrame([base | {"run": f"r{i}", "seed": float(i)} | same | row for i, row in enumerate(rows)])
    )


def reason(**row: Any) -> str:
    """Why one run is left out, beside a sound one."""
    lost = clean(table(row, {})).dropped
    assert len(lost) <= 1 and all(entry.run == "r0" and entry.source == "s.csv" for entry in lost)
    return lost[0].reason if lost else ""


@pytest.mark.parametrize(
    "row, why",
    [
        ({}, ""),
        ({"loss": math.inf}, "diverged: loss or gradient became NaN or infinite"),
        ({"loss": math.nan}, "it has no validation loss"),
        ({"loss": math.nan, "delta": 0.1}, ""),
        ({"loss": 0.0}, "a loss of 0 nats cannot be"),
        ({"N": math.nan}, "it has no N"),
        ({"D": 0.0}, "its D is 0.0"),
        ({"D": math.nan, "curve": "t.csv#a"}, ""),
        ({"D": math.nan, "curve": "a/metrics.jsonl"}, "it has no D"),
        ({"_exit_code": 70.0}, "diverged: loss or gradient became NaN or infinite"),
        ({"_exit_code": 75.0}, ""),
        (
            {"_state": "diverged", "_steps_done": 3.0, "_steps_planned": 9.0},
            "diverged: loss or gradient became NaN or infinite after 3 of 9 steps",
        ),
        ({"_rise": 0.6}, "diverged: its training loss ends 0.6 nats above its lowest"),
        ({"_rise": 0.4}, ""),
        ({"_steps_done": 8.0, "_steps_planned": 9.0}, "unfinished: 8 of 9 steps"),
        ({"_steps_done": 9.0, "_steps_planned": 9.0, "_state": "crashed"}, ""),
        ({"_state": "Crashed"}, "unfinished: W&B calls it crashed"),
        ({"_state": "running", "_steps_done": 9.0, "_steps_planned": 9.0}, "unfinished: W&B calls it running"),
        ({"_state": "finished"}, ""),
        (
            {"_end_lr_frac": 0.4, "_final_frac": 0.1},
            "its schedule has not decayed: the last learning rate is 0.4 of the peak",
        ),
        ({"_end_lr_frac": 0.15, "_final_frac": 0.1}, ""),
        (
            {"_loss_step": 5.0, "_steps_done": 9.0},
            "it has no validation loss at its last step 9 (the last one is of step 5)",
        ),
    ],
)  # fmt: skip
def test_reasons(row: dict[str, Any], why: str) -> None:
    assert reason(**row) == why


@pytest.mark.parametrize(
    "row", [{"_steps_done": 8.0, "_steps_planned": 9.0}, {"_state": "running"}, {"_loss_step": 5.0}]
)
def test_unfinished_runs_stay_on_request(row: dict[str, Any]) -> None:
    """But what diverged does not."""
    both = table(row | {"_steps_done": 8.0}, {"_exit_code": 70.0})
    assert list(clean(both, keep_unfinished=True).frame["run"]) == ["r0"]


def test_what_was_dropped_and_noted_before_stays() -> None:
    """Cleaning adds to the lists, and a second time it changes nothing."""
    before = RunTable(table({"loss": 12.0}, {}, {"loss": math.nan}).frame, "total", (Dropped("x", "y"),), ("z",))
    once = clean(before)
    assert [lost.run for lost in once.dropped] == ["x", "r2"] and once.n_kind == "total" and once.notes[0] == "z"
    twice = clean(once)
    pd.testing.assert_frame_equal(twice.frame, once.frame)
    assert twice.dropped == once.dropped and twice.notes == once.notes


# ---- labels


@pytest.mark.parametrize(
    "label, bits, wrong",
    [
        ("d64_fp8_s0", 16, True),
        ("d64_fp8_s0", 8, False),
        ("FP8", 16, True),
        ("mxfp4", 16, True),
        ("w4a4", 16, True),
        ("w16a16", 16, False),
        ("w16a16", 4, True),
        ("bf16", 16, False),
        ("d64-BF16", 4, True),
        ("fp8_vs_bf16", 16, False),
        ("fp8_vs_bf16", 8, False),
        ("int8", 16, True),
        ("print8", 16, False),
        ("fp80", 16, False),
        ("", 4, False),
    ],
)
def test_labels_against_bits(label: str, bits: int, wrong: bool) -> None:
    """A name that claims one precision and only one is held to it."""
    assert bool(contradiction(label, {"bits_w": 16.0, "bits_a": float(bits)})) == wrong


def test_labels_without_evidence_are_believed() -> None:
    """Nothing is known of the operands of most published tables."""
    assert not contradiction("fp8", {}) and not contradiction("fp8", {"bits_w": 16.0, "bits_a": math.nan})
    assert contradiction("fp8", {"fprop.x": "bf16"}) and not contradiction("fp8", {"fprop.x": "e4m3_tensor"})
    assert not contradiction("fp8", {"fprop.x": "bf16", "precision": "bf16, fp8 from 0.5"})


# ---- twice


def test_the_same_numbers() -> None:
    """Equal to ten digits and in precision is the same run, whatever it is called; a rounded loss may be another's."""
    exact = {"loss": 3.1234567891, "seed": 0.0}
    lost = clean(table(exact, exact, {**exact, "N": 2e6}, precision="fp8")).dropped
    assert [(entry.run, entry.reason) for entry in lost] == [("r1", "the same run as r0 of s.csv: the same numbers")]
    rounded = {"loss": 3.12, "seed": 0.0}
    assert not clean(table(rounded | {"lr": 1.0}, rounded | {"lr": 2.0})).dropped
    assert len(clean(table(rounded, rounded)).dropped) == 1
    assert not clean(table(exact | {"precision": "fp8"}, exact | {"precision": "bf16"})).dropped


def test_the_copy_that_stays() -> None:
    """The longest; of equals that of a folder, then of W&B, then of a table: in whatever order they come."""
    rows = [
        {"_run_id": "a", "D": 1e9, "_origin": "s.csv", "loss": 3.0},
        {"_run_id": "a", "D": 1e9, "_origin": "folder", "loss": 3.1},
        {"_run_id": "a", "D": 1e9, "_origin": "wandb", "loss": 3.2},
        {"_run_id": "b", "D": 1e9, "_origin": "folder", "loss": 3.3},
        {"_run_id": "b", "D": 2e9, "_origin": "s.csv", "loss": 3.4},
        {"_run_id": None, "loss": 3.5},
        {"_run_id": None, "loss": 3.6},
    ]
    for order in (rows, rows[::-1]):
        kept = clean(table(*order)).frame
        assert sorted(kept["loss"]) == [3.1, 3.4, 3.5, 3.6]


# ---- remarks


def test_remarks() -> None:
    """Odd losses, labels of two recipes, several data sets: named, and kept."""
    rows = [
        {"loss": 11.5, "N": 1e5},
        {"loss": 3.0, "N": 1e6},
        {"loss": 3.3, "N": 2e6},
        {"loss": 2.9, "N": 4e6, "fprop.w": "nvfp4", "precision": "nvfp4", "data": "b"},
        {"loss": 2.8, "N": 8e6, "fprop.w": "nvfp4_2d", "precision": "nvfp4", "data": "b"},
    ]
    done = clean(table(*rows, **{"precision": "bf16", "fprop.w": "bf16", "data": "a"}))
    assert len(done) == 5 and not done.dropped
    assert done.notes == (
        "r0: losses above 11 nats, worse than a uniform guess among 60,000 tokens",
        "r2: a loss 5% above that of a run with no more parameters and no more tokens",
        "precision 'nvfp4' stands for 2 recipes, which differ in fprop.w",
        "the runs are of 2 data sets or tokenizers: losses on different text are not comparable",
    )


values = st.sampled_from([1.0, 2.0, 3.0, 5.0])


@given(st.lists(st.tuples(values, values, st.floats(1, 2), st.sampled_from(["a", "b"])), min_size=1, max_size=25))
def test_worse_than_smaller_equals_its_definition(rows: list[tuple[float, float, float, str]]) -> None:
    """The front gives what comparing every pair gives."""
    frame = pd.DataFrame(rows, columns=["N", "D", "loss", "precision"])
    expected = [
        any(n <= N and d <= D and p == P and loss < L / ABOVE for n, d, loss, p in rows if (n, d) != (N, D) or loss < L)
        for N, D, L, P in rows
    ]
    np.testing.assert_array_equal(worse_than_smaller(frame), expected)


def test_rise() -> None:
    """Of a falling loss it is nothing, of one that came apart what it rose; single spikes and NaN do not count."""
    falling = np.linspace(8, 3, 1000)
    assert rise_of(falling) == 0
    apart = np.concatenate([falling, np.full(100, 9.0)])
    assert rise_of(apart) == pytest.approx(6, abs=0.2)
    spiked = falling.copy()
    spiked[-1], spiked[500] = 5.0, math.nan
    assert rise_of(spiked) < 0.1 and math.isnan(rise_of([])) and math.isnan(rise_of([math.nan]))
