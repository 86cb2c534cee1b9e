"""lowprec-numerics: what precision recipes lose and cost, product by product.

    lowprec-numerics                                              # every shipped recipe on Gaussian tensors
    lowprec-numerics --recipes nvfp4,mxfp8 --data all             # on all five kinds of synthetic tensors
    lowprec-numerics --capture runs/quickstart --layers 'layers.0.*' --html numerics.html
    lowprec-numerics --recipes my_recipe.yaml --json

Three rows a recipe, one for each product of a linear layer: its signal-to-noise ratio (of all, and of the median row)
and bias against the exact product, and what its two operands (a/b) lose: bits a value, ratio, bias, share of non-zero
values that become zero (underflow) and share that the format's largest value cuts (saturation). Then one row of costs
a recipe.

How it is measured: ``tools/numerics_measure.py``. The synthetic tensors: ``tools/numerics_data.py``. What the costs
count: ``tools/numerics_cost.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch

from lowprec.linear import LinearRecipe
from lowprec.linear.backends import CHOICES
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.tools.numerics_cost import Cost, cost
from lowprec.tools.numerics_data import KINDS, Tensors, draw
from lowprec.tools.numerics_measure import Row, measure, recipes_of

SHAPE, QUICK = (512, 256, 384), (256, 128, 128)  # tokens, in, out

Cells = list[tuple[str, ...]]


def shipped() -> list[str]:
    """Names of the shipped precision files."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def synthetic(kinds: Iterable[str], shape: tuple[int, int, int]) -> dict[str, Callable[[int], Tensors]]:
    """Sources of tensors by kind: a function from a step to the layer's tensors in it."""

    def of(kind: str, step: int) -> Tensors:
        return draw(kind, shape, seed=step)

    return {kind: partial(of, kind) for kind in kinds}


def captured(run: Path, match: str, tokens: int) -> dict[str, Callable[[int], Tensors]]:
    """Sources that give the tensors of a run's layers, by layer; the same ones in every step."""
    from lowprec.tools.capture import capture

    found = {name: Tensors(c.x_TK, c.w_NK, c.dy_TN) for name, c in capture(run, match, tokens=tokens).items()}

    def of(name: str, step: int) -> Tensors:
        return found[name]

    return {name: partial(of, name) for name in found}


def collect(
    recipes: dict[str, LinearRecipe], sources: dict[str, Callable[[int], Tensors]], backend: str = "auto"
) -> list[Row]:
    """Measure every recipe on every source.

    Raises:
        ValueError: if a recipe cannot run on a source, in one sentence that begins with the recipe's name.
    """
    rows: list[Row] = []
    for source, tensors in sources.items():
        for name, recipe in recipes.items():
            try:
                rows += measure(name, recipe, source, tensors, backend)
            except ValueError as error:
                raise ValueError(f"recipe {name} on {source}: {error}") from error
    return rows


def _db(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.1f}"


def _share(value: float) -> str:
    """A share as per cent, dots for none."""
    return "." if value == 0 else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return "0" if abs(value) < 5e-5 else f"{100 * value:+.2f}"


def error_cells(rows: Sequence[Row]) -> Cells:
    """Head and rows of the table of errors."""
    head = (
        "recipe",
        "gemm",
        "SQNR dB",
        "row dB",
        "bias %",
        "operands a, b",
        "bits",
        "SQNR dB",
        "bias %",
        "underflow %",
        "saturation %",
    )
    cells: Cells = [head]
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].recipe != row.recipe
        pairs = [
            "/".join(show(getattr(o, field)) for o in row.operands)
            for field, show in (
                ("bits", "{:.4g}".format),
                ("sqnr_db", _db),
                ("bias", _signed),
                ("underflow_frac", _share),
                ("saturation_frac", _share),
            )
        ]
        texts = ", ".join(f"{o.name} {o.text.partition(' (')[0]}" for o in row.operands)
        ratios = (_db(row.sqnr_db), _db(row.row_sqnr_db), _signed(row.bias))
        cells.append((row.recipe if first else "", row.gemm, *ratios, texts, *pairs))
    return cells


