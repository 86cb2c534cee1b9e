"""The definition of a quantised matrix product, in plain torch.

Every other backend must give the same codes and scales bit for bit. The product itself is defined block by block:
inside a block of the contracted axis the element values are multiplied and summed, the sum is scaled by the two block
scales, and blocks are added in fp32 in order::

    acc = 0
    for g in blocks of k:   acc = acc + (A_g B_g^T) * (s_A[:, g] s_B[:, g]^T)
    out = acc * (t_A * t_B^T)                    tensor scales stay outside, one rounding to the output's dtype

For FP4 a block's sum is exact in fp32 (a few multiples of 1/4), so the result does not depend on how a block is
summed and fast paths equal this one bit for bit. For FP8 a block of 32 or more is rounded on the way; there results
agree to ``2 k 2^-24 sum|a||b|``. The same order is used by the reference of TransformerEngine (arXiv:2509.25149).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand, Rotation
from lowprec.numerics import Format, QTensor, Stream, Window, fixed_signs, rotate
from lowprec.numerics.qtensor import spread


@dataclass(frozen=True)
class Prepared:
    """An operand ready to be multiplied: ``values * scales`` (block by block) ``* tensor_scale``.

    Attributes:
        values: (rows, k) fp32 element values.
        scales: (rows, blocks) fp32, one per row and block of the contracted axis.
        block: contracted elements under one scale.
        tensor_scale: fp32, () or (rows, 1).
    """

    values: Tensor
    scales: Tensor
    block: int
    tensor_scale: Tensor

    def blockscaled(self) -> Tensor:
        """values * scales, (rows, k) fp32, the tensor scale left out."""
        return self.values * self.scales.repeat_interleave(self.block, dim=1)[:, : self.values.shape[1]]

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(t.untyped_storage().nbytes() for t in (self.values, self.scales, self.tensor_scale))


@dataclass(frozen=True)
class Stored:
    """A prepared operand in its stored size: packed codes, scales in their own dtype. :meth:`unpack` gives it back."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    block: int
    format: Format

    @staticmethod
    def of(prepared: Prepared, format: Format) -> Stored | Prepared:
        """The same numbers in less memory; unchanged where a block's scale decides what its codes mean."""
        if format.second or format.tensor_scale not in (False, True, "row"):
            return prepared
        codes = format.element_type.codes_of(prepared.values)
        dtype = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}.get(format.scale, torch.float32)
        one = prepared.tensor_scale
        packed = QTensor(codes, prepared.scales, one, format).pack() if codes.shape[1] % 2 == 0 else codes
        return Stored(packed, prepared.scales.to(dtype), one, prepared.block, format)

    def unpack(self) -> Prepared:
        """The prepared operand, bit for bit."""
        values = self.format.element_type.decode(QTensor.unpack(self.codes, self.format))
        return Prepared(values, self.scales.float(), self.block, self.tensor_scale)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(t.untyped_storage().nbytes() for t in (self.codes, self.scales, self.tensor_scale))


def turned(
    x: Tensor,
    rotation: Rotation,
    stream: Stream,
    role: str,
    inverse: bool = False,
    rotate: Callable[[Tensor, int, Tensor | None, bool], Tensor] = rotate,
) -> Tensor:
    """x with its last axis rotated (or turned back), in x's dtype and memory order (by which noise is indexed).

    ``role`` keys the signs of every step; ``rotate`` is :func:`lowprec.numerics.rotate` or equals it.
    """
    columns_first = x.dim() == 2 and x.stride(0) < x.stride(1)
    size = rotation.size or x.shape[-1]
    rounds = [f"{role}.signs", f"{role}.signs2"][: rotation.rounds]
    for key in reversed(rounds) if inverse else rounds:
        if rotation.signs == "none":
            signs = None
        elif rotation.signs == "fixed":
            signs = fixed_signs(size, x.device)
        else:
            signs = stream.signs(key, size, x.device)
        x = rotate(x, size, signs, inverse)
    return x.T.contiguous().T if columns_first else x


def prepare(
    x: Tensor,
    operand: Operand,
    inner: Rotation | None,
    stream: Stream,
    role: str,
    name: str,
    amax: Tensor | None = None,
    window: Window | None = None,
) -> Prepared:
    """Rotate and quantise one operand x (rows, k) of the product ``role``.

    ``amax``, () or (rows, 1), replaces its own maximum; ``window`` says whose noise it draws if it is a part.
    """
    original, x = x, turned(x, inner, stream, role) if inner is not None else x
    one = torch.ones((), device=x.device)
    if operand.format is None:
        return Prepared(x.float(), one.expand(x.shape[0], 1), x.shape[1], one)
    key, format = f"{role}.{name}", operand.format
    block = format.block[1] or x.shape[1]
    if operand.rounding == "ms_eden":
        q = format.eden(x, stream.scale_noise(f"{key}.scale", original, block, window), operand.group, amax)
    else:
        noise = stream.noise_like(key, original, window) if operand.rounding == "stochastic" else None
        q = format.quantize(x, noise, amax)
    return prepared(q)


def prepared(q: QTensor) -> Prepared:
    """The operand (rows, k) that codes are."""
    scales, tensor_scale = q.product_scales()
    free, block = q.format.block[0] or q.shape[0], q.format.block[1] or q.shape[1]
    return Prepared(q.values(), spread(scales, free, 1, *q.shape), block, tensor_scale)


def prepare_both(a: Tensor, b: Tensor, spec: Gemm, stream: Stream, role: str) -> tuple[Prepared, Prepared]:
    """Both operands of a product."""
    name_a, name_b = GEMM_OPERANDS[role]
    return (
        prepare(a, spec.a, spec.inner, stream, role, name_a),
        prepare(b, spec.b, spec.inner, stream, role, name_b),
    )


def multiply(a: Prepared, b: Prepared) -> Tensor:
    """The block-ordered product of the module's docstring: (m, k), (n, k) -> (m, n) fp32."""
    k, step = a.values.shape[1], min(a.block, b.block)
    acc = torch.zeros(a.values.shape[0], b.values.shape[0], device=a.values.device)
    for start in range(0, k, step):
        part = a.values[:, start : start + step] @ b.values[:, start : start + step].T
        acc = acc + part * (a.scales[:, start // a.block, None] * b.scales[:, start // b.block])
    return acc * (a.tensor_scale.reshape(-1, 1) * b.tensor_scale.reshape(1, -1))


def gemm(a: Tensor, b: Tensor, spec: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
    """``a b^T`` as ``spec`` says: the definition, for operands without splits and outer rotations.

    Args:
        a: (m, k), a possibly transposed view, bf16, fp16 or fp32.
        b: (n, k), likewise.
        spec: the product's formats, roundings and inner rotation.
        stream: random bits of the layer.
        role: ``fprop``, ``dgrad`` or ``wgrad``; keys the random bits.
        out_dtype: dtype of the result.

    Returns:
        (m, n) of ``out_dtype``.
    """
    return multiply(*prepare_both(a, b, spec, stream, role)).to(out_dtype)
