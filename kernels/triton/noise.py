"""The random bits of :class:`lowprec.numerics.stream.Stream` on the GPU.

Philox4x32-10 with the 64-bit key of a role and the counter ``(group low, group high, step, micro)``; element i of the
matrix as it lies in memory takes 16 bits b: word ``(i % 8) // 2`` of group ``i // 8``, the low half if i is even.

They are returned as a *dither*, ``(65535 - b) 2^8 + 127``: what :func:`codes.minifloat_code` adds below the last bit
that it keeps, a number of 24 bits that two bytes of the word and two constant ones make without arithmetic.

Eight neighbours share one call, about five instructions an element (20 products of 32 x 32 bits, 20 logical
operations); where a group straddles two rows (row length not a multiple of 8) every element makes its own call, the
same bits at eight times the price.
"""

import triton
import triton.language as tl

LOW_HALF = tl.constexpr("prmt.b32 $0, $1, $2, 0x5104;")  # bytes 0 and 1 of the word above 0x7f
HIGH_HALF = tl.constexpr("prmt.b32 $0, $1, $2, 0x5324;")  # bytes 2 and 3


@triton.jit
def philox(group, key_low, key_high, step, micro):
    """Four uint32 words of every group (int64)."""
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + micro.to(tl.uint32)
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * tl.full((), 0xD2511F53, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full((), 0xCD9E8D57, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def group_noise(group, key_low, key_high, step, micro):
    """Groups (...) -> dithers of their eight elements, int32 (..., 2, 2, 2)."""
    w0, w1, w2, w3 = philox(group, key_low, key_high, step, micro)
    words = ~tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    ones = ((group >> 32).to(tl.int32) >> 31) | 0x7F  # 0x7f; as a constant it would cost a move for every element
    ones = tl.join(tl.join(ones, ones), tl.join(ones, ones))
    return tl.join(_bytes(words, ones, LOW_HALF), _bytes(words, ones, HIGH_HALF))


@triton.jit
def _bytes(words, ones, HALF: tl.constexpr):
    return tl.inline_asm_elementwise(HALF, "=r,r,r", [words, ones], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def element_noise(index, key_low, key_high, step, micro):
    """The same for single elements, by their index in memory (int64)."""
    w0, w1, w2, w3 = philox(index >> 3, key_low, key_high, step, micro)
    place = index & 7
    word = ~tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3)).to(tl.int32, bitcast=True)
    return tl.where((place & 1) == 0, (word & 0xFFFF) << 8, (word >> 8) & 0xFFFF00) | 127
