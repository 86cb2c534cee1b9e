"""Watchdog: which rank hangs, and whether an error means that a rank is gone.

A collective needs every rank, so one that stops (a dead machine, a hanging driver, a disk that does not answer) stops
all of them, silently, until the process group's own timeout, `parallel.timeout_s`, which names nobody. The watchdog
names the rank and ends the run after `parallel.hang_s` seconds without progress.

Progress is read off what a run counts anyway, in the order in which a step counts them:

    progress = (polls of the stop flag, sequences handed out by the loader, collectives begun)

Every rank publishes its own, with a serial number, to the rendezvous store; a thread does that over a connection of its
own. Who has made no progress for hang_s / 2 reads those of all ranks, and after hang_s there are three cases:

    silent    ranks whose serial number has stood still meanwhile: stopped, swapped out, or their machine is dead
    behind    all publish, but some have made less progress and make none: they hang, the others wait for them
    equal     nobody is behind: all do the same slow thing (compile, save, wait for a disk), and the watchdog is silent

In the first two the hanging ranks are named, and every rank that still runs ends with code 75. No clock is compared
with that of another machine, and time in which the watchdog itself did not run (a suspended job, a busy machine) does
not count.

What this is not: it does not watch the start (the process group's timeout does), nor a world of one, which waits for
nobody. Stages of a pipeline begin different numbers of collectives, so there these do not count.

A rank that *dies* is found by the connections it leaves behind: `lost_contact` tells the errors of torch.distributed
that mean this from all others, which are bugs and stay stack traces.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lowprec.train.signals import REQUEUE

ADVICE = f"ending with code {REQUEUE}: start the same command again"

_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (is )?closed|timed? ?out|remote process exited|"
    r"peer|no route to host|network is unreachable|unhandled system error|communicator was aborted",
    re.IGNORECASE,
)


def lost_contact(error: BaseException | None) -> str | None:
    """What the wire said, if `error`, or what it came from, means that another rank is gone; None for anything else."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = " ".join(str(error).split())
        of_the_wire = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in text)
        if of_the_wire and _GONE.search(text):
            message = re.sub(r"\[[^]]*gloo/[^]]*\]\s*|\[Rank \d+\]:?\s*|Exception raised from.*", "", text)
            return message.partition(". This is typically")[0].strip(" .")[:160]
        error = error.__cause__ or error.__context__
    return None


