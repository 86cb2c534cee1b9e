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

import torch
from torch import Tensor

from lowprec.numerics.format import Format
from lowprec.numerics.qtensor import QTensor
from lowprec.numerics.scale import encode_scale
from lowprec.numerics.stream import Stream

from ..coded import unswizzle
from .layout import swizzled_size
from .memory import Launch, arch_of, capability, in_pieces, memory_of, signed
from .quantize import amax_kernel, quantize_kernel
from .recipe import SCALE_TYPES, Recipe, recipe_of
from .rotate import Turn, turn_arguments


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


def conversion(arch: str, recipe: Recipe, hardware_noise: bool) -> str:
    """ "software", "rn" or "rs": how a chip makes codes."""
    number = int(arch.removeprefix("sm_"))
    if hardware_noise:
        if number not in (100, 103) or recipe.element not in ("e2m1", "e4m3", "e5m2"):
            raise ValueError(
                "Hardware stochastic rounding needs E2M1, E4M3 or E5M2 on sm_100 or sm_103, not"
                f" {recipe.element} on {arch}."
            )
        return "rs"
    least = {"e2m1": 100, "e2m3": 100, "e3m2": 100, "e4m3": 89, "e5m2": 89}.get(recipe.element)
    return "rn" if least and number >= least else "software"


