"""Quantise a matrix along rows, along columns, or both, reading it from memory once.

    size = max |x| of a block;   (multiplier, scale) = rule(size);   code = round(x * multiplier)

exactly as :meth:`lowprec.numerics.Format.quantize` has it: fp32, true divisions, one rounding an operation.

A program does a tile of FREE x CON elements, CON along the axis that a product contracts.  The tile is cut into
*segments* of 16 along that axis, two registers tiles (R, 8) each, so that one thread owns a segment whichever way the
matrix lies in memory: 16-byte loads run along the segment, or across eight of them.  Blocks are then one or several
segments, and their maximum a maximum over (R,).  The output along the other axis is the same device function with the
axes exchanged; it reads the tile again from the first-level cache.

Memory, bytes an element: 2 in (bf16), 1/2 or 1 out for each direction, and 1/16 (1/32) for scales.  Formats whose scale
spans the tensor or a row need `amax_kernel` before, which reads it once more.
"""

import triton
import triton.language as tl

from .codes import words_of
from .layout import swizzled_offset
from .noise import element_noise, group_noise, philox
from .scales import e8m0_scale, finite, fp32_scale, two_level_scale


@triton.jit
def segments(x_ptr, pitch, first_free, first_con, free, con, ALONG: tl.constexpr, FREE: tl.constexpr,
             CON: tl.constexpr):  # fmt: skip
    """The tile as two halves (R, 8) fp32, and where segments begin, free and contracted, (R,).

    ALONG: memory runs along the contracted axis, segments are ordered (free, segment); else across it, (segment, free).
    """
    s = tl.arange(0, FREE * (CON // 16))
    first_f = first_free + (s // (CON // 16) if ALONG else s % FREE)
    first_c = first_con + (s % (CON // 16) if ALONG else s // FREE) * 16
    f = first_f[:, None]
    c = first_c[:, None] + tl.arange(0, 8)[None, :]
    at = x_ptr + (f.to(tl.int64) * pitch + c if ALONG else c.to(tl.int64) * pitch + f)
    low = tl.load(at, mask=(f < free) & (c < con), other=0.0).to(tl.float32)
    high = tl.load(at + (8 if ALONG else 8 * pitch.to(tl.int64)), mask=(f < free) & (c + 8 < con), other=0.0)
    return low, high.to(tl.float32), first_f, first_c


@triton.jit
def segment_max(low, high):
    """max |x| of every segment (R,), NaN if it holds one."""
    R: tl.constexpr = low.shape[0]
    m = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
    for i in tl.static_range(3):
        a, b = tl.split(tl.reshape(m, (R, 4 >> i, 2)))
        m = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(m, (R,))


@triton.jit
def block_max(m, ALONG: tl.constexpr, FREE: tl.constexpr, SEGMENTS: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr):
    """Segments' maxima (R,) -> blocks' of BF x BS segments; integer patterns, which keep NaN."""
    if BF == 1 and BS == 1:
        return m
    bits = m.to(tl.int32, bitcast=True)
    if ALONG:
        bits = tl.reshape(bits, (FREE // BF, BF, SEGMENTS // BS, BS))
    else:
        bits = tl.reshape(bits, (SEGMENTS // BS, BS, FREE // BF, BF))
    return tl.reshape(tl.max(tl.max(bits, 3), 1), (FREE * SEGMENTS // (BF * BS),)).to(tl.float32, bitcast=True)


@triton.jit
def spread(t, ALONG: tl.constexpr, FREE: tl.constexpr, SEGMENTS: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr):
    """Inverse of `block_max`: one number a block -> one a segment."""
    if BF == 1 and BS == 1:
        return t
    if ALONG:
        t = tl.reshape(t, (FREE // BF, 1, SEGMENTS // BS, 1))
        t = tl.broadcast_to(t, (FREE // BF, BF, SEGMENTS // BS, BS))
    else:
        t = tl.reshape(t, (SEGMENTS // BS, 1, FREE // BF, 1))
        t = tl.broadcast_to(t, (SEGMENTS // BS, BS, FREE // BF, BF))
    return tl.reshape(t, (FREE * SEGMENTS,))


@triton.jit
def tile_noise(first, f, c, first_free, first_con, free, con, key_low, key_high, step, micro, ALONG: tl.constexpr,
               FREE: tl.constexpr, SEGMENTS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """1 + uniform for a half (R, 8), by place in memory; `first` is 0 for the low half, 8 for the high."""
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
                 FREE: tl.constexpr, SEGMENTS: tl.constexpr, SWIZZLE: tl.constexpr):  # fmt: skip
    """Scales of a tile: of its blocks, which are ordered as segments are; or of its rows, or the one of the tensor."""
    if F.span == "block":
        NF: tl.constexpr = FREE // F.free
        NC: tl.constexpr = SEGMENTS * 16 // F.con
        b = tl.arange(0, NF * NC)
        block_f = tile_free * NF + (b // NC if ALONG else b % NF)
        block_c = tile_con * NC + (b % NC if ALONG else b // NF)
        columns = tl.cdiv(con, F.con)
        inside = (block_f < tl.cdiv(free, F.free)) & (block_c < columns)
        if SWIZZLE:
            for i in tl.static_range(F.free):
                row = block_f * F.free + i
                tl.store(scales_ptr + swizzled_offset(row, block_c, columns), scale, mask=inside & (row < free))
        else:
            tl.store(scales_ptr + block_f.to(tl.int64) * columns + block_c, scale, mask=inside)
    elif F.span == "row":
        tl.store(scales_ptr + f, scale, mask=(f < free) & (c == 0))
    else:
        tl.store(scales_ptr + tl.zeros_like(f), scale, mask=(f == 0) & (c == 0))


@triton.jit
def quantize_tile(x_ptr, codes_ptr, scales_ptr, amax_ptr, free, con, pitch, words, key_low, key_high, step, micro,
                  tile_free, tile_con, F: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr, CON: tl.constexpr,
                  CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
                  SWIZZLE: tl.constexpr, INPUT_MAX: tl.constexpr):  # fmt: skip
    """One tile in one direction: (free, con) is the matrix, `words` the 32-bit words of a row of codes."""
    SEGMENTS: tl.constexpr = CON // 16
    R: tl.constexpr = FREE * SEGMENTS
    BF: tl.constexpr = F.free
    BS: tl.constexpr = F.con // 16
    first_f = tile_free * FREE
    first_c = tile_con * CON
    low, high, f, c = segments(x_ptr, pitch, first_f, first_c, free, con, ALONG, FREE, CON)
    if F.span == "block":
        size = finite(block_max(segment_max(low, high), ALONG, FREE, SEGMENTS, BF, BS))
    elif F.span == "row":
        size = finite(tl.load(amax_ptr + f, mask=f < free, other=0.0))
    else:
        size = finite(tl.load(amax_ptr)) + tl.zeros((R,), tl.float32)
    if F.scale == "e4m3":
        multiplier, scale = two_level_scale(size, finite(tl.load(amax_ptr)), F)
    elif F.scale == "e8m0":
        multiplier, scale = e8m0_scale(size, F)
    else:
        multiplier, scale = fp32_scale(size, INPUT_MAX, F)
    store_scales(scales_ptr, scale, f, c, free, con, tile_free, tile_con, F, ALONG, FREE, SEGMENTS, SWIZZLE)
    if F.span == "block":
        multiplier = spread(multiplier, ALONG, FREE, SEGMENTS, BF, BS)

    y0 = low * multiplier[:, None]
    y1 = high * multiplier[:, None]
    n0, n1, w0, w1, w2, w3 = y0, y1, y0, y0, y0, y0
    if STOCHASTIC and CONVERT == "rs":
        at = f.to(tl.int64) * (words * 8) + c
        w0, w1, w2, w3 = philox(at >> 4, key_low, key_high, step, micro)
    elif STOCHASTIC:
        n0 = tile_noise(0, f, c, first_f, first_c, free, con, key_low, key_high, step, micro, ALONG, FREE, SEGMENTS,
                        WHOLE)  # fmt: skip
        n1 = tile_noise(8, f, c, first_f, first_c, free, con, key_low, key_high, step, micro, ALONG, FREE, SEGMENTS,
                        WHOLE)  # fmt: skip
    a = words_of(y0, n0, w0, w1, F, CONVERT, STOCHASTIC)
    b = words_of(y1, n1, w2, w3, F, CONVERT, STOCHASTIC)
    PER: tl.constexpr = 2 if F.bits == 4 else 4
    out = tl.join(a[0], b[0]) if F.bits == 4 else tl.join(tl.join(a[0], b[0]), tl.join(a[1], b[1]))
    out = tl.reshape(out, (R, PER))
    out = tl.where((multiplier != multiplier)[:, None], 0, out)  # NaN has no code: poisoned blocks store zeros
    if ALONG:
        out = tl.reshape(out, (FREE, SEGMENTS * PER))
    else:
        out = tl.reshape(tl.permute(tl.reshape(out, (SEGMENTS, FREE, PER)), (1, 0, 2)), (FREE, SEGMENTS * PER))
    row = (first_f + tl.arange(0, FREE))[:, None]
    word = (tile_con * SEGMENTS * PER + tl.arange(0, SEGMENTS * PER))[None, :]
    tl.store(codes_ptr + row.to(tl.int64) * words + word, out, mask=(row < free) & (word < words))


@triton.jit(do_not_specialize=["key_low", "key_high", "key_low_t", "key_high_t", "step", "micro"])
def quantize_kernel(x_ptr, codes_ptr, scales_ptr, amax_ptr, codes_t_ptr, scales_t_ptr, amax_t_ptr, rows, k, pitch,
                    words, words_t, key_low, key_high, key_low_t, key_high_t, step, micro, F: tl.constexpr,
                    ALONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_OUT: tl.constexpr,
                    COLUMN_OUT: tl.constexpr, CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
                    SWIZZLE: tl.constexpr, INPUT_MAX: tl.constexpr):  # fmt: skip
    """Tile (program 0, program 1) of x (rows, k), k contiguous if ALONG, else rows; the other stride is `pitch`."""
    i = tl.program_id(1)
    j = tl.program_id(0)
    if ROW_OUT:
        quantize_tile(x_ptr, codes_ptr, scales_ptr, amax_ptr, rows, k, pitch, words, key_low, key_high, step, micro,
                      i, j, F, ALONG, ROWS, COLUMNS, CONVERT, STOCHASTIC, WHOLE, SWIZZLE, INPUT_MAX)  # fmt: skip
    if COLUMN_OUT:
        quantize_tile(x_ptr, codes_t_ptr, scales_t_ptr, amax_t_ptr, k, rows, pitch, words_t, key_low_t, key_high_t,
                      step, micro, j, i, F, not ALONG, COLUMNS, ROWS, CONVERT, STOCHASTIC, WHOLE, SWIZZLE,
                      INPUT_MAX)  # fmt: skip


@triton.jit
def amax_kernel(x_ptr, amax_ptr, rows, k, pitch, ALONG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                SPAN: tl.constexpr):  # fmt: skip
    """The first pass: max |x| of the tensor, or of every row, as integer patterns into zeros; NaN and infinity win."""
    low, high, _, _ = segments(
        x_ptr, pitch, tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS, rows, k, ALONG, ROWS, COLUMNS
    )
    bits = segment_max(low, high).to(tl.int32, bitcast=True)
    if SPAN == "tensor":
        tl.atomic_max(amax_ptr, tl.max(bits, 0), sem="relaxed")
    else:
        bits = tl.reshape(bits, (ROWS, COLUMNS // 16)) if ALONG else tl.reshape(bits, (COLUMNS // 16, ROWS))
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        tl.atomic_max(amax_ptr + row, tl.max(bits, 1 if ALONG else 0), mask=row < rows, sem="relaxed")
