"""Gaps between precisions, pair by pair, and the noise they must be compared with.

Two runs that differ in the precision alone (same N, D, data, schedule, optimizer, seed) share most of what makes a
single loss uncertain: the data, the model's shape, often the seed's luck. So

    gap_i = loss_i(low precision) - loss_i(reference)

varies far less than either loss, and is what low precision should be judged by. Its mean over cells (one cell: one
size and one number of tokens) has a t interval over cells, because repeats within a cell say nothing about other sizes.

Seed noise is the standard deviation of one run's loss among repeats, pooled over the cells that have them:

    sd^2 = sum (loss - mean of its cell)^2 / df,   df = runs - cells,   df sd^2 / sigma^2 ~ chi^2(df)

It is about 0.0005 nats for models of some 100M parameters, as large as the whole gap of FP8; with a handful of repeats
its own interval spans a factor of two, which the chi^2 interval shows. It is not the residual of a law, which also
holds what the law gets wrong.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from lowprec.scaling.table import REFERENCE, RunTable

ALIKE = ("data", "schedule", "optimizer")  # a pair or a repeat must agree in those of these that the table has


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's loss among repeats that differ in the seed alone.

    Attributes:
        sd: nats; NaN without repeats.
        df: degrees of freedom.
        low, high: chi-square interval of `sd` at `level`.
        level: of that interval.
        cells: one row a cell with repeats: precision, N, D, runs, sd.
        suggestion: what to run when there are no repeats or too few; "" otherwise.
    """

    sd: float
    df: int
    low: float
    high: float
    level: float
    cells: pd.DataFrame
    suggestion: str = ""

    def __str__(self) -> str:
        if not self.df:
            return f"seed noise is unknown: there are no repeats. {self.suggestion}"
        text = (
            f"seed noise {self.sd:.2g} nats a run ({self.level:.0%} interval {self.low:.2g} to {self.high:.2g}, "
            f"{self.df} degrees of freedom)"
        )
        return f"{text}. {self.suggestion}" if self.suggestion else text


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Paired gaps of every precision to one reference.

    Attributes:
        reference: the precision gaps are measured from.
        pairs: one row a pair: run, precision, N, D, cell, loss, reference_loss, gap (nats), relative (share of the
            reference's loss), references (runs averaged), matched (columns beyond N and D in which the pair agrees),
            reference_run (the first of them).
        summary: one row a precision, indexed by it: pairs, cells, mean, low, high (t interval over cells), median,
            median_low, median_high (cluster bootstrap), relative, per_doubling_N and per_doubling_ratio with _low and
            _high (trend of the gap with N and with D/N; NaN where they do not vary or there are too few cells),
            pair_sd (noise of one paired difference), pair_df, smallest (gap that the noise would hide at `level`).
        noise: seed noise of single losses.
        level: of all intervals.
        unpaired: {precision: runs without a reference in their cell}.
    """

    reference: str
    pairs: pd.DataFrame
    summary: pd.DataFrame
    noise: Noise
    level: float
    unpaired: dict[str, int]

    def sentences(self) -> list[str]:
        """One sentence a precision: the gap, its interval, and whether it is larger than the noise."""
        found = []
        for name, row in self.summary.iterrows():
            spread = f" ({row.low:+.4f} to {row.high:+.4f})" if math.isfinite(row.low) else " (one pair: no interval)"
            text = f"{name} - {self.reference}: {row['mean']:+.4f} nats{spread}, {row.relative:+.2%} of the loss, "
            text += f"{row.pairs:.0f} pairs in {row.cells:.0f} cells; "
            if not math.isfinite(row.smallest):
                text += "whether that is more than seed noise is unknown, for there are no repeats"
            elif abs(row["mean"]) > row.smallest:
                text += f"larger than the noise, which hides gaps below {row.smallest:.2g} nats"
            else:
                text += f"smaller than the noise, which hides gaps below {row.smallest:.2g} nats"
            if lost := self.unpaired.get(str(name)):
                text += f"; {lost} runs have no {self.reference} run of their size and tokens"
            found.append(text)
        return found

    def __str__(self) -> str:
        return "\n".join([*self.sentences(), str(self.noise)])


def levels(values: np.ndarray, tolerance: float) -> np.ndarray:
    """For every value the index of its level, ascending; values within `tolerance` (relative) share one.

    (n,) positive -> (n,) int. Sizes and token counts that should be equal often differ by a rounding to whole steps.
    """
    order = np.argsort(values, kind="stable")
    index = np.empty(len(values), dtype=np.int64)
    level, first = -1, 0.0
    for i in order:
        if level < 0 or values[i] > first * (1 + tolerance):
            level, first = level + 1, float(values[i])
        index[i] = level
    return index


def cells(table: RunTable) -> np.ndarray:
    """(n,) int: which runs have the same N, D (within 1%), data, schedule and optimizer, as far as the table says."""
    keys = [levels(table.column("N"), 0.01), levels(table.column("D"), 0.01)]
    keys += [pd.factorize(table.frame[name].fillna("").astype(str))[0] for name in ALIKE if name in table.frame]
    return np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _numbers(table: RunTable, name: str) -> np.ndarray:
    """A column as numbers, NaN where the table does not say."""
    if name not in table.frame:
        return np.full(len(table), np.nan)
    return pd.to_numeric(table.frame[name], errors="coerce").to_numpy(dtype=np.float64)


def pooled(values: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """(standard deviation within groups, degrees of freedom); NaN and 0 if no group has two values."""
    _, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    centred = values - (np.bincount(index, values) / counts)[index]
    df = int(np.sum(counts - 1))
    return (math.sqrt(float(centred @ centred) / df), df) if df else (math.nan, 0)


def seed_noise(table: RunTable, *, level: float = 0.95) -> Noise:
    """Seed noise from the repeats in `table`: runs that agree in cell, precision, learning rate and plan.

    Where the table has seeds, runs of one seed count as one (their mean); where it has none, runs of one cell are
    taken to be repeats.
    """
    frame = pd.DataFrame({"N": table.column("N"), "D": table.column("D"), "loss": table.column("loss")})
    frame["precision"] = _precision(table)
    keys = [cells(table)] + [pd.factorize(table.frame[k])[0] for k in ("precision", "lr", "plan") if k in table.frame]
    frame["group"] = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    if "seed" in table:
        frame["seed"] = table.column("seed")
        frame = frame.groupby(["group", "seed", "precision"], as_index=False).mean()
    sd, df = pooled(frame["loss"].to_numpy(), frame["group"].to_numpy())
    tail = (1 - level) / 2
    low, high = (sd * math.sqrt(df / stats.chi2.ppf(q, df)) for q in (1 - tail, tail)) if df else (math.nan, math.nan)
    found = frame.groupby("group").agg(
        precision=("precision", "first"), N=("N", "mean"), D=("D", "mean"), runs=("loss", "size"), sd=("loss", "std")
    )
    return Noise(sd, df, low, high, level, found[found.runs > 1].reset_index(drop=True), _suggest(frame, df))


def _precision(table: RunTable) -> np.ndarray:
    return table.column("precision") if "precision" in table.frame else np.full(len(table), REFERENCE, dtype=object)


def _suggest(frame: pd.DataFrame, df: int) -> str:
    if df >= 6:
        return ""
    cheapest = frame.loc[(frame["N"] * frame["D"]).idxmin()]
    where = f"N = {cheapest.N:.3g}, D = {cheapest.D:.3g}"
    names = " and ".join(sorted(set(map(str, frame["precision"])))[:3])
    have = f"With only {df} degrees of freedom that is rough" if df else "To know it"
    return f"{have}: train 3 more seeds of a cheap cell ({where}) in {names}"


def gaps(table: RunTable, reference: str = REFERENCE, *, level: float = 0.95, seed: int = 0) -> Gaps:
    """Gaps of every other precision to `reference`, run by run.

    The reference of a run is the run of its cell with the same learning rate and seed where there is one, otherwise
    the mean over what the cell has; `matched` says which. `seed` is that of the bootstrap for the median's interval.
    Raises ValueError if the table has no runs in the reference, or none that can be paired.
    """
    precision = table.column("precision").astype(str)
    if reference not in precision:
        have = ", ".join(sorted(set(precision)))
        raise ValueError(f"there are no runs in the reference precision {reference!r}; the table has {have}")
    pairs, unpaired = _pair(table, precision, reference)
    if not len(pairs):
        raise ValueError(
            f"no run has a {reference} run of the same N, D, data, schedule and optimizer: a paired gap needs one"
        )
    noise = seed_noise(table, level=level)
    rows = {name: _summarise(group, noise, level, seed) for name, group in pairs.groupby("precision", sort=True)}
    return Gaps(reference, pairs, pd.DataFrame(rows).T, noise, level, unpaired)


def _pair(table: RunTable, precision: np.ndarray, reference: str) -> tuple[pd.DataFrame, dict[str, int]]:
    cell, loss, N, D = cells(table), table.column("loss"), table.column("N"), table.column("D")
    close = {name: _numbers(table, name) for name in ("lr", "seed")}
    base, runs = np.flatnonzero(precision == reference), table.frame["run"]
    rows, unpaired = [], dict[str, int]()
    for i in np.flatnonzero(precision != reference):
        mates = base[cell[base] == cell[i]]
        if not len(mates):
            unpaired[precision[i]] = unpaired.get(precision[i], 0) + 1
            continue
        matched = [name for name in ALIKE if name in table.frame]
        for name, values in close.items():
            if len(same := mates[values[mates] == values[i]]):
                mates, matched = same, [*matched, name]
        basis = float(loss[mates].mean())
        rows.append((runs.iloc[i], precision[i], N[i], D[i], cell[i], loss[i], basis, loss[i] - basis,
                     loss[i] / basis - 1, len(mates), ", ".join(matched), runs.iloc[mates[0]]))  # fmt: skip
    names = [
        "run",
        "precision",
        "N",
        "D",
        "cell",
        "loss",
        "reference_loss",
        "gap",
        "relative",
        "references",
        "matched",
        "reference_run",
    ]
    return pd.DataFrame(rows, columns=names), unpaired


def _summarise(pairs: pd.DataFrame, noise: Noise, level: float, seed: int) -> dict[str, float]:
    """One row of Gaps.summary."""
    by_cell = pairs.groupby("cell").agg(gap=("gap", "mean"), N=("N", "mean"), D=("D", "mean"))
    mean, low, high = _t_interval(by_cell["gap"].to_numpy(), level)
    if len(by_cell) == 1:
        mean, low, high = _t_interval(pairs["gap"].to_numpy(), level)
    median, median_low, median_high = _median(pairs, level, seed)
    pair_sd, pair_df = pooled(pairs["gap"].to_numpy(), pairs["cell"].to_numpy())
    if not pair_df and noise.df:
        pair_sd, pair_df = math.sqrt(2) * noise.sd, noise.df  # as if the two runs shared nothing: too large if anything
    t = stats.t.ppf((1 + level) / 2, pair_df) if pair_df else math.nan
    return {
        "pairs": len(pairs), "cells": len(by_cell), "mean": mean, "low": low, "high": high,
        "median": median, "median_low": median_low, "median_high": median_high,
        "relative": float(pairs["relative"].mean()), **_trend(by_cell, level),
        "pair_sd": pair_sd, "pair_df": pair_df, "smallest": t * pair_sd / math.sqrt(len(pairs)),
    }  # fmt: skip


def _t_interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def _median(pairs: pd.DataFrame, level: float, seed: int, count: int = 1000) -> tuple[float, float, float]:
    """(median gap, low, high) with cells drawn with replacement."""
    groups = [group.to_numpy() for _, group in pairs.groupby("cell")["gap"]]
    median = float(np.median(np.concatenate(groups)))
    if len(groups) < 2:
        return median, math.nan, math.nan
    padded = np.full((len(groups), max(map(len, groups))), np.nan)  # (cells, pairs of the largest)
    for row, group in zip(padded, groups):
        row[: len(group)] = group
    drawn = np.random.default_rng(seed).integers(len(groups), size=(count, len(groups)))
    middle = np.nanmedian if np.isnan(padded).any() else np.median  # the latter is many times faster
    medians = middle(padded[drawn].reshape(count, -1), axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return median, float(low), float(high)


def _trend(by_cell: pd.DataFrame, level: float) -> dict[str, float]:
    """Least-squares slopes of the gap over log2 N and log2 D/N, with t intervals. NaN: does not vary, or too few."""
    N, ratio = by_cell["N"].to_numpy(), (by_cell["D"] / by_cell["N"]).to_numpy()
    slopes = dict[str, float]()
    regressors = {"per_doubling_N": np.log2(N), "per_doubling_ratio": np.log2(ratio)}
    used = {name: x - x.mean() for name, x in regressors.items() if np.ptp(x) > 0.25}
    X = np.stack([np.ones(len(N)), *used.values()], axis=1)
    df = len(N) - X.shape[1]
    if df > 0 and np.linalg.cond(X / np.linalg.norm(X, axis=0)) < 1e3:
        coefficients, *_ = np.linalg.lstsq(X, by_cell["gap"].to_numpy())
        residuals = by_cell["gap"].to_numpy() - X @ coefficients
        errors = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * float(residuals @ residuals) / df)
        half = stats.t.ppf((1 + level) / 2, df) * errors
        for j, name in enumerate(used, start=1):
            slopes |= {name: coefficients[j], f"{name}_low": coefficients[j] - half[j],
                       f"{name}_high": coefficients[j] + half[j]}  # fmt: skip
    return {
        f"{name}{end}": slopes.get(f"{name}{end}", math.nan) for name in regressors for end in ("", "_low", "_high")
    }


def repeats_needed(gap: float, noise_sd: float, *, level: float = 0.95, power: float = 0.8) -> int:
    """Pairs of runs that show a gap of `gap` nats with probability `power`, if one paired difference has `noise_sd`.

    Normal approximation: ((z_level + z_power) noise_sd / gap)^2, at least 2. For unpaired runs give sqrt(2) times the
    seed noise. Raises ValueError for a gap of zero.
    """
    if gap == 0 or noise_sd < 0:
        raise ValueError("repeats_needed wants a gap other than 0 and a noise of at least 0")
    z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return max(2, math.ceil((z * noise_sd / gap) ** 2))
