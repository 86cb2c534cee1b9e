"""Block Hadamard rotations of a tile in registers, and of a matrix: `lowprec.numerics.hadamard.rotate`, bit for bit.

    y = H_n (x * signs * n**-0.5)        inverse:  x = (H_n y) * signs * n**-0.5

in fp32 for blocks of n = 16, 32, 64 or 128 along the contracted axis: the multiplication first (last in the inverse),
then sums and differences of elements at distances 1, 2, 4, ..., and one rounding to the dtype of x, as if the rotated
matrix had been written to memory.  The order is part of the definition.

Distances 1, 2, 4, 8 lie in the segment that a thread owns (see `blocks`): for n = 16 the rotation is arithmetic on
registers, two and a half instructions an element on chips that do two pairs at once (see `pairs`).  From distance 16 on
segments of one row meet, which are those of other threads where memory runs along the contracted axis.

Signs come as bits, element e of a block in bit e % 32 of word e // 32, 1 for minus.  Known when compiling (MASK is
their number) they cost nothing; else they are four words at run time, so that new signs every step compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import segments
from .memory import Launch, capability, memory_of, signed
from .pairs import add2, mul2, pairs, rounded, sub2, unpaired

SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Turn:
    """The rotation of one direction, as kernels take it.

    Attributes:
        size: block along the contracted axis.
        signs: bit e is 1 where element e of a block is negated; 0 for no signs.
        fixed: the signs are those of a whole run and are compiled in; else they are given at run time.
    """

    size: int
    signs: int = 0
    fixed: bool = True

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"The Triton kernels rotate blocks of 16, 32, 64 or 128, not of {self.size}.")

    @staticmethod
    def of(size: int, signs: Tensor | None = None, fixed: bool = False) -> Turn:
        """With signs as `numerics.rotate` takes them, (size,) of +-1; best on the CPU, for a GPU is waited for."""
        if signs is None:
            return Turn(size)
        if signs.shape != (size,):
            raise ValueError(f"A rotation of {size} takes {size} signs, not a tensor of shape {tuple(signs.shape)}.")
        return Turn(size, sum(1 << e for e, sign in enumerate(signs.tolist()) if sign < 0), fixed)

    def check(self, k: int) -> None:
        """Refuses a contracted axis that is no multiple of the block."""
        if k % self.size:
            raise ValueError(
                f"A Hadamard block of {self.size} does not divide the axis of {k}; pad it or choose a smaller size."
            )

    @property
    def mask(self) -> int | None:
        """What the kernel's MASK is."""
        return self.signs if self.fixed or not self.signs else None

    @property
    def words(self) -> list[int]:
        """Four signed words of signs; zeros if they are compiled in."""
        return [signed((self.signs >> (32 * i)) & 0xFFFFFFFF) if self.mask is None else 0 for i in range(4)]


def turn_arguments(turn: Turn | None, suffix: str = "") -> tuple[dict[str, int], dict[str, Any]]:
    """What a kernel is given of a rotation: words of signs at run time, and constants."""
    words = turn.words if turn else [0] * 4
    constants = {f"TURN{suffix.upper()}": turn.size if turn else 0, f"MASK{suffix.upper()}": turn.mask if turn else 0}
    return {f"s{i}{suffix}": word for i, word in enumerate(words)}, constants


@triton.jit
def signed_word(MASK: tl.constexpr, INDEX: tl.constexpr):
    """A word of the signs that are known when compiling."""
    word: tl.constexpr = (MASK >> (32 * INDEX)) & 0xFFFFFFFF
    return tl.full((), word - ((word >> 31) << 32), tl.int32)


