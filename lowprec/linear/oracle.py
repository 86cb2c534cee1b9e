"""The definition of a quantised matrix product, in plain torch.

Every other backend must give the same codes and scales bit for bit. The product itself is defined block by block:
inside a block of the contracted axis the element values are multiplied and summed, the sum is scaled by the two block
scales, and blocks are added in fp32 in order::

    acc = 0
    for g in blocks of k:   acc = acc + (A_g B_g^T) * (s_A[:, g] s_B[:, g]^T)
    out = acc * (t_A * t_B)                      tensor scales stay outside, one rounding to the output's dtype

For FP4 a block's sum is exact in fp32 (a few multiples of 1/4), so the result does not depend on how a block is
summed and fast paths equal this one bit for bit. For FP8 a block of 32 or more is rounded on the way; there results
agree to ``2 k 2^-24 sum|a||b|``. The same order is used by the reference of TransformerEngine (arXiv:2509.25149).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand, Rotation
from lowprec.numerics import Stream, fixed_signs, rotate


@dataclass(frozen=True)
class Prepared:
    """An operand ready to be multiplied: ``values * scales`` (block by block) ``* tensor_scale``.

    Attributes:
        values: (rows, k) fp32 element values.
        scales: (rows, blocks) fp32, one per row and block of the contracted axis.
        block: contracted elements under one scale.
        tensor_scale: () fp32.
    """

    values: Tensor
    scales: Tensor
    block: int
    tensor_scale: Tensor

    def blockscaled(self) -> Tensor:
        """values * scales, (rows, k) fp32, the tensor scale left out."""
        return self.values * self.scales.repeat_interleave(self.block, dim=1)[:, : self.values.shape[1]]


def rotation_signs(rotation: Rotation, stream: Stream, role: str, device: torch.device) -> Tensor | None:
    """The signs (size,) that both operands of a product share, or None."""
    if rotation.signs == "none":
        return None
    if rotation.signs == "fixed":
        return fixed_signs(rotation.size).to(device)
    return stream.signs(f"{role}.signs", rotation.size, device)


def noise_like(x: Tensor, stream: Stream, key: str) -> Tensor:
    """Noise for x (rows, k), indexed by position in memory, so a transposed view gets the transposed noise."""
    if x.stride(0) < x.stride(1):
        return stream.noise(key, (x.shape[1], x.shape[0]), x.device).T
    return stream.noise(key, tuple(x.shape), x.device)


def prepare(x: Tensor, operand: Operand, inner: Rotation | None, stream: Stream, role: str, name: str) -> Prepared:
    """Rotate and quantise one operand x (rows, k) of the product ``role``."""
    if inner is not None:
        x_rotated = rotate(x, inner.size, rotation_signs(inner, stream, role, x.device))
    else:
        x_rotated = x
    if operand.format is None:
        ones = torch.ones((), device=x.device)
        return Prepared(x_rotated.float(), ones.expand(x.shape[0], 1), x.shape[1], ones)
    noise = noise_like(x, stream, f"{role}.{name}") if operand.rounding == "stochastic" else None
    q = operand.format.quantize(x_rotated, noise)
    tensor_scale = torch.ones((), device=x.device) if q.tensor_scale is None else q.tensor_scale
    return Prepared(q.values(), q.row_scales(), operand.format.block[1] or x.shape[1], tensor_scale)


def prepare_both(a: Tensor, b: Tensor, gemm: Gemm, stream: Stream, role: str) -> tuple[Prepared, Prepared]:
    """Both operands of a product."""
    name_a, name_b = GEMM_OPERANDS[role]
    return (
        prepare(a, gemm.a, gemm.inner, stream, role, name_a),
        prepare(b, gemm.b, gemm.inner, stream, role, name_b),
    )


def multiply(a: Prepared, b: Prepared) -> Tensor:
    """The block-ordered product of the module's docstring: (m, k), (n, k) -> (m, n) fp32."""
    k, step = a.values.shape[1], min(a.block, b.block)
    acc = torch.zeros(a.values.shape[0], b.values.shape[0], device=a.values.device)
    for start in range(0, k, step):
        part = a.values[:, start : start + step] @ b.values[:, start : start + step].T
        acc = acc + part * (a.scales[:, start // a.block, None] * b.scales[:, start // b.block])
    return acc * (a.tensor_scale * b.tensor_scale)


def gemm(a: Tensor, b: Tensor, spec: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
    """``a b^T`` as ``spec`` says: the definition.

    Args:
        a: (m, k), a possibly transposed view, bf16, fp16 or fp32.
        b: (n, k), likewise.
        spec: the product's formats, roundings and rotation.
        stream: random bits of the layer.
        role: ``fprop``, ``dgrad`` or ``wgrad``; keys the random bits.
        out_dtype: dtype of the result.

    Returns:
        (m, n) of ``out_dtype``.
    """
    return multiply(*prepare_both(a, b, spec, stream, role)).to(out_dtype)
