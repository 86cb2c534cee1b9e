"""What the figures share: the compute of runs, levels of equal compute, and the law as a surface, if it is one."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from lowprec.scaling.draw import of_precision, precisions
from lowprec.scaling.surface import KAPPA, Surface
from lowprec.scaling.table import REFERENCE, RunTable

if TYPE_CHECKING:
    from lowprec.scaling.fit import Fit
    from lowprec.scaling.uncertainty import Bootstrap

Array = np.ndarray
REFITS = 200  # of the bootstrap that bands are drawn from


def flop_factor(table: RunTable) -> float:
    """k of C = k N D: the median of the table's own C / (N D), or 6. Small models take more than large ones."""
    if "C" not in table:
        return KAPPA
    return float(np.median(table.column("C") / (table.column("N") * table.column("D"))))


def compute(table: RunTable) -> Array:
    """C of every run as k N D, FLOP: what the law's lines take, so that dots and lines can be compared."""
    return flop_factor(table) * table.column("N") * table.column("D")


def flop_label(table: RunTable) -> str:
    """The axis label of `compute`; it says k where the runs' own FLOP differ from k N D by more than 5%."""
    plain = "training compute C (FLOP)"
    if "C" not in table or np.abs(np.log(table.column("C") / compute(table))).max() < 0.05:
        return plain
    return f"training compute C = {flop_factor(table):.3g} N D (FLOP)"


def flop_levels(table: RunTable, mask: Array) -> list[tuple[float, Array]]:
    """Groups of runs of nearly the same compute (steps of less than 8%) with three sizes or more: [(C, indices)]."""
    C, sizes = compute(table), table.column("N")
    chosen = np.flatnonzero(mask)
    order = chosen[np.argsort(C[chosen], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(np.log(C[order])) > 0.08) + 1)
    found = []
    for group in groups:
        narrow = len(group) > 0 and np.ptp(np.log(C[group])) < 0.25
        if narrow and len(np.unique(np.round(np.log(sizes[group]) / 0.05))) >= 3:
            found.append((float(np.exp(np.log(C[group]).mean())), group))
    return found


@dataclasses.dataclass(frozen=True)
class Lines:
    """The fitted law over N, D and precision, or why there is none.

    Attributes:
        fit: the fit; its table is what is drawn.
        surface: of the fit alone.
        sampled: with REFITS bootstrap refits; the same as `surface` without a bootstrap.
        refits: how many.
        doubt: "" or why no line should be drawn: the fit was refused, or the law is not one of N and D.
    """

    fit: "Fit"
    surface: Surface | None
    sampled: Surface | None
    refits: int = 0
    doubt: str = ""

    @property
    def table(self) -> RunTable:
        return self.fit.table


def lines(fit: "Fit", boot: "Bootstrap | None" = None, doubt: str = "", reference: str = REFERENCE) -> Lines:
    """The lines of a fit. `doubt`: a reason not to draw any, such as a refusal; `reference`: what precisions are
    measured against."""
    if doubt:
        return Lines(fit, None, None, 0, doubt)
    if "curve" in fit.law.law.needs:
        return Lines(
            fit, None, None, 0, f"the law {fit.law.name} predicts from whole schedules, not from N and D alone"
        )
    refits = 0
    if boot is not None and len(boot.x):
        keep = np.unique(np.linspace(0, len(boot.x) - 1, REFITS).astype(int))
        samples = boot.samples.iloc[keep].reset_index(drop=True)
        boot, refits = dataclasses.replace(boot, x=boot.x[keep], samples=samples), len(keep)
    try:
        surface = Surface(fit, reference=reference)
        sampled = Surface(fit, boot, reference=reference) if refits else surface
        for precision in precisions(fit.table):
            row = fit.table.frame[of_precision(fit.table) == precision].iloc[0]
            surface.loss(row["N"], row["D"], precision)
    except ValueError as error:
        return Lines(fit, None, None, 0, str(error))
    return Lines(fit, surface, sampled, refits)


def quantiles(samples: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Interval over the first axis; NaN where fewer than 90% of the samples are finite."""
    finite = np.isfinite(samples)
    filled = np.where(finite, samples, np.nan)
    filled[:, finite.mean(0) < 0.9] = 0.0
    low, high = np.nanquantile(filled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    enough = finite.mean(0) >= 0.9
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)
