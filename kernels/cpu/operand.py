"""Operands on their way into C++: what :class:`~lowprec.numerics.Format` says, as the structures of :file:`*.h`.

An operand is stored as int8 codes where its values are small integers times a power of two (FP4, E2M3, INT8, ternary,
mid-rise up to seven bits), else as bf16 values (FP8, E3M2, masked mantissas, what is not quantised), which hold every
element exactly. Constants are computed in fp64 and rounded once to fp32, as :mod:`lowprec.numerics.scale` does.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowprec.numerics import ELEMENTS, Element, Format

INPUT_MAX = {torch.float32: torch.finfo(torch.float32).max, torch.bfloat16: torch.finfo(torch.bfloat16).max}
SCALE_KINDS = {"fp32": 0, "pow2": 1, "e4m3": 2, "ue5m3": 3, "e8m0": 4, "none": 5}
SCALE_ROUNDINGS = {"nearest": 0, "te_2_14": 1, "rceil": 2, "floor": 3, "ceil": 4, "even": 5}
ZEROS = {"keep": 0, "one": 1, "min": 2}
MODES = {"nearest": 0, "stochastic": 1, "ms_eden": 2}
MINIFLOAT, MIDRISE, MASKED, ANY = range(4)
NIBBLES, BYTES, MINIFLOATS, AS_PACKED = range(4)
LARGEST_TILE = 128  # contracted elements that are in registers and first-level cache together


class ElementArgs(ctypes.Structure):
    """``Element`` of simd.h."""

    _fields_ = (*((name, ctypes.c_int32) for name in ("kind", "min_exponent", "mantissa")), ("max", ctypes.c_float))


class ScaleArgs(ctypes.Structure):
    """``ScaleArgs`` of scale.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "rounding", "zero", "level", "targets", "mae")),
        *((name, ctypes.c_int32) for name in ("mantissa", "max_exponent", "has_zero")),
        *((name, ctypes.c_float) for name in ("element_max", "input_max")),
        *((name, ctypes.c_float * 2) for name in ("target", "inverse_target")),
        ("largest_target", ctypes.c_float),
        ("target_ratio", ctypes.c_float * 2),
        *((name, ctypes.c_float) for name in ("unit", "guard", "inverse_guard")),
    )


class PlaceArgs(ctypes.Structure):
    """``Place`` of tile.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("all_rows", "columns", "first_column")),
    )


class OperandArgs(ctypes.Structure):
    """``OperandArgs`` of operand.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "sizes", "amax")),
        ("factors", ctypes.c_void_p * 2),
        *((name, ctypes.c_int64) for name in ("free_size", "k", "free_block", "k_block")),
        *((name, ctypes.c_int32) for name in ("bf16", "contiguous_k", "mode", "group", "rotation", "rounds")),
        *((name, ctypes.c_int32) for name in ("threads", "int8", "biased", "may_fold")),
        ("element", ElementArgs),
        ("code_scale", ctypes.c_float),
        ("scale", ScaleArgs),
        *((name, ctypes.c_uint32 * 2) for name in ("key", "scale_key", "counter")),
        ("place", PlaceArgs),
    )


class PackedArgs(ctypes.Structure):
    """``Packed`` of packed.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "block_scales", "starts", "outer")),
        *((name, ctypes.c_int64) for name in ("free_size", "k", "block", "block_size")),
        *((name, ctypes.c_int32) for name in ("int8", "biased", "uniform", "scale_bits", "low", "high")),
        *((name, ctypes.c_float) for name in ("code_scale", "code_max", "tensor_scale")),
    )


class CodesArgs(ctypes.Structure):
    """``CodesArgs`` of codes.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("codes", "values", "scales", "outer")), ("few", ctypes.c_int32))


class StoreArgs(ctypes.Structure):
    """``StoreArgs`` of stored.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        *((name, ctypes.c_int32) for name in ("kind", "min_exponent", "mantissa", "scales_bf16")),
        *((name, ctypes.c_int8 * 16) for name in ("to_index", "to_code")),
    )


@dataclass(frozen=True, eq=False)
class PackedOperand:
    """A prepared operand. It owns its memory, never changes, and may be multiplied any number of times.

    Attributes:
        rows, k: its shape.
        memory: uint8, everything the products read.
        args: where in the memory things lie.
        by_row: whether each row has a tensor scale of its own.
        element: of its format; None if it is not quantised.
    """

    rows: int
    k: int
    memory: Tensor
    args: PackedArgs
    by_row: bool
    element: str | None

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.memory.numel()

    def outer(self) -> Tensor:
        """The tensor scale of every row, as bytes: (4 rows,) uint8, a view of the memory."""
        first = self.args.outer - self.memory.data_ptr()
        return self.memory[first : first + 4 * self.rows]

    @property
    def tensor_scale(self) -> Tensor:
        """fp32, () or (rows, 1)."""
        if not self.by_row:
            return torch.tensor(self.args.tensor_scale)
        return self.outer().view(torch.float32)[:, None].clone()


@dataclass(frozen=True, eq=False)
class StoredOperand:
    """A prepared operand in little memory: what :attr:`packed` was, but for its memory.

    Attributes:
        memory: uint8: codes, scales, tensor scales.
        args: where they lie, and how they are coded.
        packed: the operand without memory.
    """

    memory: Tensor
    args: StoreArgs
    packed: PackedOperand

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.memory.numel()


@lru_cache(maxsize=64)
def element_args(name: str) -> tuple[int, int, int]:
    """(kind, smallest normal exponent, mantissa bits) of an element: the grid that generates its values."""
    values = ELEMENTS[name].values
    n, step = len(values), values[1] - values[0] if len(values) > 1 else 1.0
    exponent = round(math.log2(step))
    if all(value == values[0] + i * step for i, value in enumerate(values)):
        mantissa = max(0, (n - 1).bit_length() - 1)
        return (MIDRISE if values[0] else MINIFLOAT), exponent + mantissa, mantissa
    mantissa = next(i for i in range(n - 1) if values[i + 1] - values[i] > step).bit_length() - 2
    return (MASKED if exponent + mantissa == -126 else MINIFLOAT), exponent + mantissa, mantissa


@lru_cache(maxsize=64)
def code_scale(name: str) -> float | None:
    """The power of two that turns an element's values into integers of at most 127, or None."""
    values = ELEMENTS[name].values
    for scale in (1.0, 2.0, 4.0, 8.0):
        if values[-1] * scale <= 127 and all((value * scale).is_integer() for value in values):
            return scale
    return None


