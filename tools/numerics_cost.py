"""What a recipe costs, counted from its data: bits, passes, rotations, memory, share of products in few bits.

One training step of a linear layer makes three products of 2 T K N operations (T tokens, K inputs, N outputs). Around
them a recipe quantises each tensor once for every form in which it is needed:

* **bits a value**: element + scale bits / values under a scale (+ a second scale's share); with a split, the parts'.
* **copies**: different quantised forms of x, w and dy. A 1 x B block serves one contracted axis, so a tensor that is
  contracted along both axes needs two; a square block rounded to nearest, and ``reuse``, need one.
* **roundings**: a format with two candidates per block (4-over-6, IF4) rounds each copy twice.
* **amax passes**: reads of a whole tensor before its first code can be written, because one scale spans it. A maximum
  remembered from earlier steps costs none; the same (unrotated) tensor is read once for all its copies. The maximum of
  a block or a row is taken from values that are in registers or cache already and is not counted.
* **rotations**: a Hadamard block of n costs log2(n) additions and one multiplication a value. ``inner`` turns both
  operands; ``outer`` turns one and the output; a rotated forward operand met again in a backward product turns its
  output back along the inputs.
* **extra products**: what splits add (low rank r: r/m + r/k + 2r/n of a product; a residual: its share of channels).
* **low share**: products with both operands quantised to elements of at most 8 (4) bits. Over a model it weighs layers
  by their size and follows the rules and the schedule of the precision file.
* **saved**: bits a value of x that wait for the backward.

What this is not: time. Counts say what hardware must do at least; ``make bench`` measures what it takes here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from lowprec.linear import Plan, Precision
from lowprec.linear.product import keep_refusal
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.linear.split import ChannelSplit, LowRankSplit, ResidualSplit
from lowprec.model import ModelConfig, build
from lowprec.numerics import Format
from lowprec.numerics.scale import SCALE_BITS

SHAPE = (8192, 4096, 4096)  # tokens, in, out: what whole-axis scales and rotations are counted for
MODEL = Path(__file__).resolve().parent.parent / "recipes" / "model" / "llama_130m.yaml"


@dataclass(frozen=True)
class Cost:
    """Costs of one recipe, for one layer and step.

    Attributes:
        bits: bits a value of each quantised operand, by ``"fprop.x"`` and so on; 16 where it is not quantised.
        copies, roundings, amax_passes: by tensor, ``"x"``, ``"w"``, ``"dy"``.
        hadamard_frac: operations of all rotations over those of the three products.
        extra_gemm_frac: operations of additional products over those of the three.
        low8_frac, low4_frac: share of the three products in elements of at most 8, 4 bits.
        saved_bits: bits a value of x kept for the backward if it keeps its inputs (16). saved_codes_bits: if codes.
    """

    bits: dict[str, float]
    copies: dict[str, int]
    roundings: dict[str, int]
    amax_passes: dict[str, int]
    hadamard_frac: float
    extra_gemm_frac: float
    low8_frac: float
    low4_frac: float
    saved_bits: float
    saved_codes_bits: float


def operands(recipe: LinearRecipe) -> Iterator[tuple[str, str, Gemm, Operand]]:
    """(role, operand name, product, operand) of all six."""
    for role, names in GEMM_OPERANDS.items():
        gemm: Gemm = getattr(recipe, role)
        yield role, names[0], gemm, gemm.a
        yield role, names[1], gemm, gemm.b


def format_bits(format: Format, rows: int, k: int) -> float:
    """Bits a value of a matrix (rows, k) in this format, scales included."""
    free, contracted = format.block[0] or rows, format.block[1] or k
    second = {False: 0.0, True: 32 / (rows * k), "row": 32 / k}.get(format.tensor_scale)
    second = 32 / int(format.tensor_scale) if second is None else second
    return format.bits + SCALE_BITS[format.scale] / (free * contracted) + second


def operand_bits(operand: Operand, rows: int, k: int) -> float:
    """Bits a value of an operand (rows, k), its split's parts included; 16 if it is not quantised."""
    if operand.format is None:
        return 16.0
    bits, split = format_bits(operand.format, rows, k), operand.split
    if isinstance(split, ChannelSplit):
        return (1 - split.top) * bits + split.top * format_bits(split.format, rows, k)
    if isinstance(split, ResidualSplit):
        return bits + split.top * format_bits(split.format, rows, k)
    if isinstance(split, LowRankSplit):
        return bits + split.rank * (1 / rows + 1 / k) * (bits if split.term == "quantized" else 16)
    return bits


