"""The two levels of an NVFP4 scale, by a table: what a program computes once instead of once a block.

    s_enc = unit / amax          code = E4M3(size * s_enc / target)          multiplier = 1 / (value(code) / s_enc)

With the tensor's maximum known, the multiplier of a block depends on its code alone, of which there are 127: one a
thread, by the definition's own true divisions, and a block looks its own up in shared memory.  Code 0x7F is NaN, which
is what poisons a block: conversion, table and stored scale agree on it without a test.
"""

import triton
import triton.language as tl

from .codes import e4m3_value, minifloat_code
from .scales import FLT_MAX, one_over

E4M3_OF = tl.constexpr("{\n.reg .b16 h;\ncvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, $1;\ncvt.u32.u16 $0, h;\n}")


@triton.jit
def level_of(amax, F: tl.constexpr):
    """Maximum of the tensor (NaN if poisoned) -> s_enc, and the multipliers of E4M3 codes 0 .. 127, (128,)."""
    s_enc = tl.minimum(tl.math.div_rn(tl.full((), F.unit, tl.float32), amax), FLT_MAX)
    s_enc = tl.where(amax == 0, 1.0, tl.where(amax == amax, s_enc, float("nan")))
    code = tl.arange(0, 128)
    multiplier = tl.minimum(one_over(e4m3_value(code) * one_over(s_enc)), FLT_MAX)
    return s_enc, tl.where(code == 127, float("nan"), multiplier)


@triton.jit
def e4m3_code(x, CHIP: tl.constexpr):
    """fp32, not negative -> E4M3 code (int32), NaN -> 0x7F."""
    if CHIP >= 89:
        return tl.inline_asm_elementwise(E4M3_OF, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.where(x != x, 0x7F, minifloat_code(x, x, False, 8, 3, -6, 448.0))
