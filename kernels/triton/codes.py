"""Rounding to the codes of an element on the GPU, in integer and fp32 arithmetic or by the conversions of a chip.

A minifloat with M mantissa bits and least normal exponent E0 is a grid of steps ``s = P 2^-M`` in the binade ``P`` of
``v = min(|y|, max)``, P no less than ``2^E0``.  The code of n steps in the binade is ``n + (log2 P - E0) 2^M``.
Integers are a minifloat too, of one binade: ``int8`` has M = 6 and E0 = 6.

nearest     ``v + 2^23 s`` is rounded by the adder, to even, to a whole number of steps, and leaves it in the low bits.
stochastic  ``v 2^(-126 - E0)``, rounded up, is a number whose bits, as an integer, count steps in units of
            ``2^-(23 - M)``: subnormals of the element are subnormal there too.  With 23 - M >= 17 such bits, up is
            where the noise ``(b + 1/2) / 65536`` lies below the fraction: add ``65535 - b`` and a little less than
            1/2 at the fraction's 16th bit, and let it carry (`Element.round`'s comparison, exactly; rounding up
            keeps what is above a threshold above it).
hardware    ``cvt.rn.satfinite`` to two codes rounds alike: E4M3 and E5M2 from sm_89 on, E2M1, E2M3 and E3M2 from sm_100
            on.  ``cvt.rs.satfinite`` to four codes of E2M1, E4M3 or E5M2 (sm_100a and sm_103a) takes 8 random bits an
            element, so it is another drawing, unbiased to 2^-9 of a step.

What this is not: safe for NaN.  Its code is arbitrary here; the kernel clears the words of blocks that are poisoned.
"""

import triton
import triton.language as tl
from triton.language import constexpr


def _nearest_bytes(element: str) -> constexpr:
    return tl.constexpr(
        f"""{{
.reg .b16 h0, h1;
cvt.rn.satfinite.{element}x2.f32 h0, $2, $1;
cvt.rn.satfinite.{element}x2.f32 h1, $4, $3;
mov.b32 $0, {{h0, h1}};
}}"""
    )


RN_E4M3, RN_E5M2 = _nearest_bytes("e4m3"), _nearest_bytes("e5m2")
RN_E2M3, RN_E3M2 = _nearest_bytes("e2m3"), _nearest_bytes("e3m2")
RN_E2M1 = tl.constexpr(
    """{
.reg .b8 b0, b1, b2, b3;
cvt.rn.satfinite.e2m1x2.f32 b0, $2, $1;
cvt.rn.satfinite.e2m1x2.f32 b1, $4, $3;
cvt.rn.satfinite.e2m1x2.f32 b2, $6, $5;
cvt.rn.satfinite.e2m1x2.f32 b3, $8, $7;
mov.b32 $0, {b0, b1, b2, b3};
}"""
)
RS_E2M1 = tl.constexpr(
    """{
.reg .b16 h0, h1;
cvt.rs.satfinite.e2m1x4.f32 h0, {$4, $3, $2, $1}, $9;
cvt.rs.satfinite.e2m1x4.f32 h1, {$8, $7, $6, $5}, $10;
mov.b32 $0, {h0, h1};
}"""
)
RS_E4M3 = tl.constexpr("cvt.rs.satfinite.e4m3x4.f32 $0, {$4, $3, $2, $1}, $5;")
RS_E5M2 = tl.constexpr("cvt.rs.satfinite.e5m2x4.f32 $0, {$4, $3, $2, $1}, $5;")
ADD_DITHER = tl.constexpr(
    """{
.reg .f32 u;
.reg .b32 i, y;
mul.rp.f32 u, $1, $2;
mov.b32 i, u;
mad.lo.s32 i, i, $3, $4;
mov.b32 y, $5;
lop3.b32 $0, i, y, 0x80000000, 0xf8;
}"""
)
TOP_BYTES = tl.constexpr(
    """{
.reg .b32 low, high;
prmt.b32 low, $1, $2, 0x0073;
prmt.b32 high, $3, $4, 0x0073;
prmt.b32 $0, low, high, 0x5410;
}"""
)


