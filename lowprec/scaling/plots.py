"""Figures of what was trained and what the law makes of it: loss over compute, over tokens, and at equal compute.

Every function takes the lines of a fit and returns a Drawing: a figure with title and caption, or the reason why there
is none. Dots are runs (colour: precision, marker: size); lines are the fitted law, solid where runs are and dotted
beyond. If the fit was refused, dots stand alone.

Precisions against one another are in :mod:`lowprec.scaling.plots_precision`, how far to trust a fit in
:mod:`lowprec.scaling.plots_trust`.
"""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowprec.scaling import draw
from lowprec.scaling.curves import Lines, compute, flop_factor, flop_label, flop_levels
from lowprec.scaling.draw import INK, MUTED, Drawing, canvas, flop, key, label, log_axis, scatter
from lowprec.scaling.table import RunTable

MOST = 6  # precisions with a line or panel of their own; captions say which are left out
LEVELS = 8  # iso-FLOP curves


def left_out(names: list[str], shown: list[str]) -> str:
    """A sentence for the caption on the precisions that are not shown, or ""."""
    missing = [label(name) for name in names if name not in shown]
    return f" Not shown are the precisions with fewest runs: {', '.join(missing)}." if missing else ""


def kind(table: RunTable) -> str:
    return "without embeddings and head" if table.n_kind == "non_embedding" else "all parameters"


def response(lines: Lines) -> tuple[np.ndarray, str]:
    """What the law predicts, measured, and the axis label."""
    name = lines.fit.law.law.response
    return lines.table.column(name), f"{name} (nats per token)"


