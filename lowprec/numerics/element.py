"""Element: a number system given by the list of its values.

A low-precision element is a short list of numbers. Writing the list down settles what ``(exponent, mantissa)`` bit
counts leave open: E2M1 reaches 6 (not 3), E4M3 reaches 448 (not 240), because the OCP formats (OCP Microscaling v1.0,
OCP FP8 v1.0) spend fewer codes on infinity and NaN than IEEE 754 does. Every rounding here is defined on that list:

* *nearest*: the closest value; a tie goes to the value with the even index, which for all these lists is the even code;
* *stochastic*: between the two neighbours ``lo <= |x| < hi``, up iff ``noise < (|x| - lo) / (hi - lo)`` with ``noise``
  uniform in (0, 1), so the mean over the noise is ``x`` itself;
* both saturate: magnitudes beyond ``max`` become ``max``. NaN stays NaN.

The list is the definition; :mod:`lowprec.numerics.rounding` reaches the same bits by arithmetic where it can.

What this is not: a scale. An element knows nothing of blocks; see :mod:`lowprec.numerics.format`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowprec.numerics.rounding import Grid, grid_of, in_pieces


def minifloat(exponent_bits: int, mantissa_bits: int, max_value: float | None = None) -> tuple[float, ...]:
    """Non-negative values of a binary minifloat with subnormals, ascending; none above ``max_value``."""
    bias = 2 ** (exponent_bits - 1) - 1
    subnormal = [2.0 ** (1 - bias) * m / 2**mantissa_bits for m in range(2**mantissa_bits)]
    normal = [
        2.0 ** (e - bias) * (1 + m / 2**mantissa_bits)
        for e in range(1, 2**exponent_bits)
        if max_value is None or 2.0 ** (e - bias) <= max_value
        for m in range(2**mantissa_bits)
    ]
    return tuple(v for v in subnormal + normal if max_value is None or v <= max_value)


@dataclass(frozen=True)
class Element:
    """A set of representable numbers.

    Attributes:
        name: the field's name for it, e.g. ``"e2m1"``.
        values: the non-negative values, ascending. The index of a value is its magnitude code.
        signed: whether the negatives exist too.
        twos_complement: code of ``-v`` is the two's complement of the code of ``v`` (integers); otherwise
        sign-magnitude.
    """

    name: str
    values: tuple[float, ...]
    signed: bool = True
    twos_complement: bool = False

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.values[-1]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.values) - 1).bit_length() + self.signed

    @property
    def max_exponent(self) -> int:
        """floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of the values in the largest binade."""
        gap = self.max - self.values[-2] if len(self.values) > 1 else self.max
        return max(0, round(math.log2(2.0**self.max_exponent / gap)))

    @cached_property
    def _grid(self) -> Grid:
        return grid_of(self.values)

    def _magnitude(self, x: Tensor) -> Tensor:
        return x.abs() if self.signed else x.clamp(min=0).abs_()

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round to the grid: to nearest, or stochastically where ``noise`` is given.

        Args:
            x: any shape, any floating dtype (computed in fp32).
            noise: uniform numbers in (0, 1), same shape, or None for round-to-nearest-even.

        Returns:
            fp32 tensor of the same shape. The sign of zero is kept; NaN stays NaN; infinities saturate.
        """
        return in_pieces(self._round, torch.float32, x, noise)

    def _round(self, x: Tensor, noise: Tensor | None) -> Tensor:
        x = x.float()
        rounded = self._grid.round(self._magnitude(x), noise)
        return rounded.copysign_(x) if self.signed else rounded

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round and return the codes, one per uint8 (int32 for elements of more than 8 bits). NaN has no code and is
        refused.

        Raises:
            ValueError: if x holds a NaN.
        """
        x = x.float()
        if bool(x.isnan().any()):
            raise ValueError(
                f"cannot encode NaN as {self.name}: it has no code for it; check the tensor before encoding"
            )
        return self.codes_of(x, noise)

    def codes_of(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """:meth:`encode` without the check for NaN (so without a device synchronisation); NaN gives code 0."""
        return in_pieces(self._codes_of, torch.uint8 if self.bits <= 8 else torch.int32, x, noise)

    def _codes_of(self, x: Tensor, noise: Tensor | None) -> Tensor:
        x = x.float().nan_to_num(nan=0.0)
        index = self._grid.index(self._magnitude(x), noise)  # (...) int32
        if self.signed and self.twos_complement:
            sign = x.view(torch.int32) >> 31  # 0 or -1
            index = index.bitwise_xor_(sign).sub_(sign).bitwise_and_((1 << self.bits) - 1)
        elif self.signed:
            index = index.bitwise_or_((x.view(torch.int32) >> 32 - self.bits).bitwise_and_(1 << self.bits - 1))
        return index.to(torch.uint8) if self.bits <= 8 else index

    def decode(self, codes: Tensor) -> Tensor:
        """Values of the codes (uint8, or int32 above 8 bits), fp32. Codes that stand for no value decode to NaN."""
        return in_pieces(self._decode, torch.float32, codes)

    def _decode(self, codes: Tensor) -> Tensor:
        if not self.signed:
            return self._grid.value(codes)
        if self.bits <= 8:
            signed = (codes << 8 - self.bits).view(torch.int8) >> 8 - self.bits  # the code, its sign bit extended
        else:
            signed = codes << 32 - self.bits >> 32 - self.bits
        index = signed.to(torch.int16).abs_() if self.twos_complement else codes & (1 << self.bits - 1) - 1
        return self._grid.value(index).copysign_(signed.to(torch.float32))


def _integer(bits: int) -> Element:
    """Symmetric signed integer: -(2**(bits-1) - 1) .. 2**(bits-1) - 1, so that the grid has no preferred sign."""
    return Element(f"int{bits}", tuple(float(i) for i in range(2 ** (bits - 1))), twos_complement=True)


def _midrise(bits: int) -> Element:
    """Uniform grid without a zero: +-0.5, +-1.5, ... (QuEST, arXiv:2502.05003); 2**bits levels."""
    return Element(f"midrise{bits}", tuple(i + 0.5 for i in range(2 ** (bits - 1))))


def _masked_bfloat16(mantissa_bits: int) -> Element:
    """bf16 with only this many mantissa bits (arXiv:2405.18710); m = 7 is bf16 itself, without infinities."""
    name = f"e8m{mantissa_bits}" if mantissa_bits else "e8m0_signed"
    return Element(name, minifloat(8, mantissa_bits, max_value=(2 - 2.0**-mantissa_bits) * 2.0**127))


ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        Element("e2m1", minifloat(2, 1)),  # OCP MX v1.0; max 6
        Element("e1m2", tuple(i / 2 for i in range(8))),  # uniform four-bit grid; max 3.5
        Element("e3m2", minifloat(3, 2)),  # OCP MX v1.0; max 28
        Element("e2m3", minifloat(2, 3)),  # OCP MX v1.0; max 7.5
        Element("e4m3", minifloat(4, 3, max_value=448.0)),  # OCP FP8: no infinity, one NaN
        Element("e5m2", minifloat(5, 2, max_value=57344.0)),  # OCP FP8: IEEE-like
        Element("ue5m3", minifloat(5, 3, max_value=61440.0), signed=False),  # unsigned block scale (arXiv:2609.02846)
        Element("e8m0", tuple(2.0**e for e in range(-127, 128)), signed=False),  # OCP MX scale: powers of two, no zero
        *(_masked_bfloat16(mantissa_bits) for mantissa_bits in range(8)),
        *(_integer(bits) for bits in range(2, 9)),
        *(_midrise(bits) for bits in range(1, 9)),
        # int4 on e2m1's range (IF4, arXiv:2603.28765), the sevenths rounded to fp32
        Element("if4_int", tuple((torch.arange(8, device="cpu") * 6 / 7).tolist()), twos_complement=True),
        Element("ternary", (0.0, 1.0), twos_complement=True),  # -1, 0, 1
    )
}
"""Every element that formats may name."""
