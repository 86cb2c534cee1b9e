"""Quantise a matrix along rows, along columns, or both, rotated or not, reading it from memory once.

    size = max |x| of a block;   (multiplier, scale) = rule(size);   code = round(x * multiplier)

exactly as :meth:`lowprec.numerics.Format.quantize` has it: fp32, true divisions, one rounding an operation.  Each
direction may have a Hadamard rotation before, of registers and not of memory (see `rotate`).

A program does a tile (see `blocks`) in one direction; the output along the other axis is the same device function with
the axes exchanged, which reads the tile again from the first-level cache.

Memory, bytes an element: 2 in (bf16), 1/2 or 1 out for each direction, and 1/16 (1/32) for scales.  Formats whose scale
spans the tensor or a row need `amax_kernel` before, which reads it once more and finds the maxima of both directions.
"""

import triton
import triton.language as tl

from .blocks import segment_max, segments
from .choose import scales_of
from .codes import words_of
from .layout import swizzled_offset
from .noise import element_noise, group_noise, philox
from .pairs import times
from .rotate import rotate_segments


@triton.jit
def tile_noise(first, f, c, first_free, first_con, free, con, key_low, key_high, step, micro, ALONG: tl.constexpr,
               FREE: tl.constexpr, SEGMENTS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The noise of a half (R, 8), by place in memory; `first` is 0 for the low half, 8 for the high."""
    R: tl.constexpr = FREE * SEGMENTS
    if not WHOLE:
        place = (c + first)[:, None] + tl.arange(0, 8)[None, :]
        index = f.to(tl.int64)[:, None] * con + place if ALONG else place.to(tl.int64) * free + f[:, None]
        noise = element_noise(index, key_low, key_high, step, micro)
    elif ALONG:
        group = (f.to(tl.int64) * con + c + first) >> 3
        noise = tl.reshape(group_noise(group, key_low, key_high, step, micro), (R, 8))
    else:  # eight neighbours in memory are eight segments
        s = tl.arange(0, R // 8)
        line = first_con + (s // (FREE // 8) * 16)[:, None] + first + tl.arange(0, 8)[None, :]
        group = (line.to(tl.int64) * free + (first_free + s % (FREE // 8) * 8)[:, None]) >> 3
        noise = tl.reshape(group_noise(group, key_low, key_high, step, micro), (R // 8, 8, 8))
        noise = tl.reshape(tl.permute(noise, (0, 2, 1)), (R, 8))
    return noise


@triton.jit
def store_scales(scales_ptr, scale, f, c, free, con, tile_free, tile_con, F: tl.constexpr, ALONG: tl.constexpr,
                 FREE: tl.constexpr, SEGMENTS: tl.constexpr, SWIZZLE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Scales of a tile: of its blocks, which are ordered as segments are; or of its rows, or the one of the tensor."""
    if F.span == "block":
        NF: tl.constexpr = FREE // F.free
        NC: tl.constexpr = SEGMENTS * 16 // F.con
        b = tl.arange(0, NF * NC)
        block_f = b // NC if ALONG else b % NF
        block_c = b % NC if ALONG else b // NF
        columns = tl.cdiv(con, F.con)
        first_f = tile_free * NF
        first_c = tile_con * NC
        if FULL:
            inside = tl.full(b.shape, True, tl.int1)
        else:
            inside = (block_f < tl.cdiv(free, F.free) - first_f) & (block_c < columns - first_c)
        if SWIZZLE:
            REPEATS: tl.constexpr = F.free  # Triton before 3.8 takes no field of a tuple as a bound
            for i in tl.static_range(REPEATS):
                row = (first_f + block_f) * F.free + i
                at = scales_ptr + swizzled_offset(row, first_c + block_c, columns)
                tl.store(at, scale, mask=inside & (row < free))
        else:
            at = scales_ptr + (first_f.to(tl.int64) * columns + first_c) + (block_f * columns + block_c)
            tl.store(at, scale, mask=inside)
    elif F.span == "row":
        tl.store(scales_ptr + f, scale, mask=(f < free) & (c == 0))
    else:
        tl.store(scales_ptr + tl.zeros_like(f), scale, mask=(f == 0) & (c == 0))


@triton.jit
def store_level(level_ptr, level, free, con, tile_free, tile_con, F: tl.constexpr, ALONG: tl.constexpr,
                FREE: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Tensor scales of 1 x 128 elements, where the format has such."""
    if F.tensor == "128":
        NC: tl.constexpr = SEGMENTS // 8
        g = tl.arange(0, FREE * NC)
        row = tile_free * FREE + (g // NC if ALONG else g % FREE)
        column = tile_con * NC + (g % NC if ALONG else g // FREE)
        columns = tl.cdiv(con, 128)
        at = level_ptr + row.to(tl.int64) * columns + column
        tl.store(at, level, mask=(row < free) & (column < columns))


@triton.jit
def store_codes(codes_ptr, out, free, words, tile_free, tile_con, ALONG: tl.constexpr, FREE: tl.constexpr,
                SEGMENTS: tl.constexpr, PER: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Words of codes (R, PER), PER words a segment, into rows of `words` words."""
    if ALONG:
        out = tl.reshape(out, (FREE, SEGMENTS * PER))
    else:
        out = tl.reshape(tl.permute(tl.reshape(out, (SEGMENTS, FREE, PER)), (1, 0, 2)), (FREE, SEGMENTS * PER))
    first_row = tile_free * FREE
    first_word = tile_con * (SEGMENTS * PER)
    row = tl.arange(0, FREE)[:, None]
    word = tl.arange(0, SEGMENTS * PER)[None, :]
    at = codes_ptr + (first_row.to(tl.int64) * words + first_word) + (row * words + word)
    if FULL:
        tl.store(at, out)
    else:
        tl.store(at, out, mask=(row < free - first_row) & (word < words - first_word))


@triton.jit
def quantize_tile(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, free, con, pitch, words, key_low, key_high, step,
                  micro, tile_free, tile_con, s0, s1, s2, s3, F: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
                  CON: tl.constexpr, CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
                  FULL: tl.constexpr, SWIZZLE: tl.constexpr, INPUT_MAX: tl.constexpr, TURN: tl.constexpr,
                  MASK: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """One tile in one direction: (free, con) is the matrix, `words` the 32-bit words of a row of codes."""
    SEGMENTS: tl.constexpr = CON // 16
    R: tl.constexpr = FREE * SEGMENTS
    first_f = tile_free * FREE
    first_c = tile_con * CON
    low, high, f, c = segments(x_ptr, pitch, first_f, first_c, free, con, ALONG, FREE, CON, FULL, CHIP)
    low, high = rotate_segments(low, high, s0, s1, s2, s3, TURN, MASK, x_ptr.dtype.element_ty, False, ALONG, FREE,
                                SEGMENTS, CHIP)  # fmt: skip
    multiplier, scale, level, second = scales_of(low, high, f, first_f, free, amax_ptr, F, ALONG, FREE, SEGMENTS,
                                                 INPUT_MAX, CHIP)  # fmt: skip
    store_level(level_ptr, level, free, con, tile_free, tile_con, F, ALONG, FREE, SEGMENTS)
    store_scales(scales_ptr, scale, f, c, free, con, tile_free, tile_con, F, ALONG, FREE, SEGMENTS, SWIZZLE, FULL)

    w0, w1, w2, w3 = 0, 0, 0, 0
    if STOCHASTIC and CONVERT == "rs":
        at = f.to(tl.int64) * (words * 8) + c
        w0, w1, w2, w3 = philox(at >> 4, key_low, key_high, step, micro)
    y = times(low, multiplier, ALONG, CHIP)  # one half after the other: noise for both would not fit into registers
    noise = y
    if STOCHASTIC and CONVERT != "rs":
        noise = tile_noise(0, f, c, first_f, first_c, free, con, key_low, key_high, step, micro, ALONG, FREE, SEGMENTS,
                           WHOLE)  # fmt: skip
    a = words_of(y, noise, w0, w1, F, CONVERT, STOCHASTIC, second)
    y = times(high, multiplier, ALONG, CHIP)
    noise = y
    if STOCHASTIC and CONVERT != "rs":
        noise = tile_noise(8, f, c, first_f, first_c, free, con, key_low, key_high, step, micro, ALONG, FREE, SEGMENTS,
                           WHOLE)  # fmt: skip
    b = words_of(y, noise, w2, w3, F, CONVERT, STOCHASTIC, second)
    PER: tl.constexpr = 2 if F.bits == 4 else 4
    out = tl.join(a[0], b[0]) if F.bits == 4 else tl.join(tl.join(a[0], b[0]), tl.join(a[1], b[1]))
    out = tl.reshape(out, (R, PER))
    out = tl.where((multiplier != multiplier)[:, None], 0, out)  # NaN has no code: poisoned blocks store zeros
    store_codes(codes_ptr, out, free, words, tile_free, tile_con, ALONG, FREE, SEGMENTS, PER, FULL)


@triton.jit(do_not_specialize=["key_low", "key_high", "key_low_t", "key_high_t", "step", "micro", "s0", "s1", "s2",
                               "s3", "s0_t", "s1_t", "s2_t", "s3_t"])  # fmt: skip
def quantize_kernel(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, codes_t_ptr, scales_t_ptr, level_t_ptr,
                    amax_t_ptr, rows, k, pitch, words, words_t, key_low, key_high, key_low_t, key_high_t, step, micro,
                    s0, s1, s2, s3, s0_t, s1_t, s2_t, s3_t, F: tl.constexpr, ALONG: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, ROW_OUT: tl.constexpr, COLUMN_OUT: tl.constexpr, CONVERT: tl.constexpr,
                    STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, SWIZZLE: tl.constexpr,
                    INPUT_MAX: tl.constexpr, TURN: tl.constexpr, MASK: tl.constexpr, TURN_T: tl.constexpr,
                    MASK_T: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """Tile (program 0, program 1) of x (rows, k), k contiguous if ALONG, else rows; the other stride is `pitch`.

    What ends in _t belongs to the columns' output.  TURN is the block of a rotation or 0, MASK or s0 .. s3 its signs.
    """
    i = tl.program_id(1)
    j = tl.program_id(0)
    if ROW_OUT:
        quantize_tile(x_ptr, codes_ptr, scales_ptr, level_ptr, amax_ptr, rows, k, pitch, words, key_low, key_high, step,
                      micro, i, j, s0, s1, s2, s3, F, ALONG, ROWS, COLUMNS, CONVERT, STOCHASTIC, WHOLE, FULL, SWIZZLE,
                      INPUT_MAX, TURN, MASK, CHIP)  # fmt: skip
    if COLUMN_OUT:
        quantize_tile(x_ptr, codes_t_ptr, scales_t_ptr, level_t_ptr, amax_t_ptr, k, rows, pitch, words_t, key_low_t,
                      key_high_t, step, micro, j, i, s0_t, s1_t, s2_t, s3_t, F, not ALONG, COLUMNS, ROWS, CONVERT,
                      STOCHASTIC, WHOLE, FULL, SWIZZLE, INPUT_MAX, TURN_T, MASK_T, CHIP)  # fmt: skip


@triton.jit
def put_max(amax_ptr, low, high, first, free, SPAN: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
            SEGMENTS: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """The maximum of a tile into that of the tensor, or of its rows: as integer patterns NaN and infinity win."""
    bits = segment_max(low, high, CHIP).to(tl.int32, bitcast=True)
    if SPAN == "tensor":
        tl.atomic_max(amax_ptr, tl.max(bits, 0), sem="relaxed")
    else:
        bits = tl.reshape(bits, (FREE, SEGMENTS)) if ALONG else tl.reshape(bits, (SEGMENTS, FREE))
        row = first + tl.arange(0, FREE)
        tl.atomic_max(amax_ptr + row, tl.max(bits, 1 if ALONG else 0), mask=row < free, sem="relaxed")


@triton.jit
def amax_tile(x_ptr, amax_ptr, plain_ptr, free, con, pitch, tile_free, tile_con, s0, s1, s2, s3, ALONG: tl.constexpr,
              FREE: tl.constexpr, CON: tl.constexpr, SPAN: tl.constexpr, PLAIN: tl.constexpr, FULL: tl.constexpr,
              TURN: tl.constexpr, MASK: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """One tile in one direction; PLAIN: also the tensor's maximum before the rotation."""
    SEGMENTS: tl.constexpr = CON // 16
    first = tile_free * FREE
    low, high, _, _ = segments(x_ptr, pitch, first, tile_con * CON, free, con, ALONG, FREE, CON, FULL, CHIP)
    if PLAIN:
        put_max(plain_ptr, low, high, first, free, "tensor", ALONG, FREE, SEGMENTS, CHIP)
    low, high = rotate_segments(low, high, s0, s1, s2, s3, TURN, MASK, x_ptr.dtype.element_ty, False, ALONG, FREE,
                                SEGMENTS, CHIP)  # fmt: skip
    put_max(amax_ptr, low, high, first, free, SPAN, ALONG, FREE, SEGMENTS, CHIP)


@triton.jit(do_not_specialize=["s0", "s1", "s2", "s3", "s0_t", "s1_t", "s2_t", "s3_t"])
def amax_kernel(x_ptr, amax_ptr, amax_t_ptr, rows, k, pitch, s0, s1, s2, s3, s0_t, s1_t, s2_t, s3_t,
                ALONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
                ROW_OUT: tl.constexpr, COLUMN_OUT: tl.constexpr, PLAIN: tl.constexpr, FULL: tl.constexpr,
                TURN: tl.constexpr, MASK: tl.constexpr, TURN_T: tl.constexpr, MASK_T: tl.constexpr,
                CHIP: tl.constexpr):  # fmt: skip
    """The first pass: max |x|, after a direction's rotation, of the tensor or of every row, into zeros.

    ROW_OUT, COLUMN_OUT: the directions that are looked at.  PLAIN: only one is, and the maximum of the tensor as it is
    goes to the other's place.
    """
    i = tl.program_id(1)
    j = tl.program_id(0)
    if ROW_OUT:
        amax_tile(x_ptr, amax_ptr, amax_t_ptr, rows, k, pitch, i, j, s0, s1, s2, s3, ALONG, ROWS, COLUMNS, SPAN, PLAIN,
                  FULL, TURN, MASK, CHIP)  # fmt: skip
    if COLUMN_OUT:
        amax_tile(x_ptr, amax_t_ptr, amax_ptr, k, rows, pitch, j, i, s0_t, s1_t, s2_t, s3_t, not ALONG, COLUMNS, ROWS,
                  SPAN, PLAIN, FULL, TURN_T, MASK_T, CHIP)  # fmt: skip
