"""MS-EDEN on the GPU: nearest codes, and block scales that are corrected and rounded stochastically, in one pass.

    u = x * multiplier,  q = nearest(u)        S = sum u^2 / sum u q  over a group        scale' = SR(scale * S)

which is :meth:`lowprec.numerics.Format.eden` (arXiv:2601.22813) bit for bit: the sums are trees over the group, and
the noise is `Stream.scale_noise`, one number a block, drawn in panels of 16 rows.  A group, as long as the rotation
before it, lies within a tile, so its correction is known while x is in registers: after the pass that finds the
tensor's maximum, x is read once, as for every NVFP4 format.

Memory, bytes an element: 2 in (bf16), and 1/2 + 1/16 out for each direction.

    out = quantize_eden(x, FORMATS["nvfp4_eden"], stream, columns=True, turn=Turn.of(128, signs))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.format import Format
from lowprec.numerics.stream import Stream

from .blocks import segments, spread
from .choose import nearest_value, scales_of, tree_sum
from .codes import stochastic_top, words_of
from .launch import Both, maxima, prepare
from .memory import Launch, signed
from .noise import group_noise
from .pairs import times
from .quantize import store_codes, store_level, store_scales
from .recipe import recipe_of
from .rotate import Turn, rotate_segments
from .scales import FLT_MAX, scale_value

GROUPS = (16, 32, 64, 128)


@triton.jit
def correction(u0, u1, q0, q1, GROUP: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr, SEGMENTS: tl.constexpr):
    """S of every group of the tile: `numerics.eden.correction`."""
    uq = tree_sum(u0 * q0, u1 * q1, ALONG, FREE, SEGMENTS, 1, GROUP // 16)
    uu = tree_sum(u0 * u0, u1 * u1, ALONG, FREE, SEGMENTS, 1, GROUP // 16)
    s = tl.math.div_rn(uu, tl.where(uq == 0, 1.0, uq))
    return tl.where((uq > 0) & (tl.abs(s) <= FLT_MAX), s, 1.0)


@triton.jit
def scale_dither(tile_free, tile_con, con, key_low, key_high, step, micro, F: tl.constexpr, ALONG: tl.constexpr,
                 FREE: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """`Stream.scale_noise` of a tile's FREE x BLOCKS blocks, as `noise` makes it, in blocks' order.

    The noise of row r, block b is element ``((r // 16) blocks + b) 16 + r % 16``: eight rows share a call.
    """
    g = tl.arange(0, BLOCKS * (FREE // 8))
    row = tile_free * FREE + g % (FREE // 8) * 8
    line = (row // 16).to(tl.int64) * tl.cdiv(con, F.con) + (tile_con * BLOCKS + g // (FREE // 8))
    dither = tl.reshape(group_noise(line * 2 + (row // 8) % 2, key_low, key_high, step, micro), (BLOCKS, FREE))
    if ALONG:
        dither = tl.permute(dither, (1, 0))
    return tl.reshape(dither, (BLOCKS * FREE,))


@triton.jit
def corrected(scale, s, dither, F: tl.constexpr):
    """Stored scales times S, rounded stochastically to what stores them."""
    if F.tensor == "":
        return scale * s
    code = scale.to(tl.int32)
    if F.scale == "e4m3":
        magnitude = code & 0x7F
        top = stochastic_top(scale_value(magnitude, F) * s, dither, 3, -6, 448.0) >> 24
        new = tl.where(magnitude == 0x7F, code, top | (code & 0x80))
    else:  # eight bits of magnitude: there is no sign
        top = stochastic_top(scale_value(code, F) * s, dither, 3, -14, 61440.0) >> 24
        new = tl.where(code == 0xFF, code, top)
    return new.to(tl.uint8)


@triton.jit
def eden_tile(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, free, con, pitch, words, key_low, key_high, step,
              micro, tile_free, tile_con, s0, s1, s2, s3, F: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
              CON: tl.constexpr, CONVERT: tl.constexpr, FULL: tl.constexpr, SWIZZLE: tl.constexpr,
              INPUT_MAX: tl.constexpr, TURN: tl.constexpr, MASK: tl.constexpr, GROUP: tl.constexpr,
              CHIP: tl.constexpr):  # fmt: skip
    """One tile in one direction, as `quantize.quantize_tile`."""
    SEGMENTS: tl.constexpr = CON // 16
    BS: tl.constexpr = F.con // 16
    BLOCKS: tl.constexpr = SEGMENTS // BS
    first_f = tile_free * FREE
    low, high, f, c = segments(x_ptr, pitch, first_f, tile_con * CON, free, con, ALONG, FREE, CON, FULL, CHIP)
    low, high = rotate_segments(low, high, s0, s1, s2, s3, TURN, MASK, x_ptr.dtype.element_ty, False, ALONG, FREE,
                                SEGMENTS, CHIP)  # fmt: skip
    multiplier, scale, level, second = scales_of(low, high, f, first_f, free, amax_ptr, F, ALONG, FREE, SEGMENTS,
                                                 INPUT_MAX, CHIP)  # fmt: skip
    store_level(level_ptr, level, free, con, tile_free, tile_con, F, ALONG, FREE, SEGMENTS)
    u0 = times(low, multiplier, ALONG, CHIP)
    u1 = times(high, multiplier, ALONG, CHIP)
    a = words_of(u0, u0, u0, u0, F, CONVERT, False, second)
    b = words_of(u1, u1, u1, u1, F, CONVERT, False, second)
    PER: tl.constexpr = 2 if F.bits == 4 else 4
    out = tl.join(a[0], b[0]) if F.bits == 4 else tl.join(tl.join(a[0], b[0]), tl.join(a[1], b[1]))
    out = tl.reshape(out, (FREE * SEGMENTS, PER))
    out = tl.where((multiplier != multiplier)[:, None], 0, out)
    store_codes(codes_ptr, out, free, words, tile_free, tile_con, ALONG, FREE, SEGMENTS, PER, FULL)

    q0 = nearest_value(u0, F, False, CHIP)
    q1 = nearest_value(u1, F, False, CHIP)
    if F.second:
        q0 = tl.where(second[:, None], nearest_value(u0, F, True, CHIP), q0)
        q1 = tl.where(second[:, None], nearest_value(u1, F, True, CHIP), q1)
    s = spread(correction(u0, u1, q0, q1, GROUP, ALONG, FREE, SEGMENTS), ALONG, FREE, BLOCKS, 1, GROUP // F.con)
    dither = scale_dither(tile_free, tile_con, con, key_low, key_high, step, micro, F, ALONG, FREE, BLOCKS)
    scale = corrected(scale, s, dither, F)
    store_scales(scales_ptr, scale, f, c, free, con, tile_free, tile_con, F, ALONG, FREE, SEGMENTS, SWIZZLE, FULL)


@triton.jit(do_not_specialize=["key_low", "key_high", "key_low_t", "key_high_t", "step", "micro", "s0", "s1", "s2",
                               "s3", "s0_t", "s1_t", "s2_t", "s3_t"])  # fmt: skip
def eden_kernel(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, codes_t_ptr, scales_t_ptr, level_t_ptr, amax_t_ptr,
                rows, k, pitch, words, words_t, key_low, key_high, key_low_t, key_high_t, step, micro, s0, s1, s2, s3,
                s0_t, s1_t, s2_t, s3_t, F: tl.constexpr, ALONG: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, ROW_OUT: tl.constexpr, COLUMN_OUT: tl.constexpr, CONVERT: tl.constexpr,
                FULL: tl.constexpr, SWIZZLE: tl.constexpr, INPUT_MAX: tl.constexpr, TURN: tl.constexpr,
                MASK: tl.constexpr, TURN_T: tl.constexpr, MASK_T: tl.constexpr, GROUP: tl.constexpr,
                CHIP: tl.constexpr):  # fmt: skip
    """The arguments of `quantize.quantize_kernel`, and GROUP, the elements under one correction."""
    i = tl.program_id(1)
    j = tl.program_id(0)
    if ROW_OUT:
        eden_tile(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, rows, k, pitch, words, key_low, key_high, step,
                  micro, i, j, s0, s1, s2, s3, F, ALONG, ROWS, COLUMNS, CONVERT, FULL, SWIZZLE, INPUT_MAX, TURN, MASK,
                  GROUP, CHIP)  # fmt: skip
    if COLUMN_OUT:
        eden_tile(x_ptr, codes_t_ptr, scales_t_ptr, level_t_ptr, amax_t_ptr, k, rows, pitch, words_t, key_low_t,
                  key_high_t, step, micro, j, i, s0_t, s1_t, s2_t, s3_t, F, not ALONG, COLUMNS, ROWS, CONVERT, FULL,
                  SWIZZLE, INPUT_MAX, TURN_T, MASK_T, GROUP, CHIP)  # fmt: skip


def quantize_eden(
    x: Tensor,
    format: Format,
    stream: Stream,
    *,
    rows: bool = True,
    columns: bool = False,
    roles: tuple[str, str] = ("rows", "columns"),
    group: int = 128,
    swizzle: bool = False,
    amax: Tensor | None = None,
    turn: Turn | None = None,
    turn_columns: Turn | None = None,
    arch: str | None = None,
    start: Callable[[Launch], None] = Launch.__call__,
) -> Both:
    """Quantise x (rows, k) by MS-EDEN along its rows and (or) its columns.

    Args:
        stream: rounds the scales; `roles` are the names of its noise for rows and for columns.
        group: elements that share one correction: 16, 32, 64 or 128, a multiple of the block.

    The others are those of `launch.quantize`.

    Raises:
        ValueError: for formats and inputs that the kernels do not know.
    """
    recipe = recipe_of(format)
    if group not in GROUPS or recipe.free != 1 or recipe.span != "block" or group % recipe.con:
        raise ValueError(
            f"The MS-EDEN kernel corrects 1 x n blocks in groups of 16, 32, 64 or 128 that they divide; got block"
            f" {list(format.block)}, group {group}."
        )
    if recipe.scale not in ("e4m3", "ue5m3", "fp32"):
        raise ValueError(f"Format {format.name}: {recipe.scale} scales are too coarse to carry MS-EDEN's correction.")
    found = maxima(x, format, rows, columns, amax, turn, turn_columns, arch, start)
    plain, out = prepare(
        x, format, *found, rows=rows, columns=columns, swizzle=swizzle, turn=turn, turn_columns=turn_columns, arch=arch
    )
    keys = [signed(word) for role in roles for word in stream.key(role)]
    names = ("key_low", "key_high", "key_low_t", "key_high_t")
    args: dict[str, Any] = plain.args | dict(zip(names, keys))
    args |= {"step": signed(stream.step), "micro": signed(stream.micro)}
    (n, k), along, chip = x.shape, plain.constants["ALONG"], plain.constants["CHIP"]
    across = columns if along else rows
    height, width = (128, 128) if across or chip >= 100 else (64, 128) if along else (128, 64)
    constants = {name: v for name, v in plain.constants.items() if name not in ("STOCHASTIC", "WHOLE")}
    constants |= {"ROWS": height, "COLUMNS": width, "FULL": not (n % height or k % width), "GROUP": group}
    launch = replace(
        plain, kernel=eden_kernel, grid=(-(-k // width), -(-n // height)), args=args, constants=constants,
        warps=8 if recipe.candidates > 1 or (across and chip < 100) else 4,
    )  # fmt: skip
    if x.numel():
        start(launch)
    return out
