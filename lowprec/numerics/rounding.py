"""Rounding of magnitudes to a grid by arithmetic: what :class:`Element` defines by its list, without searching it.

Three kinds of grid, each with the same three functions of magnitudes ``a >= 0`` (any shape, fp32):

* ``index(a, noise)``: int32 index of the grid value that ``a`` rounds to (NaN: anything);
* ``round(a, noise)``: that value, fp32 (NaN stays NaN);
* ``value(index)``: the grid value of an index of any integer dtype, fp32; NaN beyond the grid.

:class:`Uniform` and :class:`Minifloat` use that dividing by a power of two is exact, so ``t = a / step`` splits exactly
into an integer and a fraction: nearest is round-half-even of ``t`` (the parity of ``t`` is the parity of the index),
stochastic is ``floor(t) + (noise < t - floor(t))``, and both equal the list's definition bit for bit (tested
exhaustively). :class:`Listed` is that definition and serves any list. The comparison is written ``ceil(fraction -
noise)``, which has the same sign in floating point and stays vectorised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_PIECE = 1 << 16  # elements whose temporaries stay in a core's cache


def in_pieces(f: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor | None) -> Tensor:
    """``f(*inputs)`` for an elementwise f that returns ``dtype``; on a CPU cache-sized piece by piece."""
    first = inputs[0]
    assert first is not None
    if first.device.type != "cpu" or first.numel() <= _PIECE or torch.compiler.is_compiling():
        return f(*inputs)
    flat = [None if t is None else t.reshape(-1) for t in inputs]
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    flat_out = out.view(-1)
    for start in range(0, first.numel(), _PIECE):
        stop = start + _PIECE
        flat_out[start:stop] = f(*(None if t is None else t[start:stop] for t in flat))
    return out


class Grid(Protocol):
    """Magnitudes of an element; see the module's docstring."""

    def index(self, a: Tensor, noise: Tensor | None) -> Tensor: ...

    def round(self, a: Tensor, noise: Tensor | None) -> Tensor: ...

    def value(self, index: Tensor) -> Tensor: ...


def _whole(t: Tensor, noise: Tensor | None) -> Tensor:
    """t >= 0 to an integer, to nearest even or stochastically; overwrites t."""
    if noise is None:
        return t.round_()
    low = t.floor()
    return low.add_(t.sub_(low).sub_(noise).ceil_())


@dataclass(frozen=True)
class Uniform:
    """offset, offset + step, ... (count values); step a power of two."""

    offset: float
    step: float
    count: int

    def _steps(self, a: Tensor, noise: Tensor | None) -> Tensor:
        t = (a - self.offset).div_(self.step) if self.offset else a / self.step
        return _whole(t.clamp_(0, self.count - 1), noise)

    def index(self, a: Tensor, noise: Tensor | None) -> Tensor:
        return self._steps(a, noise).to(torch.int32)

    def round(self, a: Tensor, noise: Tensor | None) -> Tensor:
        return self._steps(a, noise).mul_(self.step).add_(self.offset)

    def value(self, index: Tensor) -> Tensor:
        value = index.to(torch.float32)
        value = value if self.step == 1 and self.offset == 0 else value.mul_(self.step).add_(self.offset)
        return value.masked_fill_(index >= self.count, torch.nan)


