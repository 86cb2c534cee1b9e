"""What a fit allows to be said, and what not, in sentences: the first thing on the report's page.

The sentences follow from numbers alone: intervals of the bootstrap, correlations, the range of the runs, paired gaps
against seed noise, held-out errors. Each says the number it rests on. A refused fit allows nothing but its paired gaps,
which need no law.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowprec.scaling.compare import Comparison
from lowprec.scaling.curves import compute
from lowprec.scaling.draw import count
from lowprec.scaling.gaps import Gaps
from lowprec.scaling.table import RunTable

if TYPE_CHECKING:
    from lowprec.scaling.diagnose import Verdict
    from lowprec.scaling.fit import Fit
    from lowprec.scaling.uncertainty import Bootstrap

SURE = 0.95  # level of intervals, and share of refits from which on an order is certain
E_KNOWN = 0.1  # width of E's interval, nats: wider says little about much larger runs
ENTANGLED = 0.95  # correlation from which on two coefficients are one


def extent(table: RunTable) -> str:
    """The range of the runs: 'N from 30M to 400M (5 sizes), D from 1B to 16B, D/N from 2.5 to 533'."""
    parts = []
    if "N" in table:
        N = table.column("N")
        kinds = len(np.unique(np.round(np.log(N) / 0.04)))
        parts.append(f"N from {count(N.min())} to {count(N.max())} ({kinds} size{'s' if kinds > 1 else ''})")
    if "D" in table:
        D = table.column("D")
        parts.append(f"D from {count(D.min())} to {count(D.max())} tokens")
    if len(parts) == 2:
        parts.append(f"D/N from {(D / N).min():.3g} to {(D / N).max():.3g}")
    return ", ".join(parts)


def conclusions(
    fit: "Fit", boot: "Bootstrap | None", verdict: "Verdict", comparisons: Sequence[Comparison], gaps: Gaps | None
) -> tuple[list[str], list[str]]:
    """(what can be concluded, what cannot), for one fit."""
    can, cannot = list[str](), list[str]()
    if verdict.grade == "REFUSE":
        cannot.append(
            f"Nothing about other sizes, tokens or budgets: the fit of {fit.law.name} was refused; its "
            "coefficients, curves and predictions mean nothing."
        )
    else:
        _range(fit, can, cannot)
        _coefficients(fit, boot, can, cannot)
        _order(fit, boot, can, cannot)
        _held_out(comparisons, can, cannot)
    _gaps(gaps, can, cannot)
    return can, cannot


def _range(fit: "Fit", can: list[str], cannot: list[str]) -> None:
    error = f"{fit.rmse:.2%}" if fit.law.law.log_residuals else f"{fit.rmse:.4f} nats"
    can.append(
        f"Within the range of its runs ({extent(fit.table)}), {fit.law.name} describes a run's "
        f"{fit.law.law.response} to {error} (root mean square of {len(fit.residuals)} residuals)."
    )
    if "N" in fit.table and "D" in fit.table:
        cannot.append(
            f"Anything beyond {compute(fit.table).max():.2g} FLOP is extrapolation: intervals there assume that the "
            "form of the law still holds."
        )
    if fit.law.law.certainty:
        cannot.append(f"About the law itself: {fit.law.law.certainty}.")


def _coefficients(fit: "Fit", boot: "Bootstrap | None", can: list[str], cannot: list[str]) -> None:
    if boot is None or not len(boot.x):
        cannot.append("How sure any number is: there is no bootstrap.")
        return
    intervals = boot.intervals(SURE)
    for name in ("alpha", "beta"):
        if name in intervals and name not in fit.at_bound:
            low, high = intervals[name]
            text = f"{name} is {fit.params[name]:.3f} ({low:.3f} to {high:.3f})"
            known = high - low < 0.3 * fit.params[name]
            (can if known else cannot).append(text + ("." if known else ": the runs hardly determine it."))
    if {"alpha", "beta"} <= set(fit.params) and "beta" in fit.free:
        share = boot.samples["beta"] / (boot.samples["alpha"] + boot.samples["beta"])
        low, high = np.quantile(share, [(1 - SURE) / 2, (1 + SURE) / 2])
        value = fit.params["beta"] / (fit.params["alpha"] + fit.params["beta"])
        can.append(f"The best size grows as compute to the power {value:.2f} ({low:.2f} to {high:.2f}).")
    if "E" in intervals:
        low, high = intervals["E"]
        text = f"the irreducible loss E is {fit.params['E']:.3f} nats ({low:.3f} to {high:.3f})"
        if high - low > E_KNOWN or "E" in fit.at_bound:
            cannot.append(f"Where the loss ends: {text}.")
        else:
            can.append(text[0].upper() + text[1:] + ".")
    correlation = fit.correlation.to_numpy()
    tangled = [
        f"{fit.free[i]} and {fit.free[j]} (r = {correlation[i, j]:+.3f})"
        for i, j in itertools.combinations(range(len(fit.free)), 2)
        if abs(correlation[i, j]) > ENTANGLED
    ]
    if tangled:
        cannot.append(f"These coefficients one by one, for only their combination is known: {', '.join(tangled[:6])}.")


def _order(fit: "Fit", boot: "Bootstrap | None", can: list[str], cannot: list[str]) -> None:
    """Efficiencies against 1 and against one another."""
    if boot is None or not len(boot.x):
        return
    for kind, what in (("eff_N", "parameters"), ("eff_D", "tokens")):
        names = sorted((n for n in fit.free if n.startswith(f"{kind}[")), key=lambda n: -fit.params[n])
        for name in names:
            low, high = boot.intervals(SURE)[name]
            text = (
                f"{name.partition('[')[2][:-1]} is worth {fit.params[name]:.3f} of its {what} ({low:.3f} to {high:.3f})"
            )
            if low <= 1 <= high:
                cannot.append(f"Whether it differs from the reference at all: {text}.")
            else:
                can.append(text + ".")
        for better, worse in itertools.pairwise(names):
            share = float((boot.samples[better] > boot.samples[worse]).mean())
            if share < SURE:
                labels = [n.partition("[")[2][:-1] for n in (better, worse)]
                cannot.append(
                    f"Which of {labels[0]} and {labels[1]} is better: the order holds in {share:.0%} of the refits."
                )


def _held_out(comparisons: Sequence[Comparison], can: list[str], cannot: list[str]) -> None:
    if not comparisons:
        cannot.append("How well the law predicts runs that it has not seen: nothing was held out.")
    for comparison in comparisons:
        (can if comparison.winner else cannot).append(comparison.sentences()[-1])


def _gaps(gaps: Gaps | None, can: list[str], cannot: list[str]) -> None:
    """A gap is sure if its interval over cells leaves out zero and, where repeats tell the noise, it is larger."""
    if gaps is None:
        return
    for name, row in gaps.summary.iterrows():
        text = f"{name} − {gaps.reference} is {row['mean']:+.4f} nats"
        text += f" ({row.low:+.4f} to {row.high:+.4f})" if math.isfinite(row.low) else " (no interval)"
        text += f", {row.relative:+.2%} of the loss, by {row.pairs:.0f} pairs in {row.cells:.0f} cells"
        if math.isfinite(row.smallest):
            text += f"; noise hides gaps below {row.smallest:.2g} nats"
        sure = not row.low <= 0 <= row.high and math.isfinite(row.low)
        sure &= not math.isfinite(row.smallest) or abs(row["mean"]) > row.smallest
        if sure:
            can.append(f"Without any law, {text}.")
        else:
            cannot.append(f"Whether {name} differs from {gaps.reference} at all: {text}.")
    if not gaps.noise.df or gaps.noise.suggestion:
        text = str(gaps.noise).rstrip(".")
        cannot.append(f"{text[0].upper()}{text[1:]}.")
