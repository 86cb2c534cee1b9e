"""design: which runs to train next, so that the number that matters becomes sharper for the least compute.

To first order the uncertainty of a fit follows from where the runs are, not from what they will measure. With J the
derivatives of all predictions over the parameters x, and sigma the noise of a run,

    M = J' J / sigma^2 + 1 / prior^2,       variance of a quantity with gradient g:  g' M^-1 g

A further run with derivatives j takes (g' M^-1 j)^2 / (sigma^2 + j' M^-1 j) off that variance (Sherman and Morrison).
Runs are added greedily, by gain, by gain per FLOP and by one between, and the best of the three lists is kept. This is
a c-optimal design (Elfving 1952): it sharpens one prediction or decision, where a D-optimal one would spend on
coefficients nobody asked about. The prior is weak (a factor of 20 for coefficients, half the allowed range for
exponents); it only keeps finite what the runs do not determine at all, and a note says when it is all there is.

All of this takes the law to be right. If it were, the cheapest cell repeated for ever would often be best; a few seeds
a cell is the limit here, and whether the law holds where it is used is for compare.py and a large run to say.

The classic mistake is a ladder at one number of tokens per parameter. On 25 runs with D = 20 N, N and D are one
variable: the condition number of J is a million times that of a grid over D/N from 10 to 160, and the loss far from
20 N is a guess (arXiv:2605.08541 finds the same over many designs).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lowprec.scaling.fit import Fit, conditioning, fit, predict
from lowprec.scaling.law import Array
from lowprec.scaling.problem import STEP
from lowprec.scaling.surface import KAPPA, Surface
from lowprec.scaling.table import REFERENCE, RunTable
from lowprec.scaling.uncertainty import noise

RATIOS = (10.0, 20.0, 40.0, 80.0, 160.0)  # tokens per parameter of a ladder
FIXED = 2.0  # D/N that spans less than this factor is one ratio
LOG_PRIOR = 3.0  # standard deviation of a coefficient's logarithm
LEAST_GAIN = 1e-3  # share of the variance that a further run must remove
LEAST_NOISE = 1e-5  # sigma of a fit without residuals


@dataclasses.dataclass(frozen=True)
class Target:
    """A quantity to know better: its value, its gradient (p,) over the fit's x, and whether it is a logarithm."""

    name: str
    value: float
    gradient: Array
    log: bool = False

    def interval(self, sd: float, level: float) -> tuple[float, float]:
        half = stats.norm.ppf((1 + level) / 2) * sd
        if self.log:
            return self.value * math.exp(-min(half, 700.0)), self.value * math.exp(min(half, 700.0))
        return self.value - half, self.value + half


@dataclasses.dataclass(frozen=True)
class Design:
    """Runs to train next.

    Attributes:
        target: what they are for.
        runs: N, D, ratio (D/N), precision, repeats, C (FLOP of all repeats), gain (share of the variance removed), in
            the order in which they were chosen; the most urgent first.
        before, after: interval of the target now and as expected with the runs.
        condition_before, condition_after: of the Jacobian.
        cost, budget: FLOP at the speed of the reference.
        notes: what to know, in sentences.
        level: of the intervals.
    """

    target: Target
    runs: pd.DataFrame
    before: tuple[float, float]
    after: tuple[float, float]
    condition_before: float
    condition_after: float
    cost: float
    budget: float
    notes: tuple[str, ...]
    level: float

    def sentences(self) -> list[str]:
        before, after = (f"{low:.4g} to {high:.4g}" for low, high in (self.before, self.after))
        found = [
            f"{self.target.name}: {self.target.value:.4g}, {self.level:.0%} interval {before} now, about {after} after "
            f"{self.runs['repeats'].sum():.0f} more runs ({self.cost:.3g} of {self.budget:.3g} FLOP)."
        ]
        for row in self.runs.itertuples():
            times = f", {row.repeats} seeds" if row.repeats > 1 else ""
            found.append(f"{row.precision}: N = {row.N:.3g}, D = {row.D:.3g} ({row.ratio:.3g} a parameter){times}")
        return [*found, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self.sentences())


