"""Coded: an operand of a matrix product as a GPU's tensor cores read it, packed codes and stored block scales.

Shared by the backends `scaled_mm` and `triton`.  A matrix (rows, k) is::

    codes   uint8 (rows, bytes): two E2M1 codes a byte, low nibble = even column, or one FP8 code; padded with zeros
    scales  of blocks, as stored: bytes of E4M3 or E8M0, or fp32; (lines, blocks) in rows, or swizzled (below)
    level   fp32 () or (rows, 1): the tensor scale, which multiplies the finished sum

Swizzled scales are what ``tcgen05`` and cuBLASLt read: tiles of 128 rows x 4 blocks, 512 bytes each, row-major over
tiles; in a tile the scale of row r and block c is byte ``(r % 32) 16 + (r // 32) 4 + c``.  A scale of a square block is
repeated for each of its rows; rows and blocks are padded with zeros to whole tiles.

On a GPU codes are made by the Triton kernels, elsewhere, and where they do not know a format, by its definition in
:mod:`lowprec.numerics`, which they equal bit for bit.  Importing this imports no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.numerics import Format, QTensor, Stream, Window, fixed_signs, rotate
from lowprec.numerics.qtensor import spread

OPERAND_NAMES = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
DTYPES = (torch.bfloat16, torch.float32)
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALE_TYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}
FORMS = {"nvfp4": "scaled", "mxfp4": "scaled", "mxfp8": "scaled", "fp8": "fp8", "fp8_blocks": "blocks"}


def kind(format: Format) -> str | None:
    """What tensor cores know a format as, a key of `FORMS`; None if they do not."""
    free, con = format.block
    if format.second is not None:
        return None
    if format.element == "e2m1" and format.scale == "e4m3" and con == 16 and format.tensor_scale in (True, "row"):
        return "nvfp4"
    if format.tensor_scale:
        return None
    if format.scale == "e8m0" and con == 32:
        return "mxfp4" if format.element == "e2m1" else "mxfp8" if format.element in FP8 else None
    if format.element in FP8 and format.scale in ("fp32", "pow2"):
        return "fp8" if format.block in ((0, 0), (1, 0)) else "fp8_blocks" if con == 128 and free in (1, 128) else None
    return None


def form(a: Format, b: Format) -> str | None:
    """How two formats are multiplied, a value of `FORMS`; None if tensor cores do not know the pair."""
    known = kind(a)
    return FORMS[known] if known and known == kind(b) else None


def refuse_operands(gemm: Any, role: str, dtype: torch.dtype, sizes: tuple[int | None, ...]) -> str | None:
    """Why no pair of tensor-core operands can be made for a product, or None."""
    a, b = gemm.a.format, gemm.b.format
    if a is None or b is None:
        return "one operand is not quantised, tensor cores multiply like with like"
    if form(a, b) is None:
        return f"tensor cores know no product of {a.name} and {b.name}"
    if dtype not in DTYPES:
        return f"the operands are {dtype}; the kernels read bfloat16 and float32"
    if role not in OPERAND_NAMES:
        return f"unknown product '{role}'; it serves {', '.join(OPERAND_NAMES)}"
    return "a product without elements" if 0 in sizes else None


def swizzle(scales: Tensor) -> Tensor:
    """Scales one a row and block, (rows, blocks) bytes -> swizzled, flat."""
    rows, blocks = scales.shape
    padded = F.pad(scales, (0, -blocks % 4, 0, -rows % 128))
    return padded.view(-(-rows // 128), 4, 32, -(-blocks // 4), 4).permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `swizzle`."""
    tiles = scales.view(-(-rows // 128), -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-(-rows // 128) * 128, -1)[:rows, :blocks].contiguous()


@dataclass(frozen=True)
class Coded:
    """A prepared operand; see the module's docstring."""

    codes: Tensor
    scales: Tensor
    level: Tensor | None
    format: Format
    shape: tuple[int, int]
    swizzled: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.level) if t is not None)

    @staticmethod
    def of(q: QTensor, swizzled: bool) -> Coded:
        """From codes one an element, maybe a transposed view."""
        format, (rows, k) = q.format, q.shape
        codes = F.pad(q.codes, (0, -k % (format.block[1] or 16)))
        scales = q.scales.contiguous()
        if format.scale in SCALE_TYPES:
            scales = scales.view(torch.uint8)
        if swizzled:
            scales = swizzle(spread(scales, format.block[0], 1, rows, k))
        packed = QTensor(codes, scales, None, format).pack().contiguous()
        return Coded(packed, scales, q.tensor_scale, format, (rows, k), swizzled)

    def qtensor(self) -> QTensor:
        """One code an element again."""
        (rows, k), (free, con), scales = self.shape, self.block, self.scales
        codes = QTensor.unpack(self.codes, self.format)[:, :k].contiguous()
        if self.swizzled:
            scales = unswizzle(scales, rows, -(-k // con))[::free].contiguous()
        scales = scales.view(SCALE_TYPES.get(self.format.scale, scales.dtype))
        return QTensor(codes, scales, self.level, self.format)

    @property
    def block(self) -> tuple[int, int]:
        """(free, contracted) elements under one stored scale."""
        return self.format.block[0] or self.shape[0], self.format.block[1] or self.shape[1]

    def outside(self) -> Tensor | None:
        """What multiplies the finished sum, fp32 with one element or one a row: scales that span all of k, and tensor
        scales; None if there is nothing."""
        if self.format.block[1]:
            return self.level
        return self.scales if self.level is None else self.scales * self.level

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """values * block scales (rows, k), and the tensor scale () or (rows, 1)."""
        q = self.qtensor()
        scales, level = q.product_scales()
        return (q.values() * spread(scales, *self.block, *self.shape)).to(dtype), level


def rotated(x: Tensor, rotation: Any, stream: Stream, role: str) -> Tensor:
    """x (rows, k), its last axis rotated by the definition, in x's dtype and memory order (noise goes by it)."""
    size, transposed = rotation.size or x.shape[1], x.stride(0) < x.stride(1)
    for key in (f"{role}.signs", f"{role}.signs2")[: rotation.rounds]:
        fixed = fixed_signs(size, x.device) if rotation.signs == "fixed" else None
        x = rotate(x, size, stream.signs(key, size, x.device) if rotation.signs == "step" else fixed)
    return x.T.contiguous().T if transposed else x


def defined(
    x: Tensor, operand: Any, stream: Stream, key: str, amax: Tensor | None, window: Window | None, swizzled: bool
) -> Coded:
    """x (rows, k), rotated already, quantised by the definition of its format."""
    format: Format = operand.format
    if operand.rounding == "ms_eden":
        q = format.eden(x, stream.scale_noise(f"{key}.scale", x, format.block[1], window), operand.group, amax)
    else:
        noise = stream.noise_like(key, x, window) if operand.rounding == "stochastic" else None
        q = format.quantize(x, noise, amax)
    return Coded.of(q, swizzled)


def prepared(
    x: Tensor,
    gemm: Any,
    side: str,
    stream: Stream,
    role: str,
    amax: Tensor | None,
    window: Window | None,
    swizzled: bool,
    kernels: bool,
) -> Coded:
    """Rotate and quantise operand ``side`` of a product, as every backend's `prepare`.

    Args:
        swizzled: how scales of one byte are laid out.
        kernels: whether the Triton kernels may be used: x is on a GPU.
    """
    operand = gemm.a if side == "a" else gemm.b
    key = f"{role}.{OPERAND_NAMES[role][side == 'b']}"
    if kernels and (window is None or operand.rounding == "nearest"):
        from lowprec.kernels.triton.eden import GROUPS, quantize_eden
        from lowprec.kernels.triton.launch import quantize
        from lowprec.kernels.triton.recipe import refuse

        eden = operand.rounding == "ms_eden"
        if refuse(operand.format) is None and (not eden or operand.group in GROUPS):
            turn, x = _fused(gemm.inner, x, stream, role)
            given = {"swizzle": swizzled, "amax": amax, "turn": turn}
            if eden:
                roles = (f"{key}.scale", f"{key}.scale")
                out = quantize_eden(x, operand.format, stream, roles=roles, group=operand.group, **given).rows
            else:
                noise = stream if operand.rounding == "stochastic" else None
                out = quantize(x, operand.format, stream=noise, roles=(key, key), **given).rows
            assert out is not None
            return Coded(out.packed, out.scales, out.tensor_scale, out.format, out.shape, out.swizzled)
    if gemm.inner is not None:
        x = rotated(x, gemm.inner, stream, role)
    return defined(x, operand, stream, key, amax, window, swizzled)


def _fused(rotation: Any, x: Tensor, stream: Stream, role: str) -> tuple[Any, Tensor]:
    """(rotation that the quantise kernel makes, x as it takes it): one block of 16 to 128, or x rotated before."""
    from lowprec.kernels.triton.rotate import SIZES

    if rotation is None:
        return None, x
    if rotation.size not in SIZES or rotation.rounds != 1:
        return None, rotated(x, rotation, stream, role)
    if rotation.signs == "step":
        return _step_turn(rotation.size, stream, role), x
    return _fixed_turn(rotation.size, rotation.signs == "fixed"), x


@lru_cache(maxsize=64)
def _step_turn(size: int, stream: Stream, role: str) -> Any:
    """Both operands of a product have the same signs, and drawing them takes the host half a millisecond."""
    from lowprec.kernels.triton.rotate import Turn

    return Turn.of(size, stream.signs(f"{role}.signs", size))


@lru_cache(maxsize=16)
def _fixed_turn(size: int, signs: bool) -> Any:
    from lowprec.kernels.triton.rotate import Turn

    return Turn.of(size, fixed_signs(size) if signs else None, fixed=True)
