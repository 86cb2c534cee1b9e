"""Figures of precisions against one another: what one costs at equal compute, from which speed-up on it pays, paired
gaps, and efficiencies over bits and Gaussian error.

As in :mod:`lowprec.scaling.plots`, every function returns a Drawing, which says why if there is no figure.
"""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lowprec.scaling import advise, draw
from lowprec.scaling.curves import Lines, compute, flop_factor, flop_label, quantiles
from lowprec.scaling.draw import INK, MUTED, Drawing, canvas, flop, key, label, log_axis
from lowprec.scaling.gaps import Gaps
from lowprec.scaling.plots import MOST, left_out, name_axes, panel_grid
from lowprec.scaling.table import RunTable

BEYOND, FASTEST = 10.0, 32.0  # times the largest compute of the runs; largest break-even speed-up that is looked for
COLUMNS = {  # of the run table -> axis label, file name
    "bits_w": ("bits of a weight", "efficiency_bits"),
    "gmse_w": ("relative squared error on Gaussian numbers", "efficiency_gmse"),
}


def price(lines: Lines, speedups: Mapping[str, float] | None = None) -> Drawing:
    """What a precision costs at equal compute, and the speed-up from which on it pays, over compute."""
    name, title = "precision_frontier", "Which precision pays: extra loss at equal compute, and break-even speed-up"
    table, names = lines.table, draw.precisions(lines.table)
    if lines.surface is None or lines.sampled is None:
        return Drawing(name, title, lines.doubt)
    reference = lines.surface.reference
    if reference not in names or len(names) < 2:
        return Drawing(name, title, f"the runs are not in {reference} and another precision")
    all_others = [name for name in names if name != reference]
    others, top, k = all_others[:MOST], compute(table).max(), flop_factor(table)
    C = np.geomspace(compute(table).min(), top * BEYOND * FASTEST, 40)
    base = lines.sampled.optimum(C, reference, kappa=k, points=121).loss
    C_shown = C[: np.searchsorted(C, top * BEYOND * 1.001)]
    figure, panels = canvas(1, 2, 3.8)
    differs, reach = False, [1.0, *(speedups or {}).values()]
    for precision in others:
        colour = draw.colours(table)[precision]
        loss = lines.sampled.optimum(C, precision, kappa=k, points=121).loss
        differs |= bool(np.abs(loss[0] - base[0]).max() > 1e-7)
        product = advise.efficiency(lines.sampled, precision)
        speeds = break_even(C, loss, base) if product is None else np.repeat(1 / product[:, None], len(C), axis=1)
        for axes, values in zip(panels, (loss - base, speeds)):
            drawn = _band(axes, C_shown, values[:, : len(C_shown)], colour)
        reach += drawn
    if not differs:
        return Drawing(name, title, f"the law {lines.fit.law.name} has no term for precision")
    given = {p: s for p, s in (speedups or {}).items() if p in others}
    for precision, speed in given.items():
        panels[1].axhline(speed, color=draw.colours(table)[precision], linestyle="--", linewidth=0.9)
    for axes, text, zero in zip(panels, (f"extra loss over {reference} (nats)", "break-even speed-up"), (0, 1)):
        axes.set_title(text)
        axes.axhline(zero, color=INK, linewidth=0.8)
        axes.axvspan(top, top * BEYOND * 1.15, color=MUTED, alpha=0.1, linewidth=0)
        log_axis(axes, "x", C_shown, flop_label(table), 5, form=flop)
    log_axis(panels[1], "y", reach, "")
    handles: list[Artist] = [Patch(color=MUTED, alpha=0.2, label="extrapolated")]
    handles += [Line2D([], [], color=MUTED, linestyle="--", label="speed-up that was given")] if given else []
    key(figure, table, shown=others, sizes=False, extra=handles)
    caption = (
        f"Left: how much higher the lowest loss of a precision is than that of {reference} at the same FLOP. Right: "
        "how many times faster training must be in it before it pays; a device above the line should use it. "
        + (
            f"Bands are 95% intervals of {lines.refits} refits."
            if lines.refits
            else "Without a bootstrap there are no bands."
        )
    )
    return Drawing(name, title, caption + left_out(all_others, others), figure)


