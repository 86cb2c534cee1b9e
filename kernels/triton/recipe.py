"""Recipe: a format as the kernels take it, compile-time constants; and which formats they do not know, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowprec.numerics.format import Format
from lowprec.numerics.rounding import Minifloat

SCALE_TYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}


class Recipe(NamedTuple):
    """A format as the kernels take it; constants are computed in fp64 and rounded once to fp32."""

    element: str
    bits: int
    mantissa: int
    least: int  # exponent of the least normal number
    largest: float
    max_exponent: int
    free: int
    con: int
    span: str  # who shares a stored scale: "block", "row" or "tensor"
    scale: str
    rounding: str
    zero: str
    target: float
    inverse_target: float
    unit: float  # tensor_max * target
    inverse_guard: float


def refuse(format: Format) -> str | None:
    """Why the kernels do not know a format, or None."""
    element = format.element_type
    grid = element._grid
    if not isinstance(grid, Minifloat) or not element.signed or element.bits not in (4, 6, 8):
        return f"format {format.name}: the Triton kernels know signed minifloats of 4, 6 and 8 bits, not {element.name}"
    if format.rule != "absmax" or len(format.targets) > 1 or format.second:
        return f"format {format.name}: this kernel knows one candidate a block, sized by its maximum"
    if format.scale not in ("e4m3", "e8m0", "fp32", "pow2") or format.tensor_scale not in (False, True):
        return f"format {format.name}: the Triton kernels know e4m3 scales under one tensor scale, e8m0, fp32 and pow2"
    free, con = format.block
    if format.block in ((0, 0), (1, 0)):
        return None if format.scale in ("fp32", "pow2") else f"format {format.name}: {format.scale} needs small blocks"
    if free not in (1, 16, 32, 64, 128) or con not in (16, 32, 64, 128):
        return f"format {format.name}: blocks must be 1 or 16..128 by 16..128, powers of two, got {list(format.block)}"
    return None


def recipe_of(format: Format) -> Recipe:
    """Raises ValueError where `refuse` has a reason."""
    reason = refuse(format)
    if reason:
        raise ValueError(reason + ".")
    element, grid = format.element_type, format.element_type._grid
    assert isinstance(grid, Minifloat)
    free, con = format.block
    guard = 1.0 if format.scale == "e8m0" else format.guard
    target = (format.targets or (element.max,))[0] / guard
    default = {"e8m0": "rceil", "e4m3": "nearest"}.get(format.scale, "")
    inverse_guard = 1.0 / format.guard if format.scale == "e8m0" else 1.0
    return Recipe(
        element.name, 4 if element.bits == 4 else 8 if element.bits == 8 else 6, grid.mantissa_bits, grid.min_exponent,
        element.max, element.max_exponent, free if con else 1, con or 16, "block" if con else format.amax_of or "block",
        format.scale, format.scale_rounding or default, format.zero, _fp32(target), _fp32(1.0 / target),
        _fp32(format.tensor_max * target), _fp32(inverse_guard),
    )  # fmt: skip


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))
