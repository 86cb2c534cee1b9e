"""Arithmetic of a tile in pairs: from sm_100 on one instruction adds or multiplies two pairs of fp32 numbers.

The two numbers of a pair are the same element of two segments, so that sums along a segment never mix the halves of a
pair and no register has to be moved.  The compiler pairs by itself, but neighbours, which a butterfly takes apart again
at every distance.  Below sm_100, and in the interpreter (CHIP 0), it is ordinary arithmetic, the same numbers.

Which two segments: those that one thread holds.  Memory along the contracted axis: the first and the second half of
all segments; across it: neighbours, which came in one 32-bit word.
"""

import triton
import triton.language as tl
from triton.language import constexpr


def _paired(operation: str) -> constexpr:
    return tl.constexpr(
        "{\n.reg .b64 a, b;\nmov.b64 a, {$2, $3};\nmov.b64 b, {$4, $5};\n"
        + operation
        + ".rn.f32x2 a, a, b;\nmov.b64 {$0, $1}, a;\n}"
    )


ADD2, SUB2, MUL2 = _paired("add"), _paired("sub"), _paired("mul")
# both bf16 numbers of a word as fp32: one instruction each (the compiler takes three for two)
WIDEN_BF16 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
# to bf16 and back to fp32 in one instruction: above a zero as its lower neighbour, a bf16 number is the fp32 number
ROUND_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;")


@triton.jit
def pairs(x, ALONG: tl.constexpr):
    """(R, W) -> two tensors (R / 2, W): the first numbers of all pairs, and the second."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if ALONG:
        x = tl.permute(tl.reshape(x, (2, R // 2, W)), (1, 2, 0))
    else:
        x = tl.permute(tl.reshape(x, (R // 2, 2, W)), (0, 2, 1))
    return tl.split(x)


@triton.jit
def unpaired(a, b, ALONG: tl.constexpr):
    """Inverse of `pairs`."""
    H: tl.constexpr = a.shape[0]
    W: tl.constexpr = a.shape[1]
    x = tl.permute(tl.join(a, b), (2, 0, 1)) if ALONG else tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(x, (2 * H, W))


@triton.jit
def add2(a, b, c, d, CHIP: tl.constexpr):
    """(a + c, b + d)"""
    if CHIP >= 100:
        return tl.inline_asm_elementwise(
            ADD2, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return a + c, b + d


@triton.jit
def sub2(a, b, c, d, CHIP: tl.constexpr):
    """(a - c, b - d)"""
    if CHIP >= 100:
        return tl.inline_asm_elementwise(
            SUB2, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return a - c, b - d


@triton.jit
def mul2(a, b, c, d, CHIP: tl.constexpr):
    """(a * c, b * d)"""
    if CHIP >= 100:
        return tl.inline_asm_elementwise(
            MUL2, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return a * c, b * d


@triton.jit
def times(x, m, ALONG: tl.constexpr, CHIP: tl.constexpr):
    """x (R, W) times m, one number a segment (R,)."""
    if CHIP >= 100:
        a, b = pairs(x, ALONG)
        c, d = pairs(tl.broadcast_to(m[:, None], x.shape), ALONG)
        a, b = mul2(a, b, c, d, CHIP)
        return unpaired(a, b, ALONG)
    else:
        return x * m[:, None]


@triton.jit
def widen(x, CHIP: tl.constexpr):
    """To fp32."""
    if CHIP > 0 and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(WIDEN_BF16, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, CHIP: tl.constexpr):
    """fp32 -> fp32 that DTYPE can hold, nearest even."""
    if CHIP > 0 and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(ROUND_BF16, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x.to(DTYPE).to(tl.float32)
