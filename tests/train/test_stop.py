"""Signals, time limits and divergence: what is saved, what is said, and with which exit code."""

import os
import signal
from pathlib import Path

import pytest

from lowprec.train import DIVERGED, REQUEUE, Stop
from lowprec.train.checkpoint import committed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_started_again(
    train, compare, tmp_path: Path, monkeypatch, capsys, number
) -> None:
    """The step under way is finished and saved; the same command goes on to the numbers of an undisturbed run."""
    poll, polls = Stop.poll, []

    def poll_and_be_signalled(self: Stop, world: object) -> str | None:
        polls.append(1)
        if len(polls) == 3:  # after the second step
            os.kill(os.getpid(), number)
        return poll(self, world)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "poll", poll_and_be_signalled)
        assert train(tmp_path / "a") == REQUEUE == 75
    said = capsys.readouterr().out
    assert (
        f"{signal.Signals(number).name} received: stopped after step 2 of 8; the same command goes on from here" in said
    )
    assert list(committed(tmp_path / "a" / "checkpoints")) == [2]
    assert train(tmp_path / "a") == 0
    assert train(tmp_path / "b") == 0
    assert compare(tmp_path / "a") == compare(tmp_path / "b")


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    """Ctrl-C twice raises KeyboardInterrupt wherever the program is."""
    Stop()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0.1)


def test_a_time_limit_stops_a_run_of_any_length(train, read, tmp_path: Path, capsys) -> None:
    """A million steps end with the requeue code when the time is up, and what was logged was saved."""
    assert train(tmp_path, "train.steps=1000000", "train.eval_every=0", "train.time_limit_s=1") == REQUEUE
    assert "train.time_limit_s is reached" in capsys.readouterr().out
    logged = [record["step"] for record in read(tmp_path)]
    assert list(committed(tmp_path / "checkpoints")) == logged[-1:]


def test_a_stop_in_an_evaluation_does_not_wait_for_its_end(train, read, tmp_path: Path, monkeypatch) -> None:
    """A signal among the validation batches of step 4 ends that validation; the step itself is recorded and saved."""
    polls, poll = [], Stop.poll

    def asked_in_the_evaluation(self: Stop, world: object) -> str | None:
        polls.append(1)
        if len(polls) == 6:  # once before the first step, after steps 1 to 3, and at the first validation batch
            os.kill(os.getpid(), signal.SIGUSR1)
        return poll(self, world)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "poll", asked_in_the_evaluation)
        assert train(tmp_path) == REQUEUE
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4] and "val_loss" not in read(tmp_path)[-1]
    assert list(committed(tmp_path / "checkpoints")) == [4]
    assert train(tmp_path) == 0 and "val_loss" in read(tmp_path)[-1]


def test_a_loss_that_is_not_a_number_stops_the_run(train, read, tmp_path: Path, capsys) -> None:
    """One sentence, an exit code of its own, the checkpoint from before it kept, and no NaN in the record."""
    settings = (
        "recipe=bf16_tiny",
        "optim.lr=1e38",
        "train.checkpoint_every=1",
        "schedule=constant",
        "schedule.warmup_frac=0",
    )
    assert train(tmp_path, *settings) == DIVERGED == 70
    said = capsys.readouterr().out
    assert "the loss or the gradient norm is not finite, so the run stops here and keeps its last checkpoint" in said
    last = read(tmp_path)[-1]["step"]
    assert f"step {last + 1}: " in said
    assert max(committed(tmp_path / "checkpoints")) == last
