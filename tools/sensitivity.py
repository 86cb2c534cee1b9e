"""sensitivity: which layers suffer most from a precision recipe, and the rules that keep those in high precision.

    lowprec-sensitivity runs/nvfp4                                       # the run's recipe, at its newest checkpoint
    lowprec-sensitivity runs/bf16 --precision nvfp4 --keep 15 --by hessian
    python tools/sensitivity.py --recipe nvfp4_tiny --json               # initial weights, no run needed

For every layer (worst first) the relative squared error of its three products, the Fisher-weighted error of its weight
and HAWQ's Tr(H)/n ||w - Q(w)||^2 with the standard error of the trace (`sensitivity_measures` has the equations). Each
is measured with this layer alone quantised; the rest of the model is not. These measures disagree, on published models
too: the table of their rank correlations (Spearman) says how much here. `--by rank`, the default, orders by the mean of
three ranks: that of the products (itself the mean of its three), Fisher's and the Hessian's.

The rules keep the fewest worst layers that hold at least `--keep` percent of the judged parameters, as
`{last:15%}` rounds up to whole blocks. Layers that `--match` leaves out stay in bf16. Paste the rules over those of a
precision file: `default` is that file's first recipe.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch

from lowprec.linear import LinearRecipe, Policy, Precision, load_precision
from lowprec.tools.capture import Loaded, add_source, open_source
from lowprec.tools.sensitivity_measures import (
    fisher,
    hessian_traces,
    output_errors,
    unquantised_losses,
    weight_error,
)

METRICS = ("fprop", "dgrad", "wgrad", "fisher", "hessian")


@dataclass(frozen=True)
class Row:
    """One layer. Larger is worse in all of METRICS; `trace` and its standard error are those of the Hessian."""

    layer: str
    parameters: int
    fprop: float
    dgrad: float
    wgrad: float
    fisher: float
    hessian: float
    trace: float
    trace_error: float


def judged_recipe(precision: Precision) -> LinearRecipe:
    """What rules call `default`: the file's first recipe. Raises ValueError if it has none."""
    recipe = next((recipe for name, recipe in precision.linear.items() if name != "bf16"), None)
    if recipe is None:
        raise ValueError(
            "this precision quantises nothing, so there is nothing to judge: give --precision, as in nvfp4"
        )
    return recipe


def measure(
    loaded: Loaded,
    precision: Precision,
    match: str = "layers.*",
    batches: int = 4,
    probes: int = 4,
    tokens: int = 2048,
) -> list[Row]:
    """Every matching layer under the precision's default recipe, in the order of the model.

    batches: micro-batches for Fisher and Hessian. probes: products with each block of the Hessian. tokens: rows of the
    captured activations and gradients. Raises ValueError if the precision has no recipe or no layer matches.
    """
    recipe, policy = judged_recipe(precision), Policy(precision.backend, precision.pad)
    seed, dtype = loaded.run.seed, loaded.model.dtype
    weights = {name: layer.weight for name, layer in loaded.layers(match).items()}
    captured = loaded.capture(match, tokens, high_precision=True)
    with unquantised_losses(loaded, batches) as losses:
        squares = fisher(losses, weights)
        traces = hessian_traces(losses, weights, probes, seed)
    rows = []
    for name, weight in weights.items():
        square_NK = weight_error(weight.detach().to(dtype), recipe, name, policy, seed).square()
        trace, trace_error = traces[name]
        rows.append(
            Row(
                name,
                weight.numel(),
                **output_errors(captured[name], recipe, name, policy, seed),
                fisher=float((squares[name] * square_NK).double().sum()),
                hessian=trace / weight.numel() * float(square_NK.double().sum()),
                trace=trace,
                trace_error=trace_error,
            )
        )
    return rows


# ---- ranks


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the largest; equal values share the mean of their ranks."""
    return [sum(o > v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of the ranks of two lists; None if all of one are equal."""
    pairs = [[rank - (len(ranked) + 1) / 2 for rank in ranked] for ranked in (ranks(a), ranks(b))]
    norm = math.sqrt(sum(x * x for x in pairs[0]) * sum(y * y for y in pairs[1]))
    return sum(x * y for x, y in zip(*pairs)) / norm if norm else None


def order(rows: list[Row], by: str) -> list[Row]:
    """Worst first by one of METRICS, or by the mean of their ranks (`rank`); ties in the order of the model."""
    return [row for _, row in sorted(zip(scores(rows, by), rows), key=lambda pair: pair[0])]


def scores(rows: list[Row], by: str) -> list[float]:
    """Each row's rank by a metric; for `rank` the mean of three: of its products (their mean), Fisher and Hessian."""
    columns = {metric: ranks([getattr(row, metric) for row in rows]) for metric in METRICS}
    if by != "rank":
        return columns[by]
    return [((f + d + w) / 3 + fisher + hessian) / 3 for f, d, w, fisher, hessian in zip(*columns.values())]


