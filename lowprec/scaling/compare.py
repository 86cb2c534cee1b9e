"""compare: which law to believe, judged where it was not fitted and in the direction one is going to ask about.

Laws that fit equally well disagree outside the data, and which of them is right depends on the way out: on the MXFP4
runs of arXiv:2505.14669 an additive gap k D^g / N^h predicts larger models best, effective sizes and tokens predict
longer training best. So every direction has its own test, with whole blocks held out:

    N          the largest sizes               D         the longest training (tokens per parameter, or tokens)
    rollout    each size from all smaller ones precision one precision from all others

The score is the mean absolute error in nats of what was held out, with its bias (positive: the law says too much), and,
with a bootstrap, the share of runs inside the predictive interval. Where a held-out run has a partner of the reference
precision, the gap between the two is scored as well: a law may miss the curve that all precisions share and still know
what low precision costs, and the other way round. R^2 is not used: it is near 1 for every law here, as
most of the variance of the loss is the size of the model. Two laws whose errors differ by less than the standard error
of that difference are tied; then the smaller AICc (Hurvich and Tsai 1989) of the training fits decides, and only then.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from lowprec.scaling.fit import Fit, fit
from lowprec.scaling.gaps import Noise, cells, gaps, levels, seed_noise
from lowprec.scaling.law import Array, LawFile
from lowprec.scaling.table import REFERENCE, RunTable
from lowprec.scaling.uncertainty import bootstrap

DIRECTIONS = ("N", "D", "rollout", "precision")
SAME_SIZE, SAME_RATIO = 0.1, 0.15  # sizes and tokens per parameter that differ by less are one level
PROPERTIES = ("bits_w", "bits_a", "bits_kv", "bits_g", "exponent_bits", "mantissa_bits", "block", "gmse_w", "gmse_a",
              "gmse_g", "quantized_frac")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Holdout:
    """One split: what is held out in words, and the runs (bool masks) that train and test."""

    name: str
    train: Array
    test: Array


@dataclasses.dataclass(frozen=True)
class Score:
    """How one law predicted what was held out.

    Attributes:
        law: its name.
        mae: mean absolute error, nats. NaN if it cannot predict.
        bias: mean of predicted less measured, nats.
        coverage: share of the runs inside the predictive interval; NaN without bootstrap.
        n: runs held out.
        aicc: of the training fits, summed over the splits; smaller is better.
        cannot: "" or why it could not be scored.
        heldout: run, N, D, precision, holdout, cell, measured, predicted, error, low, high, gap, gap_error (NaN for
            runs without a partner in the reference); a row a held-out run.
        gap_mae, gap_bias, gap_n: the same of the paired gaps.
    """

    law: str
    mae: float = math.nan
    bias: float = math.nan
    coverage: float = math.nan
    n: int = 0
    aicc: float = math.nan
    cannot: str = ""
    heldout: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    gap_mae: float = math.nan
    gap_bias: float = math.nan
    gap_n: int = 0

    def as_dict(self) -> dict[str, float | str | int | None]:
        """The numbers, for JSON."""
        names = ("mae", "bias", "coverage", "aicc", "gap_mae", "gap_bias")
        numbers = {name: getattr(self, name) for name in names}
        clean = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"law": self.law, **clean, "n": self.n, "gap_n": self.gap_n, "cannot": self.cannot}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Laws compared in one direction, the best first.

    Attributes:
        direction: N, D, rollout or precision.
        scores: one a law, best first, those that cannot be scored last.
        tied: names of the laws that cannot be told from the best by their errors, the winner first.
        holdouts: what was held out, in words.
        noise: seed noise of the table.
        level: of the predictive intervals.
        gap_tied: names of the laws that predict the gaps best, the winner first; () without pairs.
    """

    direction: str
    scores: tuple[Score, ...]
    tied: tuple[str, ...]
    holdouts: tuple[str, ...]
    noise: Noise
    level: float
    gap_tied: tuple[str, ...] = ()

    @property
    def gap_winner(self) -> str:
        """Name of the law that predicts the gaps between precisions best; "" if there are none."""
        return self.gap_tied[0] if self.gap_tied else ""

    @property
    def winner(self) -> str:
        """Name of the best law; "" if none could be scored."""
        return "" if self.scores[0].cannot else self.scores[0].law

    def table(self) -> pd.DataFrame:
        """One row a law: law, mae, bias, coverage, aicc, gap_mae, gap_bias, n, gap_n, cannot."""
        return pd.DataFrame([score.as_dict() for score in self.scores])

    def sentences(self) -> list[str]:
        found = [f"Direction {self.direction}; held out: {'; '.join(self.holdouts)}."]
        for s in self.scores:
            if s.cannot:
                found.append(f"{s.law}: cannot predict this: {s.cannot}.")
                continue
            way = "too high" if s.bias > 0 else "too low"
            text = f"{s.law}: mean absolute error {s.mae:.4f} nats, on average {abs(s.bias):.4f} {way}, {s.n} runs"
            if math.isfinite(s.coverage):
                text += f", {s.coverage:.0%} inside the {self.level:.0%} interval"
            if s.gap_n:
                way = "large" if s.gap_bias > 0 else "small"
                text += f"; of {s.gap_n} gaps {s.gap_mae:.4f}, on average {abs(s.gap_bias):.4f} too {way}"
            found.append(text + ".")
        if not self.winner:
            return [*found, "No law could be scored in this direction."]
        verdict = f"Best in direction {self.direction}: {self.winner}"
        if self.tied[1:]:
            verdict += f", tied with {', '.join(self.tied[1:])} (the errors do not differ; AICc decided)"
        if self.noise.df:
            verdict += f". Its error is {self.scores[0].mae / self.noise.sd:.1f} times the seed noise"
        if self.gap_winner:
            verdict += f". Best for the gaps between precisions: {self.gap_winner}"
            verdict += f", tied with {', '.join(self.gap_tied[1:])}" if self.gap_tied[1:] else ""
        return [*found, verdict + "."]

    def __str__(self) -> str:
        return "\n".join(self.sentences())


