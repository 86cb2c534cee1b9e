"""Element: a number system given by the list of its values.

A low-precision element is a short list of numbers. Writing the list down settles what ``(exponent, mantissa)`` bit
counts leave open: E2M1 reaches 6 (not 3), E4M3 reaches 448 (not 240), because the OCP formats (OCP Microscaling v1.0,
OCP FP8 v1.0) spend fewer codes on infinity and NaN than IEEE 754 does. Every rounding here is defined on that list:

* *nearest*: the closest value; a tie goes to the value with the even index, which for all these lists is the even code;
* *stochastic*: between the two neighbours ``lo <= |x| < hi``, up iff ``noise < (|x| - lo) / (hi - lo)`` with ``noise``
  uniform in (0, 1), so the mean over the noise is ``x`` itself;
* both saturate: magnitudes beyond ``max`` become ``max``. NaN stays NaN.

What this is not: a scale. An element knows nothing of blocks; see :mod:`lowprec.numerics.format`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def minifloat(exponent_bits: int, mantissa_bits: int, max_value: float | None = None) -> tuple[float, ...]:
    """Non-negative values of a binary minifloat with subnormals, ascending; none above ``max_value``."""
    bias = 2 ** (exponent_bits - 1) - 1
    subnormal = [2.0 ** (1 - bias) * m / 2**mantissa_bits for m in range(2**mantissa_bits)]
    normal = [
        2.0 ** (e - bias) * (1 + m / 2**mantissa_bits)
        for e in range(1, 2**exponent_bits)
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

    @cached_property
    def _grid(self) -> Tensor:  # (values,) fp32
        return torch.tensor(self.values, dtype=torch.float32, device="cpu")

    @cached_property
    def _thresholds(self) -> Tensor:
        """(values - 1,) fp32: |x| >= threshold[i] rounds above value i. A tie goes up only from an odd index."""
        middle = ((self._grid[:-1].double() + self._grid[1:].double()) / 2).float()
        odd = torch.arange(len(middle), device="cpu") % 2 == 1
        return torch.where(odd, middle, torch.nextafter(middle, torch.tensor(torch.inf)))

    @cached_property
    def _decode_table(self) -> Tensor:  # (2**bits,) fp32; codes that stand for no value decode to NaN
        table = torch.full((2**self.bits,), torch.nan, device="cpu")
        n = len(self.values)
        table[:n] = self._grid
        if self.signed and self.twos_complement:
            table[2**self.bits - n + 1 :] = -self._grid[1:].flip(0)
        elif self.signed:
            table[2 ** (self.bits - 1) : 2 ** (self.bits - 1) + n] = -self._grid
        return table

    def _index(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Magnitude code of every element of x (any shape, fp32); int64."""
        magnitude = (x.abs() if self.signed else x.clamp(min=0)).contiguous()
        if noise is None:
            return torch.searchsorted(self._thresholds.to(x.device), magnitude, right=True)
        grid = self._grid.to(x.device)
        magnitude = magnitude.clamp(max=self.max)
        low = (torch.searchsorted(grid, magnitude, right=True) - 1).clamp(min=0, max=len(self.values) - 2)
        fraction = (magnitude - grid[low]) / (grid[low + 1] - grid[low])
        return low + (noise < fraction)

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round to the grid: to nearest, or stochastically where ``noise`` is given.

        Args:
            x: any shape, any floating dtype (computed in fp32).
            noise: uniform numbers in (0, 1), same shape, or None for round-to-nearest-even.

        Returns:
            fp32 tensor of the same shape. The sign of zero is kept; NaN stays NaN; infinities saturate.
        """
        x = x.float()
        # NaN sorts behind every value; its index is cut here and its value restored below.
        index = self._index(x, noise).clamp(max=len(self.values) - 1)
        rounded = self._grid.to(x.device)[index]
        rounded = rounded.copysign(x) if self.signed else rounded
        return torch.where(x.isnan(), x, rounded)

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
        x = x.float()
        index = self._index(x.nan_to_num(nan=0.0), noise)
        if self.signed and self.twos_complement:
            index = torch.where(x < 0, -index, index) & (2**self.bits - 1)
        elif self.signed:
            index = index | (x.signbit() & ~x.isnan()).long() << (self.bits - 1)
        return index.to(torch.uint8 if self.bits <= 8 else torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of the codes, fp32. Codes that stand for no value decode to NaN."""
        return self._decode_table.to(codes.device)[codes.long()]


def _integer(bits: int) -> Element:
    """Symmetric signed integer: -(2**(bits-1) - 1) .. 2**(bits-1) - 1, so that the grid has no preferred sign."""
    return Element(f"int{bits}", tuple(float(i) for i in range(2 ** (bits - 1))), twos_complement=True)


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
        *(_integer(bits) for bits in range(2, 9)),
        Element("ternary", (0.0, 1.0), twos_complement=True),  # -1, 0, 1
    )
}
"""Every element that formats may name."""
