"""Who is named when a run hangs, when nobody is, and which errors mean that a rank is gone."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lowprec.train.signals import Stop, Stopped
from lowprec.train.watchdog import Beat, Watchdog, accuse, lost_contact


def beat(serial: int, *progress: int, step: int = 4, host: str = "a") -> Beat:
    return Beat(host, serial, step, progress, "loader.py, line 7 (next_step)")


def test_silent_ranks_are_named() -> None:
    """Who stopped publishing is named, even if others have made no more progress than it."""
    then = {0: beat(5, 1, 1), 1: beat(5, 1, 1, host="b"), 2: beat(5, 1, 1, host="c")}
    ranks, sentence = accuse(then, then | {0: beat(9, 1, 1)}, 12.0)
    assert ranks == [1, 2]
    assert sentence == "ranks 1, 2 (b, c) hang: no sign of life for 12 s, last seen in step 5"
    ranks, sentence = accuse(then, then | {0: beat(9, 1, 1), 2: beat(6, 1, 1)}, 12.0)
    assert ranks == [1] and sentence.startswith("rank 1 (b) hangs: ")


def test_ranks_that_are_behind_are_named() -> None:
    """All publish: those with the least progress hang, compared from left to right; and one learns where."""
    then = {rank: beat(5, 3, 24, 200) for rank in range(4)}
    now = {rank: beat(9, 3, 32, 117) for rank in range(4)} | {2: beat(9, 3, 24, 200)}
    ranks, sentence = accuse(then, now, 12.0)
    assert ranks == [2]
    assert accuse(then | {2: beat(5, 3, 24, 199)}, now, 12.0) == ([], ""), "it is slow, and on its way"
    assert sentence == "rank 2 (a) hangs: no progress in step 5, in loader.py, line 7 (next_step)"


def test_nobody_is_named_where_all_do_the_same() -> None:
    """A long save, or a compilation: no one is behind. And if all were silent, it was the one who looks."""
    then = {rank: beat(5, 3, 24, 100) for rank in range(4)}
    assert accuse(then, {rank: beat(9, 3, 24, 100) for rank in range(4)}, 12.0) == ([], "")
    assert accuse(then, then, 12.0) == ([], "")


def test_beats_survive_the_store() -> None:
    assert Beat.of(str(beat(5, 1, 2, 3))) == beat(5, 1, 2, 3)


def watch(progress: dict[int, int], frozen: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the watchdogs of two ranks, here threads of one process, say within 20 periods; some do not publish."""
    said: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, ranks, sentence: said.append(f"{self.rank}: {sentence}"))
    dogs = []
    for rank in range(2):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        store.set(f"lowprec/beat/{rank}", str(beat(1, 0)))
        dog = Watchdog(rank, 2, store, 0.6, lambda rank=rank: beat(0, progress[rank]))  # type: ignore[misc]
        if rank not in frozen:
            dog.start()
        dogs.append(dog)
    time.sleep(1.5)
    for dog in dogs:
        dog.stop()
    return said


def test_the_watchdog_of_a_waiting_rank_speaks(monkeypatch, tmp_path: Path) -> None:
    """Rank 1 says nothing any more; rank 0, which waits for it, names it."""
    said = watch({0: 7, 1: 7}, {1}, monkeypatch, tmp_path)
    assert said and all(s.startswith("0: rank 1 (a) hangs: no sign of life for ") for s in said)


def test_the_watchdog_is_silent_in_a_long_save(monkeypatch, tmp_path: Path) -> None:
    """Both ranks publish and neither makes progress; then one is behind, and both name it."""
    assert watch({0: 7, 1: 7}, set(), monkeypatch, tmp_path) == []
    said = watch({0: 8, 1: 7}, set(), monkeypatch, tmp_path)
    assert {s[:20] for s in said} == {"0: rank 1 (a) hangs:", "1: rank 1 (a) hangs:"}


def test_errors_of_the_wire_are_told_from_bugs() -> None:
    """gloo's and NCCL's words for a lost peer, wrapped or not; and neither a bug nor a disk."""
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4242"
    assert lost_contact(RuntimeError(gloo)) == "Connection closed by peer [127.0.0.1]:4242"
    timeout = "[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv operation to complete"
    assert lost_contact(RuntimeError(timeout)) == "Timed out waiting 30000ms for recv operation to complete"
    nccl = "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"
    assert "remote process exited" in str(lost_contact(dist.DistBackendError(nccl)))
    try:
        try:
            raise RuntimeError(gloo)
        except RuntimeError as error:
            raise ValueError("while saving") from error
    except ValueError as wrapped:
        assert lost_contact(wrapped) == "Connection closed by peer [127.0.0.1]:4242"
    assert lost_contact(dist.DistBackendError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN)")) is None
    assert lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied; connection closed")) is None
    assert lost_contact(TimeoutError("timed out")) is None


def test_a_signal_before_the_first_step_ends_the_start(monkeypatch) -> None:
    """Inside `at_once` it raises where the program is, in the main thread only; afterwards it is a flag again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = Stop()
        thread = threading.Thread(target=time.sleep, args=(0.2,))
        with pytest.raises(Stopped), stop.at_once():
            thread.start()
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        thread.join()  # untouched
        signal.raise_signal(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it had been asked to stop before")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
