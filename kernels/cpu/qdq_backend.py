"""PortableBackend: quantised matrix products on any CPU with a C++ compiler.

Each operand is quantised and dequantised in one go (:mod:`~lowprec.kernels.cpu.qdq`), then torch multiplies:

* The numbers that enter are exact. Element times block scale has few significant bits (e2m1 times e4m3: six, e4m3
  times a power of two: four), so bf16 holds it whenever they are at most eight; fp32 always does. Tensor scales, and
  fp32 scales of a whole row or tensor, stay outside and multiply the output. (Products below 2**-126 may be flushed to
  zero.)
* Two bf16 operands are multiplied by the CPU's bf16 instructions, if it has them, with fp32 sums: by torch, or, where
  the output is fp32 or rows have outer scales of their own, by :file:`qdq_gemm.h`. All else is multiplied in fp32.
* So results differ from the oracle's by the order of an fp32 sum, ``2 k 2^-24 sum|a||b|``, before the output is
  rounded once.

No transpose is ever made: a transposed view is quantised as it lies and handed on as a transposed view.

What the kernels of qdq do not know (blocks that choose between candidates, MS-EDEN, rotations of more than 128) is
quantised by its definition in torch and multiplied the same way.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels.cpu import qdq
from lowprec.numerics import ELEMENTS, Element, Format, QTensor, Stream, Window, fixed_signs, rotate
from lowprec.numerics.qtensor import spread

OPERAND_NAMES = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
SCALE_BITS = {"fp32": 24, "pow2": 0, "e8m0": 0, "e4m3": 4, "ue5m3": 4}  # significant ones: what a product gains
BF16_BITS = 8


@dataclass(frozen=True)
class Operand:
    """A prepared operand: ``values * row_scale * tensor_scale``.

    Attributes:
        values: (rows, k) bf16 or fp32, element values times block scales, in the memory layout of the source.
        row_scale: fp32, (rows, 1) or (): block scales that span the contracted axis; else None.
        tensor_scale: fp32, () or (rows, 1).
    """

    values: Tensor
    row_scale: Tensor | None
    tensor_scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(t.nbytes for t in (self.values, self.row_scale, self.tensor_scale) if t is not None)

    def outside(self) -> Tensor:
        """All that multiplies the output, (rows, 1) or (1, 1)."""
        scale = self.tensor_scale if self.row_scale is None else self.row_scale * self.tensor_scale
        return scale.reshape(-1, 1)


@lru_cache(maxsize=256)
def significant_bits(element: Element) -> int:
    """Bits between the first and the last one of an element's values, the most of all of them."""
    fit = qdq.grid(element)
    if fit is None:
        return 24
    exponent, mantissa, offset, _ = fit
    if element.max < 2.0**exponent:  # evenly spaced
        return int((element.max if not offset else 2 * element.max) / 2.0 ** (exponent - mantissa)).bit_length()
    return mantissa + 1