def leave(code: int) -> NoReturn:
    """Ends this process at once: no thread is waited for, because what it waits for will not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- who hangs


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    host: str
    serial: int  # of this message
    step: int  # steps done
    progress: tuple[int, ...]  # grows; compared with that of other ranks
    where: str  # in the program

    @staticmethod
    def of(text: bytes | str) -> "Beat":
        """Reads what `str` wrote."""
        values = json.loads(text)
        return Beat(**values | {"progress": tuple(values["progress"])})

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def accuse(then: dict[int, Beat], now: dict[int, Beat], waited_s: float) -> tuple[list[int], str]:
    """The ranks that hang, and a sentence about them; ([], "") if none is behind the others.

    then, now: {rank: its beat} of all ranks, read twice; waited_s: seconds between the two.
    """
    silent = [rank for rank, beat in now.items() if beat.serial == then[rank].serial]
    if silent and len(silent) < len(now):
        return silent, f"{_named(silent, now)}: no sign of life for {waited_s:.0f} s, last seen {_place(silent, now)}"
    most = max(beat.progress for beat in now.values())
    least = min(beat.progress for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat.progress == least == then[rank].progress]
    if least == most or not behind:  # at the same point, or on their way to it
        return [], ""
    return behind, f"{_named(behind, now)}: no progress {_place(behind, now)}, in {now[behind[0]].where}"


def _named(ranks: list[int], beats: dict[int, Beat]) -> str:
    hosts = ", ".join(sorted({beats[rank].host for rank in ranks}))
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({hosts}) hangs"
    return f"ranks {', '.join(map(str, ranks))} ({hosts}) hang"


def _place(ranks: list[int], beats: dict[int, Beat]) -> str:
    return f"in step {min(beats[rank].step for rank in ranks) + 1}"


# ---- the threads


class Watchdog:
    """Publishes this rank's progress, and ends the process when the run hangs.

    Two threads: a store whose process is stopped does not answer, for ever, so the one that talks to it is watched too.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, hang_s: float, look: Callable[[], Beat]) -> None:
        """look: the beat of this rank now (its serial number is filled in here). hang_s > 0, in seconds."""
        self.rank, self.size, self.hang_s = rank, size, hang_s
        self.period_s = min(hang_s / 12, 5.0)
        self._store, self._look = store, look
        self._beats: dict[int, Beat] = {}
        self._reads = False  # whether beats of others are wanted
        self._answered, self._over = threading.Event(), threading.Event()  # the store has; the run is

    def start(self) -> None:
        """Begins to watch."""
        for work in (self._talk, self._watch):
            threading.Thread(target=work, daemon=True, name=f"watchdog{work.__name__}").start()

    def stop(self) -> None:
        """No more verdicts."""
        self._over.set()

    def _talk(self) -> None:
        serial, keys = 0, [f"lowprec/beat/{rank}" for rank in range(self.size)]
        store = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own: the other may be waiting
        store.set_timeout(timedelta(seconds=max(self.hang_s / 4, 1.0)))
        while True:
            try:
                serial += 1
                store.set(keys[self.rank], str(replace(self._look(), serial=serial)))
                if store.check(keys if self._reads else keys[self.rank : self.rank + 1]) and self._reads:
                    self._beats = {rank: Beat.of(text) for rank, text in enumerate(store.multi_get(keys))}
                self._answered.set()
            except RuntimeError:  # the store is gone or does not answer: `_watch` sees how long ago it did
                pass
            if self._over.wait(self.period_s):
                return

    def _watch(self) -> None:
        last, still_s, silent_s, since_s = self._look().progress, 0.0, 0.0, 0.0
        then: dict[int, Beat] = {}
        before_s = time.monotonic()
        while not self._over.wait(self.period_s / 2):
            now_s = time.monotonic()
            passed_s, before_s = min(now_s - before_s, self.period_s), now_s  # not while this process was stopped
            still_s, silent_s = still_s + passed_s, silent_s + passed_s
            if self._answered.is_set():
                self._answered.clear()
                silent_s = 0.0
            if (progress := self._look().progress) != last:
                last, still_s, then = progress, 0.0, {}
                self._reads, self._beats = False, {}
            self._reads = still_s > self.hang_s / 2
            if self._beats and not then:
                then, since_s = self._beats, still_s
            if still_s < self.hang_s:
                continue
            if silent_s > self.hang_s / 2:
                self._store_is_silent(silent_s)
            elif then and still_s - since_s > self.hang_s / 4:
                ranks, sentence = accuse(then, self._beats, still_s - since_s)
                if ranks:
                    self._end(ranks, sentence)

    def _store_is_silent(self, silent_s: float) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            self._end([], f"torchrun's rendezvous store has not answered for {silent_s:.0f} s", cut_off=True)
        else:
            sentence = f"rank 0 hangs: the rendezvous store, which it keeps, has not answered for {silent_s:.0f} s"
            self._end([0], sentence, cut_off=True)

    def _end(self, ranks: list[int], sentence: str, cut_off: bool = False) -> NoReturn:
        """The lowest rank that does not hang says it, and if hosts may be cut off from each other, the first of each;
        the others give it time to."""
        lowest = min(set(range(self.size)) - set(ranks), default=self.rank)
        if self.rank == lowest or (cut_off and os.environ.get("LOCAL_RANK") == "0"):
            print(f"lowprec-train: {sentence}; the others wait for it. {ADVICE.capitalize()}", file=sys.stderr)
        else:
            time.sleep(1)
        leave(REQUEUE)


@contextmanager
def watched(rank: int, size: int, hang_s: float, progress: Callable[[], tuple[int, ...]]) -> Iterator[None]:
    """While inside, a hang of any rank ends the run; nothing is watched in a world of one or with hang_s = 0.

    progress: -> (steps done, and what grows: compared between ranks from left to right).
    """
    if size == 1 or hang_s == 0:
        yield
        return
    host, main = socket.gethostname(), threading.main_thread().ident

    def look() -> Beat:
        step, *rest = progress()
        return Beat(host, 0, step, tuple(rest), _where(main))

    dog = Watchdog(rank, size, _get_default_store(), hang_s, look)
    dog.start()
    try:
        yield
    finally:
        dog.stop()


def _where(thread: int | None) -> str:
    """The innermost line of lowprec that a thread is in."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None and "lowprec" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "the program"
    return f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno} ({frame.f_code.co_name})"
