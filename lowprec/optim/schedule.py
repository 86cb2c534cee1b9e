"""The learning rate as a pure function of the step: a linear warmup, then one of four shapes.

Steps are numbered 0 .. N - 1. With s = step + 1, W warmup steps, and f = final_frac, the learning rate over its peak
is

    warmup      s / W                                       for s <= W: step W - 1 is the first at the peak
    constant    1
    linear      f + (1 - f) (1 - x)                         x = (s - W) / (N - W)
    cosine      f + (1 - f) (1 + cos(pi x)) / 2             the same x; arXiv:1608.03983
    wsd         1 until D = decay_frac N steps are left, then f + (1 - f) shape(x), x = (s - (N - D)) / D
                shape = 1 - x (linear) or 1 - sqrt(x) (arXiv:2405.18392); warmup-stable-decay: arXiv:2404.06395

So the pieces join without a jump and the last step, N - 1, runs at exactly f times the peak. Nothing is stored: a
resumed run needs only its step.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

E = TypeVar("E", bound=Enum)


class Shape(Enum):
    """What follows the warmup."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Decay(Enum):
    """How wsd falls at the end: linear = 1 - x; one_minus_sqrt = 1 - sqrt(x), quick first and slow at last."""

    linear = "linear"
    one_minus_sqrt = "one_minus_sqrt"


@dataclass
class ScheduleConfig:
    """Shape of the learning rate; every field is a key of `recipes/schedule/*.yaml`."""

    shape: Shape = Shape.wsd
    warmup_steps: int | None = None  # give this or warmup_frac, or neither for no warmup
    warmup_frac: float | None = None  # of all steps
    final_frac: float = 0.01  # last learning rate / peak; not used by constant
    decay_frac: float = 0.2  # wsd: share of all steps spent decaying
    decay_shape: Decay = Decay.one_minus_sqrt  # wsd

    def __post_init__(self) -> None:
        self.shape = _member(Shape, self.shape, "shape")
        self.decay_shape = _member(Decay, self.decay_shape, "decay_shape")
        if self.warmup_steps is not None and self.warmup_frac is not None:
            raise ValueError("schedule.warmup_steps and schedule.warmup_frac are both given: set one of them to null.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}: it must be 0 or positive.")
        for name in ("warmup_frac", "final_frac", "decay_frac"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"schedule.{name} is {value}: it must lie between 0 and 1.")


def learning_rate(step: int, total_steps: int, schedule: ScheduleConfig, peak_lr: float) -> float:
    """The learning rate of update `step` (0-based) out of total_steps; a step beyond the last has the last one's.

    Raises ValueError for a negative step, and if warmup and decay do not fit into total_steps.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"learning_rate got step {step} of {total_steps}: steps count from 0, of at least one.")
    warmup, decay = phases(total_steps, schedule)
    done = min(step + 1, total_steps)
    if done <= warmup:
        return peak_lr * done / warmup
    decayed = done - (total_steps - decay)
    if decayed <= 0:
        return peak_lr
    x = decayed / decay
    return peak_lr * (schedule.final_frac + (1 - schedule.final_frac) * _fall(schedule, x))


def phases(total_steps: int, schedule: ScheduleConfig) -> tuple[int, int]:
    """(warmup steps, decay steps), with the peak between them. Raises ValueError if they do not fit."""
    warmup = schedule.warmup_steps or round((schedule.warmup_frac or 0.0) * total_steps)
    decay = {
        Shape.constant: 0,
        Shape.linear: total_steps - warmup,
        Shape.cosine: total_steps - warmup,
        Shape.wsd: round(schedule.decay_frac * total_steps),
    }[schedule.shape]
    if warmup > total_steps or warmup + decay > total_steps:
        raise ValueError(
            f"The schedule's {warmup} warmup steps and {max(decay, 0)} decay steps do not fit into {total_steps}: "
            "lower schedule.warmup_steps (or warmup_frac) or schedule.decay_frac, or train for more steps."
        )
    return warmup, decay


def _fall(schedule: ScheduleConfig, x: float) -> float:
    """1 at x = 0, 0 at x = 1."""
    if schedule.shape is Shape.cosine:
        return (1 + math.cos(math.pi * x)) / 2
    if schedule.shape is Shape.wsd and schedule.decay_shape is Decay.one_minus_sqrt:
        return 1 - math.sqrt(x)
    return 1 - x


def _member(enum: type[E], value: object, field: str) -> E:
    """The enum's member for a member or its name."""
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"schedule.{field} is {value!r}: it must be one of {[m.value for m in enum]}.") from None
