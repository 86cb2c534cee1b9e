"""Surface: a fitted law as loss(N, D, precision), with one copy a bootstrap sample, and its compute-optimal points.

A law predicts rows of a run table. Questions about a budget want a function instead: "nvfp4 with 2e9 parameters and
4e10 tokens". What else the law looks at (bits, Gaussian errors, block sizes) is copied from a run of that precision, or
given by the caller for a precision that was never trained. Every function returns (1 + samples, n): row 0 is the fit,
the others its bootstrap refits, so that a decision can be taken in each of them and counted.

Budgets are FLOP at the speed of the reference precision: a format that trains s times as fast end to end does s times
the work for the same money. Training N parameters on D tokens costs kappa N D / s (kappa = 6: two FLOP a parameter and
token forward, four backward; attention and embeddings are extra), and serving T tokens 2 N T / s_serve. Compute-optimal
is the N, and the D it leaves, of the smallest loss:

    minimise L(N, D)   such that   kappa N D / s + 2 N T / s_serve = C,   N <= max_N

found on a grid of log N with a parabola through the lowest three points, for every law and every sample alike. For
L = E + A (N e_N)^-a + B (D e_D)^-b without serving and cap there is a closed form (`closed_optimum`), arXiv:2203.15556.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.fit import Fit
from lowprec.scaling.law import Array
from lowprec.scaling.table import REFERENCE, RunTable
from lowprec.scaling.uncertainty import Bootstrap

SCALED = {"N_total": "N", "N_mean": "N", "C": "ND"}  # columns that follow N, or N D, of the run that is asked about
KAPPA = 6.0  # training FLOP a parameter and token


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best N, D and loss in every sample: (1 + samples,) each, or (1 + samples, c) for c budgets.

    `edge`: the minimum of row 0 lies at the end of what was searched, so the law has no optimum there; `capped`: that
    end is max_N. Each bool, or (c,) of them.
    """

    N: Array
    D: Array
    loss: Array
    edge: Array
    capped: Array


@dataclasses.dataclass(frozen=True)
class Surface:
    """A fitted law of the loss as a function of N, D and precision.

    Attributes:
        fit, boot: the fit and its bootstrap; without one, only row 0 is returned.
        columns: values of further columns for every question ({"unique_tokens": 1e10}).
        formats: precisions that were not trained, by their columns ({"mxfp6": {"gmse_w": 4e-4, ...}}); the others are
            copied from a run in the reference.
        reference: label of the reference precision.
    """

    fit: Fit
    boot: Bootstrap | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    formats: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    reference: str = REFERENCE

    def __post_init__(self) -> None:
        if self.fit.law.law.response != "loss":
            raise ValueError(
                f"law {self.fit.law.name} predicts {self.fit.law.law.response}: advice needs a law of the loss"
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """Precisions of the runs, the reference first."""
        frame = self.fit.table.frame
        names = sorted(set(map(str, frame["precision"].dropna()))) if "precision" in frame else [self.reference]
        return tuple(sorted(names, key=lambda name: name != self.reference))

    @property
    def precisions(self) -> tuple[str, ...]:
        return (*self.trained, *(name for name in self.formats if name not in self.trained))

    def runs(self, N: Any, D: Any, precision: str) -> RunTable:
        """A table of one run a pair (N, D), broadcast, in that precision, as the law wants them; no loss.

        Raises ValueError for a precision that is neither trained nor described, and a column that differs among the
        runs of the precision and is not given.
        """
        N, D = (x.reshape(-1) for x in np.broadcast_arrays(np.asarray(N, np.float64), np.asarray(D, np.float64)))
        row = self._template(precision)
        frame = pd.DataFrame({"run": np.arange(len(N)).astype(str), "N": N, "D": D, "precision": precision})
        for name, value in row.items():
            if name in SCALED:
                size = N / row["N"] * (D / row["D"] if SCALED[name] == "ND" else 1.0)
                value = value * size
            elif name == "unique_tokens" and name not in self.columns:
                value = D
            if name not in frame:
                frame[name] = value
        return RunTable(frame, self.fit.table.n_kind)

    def _template(self, precision: str) -> dict[str, Any]:
        """The columns of a run in that precision, with what the caller gave."""
        frame, law = self.fit.table.frame, self.fit.law.law
        known = precision if precision in self.trained else self.reference
        if precision not in self.precisions or known not in self.trained:
            raise ValueError(f"there is no precision {precision!r}; the runs have {', '.join(self.precisions)}")
        rows = frame[frame["precision"].astype(str) == known] if "precision" in frame else frame
        given = {**self.columns, **self.formats.get(precision, {})}
        for name in law.needs:
            if name in ("N", "D", "precision", *SCALED, *given) or name not in rows:
                continue
            values = sorted(set(rows[name].dropna()))
            if name == "unique_tokens":
                if (rows[name] < 0.99 * rows["D"]).any():
                    raise ValueError(
                        f"the runs repeat their data: say how many distinct tokens there are ({name}=NUMBER)"
                    )
            elif len(values) > 1:
                shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values[:4])
                raise ValueError(
                    f"{name} differs among the runs in {precision} ({shown}): say which you mean ({name}=VALUE)"
                )
        kept = {str(k): v for k, v in rows.iloc[0].items() if k not in ("run", "source", "loss") and not pd.isna(v)}
        return {**kept, **given}

    def loss(self, N: Any, D: Any, precision: str) -> Array:
        """(1 + samples, n) nats: of the fit, then of every bootstrap refit.

        Raises ValueError for a law with a free coefficient for every precision that is asked about an untrained one.
        """
        table = self.runs(N, D, precision)
        rows = [self.fit.predict(table)[None]]
        if self.boot is not None:
            rows.append(self.boot.predict(table))
        return np.concatenate(rows)

    def optimum(
        self, C: Any, precision: str, *, speedup: Any = 1.0, max_N: float = math.inf, served_tokens: float = 0.0,
        serve_speedup: float = 1.0, kappa: float = KAPPA, points: int = 401,
    ) -> Optimum:  # fmt: skip
        """The compute-optimal N and D of a budget, or of many (see the module). `C` and `speedup` may be arrays (c,).

        The search spans 1e-4 to 1e4 times the size at which N = D, with `points` sizes.
        """
        C, speedup = np.broadcast_arrays(np.asarray(C, np.float64), np.asarray(speedup, np.float64))
        center = np.sqrt(C * speedup / kappa)
        high = np.minimum(1e4 * center, max_N)
        if served_tokens:  # beyond this N serving alone costs more than the budget
            high = np.minimum(high, 0.999 * C * serve_speedup / (2 * served_tokens))
        low = np.minimum(1e-4 * center, 1e-3 * high)
        step = np.log(high / low)[..., None] / (points - 1)

        def tokens(N: Array) -> Array:
            return speedup[..., None] * (C[..., None] / N - 2 * served_tokens / serve_speedup) / kappa

        N = low[..., None] * np.exp(step * np.arange(points))  # (c, points)
        losses = self.loss(N, tokens(N), precision).reshape(-1, *N.shape)
        at, shift, lowest = _vertex(losses)
        best = low * np.exp(step[..., 0] * (at + shift))  # (1 + samples, c)
        end = (at == 0) | (at == points - 1)
        return Optimum(best, tokens(best[..., None])[..., 0], lowest, end[0], (at[0] > 0) & end[0] & (high == max_N))


