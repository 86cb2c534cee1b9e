"""Figures of how far a fit can be trusted: residuals, coefficients and their intervals, E's profile, extrapolation.

As in :mod:`lowprec.scaling.plots`, every function returns a Drawing, which says why if there is no figure.
"""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy import stats

from lowprec.scaling import draw
from lowprec.scaling.compare import Comparison
from lowprec.scaling.curves import Lines, compute, flop_factor, flop_label
from lowprec.scaling.draw import (
    INK,
    MUTED,
    PALETTE,
    Drawing,
    canvas,
    count,
    file_name,
    flop,
    key,
    label,
    log_axis,
    scatter,
)
from lowprec.scaling.plots import kind, left_out
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import profile

if TYPE_CHECKING:
    from lowprec.scaling.fit import Fit
    from lowprec.scaling.uncertainty import Bootstrap

ACCENT = PALETTE[0]
BAND = 0.01  # of the predicted-against-measured figure, relative
PAIRS, DOTS, LEVELS = 4, 300, (0.5, 0.95)


def residuals(fit: "Fit") -> Drawing:
    """Predicted against measured, and what is left over against N, D and D/N."""
    table, relative = fit.table, fit.law.law.log_residuals
    measured, predicted = table.column(fit.law.law.response), fit.predict(fit.table)
    over, unit = (100 * np.expm1(fit.residuals), "%") if relative else (fit.residuals, "nats")
    over_what = [(table.column(name), text) for name, text in (("N", "size N"), ("D", "tokens D")) if name in table]
    if len(over_what) == 2:
        over_what.append((over_what[1][0] / over_what[0][0], "tokens per parameter D/N"))
    figure, panels = canvas(*((2, 2, 5.8) if len(over_what) > 1 else (1, 2, 3.3)))
    scatter(panels[0], table, predicted, measured)
    ends = np.array([min(measured.min(), predicted.min()), max(measured.max(), predicted.max())])
    panels[0].plot(ends, ends, color=INK, linewidth=0.8)
    panels[0].fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=MUTED, alpha=0.18, linewidth=0)
    panels[0].set_xlabel(f"predicted {fit.law.law.response} (nats)")
    panels[0].set_ylabel("measured (nats)")
    for axes, (values, text) in zip(panels[1:], over_what):
        scatter(axes, table, values, over)
        axes.axhline(0, color=INK, linewidth=0.8)
        log_axis(axes, "x", values, text, 5)
        axes.set_ylabel(f"predicted − measured ({unit})")
    for axes in panels[1 + len(over_what) :]:
        axes.set_visible(False)
    key(figure, table)
    caption = (
        "First: runs against the law, with a band of ±1%. The others show what the law gets wrong; dots should "
        "scatter about zero without a trend or a bend, most of all towards large N and D."
    )
    if fit.outliers:
        named = ", ".join(label(run) for run in fit.outliers[:5]) + (" …" if len(fit.outliers) > 5 else "")
        caption += f" Outliers (more than 5 median deviations, kept in the fit): {named}."
    return Drawing("residuals", "What the law gets wrong", caption, figure)