def break_even(C: np.ndarray, loss: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(rows, c) s at which the frontier `loss` (rows, c) at s C equals `reference` at C; NaN where s C is beyond C."""
    found = [np.interp(-target, -line, np.log(C), left=np.nan, right=np.nan) for line, target in zip(loss, reference)]
    return np.exp(np.stack(found) - np.log(C))


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, colour: str) -> list[float]:
    """Row 0 as a line, the 95% interval of the others as a band; returns the heights that were drawn."""
    line = np.where(np.isfinite(values[0]), values[0], np.nan)
    low, high = quantiles(values[1:]) if len(values) > 1 else (line, line)
    axes.plot(x, line, color=colour)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    return [float(y) for y in (*line, *low, *high) if math.isfinite(y)]


def paired_gaps(gaps: Gaps | None, table: RunTable, why: str = "") -> Drawing:
    """Gap to the reference over D/N, one line a size, one panel a precision, with the noise of a pair."""
    name, title = "gaps", "Gap between precisions, pair by pair"
    if gaps is None:
        return Drawing(name, title, why or "no paired gaps were given")
    pairs = gaps.pairs
    names = [name for name in draw.precisions(table) if name in gaps.summary.index]
    shown = names[:MOST]
    figure, panels = panel_grid(len(shown), 2.4)
    for axes, precision in zip(panels, shown):
        colour, row = draw.colours(table)[precision], gaps.summary.loc[precision]
        if math.isfinite(row.low):
            axes.axhspan(row.low, row.high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(row["mean"], color=colour, linewidth=0.8, linestyle="--")
        axes.axhline(0, color=INK, linewidth=0.8)
        mine = pairs[pairs["precision"] == precision]
        cell = mine.groupby("cell").agg(N=("N", "first"), D=("D", "mean"), gap=("gap", "mean"), runs=("gap", "size"))
        cell["group"] = draw.groups_of(RunTable(cell), table)
        for g, part in cell.sort_values("D").groupby("group"):
            bars = 1.96 * row.pair_sd / np.sqrt(part["runs"]) if math.isfinite(row.pair_sd) else None
            marker = draw.MARKERS[int(g) % len(draw.MARKERS)]
            axes.errorbar(part["D"] / part["N"], part["gap"], yerr=bars, color=colour, marker=marker, linewidth=0.7,
                          elinewidth=0.8)  # fmt: skip
        log_axis(axes, "x", (pairs["D"] / pairs["N"]).to_numpy(), "", 6)
        axes.set_title(f"{label(precision)} − {label(gaps.reference)}")
    name_axes(panels, "tokens per parameter D/N", "gap (nats per token)")
    key(figure, table, shown=[])
    noisy = math.isfinite(gaps.summary.loc[shown, "pair_sd"].max())
    caption = (
        f"Each dot is the mean difference of runs to {label(gaps.reference)} runs of the same size, tokens and data; "
        + ("its bar is 95% of the noise of such a pair. " if noisy else "without repeats its noise is unknown. ")
        + f"Dashed line and band: the mean over all of them and its {gaps.level:.0%} interval."
    )
    return Drawing(name, title, caption + left_out(names, shown), figure)


def efficiency(lines: Lines, intervals: Mapping[str, tuple[float, float]]) -> list[Drawing]:
    """Fitted efficiencies (eff_N[...], eff_D[...]) over the bits of the weights and over the Gaussian error."""
    fit, found = lines.fit, []
    fitted = {n: n.partition("[")[2][:-1] for n in fit.params if n.startswith(("eff_N[", "eff_D["))}
    if not fitted:
        return [Drawing("efficiency", "Efficiency of each precision", f"the law {fit.law.name} fits none")]
    for column, (text, name) in COLUMNS.items():
        title = f"Efficiency against {text}"
        if column not in fit.table:
            found.append(Drawing(name, title, f"the runs have no column {column}"))
            continue
        value_of = dict(zip(draw.of_precision(fit.table), fit.table.column(column)))
        points = [(n, p, value_of[p]) for n, p in fitted.items() if value_of.get(p, 0) > 0]
        if len({x for _, _, x in points}) < 2:
            found.append(Drawing(name, title, f"the precisions do not differ in {column}"))
            continue
        found.append(_efficiency(lines, intervals, name, title, text, points))
    return found


def _efficiency(lines: Lines, intervals: Mapping[str, tuple[float, float]], name: str, title: str, text: str,
                points: list[tuple[str, str, float]]) -> Drawing:  # fmt: skip
    figure, (axes,) = canvas(height=3.6)
    for i, (parameter, precision, x) in enumerate(sorted(points, key=lambda p: (p[2], lines.fit.params[p[0]]))):
        colour, value = draw.colours(lines.table)[precision], lines.fit.params[parameter]
        size = parameter.startswith("eff_N")
        if parameter in intervals:
            axes.plot([x, x], intervals[parameter], color=colour, linewidth=1.2)
        axes.plot([x], [value], "o" if size else "s", color=colour, markerfacecolor=colour if size else "none")
        side = 1 if i % 2 else -1
        axes.annotate(label(precision, 18), (x, value), (6 * side, 0), textcoords="offset points", va="center",
                      ha="left" if side > 0 else "right", fontsize=8)  # fmt: skip
    places = [x for *_, x in points]
    log_axis(axes, "x", [min(places) / 1.4, max(places) * 1.4], text)
    axes.set_ylabel("efficiency")
    axes.axhline(1, color=INK, linewidth=0.8)
    kinds = sorted({parameter.partition("[")[0] for parameter, *_ in points})
    handles = [Line2D([], [], color=MUTED, linestyle="none", marker="o" if kind == "eff_N" else "s", label=kind,
                      markerfacecolor=MUTED if kind == "eff_N" else "none") for kind in kinds]  # fmt: skip
    draw.legend(figure, handles)
    caption = (
        "Share of the parameters (eff_N) or tokens (eff_D) that still count in a precision; 1 is as good as bf16. Bars "
        "are 95% intervals."
    )
    return Drawing(name, title, caption, figure)
