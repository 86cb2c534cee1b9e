"""What quantisation does to one layer, in numbers: to the operands of its three products, and to the products.

Everything is measured against the same matrices in fp32, with the layer's recipe, random bits, memory and backend, so
it is what a training step computes; nothing is remembered. Names of the measures:

======================  ================================================================================================
``sqnr_db``             signal to quantisation noise, 10 log10 of ``sum(x^2) / sum((x - q)^2)``, dB; None if exact
``bias``                ``1 - <x, q> / <x, x>``: what averaging over tokens does not remove
``underflow_frac``      share of the nonzero elements that became zero (after the rotation of the contracted axis)
``saturation_frac``     share of the elements beyond the largest number of the grid under their scale (likewise)
``amax``                largest magnitude, before any rotation
``kurtosis``            fourth standardised moment: 3 for Gaussian data, large with outliers; None if constant
``max_over_mean``       amax / mean magnitude (the max-to-mean ratio of arXiv:2509.23500)
``scale_log2``          share of the block scales in each binade, ``{"-3": 0.25, ...}``; ``"zero"`` for scales of zero
``cosine``              of a product: between it and the exact one
======================  ================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Side
from lowprec.linear.call import TRANSPOSED, Call, operand_of, pad_to, padded_sizes
from lowprec.linear.operands import amax_of, outer, rounded, source, terms_of
from lowprec.linear.product import product
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm
from lowprec.linear.weight import CodedWeight
from lowprec.numerics import error

SIDES: tuple[Side, Side] = ("a", "b")
Measures = dict[str, Any]
"""JSON-able: numbers, None where a number has no meaning, and the histogram."""


def operand_measures(tensors: Mapping[str, Tensor], call: Call) -> dict[str, dict[str, Measures]]:
    """Of each quantised operand, by product and name: ``{"fprop": {"x": {"sqnr_db": ...}, ...}, ...}``.

    Args:
        tensors: x (T, K), w (N, K), dy (T, N) in the dtype the layer computes in. Where w has come as codes
            (:class:`~lowprec.linear.weight.CodedWeight`) there is nothing to compare with: its products are left out.
        call: recipe, random bits, backend and memory of the layer; nothing is observed.
    """
    found: dict[str, dict[str, Measures]] = {}
    for role in roles_of(tensors):
        for side in SIDES:
            name, operand = operand_of(role, side, call)
            if operand.format is not None:
                found.setdefault(role, {})[name] = _operand(role, side, tensors, call)
    return found


def roles_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The products whose operands are there, and not as codes."""
    there = {name for name, tensor in tensors.items() if not isinstance(tensor, CodedWeight)}
    return [role for role, names in GEMM_OPERANDS.items() if there.issuperset(names)]


def _operand(role: str, side: Side, tensors: Mapping[str, Tensor], call: Call) -> Measures:
    gemm: Gemm = getattr(call.recipe, role)
    x, _ = source(role, side, tensors, call)
    measures = spread_of(x)
    other, _ = source(role, "b" if side == "a" else "a", tensors, call)
    m, n, k = padded_sizes(gemm, *((len(x), len(other)) if side == "a" else (len(other), len(x))), x.shape[1], "zero")
    x = pad_to(x, m if side == "a" else n, k)
    x = outer(role, x, gemm.outer_a if side == "a" else gemm.outer_b, side, call)
    terms = terms_of(role, side, x, tensors, call)
    part, operand = terms.parts[0]
    assert operand.format is not None
    name = GEMM_OPERANDS[role][side == "b"]
    amax = amax_of(role, name, part, operand, gemm, call)
    q = oracle.prepare(part, operand, gemm.inner, call.stream, role, name, amax)
    turned = oracle.turned(part, gemm.inner, call.stream, role) if gemm.inner else part
    scale = (q.scales * q.tensor_scale.reshape(-1, 1)).abs()
    values = q.blockscaled() * q.tensor_scale.reshape(-1, 1)
    if len(terms.parts) == 1 and terms.thin is None:
        reference, total = turned.float(), values
    else:
        reference, total = terms.of.float(), rounded(role, side, terms, gemm, call, whole=True)
    of_element = scale.repeat_interleave(q.block, dim=1)[:, : part.shape[1]] * operand.format.element_type.max
    real = turned != 0  # zeros, padding among them, neither saturate nor vanish
    measures |= {
        "sqnr_db": _finite(error.sqnr_db(reference, total)),
        "bias": _finite(error.bias(reference, total)),
        "underflow_frac": error.underflow_frac(turned, q.values),
        "saturation_frac": ((turned.float().abs() > of_element) & real).sum().item() / max(int(real.sum()), 1),
        "scale_log2": binades(q.scales.abs()),
    }
    return measures