def cost_cells(costs: dict[str, Cost]) -> Cells:
    """Head and rows of the table of costs."""
    head = (
        "recipe",
        "low 8",
        "low 4",
        "copies x/w/dy",
        "roundings",
        "amax passes",
        "Hadamard %",
        "extra GEMM %",
        "saved bits",
    )
    cells: Cells = [head]
    for name, c in costs.items():
        counts = ["/".join(str(count[t]) for t in ("x", "w", "dy")) for count in (c.copies, c.roundings, c.amax_passes)]
        shares = (f"{round(3 * c.low8_frac)}/3", f"{round(3 * c.low4_frac)}/3")
        overheads = (f"{100 * c.hadamard_frac:.2f}", f"{100 * c.extra_gemm_frac:.2f}", f"{c.saved_codes_bits:.4g}")
        cells.append((name, *shares, *counts, *overheads))
    return cells


def text(cells: Cells) -> str:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def as_json(rows: Sequence[Row], costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """The rows as plain values, each with its recipe's costs; null stands for an infinite ratio (nothing is lost)."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [plain(value) for value in node]
        return None if isinstance(node, float) and not math.isfinite(node) else node

    return [plain({**asdict(row), "cost": asdict(costs[row.recipe])}) for row in rows]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    p = argparse.ArgumentParser("lowprec-numerics", description="What precision recipes lose and cost, by product.")
    p.add_argument(
        "--recipes", nargs="+", help="names of shipped recipes, or YAML files; commas or spaces (default: all)"
    )
    p.add_argument(
        "--data", nargs="+", default=["gaussian"], help=f"all, or some of {', '.join(KINDS)} (default: gaussian)"
    )
    p.add_argument(
        "--shape", type=int, nargs=3, metavar=("TOKENS", "IN", "OUT"), help=f"of synthetic tensors (default: {SHAPE})"
    )
    p.add_argument("--capture", type=Path, metavar="RUN", help="take the tensors from this run folder instead")
    p.add_argument("--layers", default="*", metavar="GLOB", help="which layers of the run (default: all)")
    p.add_argument("--tokens", type=int, default=512, help="of each captured tensor (default: %(default)s)")
    p.add_argument(
        "--backend", choices=CHOICES, default="auto", help="who computes the products (default: %(default)s)"
    )
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's own number)")
    p.add_argument(
        "--html", type=Path, metavar="FILE", help="also write one page with tables and plots (needs matplotlib)"
    )
    p.add_argument("--json", action="store_true", help="print a JSON list of rows instead of tables")
    p.add_argument("--quick", action="store_true", help=f"small tensors, {QUICK}")
    a = p.parse_args(argv)
    if min(a.tokens, *(a.shape or SHAPE)) < 1:
        p.error("--tokens and the sizes of --shape must be at least 1")
    return a


def _words(given: Sequence[str]) -> list[str]:
    """Words separated by spaces or commas."""
    return [word for words in given for word in words.split(",") if word]


def run(a: argparse.Namespace) -> None:
    """Measure and show. Raises ValueError for whatever the user can mend."""
    from lowprec.tools import numerics_page

    if a.html:
        numerics_page.pyplot()  # refuse before the work, not after
    recipes: dict[str, LinearRecipe] = {}
    for name in _words(a.recipes) if a.recipes else shipped():
        recipes.update(recipes_of(name))
    kinds = list(KINDS) if "all" in _words(a.data) else _words(a.data)
    shape = tuple(a.shape) if a.shape else QUICK if a.quick else SHAPE
    sources = captured(a.capture, a.layers, a.tokens) if a.capture else synthetic(kinds, shape)
    rows = collect(recipes, sources, a.backend)
    costs = {name: cost(recipe) for name, recipe in recipes.items()}
    tables = {source: error_cells([row for row in rows if row.data == source]) for source in sources}
    what = f"captured from {a.capture}" if a.capture else f"synthetic, {shape[0]} tokens, {shape[1]} -> {shape[2]}"
    if a.json:
        print(json.dumps(as_json(rows, costs), indent=1))
    else:
        for source, cells in tables.items():
            print(f"{source} ({what})\n\n{text(cells)}\n")
        print(f"costs (see tools/numerics_cost.py)\n\n{text(cost_cells(costs))}")
    if a.html:
        equations = {name: recipe.describe() for name, recipe in recipes.items()}
        a.html.write_text(
            numerics_page.page("lowprec-numerics", f"Tensors: {what}.", rows, tables, cost_cells(costs), equations)
        )
        print(f"written: {a.html}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence for bad arguments, a recipe that fails, or a missing library."""
    a = arguments(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    try:
        run(a)
    except ValueError as error:
        print(f"lowprec-numerics: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