@lru_cache(maxsize=1)
def _bf16_products() -> bool:
    """Whether torch multiplies bf16 matrices by instructions made for it. (Others emulate them, slower than fp32.)"""
    if platform.machine() in ("x86_64", "AMD64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=64)
def _factors(size: int, fixed: bool) -> Tensor:
    ones = torch.full((size,), size**-0.5, dtype=torch.float32, device="cpu")
    return ones * fixed_signs(size) if fixed else ones


class PortableBackend:
    """Fast quantisation on any CPU, products by torch."""

    name = "cpu_portable"

    def __init__(self, march: str = "native") -> None:
        self.march = march

    def refuses(
        self, gemm: Any, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None; arguments as for every backend."""
        if device.type != "cpu":
            return f"the C++ kernels serve tensors on the CPU, not on {device.type}"
        if dtype not in qdq.DTYPES:
            return f"the operands are {dtype}; the C++ kernels read bfloat16 and float32"
        if 0 in (m, n, k):
            return f"a product of {m} x {k} by {k} x {n} is empty"
        return qdq.load(self.march)[1] or None

    def prepare(
        self,
        x: Tensor,
        gemm: Any,
        side: str,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> Operand:
        """Rotate and quantise x (rows, k), bf16 or fp32, maybe a transposed view; as every backend does."""
        operand = gemm.a if side == "a" else gemm.b
        key, format = f"{role}.{OPERAND_NAMES[role][side == 'b']}", operand.format
        factors = None
        if gemm.inner is not None:
            small = gemm.inner.size and gemm.inner.size <= qdq.LARGEST_ROTATION and gemm.inner.rounds == 1
            fused = format is not None and operand.rounding != "ms_eden" and _serves(format) and format.rule == "absmax"
            if small and fused:
                factors = self._signs(gemm.inner, gemm.inner.size, stream, f"{role}.signs")
            else:
                x = self._rotated(x, gemm.inner, stream, role)
        one = torch.ones(())
        if format is None:
            return Operand(x, None, one)
        if operand.rounding == "ms_eden" or not _serves(format):
            return self._defined(x, operand, stream, key, amax, window)
        joined, whole = _joined(format, x.shape[1]), format.block[1] == 0
        random = (stream, key) if operand.rounding == "stochastic" else None
        q = qdq.run(
            x,
            format,
            _dtype(format, joined),
            random,
            amax,
            factors,
            not whole,
            "join" if joined else False,
            march=self.march,
            window=window,
        )
        level = one if joined or q.level is None else q.level
        return Operand(q.values, _rows(q.scales, format, x.shape[0]) if whole else None, level)

    def load(self, q: QTensor, gemm: Any = None, side: str = "a") -> Operand:
        """What :meth:`prepare` makes of a matrix, from its codes (rows, k); a transposed view gives one."""
        format, (rows, k) = q.format, q.shape
        scales, level = q.product_scales()
        values, dtype = q.values(), _dtype(format, _joined(format, k))
        if qdq.layout(q.codes)[1]:
            values = values.T.contiguous().T
        if format.block[1] == 0 and _serves(format):
            return Operand(values.to(dtype), _rows(scales, format, rows), level)
        values.mul_(spread(scales, format.block[0] or rows, format.block[1] or k, rows, k))
        return Operand(values.to(dtype), None, level)

    def multiply(self, a: Operand, b: Operand, gemm: Any, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n)."""
        va, vb, ta, tb = a.values, b.values, a.outside(), b.outside()
        if va.dtype == vb.dtype == torch.bfloat16:
            if out_dtype == torch.bfloat16 and ta.numel() == tb.numel() == 1 and _bf16_products():
                out = torch.empty(va.shape[0], vb.shape[0], dtype=out_dtype)
                return torch.addmm(out, va, vb.T, beta=0, alpha=(ta * tb).item())
            made = qdq.product(va, vb, ta, tb, self.march)
            if made is not None:
                return made.to(out_dtype)
        return (va.float() @ vb.float().T).mul_(ta * tb.T).to(out_dtype)

    def stored(self, prepared: Operand, gemm: Any, side: str) -> Operand:
        """The operand as it is: its values are one number each already, in two bytes where bf16 holds them."""
        return prepared

    def unpacked(self, prepared: Operand, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """values * block scales (rows, k) in ``dtype``, and the tensor scale () or (rows, 1)."""
        values = prepared.values
        if prepared.row_scale is not None:
            values = values.float() * prepared.row_scale
        return values.to(dtype), prepared.tensor_scale

    @staticmethod
    def _signs(rotation: Any, size: int, stream: Stream, key: str) -> Tensor:
        if rotation.signs == "step":
            return _factors(size, False) * stream.signs(key, size)
        return _factors(size, rotation.signs == "fixed")

    def _rotated(self, x: Tensor, rotation: Any, stream: Stream, role: str) -> Tensor:
        """x with its last axis rotated, in x's dtype."""
        size, transposed = rotation.size or x.shape[1], qdq.layout(x)[1]
        for key in (f"{role}.signs", f"{role}.signs2")[: rotation.rounds]:
            signs = fixed_signs(size) if rotation.signs == "fixed" else None
            x = rotate(x, size, stream.signs(key, size) if rotation.signs == "step" else signs)
        return x.T.contiguous().T if transposed else x  # random bits go by the position in memory

    def _defined(
        self, x: Tensor, operand: Any, stream: Stream, key: str, amax: Tensor | None, window: Window | None
    ) -> Operand:
        """By the definition in torch."""
        format: Format = operand.format
        if operand.rounding == "ms_eden":
            q = format.eden(x, stream.scale_noise(f"{key}.scale", x, format.block[1], window), operand.group, amax)
        else:
            noise = stream.noise_like(key, x, window) if operand.rounding == "stochastic" else None
            q = format.quantize(x, noise, amax)
        return self.load(q)


def _serves(format: Format) -> bool:
    return qdq.refuses(format) is None


def _joined(format: Format, k: int) -> bool:
    """Whether tensor scales vary along the contracted axis and so join the block scales."""
    return format.tensor_scale == 128 and format.tensor_scale is not True and k > 128


@lru_cache(maxsize=256)
def _dtype(format: Format, joined: bool) -> torch.dtype:
    """bf16 where it holds element times block scale exactly and the CPU multiplies it, else fp32."""
    bits = max(significant_bits(ELEMENTS[e]) for e in (format.element, format.second or format.element))
    outside = format.block[1] == 0 and _serves(format)
    bits += 24 if joined else 0 if outside or format.scale == "none" else SCALE_BITS[format.scale]
    return torch.bfloat16 if bits <= BF16_BITS and _bf16_products() else torch.float32


def _rows(scales: Tensor, format: Format, rows: int) -> Tensor:
    """Scales of blocks as wide as the matrix, (R, 1), one a row (rows, 1); () where one serves all."""
    if scales.numel() == 1:
        return scales.reshape(())
    return scales.repeat_interleave(format.block[0] or rows, dim=0)[:rows]