def coefficients(fit: "Fit", boot: "Bootstrap | None") -> Drawing:
    """Forest plot: every coefficient's interval relative to its estimate, A and B at the pivots."""
    name, title = f"coefficients_{file_name(fit.law.name)}", f"Coefficients of {fit.law.name} and their intervals"
    if boot is None or not len(boot.x):
        return Drawing(name, title, "there is no bootstrap, so there are no intervals")
    intervals, low_end, high_end = boot.intervals(pivoted=True), 1 / 4, 4.0
    names = [n for n in fit.free if fit.pivoted[n] > 0][:40]
    if not names:
        return Drawing(name, title, "no coefficient is larger than zero")
    figure, (axes,) = canvas(height=1.1 + 0.27 * len(names))
    for i, parameter in enumerate(names):
        value, (low, high) = fit.pivoted[parameter], intervals[parameter]
        colour = PALETTE[1] if parameter in fit.at_bound else ACCENT
        a, b = max(low / value, low_end), min(high / value, high_end)
        axes.plot([a, b], [i, i], color=colour, linewidth=2.2, solid_capstyle="butt")
        for beyond, x, marker in ((low / value < low_end, low_end, "<"), (high / value > high_end, high_end, ">")):
            if beyond:
                axes.plot([x], [i], marker, color=colour, clip_on=False)
        axes.plot([1], [i], "o", color=colour)
        text = f"{value:.4g}  [{low:.3g}, {high:.3g}]" + ("  at its bound" if parameter in fit.at_bound else "")
        axes.annotate(
            text, (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False
        )
    axes.set_yticks(range(len(names)), [label(n) + ("′" if _scaled(fit, n) else "") for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    ends = [v / fit.pivoted[n] for n in names for v in intervals[n] if v > 0] + [0.9, 1.1]
    log_axis(axes, "x", np.clip(ends, low_end, high_end), "interval relative to the estimate (log scale)")
    ticks = [
        t
        for t in (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 4)
        if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
    ]
    axes.set_xticks(_sparse(ticks, axes.get_xlim()), [f"×{t:g}" for t in _sparse(ticks, axes.get_xlim())])
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    units = ", ".join(f"{c} = {(flop if c == 'C' else count)(v)}" for c, v in fit.pivots.items())
    caption = (
        f"95% intervals of {len(boot.x):,} refits of resampled runs, each divided by its estimate; a short bar is a "
        "coefficient that the runs determine."
        + (f" With a prime: taken at the middle of the runs ({units})." if units else "")
    )
    if missing := [label(n) for n in fit.free if n not in names]:
        caption += f" Not shown, for they are not positive or too many: {', '.join(missing)}."
    return Drawing(name, title, caption, figure)


def _scaled(fit: "Fit", name: str) -> bool:
    return any(p.name == name and p.unit for p in fit.problem.params)


def _sparse(ticks: list[float], limits: tuple[float, float]) -> list[float]:
    """Those of `ticks` that have room for their labels on a log axis; 1 stays."""
    room = np.log(limits[1] / limits[0]) / 9
    kept = [1.0]
    for tick in sorted(ticks, key=lambda t: abs(np.log(t))):
        if all(abs(np.log(tick / other)) > room for other in kept):
            kept.append(tick)
    return sorted(kept)


def pairs(fit: "Fit", boot: "Bootstrap | None") -> Drawing:
    """Bootstrap samples of E and the exponents against one another."""
    name, title = "bootstrap_pairs", "What the coefficients trade against one another"
    if boot is None or not len(boot.x):
        return Drawing(name, title, "there is no bootstrap")
    scaled = [p.name for p in fit.problem.free if p.unit]
    names = [n for n in fit.free if n not in scaled and boot.samples[n].std() > 0]
    names = [n for n in names if "[" not in n][:PAIRS] or names[:PAIRS]
    if len(names) < 2:
        return Drawing(name, title, "fewer than two exponents were fitted")
    size = len(names) - 1
    figure, panels = canvas(size, size, 2.6 + 1.5 * (size - 1), sharex="col", sharey="row")
    chosen = np.unique(np.linspace(0, len(boot.samples) - 1, DOTS).astype(int))
    for row in range(size):
        for column in range(size):
            axes = panels[row * size + column]
            if column > row:
                axes.set_visible(False)
                continue
            x, y = boot.samples[names[column]].to_numpy(), boot.samples[names[row + 1]].to_numpy()
            axes.plot(x[chosen], y[chosen], ".", color=ACCENT, markersize=3, alpha=0.5, rasterized=True)
            axes.plot([fit.params[names[column]]], [fit.params[names[row + 1]]], "P", color=PALETTE[1], markersize=7)
            for axis, values, limit in ((axes.xaxis, x, axes.set_xlim), (axes.yaxis, y, axes.set_ylim)):
                low, high = np.quantile(values, [0.01, 0.99])
                limit(low - 0.15 * (high - low), high + 0.15 * (high - low))
                axis.set_major_locator(MaxNLocator(4))
            axes.annotate(f"r = {np.corrcoef(x, y)[0, 1]:+.2f}", (0.97, 0.95), xycoords="axes fraction", ha="right",
                          va="top", fontsize=8)  # fmt: skip
            if row == size - 1:
                axes.set_xlabel(label(names[column]))
            if column == 0:
                axes.set_ylabel(label(names[row + 1]))
    caption = (
        f"Each dot is one refit of resampled runs ({len(chosen)} of {len(boot.samples):,} are shown), the cross "
        "the fit to all. A narrow slanted cloud means that only a combination of the two is known."
    )
    return Drawing(name, title, caption, figure)


def profile_E(fit: "Fit", boot: "Bootstrap | None" = None, points: int = 15) -> Drawing:
    """How much worse the fit becomes if the irreducible loss E is held elsewhere."""
    name, title = "profile_E", "How well the irreducible loss E is known"
    if "E" not in fit.free:
        return Drawing(name, title, f"the law {fit.law.name} fits no E")
    top = float(fit.table.column(fit.law.law.response).min()) * 0.999
    low, high = boot.intervals()["E"] if boot is not None and len(boot.x) else (fit.params["E"], fit.params["E"])
    spare = max(1, len(fit.residuals) - len(fit.free))
    limit, reach = 1 + stats.f.ppf(0.95, 1, spare) / spare, max(1.5 * (high - low), 0.03 * top)
    for _ in range(6):  # until the curve has risen on both sides, or E can go no further, and not by far too much
        ends = (max(0.0, low - reach), min(top, high + reach))
        rise = (profile(fit, "E", ends) / max(fit.objective, 1e-300) - 1) / (limit - 1)
        free = [up for up, end in zip(rise, ends) if end not in (0, top)]
        if any(up < 2 for up in free):
            reach *= 2.5
        elif free and min(rise) > 20:
            reach /= 3
        else:
            break
    grid = np.linspace(*ends, points)
    worse = profile(fit, "E", grid.tolist()) / max(fit.objective, 1e-300)
    figure, (axes,) = canvas(height=3.2)
    axes.plot(grid, worse, "-o", color=ACCENT, markersize=3)
    axes.plot([fit.params["E"]], [1], "P", color=PALETTE[1], markersize=8, label="fit")
    axes.axhline(limit, color=INK, linewidth=0.8, linestyle="--", label="95% (approximate)")
    if boot is not None and len(boot.x):
        axes.axvspan(low, high, color=MUTED, alpha=0.18, linewidth=0, label="95% of the refits")
    axes.set_xlabel("E held at (nats per token)")
    axes.set_ylabel("objective over its minimum")
    axes.set_ylim(1 - 0.15 * (limit - 1), min(float(worse.max()) * 1.02, 1 + 12 * (limit - 1)) + 0.1 * (limit - 1))
    figure.legend(loc="outside lower center", ncols=3)
    caption = (
        "E is held at each value and all else is fitted again. Values whose curve lies below the dashed line explain "
        "the runs about as well; a flat curve means that the runs do not say where the loss ends."
    )
    return Drawing(name, title, caption, figure)


def extrapolation(lines: Lines, boot: "Bootstrap | None") -> Drawing:
    """Predicted loss along the best split of compute, a hundred times beyond the runs, with its interval."""
    name, title = "extrapolation", "How far the prediction carries"
    if lines.surface is None:
        return Drawing(name, title, lines.doubt)
    if boot is None or not len(boot.x):
        return Drawing(name, title, "there is no bootstrap, so the prediction has no interval")
    table, C, k = lines.table, compute(lines.table), flop_factor(lines.table)
    grid = np.geomspace(C.min(), C.max() * 100, 40)
    figure, (axes,) = canvas(height=4.0)
    shown, widths = draw.precisions(table)[:2], list[float]()
    for precision in shown:
        colour, best = draw.colours(table)[precision], lines.surface.optimum(grid, precision, kappa=k, points=161)
        samples = boot.predict(lines.surface.runs(best.N[0], best.D[0], precision))
        for level, alpha in zip(LEVELS, (0.28, 0.14)):
            low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
            axes.fill_between(grid, low, high, color=colour, alpha=alpha, linewidth=0)
        axes.plot(grid, best.loss[0], color=colour)
        widths += [float((high - low)[at]) for at in (np.searchsorted(grid, C.max()), -1)]
    scatter(axes, table, C, table.column("loss"), mask=np.isin(draw.of_precision(table), shown))
    axes.axvspan(C.max(), C.max() * 115, color=MUTED, alpha=0.1, linewidth=0)
    for x, text, side in ((C.max() / 1.15, "fitted region", "right"), (C.max() * 1.15, "extrapolated", "left")):
        axes.annotate(text, (x, 0.98), xycoords=("data", "axes fraction"), ha=side, va="top", color=MUTED)
    log_axis(axes, "x", [C.min(), C.max() * 100], flop_label(table), form=flop)
    axes.set_ylabel("loss (nats per token)")
    handles = [Patch(color=MUTED, alpha=0.45, label="50%"), Patch(color=MUTED, alpha=0.2, label="95%")]
    key(figure, table, shown=shown, extra=handles)
    caption = (
        f"Loss at the best size and tokens of each compute. For {label(shown[0])} the 95% interval of the law is "
        f"{widths[0]:.3f} nats wide at the largest compute of the runs and {widths[1]:.3f} at a hundred times that; it "
        "holds only if the law's form does, which no bootstrap can tell."
    )
    return Drawing(name, title, caption + left_out(draw.precisions(table), shown), figure)


def held_out(comparison: Comparison, table: RunTable) -> Drawing:
    """Errors of the best law on runs that it was not fitted to, and the mean error of every law."""
    name, title = f"heldout_{comparison.direction}", f"Held-out predictions, direction {comparison.direction}"
    able = [score for score in comparison.scores if not score.cannot][:12]
    if not able:
        return Drawing(name, title, "no law could predict what was held out")
    best = able[0].heldout.reset_index(drop=True)
    held = RunTable(best, table.n_kind)
    figure, (left, right) = canvas(1, 2, 3.6, width_ratios=(1.25, 1))
    ratio = comparison.direction == "D"
    x, error = best["N"].to_numpy(float), best["error"].to_numpy()
    x = best["D"].to_numpy(float) / x if ratio else x
    places = {name: i for i, name in enumerate(draw.precisions(held))}
    aside = np.array([places[name] for name in draw.of_precision(held)]) - (len(places) - 1) / 2
    x = x * np.exp(0.012 * aside * (1 if len(np.unique(x)) > 1 else 3))
    if best["low"].notna().all():
        ends = (best["high"] - best["low"]).to_numpy() / 2
        left.errorbar(x, error, yerr=ends, linestyle="none", color=MUTED, elinewidth=0.7)
    scatter(left, held, x, error, hollow=True, like=table)
    left.axhline(0, color=INK, linewidth=0.8)
    if comparison.noise.df:
        left.axhspan(-2 * comparison.noise.sd, 2 * comparison.noise.sd, color=MUTED, alpha=0.15, linewidth=0)
    log_axis(left, "x", x, "tokens per parameter D/N" if ratio else f"size N ({kind(table)})", 5)
    left.set_ylabel("predicted − measured (nats)")
    left.set_title(f"{label(able[0].law)}, runs held out")
    worst = max(score.mae for score in able)
    for i, score in enumerate(able):
        right.plot([score.mae], [i], "o" if score.law in comparison.tied else "D", color=ACCENT if i == 0 else MUTED)
        side = "left" if score.mae < 0.5 * worst else "right"
        right.annotate(f"{score.mae:.4f} ({'too high' if score.bias > 0 else 'too low'})", (score.mae, i), fontsize=8,
                       xytext=(-4 if side == "left" else 4, 6), textcoords="offset points", ha=side)  # fmt: skip
    right.set_yticks(range(len(able)), [label(score.law, 22) for score in able])
    right.set_ylim(len(able) - 0.5, -0.7)
    right.set_xlim(0, 1.15 * worst)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_title("mean absolute error (nats)")
    key(figure, held, like=table)
    what = "; ".join(map(label, comparison.holdouts[:4]))
    caption = (
        f"Left: hollow markers are runs that the law did not see ({what}), precisions set apart sideways. Right: the "
        "mean error of every law that can predict them, the best first; round markers are tied with the best."
    )
    if best["low"].notna().all():
        caption += f" Bars are {comparison.level:.0%} predictive intervals; most should cross zero."
    if comparison.noise.df:
        caption += " Grey band: two standard deviations of the seed noise."
    return Drawing(name, title, caption, figure)
