"""Leaving early and in order: a signal or a time limit becomes a flag that all ranks agree on.

SIGTERM and SIGUSR1 (what schedulers send before they take a machine away), SIGINT (Ctrl-C) and `train.time_limit_s`
ask for a stop. The loop polls the flag after every step and every validation batch, saves, and exits with `REQUEUE`.
A second Ctrl-C stops at once. Under torchrun the exit code of torchrun itself is 1 whatever its workers return, it
gives them 30 s after SIGTERM, and it passes SIGUSR1 on only with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from lowprec.parallel import World

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start me again
DIVERGED = 70  # EX_SOFTWARE: starting again would only repeat it
_TIME_LIMIT = 1000  # above every signal number


class Stop:
    """Create in the main thread, early: it installs the handlers and starts the clock."""

    def __init__(self, time_limit_s: float = 0.0) -> None:
        self._deadline = time.monotonic() + time_limit_s if time_limit_s else float("inf")
        self._asked = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    def poll(self, world: World) -> str | None:
        """Why all ranks should stop now, or None; a collective, so every rank gets the same answer."""
        asked = self._asked or (_TIME_LIMIT if time.monotonic() > self._deadline else 0)
        if world.size > 1:
            flag = torch.tensor(asked)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control)
            asked = int(flag)
        if asked == 0:
            return None
        return "train.time_limit_s is reached" if asked == _TIME_LIMIT else f"{signal.Signals(asked).name} received"