def holdouts(
    table: RunTable, direction: str, *, above: "float | None" = None, axis: str = "D/N", reference: str = REFERENCE
) -> list[Holdout]:
    """The splits of a direction.

    `above`: hold out sizes (N) or, in direction D, values of `axis` ("D/N" or "D") larger than this. Without it: the
    largest size, with as many of the next as it takes to have three runs; the top third of the levels of `axis`. Runs
    of a precision that is not among the training runs are not tested, but in direction precision. Raises ValueError for
    a table that has too few levels to leave some for training.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"--holdout {direction}: a direction is one of {', '.join(DIRECTIONS)}")
    if direction == "precision":
        return _by_precision(table, reference)
    values, what, tolerance = _axis(table, direction, axis)
    level = levels(values, tolerance)
    count = int(level.max()) + 1
    if above is not None:
        splits = [(f"{what} above {above:.3g}", values <= above, values > above)]
    elif direction == "rollout":
        need = 3
        splits = [(f"{what} = {values[level == k].mean():.3g}", level < k, level == k) for k in range(need, count)]
    else:
        first = count - 1 if direction == "N" else count - max(1, count // 3)
        while first > 3 and np.sum(level >= first) < 3:
            first -= 1
        splits = [(f"{what} from {values[level >= first].min():.3g}", level < first, level >= first)]
    if not splits or any(len(set(level[train])) < 2 or not test.any() for _, train, test in splits):
        raise ValueError(
            f"the runs have {count} level{'s' if count > 1 else ''} of {what}: holding out "
            f"{'those above ' + format(above, 'g') if above is not None else 'the largest'} does not leave "
            f"{'three' if direction == 'rollout' else 'two'} to train on and one to test"
        )
    labels = table.column("precision").astype(str) if "precision" in table else np.full(len(table), reference)
    found = [Holdout(name, train, test & np.isin(labels, labels[train])) for name, train, test in splits]
    if not all(split.test.any() for split in found):
        raise ValueError(
            f"none of the held-out runs ({splits[0][0]}) is in a precision of the runs that remain to train on"
        )
    return found


def _axis(table: RunTable, direction: str, axis: str) -> tuple[Array, str, float]:
    if direction != "D":
        return table.column("N"), "N", SAME_SIZE
    if axis not in ("D", "D/N"):
        raise ValueError(f"axis is {axis!r}; direction D holds out by 'D/N' (tokens per parameter) or 'D' (tokens)")
    D = table.column("D")
    return (D, "D", SAME_RATIO) if axis == "D" else (D / table.column("N"), "D/N", SAME_RATIO)


def _by_precision(table: RunTable, reference: str) -> list[Holdout]:
    labels = table.column("precision").astype(str)
    names = sorted(set(labels) - {reference})
    if not names or reference not in labels:
        raise ValueError(f"holding out a precision needs runs in {reference} and in at least one other")
    return [Holdout(name, labels != name, labels == name) for name in names]


def compare(
    laws: Sequence[LawFile], table: RunTable, direction: str, *, above: "float | None" = None, axis: str = "D/N",
    bootstraps: int = 0, level: float = 0.95, seed: int = 0, reference: str = REFERENCE,
    progress: "Callable[[str], None] | None" = None,
) -> Comparison:  # fmt: skip
    """Scores every law on every split of a direction. `progress(text)` is told what is being fitted.

    A law that cannot be fitted or cannot predict what is held out is listed with the reason and not ranked.
    """
    if not laws:
        raise ValueError("compare wants at least one law")
    splits = holdouts(table, direction, above=above, axis=axis, reference=reference)
    scores, pairs = [], _pairs(table, reference)
    for law in laws:
        if progress:
            progress(f"{law.name}: {len(splits)} split{'s' if len(splits) > 1 else ''}")
        scores.append(score(law, table, splits, direction, pairs, bootstraps=bootstraps, level=level, seed=seed))
    tied, gap_tied = _tied(scores, "error"), _tied(scores, "gap_error")
    ranked = sorted(scores, key=lambda s: (bool(s.cannot), s.law not in tied[:1], s.mae))
    names = tuple(split.name for split in splits)
    return Comparison(direction, tuple(ranked), tied, names, seed_noise(table), level, gap_tied)


def _pairs(table: RunTable, reference: str) -> pd.DataFrame:
    """The pairs of `gaps`; none where the table has none."""
    try:
        return gaps(table, reference).pairs
    except ValueError:
        return pd.DataFrame({"run": [], "reference_run": [], "gap": []})


def score(
    law: LawFile, table: RunTable, splits: Sequence[Holdout], direction: str, pairs: pd.DataFrame, *,
    bootstraps: int = 0, level: float = 0.95, seed: int = 0,
) -> Score:  # fmt: skip
    """Fits one law to the training runs of every split and predicts the rest. `pairs`: those of `gaps`."""
    if law.law.response != "loss":
        return Score(law.name, cannot=f"it predicts {law.law.response}, not the loss")
    if direction == "precision" and not set(law.law.needs) & set(PROPERTIES):
        return Score(law.name, cannot="it does not know what a precision is made of (bits, Gaussian error, E and M)")
    cell, found, aicc = cells(table), [], 0.0
    for split in splits:
        test = table.where(split.test)
        try:
            fitted = fit(law, table.where(split.train), seed=seed)
            predicted = fitted.predict(test)
            low, high = _band(fitted, test, bootstraps, level, seed)
            gap = _gap_errors(fitted, table, test, pairs)
        except ValueError as error:
            return Score(law.name, cannot=str(error))
        rows = test.frame[[name for name in ("run", "N", "D", "precision") if name in test.frame]]
        measured = test.column("loss")
        found.append(rows.assign(holdout=split.name, cell=cell[split.test], measured=measured, predicted=predicted,
                                 error=predicted - measured, low=low, high=high, **gap))  # fmt: skip
        aicc += _aicc(fitted)
    heldout = pd.concat(found, ignore_index=True)
    off = heldout["error"].to_numpy()
    inside = (heldout["measured"] >= heldout["low"]) & (heldout["measured"] <= heldout["high"])
    coverage, mae = float(inside.mean()) if bootstraps else math.nan, float(np.abs(off).mean())
    gap_off = heldout["gap_error"].dropna()
    return Score(law.name, mae, float(off.mean()), coverage, len(off), aicc, "", heldout,
                 float(gap_off.abs().mean()), float(gap_off.mean()), len(gap_off))  # fmt: skip


def _gap_errors(fitted: Fit, table: RunTable, test: RunTable, pairs: pd.DataFrame) -> dict[str, Array]:
    """Measured gap of every held-out run, and how far the law is off; NaN without a pair."""
    known, runs = pairs.set_index("run"), test.frame["run"]
    paired = runs.isin(known.index).to_numpy()
    gap, error = np.full(len(test), np.nan), np.full(len(test), np.nan)
    if paired.any():
        gap[paired] = known.loc[runs[paired], "gap"]
        rows = pd.Index(table.frame["run"]).get_indexer(known.loc[runs[paired], "reference_run"])
        partners = dataclasses.replace(table, frame=table.frame.iloc[rows].reset_index(drop=True))
        error[paired] = fitted.predict(test.where(paired)) - fitted.predict(partners) - gap[paired]
    return {"gap": gap, "gap_error": error}


def _band(fitted: Fit, test: RunTable, bootstraps: int, level: float, seed: int) -> tuple[Array, Array]:
    """Predictive interval of every held-out run, the seed's noise included."""
    if not bootstraps:
        nothing = np.full(len(test), np.nan)
        return nothing, nothing
    drawn = bootstrap(fitted, bootstraps, seed=seed).predict(test, noise=True, seed=seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _aicc(fitted: Fit) -> float:
    """n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) with residuals in nats and k = free parameters + the variance."""
    residuals = fitted.predict(fitted.table) - fitted.table.column("loss")
    n, k = len(residuals), len(fitted.free) + 1
    if n <= k + 1:
        return math.inf
    return n * math.log(max(float(residuals @ residuals), 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _tied(scores: Sequence[Score], column: str) -> tuple[str, ...]:
    """Names of the laws whose errors cannot be told from the smallest, the one of the smallest AICc first."""
    able = [s for s in scores if not s.cannot and s.heldout[column].notna().any()]
    if not able:
        return ()
    best = min(able, key=lambda s: float(s.heldout[column].abs().mean()))
    tied = [s for s in able if s is best or _same(best.heldout, s.heldout, column)]
    return tuple(s.law for s in sorted(tied, key=lambda s: s.aicc))


def _same(best: pd.DataFrame, other: pd.DataFrame, column: str) -> bool:
    """Whether the errors differ by less than the standard error of their difference, over cells (one: never)."""
    difference = other[column].abs() - best[column].abs()
    by_cell = difference.groupby(best["cell"]).mean().dropna().to_numpy()
    if len(by_cell) < 2:
        return bool(by_cell[0] == 0)
    return bool(by_cell.mean() <= by_cell.std(ddof=1) / math.sqrt(len(by_cell)))