@triton.jit
def stochastic_top(y, dither, MANTISSA: tl.constexpr, LEAST: tl.constexpr, MAX: tl.constexpr):
    """fp32 -> int32 with the sign in bit 31, the rounded magnitude's code in bits 24 to 30, and no meaning below."""
    power = tl.full(y.shape, 2.0 ** (-126 - LEAST), tl.float32)
    shift = tl.full(y.shape, 2 << MANTISSA, tl.int32)
    return tl.inline_asm_elementwise(
        ADD_DITHER, "=r,f,f,r,r,f", [tl.minimum(tl.abs(y), MAX), power, shift, dither, y], dtype=tl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def with_sign(code, y, BITS: tl.constexpr, TWOS: tl.constexpr):
    """Magnitudes' codes and the numbers they are of -> codes of BITS bits."""
    bits = y.to(tl.int32, bitcast=True)
    if TWOS:
        negative = bits >> 31
        return ((code ^ negative) - negative) & ((1 << BITS) - 1)
    else:
        sign: tl.constexpr = 1 << (BITS - 1)
        return code | ((bits >> (32 - BITS)) & sign)


@triton.jit
def minifloat_code(y, dither, STOCHASTIC: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
                   MAX: tl.constexpr, TWOS: tl.constexpr = False):  # fmt: skip
    """fp32 -> codes (int32); `dither` as `noise` makes it, of y's shape, and unused for nearest."""
    if STOCHASTIC:
        code = (stochastic_top(y, dither, MANTISSA, LEAST, MAX) >> 24) & 0x7F
    else:
        v = tl.minimum(tl.abs(y), MAX)
        binade = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, (LEAST + 127) << 23)
        magic = (binade + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True)
        code = (v + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
        code += (binade >> (23 - MANTISSA)) - ((LEAST + 127) << MANTISSA)
    return with_sign(code, y, BITS, TWOS)


@triton.jit
def magnitude_value(code, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Codes of non-negative minifloats (int32) -> fp32."""
    normal = ((code << (23 - MANTISSA)) + ((LEAST + 126) << 23)).to(tl.float32, bitcast=True)
    return tl.where(code >= (1 << MANTISSA), normal, code.to(tl.float32) * 2.0 ** (LEAST - MANTISSA))


@triton.jit
def e4m3_value(code):
    """Codes of non-negative E4M3 numbers (int32, not NaN) -> fp32."""
    return magnitude_value(code, 3, -6)


@triton.jit
def listed_index(y, F: tl.constexpr):
    """fp32 -> index (int32) of the nearest of the eight magnitudes of the second element."""
    a = tl.abs(y)
    index = (a >= F.thresholds[0]).to(tl.int32)
    for i in tl.static_range(1, 7):
        index += (a >= F.thresholds[i]).to(tl.int32)
    return index


@triton.jit
def eight(t):
    """(R, 8) -> its eight columns, (R,) each."""
    R: tl.constexpr = t.shape[0]
    even, odd = tl.split(tl.reshape(t, (R, 2, 2, 2)))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    c0, c4 = tl.split(t0)
    c1, c5 = tl.split(t1)
    c2, c6 = tl.split(t2)
    c3, c7 = tl.split(t3)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def four_bit_word(c0, c1, c2, c3, c4, c5, c6, c7):
    """Eight codes (int32) -> a word, the first in the low bits: the even column in the low nibble of each byte."""
    low = c0 | (c1 << 4) | (c2 << 8) | (c3 << 12)
    return low | ((c4 | (c5 << 4) | (c6 << 8) | (c7 << 12)) << 16)


@triton.jit
def four_byte_word(c0, c1, c2, c3):
    return c0 | (c1 << 8) | (c2 << 16) | (c3 << 24)


@triton.jit
def word_of(c, F: tl.constexpr):
    """Eight codes -> one word or two, a tuple."""
    if F.bits == 4:
        return (four_bit_word(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]),)
    else:
        return four_byte_word(c[0], c[1], c[2], c[3]), four_byte_word(c[4], c[5], c[6], c[7])


@triton.jit
def top_bytes(t0, t1, t2, t3):
    """The highest bytes of four words, the first in the low bits."""
    return tl.inline_asm_elementwise(TOP_BYTES, "=r,r,r,r,r", [t0, t1, t2, t3], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def stochastic_words(y, dither, F: tl.constexpr):
    """`words_of` for stochastic rounding in software: bytes are signs and seven bits until they are packed."""
    top = stochastic_top(y, dither, F.mantissa, F.least, F.largest)
    if F.twos:
        return word_of(eight(with_sign((top >> 24) & 0x7F, y, F.code_bits, True)), F)
    elif F.bits == 4:
        t = eight(top)
        even = top_bytes(t[0], t[2], t[4], t[6])
        odd = top_bytes(t[1], t[3], t[5], t[7])
        low = (even & 0x07070707) | ((even >> 4) & 0x08080808)
        high = ((odd << 4) & 0x70707070) | (odd & -0x7F7F7F80)
        return (low | high,)
    else:
        t = eight(top)
        a = top_bytes(t[0], t[1], t[2], t[3])
        b = top_bytes(t[4], t[5], t[6], t[7])
        if F.bits == 6:
            a = (a & 0x1F1F1F1F) | ((a >> 2) & 0x20202020)
            b = (b & 0x1F1F1F1F) | ((b >> 2) & 0x20202020)
        return a, b


@triton.jit
def nearest_bytes(c, CVT: tl.constexpr):
    """Eight columns -> the two words of their byte codes, by a conversion to two codes."""
    return (
        tl.inline_asm_elementwise(CVT, "=r,r,r,r,r", [c[0], c[1], c[2], c[3]], dtype=tl.int32, is_pure=True, pack=1),
        tl.inline_asm_elementwise(CVT, "=r,r,r,r,r", [c[4], c[5], c[6], c[7]], dtype=tl.int32, is_pure=True, pack=1),
    )


@triton.jit
def nearest_words(y, F: tl.constexpr, CONVERT: tl.constexpr):
    """`words_of` for rounding to nearest."""
    if CONVERT == "software":
        return word_of(eight(minifloat_code(y, y, False, F.code_bits, F.mantissa, F.least, F.largest, F.twos)), F)
    elif F.element == "e2m1":
        c = eight(y)
        return (
            tl.inline_asm_elementwise(
                RN_E2M1, "=r,r,r,r,r,r,r,r,r", [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]], dtype=tl.int32,
                is_pure=True, pack=1,
            ),
        )  # fmt: skip
    elif F.element == "e4m3":
        return nearest_bytes(eight(y), RN_E4M3)
    elif F.element == "e5m2":
        return nearest_bytes(eight(y), RN_E5M2)
    elif F.element == "e2m3":
        return nearest_bytes(eight(y), RN_E2M3)
    else:
        tl.static_assert(F.element == "e3m2", "no chip converts to this element")
        return nearest_bytes(eight(y), RN_E3M2)


@triton.jit
def hardware_words(y, w0, w1, F: tl.constexpr):
    """`words_of` for the stochastic rounding of a chip."""
    c = eight(y)
    if F.element == "e2m1":
        return (
            tl.inline_asm_elementwise(
                RS_E2M1, "=r,r,r,r,r,r,r,r,r,r,r", [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], w0, w1],
                dtype=tl.int32, is_pure=True, pack=1,
            ),
        )  # fmt: skip
    else:
        CVT: tl.constexpr = RS_E4M3 if F.element == "e4m3" else RS_E5M2
        return (
            tl.inline_asm_elementwise(
                CVT, "=r,r,r,r,r,r", [c[0], c[1], c[2], c[3], w0], dtype=tl.int32, is_pure=True, pack=1
            ),
            tl.inline_asm_elementwise(
                CVT, "=r,r,r,r,r,r", [c[4], c[5], c[6], c[7], w1], dtype=tl.int32, is_pure=True, pack=1
            ),
        )


@triton.jit
def words_of(y, noise, w0, w1, F: tl.constexpr, CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr, second=None):
    """A scaled half (R, 8) -> its codes in one word (four bits) or two (bytes), a tuple of (R,) int32.

    noise: dithers, of y's shape; w0, w1: random words for `cvt.rs` (CONVERT "rs"); second: which segments take the
    second element, (R,).
    """
    if STOCHASTIC and CONVERT == "rs":
        return hardware_words(y, w0, w1, F)
    elif STOCHASTIC:
        return stochastic_words(y, noise, F)
    elif F.second:
        first = nearest_words(y, F, CONVERT)
        other = word_of(eight(with_sign(listed_index(y, F), y, 4, True)), F)
        return (tl.where(second, other[0], first[0]),)
    else:
        return nearest_words(y, F, CONVERT)
