"""recipe_page: docs/recipes.md, the page of every shipped precision recipe.

    python -m lowprec.tools.recipe_page               # measure what is new or has changed, write the page
    python -m lowprec.tools.recipe_page --all         # measure all errors anew (about two minutes)
    python -m lowprec.tools.recipe_page --time        # measure all times anew (some minutes, on a quiet machine)

What a recipe is, does, costs and fails at comes from its YAML: the equations from the parsed recipe, the words from the
comment at its head, the costs from ``tools/numerics_cost.py``. Its errors are measured by ``tools/numerics_measure.py``
and its time by ``tools/bench_linear.py``; both are kept in docs/recipes.json with a fingerprint of the recipe that was
measured, so that a page with numbers of another recipe cannot be written. Nothing on the page is typed by hand.

The comment at the head of ``recipes/precision/<name>.yaml`` says what the recipe is and where it comes from, and then,
each at the beginning of a line: ``# What it does:``, ``# What it costs:``, ``# Known to fail:``, ``# Use it:``. A last
part may be ``# One-line ablations:`` with one variant a line: overrides of a command line, and what they change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch
import yaml

from lowprec.linear import LinearRecipe, Precision, load_precision
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.product import keep_refusal
from lowprec.linear.split import ChannelSplit, ResidualSplit
from lowprec.numerics import Format
from lowprec.tools import bench_linear
from lowprec.tools.numerics import SHAPE, collect, shipped, synthetic
from lowprec.tools.numerics_cost import MODEL, cost, model_low_frac, operands
from lowprec.tools.numerics_data import KINDS
from lowprec.tools.numerics_measure import Row, recipes_of

TIMED_SHAPE = (2048, 1024, 1024)  # tokens, in, out
DOCS = Path(__file__).resolve().parent.parent / "docs"
LABELS = ("What it does", "What it costs", "Known to fail", "Use it")
ABLATIONS = "One-line ablations:"
GEMMS = ("fprop", "dgrad", "wgrad")

Figures = dict[str, dict[str, dict[str, float | None]]]
"""By kind of data and product: SQNR (of all, of the median row) and bias of the product, the larger underflow and
saturation of its operands."""


@dataclass(frozen=True)
class Head:
    """The comment at the head of a precision file: its first words, the text of each of ``LABELS``, and variants: the
    lines (perhaps none) of overrides under ``ABLATIONS``."""

    title: str
    said: dict[str, str]
    ablations: tuple[str, ...]


def read_head(path: Path) -> Head:
    """Parse the comment at the head of a YAML file.

    Raises:
        ValueError: if a label is missing, comes twice, or has no text.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    end = next((i for i, line in enumerate(lines) if line.startswith(ABLATIONS)), len(lines))
    labels = "|".join(LABELS)
    pieces = re.split(rf"^({labels}):", "\n".join(lines[:end]), flags=re.M)
    said = {label: " ".join(text.split()) for label, text in zip(pieces[1::2], pieces[2::2])}
    for label in LABELS:
        if pieces[1::2].count(label) != 1 or not said[label]:
            raise ValueError(
                f"{path.name}: its head comment needs one line that begins '# {label}: ...' and says it; "
                f"all of {', '.join(LABELS)}, in any order, after what the recipe is and where it comes from"
            )
    return Head(" ".join(pieces[0].split()), said, tuple(line.strip() for line in lines[end + 1 :] if line))


def fingerprint(recipe: LinearRecipe) -> str:
    """Short hash of all that the recipe's numbers depend on, its name left out."""
    parts = repr((recipe.fprop, recipe.dgrad, recipe.wgrad))
    return hashlib.blake2b(parts.encode(), digest_size=6).hexdigest()


def _finite(ratio_db: float) -> float | None:
    return None if math.isinf(ratio_db) else round(ratio_db, 2)


def figures(rows: Iterable[Row]) -> Figures:
    """What the page shows of one recipe's rows; infinite ratios as None."""
    out: Figures = {}
    for row in rows:
        out.setdefault(row.data, {})[row.gemm] = {
            "sqnr_db": _finite(row.sqnr_db),
            "row_sqnr_db": _finite(row.row_sqnr_db),
            "bias": round(row.bias, 5),
            "underflow_frac": round(max(o.underflow_frac for o in row.operands), 5),
            "saturation_frac": round(max(o.saturation_frac for o in row.operands), 5),
        }
    return out


