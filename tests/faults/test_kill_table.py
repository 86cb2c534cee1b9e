"""Faults against real runs: what is said, what is lost, and that the numbers are those of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowprec.tools.kill_table import BEGIN, END, FAULTS, markdown, write

pytestmark = pytest.mark.distributed
TOOL = Path(__file__).parents[2] / "tools" / "kill_table.py"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """The rows of the quick table, by fault; the tool must have ended well."""
    done = subprocess.run([sys.executable, TOOL, "--quick", "--json"], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr + done.stdout
    return {row["fault"]: row for row in json.loads(done.stdout)}


SAID = {
    "kill -9 of one rank": ("lost contact to another rank in step ", "exit 75", "resumed after step 5"),
    "kill -9 during a save": ("step_00000010 was torn and never read", "resumed after step 5"),
    "SIGTERM with a grace period": ("SIGTERM received: stopped after step ", "exit 75", "resumed after step "),
    "bit-flipped checkpoint file": ("step 10 is damaged (__1_0.distcp has changed: ", "resumed after step 5"),
    "hang of a rank (SIGSTOP)": ("rank 1 hangs: no sign of life", "exit 75", "resumed after step "),
}


@pytest.mark.parametrize("fault", SAID)
def test_the_run_ends_as_if_nothing_had_been(rows: dict[str, dict[str, Any]], fault: str) -> None:
    """No data is lost, and every number of the resumed run has the bits of the one without the fault."""
    row = rows[fault]
    assert row["equal_to_uninterrupted"] is True and row["lost_tokens"] == 0
    assert all(words in row["outcome"] for words in SAID[fault]), row["outcome"]


def test_lost_steps_are_counted(rows: dict[str, dict[str, Any]]) -> None:
    """After SIGTERM there are none; otherwise those since the last checkpoint, which is five steps old at most."""
    assert rows.keys() == SAID.keys()
    assert rows["SIGTERM with a grace period"]["lost_steps"] == 0
    assert rows["kill -9 of one rank"]["lost_steps"] >= 3  # killed after step 8 at the earliest, saved at 5
    assert rows["bit-flipped checkpoint file"]["lost_steps"] >= 7  # killed after step 12, and back to 5


def test_the_page_holds_the_table(tmp_path: Path) -> None:
    """It is written between its marks; a page without them gets a section; what is around stays."""
    row = {"fault": "a", "outcome": "b", "lost_steps": 3, "lost_tokens": 0, "equal_to_uninterrupted": True}
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    write(page, markdown([row]))
    first = page.read_text()
    assert first.startswith("# Page\n") and f"{BEGIN}\n| fault |" in first and "| a | b | 3 | 0 | yes |" in first
    page.write_text(first + "more\n")
    write(page, markdown([row | {"equal_to_uninterrupted": False}]))
    assert page.read_text() == first.replace("| yes |", "| NO |") + "more\n" and page.read_text().count(END) == 1
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
