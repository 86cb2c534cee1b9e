"""Heat maps of probes: layer x role, as a person reads them.

A sheet is one figure of several panels, one a role (a product's operand or its output; a measure of the weights). A
panel has a row for each linear layer of a block and a column for each block, so a bad block is a dark column and a bad
kind of layer a dark row, whichever end of the measure is the bad one; layers outside the blocks stand behind the last
block. White means not measured: not quantised, or without a meaning there (an exact product has no error).

`SHEETS` names them all; `OVERVIEW` is the one that W&B and TensorBoard get. Used by :mod:`lowprec.tools.run_report`.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from lowprec.scaling.draw import INK, WIDTH, log_ticks, styled
from lowprec.train.metrics import Record

Path = tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """A role: its title, where its value stands in a layer's entry of a line of probes.jsonl, and which end is bad."""

    title: str
    path: Path
    worse: str = "high"  # low, high, far (from 0)
    kind: str = "linear"  # or log; signed: the colours meet in white at 0


@dataclass(frozen=True)
class Sheet:
    """One figure.

    Attributes:
        shared: whether all panels have the same colours.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    shared: bool = True


OPERANDS = (("fprop", "x"), ("fprop", "w"), ("dgrad", "dy"), ("dgrad", "w"), ("wgrad", "dy"), ("wgrad", "x"))
PRODUCTS = tuple((gemm, "out") for gemm in ("fprop", "dgrad", "wgrad"))


def _roles(
    measure: str, roles: Sequence[tuple[str, str]], worse: str = "high", kind: str = "linear"
) -> tuple[Panel, ...]:
    return tuple(Panel(f"{gemm} {name}", ("gemms", gemm, name, measure), worse, kind) for gemm, name in roles)


BOTH = tuple(role for i, product in enumerate(PRODUCTS) for role in (*OPERANDS[2 * i : 2 * i + 2], product))
GRADIENT = Panel("weight gradient", ("gradient", "cosine"), "low")
SHEETS = (
    Sheet("sqnr_db", "Signal to quantisation noise (dB)",
          "Of each operand and each product against fp32; 6 dB less is an error twice as large.",
          _roles("sqnr_db", BOTH, "low")),
    Sheet("bias", "Bias", "1 - <x, q> / <x, x>: what averaging over tokens does not remove; 0 is unbiased.",
          _roles("bias", BOTH, "far", "signed")),
    Sheet("underflow_frac", "Underflow (share of nonzero elements that became zero)",
          "High means that small values are lost.", _roles("underflow_frac", OPERANDS)),
    Sheet("saturation_frac", "Saturation (share of elements beyond the grid's largest number)",
          "A scale taken from the maximum clips only what the scale's own rounding leaves out.",
          _roles("saturation_frac", OPERANDS)),
    Sheet("amax", "Largest magnitude", "Growing steadily over probes is a sign of instability.",
          _roles("amax", OPERANDS, kind="log"), shared=False),
    Sheet("kurtosis", "Kurtosis", "3 for Gaussian data; in the hundreds, a few outliers take the range of a block.",
          _roles("kurtosis", OPERANDS, kind="log")),
    Sheet("max_over_mean", "Largest over mean magnitude", "What one scale must span (arXiv:2509.23500).",
          _roles("max_over_mean", OPERANDS, kind="log")),
    Sheet("cosine", "Cosine with high precision",
          "Of each product for the same operands; of the weight gradient against that of an unquantised pass, which "
          "has the errors of all layers in it.", (*_roles("cosine", PRODUCTS, "low"), GRADIENT)),
    Sheet("error", "Where the error of a layer's output comes from",
          "Shares of |y|^2: R = A + B + C; A came with the input, B is new in this layer, C is how they meet "
          "(arXiv:2509.23500); gain is how the layer passes on the error of its input.",
          (*(Panel(name, ("error", name)) for name in ("R", "A", "B")),
           Panel("C", ("error", "C"), "far", "signed"), Panel("gain", ("error", "gain"))), shared=False),
    Sheet("weight", "How weights move",
          "oscillation: path of Q(w) over path of w, about 1 where Q follows; edq: how much of the update arrives, "
          "1 = all, 0 = none (edq_bf16: in the bf16 copy); lost_frac: share of the changed weights whose Q did not.",
          tuple(Panel(name, ("weight", name), "low" if "edq" in name else "high")
                for name in ("oscillation", "lost_frac", "edq", "edq_bf16")),
          shared=False),
)  # fmt: skip
OVERVIEW = Sheet(
    "overview", "Probe", "",
    (*(Panel(f"{gemm} SQNR (dB)", ("gemms", gemm, "out", "sqnr_db"), "low") for gemm in ("fprop", "dgrad", "wgrad")),
     Panel("underflow of x", ("gemms", "fprop", "x", "underflow_frac")),
     Panel("underflow of dy", ("gemms", "dgrad", "dy", "underflow_frac")),
     Panel("kurtosis of x", ("gemms", "fprop", "x", "kurtosis"), kind="log"),
     Panel("gradient cosine", ("gradient", "cosine"), "low"), Panel("oscillation of w", ("weight", "oscillation")),
     Panel("lost updates of w", ("weight", "lost_frac"))),
    shared=False,
)  # fmt: skip


def value_of(layer: Mapping[str, Any], path: Path) -> float:
    """A number of a layer's entry; NaN where it is not there."""
    node: Any = layer
    for key in path:
        if not isinstance(node, Mapping):
            return math.nan
        node = node.get(key)
    return float(node) if isinstance(node, (int, float)) else math.nan


