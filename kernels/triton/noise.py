"""The random bits of :class:`lowprec.numerics.stream.Stream` on the GPU.

Philox4x32-10 with the 64-bit key of a role and the counter ``(group low, group high, step, micro)``; element i of the
matrix as it lies in memory takes 16 bits: word ``(i % 8) // 2`` of group ``i // 8``, the low half if i is even.  A
number is returned as ``1 + (bits + 1/2) / 65536``, which the bits give as the mantissa of a float without a conversion.

Eight neighbours share one call, about eight instructions an element; where a group straddles two rows (row length not a
multiple of 8) every element makes its own call, the same bits at eight times the price.
"""

import triton
import triton.language as tl


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
        before0 = c0
        before2 = c2
        c0 = tl.math.umulhi(before2, tl.full((), 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c2 = tl.math.umulhi(before0, tl.full((), 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c1 = before2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c3 = before0 * tl.full((), 0xD2511F53, tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _uniform(low, high):
    """Halves of words, shifted to the mantissa -> fp32 in (1, 2)."""
    one: tl.constexpr = 0x3F800000 + 64
    return ((tl.join(low, high) << 7) + one).to(tl.float32, bitcast=True)


@triton.jit
def group_noise(group, key_low, key_high, step, micro):
    """Groups (...) -> 1 + uniform of their eight elements, (..., 2, 2, 2)."""
    w0, w1, w2, w3 = philox(group, key_low, key_high, step, micro)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    return _uniform(words & 0xFFFF, (words >> 16) & 0xFFFF)


@triton.jit
def element_noise(index, key_low, key_high, step, micro):
    """The same for single elements, by their index in memory (int64)."""
    w0, w1, w2, w3 = philox(index >> 3, key_low, key_high, step, micro)
    place = index & 7
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    half = tl.where((place & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32, bitcast=True)
    return ((half << 7) + (0x3F800000 + 64)).to(tl.float32, bitcast=True)
