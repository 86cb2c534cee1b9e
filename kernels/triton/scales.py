"""The scale of a block from its size: the multiplier of its elements, and the scale as it is stored.

The arithmetic of :mod:`lowprec.numerics.scale`, operation for operation: fp32, true divisions, one rounding each.  `F`
is a `Recipe`, a format as the kernels take it; CANDIDATE numbers the targets that a block may choose from.
"""

import triton
import triton.language as tl

from .codes import e4m3_value, magnitude_value, minifloat_code

FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def finite(size):
    """Infinity -> NaN."""
    return tl.where(tl.abs(size) <= FLT_MAX, size, float("nan"))


@triton.jit
def one_over(x):
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def encode_scale(whole, F: tl.constexpr):
    """Sizes that share a tensor scale (NaN if poisoned) -> what encodes their block scales."""
    s_enc = tl.minimum(tl.math.div_rn(tl.full(whole.shape, F.unit, tl.float32), whole), FLT_MAX)
    return tl.where(whole == 0, 1.0, tl.where(whole == whole, s_enc, float("nan")))


@triton.jit
def decode_scale(whole, F: tl.constexpr):
    """The tensor scale itself: what decodes them."""
    unit = tl.full(whole.shape, F.unit, tl.float32)
    s_enc = tl.math.div_rn(unit, whole)
    scale = tl.where(s_enc > FLT_MAX, one_over(tl.full(whole.shape, FLT_MAX, tl.float32)), tl.math.div_rn(whole, unit))
    return tl.where(whole == 0, 1.0, scale)


@triton.jit
def wanted_scale(size, s_enc, F: tl.constexpr, CANDIDATE: tl.constexpr = 0):
    """The block scale before it is rounded to what stores it."""
    if F.rounding == "te_2_14":
        wanted = tl.math.div_rn(size, tl.full(size.shape, F.target, tl.float32)) * s_enc
        if F.targets[CANDIDATE][2] != 1.0:
            wanted = wanted * F.targets[CANDIDATE][2]
    else:
        wanted = size * (s_enc * F.targets[CANDIDATE][1])
    return wanted


@triton.jit
def nonzero_code(code, F: tl.constexpr):
    """Codes of block scales (int32) with what `zero` puts in place of 0."""
    ONE: tl.constexpr = 0x38 if F.scale == "e4m3" else 0x78
    if F.zero == "one":
        code = tl.where(code == 0, ONE, code)
    if F.zero == "min":
        code = tl.where(code == 0, 1, code)
    return code


@triton.jit
def scale_value(code, F: tl.constexpr):
    """Codes of block scales under a tensor scale (int32, not NaN) -> fp32."""
    if F.scale == "e4m3":
        return e4m3_value(code)
    else:
        return magnitude_value(code, 3, -14)


@triton.jit
def two_level_scale(size, amax, F: tl.constexpr, CANDIDATE: tl.constexpr = 0):
    """NVFP4: sizes of blocks, of what shares a tensor scale -> multipliers, E4M3 or UE5M3 codes (`numerics.scale`)."""
    s_enc = encode_scale(amax, F)
    wanted = wanted_scale(size, s_enc, F, CANDIDATE)
    if F.scale == "e4m3":
        code = minifloat_code(wanted, wanted, False, 8, 3, -6, 448.0)
    else:
        code = minifloat_code(wanted, wanted, False, 8, 3, -14, 61440.0)
    code = nonzero_code(code, F)
    multiplier = tl.minimum(one_over(scale_value(code, F) * one_over(s_enc)), FLT_MAX)
    broken = wanted != wanted
    NAN: tl.constexpr = 0x7F if F.scale == "e4m3" else 0xFF
    return tl.where(broken, float("nan"), multiplier), tl.where(broken, NAN, code).to(tl.uint8)


@triton.jit
def e8m0_scale(size, F: tl.constexpr):
    """MX: size of a block -> multiplier 2^-e (over the guard), and the byte e + 127."""
    bits = size.to(tl.int32, bitcast=True)
    if F.rounding == "rceil" or F.rounding == "nearest":
        ratio = tl.math.div_rn(size, tl.full(size.shape, F.largest, tl.float32))
        bits = ratio.to(tl.int32, bitcast=True)
        exponent = bits >> 23
        rest = bits & 0x7FFFFF
        if F.rounding == "nearest":
            exponent = (bits + (0x800000 - 0x3504F4)) >> 23
        else:
            exponent += (rest > tl.where(exponent == 0, 0x400000, 0)).to(tl.int32)
    else:
        if F.rounding == "even":
            bits += 1 << (22 - F.mantissa)
        exponent = (bits >> 23) - F.max_exponent
        if F.rounding == "ceil":
            exponent += ((bits & 0x7FFFFF) > 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 0), 254)
    power = tl.where(exponent == 254, 1 << 22, (254 - exponent) << 23).to(tl.float32, bitcast=True)
    if F.inverse_guard != 1.0:
        power = power * F.inverse_guard
    broken = size != size
    return tl.where(broken, float("nan"), power), tl.where(broken, 255, exponent).to(tl.uint8)


@triton.jit
def fp32_scale(size, INPUT_MAX: tl.constexpr, F: tl.constexpr, CANDIDATE: tl.constexpr = 0):
    """FP8: multiplier target / size, a power of two under `pow2`, and its reciprocal."""
    multiplier = tl.math.div_rn(tl.full(size.shape, F.targets[CANDIDATE][0], tl.float32), size)
    multiplier = tl.where(multiplier > FLT_MAX, INPUT_MAX, multiplier)
    if F.scale == "pow2":
        power = tl.maximum(multiplier.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23).to(tl.float32, bitcast=True)
        multiplier = power
    multiplier = tl.where(size == 0, 1.0, multiplier)
    multiplier = tl.where(size != size, float("nan"), multiplier)
    return multiplier, one_over(multiplier)
