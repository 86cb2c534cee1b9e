"""fit: the parameters of a law from a table of runs, at the global optimum and knowing how far to trust it.

    1. N, D and C are divided by their geometric means; positive coefficients become logarithms (problem.py)
    2. starts from a grid over the exponents, with the linear coefficients solved for (starts.py)
    3. robust Newton descent of all parameters together, float64 and exact Jacobian, while Huber's delta is lowered from
       infinity (least squares) to the law's own, which is 1e-3 after arXiv:2203.15556 (descend.py)
    4. restarts around the optimum: the best is kept, and `reached` is the share that ended there

What is minimised is S = sum_i h_delta(log predicted_i - log measured_i), a sum and not a mean. The estimate alone says
little: A and B in natural units are known to tens of percent even from 240 runs. uncertainty.py has the intervals, and
diagnose.py says whether to believe any of it.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.descend import descend
from lowprec.scaling.law import Array, LawFile
from lowprec.scaling.problem import Problem, huber, pivoted_columns, pose, raw_columns
from lowprec.scaling.starts import grid_starts
from lowprec.scaling.table import RunTable

STARTS = 6  # points of the start grid that are polished
RESTARTS = 16
JITTER = 0.15  # sd of a restart's start: of a logarithm absolutely, of the rest relative to its value
SAME = 1e-4  # objectives that differ by less than this share are of the same optimum
EXACT = 1e-9  # residuals of this size are rounding
AT_BOUND = 1e-4  # of the width between the bounds
OUTLIER_MADS = 5.0


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law, table: what was fitted to what (laws of whole curves: one row a logged point).
        params: parameters in natural units (N in parameters, D in tokens), those held fixed included.
        pivoted: the same with N, D, C divided by `pivots`: what the fit determines well.
        pivots: geometric mean of every pivoted column.
        free: names of the fitted parameters.
        objective: sum of Huber_delta over the residuals.
        delta: the Huber threshold; inf is least squares.
        residuals: (n,) log(predicted) - log(measured), or the difference for laws of plain residuals.
        rmse: root of their mean square.
        condition: of the Jacobian with columns scaled to length 1; inf if some parameter does nothing.
        correlation: (p, p) of the estimates, in pivoted coordinates.
        at_bound: names of the free parameters that ended on a bound.
        spans: largest over smallest of N, D and D/N.
        reached: share of the jittered restarts that ended at the same optimum.
        seconds: that the fit took.
        x, problem: optimum and problem in the coordinates of the optimiser.
    """

    law: LawFile
    table: RunTable
    params: dict[str, float]
    pivoted: dict[str, float]
    pivots: dict[str, float]
    free: tuple[str, ...]
    objective: float
    delta: float
    residuals: Array
    rmse: float
    condition: float
    correlation: pd.DataFrame
    at_bound: tuple[str, ...]
    spans: dict[str, float]
    reached: float
    seconds: float
    x: Array
    problem: Problem

    def predict(self, data: RunTable | Mapping[str, Any]) -> Array:
        """(n,) predicted response of every row of a run table or of columns by name, natural units.

        Raises ValueError for a column that the law needs and `data` lacks, and for a precision that was not fitted.
        """
        return predict(self.problem, self.x[None], data)[0]

    @functools.cached_property
    def outliers(self) -> tuple[str, ...]:
        """Names of the runs farther than 5 median absolute deviations from the curve. They stay in the fit."""
        names = np.asarray(self.table.frame.get("run", self.table.frame.index))
        return tuple(str(names[i]) for i in outliers(self.residuals, len(self.free)))


def outliers(residuals: Array, count: int) -> Array:
    """Row numbers of residuals farther than 5 median absolute deviations from the median, under a fit of `count`
    parameters. A robust one goes through about that many runs, so the median deviation is that of the others."""
    off = np.abs(residuals - np.median(residuals))
    median = np.quantile(off, min(1.0, (1 + count / len(off)) / 2))
    return np.flatnonzero(off > OUTLIER_MADS * max(float(median), EXACT))


def predict(problem: Problem, x: Array, data: RunTable | Mapping[str, Any]) -> Array:
    """(g, n) predictions of parameter vectors x (g, p) for other runs, natural units."""
    raw = raw_columns(problem.law, data)
    columns = pivoted_columns(raw, problem.pivots)
    known = {p.name for p in problem.params}
    if missing := [p.name for p in problem.law.law.params(columns) if p.name not in known]:
        raise ValueError(f"law {problem.law.name} was fitted without {missing[0]}: no such run was in the table")
    return problem.predict(x, problem.law.law.prepare(columns), len(next(iter(raw.values()))))


