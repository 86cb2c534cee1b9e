"""Figures of the run report: curves over tokens, one colour a run; and the heat maps of a run's probes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lowprec.scaling.draw import INK, MUTED, PALETTE, Drawing, canvas, count, label, legend, log_axis
from lowprec.tools.run_read import RunView
from lowprec.train import sinks_heat as heat

BUCKETS = 500  # of a curve, each drawn with its lowest and highest point, so no spike is lost
GIB = 2.0**30
# key of metrics.jsonl: (title, factor, logarithmic)
CURVES: dict[str, tuple[str, float, bool]] = {
    "grad_norm": ("gradient norm, before clipping", 1.0, True),
    "lr": ("learning rate", 1.0, False),
    "tokens_per_s": ("tokens per second", 1.0, False),
    "step_s": ("seconds per step", 1.0, False),
    "mem_bytes": ("peak memory of the first rank (GiB)", 1 / GIB, False),
    "utilisation": ("utilisation: ideal over measured seconds", 1.0, False),
    "mfu": ("MFU", 1.0, False),
    "wire_bytes_per_param": ("bytes sent a step, per parameter", 1.0, False),
    "probe_sqnr_db": ("probe: mean SQNR of products (dB)", 1.0, False),
    "probe_grad_cosine": ("probe: cosine of weight gradients", 1.0, False),
    "probe_sharpness": ("probe: sharpness at the logits (%)", 1.0, False),
    "osc_ratio": ("share of weights put to rest", 1.0, False),
}


def colour(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def series(run: RunView, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the records that have a number there; what is null becomes NaN, a gap."""
    points = [(r.get("tokens"), r[key]) for r in run.records if key in r]
    points = [(x, math.nan if y is None else y) for x, y in points if isinstance(x, (int, float))]
    points = [(x, y) for x, y in points if isinstance(y, (int, float))]
    return np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points], dtype=float)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 BUCKETS points, in order: the lowest and the highest of each bucket, and what is no number."""
    if len(x) <= 2 * BUCKETS:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), BUCKETS):
        finite = part[np.isfinite(y[part])]
        kept |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])} if len(finite) else {int(part[0])}
    at = sorted(kept)
    return x[at], y[at]


def curves(runs: Sequence[RunView]) -> list[Drawing]:
    """The loss, and a panel for everything else that was logged. Empty without records."""
    if not any(len(series(run, "loss")[0]) for run in runs):
        return []
    drawings = [loss(runs)]
    keys = [key for key in CURVES if any(np.isfinite(series(run, key)[1]).any() for run in runs)]
    if keys:
        rows = math.ceil(len(keys) / 2)
        figure, axes = canvas(rows, 2, height=1.75 * rows)
        for ax, key in zip(axes, keys):
            title, factor, logarithmic = CURVES[key]
            for i, run in enumerate(runs):
                x, y = thinned(*series(run, key))
                ax.plot(
                    x, y * factor, color=colour(i), linewidth=1.0, marker="o" if len(x) < 12 else None, markersize=3
                )
            ax.set_title(title, fontsize=8)
            every = np.concatenate([series(run, key)[1] for run in runs]) * factor
            if logarithmic and (every > 0).any():
                log_axis(ax, "y", every[every > 0], "", most=4, form=lambda value: f"{value:.2g}")
            _tokens(ax, "tokens" if key in keys[-2:] else "")
        for ax in axes[len(keys) :]:
            ax.set_axis_off()
        _legend(figure, runs)
        text = "As metrics.jsonl has it; of long curves every spike is kept and the rest is thinned."
        drawings.append(Drawing("curves", "Everything else over tokens", text, figure))
    return drawings


def loss(runs: Sequence[RunView]) -> Drawing:
    """Training loss, validation loss with the recipe on and off, events."""
    figure, (ax,) = canvas(height=3.8)
    shown = []
    for i, run in enumerate(runs):
        x, y = thinned(*series(run, "loss"))
        ax.plot(x, y, color=colour(i), linewidth=0.9, alpha=0.6)
        for key, marker, line in (("val_loss", "o", "-"), ("val_loss_high_precision", "x", ":")):
            x, y = series(run, key)
            ax.plot(x, y, marker=marker, linestyle=line, color=colour(i), linewidth=1.1, markersize=5)
            shown += [key] * bool(len(x))
        for tokens, is_plan in marks(run):
            ax.axvline(tokens, color=MUTED if is_plan else colour(i), linewidth=0.8, linestyle=":" if is_plan else "-")
    every = np.concatenate([series(run, "loss")[1] for run in runs])
    every = every[np.isfinite(every)]
    if len(every):
        low, high = every.min(), np.quantile(every, 0.999)
        ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.08 * (high - low) + 1e-3)
    ax.set_ylabel("nats per token")
    _tokens(ax, "tokens")
    lines = [Line2D([], [], color=INK, alpha=0.6, linewidth=0.9, label="training")]
    if "val_loss" in shown:
        lines.append(Line2D([], [], color=INK, marker="o", markersize=5, label="validation, recipe on"))
    if "val_loss_high_precision" in shown:
        lines.append(Line2D([], [], color=INK, marker="x", linestyle=":", markersize=5, label="validation, recipe off"))
    names = [Line2D([], [], color=colour(i), linewidth=3, label=label(run.name)) for i, run in enumerate(runs)]
    legend(figure, [*lines, *(names if len(runs) > 1 else [])])
    text = (
        "The vertical axis leaves out the highest 0.1% of the losses. Solid lines across are events (below), "
        "dotted ones changes of the precision plan."
    )
    return Drawing("loss", "Loss", text, figure)


def marks(run: RunView) -> Iterator[tuple[float, bool]]:
    """(tokens, whether the plan changed there) of the steps at which something happened, each once."""
    known = [r for r in run.records if isinstance(r.get("tokens"), (int, float))]
    steps, tokens = [r["step"] for r in known], [r["tokens"] for r in known]
    if not steps:
        return
    for step in sorted({e["step"] for e in run.events if isinstance(e.get("step"), int)})[:200]:
        yield float(np.interp(step, steps, tokens)), False
    plans = [r.get("plan") for r in known]
    for i in range(1, len(known)):
        if plans[i] != plans[i - 1]:
            yield float(tokens[i]), True


def _tokens(ax: Axes, text: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else count(value)))
    ax.set_xlabel(text)


def _legend(figure: Figure, runs: Sequence[RunView]) -> None:
    if len(runs) > 1:
        legend(figure, [Line2D([], [], color=colour(i), linewidth=3, label=label(r.name)) for i, r in enumerate(runs)])


def probes(run: RunView, prefix: str) -> Iterator[tuple[Drawing, Drawing | None]]:
    """(the newest probe, all probes over time or None) of every sheet that has something to show."""
    newest = run.probes[-1]
    steps, layers = [p["step"] for p in run.probes], [p["layers"] for p in run.probes]
    for sheet in heat.SHEETS:
        figure = heat.now(sheet, newest["layers"])
        then = heat.over_time(sheet, steps, layers) if len(run.probes) > 1 else None
        if figure is not None:
            later = None if then is None else Drawing(f"{prefix}{sheet.name}-time", "Over probes", _rows(run), then)
            yield Drawing(f"{prefix}{sheet.name}", sheet.title, sheet.caption, figure), later


def scales(run: RunView, prefix: str) -> Drawing | None:
    """Histograms of the block scales of the newest probe."""
    figure = heat.scales(run.probes[-1]["layers"])
    text = (
        "Share of an operand's block scales in each power of two. A column at 0 are blocks that are all zero; a "
        "pile at the right end is the largest scale that the format has."
    )
    return None if figure is None else Drawing(f"{prefix}scales", "Block scales", text, figure)


def _rows(run: RunView) -> str:
    which = "every probe" if run.probe_count <= len(run.probes) else f"{len(run.probes)} of {run.probe_count} probes"
    return f"Every row is a layer, first block on top, layers of one kind together; {which}."