def measured(recipes: Mapping[str, LinearRecipe], known: Mapping[str, Any], anew: bool = False) -> dict[str, Any]:
    """The entry of every recipe, by name: that of the same recipe in ``known``, else (or ``anew``) measured."""
    entries = {entry["fingerprint"]: entry for entry in known.values()}
    done: set[str] = set() if anew else set(entries)
    for name, recipe in recipes.items():
        mark = fingerprint(recipe)
        if mark not in done:
            rows = collect({name: recipe}, synthetic(KINDS, SHAPE), backend="torch")
            entries[mark] = entries.get(mark, {}) | {"fingerprint": mark, "figures": figures(rows)}
            done.add(mark)
    return {name: entries[fingerprint(recipe)] for name, recipe in recipes.items()}


def timed(table: Mapping[str, Any], reps: int = 5) -> dict[str, Any]:
    """The table with the time of every recipe named like its file: forward and backward over those of bf16."""
    names = [stem for stem in shipped() if stem in table and recipes_of(stem)[stem].quantized]
    rows = bench_linear.measure(names, TIMED_SHAPE, reps, "auto")
    times = {row.recipe: {"time": {"over_bf16": round(row.ratio_bf16, 2), "backend": row.backend}} for row in rows}
    return {name: entry | times.get(name, {}) for name, entry in table.items()}


# ---- the page


