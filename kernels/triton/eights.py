"""Eights: rows as (E, 8) tiles, eight neighbouring values a thread, loaded and stored 16 bytes at a time.

Eight are what one Philox call serves and what a word of 4-bit codes holds.  A load of (E, 4) fp32 or (E, 8) bf16 gives
every thread 16 bytes of one row of the tile, so two of the former make an eight without an exchange between threads.
"""

import triton
import triton.language as tl


@triton.jit
def join_eight(v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight (E,) -> (E, 8)."""
    E: tl.constexpr = v0.shape[0]
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (E, 8))


@triton.jit
def load_eights(x_ptr, e, n, WHOLE: tl.constexpr):
    """Values 8e .. 8e + 7 of a row of fp32 or bf16, (E, 8) fp32, zero from n on; WHOLE: n is a multiple of 8."""
    E: tl.constexpr = e.shape[0]
    if x_ptr.dtype.element_ty == tl.float32:
        column = e[:, None] * 8 + tl.arange(0, 4)[None, :]
        low = tl.load(x_ptr + column, mask=(e * 8 < n)[:, None] if WHOLE else column < n, other=0.0)
        high = tl.load(x_ptr + column + 4, mask=(e * 8 < n)[:, None] if WHOLE else column + 4 < n, other=0.0)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (E, 8))
    else:
        column = e[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = (e * 8 < n)[:, None] if WHOLE else column < n
        return tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_eights(out_ptr, value, e, n, WHOLE: tl.constexpr):
    """Inverse of `load_eights`; casts to what is pointed to, fp32 or 16 bits."""
    E: tl.constexpr = e.shape[0]
    if out_ptr.dtype.element_ty == tl.float32:
        low, high = tl.split(tl.permute(tl.reshape(value, (E, 2, 4)), (0, 2, 1)))
        column = e[:, None] * 8 + tl.arange(0, 4)[None, :]
        tl.store(out_ptr + column, low, mask=(e * 8 < n)[:, None] if WHOLE else column < n)
        tl.store(out_ptr + column + 4, high, mask=(e * 8 < n)[:, None] if WHOLE else column + 4 < n)
    else:
        column = e[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = (e * 8 < n)[:, None] if WHOLE else column < n
        tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=mask)
