"""`parallel=auto` lays a run out, says why, and counts the bytes that it announced."""

import re
from pathlib import Path

import pytest

from tests.layouts import train_on

pytestmark = pytest.mark.distributed


def test_auto_takes_a_layout_and_the_announced_bytes_are_counted(tmp_path: Path) -> None:
    """Four ranks of one machine: shard 4. The plan's bytes a step, by collective, are those of metrics.jsonl."""
    records = train_on(4, tmp_path, "parallel=auto", "comm=nvfp4_fp8", "train.steps=2")
    said, plan = (tmp_path / "run.out").read_text(), (tmp_path / "run" / "plan.txt").read_text()
    assert "parallel=auto: shard 4" in said
    announced = dict(re.findall(r"^  (\w+)  +([\d.]+ \w*B)", plan, flags=re.M))
    counted = records[-1]["wire_bytes"]
    assert counted.keys() <= announced.keys()
    for name, count_bytes in counted.items():
        value, unit = announced[name].split()
        scale = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6}[unit]
        assert float(value) * scale == pytest.approx(count_bytes, rel=5e-3)


def test_a_layout_of_one_process_refuses_two(tmp_path: Path) -> None:
    """One clear sentence, exit code 2."""
    train_on(2, tmp_path, "parallel=single", expect=2)
    said = (tmp_path / "run.out").read_text()
    assert "this layout is of one process, but 2 were started; choose parallel=fsdp" in said