def off_bounds(surface: Surface) -> Surface:
    """The same without samples, and with exponents that ended on a bound held at the middle of their start grid.

    On a bound the derivatives are those of a law that nobody believes, and they promise intervals that are far too
    small: a ladder at D = 20 N often ends at beta = 1.5, where tokens seem not to matter.
    """
    fitted = surface.fit
    stuck = {
        p.name: p.start[len(p.start) // 2]
        for p in fitted.problem.free
        if p.name in fitted.at_bound and p.start and not p.unit
    }
    if stuck:
        held = fit(fitted.law, fitted.table, fixed=stuck, delta=fitted.delta)
        x = fitted.problem.encode(held.params)
        fitted = dataclasses.replace(fitted, x=x, params=held.params, pivoted=held.pivoted)
    return dataclasses.replace(surface, fit=fitted, boot=None)


def sensitivities(fit: Fit, table: RunTable) -> Array:
    """(n, p) derivatives of the predicted response (natural units) over the fit's x, exact (complex step)."""
    tilted = fit.x[None, :] + 1j * STEP * np.eye(len(fit.x))
    return predict(fit.problem, tilted, table).imag.T / STEP


def loss_at(surface: Surface, N: float, D: float, precision: str) -> Target:
    """The loss of N parameters on D tokens in a precision, nats."""
    surface = off_bounds(surface)
    table = surface.runs(N, D, precision)
    name = f"loss of {precision} at N = {N:.3g}, D = {D:.3g}"
    return Target(name, float(surface.fit.predict(table)[0]), sensitivities(surface.fit, table)[0])


def gap_at(surface: Surface, N: float, D: float, precision: str) -> Target:
    """The gap of a precision to the reference there, nats."""
    low, high = (loss_at(surface, N, D, name) for name in (precision, surface.reference))
    name = f"gap of {precision} to {surface.reference} at N = {N:.3g}, D = {D:.3g}"
    return Target(name, low.value - high.value, low.gradient - high.gradient)


def break_even_at(surface: Surface, precision: str, budget: float, *, kappa: float = KAPPA) -> Target:
    """The break-even speed-up of a precision for a budget, as a logarithm.

    At break-even both optimal losses are equal, and at an optimum the loss does not change with N (envelope theorem):
    d ln s / dx = -(dL_low/dx - dL_ref/dx) / (dL*_low / d ln s). Raises ValueError if there is no break-even.
    """
    from lowprec.scaling.advise import break_even

    alone = off_bounds(surface)
    s = float(break_even(alone, precision, budget, kappa=kappa)[0])
    if not 0 < s < math.inf:
        raise ValueError(f"{precision} has no break-even speed-up between 1/4 and 256 at {budget:.3g} FLOP")
    low = alone.optimum(budget, precision, speedup=s, kappa=kappa)
    high = alone.optimum(budget, alone.reference, kappa=kappa)
    around = alone.optimum(budget, precision, speedup=s * np.exp([-0.05, 0.05]), kappa=kappa).loss[0]
    slope = (around[1] - around[0]) / 0.1
    gradients = [
        loss_at(alone, float(o.N[0]), float(o.D[0]), p).gradient for o, p in ((low, precision), (high, alone.reference))
    ]
    return Target(f"break-even speed-up of {precision}", s, (gradients[1] - gradients[0]) / slope, log=True)


def candidates(
    surface: Surface, *, sizes: "Sequence[float] | None" = None, ratios: Sequence[float] = (*RATIOS, 320.0),
    precisions: "Sequence[str] | None" = None,
) -> RunTable:  # fmt: skip
    """Runs that could be trained: every size at every number of tokens per parameter in every trained precision.

    Default sizes: 8, geometrically from the smallest to twice the largest that was trained.
    """
    trained = surface.fit.table.column("N")
    some = np.geomspace(trained.min(), 2 * trained.max(), 8) if sizes is None else np.asarray(sizes, dtype=np.float64)
    N, ratio = np.repeat(some, len(ratios)), np.tile(ratios, len(some))
    tables = [surface.runs(N, N * ratio, name).frame for name in precisions or surface.trained]
    return RunTable(pd.concat(tables, ignore_index=True), surface.fit.table.n_kind)


def design(
    surface: Surface, target: Target, budget: float, *, options: "RunTable | None" = None, sigma: "float | None" = None,
    most: int = 20, seeds: int = 3, kappa: float = KAPPA, level: float = 0.95,
) -> Design:  # fmt: skip
    """The runs among `options` (default: `candidates`) that shrink the target's interval most for `budget` FLOP.

    `sigma`: noise of one run in residuals of the fit; default: what the fit left. A run may be chosen up to
    `seeds` times, and `most` runs in all. Precisions cost what the reference costs. Raises ValueError if no option is
    affordable.
    """
    fit, options = off_bounds(surface).fit, candidates(surface) if options is None else options
    sigma = max(noise(surface.fit) if sigma is None else float(sigma), LEAST_NOISE)
    cost = kappa * options.column("N") * options.column("D")
    if not (cost <= budget).any():
        raise ValueError(
            f"a budget of {budget:.3g} FLOP pays for none of the runs; the cheapest takes {cost.min():.3g}"
        )
    J = fit.problem.linearize(fit.x[None])[1][0]
    new = sensitivities(fit, options)
    if fit.law.law.log_residuals:
        new = new / fit.predict(options)[:, None]
    M = J.T @ J / sigma**2 + np.diag(1 / _prior(fit) ** 2)
    covariance = np.linalg.inv(M)
    greedy = functools.partial(_greedy, covariance, new / sigma, target.gradient, cost, budget, most, seeds)
    lists = [greedy(power) for power in (0.0, 0.5, 1.0)]
    chosen, after = min(lists, key=lambda found: found[1][-1])
    before = after[0]
    runs = options.frame.iloc[chosen][["N", "D", "precision"]].reset_index(drop=True)
    runs = runs.assign(C=cost[chosen], gain=-np.diff(after) / before)
    runs = runs.groupby(["N", "D", "precision"], sort=False, as_index=False).agg(
        repeats=("C", "size"), C=("C", "sum"), gain=("gain", "sum")
    )
    runs.insert(2, "ratio", runs["D"] / runs["N"])
    all_rows = np.concatenate([J, new[chosen]])
    prior_alone = float(target.gradient**2 @ _prior(fit) ** 2)
    return Design(
        target, runs, target.interval(math.sqrt(before), level), target.interval(math.sqrt(after[-1]), level),
        conditioning(J)[0], conditioning(all_rows)[0], float(cost[chosen].sum()), budget,
        tuple(_notes(fit, runs, after[-1] > 0.05 * prior_alone)), level,
    )  # fmt: skip


def _prior(fit: Fit) -> Array:
    """(p,) weak standard deviations of the fit's x: of logarithms, and half the allowed range of the rest."""
    low, high = fit.problem.bounds
    return np.where(fit.problem.logs, LOG_PRIOR, 0.5 * (high - low))


def _greedy(
    covariance: Array, rows: Array, gradient: Array, cost: Array, budget: float, most: int, seeds: int, power: float
) -> tuple[list[int], Array]:
    """(indices chosen, variance of the target before and after each), by gain / cost^power. `rows`: over sigma."""
    chosen, left, found = list[int](), budget, [float(gradient @ covariance @ gradient)]
    while len(chosen) < most:
        spread = rows @ covariance  # (n, p)
        gain = (spread @ gradient) ** 2 / (1 + np.sum(spread * rows, axis=1))
        gain[(cost > left) | (np.bincount(np.array(chosen, dtype=np.int64), minlength=len(rows)) >= seeds)] = 0.0
        best = int(np.argmax(gain / cost**power))
        if gain[best] <= LEAST_GAIN * found[-1]:
            break
        v = spread[best]
        covariance = covariance - np.outer(v, v) / (1 + v @ rows[best])
        chosen.append(best)
        found.append(float(gradient @ covariance @ gradient))
        left -= cost[best]
    return chosen, np.array(found)


def _notes(fit: Fit, runs: pd.DataFrame, prior_rules: bool) -> list[str]:
    notes = []
    if fit.at_bound:
        notes.append(
            f"{', '.join(fit.at_bound)} ended on a bound: the fit is poor, and so is what is expected of these runs."
        )
    if fit.spans.get("D/N", math.inf) < FIXED:
        notes.append(
            "All runs so far have nearly the same tokens per parameter, so size and data cannot be told apart: vary it."
        )
    if fit.spans.get("N", math.inf) < FIXED:
        notes.append("All runs so far have nearly the same size: vary N.")
    if prior_rules:
        notes.append("Even then the runs say little about this number: a prior, not data, bounds the interval.")
    if not len(runs):
        notes.append("No affordable run would narrow the interval noticeably.")
    return notes


def first_ladder(
    budget: float, *, precisions: Sequence[str] = (REFERENCE,), sizes: int = 5, step: float = 2.0,
    ratios: Sequence[float] = RATIOS, repeats: int = 2, largest: float = math.inf, kappa: float = KAPPA,
) -> RunTable:  # fmt: skip
    """Runs to begin with when there are none: every size at every tokens-per-parameter ratio in every precision.

    Sizes are `step` apart. Cells that cost more than the largest size at the second ratio are left out, since the
    corner of large and long would eat most of the budget, and the cheapest cell gets `repeats` more seeds for the
    noise. The largest size follows from the budget, for all costs go with its square: C = kappa N^2 ratio. Returns a
    table without losses: run, N, D, precision, seed, C. Raises ValueError for fewer than four sizes or a D/N that does
    not vary.
    """
    ratios = tuple(sorted(ratios))
    if sizes < 4 or step <= 1:
        raise ValueError(
            f"a ladder needs at least four sizes, a step apart, to fit an exponent; not {sizes} by {step:g}"
        )
    if ratios[-1] / ratios[0] < FIXED * 2:
        raise ValueError(
            "a ladder of nearly one number of tokens per parameter cannot tell size from data: spread ratios"
        )
    if not budget > 0:
        raise ValueError(f"a budget is a positive number of FLOP, and not {budget:g}")
    relative = [(step**-i, ratio) for i in range(sizes) for ratio in ratios]
    ceiling = ratios[1] * (1 + 1e-9)
    cells = [(n, r, 0) for n, r in relative if n * n * r <= ceiling]
    cells += [(step ** (1 - sizes), ratios[0], seed) for seed in range(1, repeats + 1)]
    top = min(math.sqrt(budget / (kappa * len(precisions) * sum(n * n * r for n, r, _ in cells))), largest)
    rows = [(n * top, n * top * ratio, name, seed) for name in precisions for n, ratio, seed in cells]
    frame = pd.DataFrame(rows, columns=["N", "D", "precision", "seed"])
    frame["C"] = kappa * frame["N"] * frame["D"]
    frame.insert(0, "run", [f"{r.precision}-{r.N:.3g}-{r.D:.3g}-{r.seed}" for r in frame.itertuples()])
    return RunTable(frame)