def spread_of(x: Tensor) -> Measures:
    """amax, kurtosis and max_over_mean of a tensor."""
    magnitude = x.float().abs()
    amax, mean = magnitude.max().item(), magnitude.mean().item()
    return {
        "amax": _finite(amax),
        "kurtosis": _finite(error.kurtosis(x)),
        "max_over_mean": _finite(amax / mean) if mean else None,
    }


def binades(scales: Tensor) -> dict[str, float]:
    """Share of the scales in each binade, by its exponent, in order."""
    positive = scales[scales > 0]
    exponents, counts = torch.frexp(positive)[1].sub(1).unique(return_counts=True)
    shares = {str(e): c / scales.numel() for e, c in zip(exponents.tolist(), counts.tolist())}
    zeros = int((scales == 0).sum())
    return ({"zero": zeros / scales.numel()} if zeros else {}) | shares


def exact_product(role: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """y (T, N), dx (T, K) or dw (N, K), fp32, from the tensors as they are."""
    a, b = (
        tensors[name].float().T if transposed else tensors[name].float()
        for name, transposed in zip(GEMM_OPERANDS[role], TRANSPOSED[role])
    )
    return a @ b.T


def product_measures(tensors: Mapping[str, Tensor], call: Call) -> dict[str, Measures]:
    """``{"fprop": {"sqnr_db", "bias", "cosine"}, ...}`` of each product that the recipe quantises."""
    found = {}
    for role in roles_of(tensors):
        if getattr(call.recipe, role).quantized:
            found[role] = compared(exact_product(role, tensors), product(role, tensors, call, torch.float32))
    return found


def compared(exact: Tensor, x: Tensor) -> Measures:
    """sqnr_db, bias and cosine of x against what it should be."""
    return {
        "sqnr_db": _finite(error.sqnr_db(exact, x)),
        "bias": _finite(error.bias(exact, x)),
        "cosine": cosine(exact, x),
    }


def cosine(a: Tensor, b: Tensor) -> float | None:
    """<a, b> / (|a| |b|) in fp64; None where one is zero or not finite."""
    a, b = a.double().flatten(), b.double().flatten()
    norm = (a.norm() * b.norm()).item()
    return _finite((a @ b).item() / norm) if norm else None


def decomposition(tensors: Mapping[str, Tensor], clean_x: Tensor, call: Call) -> Measures:
    """Where the error of a layer's output comes from (ABC, arXiv:2509.23500): R = A + B + C, shares of ``|y|^2``.

    ``y = x w^T`` is of the clean input x, ``y'`` the quantised product of the input x' as it arrived, with the errors
    of the layers before; ``p = x' w^T`` lies between them::

        R = |y' - y|^2    A = |p - y|^2  propagated    B = |y' - p|^2  new in this layer    C = 2 <p - y, y' - p>

    ``gain`` = A / (|x' - x|^2 / |x|^2) is how the layer passes on the error of its input. B is taken at x' and not at
    x, so that the sum is exact.

    Args:
        tensors: x' (T, K) and w (N, K), as they were in the quantised pass.
        clean_x: x (T, K), of the pass in high precision.
        call: as for :func:`operand_measures`.
    """
    w = tensors["w"].float()
    x, arrived = clean_x.float(), tensors["x"].float()
    clean, passed = x @ w.T, arrived @ w.T
    y = product("fprop", tensors, call, torch.float32)
    norm = clean.double().square().sum().item()
    a, b = (passed - clean).double(), (y - passed).double()
    if not norm or not math.isfinite(norm):
        return {"R": None, "A": None, "B": None, "C": None, "gain": None}
    shares = {
        "R": (a + b).square().sum().item() / norm,
        "A": a.square().sum().item() / norm,
        "B": b.square().sum().item() / norm,
        "C": 2 * (a * b).sum().item() / norm,
    }
    before = error.relative_error(x, arrived)
    shares["gain"] = shares["A"] / before if before else math.nan
    return {key: _finite(value) for key, value in shares.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
