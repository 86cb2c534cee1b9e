"""How figures of the report look, and how they become files: one width, one palette, the same bytes every time.

A figure is 7.2 inches wide, so that at 720 pixels its text is as large as the page's. Colours are those of Okabe and
Ito (legible to the colour-blind) and mean a precision everywhere; bf16 is black. Markers mean a size. Axes of N, D
and compute are logarithmic with ticks such as 30M and 1.2B; the loss is linear.

Figures are made with matplotlib's objects, without pyplot and its global state. Text stays text in the SVG; inside the
page the colours of ink, grid and paper become CSS variables, so that one drawing serves light and dark screens.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from lowprec.scaling.gaps import levels
from lowprec.scaling.table import REFERENCE, RunTable

INK, MUTED, GRID, PAPER = "#1b1f24", "#68707a", "#d9dde2", "#fefefe"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">")
WIDTH = 7.2
MANY = 1500  # dots that are drawn one by one; more become an image within the SVG
STYLE: dict[str, Any] = {
    "font.size": 9, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.titlesize": 9, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.linewidth": 0.8, "lines.linewidth": 1.5, "lines.markersize": 4.5, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handletextpad": 0.4, "legend.columnspacing": 1.2, "legend.labelspacing": 0.3,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "svg.fonttype": "none",
    "svg.hashsalt": "lowprec", "path.simplify": True, "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure of the report, or the reason why it is not there.

    Attributes:
        name: file name without ending.
        title: what it shows.
        caption: how to read it, one or two sentences; if `figure` is None, why it was left out.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None


def canvas(rows: int = 1, columns: int = 1, height: float = 3.6, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width and its axes row by row; `height` in inches of all rows together."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def styled() -> Any:
    """Context in which figures are made: ours whatever the user's matplotlibrc says."""
    return style.context(["default", STYLE])


def save(figure: Figure, stem: Path) -> str:
    """Writes `stem`.svg and `stem`.png; returns the SVG to be put into a page (no size, own ids, CSS colours)."""
    text = as_svg(figure)
    with styled():
        figure.set_layout_engine("none")  # it is laid out now
        figure.dpi = 160
        FigureCanvasAgg(figure).print_png(stem.with_suffix(".png"), metadata={"Software": None})
    stem.with_suffix(".svg").write_text(text, encoding="utf-8")
    return embeddable(text, stem.name)


def as_svg(figure: Figure) -> str:
    """The file's text. Drawn by the canvas itself: Figure.savefig would draw everything twice."""
    buffer = io.StringIO()
    with styled():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def embeddable(svg: str, name: str) -> str:
    """The <svg> element alone: ids made unique to `name`, sizes left to the page, ink and paper as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r'\b(id=")([^"]*)"', rf'\1{name}-\2"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'"?xlink:href="data:', 'href="data:', svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()


# Numbers and names --------------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """1234567 -> '1.23M': three digits and K, M, B, T; beyond that 1.2e18."""
    if not math.isfinite(value) or value <= 0:
        return f"{value:g}"
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1.0, "")):
        if value >= unit * 0.9995 and value < 9.995e14:
            return f"{value / unit:.3g}{suffix}" if value / unit < 999.5 else f"{value / unit:.0f}{suffix}"
    return f"{value:.3g}".replace("e+", "e")


def flop(value: float) -> str:
    """1.5e13: compute, which is never a count."""
    return f"{value:.3g}".replace("e+", "e")


def label(name: Any, length: int = 28) -> str:
    """A name from the data as a label: printable and not longer than `length`."""
    text = "".join(c if c.isprintable() else "?" for c in str(name))
    return text if len(text) <= length else text[: length - 1] + "…"


def file_name(text: str) -> str:
    """A name as part of a file's: letters, digits, _ and -."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]


