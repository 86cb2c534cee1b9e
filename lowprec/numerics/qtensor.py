"""QTensor: a quantised matrix. Codes and block scales are real and storable; values are made from them on demand::

    value[i, j] = decode(codes[i, j]) * block_scales[i // free, j // contracted] * tensor_scale

What this is not: a tensor subclass. It has no arithmetic; products are made by ``lowprec.linear``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowprec.numerics.element import ELEMENTS
from lowprec.numerics.scale import FLT_MAX, SCALE_BITS, load

if TYPE_CHECKING:
    from lowprec.numerics.format import Format


def spread(blocks: Tensor, free: int, contracted: int, rows: int, k: int) -> Tensor:
    """One number a block (R, C) -> one an element (rows, k)."""
    if free != 1:
        blocks = blocks.repeat_interleave(free, dim=0)[:rows]
    if contracted != 1:
        blocks = blocks.repeat_interleave(contracted, dim=1)[:, :k]
    return blocks


def _times(values: Tensor, blocks: Tensor, free: int, contracted: int) -> Tensor:
    """values (rows, k), overwritten, times one number a block."""
    rows, k = values.shape
    if rows % free or k % contracted:
        return values.mul_(spread(blocks, free, contracted, rows, k))
    values.view(-1, free, k // contracted, contracted).mul_(blocks[:, None, :, None])
    return values


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix.

    Attributes:
        codes: (rows, k) uint8, one element code each; int32 for elements of more than eight bits.
        scales: (ceil(rows / free), ceil(k / contracted)) as stored: float32, float8_e4m3fn (its sign bit marks blocks
            of the second element), float8_e8m0fnu, or uint8 codes of ue5m3. Read them with :meth:`block_scales`.
        tensor_scale: fp32 (), (rows, 1) or (rows, ceil(k / 128)) as the format's ``tensor_scale`` says; None without.
        format: the format that made it.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: Format

    @property
    def shape(self) -> torch.Size:
        """(rows, k) of the tensor it stands for."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def _block(self) -> tuple[int, int]:
        return self.format.block[0] or max(self.shape[0], 1), self.format.block[1] or max(self.shape[1], 1)

    def values(self) -> Tensor:
        """Element values without any scale, fp32 (rows, k)."""
        values = ELEMENTS[self.format.element].decode(self.codes)
        if self.format.second is None:
            return values
        second = spread(self.scales.float().signbit(), *self._block, *self.shape)
        return torch.where(second, ELEMENTS[self.format.second].decode(self.codes), values)

    def block_scales(self) -> Tensor:
        """Block scales as numbers, fp32, non-negative (or NaN), in the shape of ``scales``."""
        return load(self.scales, self.format.scale)

    def row_scales(self) -> Tensor:
        """Block scales with the free axis expanded to rows, fp32 (rows, ceil(k / contracted))."""
        return spread(self.block_scales(), self._block[0], 1, *self.shape)

    def product_scales(self) -> tuple[Tensor, Tensor]:
        """The scales as a product along k applies them.

        Returns:
            Of blocks, fp32 in the shape of ``scales``; and of the finished product, fp32 () or (rows, 1). Tensor scales
            of 128 elements vary along k, so they join those of blocks.
        """
        scales, level = self.block_scales(), self.tensor_scale
        if level is None:
            return scales, scales.new_ones(())
        if level.dim() == 2 and level.shape[1] > 1:
            wide = level.repeat_interleave(128 // self.format.block[1], dim=1)
            return scales * wide[:, : scales.shape[1]], scales.new_ones(())
        return scales, level

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, k): element * block scale in fp32, then * tensor scale; kept within fp32's finite range."""
        out = _times(self.values(), self.block_scales(), *self._block)
        if self.tensor_scale is not None:
            per_128 = self.tensor_scale.dim() == 2 and self.format.tensor_scale == 128
            out = _times(out, self.tensor_scale, 1, 128) if per_128 else out.mul_(self.tensor_scale)
        return out.clamp_(-FLT_MAX, FLT_MAX).to(dtype)

    def pack(self) -> Tensor:
        """Codes as stored: up to four bits two to a byte, low nibble = even column; up to eight a byte; else int16.

        Raises:
            ValueError: if a tensor of at most four bits has an odd number of columns.
        """
        bits = self.format.bits
        if bits > 4:
            return self.codes if bits <= 8 else self.codes.to(torch.int16)
        if self.shape[1] % 2:
            raise ValueError(
                f"{self.format.name} packs two codes a byte and needs an even number of columns, got {self.shape[1]}"
            )
        return self.codes[:, 0::2] | self.codes[:, 1::2] << 4

    @staticmethod
    def unpack(packed: Tensor, format: Format) -> Tensor:
        """Inverse of :meth:`pack`: stored codes -> one code per uint8 or int32, (rows, k)."""
        if format.bits > 4:
            return packed if format.bits <= 8 else packed.to(torch.int32) & 0xFFFF
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)

    def nbytes(self) -> int:
        """Bytes of packed codes, block scales and tensor scales."""
        bits = self.format.bits
        stored_bits = 4 if bits <= 4 else 8 if bits <= 8 else 16
        code_bytes = (self.codes.numel() * stored_bits + 7) // 8
        scale_bytes = self.scales.numel() * SCALE_BITS[self.format.scale] // 8
        return code_bytes + scale_bytes + (0 if self.tensor_scale is None else 4 * self.tensor_scale.numel())
