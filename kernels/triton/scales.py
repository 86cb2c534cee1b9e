"""The scale of a block from its size: the multiplier of its elements, and the scale as it is stored.

The arithmetic of :mod:`lowprec.numerics.scale`, operation for operation: fp32, true divisions, one rounding each.  `F`
is a `Recipe`, a format as the kernels take it.
"""

import triton
import triton.language as tl

from .codes import e4m3_value, minifloat_code

FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def finite(size):
    """Infinity -> NaN."""
    return tl.where(tl.abs(size) <= FLT_MAX, size, float("nan"))


@triton.jit
def one_over(x):
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def two_level_scale(size, amax, F: tl.constexpr):
    """NVFP4: size of a block, of the tensor -> multiplier, E4M3 code (see `numerics.scale`)."""
    s_enc = tl.minimum(tl.math.div_rn(tl.full((), F.unit, tl.float32), amax), FLT_MAX)
    s_enc = tl.where(amax == 0, 1.0, tl.where(amax == amax, s_enc, float("nan")))
    if F.rounding == "te_2_14":
        wanted = tl.math.div_rn(size, tl.full(size.shape, F.target, tl.float32)) * s_enc
    else:
        wanted = size * (s_enc * F.inverse_target)
    code = minifloat_code(wanted, wanted, False, 8, 3, -6, 448.0)
    if F.zero == "one":
        code = tl.where(code == 0, 0x38, code)
    if F.zero == "min":
        code = tl.where(code == 0, 1, code)
    multiplier = tl.minimum(one_over(e4m3_value(code) * one_over(s_enc)), FLT_MAX)
    broken = wanted != wanted
    return tl.where(broken, float("nan"), multiplier), tl.where(broken, 0x7F, code).to(tl.uint8)


@triton.jit
def e8m0_scale(size, F: tl.constexpr):
    """MX: size of a block -> multiplier 2^-e (over the guard), and the byte e + 127."""
    bits = size.to(tl.int32, bitcast=True)
    if F.rounding == "rceil" or F.rounding == "nearest":
        ratio = tl.math.div_rn(size, tl.full(size.shape, F.target, tl.float32))
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
def fp32_scale(size, INPUT_MAX: tl.constexpr, F: tl.constexpr):
    """FP8: multiplier target / size, a power of two under `pow2`, and its reciprocal."""
    multiplier = tl.math.div_rn(tl.full(size.shape, F.target, tl.float32), size)
    multiplier = tl.where(multiplier > FLT_MAX, INPUT_MAX, multiplier)
    if F.scale == "pow2":
        power = tl.maximum(multiplier.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23).to(tl.float32, bitcast=True)
        multiplier = power
    multiplier = tl.where(size == 0, 1.0, multiplier)
    multiplier = tl.where(size != size, float("nan"), multiplier)
    return multiplier, one_over(multiplier)
