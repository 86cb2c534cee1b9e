"""Rounding to minifloat codes on the GPU, in integer and fp32 arithmetic or by the conversion instructions of a chip.

A minifloat with M mantissa bits and least normal exponent E0 is a grid of steps ``s = P 2^-M`` in the binade ``P`` of
``v = min(|y|, max)``, P no less than ``2^E0``.  The code of n steps in the binade is ``n + (log2 P - E0) 2^M``.

nearest     ``v + 2^23 s`` is rounded by the adder, to even, to a whole number of steps, and leaves it in the low bits.
stochastic  from the nearest number of steps n and the exact remainder ``d = v - n s`` (|d| <= s/2): one step down if
            d < 0, one up if ``noise s < d`` (or ``(noise - 1) s < d`` after a step down): `Element.round`'s
            ``noise < (v - lo) / (hi - lo)``, every operation exact.
hardware    ``cvt.rn.satfinite.e2m1x2.f32`` (sm_100 and later) and ``cvt.rn.satfinite.e4m3x2.f32`` (sm_89 and later)
            round alike; ``cvt.rs.satfinite.e2m1x4.f32`` (sm_100a and sm_103a) takes 8 random bits an element, so it is
            another drawing, unbiased to 2^-9 of a step.

What this is not: safe for NaN.  Its code is arbitrary here; the kernel clears the words of blocks that are poisoned.
"""

import triton
import triton.language as tl

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
RN_E4M3 = tl.constexpr(
    """{
.reg .b16 h0, h1;
cvt.rn.satfinite.e4m3x2.f32 h0, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 h1, $4, $3;
mov.b32 $0, {h0, h1};
}"""
)


@triton.jit
def minifloat_code(y, noise, STOCHASTIC: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
                   MAX: tl.constexpr):  # fmt: skip
    """fp32 -> codes (int32); `noise` is `1 + uniform`, in (1, 2), of y's shape, and unused for nearest."""
    v = tl.minimum(tl.abs(y), MAX)
    binade = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, (LEAST + 127) << 23)
    magic = (binade + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True)
    total = v + magic
    code = total.to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
    code += (binade >> (23 - MANTISSA)) - ((LEAST + 127) << MANTISSA)
    if STOCHASTIC:
        rest = v - (total - magic)
        step = (binade - (MANTISSA << 23)).to(tl.float32, bitcast=True)
        below = rest < 0
        threshold = (noise - tl.where(below, 2.0, 1.0)) * step
        code += (threshold < rest).to(tl.int32) - below.to(tl.int32)
    sign: tl.constexpr = 1 << (BITS - 1)
    return code | ((y.to(tl.int32, bitcast=True) >> (32 - BITS)) & sign)


@triton.jit
def e4m3_value(code):
    """Codes of non-negative E4M3 numbers (int32, not NaN) -> fp32."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code >= 8, normal, code.to(tl.float32) * 0.001953125)


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
def words_of(y, noise, w0, w1, F: tl.constexpr, CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A scaled half (R, 8) -> its codes in one word (four bits) or two (bytes), a tuple of (R,) int32."""
    if STOCHASTIC and CONVERT == "rs":
        c = eight(y)
        return (
            tl.inline_asm_elementwise(
                RS_E2M1,
                "=r,r,r,r,r,r,r,r,r,r,r",
                [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], w0, w1],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            ),
        )
    elif not STOCHASTIC and CONVERT != "software" and F.element == "e2m1":
        c = eight(y)
        return (
            tl.inline_asm_elementwise(
                RN_E2M1,
                "=r,r,r,r,r,r,r,r,r",
                [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            ),
        )
    elif not STOCHASTIC and CONVERT != "software" and F.element == "e4m3":
        c = eight(y)
        return (
            tl.inline_asm_elementwise(
                RN_E4M3, "=r,r,r,r,r", [c[0], c[1], c[2], c[3]], dtype=tl.int32, is_pure=True, pack=1
            ),
            tl.inline_asm_elementwise(
                RN_E4M3, "=r,r,r,r,r", [c[4], c[5], c[6], c[7]], dtype=tl.int32, is_pure=True, pack=1
            ),
        )
    else:
        c = eight(minifloat_code(y, noise, STOCHASTIC, F.bits, F.mantissa, F.least, F.largest))
        if F.bits == 4:
            return (four_bit_word(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]),)
        else:
            return four_byte_word(c[0], c[1], c[2], c[3]), four_byte_word(c[4], c[5], c[6], c[7])
