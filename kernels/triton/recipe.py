"""Recipe: a format as the kernels take it, compile-time constants; and which formats they do not know, and why."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lowprec.numerics.element import ELEMENTS, Element
from lowprec.numerics.format import Format
from lowprec.numerics.rounding import Listed, Minifloat, Uniform

SCALE_TYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "ue5m3": torch.uint8}
TWO_LEVEL = ("e4m3", "ue5m3")


class Recipe(NamedTuple):
    """A format as the kernels take it; constants are computed in fp64 and rounded once to fp32."""

    element: str
    bits: int  # 4, 6 or 8; four are stored in half a byte
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
    target: float  # the largest of the targets
    inverse_target: float
    unit: float  # tensor_max * target
    inverse_guard: float
    twos: bool  # negative codes are two's complements, else sign and magnitude
    code_bits: int  # of a code, its sign included
    tensor: str  # who shares a tensor scale: "", "tensor", "row" or "128"
    targets: tuple[tuple[float, float, float], ...]  # what the maximum may map to: target, 1 / target, largest / target
    select: str
    second: bool  # blocks may choose the integers times 6/7
    thresholds: tuple[float, ...]  # of the second element: magnitude i + 1 begins at thresholds[i]
    numbers: tuple[float, ...]  # its magnitudes
    candidates: int  # how many scales a block chooses from


def _minifloat(element: Element) -> tuple[int, int] | None:
    """Mantissa bits and least exponent.  Integers are the subnormals and the first binade of a minifloat."""
    grid = element._grid
    if isinstance(grid, Minifloat):
        return grid.mantissa_bits, grid.min_exponent
    if isinstance(grid, Uniform) and not grid.offset and grid.count & (grid.count - 1) == 0:
        mantissa = grid.count.bit_length() - 2
        return mantissa, round(math.log2(grid.step)) + mantissa
    return None


def refuse(format: Format) -> str | None:
    """Why the kernels do not know a format, or None."""
    name, element, (free, con) = format.name, format.element_type, format.block
    if _minifloat(element) is None or not element.signed or element.bits > 8:
        return f"format {name}: the Triton kernels know signed minifloats and integers up to 8 bits, not {element.name}"
    if format.rule != "absmax":
        return f"format {name}: the Triton kernels size blocks by their maximum, and know no {format.rule}"
    if format.scale == "none":
        return f"format {name}: without scales there is nothing to pack; the Triton kernels need a scale"
    if format.second and (element.bits != 4 or not isinstance(ELEMENTS[format.second]._grid, Listed)):
        return f"format {name}: as a second element beside one of 4 bits the kernels know if4_int, not {format.second}"
    if format.block in ((0, 0), (1, 0)):
        if format.scale not in ("fp32", "pow2"):
            return f"format {name}: the Triton kernels know {format.scale} scales of small blocks only"
        if len(format.targets) > 1:
            return f"format {name}: the Triton kernels choose between targets in small blocks only"
        return None
    if free not in (1, 16, 32, 64, 128) or con not in (16, 32, 64, 128):
        return f"format {name}: blocks must be 1 or 16..128 by 16..128, powers of two, got {list(format.block)}"
    return None


def recipe_of(format: Format) -> Recipe:
    """Raises ValueError where `refuse` has a reason."""
    reason = refuse(format)
    if reason:
        raise ValueError(reason + ".")
    element, shape = format.element_type, _minifloat(format.element_type)
    assert shape is not None
    free, con = format.block
    guard = 1.0 if format.scale == "e8m0" else format.guard
    targets = tuple(target / guard for target in format.targets or (element.max,))
    largest = max(targets)
    default = {"e8m0": "rceil", "e4m3": "nearest", "ue5m3": "nearest"}.get(format.scale, "")
    inverse_guard = 1.0 / format.guard if format.scale == "e8m0" else 1.0
    tensor = "tensor" if format.tensor_scale is True else str(format.tensor_scale or "")
    thresholds: tuple[float, ...] = ()
    numbers: tuple[float, ...] = ()
    if format.second:
        grid = ELEMENTS[format.second]._grid
        assert isinstance(grid, Listed)
        numbers, thresholds = grid.values, tuple(grid._on(torch.device("cpu"))[1].tolist())
    return Recipe(
        element.name, 4 if element.bits <= 4 else 6 if element.bits == 6 and not element.twos_complement else 8, *shape,
        element.max, element.max_exponent, free if con else 1, con or 16, "block" if con else format.amax_of or "block",
        format.scale, format.scale_rounding or default, format.zero, _fp32(largest), _fp32(1.0 / largest),
        _fp32(format.tensor_max * largest), _fp32(inverse_guard), element.twos_complement, element.bits, tensor,
        tuple((_fp32(t), _fp32(1.0 / t), _fp32(largest / t)) for t in targets), format.select, bool(format.second),
        thresholds, numbers, len(targets) * (2 if format.second else 1),
    )  # fmt: skip


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))
