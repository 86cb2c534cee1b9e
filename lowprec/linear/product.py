"""One of a layer's three products, whole: from the layer's tensors to the output, as its recipe says.

Backends multiply two matrices that they have quantised (:mod:`lowprec.linear.backends`). What a recipe may want around
that happens here, in this order:

1. *source*: an operand is the tensor itself, or the value it had in the forward product;
2. *padding* to whole blocks, or a refusal by name;
3. *outer rotation* of a free axis;
4. *split* into parts (:mod:`lowprec.linear.split`);
5. *amax* from the layer's memory, where a recipe delays or holds it (:mod:`lowprec.linear.state`);
6. prepare and multiply, once for every pair of parts, and add the thin terms;
7. turn the output back: the outer rotation, and the forward's rotation if an operand came from the forward; apply the
   gradient mask of that operand; cut the padding off.

A forward value keeps its tensor scale outside, as a factor of the output: values * block scales of FP4 are exact in
bf16, so quantising them again starts from exactly what the forward multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Backend, Packed
from lowprec.linear.call import Call, Policy, Shared, operand_of, pad_to, padded_sizes, turned
from lowprec.linear.operands import (
    Terms,
    chosen_backend,
    outer,
    pad_forward,
    prepare,
    prepare_part,
    rounded,
    shared_amax,
    source,
    terms_of,
)
from lowprec.linear.recipe import Gemm, LinearRecipe, Operand
from lowprec.linear.split import ChannelSplit
from lowprec.numerics import Stream


def product(
    role: str, tensors: Mapping[str, Tensor], call: Call, out_dtype: torch.dtype, kept: Kept | None = None
) -> Tensor:
    """One product of the layer.

    Args:
        role: ``fprop``, ``dgrad`` or ``wgrad``.
        tensors: the layer's matrices by name: x (T, K), w (N, K) in x's dtype, dy (T, N); the two that the role needs.
        call: recipe, random bits and memory of the layer.
        out_dtype: dtype of the result.
        kept: the operand b, prepared earlier by :func:`keep` (``tensors`` then need not hold it).

    Returns:
        y (T, N), dx (T, K) or dw (N, K).

    Raises:
        ValueError: under ``pad: refuse``, for sizes that no block divides.
    """
    gemm: Gemm = getattr(call.recipe, role)
    a, factor_a = source(role, "a", tensors, call)
    if kept is None:
        b, factor_b = source(role, "b", tensors, call)
        rows_b = b.shape[0]
        sizes = _sizes(role, a.shape[0], rows_b, a.shape[1], call)
    else:
        b, factor_b, rows_b, sizes = None, kept.factor, kept.rows, kept.sizes
    rows_a = a.shape[0]
    a = outer(role, pad_to(a, sizes[0], sizes[2]), gemm.outer_a, "a", call)
    left = terms_of(role, "a", a, tensors, call)
    if b is not None:
        b = outer(role, pad_to(b, sizes[1], sizes[2]), gemm.outer_b, "b", call)
        right: Terms | Kept = terms_of(role, "b", b, tensors, call)
    else:
        assert kept is not None
        right = kept
    out = _multiply(role, left, right, sizes, call, out_dtype, _both(factor_a, factor_b))
    if gemm.outer_a:
        out = turned(out.T, gemm.outer_a, call, f"{role}.a", inverse=True).T
    if gemm.outer_b:
        out = turned(out, gemm.outer_b, call, f"{role}.b", inverse=True)
    if role != "fprop":
        out = _back_to_inputs(role, out, tensors, call)
    return out if out.shape == (rows_a, rows_b) else out[:rows_a, :rows_b]


@dataclass(frozen=True)
class Kept:
    """Operand b of a product, prepared ahead: what ``save: codes`` keeps instead of x."""

    prepared: Packed
    backend: Backend
    factor: Tensor | None
    rows: int
    sizes: tuple[int, int, int]


def keep(x_TK: Tensor, out_features: int, call: Call) -> Kept | None:
    """Operand x of wgrad, prepared in the forward: its codes are kept for the backward, x need not be.

    None where the recipe or the backend gains nothing: codes that need x beside them, or take as much memory as x.
    """
    if keep_refusal(call.recipe):
        return None
    gemm = call.recipe.wgrad
    b, factor = source("wgrad", "b", {"x": x_TK}, call)
    sizes = _sizes("wgrad", out_features, b.shape[0], x_TK.shape[0], call)
    b = outer("wgrad", pad_to(b, sizes[1], sizes[2]), gemm.outer_b, "b", call)
    chosen = chosen_backend("wgrad", gemm, sizes, b, call)
    prepared = chosen.stored(prepare("wgrad", "b", b, gemm, chosen, call), gemm, "b")
    small = prepared.nbytes < x_TK.numel() * x_TK.element_size()
    return Kept(prepared, chosen, factor, x_TK.shape[1], sizes) if small else None


def keep_refusal(recipe: LinearRecipe) -> str | None:
    """Why the codes of x cannot stand in for x in the backward, or None."""
    if recipe.wgrad.b.format is None:
        return "wgrad takes x unquantised"
    if recipe.wgrad.a.split or recipe.wgrad.b.split:
        return "a split of wgrad needs x itself"
    if isinstance(recipe.dgrad.b.split or (recipe.dgrad.b.source == "fprop" and recipe.fprop.b.split), ChannelSplit):
        return "the weight's channels follow x in dgrad"
    if recipe.fprop.a.gradient != "ste":
        return f"the {recipe.fprop.a.gradient} gradient of x needs x itself"
    if recipe.wgrad.b.amax != "current":
        return f"amax: {recipe.wgrad.b.amax} of x in wgrad is read in the backward"
    return None


def kept_bytes_per_token(
    recipe: LinearRecipe,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    policy: Policy,
    device: torch.device | None = None,
) -> float:
    """What a layer keeps of x for the backward, as the chosen backend stores it; found by preparing 128 tokens.

    ``device``: where it trains; None: on the GPU if this machine has one.
    """
    inputs = in_features * dtype.itemsize
    if policy.save == "inputs" or not recipe.quantized:
        return inputs
    call = Call(recipe, Stream(), dataclasses.replace(policy, shared=Shared()))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = keep(torch.zeros(128, in_features, dtype=dtype, device=device), out_features, call)
    return inputs if kept is None else kept.prepared.nbytes / 128


def _sizes(role: str, m: int, n: int, k: int, call: Call) -> tuple[int, int, int]:
    """Padded sizes of a product, or a refusal by name."""
    gemm: Gemm = getattr(call.recipe, role)
    sizes = padded_sizes(gemm, m, n, k, call.policy.pad)
    if sizes != (m, n, k) and call.policy.pad == "refuse":
        raise ValueError(
            f"layer '{call.stream.layer}': {role} multiplies ({m}, {k}) by ({k}, {n}), but its blocks need "
            f"multiples of {', '.join(map(str, gemm.multiples))} (rows, columns, contracted); set pad: zero"
        )
    if k != sizes[2] and gemm.counts_zeros and gemm.inner is None:
        raise ValueError(
            f"layer '{call.stream.layer}': {role} contracts {k} values, which its blocks would pad to {sizes[2]}, but "
            "its format counts zeros (a mean, or a grid without zero); choose sizes that blocks divide"
        )
    return sizes


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _multiply(
    role: str,
    a: Terms,
    b: Terms | Kept,
    sizes: tuple[int, int, int],
    call: Call,
    out_dtype: torch.dtype,
    factor: Tensor | None,
) -> Tensor:
    """The product of two sums, every pair of parts by the best backend for it."""
    gemm: Gemm = getattr(call.recipe, role)
    if isinstance(b, Kept):
        pa = prepare(role, "a", a.of, gemm, b.backend, call)
        return _scaled(b.backend, pa, b.prepared, gemm, out_dtype, factor)
    if len(a.parts) == len(b.parts) == 1 and a.thin is None and b.thin is None:
        chosen = chosen_backend(role, gemm, sizes, a.of, call)
        pa, pb = prepare(role, "a", a.of, gemm, chosen, call), prepare(role, "b", b.of, gemm, chosen, call)
        return _scaled(chosen, pa, pb, gemm, out_dtype, factor)
    out = torch.zeros(sizes[0], sizes[1], device=a.of.device)
    for i, (part_a, operand_a) in enumerate(a.parts):
        for j, (part_b, operand_b) in enumerate(b.parts):
            if a.disjoint and b.disjoint and i != j:
                continue  # they have no contracted index in common
            pair = dataclasses.replace(gemm, a=operand_a, b=operand_b)
            chosen = chosen_backend(role, pair, sizes, part_a, call)
            pa = prepare_part(role, "a", part_a, pair, chosen, call)
            pb = prepare_part(role, "b", part_b, pair, chosen, call)
            out += chosen.multiply(pa, pb, pair, torch.float32)
    if a.thin is not None:
        other = b.of.float() if a.thin.exact else rounded(role, "b", b, gemm, call, whole=True)
        out += a.thin.u @ (other @ a.thin.v).T
    if b.thin is not None:
        other = a.rest.float() if b.thin.exact else rounded(role, "a", a, gemm, call, whole=False)
        out += (other @ b.thin.v) @ b.thin.u.T
    return (out if factor is None else out * factor).to(out_dtype)


def _scaled(chosen: Backend, a: Packed, b: Packed, gemm: Gemm, out_dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    if factor is None:
        return chosen.multiply(a, b, gemm, out_dtype)
    return (chosen.multiply(a, b, gemm, torch.float32) * factor).to(out_dtype)


def _back_to_inputs(role: str, out: Tensor, tensors: Mapping[str, Tensor], call: Call) -> Tensor:
    """dx or dw (rows, K) out of the forward's rotated space, masked by the gradient rule of the forward operand."""
    fprop = call.recipe.fprop
    wanted = "x" if role == "dgrad" else "w"  # whose gradient this is
    operand = fprop.a if wanted == "x" else fprop.b
    _, other = operand_of(role, "b", call)
    is_turned = fprop.inner is not None and (other.reuse or other.source == "fprop")
    if operand.gradient != "ste":
        if fprop.inner and not is_turned:
            out = turned(pad_forward(wanted, out, call), fprop.inner, call, "fprop")
            is_turned = True
        mask = _gradient_mask(wanted, tensors[wanted], operand, call)
        out = pad_to(out[: mask.shape[0]], mask.shape[0], mask.shape[1]) * mask.to(out.dtype)
    if is_turned:
        assert fprop.inner is not None
        out = turned(out, fprop.inner, call, "fprop", inverse=True)
    columns = tensors["w"].shape[1]
    return out if out.shape[1] == columns else out[:, :columns]


def _gradient_mask(name: str, x: Tensor, operand: Operand, call: Call) -> Tensor:
    """Where the gradient of a quantised forward operand passes, (rows, padded K) bool in the rotated space."""
    assert operand.format is not None
    fprop = call.recipe.fprop
    padded = pad_forward(name, x, call)
    amax = shared_amax("fprop", name, padded, operand, fprop.inner, call)
    q = oracle.prepare(padded, operand, fprop.inner, call.stream, "fprop", name, amax)
    scale = (q.scales * q.tensor_scale.reshape(-1, 1)).repeat_interleave(q.block, dim=1)[:, : padded.shape[1]]
    now = turned(padded, fprop.inner, call, "fprop").float() if fprop.inner else padded.float()
    element = operand.format.element_type
    reach = operand.clip * element.max
    if operand.gradient == "trust":  # an error above half the last (widest) gap means: beyond the grid by that much
        values = element.values
        reach = element.max + (values[-1] - values[-2] if len(values) > 1 else 2 * values[0]) / 2
    return (now.abs() <= reach * scale)[: x.shape[0]]
