"""The host side of the kernels: which variant a chip gets, what is allocated, and what comes back.

    out = quantize(x, FORMATS["nvfp4"], columns=True)        # x (rows, k) on a GPU, or within `interpreted()`
    out.rows.qtensor(), out.columns.qtensor()                # equal to Format.quantize of x and of x.T

Codes are packed and padded with zeros to whole blocks along the contracted axis; scales lie in rows, or swizzled for
the tensor cores.  Below sm_100 E2M1 is rounded in integer arithmetic, from there on by ``cvt.rn``.  Stochastic rounding
draws the bits of a `Stream`, equal to the definition; ``hardware_noise`` instead asks for ``cvt.rs`` (sm_100 only) with
8 bits an element, byte ``e % 4`` of word ``e % 16 // 4`` of Philox group ``e // 16``, e the element's index in the
padded row-major output: unbiased, but not the definition's drawing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.numerics.format import Format
from lowprec.numerics.qtensor import QTensor
from lowprec.numerics.scale import encode_scale
from lowprec.numerics.stream import Stream

from .layout import swizzled_size, unswizzle
from .quantize import amax_kernel, quantize_kernel
from .recipe import SCALE_TYPES, Recipe, recipe_of


@dataclass(frozen=True)
class Quantized:
    """One direction of the output: int32 words of codes (rows, words), and scales as stored."""

    words: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: Format
    shape: tuple[int, int]
    swizzled: bool

    @property
    def packed(self) -> Tensor:
        """Codes as bytes, (rows, padded k / 2) for four bits, (rows, padded k) else."""
        return self.words.view(torch.uint8)

    def qtensor(self) -> QTensor:
        """Unpacked, the padding and the swizzle undone."""
        rows, k = self.shape
        codes = QTensor.unpack(self.packed, self.format)[:, :k].contiguous()
        scales = self.scales
        free, con = self.format.block
        if self.swizzled:
            scales = unswizzle(scales.view(torch.uint8), rows, -(-k // con))[::free].contiguous()
        if self.format.scale in SCALE_TYPES:
            scales = scales.view(SCALE_TYPES[self.format.scale])
        return QTensor(codes, scales, self.tensor_scale, self.format)


@dataclass(frozen=True)
class Both:
    """What was asked for of the two directions."""

    rows: Quantized | None
    columns: Quantized | None


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with; `args` are left at run time, `constants` are compiled in."""

    kernel: Any
    grid: tuple[int, int]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int

    def __call__(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, enable_fp_fusion=False)


def arch_of(x: Tensor) -> str:
    """ "sm_100" of a tensor on a GPU; on the CPU, where kernels are interpreted, the oldest: all in software."""
    if x.device.type != "cuda":
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def conversion(arch: str, recipe: Recipe, hardware_noise: bool) -> str:
    """ "software", "rn" or "rs": how a chip makes codes."""
    number = int(arch.removeprefix("sm_"))
    if hardware_noise:
        if number not in (100, 103) or recipe.element != "e2m1":
            raise ValueError(
                f"Hardware stochastic rounding needs E2M1 on sm_100 or sm_103, not {recipe.element} on {arch}."
            )
        return "rs"
    least = {"e2m1": 100, "e4m3": 89}.get(recipe.element)
    return "rn" if least and number >= least else "software"


def _memory(x: Tensor) -> tuple[Tensor, bool, int]:
    """x with a unit stride, whether that is the last axis's, and the other stride."""
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"Expected a matrix of fp32 or bf16, got {x.dtype} of shape {tuple(x.shape)}.")
    if x.numel() == 0:
        raise ValueError("An empty matrix has nothing to quantise.")
    if 1 not in x.stride():
        x = x.contiguous()
    along = x.stride(1) == 1 and not (x.stride(0) == 1 and x.shape[1] > 1 and x.shape[0] > 1)
    return (x, True, x.stride(0)) if along else (x, False, x.stride(1))