def products_of(shape: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """(m, n, k) of the three products."""
    tokens, inputs, outputs = shape
    return {
        "fprop": (tokens, outputs, inputs),
        "dgrad": (tokens, inputs, outputs),
        "wgrad": (outputs, inputs, tokens),
    }


def _copies(recipe: LinearRecipe) -> dict[str, dict[object, Format]]:
    """The different quantised forms of each tensor."""
    forms: dict[str, dict[object, Format]] = {"x": {}, "w": {}, "dy": {}}
    for role, name, gemm, operand in operands(recipe):
        f = operand.format
        if f is None or operand.reuse:
            continue
        turned = gemm.inner or (gemm.outer_a if operand is gemm.a else gemm.outer_b)
        any_axis = f.block[0] == f.block[1] and f.tensor_scale in (True, False) and operand.rounding == "nearest"
        forms[name][(operand, turned, "" if any_axis and not turned else role)] = f
    return forms


def _amax_passes(recipe: LinearRecipe) -> dict[str, int]:
    """Whole-tensor reads before quantising, by tensor."""
    reads: dict[str, set[object]] = {"x": set(), "w": set(), "dy": set()}
    for role, name, gemm, operand in operands(recipe):
        f = operand.format
        if f is None or operand.reuse or operand.amax != "current" or f.scale == "none":
            continue
        if f.tensor_scale is True or f.block == (0, 0):
            turned = gemm.inner or (gemm.outer_a if operand is gemm.a else gemm.outer_b)
            reads[name].add((operand.source, operand.split, turned, role if turned else ""))
    return {name: len(found) for name, found in reads.items()}


def hadamard_flops(recipe: LinearRecipe, shape: tuple[int, int, int] = SHAPE) -> float:
    """Operations of all rotations of one step."""

    def turn(rotation: Rotation | None, values: int, axis: int) -> float:
        return values * rotation.rounds * (math.log2(rotation.size or axis) + 1) if rotation else 0.0

    total = 0.0
    for role, (m, n, k) in products_of(shape).items():
        gemm: Gemm = getattr(recipe, role)
        total += turn(gemm.inner, m * k + n * k, k)
        total += turn(gemm.outer_a, m * k + m * n, m) + turn(gemm.outer_b, n * k + m * n, n)
        if role != "fprop" and (gemm.b.reuse or gemm.b.source == "fprop"):
            total += turn(recipe.fprop.inner, m * n, n)  # x and w, rotated along the inputs: the output's last axis
    return total


def _extra(recipe: LinearRecipe) -> float:
    """Operations of what splits add, over those of the three products."""
    total = 0.0
    for role, (m, n, k) in products_of(SHAPE).items():
        gemm: Gemm = getattr(recipe, role)
        for operand, rows, columns in ((gemm.a, m, n), (gemm.b, n, m)):
            if isinstance(operand.split, LowRankSplit):
                r = operand.split.rank
                total += r / rows + r / k + 2 * r / columns
            elif isinstance(operand.split, ResidualSplit):
                total += operand.split.top
    return total / 3


def _low(gemm: Gemm, bits: int) -> bool:
    """Whether the product takes two quantised operands of at most so many bits an element."""
    return all(o.format is not None and o.format.bits <= bits for o in (gemm.a, gemm.b))


def low_frac(recipe: LinearRecipe, bits: int) -> float:
    """Share of the three products with both operands in elements of at most ``bits`` bits."""
    return sum(_low(getattr(recipe, role), bits) for role in GEMM_OPERANDS) / 3


def model_low_frac(precision: Precision, bits: int) -> float:
    """The same over all linear layers of a 126M Llama and over the whole training: rules and schedule applied."""
    with torch.device("meta"):
        model = build(ModelConfig(**yaml.safe_load(MODEL.read_text())))
    entries = Plan.of(model, precision).entries
    total = sum(e.in_features * e.out_features for e in entries)
    times = sorted({0.0, 1.0, *(change.start for change in precision.schedule)})
    share = 0.0
    for start, end in itertools.pairwise(times):
        now = precision.at(start)
        low = sum(e.in_features * e.out_features * low_frac(now[e.recipe], bits) for e in entries)
        share += (end - start) * low / total
    return share


def _saved_bits(recipe: LinearRecipe, shape: tuple[int, int, int]) -> float:
    """Bits a value of x that the backward keeps under ``save: codes``: wgrad's x, where that can stand in for x."""
    tokens, inputs, _ = shape
    return 16.0 if keep_refusal(recipe) else operand_bits(recipe.wgrad.b, inputs, tokens)


def cost(recipe: LinearRecipe, shape: tuple[int, int, int] = SHAPE) -> Cost:
    """Count what a recipe costs for one layer of this shape (tokens, in, out)."""
    tokens, inputs, outputs = shape
    sizes = {"x": tokens * inputs, "w": outputs * inputs, "dy": tokens * outputs}
    bits = {}
    for role, name, _, operand in operands(recipe):
        k = products_of(shape)[role][2]
        bits[f"{role}.{name}"] = operand_bits(operand, sizes[name] // k, k)
    forms = _copies(recipe)
    return Cost(
        bits=bits,
        copies={name: len(found) for name, found in forms.items()},
        roundings={
            name: sum(max(1, len(f.targets)) * (2 if f.second else 1) for f in found.values())
            for name, found in forms.items()
        },
        amax_passes=_amax_passes(recipe),
        hadamard_frac=hadamard_flops(recipe, shape) / (6 * math.prod(shape)),
        extra_gemm_frac=_extra(recipe),
        low8_frac=low_frac(recipe, 8),
        low4_frac=low_frac(recipe, 4),
        saved_bits=16.0,
        saved_codes_bits=_saved_bits(recipe, shape),
    )