@triton.jit
def block_factors(s0, s1, s2, s3, N: tl.constexpr, MASK: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr,
                  SEGMENTS: tl.constexpr):  # fmt: skip
    """signs * n**-0.5 for the low and the high half of every segment, fp32; (1, 8) if all segments have the same."""
    BY_TWO: tl.constexpr = 0x3E800000 if N < 64 else 0x3E000000  # 16 ** -0.5, 64 ** -0.5
    SIZE: tl.constexpr = BY_TWO if N == 16 or N == 64 else BY_TWO - (0x800000 - 0x3504F3)  # over sqrt(2)
    PER: tl.constexpr = N // 16
    s = tl.arange(0, FREE * SEGMENTS) if PER > 1 else tl.arange(0, 1)
    q = (s % SEGMENTS if ALONG else s // FREE) % PER
    if MASK is not None:
        s0 = signed_word(MASK, 0)
        s1 = signed_word(MASK, 1)
        s2 = signed_word(MASK, 2)
        s3 = signed_word(MASK, 3)
    first = (s1.to(tl.int64) << 32) | (s0.to(tl.int64) & 0xFFFFFFFF)
    last = (s3.to(tl.int64) << 32) | (s2.to(tl.int64) & 0xFFFFFFFF)
    word = (tl.where(q < 4, first, last) >> (16 * (q & 3))).to(tl.int32)[:, None]
    e = tl.arange(0, 8)[None, :]
    low = SIZE | ((word << (31 - e)) & -2147483648)
    high = SIZE | ((word << (23 - e)) & -2147483648)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def halves_butterfly(a, b, CHIP: tl.constexpr):
    """Pairs (H, 8): sums and differences at distances 1, 2, 4.  Every time neighbours meet, and the lowest bit of the
    index moves to the top; after three times it is back in its place."""
    H: tl.constexpr = a.shape[0]
    for _ in tl.static_range(3):
        ua, va = tl.split(tl.reshape(a, (H, 4, 2)))
        ub, vb = tl.split(tl.reshape(b, (H, 4, 2)))
        pa, pb = add2(ua, ub, va, vb, CHIP)
        qa, qb = sub2(ua, ub, va, vb, CHIP)
        a = tl.reshape(tl.permute(tl.join(pa, qa), (0, 2, 1)), (H, 8))
        b = tl.reshape(tl.permute(tl.join(pb, qb), (0, 2, 1)), (H, 8))
    return a, b


@triton.jit
def segments_butterfly(x, DISTANCE: tl.constexpr, CHIP: tl.constexpr):
    """(R, 8): sums and differences of segments that lie DISTANCE apart.

    On a chip they are other threads'.  The exclusive or of both numbers' bits is a reduction that gives each thread the
    other's number without moving the rest: a shuffle if they share a warp, for which launches see to it.
    """
    R: tl.constexpr = x.shape[0]
    x = tl.reshape(x, (R // (2 * DISTANCE), 2, DISTANCE * 8))
    if CHIP > 0:
        bits = x.to(tl.int32, bitcast=True)
        other = (tl.xor_sum(bits, 1, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
        sign = tl.broadcast_to(1.0 - 2.0 * tl.arange(0, 2)[None, :, None].to(tl.float32), x.shape)
        x = tl.fma(x, sign, other)
    else:
        u, v = tl.split(tl.permute(x, (0, 2, 1)))
        x = tl.permute(tl.join(u + v, u - v), (0, 2, 1))
    return tl.reshape(x, (R, 8))


@triton.jit
def rotate_segments(low, high, s0, s1, s2, s3, N: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr,
                    INVERSE: tl.constexpr, ALONG: tl.constexpr, FREE: tl.constexpr, SEGMENTS: tl.constexpr,
                    CHIP: tl.constexpr):  # fmt: skip
    """Rotates what `blocks.segments` loaded, halves (R, 8) fp32, R = FREE * SEGMENTS; returns the same.

    N: block, 0 for no rotation; SEGMENTS * 16 is a multiple of it.  MASK: the signs if known when compiling (0 for
    none), or None, and s0 .. s3 are its words.  DTYPE: that of x, to which the result is rounded.
    """
    if N > 0:
        low_factor, high_factor = block_factors(s0, s1, s2, s3, N, MASK, ALONG, FREE, SEGMENTS)
        if N == 16:
            fa, fb = low_factor, low_factor
            ga, gb = high_factor, high_factor
        else:
            fa, fb = pairs(low_factor, ALONG)
            ga, gb = pairs(high_factor, ALONG)
        a, b = pairs(low, ALONG)
        c, d = pairs(high, ALONG)
        if not INVERSE:
            a, b = mul2(a, b, fa, fb, CHIP)
            c, d = mul2(c, d, ga, gb, CHIP)
        a, b = halves_butterfly(a, b, CHIP)
        c, d = halves_butterfly(c, d, CHIP)
        u, v = add2(a, b, c, d, CHIP)
        c, d = sub2(a, b, c, d, CHIP)
        a, b = u, v
        if N > 16:
            low = unpaired(a, b, ALONG)
            high = unpaired(c, d, ALONG)
            for i in tl.static_range(3):
                if (32 << i) <= N:
                    low = segments_butterfly(low, (1 if ALONG else FREE) << i, CHIP)
                    high = segments_butterfly(high, (1 if ALONG else FREE) << i, CHIP)
            a, b = pairs(low, ALONG)
            c, d = pairs(high, ALONG)
        if INVERSE:
            a, b = mul2(a, b, fa, fb, CHIP)
            c, d = mul2(c, d, ga, gb, CHIP)
        low = unpaired(rounded(a, DTYPE, CHIP), rounded(b, DTYPE, CHIP), ALONG)
        high = unpaired(rounded(c, DTYPE, CHIP), rounded(d, DTYPE, CHIP), ALONG)
    return low, high


@triton.jit(do_not_specialize=["s0", "s1", "s2", "s3"])
def rotate_kernel(x_ptr, y_ptr, rows, k, pitch, s0, s1, s2, s3, ALONG: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, FULL: tl.constexpr, TURN: tl.constexpr, MASK: tl.constexpr,
                  INVERSE: tl.constexpr, CHIP: tl.constexpr):  # fmt: skip
    """y = x rotated along k, in the same order of memory and dense; 2 + 2 bytes an element of bf16."""
    i = tl.program_id(1)
    j = tl.program_id(0)
    low, high, f, c = segments(x_ptr, pitch, i * ROWS, j * COLUMNS, rows, k, ALONG, ROWS, COLUMNS, FULL, CHIP)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    low, high = rotate_segments(low, high, s0, s1, s2, s3, TURN, MASK, DTYPE, INVERSE, ALONG, ROWS, COLUMNS // 16, CHIP)
    f = f[:, None]
    c = c[:, None] + tl.arange(0, 8)[None, :]
    if ALONG:
        at = y_ptr + (f.to(tl.int64) * k + c)
        further = 8
    else:
        at = y_ptr + (c.to(tl.int64) * rows + f)
        further = 8 * rows
    if FULL:
        tl.store(at, low.to(DTYPE))
        tl.store(at + further, high.to(DTYPE))
    else:
        tl.store(at, low.to(DTYPE), mask=(f < rows) & (c < k))
        tl.store(at + further, high.to(DTYPE), mask=(f < rows) & (c + 8 < k))


def rotate(
    x: Tensor,
    n: int,
    signs: Tensor | Turn | None = None,
    inverse: bool = False,
    *,
    arch: str | None = None,
    start: Callable[[Launch], None] = Launch.__call__,
) -> Tensor:
    """`lowprec.numerics.rotate` by a kernel: x (..., k), blocks of n along k; a matrix keeps its order of memory.

    Raises:
        ValueError: for sizes other than 16, 32, 64, 128, axes that n does not divide, dtypes that kernels do not know.
    """
    turn = signs if isinstance(signs, Turn) else Turn.of(n, signs)
    if turn.size != n:
        raise ValueError(f"The signs are those of a rotation of {turn.size}, not of {n}.")
    turn.check(x.shape[-1])
    matrix, along, pitch = memory_of(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    out = torch.empty(matrix.shape if along else matrix.T.shape, dtype=x.dtype, device=x.device)
    out = out if along else out.T
    rows, k = matrix.shape
    if matrix.numel():
        words, constants = turn_arguments(turn)
        args = {"x_ptr": matrix, "y_ptr": out, "rows": rows, "k": k, "pitch": pitch, **words}
        height, warps = (128, 4) if n == 16 else (64, 4) if along else (32, 1)  # across: a block stays in a warp
        constants |= {
            "ALONG": along, "ROWS": height, "COLUMNS": 128, "FULL": not (rows % height or k % 128),
            "INVERSE": inverse, "CHIP": capability(x, arch),
        }  # fmt: skip
        start(Launch(rotate_kernel, (-(-k // 128), -(-rows // height)), args, constants, warps))
    return out if x.dim() == 2 else out.reshape(x.shape)