def fit(
    law: LawFile,
    table: RunTable,
    *,
    delta: float | None = None,
    start: Mapping[str, float] | None = None,
    fixed: Mapping[str, float] | None = None,
    seed: int = 0,
    restarts: int = RESTARTS,
) -> Fit:
    """Fits a law to a table.

    `delta` replaces the law's Huber threshold (inf: least squares). `start`: natural values to begin from instead of
    the grid. `fixed`: natural values that are held, such as the backbone of an earlier fit; ``eff_N`` stands for every
    ``eff_N[...]``. ValueError with one sentence for data that the law cannot be fitted to at all; whether the result
    deserves belief is for `judge` to say.
    """
    began = time.perf_counter()
    delta = law.huber if delta is None else float(delta)
    if not delta > 0:
        raise ValueError(f"delta is {delta}; the Huber threshold must be positive (inf for least squares)")
    table = law.law.expand(table)
    problem = pose(law, table).hold(fixed or {})
    starts = grid_starts(problem, STARTS) if start is None else problem.encode(start)[None]
    x, reached = search(problem, starts, delta, seed, restarts)
    return _describe(problem, table, x, delta, reached, began)


def search(problem: Problem, starts: Array, delta: float, seed: int = 0, restarts: int = 0) -> tuple[Array, float]:
    """The best optimum x (p,) from starts (g, p) and restarts around it, and the share of restarts that found it."""
    x, cost = starts, np.zeros(len(starts))
    for threshold in (np.inf, *(d for d in 10.0 ** -np.arange(2, 12) if d > delta), delta):
        x, cost = descend(problem, x[np.argsort(cost, kind="stable")[: max(2, len(x) // 2)]], threshold)
    best, objective = x[np.argmin(cost)], float(cost.min())
    if not restarts or not len(best):
        return best, 1.0
    noise = np.random.default_rng(seed).normal(0, JITTER, (restarts, len(best)))
    x, cost = descend(problem, best + noise * np.where(problem.logs, 1.0, np.abs(best)), delta)
    if cost.min() < objective:
        best, objective = x[np.argmin(cost)], float(cost.min())
    same = cost <= objective * (1 + SAME) + 0.5 * len(problem.response) * EXACT**2
    return best, float(np.mean(same))


def _describe(problem: Problem, table: RunTable, x: Array, delta: float, reached: float, began: float) -> Fit:
    residuals, jacobian = (part[0] for part in problem.linearize(x[None]))
    low, high = problem.bounds
    names = tuple(p.name for p in problem.free)
    margin = AT_BOUND * (high - low)
    condition, correlation = conditioning(jacobian)
    theta = problem.theta(x)
    return Fit(
        law=problem.law,
        table=table,
        params={name: float(value) for name, value in problem.natural(x).items()},
        pivoted={p.name: float(theta[p.name]) for p in problem.params},
        pivots=dict(problem.pivots),
        free=names,
        objective=float(np.sum(huber(residuals, delta))),
        delta=delta,
        residuals=residuals,
        rmse=float(np.sqrt(np.mean(residuals**2))),
        condition=condition,
        correlation=pd.DataFrame(correlation, index=names, columns=names),
        at_bound=tuple(n for n, v, a, b, m in zip(names, x, low, high, margin) if v <= a + m or v >= b - m),
        spans=spans(table),
        reached=reached,
        seconds=time.perf_counter() - began,
        x=x,
        problem=problem,
    )


def conditioning(jacobian: Array) -> tuple[float, Array]:
    """Condition number of a Jacobian (n, p) with unit columns, and the (p, p) correlations of the estimates."""
    lengths = np.linalg.norm(jacobian, axis=0)
    count = jacobian.shape[1]
    if not count:
        return 1.0, np.zeros((0, 0))
    if not np.isfinite(lengths).all() or (lengths == 0).any() or len(jacobian) < count:
        return np.inf, np.full((count, count), np.nan)
    _, singular, right = np.linalg.svd(jacobian / lengths, full_matrices=False)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf
    covariance = (right.T / np.maximum(singular, 1e-300) ** 2) @ right
    sd = np.sqrt(np.diag(covariance))
    return condition, covariance / np.outer(sd, sd)


def spans(table: RunTable) -> dict[str, float]:
    """Largest over smallest N, D and D/N of the runs, where the table has them."""
    found = {name: table.column(name) for name in ("N", "D") if name in table}
    if len(found) == 2:
        found["D/N"] = found["D"] / found["N"]
    return {name: float(values.max() / values.min()) for name, values in found.items()}