@dataclass(frozen=True)
class Minifloat:
    """0, then subnormals below ``2**min_exponent``, then binades of ``2**mantissa_bits`` values up to ``max``."""

    mantissa_bits: int
    min_exponent: int
    max: float
    count: int

    @property
    def _fp32_like(self) -> bool:  # eight exponent bits: the grid is fp32 with its last bits cut off
        return self.min_exponent == -126

    def _steps(self, a: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many steps, and the power of two of a's binade (inf for NaN): a step is its ``2**-mantissa_bits``."""
        a = a.clamp(max=self.max)
        power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**self.min_exponent)
        return _whole(a.div_(power * 2.0**-self.mantissa_bits), noise), power

    def _cut(self, a: Tensor) -> Tensor:
        """Nearest for fp32-like grids, as index (int32); the magnitudes of NaN overflow to what is no index."""
        bits, cut = a.clamp(max=self.max).view(torch.int32), 23 - self.mantissa_bits
        odd = (bits >> cut).bitwise_and_(1)
        return odd.add_(bits).add_((1 << cut - 1) - 1) >> cut

    def index(self, a: Tensor, noise: Tensor | None) -> Tensor:
        if self._fp32_like and noise is None:
            return self._cut(a)
        steps, power = self._steps(a, noise)
        binade = power.view(torch.int32) >> 23 - self.mantissa_bits
        return binade.sub_(self.min_exponent + 127 << self.mantissa_bits).add_(steps.to(torch.int32))

    def round(self, a: Tensor, noise: Tensor | None) -> Tensor:
        if self._fp32_like and noise is None:
            a = a.clamp(max=self.max)
            return self.value(self._cut(a)).add_(a - a)  # NaN stays NaN
        steps, power = self._steps(a, noise)
        return steps.mul_(power.mul_(2.0**-self.mantissa_bits))

    def value(self, index: Tensor) -> Tensor:
        if self._fp32_like:
            value = (index.to(torch.int32) << 23 - self.mantissa_bits).view(torch.float32)
            return value.masked_fill_(index >= self.count, torch.nan)
        index = index.to(torch.int16)
        bits = index << 10 - self.mantissa_bits  # fp16 has five exponent bits, the least normal 2**-14
        beyond = (self.count - 1 - index >> 15).bitwise_and_(0x7E00)  # an fp16 NaN, or 0
        half = bits.bitwise_or_(beyond).view(torch.float16)
        return half.to(torch.float32).mul_(2.0 ** (self.min_exponent + 14))


@dataclass(frozen=True)
class Listed:
    """Any ascending list of non-negative values, searched."""

    values: tuple[float, ...]
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values, and the thresholds: a >= threshold[i] rounds above value i. A tie goes up from an odd index."""
        if device not in self._tables:
            grid = torch.tensor(self.values, dtype=torch.float32, device="cpu")
            middle = (grid[:-1].double() + grid[1:].double()) / 2
            odd = torch.arange(len(middle), device="cpu") % 2 == 1
            goes_up = (middle.float() > middle) | ((middle.float() == middle) & odd)
            thresholds = torch.where(goes_up, middle.float(), middle.float().nextafter(torch.tensor(torch.inf)))
            self._tables[device] = grid.to(device), thresholds.to(device)
        return self._tables[device]

    def index(self, a: Tensor, noise: Tensor | None) -> Tensor:
        grid, thresholds = self._on(a.device)
        if noise is None:
            return torch.searchsorted(thresholds, a.contiguous(), right=True, out_int32=True)
        a = a.clamp(max=self.values[-1]).contiguous()
        low = (torch.searchsorted(grid, a, right=True) - 1).clamp(min=0, max=max(len(self.values) - 2, 0))
        high = (low + 1).clamp(max=len(self.values) - 1)
        fraction = (a - grid[low]) / (grid[high] - grid[low])
        return (low + (noise < fraction)).to(torch.int32)

    def round(self, a: Tensor, noise: Tensor | None) -> Tensor:
        a = a.clamp(max=self.values[-1])
        return self.value(self.index(a, noise)).add_(a - a)  # NaN stays NaN

    def value(self, index: Tensor) -> Tensor:
        last = len(self.values) - 1  # NaN sorts behind every value
        flat = index.to(torch.int32).clamp_(max=last).flatten()
        value = self._on(index.device)[0].index_select(0, flat).view(index.shape)
        return value.masked_fill_(index > last, torch.nan)


def grid_of(values: tuple[float, ...]) -> Grid:
    """The fastest grid that is exactly this ascending list."""
    n, step = len(values), values[1] - values[0] if len(values) > 1 else 1.0
    if math.frexp(step)[0] == 0.5 and all(v == values[0] + i * step for i, v in enumerate(values)):
        return Uniform(values[0], step, n)
    if values[0] == 0:
        mantissa_bits = next((i for i in range(n - 1) if values[i + 1] - values[i] > step), n).bit_length() - 2
        grid = Minifloat(mantissa_bits, round(math.log2(step)) + mantissa_bits, values[-1], n)
        fits = grid.min_exponent == -126 or n <= 2 ** (5 + mantissa_bits)
        if fits and torch.equal(grid.value(torch.arange(n, device="cpu")).double(), torch.tensor(values).double()):
            return grid
    return Listed(values)