def amax_launch(
    x: Tensor,
    span: str,
    *,
    rows: bool = True,
    columns: bool = False,
    turn: Turn | None = None,
    turn_columns: Turn | None = None,
    arch: str | None = None,
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """The first pass, and where it leaves the maxima of the directions: fp32, (1,) or (rows,), (k,).

    Unrotated, the tensor's maximum is that of both; next to a rotated one it is found in the same tile.
    """
    x, along, pitch = memory_of(x)
    (n, k), chip = x.shape, capability(x, arch)
    tensor = span == "tensor"
    rows_turned, columns_turned = rows and turn is not None, columns and turn_columns is not None
    same = tensor and rows and columns and not rows_turned and not columns_turned
    plain = tensor and rows and columns and rows_turned != columns_turned
    row_out = rows and not (plain and columns_turned)
    column_out = columns and not (plain and rows_turned) and not same
    out = [torch.zeros(1 if tensor else size, dtype=torch.int32, device=x.device) for size in (n, k)]
    words, constants = turn_arguments(turn)
    words_t, constants_t = turn_arguments(turn_columns, "_t")
    across = column_out if along else row_out
    wide = [one.size if one else 0 for one in ((turn, turn_columns) if along else (turn_columns, turn))]
    lines, length, warps = (32, 128, 4) if not across else (128, 32, 1) if wide[1] > 16 >= wide[0] else (128, 128, 4)
    height, width = (lines, length) if along else (length, lines)
    if in_pieces(x, pitch):
        height, width, warps = _square(turn, turn_columns)
    constants |= constants_t | {
        "ALONG": along, "ROWS": height, "COLUMNS": width, "SPAN": span, "ROW_OUT": row_out, "COLUMN_OUT": column_out,
        "PLAIN": plain, "FULL": not (n % height or k % width), "CHIP": chip,
    }  # fmt: skip
    args = {"x_ptr": x, "amax_ptr": out[0], "amax_t_ptr": out[1], "rows": n, "k": k, "pitch": pitch, **words, **words_t}
    launch = Launch(amax_kernel, (-(-k // width), -(-n // height)), args, constants, warps)
    found = [one_out.view(torch.float32) for one_out in out]
    return launch, found[0] if rows else None, (found[0] if same else found[1]) if columns else None


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
        size = {"block": (lines, columns), "row": (rows, min(k, 1)), "tensor": (min(rows, 1), min(k, 1))}[recipe.span]
        scales = torch.empty(size, dtype=kind, device=device)
    level = None
    if recipe.tensor == "128":
        level = torch.empty(rows, -(-k // 128), device=device)
    elif recipe.tensor:
        assert amax is not None
        whole = amax[0] if recipe.tensor == "tensor" else amax[:, None]
        level = encode_scale(torch.where(whole.isfinite(), whole, torch.nan), recipe.unit)[1]
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
    turn: Turn | None = None,
    turn_columns: Turn | None = None,
    arch: str | None = None,
) -> tuple[Launch, Both]:
    """The second (or only) pass, not yet started, and its outputs; the arguments are those of `quantize`."""
    recipe = recipe_of(format)
    x, along, pitch = memory_of(x)
    if swizzle and recipe.scale not in SCALE_TYPES:
        raise ValueError(f"Format {format.name} has {format.scale} scales; only those of one byte are swizzled.")
    (n, k), convert = x.shape, conversion(arch or arch_of(x), recipe, hardware_noise)
    out = _output((n, k), format, recipe, amax, swizzle, x.device) if rows else None
    out_t = _output((k, n), format, recipe, amax_t, swizzle, x.device) if columns else None
    one = stream or Stream()
    keys = [signed(word) for role in roles for word in one.key(role)]
    dummy, groups = torch.empty(1, dtype=torch.int32, device=x.device), recipe.tensor == "128"
    words, turns = turn_arguments(turn)
    words_t, turns_t = turn_arguments(turn_columns, "_t")
    args = {
        "x_ptr": x,
        "codes_ptr": out.words if out else dummy, "scales_ptr": out.scales if out else dummy,
        "level_ptr": out.tensor_scale if out and groups else dummy, "amax_ptr": amax if amax is not None else dummy,
        "codes_t_ptr": out_t.words if out_t else dummy, "scales_t_ptr": out_t.scales if out_t else dummy,
        "level_t_ptr": out_t.tensor_scale if out_t and groups else dummy,
        "amax_t_ptr": amax_t if amax_t is not None else dummy,
        "rows": n, "k": k, "pitch": pitch,
        "words": out.words.shape[1] if out else 0, "words_t": out_t.words.shape[1] if out_t else 0,
        "key_low": keys[0], "key_high": keys[1], "key_low_t": keys[2], "key_high_t": keys[3],
        "step": signed(one.step), "micro": signed(one.micro), **words, **words_t,
    }  # fmt: skip
    crowded = stream is not None and convert != "rs"
    crowded |= convert == "software" and recipe.bits == 4 and recipe.element != "e2m1"
    height, width, warps = _tile(recipe, along, (turn, turn_columns), (rows, columns), crowded)
    if in_pieces(x, pitch):
        height, width, warps = _square(recipe.free, recipe.con, 128 if groups else 0, turn, turn_columns)
    constants = {
        "F": recipe, "ALONG": along, "ROWS": height, "COLUMNS": width, "ROW_OUT": rows, "COLUMN_OUT": columns,
        "CONVERT": convert, "STOCHASTIC": stream is not None, "WHOLE": (k if along else n) % 8 == 0,
        "FULL": not (n % height or k % width), "SWIZZLE": swizzle, "INPUT_MAX": torch.finfo(x.dtype).max,
        "CHIP": capability(x, arch), **turns, **turns_t,
    }  # fmt: skip
    grid = (-(-k // width), -(-n // height))
    return Launch(quantize_kernel, grid, args, constants, warps), Both(out, out_t)


def _tile(recipe: Recipe, along: bool, turns: tuple[Turn | None, Turn | None], outputs: tuple[bool, bool],
          crowded: bool) -> tuple[int, int, int]:  # fmt: skip
    """Rows, columns, warps of a program; `turns` and `outputs` are of rows and columns, x lies `along` its rows or not.

    Across memory a warp needs 256 segments if its threads are to own theirs, 128 elements each.  A rotation of more
    than 16 across memory has its blocks in the lanes of one warp; along memory it exchanges, and leaves less room.  So
    do the errors of several candidates, and noise and rounding in software (`crowded`).
    """
    one, other = [turn.size if turn else 0 for turn in (turns if along else turns[::-1])]
    lengthwise, across = outputs if along else outputs[::-1]
    choice = recipe.candidates > 1
    plain = recipe.element == "e2m1" and recipe.tensor != "128" and recipe.scale != "ue5m3"
    small = recipe.free <= 16 and recipe.con <= 64 and recipe.tensor != "128"
    if across and other > 16 and max(one, recipe.free, recipe.con) <= 32 and recipe.tensor != "128":
        lines, length, warps = 128, 32, 1
    elif choice and across and small and not (one or other) and max(recipe.free, recipe.con) <= 32:
        lines, length, warps = 32, 64, 1
    elif (choice or (crowded and not plain)) and (across or not small):
        lines, length, warps = 128, 128, 8
    elif lengthwise and not across and (one > 16 or crowded or choice) and small:
        lines, length, warps = 64, 128, 4
    else:
        lines, length, warps = 128, 128, 4
    warps *= 2 if recipe.second else 1
    return (lines, length, warps) if along else (length, lines, warps)


def _square(*needed: int | Turn | None) -> tuple[int, int, int]:
    """The tile of a matrix that is loaded element by element: few to a thread, for whom they are gathered."""
    sizes = [one.size if isinstance(one, Turn) else one or 0 for one in needed]
    return (64, 64, 4) if max(sizes) <= 64 else (128, 128, 16)


def maxima(
    x: Tensor,
    format: Format,
    rows: bool,
    columns: bool,
    amax: Tensor | None,
    turn: Turn | None,
    turn_columns: Turn | None,
    arch: str | None,
    start: Callable[[Launch], None],
) -> list[Tensor | None]:
    """The maxima that the scales of the two directions need, by a first pass or as given; see `quantize`."""
    recipe, spans = recipe_of(format), format.amax_of
    for one, axis in ((turn, 1), (turn_columns, 0)):
        if one is not None:
            one.check(x.shape[axis])
    if not spans:
        return [None, None]
    if amax is not None and recipe.tensor:
        return [amax.float().reshape(-1).contiguous()] * 2
    first, *found = amax_launch(x, spans, rows=rows, columns=columns, turn=turn, turn_columns=turn_columns, arch=arch)
    if x.numel():
        start(first)
    if amax is not None:
        given = amax.float().reshape(-1)
        found = [None if m is None else torch.where(m.isfinite() & given.isfinite(), given, torch.nan) for m in found]
    return found


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
    turn: Turn | None = None,
    turn_columns: Turn | None = None,
    arch: str | None = None,
    start: Callable[[Launch], None] = Launch.__call__,
) -> Both:
    """Quantise x (rows, k), fp32, bf16 or fp16, along its rows and (or) its columns.

    Args:
        rows, columns: which outputs; `columns` is the transposed matrix (k, rows), blocks along rows.
        stream: rounds stochastically with its bits, roles[0] for rows and roles[1] for columns; None is nearest.
        amax: the maximum to use instead of the tensor's own, as for `Format.quantize`, for one output.
        turn, turn_columns: a Hadamard rotation before the rows' output, the columns', along what each contracts: codes
            are those of `Format.quantize(rotate(x))`.  Noise is still drawn by the place in x.
        arch: "sm_100" and the like; by default that of x's device.
        start: what is done with each launch.

    Raises:
        ValueError: for formats and inputs that the kernels do not know.
    """
    if hardware_noise and stream is None:
        raise ValueError("hardware_noise asks for stochastic rounding, which draws by a stream: give one.")
    turn, turn_columns = turn if rows else None, turn_columns if columns else None
    if stream is not None and recipe_of(format).candidates > 1:
        raise ValueError(
            f"Format {format.name}: stochastic rounding is biased where each block picks the better of several"
            " candidates; round to nearest or use MS-EDEN."
        )
    found = maxima(x, format, rows, columns, amax, turn, turn_columns, arch, start)
    launch, out = prepare(
        x, format, *found, rows=rows, columns=columns, stream=stream, roles=roles, hardware_noise=hardware_noise,
        swizzle=swizzle, turn=turn, turn_columns=turn_columns, arch=arch,
    )  # fmt: skip
    if x.numel():
        start(launch)
    return out