def disagreement(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation between all metrics: 1 where two order the layers alike."""
    columns = {metric: [getattr(row, metric) for row in rows] for metric in METRICS}
    return {a: {b: spearman(columns[a], columns[b]) for b in METRICS} for a in METRICS}


# ---- rules


def worst(rows: list[Row], keep_percent: float) -> list[Row]:
    """The fewest of the ordered rows, from the first, that hold at least this share of all their parameters."""
    wanted, held, kept = sum(row.parameters for row in rows) * keep_percent / 100, 0, []
    for row in rows:
        if held >= wanted:
            break
        kept.append(row)
        held += row.parameters
    return kept


def rules(kept: list[Row], rows: list[Row], match: str, layers: Sequence[str]) -> list[dict[str, str]]:
    """Rules of a precision file: `kept` and whatever was not judged in bf16, the other rows in the default recipe.

    A rule that decides no layer is refused by the plan, so none is made.
    """
    made = [{"match": row.layer, "recipe": "bf16"} for row in kept]
    if len(kept) < len(rows):
        made.append({"match": match, "recipe": "default"})
    if len(rows) < len(layers):
        made.append({"match": "*", "recipe": "bf16"})
    return made


def rules_text(made: list[dict[str, str]]) -> str:
    """The rules as YAML, one a line."""
    return "\n".join(["rules:", *(f'  - {{match: "{rule["match"]}", recipe: {rule["recipe"]}}}' for rule in made)])


# ---- output


def aligned(cells: list[list[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in cells
    )


def table(rows: list[Row], score: list[float]) -> str:
    """The ordered rows."""
    head = ["layer", "parameters", "fprop", "dgrad", "wgrad", "fisher", "hessian", "trace", "+-", "rank"]
    cells = [
        [
            row.layer,
            str(row.parameters),
            *(f"{getattr(row, metric):.2e}" for metric in METRICS),
            *(f"{row.trace:.3g}", f"{row.trace_error:.2g}", f"{value:.1f}"),
        ]
        for row, value in zip(rows, score)
    ]
    return aligned([head, *cells])


def correlations(rows: list[Row]) -> str:
    """The Spearman table."""
    cells = [
        [a, *("-" if value is None else f"{value:+.2f}" for value in line.values())]
        for a, line in disagreement(rows).items()
    ]
    return aligned([["spearman", *METRICS], *cells])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("lowprec-sensitivity", description="Rank layers by what a precision recipe costs them.")
    add_source(p)
    p.add_argument("--precision", metavar="NAME", help="recipe to judge: shipped, or a YAML file (default: the run's)")
    p.add_argument("--match", default="layers.*", help="layers to judge, as in a rule (default: %(default)s)")
    p.add_argument("--keep", type=float, default=15, metavar="PERCENT", help="of parameters (default: %(default)s)")
    p.add_argument("--by", choices=("rank", *METRICS), default="rank", help="orders the layers (default: %(default)s)")
    p.add_argument("--batches", type=int, default=4, help="micro-batches of Fisher, Hessian (default: %(default)s)")
    p.add_argument(
        "--probes", type=int, default=4, help="products with each block of the Hessian (default: %(default)s)"
    )
    p.add_argument("--tokens", type=int, default=2048, help="rows of activations, at most (default: %(default)s)")
    p.add_argument("--threads", type=int, help="threads of torch (default: torch's own number)")
    p.add_argument("--json", action="store_true", help="print a JSON object instead of tables")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 2 for bad arguments."""
    p = parser()
    options = p.parse_args(argv)
    if min(options.batches, options.probes - 1, options.tokens) < 1 or not 0 <= options.keep <= 100:
        p.error("--batches and --tokens must be at least 1, --probes at least 2, --keep between 0 and 100")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        precision = load_precision(options.precision) if options.precision else None
        loaded = open_source(options)
        precision = precision or load_precision(loaded.run.precision)
        rows = measure(loaded, precision, options.match, options.batches, options.probes, options.tokens)
    except ValueError as error:
        print(f"lowprec-sensitivity: {error}", file=sys.stderr)
        return 2
    rows = order(rows, options.by)
    kept = worst(rows, options.keep)
    made = rules(kept, rows, options.match, list(loaded.plan.layers))
    share = 100 * sum(row.parameters for row in kept) / sum(row.parameters for row in rows)
    if options.json:
        about = {"recipe": judged_recipe(precision).name, "step": loaded.step, "by": options.by, "kept_percent": share}
        measured = [asdict(row) | {"rank": score} for row, score in zip(rows, scores(rows, "rank"))]
        print(json.dumps(about | {"layers": measured, "spearman": disagreement(rows), "rules": made}, indent=2))
        return 0
    print(
        f"{judged_recipe(precision).name} on {loaded.run.name} after {loaded.step} steps, worst first by {options.by}\n"
    )
    print(table(rows, scores(rows, "rank")), correlations(rows), sep="\n\n")
    print(f"\n# {len(kept)} of {len(rows)} layers, {share:.1f} % of their parameters, stay in bf16")
    print(rules_text(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
