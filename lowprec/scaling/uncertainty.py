"""How sure: bootstrap over clusters of runs, noise of a single run, profile likelihood.

**Bootstrap** (Efron 1979): draw runs with replacement, refit, a thousand times; intervals are percentiles. Drawn are
*clusters*: all runs of one (N, D) cell together, which share what is odd about that cell, or all rows of one run. A
resample is a vector of weights, so nothing is copied, every refit starts at the optimum, and many are fitted at once. A
resample from which the parameters cannot be determined (too few different cells) is drawn again, and counted.

**Noise.** An interval of the curve is not one of the next run, which has a seed of its own. `noise` is the standard
deviation of one run about the curve.

**Profile.** The objective with one parameter held and all others refitted. E above all: where that is flat, E is not
known, however narrow another interval may look.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.descend import ROUGH, descend
from lowprec.scaling.fit import Fit, predict
from lowprec.scaling.law import Array
from lowprec.scaling.problem import Problem
from lowprec.scaling.table import RunTable

ELEMENTS = 300_000  # numbers in the Jacobians of the refits that are done at once
REPORTS, BATCH = 20, 50  # reports of progress, unless that makes batches smaller than this
REDRAWS = 20  # draws of one resample before it is given up
SINGULAR = (
    1e-7  # a resample whose scaled Jacobian is this much worse conditioned than that of all runs determines nothing
)


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Refits of resampled runs.

    Attributes:
        fit: the fit to all runs.
        x: (count, p) optima in the coordinates of the optimiser.
        samples: (count, parameters) in natural units, those held fixed included.
        noise: standard deviation of a single run's residual.
        failed: resamples that were given up: no draw determined the parameters, or the refit was not finite.
        redrawn: draws that were thrown away because they did not determine the parameters.
        cluster: what was drawn, "cell" or "run".
    """

    fit: Fit
    x: Array
    samples: pd.DataFrame
    noise: float
    failed: int
    redrawn: int
    cluster: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.samples.columns)

    @functools.cached_property
    def pivoted(self) -> pd.DataFrame:
        """(count, parameters) with N, D, C divided by the fit's pivots: what the runs determine well."""
        return _frame(self.fit.problem.theta(self.x.T), len(self.x))

    def intervals(self, level: float = 0.95, *, pivoted: bool = False) -> dict[str, tuple[float, float]]:
        """Percentile interval of every fitted parameter. Raises ValueError if there are no refits to take it from."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; it is a probability between 0 and 1, such as 0.95")
        if not len(self.x):
            raise ValueError("no resample of these runs determines the parameters, so there are no intervals")
        samples = (self.pivoted if pivoted else self.samples)[list(self.fit.free)].to_numpy()
        low, high = np.quantile(samples, ((1 - level) / 2, (1 + level) / 2), axis=0)
        return {name: (float(a), float(b)) for name, a, b in zip(self.fit.free, low, high)}

    def predict(self, data: RunTable | Mapping[str, Any], *, noise: bool = False, seed: int = 0) -> Array:
        """(count, n) predictions of every refit; with `noise`, of a single run that has its own."""
        predicted = predict(self.fit.problem, self.x, data)
        if not noise:
            return predicted
        z = np.random.default_rng(seed).normal(0, self.noise, predicted.shape)
        return predicted * np.exp(z) if self.fit.law.law.log_residuals else predicted + z


def _frame(columns: Mapping[str, Any], count: int) -> pd.DataFrame:
    return pd.DataFrame({name: np.broadcast_to(value, (count,)) for name, value in columns.items()})


def clusters(table: RunTable, kind: str) -> Array:
    """(n,) number of the cluster of every row: of its (N, D) cell, or of its run."""
    keys = {"cell": ["N", "D"], "run": ["run"]}
    if kind not in keys:
        raise ValueError(f"cluster is {kind!r}; it can be 'cell' (all runs of equal N and D) or 'run'")
    if any(key not in table for key in keys[kind]):
        return np.arange(len(table))
    return table.frame.groupby(keys[kind], sort=False).ngroup().to_numpy()


def bootstrap(
    fitted: Fit,
    count: int = 1000,
    *,
    seed: int = 0,
    cluster: str = "cell",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Bootstrap:
    """`count` refits of resampled clusters; `progress(done, count)` is called now and then.

    With `workers` > 1 in that many processes. The samples depend on `seed` alone.
    """
    problem, groups = fitted.problem, clusters(fitted.table, cluster)
    size = max(1, len(fitted.x)) * len(fitted.residuals)
    width = max(1, min(ELEMENTS // size, max(BATCH, -(-count // REPORTS))))
    parts = [range(begin, min(begin + width, count)) for begin in range(0, count, width)]
    refit = functools.partial(_refits, problem, fitted.x, fitted.delta, groups, seed)
    found: list[tuple[Array, int]] = []

    def collect(results: Any) -> None:
        for part, result in zip(parts, results):
            found.append(result)
            if progress:
                progress(part.stop, count)

    if workers > 1 and len(parts) > 1:
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(parts))) as pool:
            collect(pool.map(refit, parts))
    else:
        collect(map(refit, parts))
    x = np.concatenate([optima for optima, _ in found]) if found else np.zeros((0, len(fitted.x)))
    x = x[np.isfinite(x).all(axis=1)]
    samples = _frame(problem.natural(x.T), len(x))
    redrawn = sum(again for _, again in found)
    return Bootstrap(fitted, x, samples, noise(fitted), count - len(x), redrawn, cluster)


def noise(fitted: Fit) -> float:
    """Standard deviation of one run about the curve; the curve was fitted to the same runs, so p of them are spent."""
    spare = max(1, len(fitted.residuals) - len(fitted.free))
    return float(np.sqrt(np.sum(fitted.residuals**2) / spare))


def _refits(problem: Problem, x: Array, delta: float, groups: Array, seed: int, part: range) -> tuple[Array, int]:
    """Optima (len(part), p) of the resamples numbered `part`, NaN where given up, and the number of draws refused."""
    jacobian = problem.linearize(x[None])[1][0]
    jacobian = np.nan_to_num(jacobian, posinf=0.0, neginf=0.0)
    scaled = jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    number, redrawn = int(groups.max()) + 1, 0
    least = np.linalg.eigvalsh(scaled.T @ scaled).min(initial=np.inf) if len(x) else 0.0
    weights = np.zeros((len(part), len(groups)))
    for row, i in zip(weights, part):
        rng = np.random.default_rng([seed, i])
        for _ in range(REDRAWS):
            row[:] = np.bincount(rng.integers(number, size=number), minlength=number)[groups]
            if _determines(scaled, row, least):
                break
            redrawn, row[:] = redrawn + 1, 0.0
    some = weights.any(axis=1)
    optima = np.full((len(part), len(x)), np.nan)
    if some.any():
        start = np.repeat(x[None], int(some.sum()), axis=0)
        found, cost = descend(problem, start, delta, weights[some], ROUGH)
        optima[some] = np.where(np.isfinite(cost)[:, None], found, np.nan)
    return optima, redrawn


def _determines(scaled: Array, weights: Array, least: float) -> bool:
    if not scaled.shape[1]:
        return True
    return bool(np.linalg.eigvalsh((scaled * weights[:, None]).T @ scaled).min() > SINGULAR * least)


def profile(fitted: Fit, name: str, grid: Sequence[float]) -> Array:
    """(len(grid),) smallest objective with the parameter `name` held at each natural value and all others refitted."""
    if name not in fitted.free:
        raise ValueError(f"{name!r} was not fitted; fitted were {', '.join(fitted.free)}")
    values, found = np.asarray(grid, dtype=np.float64), np.zeros(len(grid))
    for side in (values >= fitted.params[name], values < fitted.params[name]):
        known = fitted.params
        for i in sorted(np.flatnonzero(side), key=lambda i: abs(values[i] - fitted.params[name])):
            found[i], known = _held(fitted, name, float(values[i]), known)
    return found


def _held(fitted: Fit, name: str, value: float, start: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    problem = fitted.problem.hold({name: value})
    x, cost = descend(problem, problem.encode(start)[None], fitted.delta)
    return float(cost[0]), {key: float(v) for key, v in problem.natural(x[0]).items()}
