"""From a tile to the scales of its blocks, chosen among several candidates where the format says so.

    NVFP4    scale = E4M3(size * s_enc / target), s_enc = tensor_max * target / size of the tensor, a row or 128 of one
    4-over-6 the block's maximum maps to 6 or to 4 (arXiv:2512.02010); IF4 two elements (arXiv:2603.28765)

A candidate is tried on registers: ``value = ((code * scale) * size) / (tensor_max * target)``, and the block's error is
``sum (value - x)^2`` (``mse``) or ``sum |value - x|`` (``mae``), in the order of `numerics.scale.tree_sum`: elements
16 apart first, then 8, 4, 2, 1, then rows.  The smaller error wins, a tie goes to the candidate named first.  The codes
themselves are made afterwards, once, as for every format.

Under the scale of a tensor the multiplier depends on the block's E4M3 code alone and comes from a table (`level`).
"""

import triton
import triton.language as tl

from .blocks import block_max, segment_max, spread
from .level import e4m3_code, level_of
from .scales import (
    FLT_MAX,
    decode_scale,
    e8m0_scale,
    finite,
    fp32_scale,
    nonzero_code,
    scale_value,
    two_level_scale,
    wanted_scale,
)

# a pair rounded to E2M1 and back
E2M1_VALUES = tl.constexpr(
    """{
.reg .b8 b;
.reg .b16 low, high;
.reg .b32 h;
cvt.rn.satfinite.e2m1x2.f32 b, $3, $2;
cvt.rn.f16x2.e2m1x2 h, b;
mov.b32 {low, high}, h;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}"""
)


@triton.jit
def signed_as(magnitude, y):
    bits = magnitude.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nearest_value(y, F: tl.constexpr, SECOND: tl.constexpr, CHIP: tl.constexpr):
    """fp32 -> the number of the first or the second element next to it."""
    if CHIP >= 100 and F.element == "e2m1" and not SECOND:
        return tl.inline_asm_elementwise(E2M1_VALUES, "=f,=f,f,f", [y], dtype=tl.float32, is_pure=True, pack=2)
    elif SECOND:
        magnitude = tl.zeros_like(y)
        for i in tl.static_range(7):
            magnitude = tl.where(tl.abs(y) >= F.thresholds[i], F.numbers[i + 1], magnitude)
        return signed_as(magnitude, y)
    else:
        v = tl.minimum(tl.abs(y), F.largest)
        binade = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, (F.least + 127) << 23)
        magic = (binade + ((23 - F.mantissa) << 23)).to(tl.float32, bitcast=True)
        return signed_as((v + magic) - magic, y)


@triton.jit
def penalty(difference, F: tl.constexpr):
    return difference * difference if F.select == "mse" else tl.abs(difference)


@triton.jit
def half_error(x, multiplier, scale, whole, F: tl.constexpr, CHIP: tl.constexpr):
    """Errors of a half (R, 8); multiplier, scale and tensor size of every segment, (R, 1)."""
    value = nearest_value(x * multiplier, F, False, CHIP) * scale
    if F.tensor != "":
        value = tl.math.div_rn(value * whole, tl.full(value.shape, F.unit, tl.float32))
    return penalty(value - x, F)


@triton.jit
def e2m1_square_error(x, multiplier, one, three_halves, F: tl.constexpr, CHIP: tl.constexpr):
    """`half_error` of E2M1 for `mse`, from the values of 1 and 1.5 in every segment, (R, 1).

    All others are these times a power of two, exactly so long as they are normal.  Smaller ones do not matter: beside
    them x is either large, and they are less than half a unit of its last place, or below 2^-75, as is the difference,
    whose square is 0.
    """
    bits = nearest_value(x * multiplier, F, False, CHIP).to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    difference = power * tl.where((bits & 0x400000) != 0, three_halves, one) - tl.abs(x)
    return difference * difference


@triton.jit
def halves_sum(t, OUTER: tl.constexpr, INNER: tl.constexpr):
    """t, flattened (OUTER, 2, INNER), summed over the middle."""
    u, v = tl.split(tl.permute(tl.reshape(t, (OUTER, 2, INNER)), (0, 2, 1)))
    return u + v


