"""Quantise and dequantise on any CPU, in C++: every :class:`~lowprec.numerics.Format` whose grid is regular.

The definition is ``Format.quantize(x, noise).dequantize()``, some forty passes of torch over a matrix. Here it is one
or two passes over memory (two where a scale spans more than a tile), with the same bits: codes, scales, values, the
sign of zero, NaN for blocks that hold NaN or infinity. The kernel makes the random bits of
:mod:`lowprec.numerics.stream` itself.

The same source serves vectors of 4, 8 and 16 floats, so any CPU with a C++ compiler: :file:`qdq_simd.h`. It is compiled
at the first use, into the cache of :mod:`~lowprec.kernels.cpu.build`.

A matrix is taken as it lies in memory, also a transposed view, and the result keeps that layout.

>>> y = quantize_dequantize(x, FORMATS["nvfp4"])                                        # nearest
>>> y = quantize_dequantize(x, FORMATS["nvfp4"], random=(stream, "dgrad.dy"))           # stochastic
"""

from __future__ import annotations

import ctypes
import math
import platform
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.kernels.cpu.build import Unavailable, build
from lowprec.numerics import ELEMENTS, Element, Format, QTensor, Stream, Window
from lowprec.numerics import scale as rules

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
LINK = ("-fopenmp", "-fPIC", "-shared")
DTYPES = (torch.float32, torch.bfloat16)
SCALE_RULES = {
    ("none", None): 0, ("fp32", None): 1, ("pow2", None): 2,
    ("e8m0", "rceil"): 3, ("e8m0", "floor"): 4, ("e8m0", "ceil"): 5, ("e8m0", "even"): 6,
    ("e4m3", "nearest"): 7, ("e4m3", "te_2_14"): 7, ("ue5m3", "nearest"): 8, ("ue5m3", "te_2_14"): 8,
}  # fmt: skip
DEFAULT_ROUNDING = {"e8m0": "rceil", "e4m3": "nearest", "ue5m3": "nearest"}
ZEROS = {"keep": 0, "one": 1, "min": 2}
MAX_TARGETS = 4
VECTOR, TILE, LARGEST_BLOCK, LARGEST_ROTATION = 16, 4096, 1024, 128
OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _struct(name: str, **fields: object) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_i32, _i64, _f32, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Element = _struct(
    "Element", min_exponent=_i32, mantissa=_i32, bits=_i32, twos_complement=_i32, masked=_i32, max=_f32, offset=_f32
)
_Scale = _struct(
    "ScaleArgs", rule=_i32, te_2_14=_i32, zero=_i32, max_exponent=_i32, mantissa_bits=_i32, has_zero=_i32, targets=_i32,
    absolute=_i32, element_max=_f32, largest_target=_f32, inverse_guard=_f32, input_max=_f32, unit=_f32,
    target=_f32 * MAX_TARGETS, inverse_target=_f32 * MAX_TARGETS, target_ratio=_f32 * MAX_TARGETS,
)  # fmt: skip
_Rotation = _struct("Rotation", size=_i32, axis=_i32, factors=_ptr)
_Philox = _struct("Philox", key=ctypes.c_uint32 * 2, counter=ctypes.c_uint32 * 2)
_Place = _struct("Place", rows=_ptr, columns=_i64, first_column=_i64)
_Grid = _struct("Grid", data=_ptr, rows=_i64, columns=_i64, stride=_i64)
_Job = _struct(
    "Job", x=_ptr, out=_ptr, rows=_i64, columns=_i64, block_rows=_i64, block_columns=_i64, tile_rows=_i64,
    tile_columns=_i64, bf16=_i32, output=_i32, size_given=_i32, apply_scale=_i32, apply_level=_i32, join_level=_i32,
    stochastic=_i32, contracted=_i32, threads=_i32, element=_Element, scale=_Scale, rotation=_Rotation, philox=_Philox,
    place=_Place, sizes=_Grid, scales=_Grid, encode=_Grid, level=_Grid, whole=_Grid,
)  # fmt: skip
_Matrix = _struct("Matrix", data=_ptr, rows=_i64, row=_i64, step=_i64)
_Product = _struct(
    "Product", a=_Matrix, b=_Matrix, out=_ptr, scale_a=_ptr, scale_b=_ptr, k=_i64, scale_a_step=_i64, scale_b_step=_i64,
    threads=_i32,
)  # fmt: skip