def place(name: str) -> tuple[int | None, str]:
    """`layers.3.attn.q_proj` -> (3, "attn.q_proj"); (None, name) outside the blocks."""
    found = re.fullmatch(r"\D*?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def grid(layers: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[np.ndarray, list[str], list[int]]:
    """((kinds, blocks) values, NaN where there is none, kinds of layers, numbers of the blocks)."""
    places = {name: place(name) for name in layers}
    blocks = sorted({block for block, _ in places.values() if block is not None})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    outside = any(block is None for block, _ in places.values())
    values = np.full((len(kinds), len(blocks) + outside), np.nan)
    at = {block: i for i, block in enumerate(blocks)}
    for name, (block, kind) in places.items():
        values[kinds.index(kind), len(blocks) if block is None else at[block]] = value_of(layers[name], path)
    return values, kinds, blocks


def now(sheet: Sheet, layers: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """The sheet of one probe, its entry `layers`; None if nothing of it was measured."""
    made = [grid(layers, panel.path) for panel in sheet.panels]
    figure, axes, norms = _figure(sheet, [values for values, _, _ in made], rows=len(made[0][1]) if made else 0)
    if figure is None:
        return None
    for i, (ax, (values, kinds, blocks)) in enumerate(zip(axes, made)):
        _show(figure, ax, values, sheet.panels[i], norms[i])
        ticks = list(range(0, len(blocks), max(1, math.ceil(len(blocks) / 8))))
        ax.set_xticks(ticks, [str(blocks[t]) for t in ticks])
        ax.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds] if _first(ax) else [])
    axes[len(made) - 1].set_xlabel("block")
    return figure


def over_time(sheet: Sheet, steps: Sequence[int], probes: Sequence[Mapping[str, Mapping[str, Any]]]) -> Figure | None:
    """The sheet over probes: a row a layer, a column a probe; None if nothing of it was measured."""
    names = by_kind(dict.fromkeys(name for layers in probes for name in layers))
    made = [
        np.array([[value_of(layers.get(name, {}), panel.path) for layers in probes] for name in names]).reshape(
            len(names), len(probes)
        )
        for panel in sheet.panels
    ]
    figure, axes, norms = _figure(sheet, made, rows=min(12, max(4, len(names) / 6)))
    if figure is None:
        return None
    for i, (ax, values) in enumerate(zip(axes, made)):
        _show(figure, ax, values, sheet.panels[i], norms[i])
        ticks = list(range(0, len(steps), max(1, math.ceil(len(steps) / 4))))
        ax.set_xticks(ticks, [f"{steps[t]}" for t in ticks])
        _kinds(ax, names)
    axes[len(made) - 1].set_xlabel("step")
    return figure


