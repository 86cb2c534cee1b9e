"""Leaving early and in order: a signal or a time limit becomes a flag that all ranks agree on.

SIGTERM and SIGUSR1 (what schedulers send before they take a machine away), SIGINT (Ctrl-C) and `train.time_limit_s`
ask for a stop. The loop polls the flag after every step and every validation batch, saves, and exits with `REQUEUE`.
A second Ctrl-C stops at once. A run that a person has cancelled (the tag `cancel`, :mod:`lowprec.train.sinks_wandb`)
is left in the same way, with code 0: no scheduler shall start it again. Before the first step, while data is prepared
and the model built, there is nothing to save, and the signal ends the program there and then (`at_once`). Threads do
not see signals: Python hands them to the main thread.

Under torchrun the exit code of torchrun itself is 1 whatever its workers return (the run folder's file `exit_code` has
theirs); it gives them 30 s after SIGTERM, or `--shutdown-timeout`, and it passes SIGUSR1 on only with
`--signals-to-handle SIGTERM,SIGINT,SIGUSR1`.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from lowprec.parallel import World

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start me again
DIVERGED = 70  # EX_SOFTWARE: starting again would only repeat it
_TIME_LIMIT = 1000  # above every signal number
_CANCEL = 1001  # above all: what a person decides stands


class Stopped(BaseException):
    """A signal came before the first step. No Exception: libraries that catch all of those must let it pass."""


class Stop:
    """Create in the main thread, early: it installs the handlers and starts the clock.

    Attributes:
        polls: how often the flag was asked for; ranks ask together, so one that is behind the others has not come yet.
        cancelled: whether the answer of the last poll was that a person has cancelled the run.
    """

    def __init__(self, time_limit_s: float = 0.0) -> None:
        self._started_s = time.monotonic()
        self.limit(time_limit_s)
        self.polls = 0
        self._asked, self._at_once, self._cancel = 0, False, False
        self.cancelled = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        if self._at_once:
            raise Stopped

    def limit(self, time_limit_s: float) -> None:
        """Ask for a stop so many seconds after the start; 0 = never."""
        self._deadline = self._started_s + time_limit_s if time_limit_s else float("inf")

    def cancel(self) -> None:
        """A person wants this run stopped and not started again; one rank is enough."""
        self._cancel = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, the first signal raises Stopped."""
        self._at_once = True
        try:
            if self._asked:
                raise Stopped
            yield
        finally:
            self._at_once = False

    @property
    def received(self) -> str | None:
        """The signal that this rank has received, if any."""
        return signal.Signals(self._asked).name if self._asked else None

    def poll(self, world: World) -> str | None:
        """Why all ranks should stop now, or None; a collective, so every rank gets the same answer."""
        self.polls += 1
        asked = self._asked or (_TIME_LIMIT if time.monotonic() > self._deadline else 0)
        asked = _CANCEL if self._cancel else asked
        if world.size > 1:
            flag = torch.tensor(asked)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control)
            asked = int(flag)
        self.cancelled = asked == _CANCEL
        if asked == 0:
            return None
        if self.cancelled:
            return "cancelled on the page of the run"
        return "train.time_limit_s is reached" if asked == _TIME_LIMIT else f"{signal.Signals(asked).name} received"