@lru_cache(maxsize=64)
def grid(element: Element) -> tuple[int, int, float, bool] | None:
    """(smallest normal exponent, mantissa bits, offset, masked) that generate an element's values, or None."""
    values = element.values
    if not element.signed or (len(values) < 2 and values[0] == 0):
        return None
    offset = values[0]
    if offset not in (0.0, 0.5):
        return None
    if element.max > 2.0**100:  # fp32's own exponents
        mantissa = len(values).bit_length() - 8
        return (-126, mantissa, 0.0, True) if 0 <= mantissa <= 7 and values[1] == 2.0 ** (-126 - mantissa) else None
    step = values[1] - values[0] if len(values) > 1 else 1.0
    uniform = next((i for i in range(1, len(values)) if values[i] != offset + i * step), len(values))
    mantissa = (uniform - 1).bit_length() - 2 if uniform < len(values) else max(1, (uniform - 1).bit_length())
    exponent = round(math.log2(step)) + mantissa
    made, low = [offset + step * i for i in range(2**mantissa)], 2.0**exponent
    while made[-1] < element.max and mantissa <= 7:
        made += [offset + low * (1 + i / 2**mantissa) for i in range(2**mantissa)]
        low *= 2
    made = made[: len(values)]
    return (exponent, mantissa, offset, False) if tuple(made) == values and mantissa <= 7 else None


def refuses(format: Format) -> str | None:
    """Why the kernels cannot quantise to a format, or None."""
    if grid(ELEMENTS[format.element]) is None:
        return f"element {format.element} is not evenly spaced inside its binades"
    if format.second is not None:
        return f"format {format.name} chooses between two elements"
    free, contracted = format.block
    if len(format.targets) > 1 and (
        len(format.targets) > MAX_TARGETS or not free * contracted or free & (free - 1) or contracted & (contracted - 1)
        or ELEMENTS[format.element].max > 2.0**100
    ):  # fmt: skip
        return f"format {format.name} chooses between targets in blocks that are no powers of two"
    if max(format.block) > LARGEST_BLOCK or format.block[0] * format.block[1] > 4 * TILE:
        return f"blocks of {format.block[0]} x {format.block[1]} are larger than a tile"
    return None


@lru_cache(maxsize=4)
def load(march: str = "native") -> tuple[ctypes.CDLL | None, str]:
    """The library compiled for ``-march=march``, or None and the sentence why there is none; tried once."""
    try:
        target = () if march == "native" and not _march_native() else (f"-march={march}",)
        library = ctypes.CDLL(str(build("qdq.cpp", (*FLAGS, *target, *LINK), (), "qdq*.h")))
    except (Unavailable, OSError) as error:
        return None, str(error)
    library.lowprec_qdq_size.restype = ctypes.c_float
    return library, ""


def _march_native() -> bool:
    return platform.machine() in ("x86_64", "AMD64", "aarch64")


def layout(x: Tensor) -> tuple[Tensor, bool]:
    """x (rows, k) as a matrix that is contiguous in memory, and whether that is its transpose."""
    if x.stride(0) < x.stride(1) and x.T.is_contiguous():
        return x.T, True
    return x.contiguous(), False


@dataclass(frozen=True)
class Result:
    """What a matrix (rows, k) became.

    Attributes:
        values: (rows, k) in the memory layout of the source: fp32 or bf16 values, or uint8 codes.
        scales: (R, C) fp32, the block scales; (0, 0) where they were not to be kept.
        level: fp32, the tensor scale as in ``QTensor.tensor_scale``; None where the format has none.
    """

    values: Tensor
    scales: Tensor
    level: Tensor | None