def _md(text: str) -> str:
    """Plain words as Markdown: what would be markup is escaped, arXiv numbers become links."""
    text = re.sub(r"([*<>\\`])", r"\\\1", text)
    return re.sub(r"\b(arXiv:(\d{4}\.\d{4,5}))", r"[\1](https://arxiv.org/abs/\2)", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(lines: Iterable[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else "0" if abs(value) < 5e-5 else f"{100 * value:.2f}"


def _triple(figures_of: Mapping[str, Mapping[str, float | None]], key: str) -> str:
    show = _db if key.endswith("_db") else _percent
    return " / ".join(show(figures_of[gemm][key]) for gemm in GEMMS)


def _anchor(name: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")


def error_overview(table: Mapping[str, Any]) -> str:
    """SQNR of y / dx / dw for every recipe and kind of data."""
    rows = [
        [
            f"[{name}](#{_anchor(name.partition(':')[0])})",
            *(_triple(entry["figures"][kind], "sqnr_db") for kind in KINDS),
        ]
        for name, entry in table.items()
    ]
    return _table(["recipe", *(kind.replace("_", " ") for kind in KINDS)], rows)


def cost_overview(recipes: Mapping[str, LinearRecipe], table: Mapping[str, Any]) -> str:
    """Bits, passes, rotations and memory of every recipe; times where any were measured."""
    head = ["recipe", "bits a value: fprop / dgrad / wgrad", "copies x / w / dy", "amax passes x / w / dy"]
    head += ["Hadamard, % of GEMM operations", "bits of x saved as codes"]
    timed_any = any("time" in entry for entry in table.values())
    rows = []
    for name, recipe in recipes.items():
        c, time = cost(recipe), table[name].get("time")
        bits = " / ".join(" x ".join(f"{c.bits[key]:.4g}" for key in c.bits if key.startswith(gemm)) for gemm in GEMMS)
        counts = [" / ".join(str(of[t]) for t in ("x", "w", "dy")) for of in (c.copies, c.amax_passes)]
        row = [name, bits, *counts, f"{100 * c.hadamard_frac:.2f}", f"{c.saved_codes_bits:.4g}"]
        rows.append(row + ([f"{time['over_bf16']:.2f} ({time['backend']})" if time else "-"] if timed_any else []))
    return _table(head + (["time, bf16 = 1"] if timed_any else []), rows)


def _plan_lines(precision: Precision) -> list[str]:
    """Which layers get the recipe, and what changes during training."""
    rules = "; ".join(f"`{rule.match}` {rule.recipe}" for rule in precision.rules)
    lines = [f"- **Layers**, first match wins: {rules}."]
    for change in precision.schedule:
        target = f"{change.recipe}.{change.gemm}" if change.gemm else change.recipe
        lines.append(
            f"- **Schedule**: from {change.start:.0%} of training, `{target}` as in `{change.replacement.name}`."
        )
    if precision.deoscillation:
        words = ", ".join(f"{key} {value:g}" for key, value in asdict(precision.deoscillation).items())
        lines.append(f"- **Deoscillation**: {words}.")
    return lines


def _cost_lines(name: str, recipe: LinearRecipe, precision: Precision) -> list[str]:
    """Overheads of one linear recipe in words."""
    c = cost(recipe)
    bits = ", ".join(f"{key} {value:.4g}" for key, value in c.bits.items())
    parts = [f"bits a value: {bits}"]
    for what, count in (
        ("quantised copies", c.copies),
        ("roundings", c.roundings),
        ("whole-tensor amax passes", c.amax_passes),
    ):
        if any(count.values()) and (what != "roundings" or count != c.copies):
            parts.append(f"{what} " + ", ".join(f"{t} {number}" for t, number in count.items()))
    if c.hadamard_frac:
        parts.append(f"rotations {100 * c.hadamard_frac:.2f} % of the GEMM operations")
    if c.extra_gemm_frac:
        parts.append(f"additional products {100 * c.extra_gemm_frac:.2f} %")
    refusal = keep_refusal(recipe)
    codes = f"`save: codes` cannot help: {refusal}" if refusal else f"or {c.saved_codes_bits:.4g} with `save: codes`"
    parts.append(f"saved for the backward: x in 16 bits, {codes}")
    return [f"- **Overhead**{name}: {'; '.join(parts)}."]


def _format_lines(recipes: Iterable[LinearRecipe]) -> list[str]:
    """The formats that recipes use, by name, each as a precision file would write it."""
    used: dict[str, Format] = {}
    for recipe in recipes:
        for _, _, _, operand in operands(recipe):
            wider = operand.split.format if isinstance(operand.split, (ChannelSplit, ResidualSplit)) else None
            used |= {f.name: f for f in (operand.format, wider) if f is not None}
    lines = []
    for name, f in used.items():
        node: dict[str, Any] = {"element": [f.element, f.second] if f.second else f.element}
        node |= {"block": list(f.block), "scale": f.scale}
        for field in fields(f):
            value = getattr(f, field.name)
            if field.name not in (*node, "name", "second") and value != field.default:
                node[field.name] = list(value) if isinstance(value, tuple) else value
        lines.append(f"{name}: {yaml.safe_dump(node, default_flow_style=True, sort_keys=False, width=1000).strip()}")
    return lines


def section(stem: str, entries: Mapping[str, tuple[LinearRecipe, Mapping[str, Any]]]) -> str:
    """One precision file: words, equations, layers, overheads, errors."""
    path = RECIPES_FOLDER / f"{stem}.yaml"
    head, precision = read_head(path), load_precision(stem)
    blocks = [f"## {stem}", f"[recipes/precision/{stem}.yaml](../recipes/precision/{stem}.yaml). {_md(head.title)}"]
    blocks.append("\n".join(f"- **{label}**: {_md(head.said[label])}" for label in LABELS))
    equations = {name: recipe.describe() for name, (recipe, _) in entries.items()}
    if precision.attention:
        equations["attention"] = precision.attention.describe()
    for name, text in equations.items():
        blocks.append(("" if name == stem else f"{name}:\n\n") + _code(text.splitlines()))
    used = _format_lines(recipe for recipe, _ in entries.values())
    if used:
        blocks += ["Formats:", _code(used)]
    lines = _plan_lines(precision)
    for name, (recipe, _) in entries.items():
        lines += _cost_lines("" if name == stem else f" of {name}", recipe, precision)
    low8, low4 = (model_low_frac(precision, bits) for bits in (8, 4))
    lines.append(
        f"- **Share**: of the products of all linear layers of `{MODEL.stem}`, averaged over training, {low8:.0%} are"
        f" in elements of at most 8 bits, {low4:.0%} of at most 4."
    )
    blocks.append("\n".join(lines))
    for name, (_, entry) in entries.items():
        rows = [
            [kind.replace("_", " "), *(_triple(entry["figures"][kind], key) for key in
             ("sqnr_db", "row_sqnr_db", "bias", "underflow_frac", "saturation_frac"))]
            for kind in KINDS
        ]  # fmt: skip
        first = "errors" if name == stem else f"errors of {name}"
        head_cells = (first, "SQNR dB, y / dx / dw", "of the median row", "bias %", "underflow %", "saturation %")
        blocks.append(_table(head_cells, rows))
    if head.ablations:
        blocks += [f"Variants, appended to a command with `precision={stem}`:", _code(head.ablations)]
    return "\n\n".join(blocks)


COMMAND = "python -m lowprec.tools.recipe_page"
TIMES = """ Those
below are of one machine, over an unquantised bf16 `nn.Linear`: forward and backward of {tokens} tokens, {inputs}
inputs, {outputs} outputs, with the backend that computed them."""
INTRO = """<!-- Generated by `{command}`. Change the YAML files or that program, not this page. -->

# Recipes

Every precision recipe that is shipped: what it computes, where it comes from, what it loses and what it costs. A recipe
is one file in [recipes/precision](../recipes/precision); `precision=<name>` chooses it. [adding.md](adding.md) says how
to write one, [numerics.md](numerics.md) what formats and roundings are to the bit.

This page is generated: equations from the parsed recipes, words from the head of each YAML file, costs counted from
the recipe's data, errors measured ({tokens} tokens, {inputs} inputs, {outputs} outputs, bf16 tensors, fp32 master
weights). To see the same for other tensors or for those of a run: `lowprec-numerics --help`.

**Errors.** Signal-to-noise ratio of the three products y = x wᵀ, dx = dy w and dw = dyᵀ x against fp64 products of the
same tensors, in dB (6 dB more is half the error), of the whole and of the median row: a token of y and dx, an output
of dw. One outlier token can hold nearly all of a product's energy and hide that the others are lost. Bias is the share
by which a product is too small on average; underflow the share of non-zero values that become zero and saturation the
share cut by the format's largest value, of the operand for which it is larger. Five kinds of tensors: {kinds}
(`tools/numerics_data.py`). Error of a product is not loss: read it as a check that a recipe does what it claims, and
where it breaks.

**Costs.** Counts: bits a value with its scales (operand a x operand b), how many quantised copies of x, w
and dy a step needs, how often a whole tensor is read for its maximum first, operations of rotations, bits of x that
wait for the backward under `save: codes` (`tools/numerics_cost.py`). `make bench` measures times where you are.{times}

In the equations `~` marks stochastic rounding, `eden` MS-EDEN, and H16 a Hadamard rotation of blocks of 16."""


def page(table: Mapping[str, Any]) -> str:
    """The whole page from the YAML files and the measured table.

    Raises:
        ValueError: for a precision file that does not load, has no proper head, or was not measured as it is now.
    """
    by_file = {stem: recipes_of(stem) for stem in shipped()}
    recipes = {name: recipe for found in by_file.values() for name, recipe in found.items()}
    for name, recipe in recipes.items():
        if table.get(name, {}).get("fingerprint") != fingerprint(recipe):
            raise ValueError(f"docs/recipes.json has no figures of {name} as it is now; run {COMMAND}")
    kinds = ", ".join(kind.replace("_", " ") for kind in KINDS)
    sizes, timed_sizes = (dict(zip(("tokens", "inputs", "outputs"), shape)) for shape in (SHAPE, TIMED_SHAPE))
    times = TIMES.format(**timed_sizes) if any("time" in entry for entry in table.values()) else ""
    blocks = [INTRO.format(command=COMMAND, kinds=kinds, times=times, **sizes)]
    blocks += ["## Errors of all recipes", "SQNR in dB, y / dx / dw.", error_overview({n: table[n] for n in recipes})]
    blocks += ["## Costs of all recipes", cost_overview(recipes, table)]
    blocks += [section(stem, {n: (r, table[n]) for n, r in found.items()}) for stem, found in by_file.items()]
    return "\n\n".join(blocks) + "\n"


def read_table(folder: Path = DOCS) -> dict[str, Any]:
    """docs/recipes.json, or nothing if it does not exist."""
    path = folder / "recipes.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_table(table: Mapping[str, Any], folder: Path = DOCS) -> None:
    """As JSON, one line a product."""
    text = json.dumps(table, indent=1, sort_keys=True)
    text = re.sub(r"\{([^{}]*)\}", lambda found: "{" + " ".join(found[1].split()) + "}", text)
    (folder / "recipes.json").write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with a sentence."""
    p = argparse.ArgumentParser("recipe_page", description="Write docs/recipes.md and docs/recipes.json.")
    p.add_argument("--all", action="store_true", help="measure all recipes anew, not only those that changed")
    p.add_argument("--time", action="store_true", help="measure all times anew")
    a = p.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on every machine
    try:
        if not DOCS.is_dir():
            raise ValueError("the page belongs to a checkout of the project; this is an installed copy")
        recipes = {name: recipe for stem in shipped() for name, recipe in recipes_of(stem).items()}
        known = read_table()
        table = measured(recipes, known, a.all)
        if a.time:
            torch.set_num_threads(threads)
            table = timed(table)
        write_table(table)
        (DOCS / "recipes.md").write_text(page(table), encoding="utf-8")
    except ValueError as error:
        print(f"recipe_page: {error}", file=sys.stderr)
        return 2
    print(f"written: docs/recipes.md, docs/recipes.json ({len(recipes)} recipes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
