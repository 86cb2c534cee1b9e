"""The record survives torn lines, and the console says what it says."""

import json
from pathlib import Path

import pytest

from lowprec.train.console import Narrator
from lowprec.train.metrics import MetricsLog, read_metrics


def line(step: int, attempt: int = 1) -> str:
    return json.dumps({"step": step, "attempt": attempt}) + "\n"


def test_a_resumed_record_has_one_line_per_step(tmp_path: Path) -> None:
    """Lines of steps to be done again and a torn last line go; what comes after bears the next attempt."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3, 2) + '{"step": 4, "at')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    with MetricsLog(path, resumed_step=2) as log:
        log.write({"step": 3})
    assert [(r["step"], r["attempt"]) for r in read_metrics(path)] == [(1, 1), (2, 1), (3, 3)]


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    """NaN is not JSON: it is an error here instead of an unreadable line."""
    with MetricsLog(tmp_path / "metrics.jsonl", 0) as log, pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})


def test_the_console_line_is_plain_text_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, no escape codes, however narrow the terminal; silent on other ranks."""
    record = {"step": 50, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 12345.0, "data_s": 0.01,
              "step_s": 0.1, "mem_bytes": 2**30, "val_loss": 3.0}  # fmt: skip
    for speaks in (True, False):
        narrator = Narrator(speaks, total_steps=200)
        with narrator.progress(0):
            narrator.step(record)
    said = capsys.readouterr().out
    expected = "step  50/200  25%  loss 2.5000  grad 1.000  lr 1.00e-03  12.3k tok/s  data 10%  1.00 GiB  eta 0:00"
    assert said == f"{expected}  val 3.0000\n"