class _Call:
    """One matrix on its way through the kernels: fills in a ``Job`` (qdq_tile.h) and keeps alive what it points to."""

    def __init__(self, x: Tensor, format: Format, factors: Tensor | None, march: str) -> None:
        library, reason = load(march)
        if library is None:
            raise RuntimeError(reason)
        self.compiled, self.x, self.format, self.job = library, x, format, _Job()
        self.memory, self.transposed = layout(x)
        self.keep: list[Tensor] = [self.memory]
        job, element = self.job, format.element_type
        job.x, (job.rows, job.columns) = self.memory.data_ptr(), self.memory.shape
        job.bf16, job.threads = x.dtype == torch.bfloat16, torch.get_num_threads()
        job.contracted = 0 if self.transposed else 1
        if factors is not None:
            self.keep.append(factors)
            job.rotation = _Rotation(factors.numel(), 0 if self.transposed else 1, factors.data_ptr())
        fit = grid(element)
        assert fit is not None, element.name
        exponent, mantissa, offset, masked = fit
        job.element = _Element(exponent, mantissa, element.bits, element.twos_complement, masked, element.max, offset)

    def _blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        """Set the blocks, and tiles of about TILE elements that hold whole blocks and rotations; blocks in the memory's
        orientation."""
        job, rotation = self.job, self.job.rotation
        down, along = block[::-1] if self.transposed else block
        rows = math.lcm(down or 1, rotation.size if rotation.size and rotation.axis == 0 else 1)
        columns = math.lcm(along or 1, VECTOR, rotation.size if rotation.size and rotation.axis == 1 else 1)
        if not down:
            rows *= max(1, 16 // rows)
        room = TILE // (4 if rows == 1 else rows) // columns
        columns *= max(1, min(-(-job.columns // columns), room))
        job.block_rows, job.block_columns, job.tile_rows, job.tile_columns = down, along, rows, columns
        return down, along

    def _new_grid(self, block: tuple[int, int], fill: float = 0.0) -> tuple[Tensor, ctypes.Structure]:
        """One number a block, as a tensor in the format's orientation and for the kernel."""
        down, along = block[::-1] if self.transposed else block
        rows, columns = self.memory.shape
        t = torch.full((-(-rows // (down or rows)), -(-columns // (along or columns))), fill)
        return (t.T if self.transposed else t), _Grid(t.data_ptr(), down, along, t.shape[1])

    def _grid(self, numbers: Tensor, block: tuple[int, int]) -> ctypes.Structure:
        """The numbers of a grid (R, C), in the format's orientation, for the kernel."""
        t, grid = self._new_grid(block)
        t.copy_(numbers)
        self.keep.append(t)
        return grid

    def sizes(self, block: tuple[int, int]) -> Tensor:
        """Largest magnitude of every block (0 = the whole axis), (R, C) fp32; NaN where one is not finite."""
        if block == (0, 0) and not self.job.rotation.size:
            return torch.full((1, 1), self.compiled.lowprec_qdq_size(ctypes.byref(self.job)))
        sizes, self.job.sizes = self._new_grid(block)
        self._blocks(block)
        self.compiled.lowprec_qdq_sizes(ctypes.byref(self.job))
        return sizes

    def prepare(self, amax: Tensor | None) -> Tensor | None:
        """Fill in the scale rule, the sizes no tile can measure and the tensor level; returns the tensor scale."""
        f, job = self.format, self.job
        element, rounding = f.element_type, f.scale_rounding or DEFAULT_ROUNDING.get(f.scale)
        guard = 1.0 if f.scale == "e8m0" else f.guard
        targets = [t / guard for t in f.targets or (element.max,)]
        pad = (1.0,) * (MAX_TARGETS - len(targets))
        job.scale = _Scale(
            SCALE_RULES[f.scale, rounding], rounding == "te_2_14", ZEROS[f.zero], element.max_exponent,
            element.mantissa_bits, element.values[0] == 0, len(targets), f.select == "mae", element.max, max(targets),
            1.0 / f.guard if f.scale == "e8m0" else 1.0, torch.finfo(self.x.dtype).max, f.tensor_max * max(targets),
            (*targets, *pad), (*(1.0 / t for t in targets), *pad), (*(max(targets) / t for t in targets), *pad),
        )  # fmt: skip
        sizes = self._statistic() if f.rule != "absmax" else self.sizes(f.block) if 0 in f.block else None
        level = self._level(sizes, amax, f.tensor_max * max(targets))
        if sizes is not None:
            if amax is not None and not f.tensor_scale:
                sizes = torch.where(sizes.isnan(), sizes, amax.float().reshape(-1, 1))
            job.size_given, job.sizes = True, self._grid(sizes, f.block)
        self._blocks(f.block)
        return level

    def _statistic(self) -> Tensor:
        """Sizes (R, C) under another rule than absmax, by torch."""
        (free, contracted), (rows, k) = self.format.block, self.x.shape
        free, contracted = free or rows, contracted or k
        padded = F.pad(self.x.float(), (0, -k % contracted, 0, -rows % free))
        blocks = padded.unflatten(1, (-1, contracted)).unflatten(0, (-1, free))
        return rules.block_size(blocks, self.format.rule, self.format.coef)

    def _level(self, sizes: Tensor | None, amax: Tensor | None, unit: float) -> Tensor | None:
        f, job = self.format, self.job
        if not f.tensor_scale:
            if f.scale != "e8m0" or f.guard == 1:
                return None
            job.level = self._grid(torch.full((1, 1), f.guard), (0, 0))
            return torch.full((), f.guard)
        spans: dict[bool | str | int, tuple[int, int]] = {True: (0, 0), "row": (1, 0), 128: (1, 128)}
        block = spans[f.tensor_scale]
        if amax is not None:
            whole = amax.float().reshape(-1, 1)
        elif sizes is None:
            whole = self.sizes(block)
        else:
            per = 128 // f.block[1] if f.tensor_scale == 128 else sizes.shape[1]
            whole = F.pad(sizes, (0, -sizes.shape[1] % per)).unflatten(1, (-1, per)).amax(2)
            whole = whole.amax().reshape(1, 1) if f.tensor_scale is True else whole
        whole = torch.where(whole.isfinite(), whole, torch.nan)
        encode, level = rules.encode_scale(whole, unit)
        job.whole = self._grid(whole, block)
        job.encode, job.level = self._grid(encode, block), self._grid(level, block)
        return level.reshape(()) if block == (0, 0) else level

    def draw(self, stream: Stream, key: str, window: Window | None) -> None:
        """Round stochastically, with the noise of this matrix or, given a window of its memory, of a larger one."""
        job = self.job
        job.stochastic = True
        job.philox.key[:] = stream.key(key)
        job.philox.counter[:] = (stream.step & 0xFFFFFFFF, stream.micro & 0xFFFFFFFF)
        job.place = _Place(None, job.columns, 0)
        if window is not None:
            job.place = _Place(None, window.shape[1], window.first_column)
            if window.rows is not None:
                assert window.rows.numel() == job.rows, (window.rows.shape, job.rows)
                self.keep.append(window.rows.contiguous())
                job.place.rows = self.keep[-1].data_ptr()

    def run(self, out: Tensor, block_scale: bool, level: bool | str, keep_scales: bool) -> Tensor:
        """Quantise into ``out`` (the memory's shape): values with or without scales, or codes. Returns block scales."""
        job, scales = self.job, torch.empty(0, 0)
        if keep_scales:
            scales, job.scales = self._new_grid(self.format.block)
        job.out, job.output = out.data_ptr(), OUTPUTS[out.dtype]
        job.apply_scale, job.apply_level, job.join_level = block_scale, bool(level), level == "join"
        self.compiled.lowprec_qdq(ctypes.byref(job))
        return scales


def run(
    x: Tensor,
    format: Format,
    dtype: torch.dtype,
    random: tuple[Stream, str] | None = None,
    amax: Tensor | None = None,
    factors: Tensor | None = None,
    block_scale: bool = True,
    level: bool | str = True,
    out: Tensor | None = None,
    keep_scales: bool = True,
    march: str = "native",
    window: Window | None = None,
) -> Result:
    """Quantise a matrix; the general form of the functions below.

    Args:
        x: (rows, k), bf16 or fp32, contiguous or a transposed view.
        format: one that :func:`refuses` lets pass.
        dtype: of the result: fp32 or bf16 for values, uint8 for codes.
        random: stream and key of the random bits of stochastic rounding, or None for nearest. Bits are indexed by the
            position in memory.
        amax: () or (rows, 1) fp32, the maximum to use instead of the tensor's, or the rows', own.
        factors: (n,) fp32, sign * n ** -0.5, to rotate blocks of n along k first; n a power of two to 128 that divides
            k, under rule absmax only.
        block_scale: multiply values by their block scales. level: ... then by the tensor scale too; "join": by the
            product of the two scales.
        out: where to write; x's memory layout and the right dtype.
        keep_scales: return the block scales too, which costs memory.
        march: instruction set to compile for.
        window: where x lies in the matrix whose noise it draws, both as they lie in memory; None = it is all.
    """
    assert factors is None or format.rule == "absmax", format.name
    call = _Call(x, format, factors, march)
    made = call.prepare(amax)
    out = torch.empty(call.memory.shape, dtype=dtype) if out is None else layout(out)[0]
    assert out.shape == call.memory.shape and out.dtype == dtype, (out.shape, out.dtype)
    if random is not None:
        call.draw(*random, window)
    scales = call.run(out, block_scale, level if made is not None else False, keep_scales)
    return Result(out.T if call.transposed else out, scales, made)


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, march: str = "native") -> Tensor | None:
    """``a b^T * scale_a * scale_b^T`` of bf16 operands with fp32 sums and an fp32 result; None on a CPU without such an
    instruction.

    Args:
        a, b: (m, k), (n, k) bf16; each contiguous or a transposed view.
        scale_a, scale_b: fp32, one number or one a row.
    """
    library, reason = load(march)
    if library is None:
        raise RuntimeError(reason)
    if not library.lowprec_qdq_has_product():
        return None
    out = torch.empty(a.shape[0], b.shape[0])
    a, b = (layout(t)[0].T if layout(t)[1] else layout(t)[0] for t in (a, b))
    scales = [t.contiguous() for t in (scale_a, scale_b)]
    job = _Product(
        *(_Matrix(t.data_ptr(), t.shape[0], *t.stride()) for t in (a, b)), out.data_ptr(),
        *(t.data_ptr() for t in scales), a.shape[1], *(t.numel() > 1 for t in scales), torch.get_num_threads(),
    )  # fmt: skip
    library.lowprec_qdq_product(ctypes.byref(job))
    return out


def quantize_dequantize(
    x: Tensor,
    format: Format,
    random: tuple[Stream, str] | None = None,
    amax: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``format.quantize(x, noise, amax).dequantize(dtype)``, bit for bit, as fast as memory allows.

    Args:
        x: (rows, k), bf16 or fp32, on the CPU.
        format: any that :func:`refuses` lets pass.
        random: (stream, key): stochastic rounding with ``stream.noise(key, ...)``; None rounds to nearest.
        amax: () fp32, the maximum to use instead of the tensor's own.
        dtype: of the result; x's by default.
        out: where to write it.

    Returns:
        (rows, k), in the memory layout of x.

    Raises:
        ValueError: where the kernels cannot serve: another dtype or device, or a format they refuse.
        RuntimeError: if the library cannot be built; the sentence says why.
    """
    dtype = dtype or x.dtype
    _check(x, format, dtype)
    return run(x, format, dtype, random, amax, out=out, keep_scales=False).values


def quantize(
    x: Tensor, format: Format, random: tuple[Stream, str] | None = None, amax: Tensor | None = None
) -> QTensor:
    """``format.quantize(x, noise, amax)``, bit for bit: real codes and scales. Arguments and errors as above."""
    _check(x, format, x.dtype)
    if format.bits > 8:
        raise ValueError(f"{format.name} has codes of {format.bits} bits; the kernels write bytes")
    q = run(x, format, torch.uint8, random, amax)
    return QTensor(q.values.contiguous(), rules.store(q.scales.contiguous(), format.scale), q.level, format)


def _check(x: Tensor, format: Format, dtype: torch.dtype) -> None:
    reason = refuses(format)
    if x.dim() != 2 or not x.numel() or x.device.type != "cpu" or x.dtype not in DTYPES or dtype not in DTYPES:
        reason = f"a matrix of {x.dtype} on {x.device.type} of shape {tuple(x.shape)} to {dtype}: it wants bf16 or fp32"
    if reason:
        raise ValueError(f"the C++ kernels cannot quantise: {reason}; use Format.quantize")