def panel_grid(count_: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels with shared axes: one wide, or two a row; those that are not needed are hidden."""
    columns = 1 if count_ == 1 else 2
    rows = math.ceil(count_ / columns)
    figure, panels = canvas(
        rows, columns, height + 1.2 if columns == 1 else 0.7 + height * rows, sharex=True, sharey=True
    )
    for axes in panels[count_:]:
        axes.set_visible(False)
    if columns == 2 and count_ % 2:
        panels[count_ - 2].xaxis.set_tick_params(labelbottom=True)
    return figure, panels[:count_]


def name_axes(panels: list[Axes], x: str, y: str) -> None:
    """Labels at the bottom and the left of a grid of panels only."""
    columns = 1 if len(panels) == 1 else 2
    for i, axes in enumerate(panels):
        axes.set_xlabel(x if i + columns >= len(panels) else "")
        axes.set_ylabel(y if i % columns == 0 else "")


def loss_compute(lines: Lines) -> Drawing:
    """Loss against training compute, with the frontier of every precision."""
    table, (loss, text) = lines.table, response(lines)
    figure, (axes,) = canvas(height=4.4)
    C, names = compute(table), draw.precisions(table)
    scatter(axes, table, C, loss)
    shown, low, high = names[:MOST], loss.min(), loss.max()
    if lines.surface is not None:
        grid = np.geomspace(C.min(), C.max() * 10, 61)
        for precision in shown:
            line = lines.surface.optimum(grid, precision, kappa=flop_factor(table), points=161).loss[0]
            colour, trained = draw.colours(table)[precision], grid <= C.max() * 1.001
            axes.plot(grid[trained], line[trained], color=colour)
            axes.plot(grid[~trained], line[~trained], ":", color=colour)
            low = min(low, line.min())
    log_axis(axes, "x", C if lines.surface is None else [C.min(), C.max() * 10], flop_label(table), form=flop)
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    axes.set_ylabel(text)
    key(figure, table)
    caption = "Each dot is a run. " + (
        f"No line is drawn: {lines.doubt}."
        if lines.surface is None
        else "Each line is the lowest loss that the law expects for a compute when size and tokens are chosen best; "
        "runs lie on it, or above as far as their size was not the best. It is dotted beyond the compute of the runs."
        + left_out(names, shown)
    )
    return Drawing("loss_compute", "Loss against training compute", caption, figure)


def loss_tokens(lines: Lines) -> Drawing:
    """Loss against tokens, one line a size, one panel a precision."""
    table, (loss, text) = lines.table, response(lines)
    names = draw.precisions(table)
    shown = names[:MOST]
    figure, panels = panel_grid(len(shown), 2.5)
    D, sizes, of = table.column("D"), table.column("N"), draw.of_precision(table)
    group, texts = draw.size_groups(table)
    grid = np.geomspace(D.min(), D.max(), 60)
    for axes, precision in zip(panels, shown):
        mine, colour = of == precision, draw.colours(table)[precision]
        scatter(axes, table, D, loss, mask=mine)
        for g in range(len(texts)):
            here = mine & (group == g)
            if lines.surface is None or not here.any():
                continue
            line = lines.surface.loss(float(np.exp(np.log(sizes[here]).mean())), grid, precision)[0]
            inside = (grid >= D[here].min() / 1.001) & (grid <= D[here].max() * 1.001)
            axes.plot(grid, line, ":", color=colour, linewidth=0.8)
            axes.plot(grid, np.where(inside, line, np.nan), color=colour, linewidth=1.2)
        log_axis(axes, "x", D, "", 6)
        axes.set_title(label(precision) if len(names) > 1 else "")
    span = np.ptp(loss) or 1.0
    panels[0].set_ylim(loss.min() - 0.06 * span, loss.max() + 0.06 * span)
    name_axes(panels, "tokens D", text)
    key(figure, table, shown=[])
    caption = f"Each dot is a run, each marker a size N ({kind(table)}). "
    caption += (
        f"No line is drawn: {lines.doubt}."
        if lines.surface is None
        else "Lines are the fitted law, solid over the tokens that each size was trained on."
    )
    return Drawing("loss_tokens", "Loss against tokens, for each size", caption + left_out(names, shown), figure)


def isoflop(lines: Lines) -> Drawing:
    """Loss against size at equal compute: the law's curves and their minima, with the runs of that compute."""
    name, title = "isoflop", "Loss against size at equal compute (iso-FLOP)"
    if lines.surface is None:
        return Drawing(name, title, lines.doubt)
    table, precision = lines.table, draw.precisions(lines.table)[0]
    mine = draw.of_precision(table) == precision
    found = flop_levels(table, mine)
    supported = len(found) >= 2
    N, loss = table.column("N"), table.column("loss")
    if not supported:
        ends = np.quantile(compute(table)[mine], [0.1, 0.9])
        none = np.array([], dtype=int)
        found = [(float(c), none) for c in (np.geomspace(ends[0], ends[1], 4) if ends[1] > 1.3 * ends[0] else ends[:1])]
    found = sorted(sorted(found, key=lambda level: -len(level[1]))[:LEVELS], key=lambda level: level[0])
    figure, (axes,) = canvas(height=4.2)
    handles, seen = [], list[float]()
    span = np.geomspace(N[mine].min() / 3, N[mine].max() * 3, 160)
    k, tokens = flop_factor(table), table.column("D")[mine]
    for (level, members), shade in zip(found, np.linspace(0.05, 0.85, len(found))):
        colour, D = to_hex(colormaps["viridis"](shade)), level / (k * span)
        line, best = lines.surface.loss(span, D, precision)[0], lines.surface.optimum(level, precision, kappa=k)
        inside = (span >= N[mine].min()) & (span <= N[mine].max()) & (tokens.min() <= D) & (tokens.max() >= D)
        axes.plot(span, line, ":", color=colour, linewidth=0.9)
        axes.plot(span, np.where(inside, line, np.nan), color=colour)
        axes.plot(N[members], loss[members], "o", color=colour)
        if span[0] < best.N[0] < span[-1]:
            axes.plot(
                best.N[:1], best.loss[:1], "*", color=colour, markersize=11, markeredgecolor=INK, markeredgewidth=0.5
            )
            seen.append(float(best.loss[0]))
        seen += [*loss[members], *line[inside]]
        handles.append(Line2D([], [], color=colour, marker="o" if supported else "", label=f"C = {flop(level)}"))
    low, high = min(seen), max(seen)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.12 * (high - low))
    log_axis(axes, "x", span, f"size N ({kind(table)})")
    axes.set_ylabel("loss (nats per token)")
    handles.append(Line2D([], [], color=MUTED, marker="*", linestyle="none", markersize=10, label="lowest point"))
    draw.legend(figure, handles)
    caption = (
        f"For each compute C the law's loss over sizes in {label(precision)}, solid where the runs' N and D reach. "
        + (
            "Dots are the runs of that compute; the levels with most runs are shown, of three sizes or more."
            if supported
            else "The runs do not lie on levels of equal compute, so the curves at some of their computes stand alone."
        )
    )
    return Drawing(name, title, caption, figure)