@lru_cache(maxsize=64)
def code_values(name: str) -> Tensor:
    """What each of 256 codes of an element stands for, fp32."""
    return ELEMENTS[name].decode(torch.arange(256, dtype=torch.uint8, device="cpu")).contiguous()


def refuse_operand(format: Format | None, rounding: str, group: int, dtype: torch.dtype) -> str | None:
    """Why an operand cannot be prepared, or None."""
    if format is None:
        return None if dtype == torch.bfloat16 else f"an operand that is not quantised must be bfloat16, not {dtype}"
    if format.second is not None:
        return f"format {format.name} chooses between two elements; the kernels know one"
    free, contracted = format.block
    if contracted % 16 or contracted & (contracted - 1):
        return f"format {format.name} has blocks of {contracted} along k; the kernels know powers of two from 16, and 0"
    if free > 1 and free % 16:
        return f"format {format.name} has blocks of {free} along the free axis; the kernels know 0, 1, multiples of 16"
    kind = element_args(format.element)[0]
    if rounding == "stochastic" and kind != MINIFLOAT:
        return f"element {format.element} is not rounded stochastically by the kernels"
    in_tile = 0 < contracted <= LARGEST_TILE and (free == 1 or format.block == (16, 16)) and format.rule == "absmax"
    if len(format.targets) > 1 and not (in_tile and len(format.targets) == 2):
        return f"format {format.name} chooses between targets; the kernels do so for two, in blocks 1xB or 16x16"
    whole_groups = group <= LARGEST_TILE and not group & (group - 1)
    if rounding == "ms_eden" and not (in_tile and free == 1 and format.scale in ("e4m3", "ue5m3") and whole_groups):
        return f"ms_eden of format {format.name}: the kernels know 1xB blocks with e4m3 or ue5m3 scales, groups to 128"
    return None


def fill_scale(args: ScaleArgs, format: Format, dtype: torch.dtype) -> None:
    """The constants of a format's scale rule."""
    element: Element = format.element_type
    guard = 1.0 if format.scale == "e8m0" else format.guard
    targets = [target / guard for target in format.targets or (element.max,)]
    rounding = format.scale_rounding or ("rceil" if format.scale == "e8m0" else "nearest")
    levels: dict[bool | str | int, int] = {"row": 2, 128: 3}
    args.kind, args.rounding, args.zero = SCALE_KINDS[format.scale], SCALE_ROUNDINGS[rounding], ZEROS[format.zero]
    args.level = int(format.tensor_scale) if isinstance(format.tensor_scale, bool) else levels[format.tensor_scale]
    args.targets, args.mae = len(targets), format.select == "mae"
    args.mantissa, args.max_exponent = element.mantissa_bits, element.max_exponent
    args.has_zero = element.values[0] == 0
    args.element_max, args.input_max, args.largest_target = element.max, INPUT_MAX[dtype], max(targets)
    for i, target in enumerate(targets):
        args.target[i], args.inverse_target[i], args.target_ratio[i] = target, 1.0 / target, max(targets) / target
    args.unit = format.tensor_max * max(targets)
    args.guard, args.inverse_guard = format.guard, 1.0 / format.guard


def empty_packed(rows: int, k: int, block: int, int8: bool, may_fold: bool) -> tuple[Tensor, PackedArgs]:
    """Memory for an operand (rows, k) with one scale per row and ``block``, and the places of its parts."""
    scales = rows * (k // block) * 4
    sizes = {
        "codes": rows * k * (1 if int8 else 2),
        "scales": rows * 4 if may_fold else 0,
        "block_scales": scales,
        "starts": scales if int8 else 0,
        "outer": rows * 4,
    }
    memory = torch.empty(sum(size + -size % 64 for size in sizes.values()), dtype=torch.uint8)
    args, at = PackedArgs(free_size=rows, k=k, block=block, block_size=block, int8=int8), memory.data_ptr()
    for name, size in sizes.items():
        setattr(args, name, at)
        at += size + -size % 64
    return memory, args


def store_args(packed: PackedArgs, element: str | None) -> tuple[StoreArgs, int]:
    """How a packed operand is stored, and the bits of a code."""
    bf16_scales = packed.scale_bits <= 8
    if element is None:
        return StoreArgs(kind=AS_PACKED, scales_bf16=bf16_scales), 16
    values = ELEMENTS[element].values
    kind, exponent, mantissa = element_args(element)
    args = StoreArgs(kind=AS_PACKED, min_exponent=exponent, mantissa=mantissa, scales_bf16=bf16_scales)
    if packed.int8 and len(values) <= 8:
        args.kind = NIBBLES
        for i, value in enumerate(values):
            code = round(value * packed.code_scale)
            args.to_index[code], args.to_code[i], args.to_code[8 + i] = i, code, -code
        return args, 4
    if packed.int8:
        args.kind = BYTES
    elif kind == MINIFLOAT and len(values) <= 128:
        args.kind = MINIFLOATS
    return args, 16 if args.kind == AS_PACKED else 8