def scales(layers: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Histograms of block scales of one probe: a row a layer, a column a binade, the colour its share."""
    sheet = Sheet("scales", "", "", _roles("scale_log2", OPERANDS))
    names = by_kind(layers)
    found = [{name: _at(layers[name], panel.path) for name in names} for panel in sheet.panels]
    keys = [key for by_layer in found for shares in by_layer.values() for key in shares]
    exponents = sorted({int(key) for key in keys if re.fullmatch(r"-?\d+", key)})
    if not exponents:
        return None
    columns = ["zero", *map(str, range(exponents[0], exponents[-1] + 1))]
    made = [
        np.array(
            [[shares.get(c, 0.0 if shares else np.nan) or np.nan for c in columns] for shares in by_layer.values()]
        )
        for by_layer in found
    ]
    figure, axes, _ = _figure(sheet, made, rows=min(12, max(4, len(layers) / 6)))
    assert figure is not None
    for i, (ax, values) in enumerate(zip(axes, made)):
        _show(figure, ax, values, sheet.panels[i], Normalize(0, 1))
        ticks = [0, *range(1, len(columns), max(1, math.ceil(len(columns) / 6)))]
        ax.set_xticks(ticks, ["0" if t == 0 else columns[t] for t in ticks])
        _kinds(ax, names)
    axes[len(made) - 1].set_xlabel("log2 of the scale")
    return figure


def by_kind(names: Iterable[str]) -> list[str]:
    """Layers of one kind together, by their blocks."""
    names = list(names)
    kinds = list(dict.fromkeys(place(name)[1] for name in names))
    return sorted(names, key=lambda name: (kinds.index(place(name)[1]), place(name)[0] or 0))


def _first(ax: Axes) -> bool:
    spec = ax.get_subplotspec()
    return spec is not None and spec.is_first_col()


def _kinds(ax: Axes, names: Sequence[str]) -> None:
    """Labels of rows that :func:`by_kind` has ordered, and lines between the kinds."""
    starts = [i for i, name in enumerate(names) if i == 0 or place(name)[1] != place(names[i - 1])[1]]
    ends = [*starts[1:], len(names)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
    kept = list(range(0, len(starts), max(1, math.ceil(len(starts) / 24))))
    ax.set_yticks([middles[i] for i in kept], [_short(place(names[starts[i]])[1]) for i in kept] if _first(ax) else [])
    for start in starts[1:]:
        ax.axhline(start - 0.5, color=INK, linewidth=0.5)


def _at(layer: Mapping[str, Any], path: Path) -> Mapping[str, float]:
    node: Any = layer
    for key in path:
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
    return node if isinstance(node, Mapping) else {}


def overview_png(line: Record) -> bytes:
    """A line of probes.jsonl as one picture: PNG."""
    buffer = io.BytesIO()
    with styled():
        figure = now(OVERVIEW, line["layers"]) or Figure(figsize=(WIDTH, 1))
        figure.text(0.01, 0.99, f"step {line['step']}", fontsize=9, va="top")
        figure.dpi = 130
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _short(name: str, length: int = 24) -> str:
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= length else "…" + text[1 - length :]


def _figure(
    sheet: Sheet, made: Sequence[np.ndarray], rows: float
) -> tuple[Figure | None, list[Axes], list[Normalize | None]]:
    """The empty panels, up to three in a row, and the colours of each."""
    if not any(np.isfinite(values).any() for values in made):
        return None, [], []
    columns = 2 if len(made) in (2, 4) or (len(made) == 6 and sheet.shared) else 3
    lines = math.ceil(len(made) / columns)
    tall = 0.155 * max(rows, 3)  # inches of a panel; the margins are given, for finding them takes longer than drawing
    height = lines * (tall + 0.5) + 0.35
    figure = Figure(figsize=(WIDTH, height))
    edges = {"left": 1.2 / WIDTH, "right": 1 - 0.35 / WIDTH, "top": 1 - 0.28 / height, "bottom": 0.45 / height}
    axes = list(
        figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.5 / tall, "wspace": 0.22, **edges}).flat
    )
    for ax in axes[len(made) :]:
        ax.set_axis_off()
    if sheet.shared:
        every = np.concatenate([values.ravel() for values in made])
        return figure, axes, [_norm(every, sheet.panels[0].kind)] * len(made)
    return figure, axes, [_norm(values.ravel(), panel.kind) for values, panel in zip(made, sheet.panels)]


def _norm(values: np.ndarray, kind: str) -> Normalize | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if kind == "signed":
        reach = max(-low, high) or 1.0
        return TwoSlopeNorm(0.0, -reach, reach)
    if kind == "log" and (positive := values[values > 0]).size:
        return LogNorm(float(positive.min()), max(high, float(positive.min()) * 1.01))
    return Normalize(low, high if high > low else low + 1e-9 + abs(low) * 1e-6)


def _show(figure: Figure, ax: Axes, values: np.ndarray, panel: Panel, norm: Normalize | None) -> None:
    ax.set_title(panel.title, fontsize=8)
    ax.tick_params(labelsize=6.5, length=2)
    ax.grid(False)
    if norm is None or not np.isfinite(values).any():
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", fontsize=7)
        return
    colours = {"low": "viridis", "high": "viridis_r", "far": "RdBu_r"}[panel.worse]
    masked = np.ma.masked_invalid(values)
    image = ax.imshow(masked, norm=norm, cmap=colours, aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=ax, pad=0.015, fraction=0.05, use_gridspec=False)
    bar.ax.tick_params(labelsize=6, length=2)
    if isinstance(norm, LogNorm):
        assert norm.vmin is not None and norm.vmax is not None
        ticks = log_ticks(norm.vmin, norm.vmax, 5)
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
