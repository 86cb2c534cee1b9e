"""Which checkpoints exist, which are believed, and what happens to broken ones."""

from pathlib import Path

import pytest

from lowprec.train.checkpoint import committed

CONSTANT = ("schedule=constant", "train.eval_every=0", "train.checkpoint_every=1", "train.keep_every=3")


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


def test_a_damaged_checkpoint_is_one_sentence(train, tmp_path: Path, capsys) -> None:
    """Damage to a committed file is told by name; nothing is trained from it."""
    assert train(tmp_path, *CONSTANT) == 0
    (file,) = (tmp_path / "checkpoints" / "step_00000008").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    assert train(tmp_path, *CONSTANT, "train.steps=10") == 2
    error = capsys.readouterr().err
    assert error.startswith("lowprec-train: the checkpoint") and "step_00000008 cannot be read" in error
    assert error.count("\n") == 1


def test_a_full_disk_is_told(train, tmp_path: Path) -> None:
    """A save that fails ends the run with a sentence instead of training on without checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001").write_text("in the way")
    with pytest.raises(RuntimeError, match="step_00000001 could not be written"):
        train(tmp_path, *CONSTANT)
