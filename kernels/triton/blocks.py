"""A tile of a matrix as segments of 16 along the contracted axis, and the maxima of its blocks.

A tile of FREE x CON elements, CON along the axis that a product contracts, is held as two halves (R, 8) of segments,
R = FREE * CON / 16, so that one thread owns a segment whichever way the matrix lies in memory: 16-byte loads run along
the segment, or across eight of them.  Blocks are one or several segments, and their maximum a maximum over (R,).
"""

import triton
import triton.language as tl

from .codes import eight
from .pairs import widen

# sixteen magnitudes in eight instructions: from sm_100 on a maximum takes three
MAX16 = tl.constexpr(
    """{
.reg .f32 a, b, c, d;
max.NaN.abs.f32 a, $1, $2, $3;
max.NaN.abs.f32 b, $4, $5, $6;
max.NaN.abs.f32 c, $7, $8, $9;
max.NaN.abs.f32 d, $10, $11, $12;
max.NaN.abs.f32 a, a, $13, $14;
max.NaN.abs.f32 b, b, $15, $16;
max.NaN.abs.f32 a, a, b, c;
max.NaN.f32 $0, a, d;
}"""
)


@triton.jit
def load_half(at, step, left, inside, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """(R, WIDTH) from `at` (R, 1) on, `step` apart; `left` (R, 1) elements are in the matrix, of rows `inside`."""
    e = tl.arange(0, WIDTH)[None, :]
    if FULL:
        return tl.load(at + e * step)
    else:
        return tl.load(at + e * step, mask=inside & (e < left), other=0.0)


@triton.jit
def segments(x_ptr, pitch, first_free, first_con, free, con, ALONG: tl.constexpr, FREE: tl.constexpr,
             CON: tl.constexpr, FULL: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """The tile as two halves (R, 8) fp32, and where segments begin, free and contracted, (R,).

    ALONG: memory runs along the contracted axis, segments are ordered (free, segment); else across it, (segment, free).
    FULL: no tile leaves the matrix.  Only where the tile begins is reckoned in 64 bits.
    """
    R: tl.constexpr = FREE * (CON // 16)
    s = tl.arange(0, R)
    f = s // (CON // 16) if ALONG else s % FREE
    c = (s % (CON // 16) if ALONG else s // FREE) * 16
    if ALONG:
        at = x_ptr + (first_free.to(tl.int64) * pitch + first_con) + (f * pitch + c)[:, None]
        step = 1
    else:
        at = x_ptr + (first_con.to(tl.int64) * pitch + first_free) + (c * pitch + f)[:, None]
        step = pitch
    inside = f[:, None] < free - first_free
    left = (con - first_con - c)[:, None]
    if ALONG and x_ptr.dtype.element_ty.primitive_bitwidth == 32:  # 16 bytes are four: quarters, or threads would share
        a = tl.join(load_half(at, step, left, inside, 4, FULL), load_half(at + 4, step, left - 4, inside, 4, FULL))
        b = tl.join(
            load_half(at + 8, step, left - 8, inside, 4, FULL), load_half(at + 12, step, left - 12, inside, 4, FULL)
        )
        low = tl.reshape(tl.permute(a, (0, 2, 1)), (R, 8))
        high = tl.reshape(tl.permute(b, (0, 2, 1)), (R, 8))
    else:
        low = load_half(at, step, left, inside, 8, FULL)
        high = load_half(at + 8 * step, step, left - 8, inside, 8, FULL)
    return widen(low, CHIP), widen(high, CHIP), first_free + f, first_con + c


@triton.jit
def segment_max(low, high, CHIP: tl.constexpr):
    """max |x| of every segment (R,), NaN if it holds one."""
    R: tl.constexpr = low.shape[0]
    if CHIP >= 100:
        a = eight(low)
        b = eight(high)
        m = tl.inline_asm_elementwise(
            MAX16,
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        m = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
        for i in tl.static_range(3):
            u, v = tl.split(tl.reshape(m, (R, 4 >> i, 2)))
            m = tl.maximum(u, v, propagate_nan=tl.PropagateNan.ALL)
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
