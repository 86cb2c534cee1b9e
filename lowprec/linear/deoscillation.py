"""Deoscillation: when weights that only flip between two quantised values are put to rest, as data.

Late in training a master weight that sits near the middle between two grid values crosses it back and forth: the
master hardly moves, its quantised value jumps by a whole step every time. OsciReset (TetraJet-v2, arXiv:2510.27527)
watches both paths over a window of steps and sets the worst to the value they have now::

    d_w = sum |w_t - w_{t-1}|     d_Q = sum |Q(w_t) - Q(w_{t-1})|     where d_w > 0 and d_Q / d_w >= ratio:  w <- Q(w)

This is the setting and its calendar; ``lowprec.train.oscillation`` does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Deoscillation:
    """The ``deoscillation:`` node of a precision file.

    Attributes:
        ratio: d_Q / d_w from which a weight is reset; above 1.
        start, stop: a window begins where start <= progress < stop (0 = first step, 1 = end of training).
        every: a window begins at the steps that are multiples of this.
        window: steps a window lasts, at most `every`; weights are reset after its last update.
        sample: share of every row that is tracked, 0 < sample <= 1: those farthest from their grid value at the
            beginning of the window, in bins. Less than 1 saves memory in proportion.
    """

    ratio: float = 8.0
    start: float = 0.6
    stop: float = 1.0
    every: int = 200
    window: int = 50
    sample: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, whole = getattr(self, f.name), f.name in ("every", "window")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"deoscillation.{f.name} is a {'whole ' if whole else ''}number, got {value!r}")
        if not self.ratio > 1:
            raise ValueError(f"deoscillation.ratio must be above 1 (8 is usual), got {self.ratio}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                "deoscillation.start and stop are training progress with 0 <= start < stop <= 1,"
                f" got {self.start} and {self.stop}"
            )
        if not 1 <= self.window <= self.every:
            raise ValueError(
                f"deoscillation.window must be at least 1 and at most every ({self.every}), got {self.window}"
            )
        if not 0 < self.sample <= 1:
            raise ValueError(f"deoscillation.sample is a share above 0 and at most 1, got {self.sample}")

    def window_of(self, step: int, steps: int) -> int | None:
        """The first step of the window that step `step` (from 0) of `steps` lies in; None outside windows."""
        first = step - step % self.every
        return first if step - first < self.window and self.start <= first / steps < self.stop else None