def _vertex(losses: Array) -> tuple[Array, Array, Array]:
    """Along the last axis: index of the lowest point, how many steps from it the parabola through it and its neighbours
    is lowest (0 at an end), and the parabola's value there."""
    at = np.argmin(losses, axis=-1)
    inner = np.clip(at, 1, losses.shape[-1] - 2)[..., None]
    left, middle, right = (np.take_along_axis(losses, inner + i, axis=-1)[..., 0] for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    inside = (at == inner[..., 0]) & (curvature > 0)
    shift = np.where(inside, 0.5 * (left - right) / np.where(inside, curvature, 1.0), 0.0)
    return at, shift, np.where(inside, middle + 0.25 * (right - left) * shift, losses.min(axis=-1))


def crossing(x: Array, y: Array) -> Array:
    """(rows,) where each row of `y` (rows, n) first falls to 0 along ascending `x`, by a straight line between points.

    -inf: it is not above 0 at the first point; inf: it never falls to 0.
    """
    below = y <= 0
    at = np.argmax(below, axis=1)
    rows = np.arange(len(y))
    before, after = y[rows, at - 1], y[rows, at]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = x[at - 1] + (x[at] - x[at - 1]) * before / (before - after)
    return np.where(~below.any(axis=1), np.inf, np.where(at == 0, -np.inf, found))


def closed_optimum(
    params: Mapping[str, float], C: float, *, eff_N: float = 1.0, eff_D: float = 1.0, speedup: float = 1.0,
    kappa: float = KAPPA,
) -> tuple[float, float, float]:  # fmt: skip
    """(N, D, loss) that minimise E + A (N eff_N)^-alpha + B (D eff_D)^-beta at kappa N D / speedup = C, in closed form.

    With n = N eff_N and d = D eff_D the budget is n d = k = C speedup eff_N eff_D / kappa, so only that product counts:
    n = G k^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)).
    """
    A, B, a, b = (params[name] for name in ("A", "B", "alpha", "beta"))
    k = C * speedup * eff_N * eff_D / kappa
    n = (a * A / (b * B)) ** (1 / (a + b)) * k ** (b / (a + b))
    d = k / n
    return n / eff_N, d / eff_D, params["E"] + A * n**-a + B * d**-b