# Axes ---------------------------------------------------------------------------------------------------------------


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high` on a log axis: even steps if it is short, else 1-2-5, 1-3 or whole decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    if high < 3 * low:
        ticks = [float(tick) for tick in MaxNLocator(most - 1).tick_values(low, high)]
        return [tick for tick in ticks if low <= tick <= high]
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**e for e in range(first, last + 1) for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def log_axis(axes: Axes, which: str, values: Sequence[float] | np.ndarray, text: str, most: int = 7,
             form: Callable[[float], str] | None = None) -> None:  # fmt: skip
    """A log axis over `values` with a little room, ticks as counts (or by `form`), no minor ones."""
    values = np.asarray(values, dtype=float)
    low, high = values.min() / 1.15, values.max() * 1.15
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(text)
    axis.set_major_locator(FixedLocator(log_ticks(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: (form or count)(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def precisions(table: RunTable) -> list[str]:
    """Labels of the table's precisions: bf16 first, then those with most runs. A table without any: one, bf16."""
    if "precision" not in table:
        return [REFERENCE]
    counts = table.frame["precision"].astype(str).value_counts()
    return sorted(counts.index, key=lambda name: (name != REFERENCE, -counts[name], name))


def colours(table: RunTable) -> dict[str, str]:
    """One colour a precision; bf16 is ink. Beyond eight the last ones share grey."""
    others = [name for name in precisions(table) if name != REFERENCE]
    spread = dict(zip(others, PALETTE))
    return {REFERENCE: INK, **{name: spread.get(name, MUTED) for name in others}}


def of_precision(table: RunTable) -> np.ndarray:
    """Precision of every run, as str."""
    if "precision" not in table:
        return np.full(len(table), REFERENCE, dtype=object)
    return table.column("precision").astype(str).astype(object)


def size_groups(table: RunTable, most: int = 8) -> tuple[np.ndarray, list[str]]:
    """Sizes as groups: (index of the group of every run, labels by increasing N).

    Sizes within 4% are one group; if there are more than `most`, groups are equal steps of log N. A table without N
    has one group without a label.
    """
    if "N" not in table:
        return np.zeros(len(table), dtype=int), [""]
    sizes = table.column("N")
    group = levels(sizes, 0.04)
    if group.max(initial=0) < most:
        return group, [count(float(np.median(sizes[group == g]))) for g in range(group.max(initial=0) + 1)]
    edges = np.geomspace(sizes.min(), sizes.max(), most + 1)
    raw = np.clip(np.searchsorted(edges, sizes, side="right") - 1, 0, most - 1)
    kept, group = np.unique(raw, return_inverse=True)
    return group, [f"{count(edges[g])}–{count(edges[g + 1])}" for g in kept]


def groups_of(table: RunTable, whole: RunTable) -> np.ndarray:
    """(n,) group among those of `whole` of every run of `table`: that of the nearest size."""
    group = size_groups(whole)[0]
    if "N" not in table or "N" not in whole:
        return np.zeros(len(table), dtype=int)
    sizes, first = np.unique(whole.column("N"), return_index=True)
    return group[first][np.searchsorted(np.sqrt(sizes[1:] * sizes[:-1]), table.column("N"))]


def scatter(axes: Axes, table: RunTable, x: np.ndarray, y: np.ndarray, *, mask: np.ndarray | None = None,
            hollow: bool = False, like: RunTable | None = None) -> None:  # fmt: skip
    """Dots of runs: colour by precision, marker by size; hollow ones were not fitted. Many dots become an image.

    `like`: the table whose colours and markers are used, if `table` is a part of it.
    """
    whole = table if like is None else like
    tint, of = colours(whole), of_precision(table)
    group = groups_of(table, whole)
    keep = np.ones(len(table), dtype=bool) if mask is None else mask
    many: dict[str, Any] = {"markersize": 2, "rasterized": True} if len(table) > MANY else {}
    for name in precisions(table):
        for g in np.unique(group):
            here = keep & (of == name) & (group == g)
            if here.any():
                axes.plot(x[here], y[here], MARKERS[g % len(MARKERS)], **many, linestyle="none", markeredgewidth=0.8,
                          alpha=0.9, color=tint[name], markerfacecolor="none" if hollow else tint[name])  # fmt: skip


def key(figure: Figure, table: RunTable, *, shown: Sequence[str] | None = None, sizes: bool = True,
        extra: Sequence[Artist] = (), like: RunTable | None = None) -> None:  # fmt: skip
    """The legend below a figure: colours of the precisions (`shown`, or all), markers of the sizes, `extra` handles."""
    whole = table if like is None else like
    tint, texts = colours(whole), size_groups(whole)[1]
    names = [name for name in precisions(table) if tint[name] != MUTED] if shown is None else shown
    handles: list[Artist] = []
    if len(tint) > 1:
        handles += [Line2D([], [], color=tint[name], linewidth=3, label=label(name, 20)) for name in names]
        if shown is None and (grey := sum(colour == MUTED for colour in tint.values())):
            handles.append(Line2D([], [], color=MUTED, linewidth=3, label=f"{grey} others"))
    if sizes:
        there = [g for g in np.unique(groups_of(table, whole)) if texts[g]]
        handles += [
            Line2D([], [], linestyle="none", marker=MARKERS[g % len(MARKERS)], color=MUTED, label=texts[g])
            for g in there
        ]
    legend(figure, [*handles, *extra])


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below the figure that reads row by row (matplotlib fills columns)."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(2, min(8, int(100 / (longest + 6)))))
    rows = math.ceil(len(handles) / columns)
    padded = [*handles, *(Line2D([], [], linestyle="none", label=" ") for _ in range(rows * columns - len(handles)))]
    order = [padded[row * columns + column] for column in range(columns) for row in range(rows)]
    figure.legend(handles=order, loc="outside lower center", ncols=columns)
