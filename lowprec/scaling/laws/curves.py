"""Laws of whole loss curves: what the learning rate's schedule does to the loss at every step.

Tissue et al., arXiv:2408.11029 (`annealing`):

    L(t) = L0 + A / S1^alpha - C S2
    S1 = sum_i eta_i                                                how far the optimizer has come
    S2 = sum_i m_i,   m_i = lambda m_(i-1) + (eta_(i-1) - eta_i)    how much it has annealed, remembering 1/(1-lambda)
                                                                    steps

Luo et al., arXiv:2503.12811 (`multi_power`):

    L(t) = L0 + A / S1^alpha - B sum_k (eta_(k-1) - eta_k) (1 - (1 + C eta_k^-gamma (S1(t) - S1(k-1)))^-beta)

They answer: what another schedule (WSD instead of cosine, a longer decay, a late one) would have ended at, from two or
three whole curves, and how much of a loss in mid-training is only the learning rate's. Both hold for one model, one
batch size, one optimizer and one peak learning rate at a time, after warm-up. The points of one curve are not
independent: count curves, not points, and draw whole curves in a bootstrap (cluster by run).

`curve_points` turns runs with curves into a table of one row a logged point, which the laws are fitted to. A
:class:`History` is the learning rate of one run, at most a few hundred knots with straight lines between them, so that
a sum over all drops costs the same for a run of 1e3 and of 1e6 steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.signal import lfilter

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.chinchilla import yes_or_no
from lowprec.scaling.table import RunTable

KNOTS = 512  # of a learning rate's history
JUMP = 0.2  # of the peak, between two logged points
CORNER = 1e-9  # of the peak, of the second difference


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The learning rate of one run: straight lines between (steps[j], lr[j]), from step 0; steps ascend."""

    steps: Array
    lr: Array

    def __repr__(self) -> str:
        return f"History({self.steps[-1]:g} steps, peak {self.lr.max():g}, end {self.lr[-1]:g})"

    @staticmethod
    def of(steps: Any, lr: Any, knots: int = KNOTS) -> "History":
        """From logged points (n,), thinned to about `knots`. What came before the first one is taken to be a warm-up in
        a straight line from 0, and a fall of more than a fifth of the peak between two points to be a jump at the later
        one. Raises ValueError for fewer than two points, or steps that do not ascend."""
        steps, lr = np.asarray(steps, dtype=np.float64), np.asarray(lr, dtype=np.float64)
        if len(steps) < 2 or (np.diff(steps) <= 0).any() or (lr < 0).any() or lr.max() <= 0:
            raise ValueError("a curve needs two logged points or more, ascending steps and learning rates above zero")
        if steps[0] > 0:
            steps, lr = np.concatenate([[0.0], steps]), np.concatenate([[0.0], lr])
        jump = np.flatnonzero((lr[:-1] - lr[1:] > JUMP * lr.max()) & (np.diff(steps) > 1))
        steps, lr = np.insert(steps, jump + 1, steps[jump + 1] - 1), np.insert(lr, jump + 1, lr[jump])
        if len(steps) > knots:
            corner = np.concatenate([[True], np.abs(np.diff(lr, 2)) > CORNER * lr.max(), [True]])
            if corner.sum() > knots // 2:  # smooth everywhere, or noisy
                corner = np.concatenate([[False], np.abs(np.diff(lr)) > JUMP * lr.max()])
                corner[:-1] |= corner[1:]
            corner[np.linspace(0, len(steps) - 1, knots // 2).astype(int)] = True
            steps, lr = steps[corner], lr[corner]
        return History(steps, lr)

    @functools.cached_property
    def warm(self) -> int:
        """Index of the knot at which warm-up ends: the first of the largest learning rate."""
        return int(np.argmax(self.lr))

    @functools.cached_property
    def area(self) -> Array:
        """(knots,) the integral of the learning rate up to each knot."""
        mean = (self.lr[1:] + self.lr[:-1]) / 2
        return np.concatenate([[0.0], np.cumsum(mean * np.diff(self.steps))])

    def integral(self, steps: Array) -> Array:
        """The area under the learning rate up to `steps`."""
        j = np.clip(np.searchsorted(self.steps, steps, side="right") - 1, 0, len(self.steps) - 1)
        return self.area[j] + (steps - self.steps[j]) * (self.lr[j] + self.at(steps)) / 2

    def at(self, steps: Array) -> Array:
        return np.interp(steps, self.steps, self.lr)

    def S1(self, steps: Array) -> Array:
        """The sum of the learning rates of steps 1 to `steps`: the trapezoids miss half of the last one."""
        return self.integral(steps) + self.at(steps) / 2

    def S2(self, steps: Array, memory: float) -> Array:
        """Annealed area at `steps`, warm-up not counted; `memory` is lambda."""
        each = np.arange(int(self.steps[-1]) + 1)
        lr = self.at(each)
        lr[: int(self.steps[self.warm]) + 1] = self.lr[self.warm]
        drops = np.concatenate([[0.0], lr[:-1] - lr[1:]])
        summed = np.cumsum(lfilter([1.0], [1.0, -memory], drops))
        return np.interp(steps, each, summed)


def curve_points(
    table: RunTable, every: int = 0, *, reader: "Callable[[str], pd.DataFrame] | None" = None, knots: int = KNOTS
) -> RunTable:
    """One row for every point after warm-up of every run's curve; `run` (the same for all points of a run), N, D and
    the other columns are kept, `step`, `lr`, `loss` and `history` are of the point.

    `every` > 0: points at multiples of so many steps, their loss the mean of what was logged within half a distance,
    for logs of single batches. `reader`: curve reference -> DataFrame(step, lr, loss); by default that of run folders.
    A table that has points already is returned as it is. Raises ValueError if no run has a curve.
    """
    if "history" in table.frame.columns:
        return table
    if reader is None:
        from lowprec.scaling.read import read_curve

        reader = read_curve
    references = table.column("curve")
    parts = []
    for (_, row), reference in zip(table.frame.iterrows(), references):
        curve = reader(str(reference)).dropna(subset=["step", "lr", "loss"]).drop_duplicates("step", keep="last")
        curve = curve.sort_values("step")
        history = History.of(curve["step"], curve["lr"], knots)
        points = curve[curve["step"] >= history.steps[history.warm]]
        if every > 0:
            group = np.round(points["step"] / every)
            points = points.groupby(group)[["lr", "loss"]].mean().rename_axis("step").reset_index()
            points["step"] = np.clip(points["step"] * every, 1, history.steps[-1])
        part = pd.DataFrame({name: [value] * len(points) for name, value in row.items() if name not in points})
        part["step"], part["lr"], part["loss"] = (points[name].to_numpy(np.float64) for name in ("step", "lr", "loss"))
        part["history"] = pd.Series([history] * len(points), dtype=object)
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    note = f"{len(frame)} points of {len(parts)} curves; points of a curve are not independent runs"
    return dataclasses.replace(table, frame=frame, notes=(*table.notes, note))


def by_history(columns: Columns) -> list[tuple[History, Array]]:
    """(history, row numbers) of every curve."""
    groups: dict[int, list[int]] = {}
    for i, history in enumerate(columns["history"]):
        groups.setdefault(id(history), []).append(i)
    return [(columns["history"][rows[0]], np.array(rows)) for rows in groups.values()]


class CurveLaw(ScalingLaw):
    """A law of logged points: columns curve, step and history of `curve_points`."""

    needs = ("curve", "step", "history")
    pivots: Mapping[str, str] = {}

    def expand(self, table: RunTable) -> RunTable:
        return curve_points(table)


class Annealing(CurveLaw):
    """Tissue's law. Option `memory` (lambda, .999): a number of the schedule, not fitted; try .99 to .9995 and compare.

    The published law counts S2 after warm-up, as here. It gives an anneal the same worth wherever it happens, which is
    where the multi-power law is better: at a few hundredths of a nat on step decays.
    """

    formula = "L(t) = L0 + A / S1^alpha - C S2"
    certainty = "the form is from the paper; that lambda is about .99 to .999 is recalled"

    def __init__(self, memory: float = 0.999, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= memory < 1:
            raise ValueError(f"option memory is {memory}; lambda is at least 0 and below 1, such as .999")
        self.memory = float(memory)

    def prepare(self, columns: Columns) -> Columns:
        """With S1 and S2 of every point."""
        S1, S2 = np.zeros((2, len(columns["step"])))
        for history, rows in by_history(columns):
            S1[rows] = history.S1(columns["step"][rows])
            S2[rows] = history.S2(columns["step"][rows], self.memory)
        return {**columns, "S1": S1, "S2": S2}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            Param("L0", 0.0, 50.0, linear=True),
            Param("A", 0.0, 1e4, linear=True),
            Param("C", 0.0, 1e6, linear=True),
            Param("alpha", 0.02, 3.0, tuple(np.linspace(0.1, 1.2, 12))),
        )

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return theta["L0"] + theta["A"] * columns["S1"] ** -theta["alpha"] - theta["C"] * columns["S2"]


class MultiPower(CurveLaw):
    """The multi-power law. Options: `warmup` (false): count warm-up among the drops; `bins` (64): drops per curve.

    The authors' code counts warm-up as a negative drop, which only adds about B eta_peak to every loss: their published
    L0 is too low by that (.11 to .16 nats) and needs `warmup: true`. Drops are gathered into `bins` of equal annealing,
    each with the learning rate and area at its middle: for 64, within .002 nats of step by step.

    C, beta and gamma trade against one another on few schedules. On the authors' three training curves of 100M the
    minimum (where a fit from their parameters ends too) is off by .0008 nats, and by .0068 on their six other curves;
    their parameters, which are no minimum, by .0044; `annealing` by .0054. Fit more schedules than three.
    """

    certainty = "the published L0 is of a fit that counts warm-up as a drop: it needs warmup: true"
    formula = "L(t) = L0 + A / S1^alpha - B sum_k (eta_(k-1) - eta_k) (1 - (1 + C eta_k^-gamma (S1 - S1_(k-1)))^-beta)"

    def __init__(self, warmup: bool = False, bins: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.warmup = yes_or_no("warmup", warmup)
        if not (isinstance(bins, int) and bins >= 1):
            raise ValueError(f"option bins is {bins!r}; it is a whole number of 1 or more")
        self.bins = bins

    def prepare(self, columns: Columns) -> Columns:
        """With S1 (n,), and one entry for every pair of a point and a bin of drops before it: `drop`, `log_lr` and the
        area `since`, in order of the points. `dropped` (points,) are those with pairs, `first` where theirs begin."""
        steps = np.asarray(columns["step"], dtype=np.float64)
        S1, pairs = np.zeros(len(steps)), []
        for history, rows in by_history(columns):
            S1[rows] = history.S1(steps[rows])
            at, size, lr = _drops(history, self.bins, self.warmup).T
            point, k = np.nonzero(steps[rows, None] > at)
            area = S1[rows[point]] - history.integral(at[k])  # S1 of the step before, if `at` is between two steps
            pairs.append(np.stack([rows[point], size[k], np.log(lr[k]), area]))
        found = np.concatenate(pairs, axis=1)
        found = found[:, np.argsort(found[0], kind="stable")]
        dropped, first = np.unique(found[0].astype(int), return_index=True)
        names = dict(zip(("drop", "log_lr", "since"), found[1:]))
        return {**columns, "S1": S1, **names, "dropped": dropped, "first": first}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            Param("L0", 0.0, 50.0, linear=True),
            Param("A", 0.0, 1e4, linear=True),
            Param("B", 0.0, 1e7, linear=True),
            Param("alpha", 0.02, 3.0, (0.2, 0.35, 0.5, 0.8)),
            Param("C", 1e-5, 30.0, (0.5, 2.0, 8.0)),
            Param("beta", 0.05, 3.0, (0.4, 0.6, 1.0)),
            Param("gamma", 0.0, 2.0, (0.3, 0.6)),
        )

    def loss(self, theta: Theta, columns: Columns) -> Array:
        C, beta, gamma = (_plain(theta[name]) for name in ("C", "beta", "gamma"))
        grown = C * np.exp(-gamma * columns["log_lr"]) * columns["since"]
        worth = columns["drop"] * (1 - np.exp(-beta * np.log(1 + grown)))
        annealed = np.zeros(len(columns["S1"]), dtype=worth.dtype)
        if len(columns["first"]):
            annealed[columns["dropped"]] = np.add.reduceat(worth, columns["first"])
        return theta["L0"] + theta["A"] * columns["S1"] ** -theta["alpha"] - theta["B"] * annealed


def _plain(value: Any) -> Any:
    """A complex number without an imaginary part as a real one, with which the sums take a fifth of the time."""
    return np.real(value) if np.ndim(value) == 0 and not np.imag(value) else value


def _drops(history: History, bins: int, warmup: bool) -> Array:
    """(k, 3) changes of a history's learning rate, in about `bins` groups of equal change: mean step, size (of a rise
    negative), mean learning rate after it. Lines that are both long and steep are cut first."""
    steps, lr = history.steps, history.lr
    begin = 0 if warmup else history.warm
    steps, lr = steps[begin:], lr[begin:]
    change, total = -np.diff(lr), np.abs(np.diff(lr)).sum()
    if not total:
        return np.zeros((0, 3))
    steep, long = np.abs(change) / total, np.diff(steps) / (steps[-1] - steps[0])
    pieces = np.ceil(np.minimum(steep, 2 * long) * bins - 1e-9).clip(1).astype(int)
    end = np.concatenate([np.arange(1, n + 1) / n for n in pieces])  # of a piece on its line
    middle = end - np.repeat(0.5 / pieces, pieces)
    at = np.repeat(steps[:-1], pieces) + middle * np.repeat(np.diff(steps), pieces)
    level = np.repeat(lr[:-1], pieces) + end * np.repeat(np.diff(lr), pieces)
    size = np.repeat(change / pieces, pieces)
    at, level, size = at[size != 0], level[size != 0], size[size != 0]
    group = np.floor(np.cumsum(np.abs(size)) / total * bins * (1 - 1e-9))
    group = np.unique(group * 2 + (size < 0), return_inverse=True)[1]
    weight = np.bincount(group, np.abs(size))
    mean_at, mean_level = (np.bincount(group, np.abs(size) * v) / weight for v in (at, level))
    return np.stack([mean_at, np.bincount(group, size), mean_level], axis=1)
