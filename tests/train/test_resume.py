"""A run that is interrupted anywhere gives the numbers of one that never was."""

import shutil
import signal
import time
from pathlib import Path

from lowprec.train import REQUEUE
from lowprec.train.checkpoint import committed


def test_killed_again_and_again_it_gives_the_same_numbers(train, spawn, compare, read, tmp_path: Path) -> None:
    """kill -9 in the middle of a save (background), then anywhere, then SIGTERM: bit-equal to an undisturbed run."""
    size = ("train.steps=48", "train.eval_every=18", "train.checkpoint_every=1", "model.dim=192", "model.ffn_dim=512")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, *size, "train.checkpoint_every=0") == 0

    killed_while_saving = 0
    while killed_while_saving < 2:
        process = spawn(broken, *size, "train.checkpoint_async=true")
        start = max(committed(broken / "checkpoints"), default=0)
        while process.poll() is None:  # wait for a save that has begun and is not finished, after some steps
            steps = sorted((broken / "checkpoints").glob("step_*")) if broken.exists() else []
            if steps and int(steps[-1].name[5:]) > start + 2 and not (steps[-1] / ".metadata").exists():
                break
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        safe = committed(broken / "checkpoints")
        torn = set((broken / "checkpoints").glob("step_*")) - set(safe.values())
        assert safe, "the save before the one that was cut off is still there"
        killed_while_saving += bool(torn)

    before = max(committed(broken / "checkpoints"))
    process = spawn(broken, *size)
    while process.poll() is None and max(committed(broken / "checkpoints")) == before:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, output
    assert "SIGTERM received" in output

    assert train(broken, *size) == 0
    assert compare(broken) == compare(whole)
    assert read(broken)[-1]["attempt"] >= 4, "two kills, one SIGTERM, the end"
    assert not [p for p in (broken / "checkpoints").glob("step_*") if not (p / ".metadata").exists()], (
        "torn folders stay"
    )


def test_without_a_checkpoint_it_begins_again(train, compare, read, tmp_path: Path) -> None:
    """Records of a run killed before its first checkpoint are of steps done anew: one line per step."""
    assert train(tmp_path / "a") == 0
    assert train(tmp_path / "b") == 0
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # torn
    assert train(tmp_path / "b") == 0
    assert compare(tmp_path / "b") == compare(tmp_path / "a")
    assert {record["attempt"] for record in read(tmp_path / "b")} == {2}


def test_recomputation_draws_the_same_bits(train, compare, tmp_path: Path) -> None:
    """Activations computed again in the backward pass (stochastic rounding included) change no number."""
    assert train(tmp_path / "kept") == 0
    assert train(tmp_path / "again", "parallel=fsdp_recompute") == 0
    assert compare(tmp_path / "again") == compare(tmp_path / "kept")


def test_another_seed_gives_other_numbers(train, compare, tmp_path: Path) -> None:
    """The equalities above could fail: the comparison sees a change of seed."""
    assert train(tmp_path / "a", "train.steps=2", "train.eval_every=0") == 0
    assert train(tmp_path / "b", "train.steps=2", "train.eval_every=0", "seed=1") == 0
    assert compare(tmp_path / "a") != compare(tmp_path / "b")
