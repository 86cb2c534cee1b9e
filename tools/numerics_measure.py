"""How far a recipe's three products are from exact ones, and what each operand loses.

The layer is trained for one step as a user would: an ``nn.Linear`` under a :class:`Plan`, forward and backward through
autograd. ``y``, ``dx`` and ``dw`` are compared with fp64 products of the same tensors, so everything a recipe does
counts: rotations, splits, re-quantised forward values, rounding to the output's dtype::

    SQNR = 10 log10(sum exact^2 / sum (exact - got)^2) dB          bias = 1 - <exact, got> / <exact, exact>

A bias of 0.01 means that the product is 1 % too small on average: noise averages out over steps, a bias does not. The
ratio of the median row (a token of y and dx, an output of dw) stands beside that of the whole, because one outlier
token can hold nearly all of a product's energy and hide that the others are lost.

Each operand is then looked at alone, in the space in which it is quantised (rotated; its main part if it is split):
how much it loses, which share of its non-zero values becomes zero (underflow), and which share stands beyond the
largest value of its block (saturation).

A recipe that remembers (delayed maxima, moving averages, collected channels) first sees other draws of the same layer,
for as many steps as it takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.linear import BF16, Call, LinearRecipe, Policy, QuantizedLinear, load_precision, operands, oracle
from lowprec.linear.backends import Side
from lowprec.linear.call import pad_to, padded_sizes
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand
from lowprec.linear.state import end_step
from lowprec.numerics import sqnr_db
from lowprec.numerics.error import bias, kurtosis, saturation_frac, underflow_frac
from lowprec.tools.numerics_cost import cost, products_of
from lowprec.tools.numerics_data import Tensors

WARM_STEPS = 4
ROUNDING = 2.0**-21  # of a division in fp32: the largest value of a block is not beyond itself


@dataclass(frozen=True)
class OperandRow:
    """What one operand of a product loses when it is quantised. All zero (SQNR infinite) where it is not."""

    name: str
    text: str
    bits: float
    sqnr_db: float
    bias: float
    underflow_frac: float
    saturation_frac: float
    kurtosis: float


@dataclass(frozen=True)
class Row:
    """One product of one recipe on one kind of data."""

    recipe: str
    data: str
    gemm: str
    sqnr_db: float
    row_sqnr_db: float
    bias: float
    operands: tuple[OperandRow, OperandRow]


def recipes_of(source: str | Path) -> dict[str, LinearRecipe]:
    """The linear recipes of a precision file, by the name they have in tables: the file's, or ``file:recipe``.

    Raises:
        ValueError: if the file cannot be read, in one sentence that begins with its name.
    """
    stem = Path(source).stem
    try:
        linear = load_precision(source).linear
    except ValueError as error:
        raise ValueError(f"recipe {stem}: {error}") from error
    named = {name: recipe for name, recipe in linear.items() if name != "bf16"}
    if not named:
        return {stem: BF16}
    alone = len(named) == 1
    return {stem if alone or name == stem else f"{stem}:{name}": recipe for name, recipe in named.items()}


def exact_products(t: Tensors) -> dict[str, Tensor]:
    """fp64 y (T, N), dx (T, K) and dw (N, K) of the very tensors the layer gets."""
    x, w, dy = t.x_TK.double(), t.w_NK.double(), t.dy_TN.double()
    return {"fprop": x @ w.T, "dgrad": dy @ w, "wgrad": dy.T @ x}


def median_row_db(exact: Tensor, got: Tensor) -> float:
    """Signal-to-noise ratio of the median row, dB; inf if most rows are equal."""
    noise = (exact - got.double()).square().sum(dim=1)
    ratio = torch.where(noise == 0, torch.inf, exact.square().sum(dim=1) / noise)
    return float(10 * ratio.median().log10())


def layer_of(recipe: LinearRecipe, t: Tensors, backend: str) -> QuantizedLinear:
    """A quantised layer with fp32 masters of these weights."""
    outputs, inputs = t.w_NK.shape
    device = t.w_NK.device
    layer = QuantizedLinear(inputs, outputs, bias=False, device=device, recipe=recipe, policy=Policy(backend))
    layer.weight.data.copy_(t.w_NK)
    return layer


def step(layer: QuantizedLinear, t: Tensors) -> dict[str, Tensor]:
    """One forward and backward pass: y, dx, dw by the name of the product."""
    x_TK = t.x_TK.detach().clone().requires_grad_()
    layer.weight.grad = None
    y_TN = layer(x_TK)
    y_TN.backward(t.dy_TN)
    assert x_TK.grad is not None and layer.weight.grad is not None
    return {"fprop": y_TN.detach(), "dgrad": x_TK.grad, "wgrad": layer.weight.grad}


def warm(layer: QuantizedLinear, draw: Callable[[int], Tensors]) -> None:
    """Give a layer that remembers the past it needs: WARM_STEPS other draws, and the end of what it collects."""
    spans = [memory.span for memory in layer.state.memories.values() if memory.kind == "total"]
    start = min((first for first, _ in spans), default=0)
    for index in range(start, start + WARM_STEPS):
        layer.clock.step = index
        step(layer, draw(index + 1))
        end_step({"linear": layer.state}, index)
    layer.clock.step = max([start + WARM_STEPS, *(last for _, last in spans)])


@dataclass(frozen=True)
class Seen:
    """One operand of a product, all (rows, k) fp32 in the space in which it is quantised: rotated and padded.

    Attributes:
        exact, rounded: the operand, and what enters the product in its place.
        part, codes: its main part (all of it without a split), and the values and scales that this becomes.
    """

    exact: Tensor
    rounded: Tensor
    part: Tensor
    codes: oracle.Prepared


def seen(layer: QuantizedLinear, t: Tensors, role: str, side: Side) -> Seen:
    """Follow one operand through the first steps of :mod:`lowprec.linear.product`."""
    call = Call(layer.recipe, layer.clock.stream(layer.layer), layer.policy, layer.state)
    gemm: Gemm = getattr(layer.recipe, role)
    name, operand = GEMM_OPERANDS[role][side == "b"], getattr(gemm, side)
    tensors = {"x": t.x_TK, "w": t.w_NK, "dy": t.dy_TN}
    (tokens, inputs), outputs = t.x_TK.shape, t.w_NK.shape[0]
    m, n, k = products_of((tokens, inputs, outputs))[role]
    sizes = padded_sizes(gemm, m, n, k, layer.policy.pad)

    def placed(x: Tensor) -> Tensor:
        padded = pad_to(x, sizes[side == "b"], sizes[2])
        return operands.outer(role, padded, gemm.outer_b if side == "b" else gemm.outer_a, side, call)

    def rotated(x: Tensor) -> Tensor:
        return (oracle.turned(x, gemm.inner, call.stream, role) if gemm.inner else x).float()

    value, factor = operands.source(role, side, tensors, call)
    exact = value
    if operand.source == "fprop":  # the same without its rounding, in the forward's rotated space if there is one
        unrounded: Any = dataclasses.replace(gemm, **{side: Operand(reuse=True)})  # type: ignore[arg-type]
        plain = dataclasses.replace(call, recipe=dataclasses.replace(layer.recipe, **{role: unrounded}))
        exact = operands.source(role, side, tensors, plain)[0]
    terms = operands.terms_of(role, side, placed(value), tensors, call)
    main = terms.parts[0]
    amax = operands.amax_of(role, name, main[0], main[1], gemm, call)
    rounded, codes = torch.zeros(terms.of.shape, device=value.device), None
    for part, treatment in terms.parts:
        q = oracle.prepare(part, treatment, gemm.inner, call.stream, role, name, amax if part is main[0] else None)
        rounded += q.blockscaled() * q.tensor_scale.reshape(-1, 1)
        codes = codes or q
    if terms.thin is not None:
        rounded += rotated(terms.thin.u @ terms.thin.v.T)
    assert codes is not None
    return Seen(rotated(placed(exact)), rounded if factor is None else rounded * factor, rotated(main[0]), codes)


def operand_row(layer: QuantizedLinear, t: Tensors, role: str, side: Side, bits: float) -> OperandRow:
    """What one operand loses."""
    name, operand = GEMM_OPERANDS[role][side == "b"], getattr(getattr(layer.recipe, role), side)
    s = seen(layer, t, role, side)
    scales = (s.codes.scales * s.codes.tensor_scale.reshape(-1, 1)).repeat_interleave(s.codes.block, dim=1)
    scales = scales[:, : s.part.shape[1]]
    top = operand.format.element_type.max if operand.format else math.inf
    return OperandRow(
        name=name,
        text=str(operand),
        bits=bits,
        sqnr_db=sqnr_db(s.exact, s.rounded),
        bias=bias(s.exact, s.rounded),
        underflow_frac=underflow_frac(s.part, s.codes.values * scales),
        saturation_frac=saturation_frac(s.part / scales, top * (1 + ROUNDING)),
        kurtosis=kurtosis(s.part),
    )


def measure(
    name: str, recipe: LinearRecipe, source: str, draw: Callable[[int], Tensors], backend: str = "auto"
) -> Iterator[Row]:
    """The three products of a recipe on tensors ``draw(0)``; ``draw(1)``, ... are the past that some recipes need.

    Args:
        name, source: what the rows call the recipe and the data.
        draw: tensors of the layer at a step.
        backend: who computes the products.
    """
    t = draw(0)
    layer = layer_of(recipe, t, backend)
    if recipe.remembers:
        warm(layer, draw)
    got, exact = step(layer, t), exact_products(t)
    costs = cost(recipe)
    for role, (name_a, name_b) in GEMM_OPERANDS.items():
        a = operand_row(layer, t, role, "a", costs.bits[f"{role}.{name_a}"])
        b = operand_row(layer, t, role, "b", costs.bits[f"{role}.{name_b}"])
        e, g = exact[role], got[role]
        yield Row(name, source, role, sqnr_db(e, g), median_row_db(e, g), bias(e, g), (a, b))