@triton.jit
def tree_sum(low, high, ALONG: tl.constexpr, FREE: tl.constexpr, SEGMENTS: tl.constexpr, BF: tl.constexpr,
             BS: tl.constexpr):  # fmt: skip
    """Errors of a tile's halves (R, 8) -> those of its blocks of BF x BS segments, in blocks' order."""
    R: tl.constexpr = FREE * SEGMENTS
    LINES: tl.constexpr = 1 if ALONG else FREE
    for i in tl.static_range(3):
        if (BS >> i) > 1:
            low = halves_sum(low, (R >> i) // ((BS >> i) * LINES), (BS >> i) // 2 * LINES * 8)
            high = halves_sum(high, (R >> i) // ((BS >> i) * LINES), (BS >> i) // 2 * LINES * 8)
    N: tl.constexpr = R // BS
    t = tl.reshape(low + high, (N, 8))
    for i in tl.static_range(3):
        t = halves_sum(t, N, 4 >> i)
    COLUMNS: tl.constexpr = N // FREE if ALONG else 1
    for i in tl.static_range(7):
        if (BF >> i) > 1:
            t = halves_sum(t, (N >> i) // ((BF >> i) * COLUMNS), (BF >> i) // 2 * COLUMNS)
    return tl.reshape(t, (N // BF,))


@triton.jit
def tensor_sizes(size, amax_ptr, first_f, free, F: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
                 SEGMENTS: tl.constexpr):  # fmt: skip
    """Sizes of what shares a tensor scale: (), or one for each of the blocks."""
    BS: tl.constexpr = F.con // 16
    if F.tensor == "tensor":
        whole = finite(tl.load(amax_ptr))
    elif F.tensor == "row":
        b = tl.arange(0, FREE * SEGMENTS // BS)
        row = first_f + (b // (SEGMENTS // BS) if ALONG else b % FREE)
        whole = finite(tl.load(amax_ptr + row, mask=row < free, other=0.0))
    elif F.tensor == "128":
        groups = block_max(size, ALONG, FREE, SEGMENTS // BS, 1, 8 // BS)
        whole = spread(groups, ALONG, FREE, SEGMENTS // BS, 1, 8 // BS)
    else:
        whole = tl.full((), 0.0, tl.float32)
    return whole


@triton.jit
def candidate(size, whole, s_enc, table, F: tl.constexpr, TARGET: tl.constexpr, INPUT_MAX: tl.constexpr,
              CHIP: tl.constexpr):  # fmt: skip
    """Sizes of blocks -> multipliers, and scales as stored (two-level ones as int32 codes)."""
    if F.scale == "e4m3" and F.tensor == "tensor":
        code = nonzero_code(e4m3_code(wanted_scale(size, s_enc, F, TARGET), CHIP), F)
        return tl.gather(table, code, 0), code
    elif F.tensor != "":
        multiplier, code = two_level_scale(size, whole, F, TARGET)
        return multiplier, code.to(tl.int32)
    elif F.scale == "e8m0":
        return e8m0_scale(size, F)
    else:
        return fp32_scale(size, INPUT_MAX, F, TARGET)


@triton.jit
def scales_of(low, high, f, first_f, free, amax_ptr, F: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
              SEGMENTS: tl.constexpr, INPUT_MAX: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """A tile -> the multiplier of every segment (R,); its scales as they are stored; what decodes them for every 128
    elements, (R / 8,); which segments take the second element, (R,).

    low, high, f: what `segments` gave; first_f: the tile's first row; amax_ptr: the maximum of the tensor or of
    every row, where the format needs one.  The last two results mean something only for formats that have such.
    """
    R: tl.constexpr = FREE * SEGMENTS
    BF: tl.constexpr = F.free
    BS: tl.constexpr = F.con // 16
    if F.span == "block":
        size = finite(block_max(segment_max(low, high, CHIP), ALONG, FREE, SEGMENTS, BF, BS))
    elif F.span == "row":
        size = finite(tl.load(amax_ptr + f, mask=f < free, other=0.0))
    else:
        size = finite(tl.load(amax_ptr)) + tl.zeros((R,), tl.float32)
    whole = tensor_sizes(size, amax_ptr, first_f, free, F, ALONG, FREE, SEGMENTS)
    s_enc, table = whole, whole
    if F.scale == "e4m3" and F.tensor == "tensor":
        s_enc, table = level_of(whole, F)
    multiplier, scale = candidate(size, whole, s_enc, table, F, 0, INPUT_MAX, CHIP)
    second = multiplier != multiplier
    level = second
    if F.candidates > 1:
        multiplier, scale, second = best(low, high, size, whole, s_enc, table, multiplier, scale, F, ALONG, FREE,
                                         SEGMENTS, INPUT_MAX, CHIP)  # fmt: skip
    if F.tensor != "":
        scale = scale.to(tl.uint8)
    if F.tensor == "128":
        level = decode_scale(block_max(size, ALONG, FREE, SEGMENTS // BS, 1, 8 // BS), F)
    if F.span == "block":
        multiplier = spread(multiplier, ALONG, FREE, SEGMENTS, BF, BS)
        second = spread(second, ALONG, FREE, SEGMENTS, BF, BS)
    return multiplier, scale, level, second


@triton.jit
def error_of(low, high, size, whole, multiplier, scale, F: tl.constexpr, SECOND: tl.constexpr, ALONG: tl.constexpr,
             FREE: tl.constexpr, SEGMENTS: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """Errors of all blocks, whose sizes and tensor sizes are given, under a multiplier and a stored scale each."""
    BF: tl.constexpr = F.free
    BS: tl.constexpr = F.con // 16
    number = scale_value(scale, F) if F.tensor != "" else scale
    m = spread(multiplier, ALONG, FREE, SEGMENTS, BF, BS)[:, None]
    if F.tensor != "" and F.element == "e2m1" and F.select == "mse" and not SECOND:
        unit = tl.full(number.shape, F.unit, tl.float32)
        one = spread(tl.math.div_rn(number * whole, unit), ALONG, FREE, SEGMENTS, BF, BS)[:, None]
        three = spread(tl.math.div_rn(number * 1.5 * whole, unit), ALONG, FREE, SEGMENTS, BF, BS)[:, None]
        e_low = e2m1_square_error(low, m, one, three, F, CHIP)
        e_high = e2m1_square_error(high, m, one, three, F, CHIP)
        error = tree_sum(e_low, e_high, ALONG, FREE, SEGMENTS, BF, BS)
        largest = nearest_value(size * multiplier, F, False, 0) * number * whole
        return tl.where(largest > FLT_MAX, largest, error)  # its value overflows before it is divided
    elif SECOND:
        a_low = tl.abs(low * m)
        a_high = tl.abs(high * m)
        v_low = tl.zeros_like(low)
        v_high = tl.zeros_like(high)
        for i in tl.static_range(7):  # seven values a block; the last whose threshold is reached
            value = tl.math.div_rn(F.numbers[i + 1] * number * whole, tl.full(number.shape, F.unit, tl.float32))
            value = spread(value, ALONG, FREE, SEGMENTS, BF, BS)[:, None]
            v_low = tl.where(a_low >= F.thresholds[i], value, v_low)
            v_high = tl.where(a_high >= F.thresholds[i], value, v_high)
        e_low = penalty(v_low - tl.abs(low), F)
        e_high = penalty(v_high - tl.abs(high), F)
        return tree_sum(e_low, e_high, ALONG, FREE, SEGMENTS, BF, BS)
    else:
        n = spread(number, ALONG, FREE, SEGMENTS, BF, BS)[:, None]
        w = whole
        if F.tensor == "row" or F.tensor == "128":
            w = spread(whole, ALONG, FREE, SEGMENTS, BF, BS)[:, None]
        e_low = half_error(low, m, n, w, F, CHIP)
        e_high = half_error(high, m, n, w, F, CHIP)
        return tree_sum(e_low, e_high, ALONG, FREE, SEGMENTS, BF, BS)


@triton.jit
def best(low, high, size, whole, s_enc, table, multiplier, scale, F: tl.constexpr, ALONG: tl.constexpr,
         FREE: tl.constexpr, SEGMENTS: tl.constexpr, INPUT_MAX: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """The candidate of the smallest error for every block: multiplier, stored scale, whether of the second element.

    multiplier, scale: those of the first candidate.
    """
    CANDIDATES: tl.constexpr = F.candidates  # Triton before 3.8 takes no field of a tuple as a bound
    TARGETS: tl.constexpr = CANDIDATES // 2 if F.second else CANDIDATES
    error = error_of(low, high, size, whole, multiplier, scale, F, False, ALONG, FREE, SEGMENTS, CHIP)
    second = size != size  # nowhere yet: what is poisoned never compares
    for i in tl.static_range(1, CANDIDATES):
        m, s = candidate(size, whole, s_enc, table, F, i % TARGETS, INPUT_MAX, CHIP)
        e = error_of(low, high, size, whole, m, s, F, i >= TARGETS, ALONG, FREE, SEGMENTS, CHIP)
        better = e < error
        error = tl.where(better, e, error)
        multiplier = tl.where(better, m, multiplier)
        if i >= TARGETS:  # the sign bit of the scale marks the second element
            s = s | 0x80
            second = second | better
        scale = tl.where(better, s, scale)
    return multiplier, scale, second
