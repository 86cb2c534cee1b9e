"""A whole run through a pipeline: the records of one process, and a checkpoint that one process goes on from."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def test_two_stages_train_like_one_process(train, spawn, compare, tmp_path: Path) -> None:
    """Training, validation in both precisions, sampling, saving; one process goes on from what two stages saved."""
    run = ("model.tie_embeddings=false", "train.checkpoint_every=4", "train.sample_tokens=3")
    assert train(tmp_path / "one", *run) == 0
    process = spawn(tmp_path / "two", *run, "parallel=pp", ranks=2)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert compare(tmp_path / "two") == compare(tmp_path / "one")

    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000008")
    assert train(tmp_path / "two", *run) == 0
    assert compare(tmp_path / "two") == compare(tmp_path / "one")
