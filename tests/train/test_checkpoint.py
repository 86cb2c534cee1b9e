"""Which checkpoints exist, which are believed, and what happens to broken ones: whole runs."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowprec.train.checkpoint import UNSAVED, Checkpoints, committed

CONSTANT = ("schedule=constant", "train.eval_every=0", "train.checkpoint_every=1", "train.keep_every=3")


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """What the system does on a full disk, with another errno: a write beyond this size fails in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch):
    """full_at(3, 4): the disk takes nothing of a checkpoint's size while steps 3 and 4 are saved."""
    save, finish = Checkpoints.save, Checkpoints.finish

    def fill(*steps: int, patch: pytest.MonkeyPatch = monkeypatch) -> None:
        def save_without_room(self: Checkpoints, state):  # type: ignore[no-untyped-def]
            if state.step not in steps:
                return save(self, state)
            finish(self)
            with files_of_at_most(100_000):
                why = save(self, state)
                finish(self)  # what is written in the background finds no room either
                return why

        patch.setattr(Checkpoints, "save", save_without_room)

    return fill


@pytest.mark.parametrize("background", ["false", "true"])
def test_the_last_and_the_permanent_ones_are_kept(train, tmp_path: Path, background: str) -> None:
    """keep_last=2 of eight, and every third for ever; the same if they are written in the background."""
    assert train(tmp_path, *CONSTANT, f"train.checkpoint_async={background}") == 0
    assert list(committed(tmp_path / "checkpoints")) == [3, 6, 7, 8]


def test_a_torn_checkpoint_is_ignored_and_removed(train, tmp_path: Path, capsys) -> None:
    """A folder without .metadata is what a killed save leaves: the one before it is used, and the folder goes."""
    assert train(tmp_path, *CONSTANT) == 0
    torn = tmp_path / "checkpoints" / "step_00000009"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    capsys.readouterr()
    assert train(tmp_path, *CONSTANT, "train.steps=10") == 0
    assert "resumes after step 8, 10 steps" in capsys.readouterr().out
    assert list(committed(tmp_path / "checkpoints")) == [3, 6, 9, 10]


def test_damaged_checkpoints_cost_steps_and_change_no_number(train, compare, tmp_path: Path, capsys) -> None:
    """The two newest are damaged: the run says so, does the steps after the third newest again, and saves them."""
    assert train(tmp_path / "whole", *CONSTANT, "train.steps=6", "train.checkpoint_every=0") == 0
    broken = tmp_path / "broken"
    assert train(broken, *CONSTANT, "train.steps=5") == 0
    cut, flipped = (broken / "checkpoints" / f"step_0000000{step}" / "__0_0.distcp" for step in (5, 4))
    cut.write_bytes(cut.read_bytes()[:100])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 8
    flipped.write_bytes(content)
    capsys.readouterr()
    assert train(broken, *CONSTANT, "train.steps=6") == 0
    said = capsys.readouterr().out
    assert "the checkpoint of step 5 is damaged (__0_0.distcp is cut short: 100 bytes instead of " in said
    assert "the checkpoint of step 4 is damaged (__0_0.distcp has changed: its checksum is " in said
    assert said.count(": the run goes on from step 3") == 2
    assert compare(broken) == compare(tmp_path / "whole")
    assert list(committed(broken / "checkpoints")) == [3, 5, 6]
    assert {p.name for p in (broken / "checkpoints").glob("damaged_*")} == {"damaged_00000004", "damaged_00000005"}


def test_without_a_sound_checkpoint_nothing_is_trained(train, tmp_path: Path, capsys) -> None:
    """All are damaged: one sentence names them, nothing is renamed, so the next start says the same."""
    assert train(tmp_path, *CONSTANT, "train.keep_every=0", "train.steps=2") == 0
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "__0_0.distcp").unlink()
    for _ in range(2):
        capsys.readouterr()
        assert train(tmp_path, *CONSTANT, "train.steps=3") == 2
        error = capsys.readouterr().err
        assert error.startswith("lowprec-train: no checkpoint up to step 2 in ") and error.count("\n") == 1
        assert "step_00000002: __0_0.distcp is missing" in error and "step_00000001: __0_0.distcp is missing" in error
    assert list(committed(tmp_path / "checkpoints")) == [1, 2]


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_does_not_end_a_run(train, full_at, compare, tmp_path: Path, capsys, background: str) -> None:
    """Saves of steps 3 and 4 fail: it is said, nothing stays of them, no older one is lost, and no number changes."""
    options = (*CONSTANT, "train.steps=5", f"train.checkpoint_async={background}", "train.keep_last=9")
    assert train(tmp_path / "whole", *options) == 0
    full_at(3, 4)
    capsys.readouterr()
    assert train(tmp_path / "full", *options) == 0
    said = capsys.readouterr().out
    for step in (3, 4):
        why = f"the checkpoint of step {step} could not be saved: rank 0: File too large (__0_0.distcp)"
        assert said.count(f"{why}; the newest is that of step 2") == 1
    assert [int(p.name[5:]) for p in sorted((tmp_path / "full" / "checkpoints").iterdir())] == [1, 2, 5]
    assert compare(tmp_path / "full") == compare(tmp_path / "whole")


def test_a_full_disk_at_the_end_is_an_error(train, full_at, compare, tmp_path: Path, monkeypatch, capsys) -> None:
    """What cannot be saved is not finished: an exit code of its own; the same command goes on once there is room."""
    options = (*CONSTANT, "train.steps=4")
    assert train(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        full_at(3, 4, patch=patch)
        assert train(tmp_path / "full", *options) == UNSAVED == 74
    said = capsys.readouterr().out
    assert said.count("of step 4 could not be saved: rank 0: File too large (__0_0.distcp)") == 2
    assert said.endswith(": what came after the newest checkpoint is lost; see to that and start again\n")
    assert list(committed(tmp_path / "full" / "checkpoints")) == [1, 2]
    assert train(tmp_path / "full", *options) == 0
    assert compare(tmp_path / "full") == compare(tmp_path / "whole")


def test_a_file_in_the_way_is_told(train, tmp_path: Path, capsys) -> None:
    """Any failure of the file system is a sentence, and whatever is in the way is left alone."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001").write_text("in the way")
    assert train(tmp_path, *CONSTANT, "train.steps=2") == 0
    assert "of step 1 could not be saved: rank 0: File exists (step_00000001); the newest is none" in (
        capsys.readouterr().out
    )
    assert list(committed(tmp_path / "checkpoints")) == [2]
    assert (tmp_path / "checkpoints" / "step_00000001").read_text() == "in the way"