def amax_launch(x: Tensor, span: str) -> tuple[Launch, Tensor]:
    """The first pass and where it leaves the maxima: fp32, () or (rows,)."""
    x, along, pitch = _memory(x)
    rows, k = x.shape
    out = torch.zeros(1 if span == "tensor" else rows, dtype=torch.int32, device=x.device)
    tile = {"ROWS": 32, "COLUMNS": 128} if along else {"ROWS": 128, "COLUMNS": 32}
    grid = (-(-k // tile["COLUMNS"]), -(-rows // tile["ROWS"]))
    args = {"x_ptr": x, "amax_ptr": out, "rows": rows, "k": k, "pitch": pitch}
    amax = out.view(torch.float32)
    return Launch(amax_kernel, grid, args, {"ALONG": along, **tile, "SPAN": span}, 4 if along else 1), amax


def _output(shape: tuple[int, int], format: Format, recipe: Recipe, amax: Tensor | None, swizzle: bool,
            device: torch.device) -> Quantized:  # fmt: skip
    rows, k = shape
    padded = -(-k // recipe.con) * recipe.con
    words = torch.empty(rows, padded // (8 if recipe.bits == 4 else 4), dtype=torch.int32, device=device)
    columns, lines = -(-k // recipe.con), -(-rows // recipe.free)
    if swizzle:
        scales = torch.zeros(swizzled_size(rows, columns), dtype=torch.uint8, device=device)
    else:
        kind = torch.uint8 if format.scale in SCALE_TYPES else torch.float32
        size = {"block": (lines, columns), "row": (rows, 1), "tensor": (1, 1)}[recipe.span]
        scales = torch.empty(size, dtype=kind, device=device)
    level = None
    if format.tensor_scale:
        assert amax is not None
        whole = torch.where(amax[0].isfinite(), amax[0], torch.nan)
        level = encode_scale(whole, recipe.unit)[1]
    elif format.scale == "e8m0" and format.guard != 1:
        level = torch.full((), format.guard, device=device)
    return Quantized(words, scales, level, format, shape, swizzle)


def prepare(
    x: Tensor,
    format: Format,
    amax: Tensor | None,
    amax_t: Tensor | None,
    *,
    rows: bool = True,
    columns: bool = False,
    stream: Stream | None = None,
    roles: tuple[str, str] = ("rows", "columns"),
    hardware_noise: bool = False,
    swizzle: bool = False,
    arch: str | None = None,
) -> tuple[Launch, Both]:
    """The second (or only) pass, not yet started, and its outputs; the arguments are those of `quantize`."""
    recipe = recipe_of(format)
    x, along, pitch = _memory(x)
    if swizzle and recipe.scale not in SCALE_TYPES:
        raise ValueError(f"Format {format.name} has {format.scale} scales; only those of one byte are swizzled.")
    (n, k), convert = x.shape, conversion(arch or arch_of(x), recipe, hardware_noise)
    out = _output((n, k), format, recipe, amax, swizzle, x.device) if rows else None
    out_t = _output((k, n), format, recipe, amax_t, swizzle, x.device) if columns else None
    one = stream or Stream()
    keys = [_signed(word) for role in roles for word in one.key(role)]
    dummy = torch.empty(1, dtype=torch.int32, device=x.device)
    args = {
        "x_ptr": x,
        "codes_ptr": out.words if out else dummy, "scales_ptr": out.scales if out else dummy,
        "amax_ptr": amax if amax is not None else dummy,
        "codes_t_ptr": out_t.words if out_t else dummy, "scales_t_ptr": out_t.scales if out_t else dummy,
        "amax_t_ptr": amax_t if amax_t is not None else dummy,
        "rows": n, "k": k, "pitch": pitch,
        "words": out.words.shape[1] if out else 0, "words_t": out_t.words.shape[1] if out_t else 0,
        "key_low": keys[0], "key_high": keys[1], "key_low_t": keys[2], "key_high_t": keys[3],
        "step": _signed(one.step), "micro": _signed(one.micro),
    }  # fmt: skip
    along_out, across_out = (rows, columns) if along else (columns, rows)
    height, width, warps = _tile(recipe, along_out, across_out, stream is not None and convert != "rs")
    constants = {
        "F": recipe, "ALONG": along, "ROWS": height, "COLUMNS": width, "ROW_OUT": rows, "COLUMN_OUT": columns,
        "CONVERT": convert, "STOCHASTIC": stream is not None, "WHOLE": (k if along else n) % 8 == 0,
        "SWIZZLE": swizzle, "INPUT_MAX": torch.finfo(x.dtype).max,
    }  # fmt: skip
    grid = (-(-k // width), -(-n // height))
    return Launch(quantize_kernel, grid, args, constants, warps), Both(out, out_t)


def _tile(recipe: Recipe, along: bool, across: bool, software_noise: bool) -> tuple[int, int, int]:
    """Rows, columns, warps of a program.

    Across memory a warp needs 256 segments if its threads are to own theirs, 128 elements each; the noise does not fit
    beside them in registers, so then two threads share a segment.
    """
    if recipe.free > 16 or recipe.con > 64:
        return 128, 128, 8 if software_noise else 4
    if along and not across:
        return 64, 128, 4
    return (32, 64, 1) if software_noise and recipe.free <= 32 and recipe.con <= 32 else (64, 64, 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def quantize(
    x: Tensor,
    format: Format,
    *,
    rows: bool = True,
    columns: bool = False,
    stream: Stream | None = None,
    roles: tuple[str, str] = ("rows", "columns"),
    hardware_noise: bool = False,
    swizzle: bool = False,
    amax: Tensor | None = None,
    arch: str | None = None,
    start: Callable[[Launch], None] = Launch.__call__,
) -> Both:
    """Quantise x (rows, k), fp32 or bf16, along its rows and (or) its columns.

    Args:
        rows, columns: which outputs; `columns` is the transposed matrix (k, rows), blocks along rows.
        stream: rounds stochastically with its bits, roles[0] for rows and roles[1] for columns; None is nearest.
        amax: the maximum to use instead of the tensor's own, as for `Format.quantize`, for one output.
        arch: "sm_100" and the like; by default that of x's device.
        start: what is done with each launch.

    Raises:
        ValueError: for formats and inputs that the kernels do not know.
    """
    if hardware_noise and stream is None:
        raise ValueError("hardware_noise asks for stochastic rounding, which draws by a stream: give one.")
    recipe = recipe_of(format)
    spans = format.amax_of
    own: list[Tensor | None] = [None, None]
    for i, (wanted, matrix) in enumerate(((rows, x), (columns, x.T))):
        if wanted and spans and not (i and spans == "tensor" and own[0] is not None):
            if amax is not None and recipe.scale == "e4m3":
                own[i] = amax.float().reshape(-1).contiguous()
                continue
            launch, found = amax_launch(matrix, spans)
            start(launch)
            if amax is not None:
                given = amax.float().reshape(-1)
                found = torch.where(found.isfinite() & given.isfinite(), given, torch.nan)
            own[i] = found
        elif wanted and spans:
            own[i] = own[0]
    launch, out = prepare(
        x, format, own[0], own[1], rows=rows, columns=columns, stream=stream, roles=roles,
        hardware_noise=hardware_noise, swizzle=swizzle, arch=arch,
    )  # fmt: skip
    start(launch)
    return out
