"""The HTML page of ``lowprec-numerics``: tables and plots in one file that needs nothing else.

Plots are drawn by matplotlib and embedded as PNG; numbers are those of the rows, formatted as in the text tables.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from lowprec.tools.numerics_measure import Row

COLOURS = {"fprop": "#1b6ca8", "dgrad": "#c8553d", "wgrad": "#588157"}
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:2px 9px;text-align:right;white-space:nowrap}
td:first-child,th:first-child,td.text{text-align:left}th{position:sticky;top:0;background:#fff}
img{max-width:100%}tr.first td{border-top:2px solid #aaa}pre{background:#f5f5f5;padding:.7em;overflow-x:auto}"""


def pyplot() -> Any:
    """matplotlib's pyplot without a display. Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--html needs matplotlib: pip install matplotlib (it is in the extra 'dev')") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _image(figure: Any, axes: Any, title: str) -> str:
    """A figure, finished, as an <img> that carries its own data."""
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot().close(figure)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def plot_sqnr(rows: Sequence[Row], source: str) -> str:
    """One line a recipe, one dot a product: signal-to-noise ratio on one kind of data."""
    mine = [row for row in rows if row.data == source]
    names = list(dict.fromkeys(row.recipe for row in mine))
    figure, axes = pyplot().subplots(figsize=(9, 1.2 + 0.22 * len(names)))
    for offset, (gemm, colour) in zip((0.2, 0.0, -0.2), COLOURS.items()):
        dots = [(row.sqnr_db, names.index(row.recipe) - offset) for row in mine if row.gemm == gemm]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, markersize=4, label=gemm)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("SQNR (dB), more is better")
    return _image(figure, axes, f"error of the three products, {source}")


def plot_bits(rows: Sequence[Row], source: str) -> str:
    """Each quantised product: bits a value of its operands against its error."""
    figure, axes = pyplot().subplots(figsize=(9, 4.5))
    quantised = [r for r in rows if r.data == source and all(o.bits < 16 for o in r.operands)]
    for gemm, colour in COLOURS.items():
        dots = [(sum(o.bits for o in r.operands) / 2, r.sqnr_db) for r in quantised if r.gemm == gemm]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=colour, markersize=5, alpha=0.6, label=gemm)
    best: dict[int, Row] = {}
    for row in quantised:
        bits = round(sum(o.bits for o in row.operands) / 2)
        best[bits] = max(row, best.get(bits, row), key=lambda r: r.sqnr_db)
    for row in best.values():
        place = (sum(o.bits for o in row.operands) / 2, row.sqnr_db)
        axes.annotate(f"{row.recipe} {row.gemm}", place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.grid(alpha=0.3)
    axes.margins(x=0.1)
    axes.set_xlabel("bits a value, mean of both operands, scales included")
    axes.set_ylabel("SQNR (dB)")
    return _image(figure, axes, f"what bits buy, {source} (products with both operands quantised)")


def table(cells: Sequence[Sequence[str]]) -> str:
    """Text cells, the first row the head; a row whose first cell is filled begins a group."""
    head, *body = cells
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        mark = ' class="first"' if row[0] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def page(
    title: str,
    remarks: str,
    rows: Sequence[Row],
    error_cells: dict[str, list[tuple[str, ...]]],
    cost_cells: list[tuple[str, ...]],
    equations: dict[str, str],
) -> str:
    """The page. ``error_cells``: for each kind of data the cells of its table; ``equations``: by recipe."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(remarks)}</p>"]
    for source, cells in error_cells.items():
        parts += [f"<h2>{html.escape(source)}</h2>", plot_sqnr(rows, source), plot_bits(rows, source), table(cells)]
    parts += ["<h2>cost</h2>", table(cost_cells), "<h2>equations</h2>"]
    parts += [f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>" for name, text in equations.items()]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
