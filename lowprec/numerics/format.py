"""Format = element x block x scale x tensor scale; QTensor = what a tensor becomes.

A format quantises a matrix whose last axis is the one a matrix product contracts. ``block = (free, contracted)``
elements share one scale; ``0`` stands for the whole axis, so ``(0, 0)`` is one scale for the tensor and ``(1, 0)``
one a row. With ``tensor_scale`` a second fp32 scale spans the tensor and the block scales are stored relative to it
(NVFP4)::

    value[i, j] = decode(codes[i, j]) * scales[i // free, j // contracted] * tensor_scale

The plain-torch code here is the definition of every format: fp32, one rounding an operation, no fused steps. A ragged
edge is quantised as if padded with zeros.

What this is not: fake quantisation by casting. Codes and scales are real, storable, and packed by :meth:`QTensor.pack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.numerics.element import ELEMENTS, Element
from lowprec.numerics.scale import FLT_MAX, e4m3_scale, e8m0_scale, fp32_scale

SCALES = ("fp32", "e4m3", "e8m0")
SCALE_ROUNDINGS = ("rceil", "floor")
_SCALE_BITS = {"fp32": 32, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix.

    Attributes:
        codes: (rows, k) uint8, one element code each (see :meth:`pack` for storage).
        scales: (ceil(rows / free), ceil(k / contracted)) float8_e4m3fn, float8_e8m0fnu or float32.
        tensor_scale: () fp32, or None where the format has none.
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

    def values(self) -> Tensor:
        """Element values without any scale, fp32 (rows, k)."""
        return ELEMENTS[self.format.element].decode(self.codes)

    def row_scales(self) -> Tensor:
        """Block scales with the free axis expanded to rows, fp32 (rows, ceil(k / contracted))."""
        free = self.format.block[0] or self.shape[0]
        return self.scales.float().repeat_interleave(free, dim=0)[: self.shape[0]]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, k): element * block scale in fp32, then * tensor scale; kept within fp32's finite range."""
        k = self.shape[1]
        contracted = self.format.block[1] or k
        out = self.values() * self.row_scales().repeat_interleave(contracted, dim=1)[:, :k]
        if self.tensor_scale is not None:
            out = out * self.tensor_scale
        return out.clamp(-FLT_MAX, FLT_MAX).to(dtype)

    def pack(self) -> Tensor:
        """Codes as stored: elements of at most four bits go two to a byte, low nibble = even column; uint8.

        Raises:
            ValueError: if such a tensor has an odd number of columns.
        """
        if ELEMENTS[self.format.element].bits > 4:
            return self.codes
        if self.shape[1] % 2:
            raise ValueError(
                f"{self.format.name} packs two codes a byte and needs an even number of columns, got {self.shape[1]}"
            )
        return self.codes[:, 0::2] | self.codes[:, 1::2] << 4

    @staticmethod
    def unpack(packed: Tensor, format: Format) -> Tensor:
        """Inverse of :meth:`pack`: bytes -> one code per uint8, (rows, k)."""
        if ELEMENTS[format.element].bits > 4:
            return packed
        return torch.stack([packed & 15, packed >> 4], dim=-1).reshape(packed.shape[0], -1)

    def nbytes(self) -> int:
        """Bytes of packed codes, scales and tensor scale."""
        bits = 4 if ELEMENTS[self.format.element].bits <= 4 else 8
        scale_bits = _SCALE_BITS[self.format.scale]
        return (self.codes.numel() * bits + self.scales.numel() * scale_bits) // 8 + 4 * (self.tensor_scale is not None)


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised. Frozen and hashable: it is data.

    Attributes:
        name: what recipes call it.
        element: a key of ``ELEMENTS``.
        block: (free, contracted) elements under one scale; 0 = the whole axis.
        scale: how block scales are stored: ``fp32``, ``e4m3`` (needs ``tensor_scale``) or ``e8m0``.
        tensor_scale: whether a second fp32 scale spans the tensor.
        scale_rounding: for ``e8m0``: ``rceil`` or ``floor``.
    """

    name: str
    element: str
    block: tuple[int, int]
    scale: str = "fp32"
    tensor_scale: bool = False
    scale_rounding: str = "rceil"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(
                f"format {self.name}: unknown element '{self.element}'; choose one of {', '.join(ELEMENTS)}"
            )
        if self.scale not in SCALES:
            raise ValueError(f"format {self.name}: unknown scale '{self.scale}'; choose one of {', '.join(SCALES)}")
        if self.scale_rounding not in SCALE_ROUNDINGS:
            raise ValueError(
                f"format {self.name}: unknown scale_rounding '{self.scale_rounding}'; "
                f"choose one of {', '.join(SCALE_ROUNDINGS)}"
            )
        if (self.scale == "e4m3") != self.tensor_scale:
            raise ValueError(
                f"format {self.name}: e4m3 block scales and tensor_scale: true belong together; set both or neither"
            )
        if len(self.block) != 2 or min(self.block) < 0:
            raise ValueError(
                f"format {self.name}: block must be [free, contracted],"
                f" sizes >= 0 (0 = whole axis), got {list(self.block)}"
            )

    @property
    def element_type(self) -> Element:
        """The element as an object."""
        return ELEMENTS[self.element]

    def quantize(self, x: Tensor, noise: Tensor | None = None) -> QTensor:
        """Quantise a matrix.

        Args:
            x: (rows, k), bf16, fp16 or fp32.
            noise: uniform (0, 1) numbers of x's shape for stochastic rounding of the elements, or None for nearest.

        Returns:
            QTensor of x's shape. NaN or infinity in x makes all values under the same scale (with ``tensor_scale``: all
            values) decode to NaN.

        Raises:
            ValueError: if x is not a floating matrix or noise has another shape.
        """
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(
                f"{self.name}: expected a floating matrix (rows, k), got {x.dtype} of shape {tuple(x.shape)}"
            )
        if noise is not None and noise.shape != x.shape:
            raise ValueError(
                f"{self.name}: noise has shape {tuple(noise.shape)}, x has {tuple(x.shape)}; they must agree"
            )
        rows, k = x.shape
        free, contracted = self.block[0] or max(rows, 1), self.block[1] or max(k, 1)
        pad = (0, -k % contracted, 0, -rows % free)
        blocks = (
            F.pad(x.float(), pad).unflatten(1, (-1, contracted)).unflatten(0, (-1, free))
        )  # (R, free, C, contracted)
        amax = blocks.abs().amax(dim=(1, 3))  # (R, C); NaN propagates
        multiplier, scales, tensor_scale = self._scales(amax, x.dtype)
        scaled = (blocks * multiplier[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :k]
        # A NaN multiplier marks a poisoned block; its scale is NaN, so the codes do not matter and are zero.
        return QTensor(self.element_type.codes_of(scaled, noise), scales, tensor_scale, self)

    def _scales(self, amax: Tensor, input_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        element_max = self.element_type.max
        if self.scale == "e4m3":
            tensor_amax = amax.amax() if amax.numel() else amax.new_zeros(())
            return e4m3_scale(amax, tensor_amax, element_max)
        if self.scale == "e8m0":
            return *e8m0_scale(amax, element_max, self.scale_rounding), None
        return *fp32_scale(amax, element_max, input_dtype), None


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("nvfp4", "e2m1", (1, 16), "e4m3", tensor_scale=True),  # arXiv:2509.25149: activations and gradients
        Format("nvfp4_2d", "e2m1", (16, 16), "e4m3", tensor_scale=True),  # arXiv:2509.25149: weights
        Format("mxfp4", "e2m1", (1, 32), "e8m0"),  # OCP MX v1.0
        Format("mxfp6_e3m2", "e3m2", (1, 32), "e8m0"),
        Format("mxfp6_e2m3", "e2m3", (1, 32), "e8m0"),
        Format("mxfp8", "e4m3", (1, 32), "e8m0"),
        Format("mxfp8_e5m2", "e5m2", (1, 32), "e8m0"),
        Format("fp8_tensor", "e4m3", (0, 0)),  # one current scale for the tensor
        Format("fp8_tensor_e5m2", "e5m2", (0, 0)),
        Format("fp8_row", "e4m3", (1, 0)),
        Format("fp8_1x128", "e4m3", (1, 128)),  # DeepSeek-V3, arXiv:2412.19437: activations and gradients
        Format("fp8_128x128", "e4m3", (128, 128)),  # ... weights
        Format("int8_tensor", "int8", (0, 0)),
        Format("int8_row", "int8", (1, 0)),
    )
}
"""The formats every recipe may name; a precision file can add its own under ``formats:``."""
