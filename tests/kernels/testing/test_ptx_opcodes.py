"""Every group of opcodes of the executor against the PTX manual's definition, written again here for single numbers.

The statements are inline asm of one Triton kernel, compiled for sm_100: ptxas accepts each of them, and what is run
is compiled text.  References work on Python integers and rationals, not on the executor's arrays.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing.compile import compile_for
from lowprec.kernels.testing.ptx import run_ptx
from tests.kernels.testing.single_numbers import (
    M32,
    Reference,
    bits,
    both,
    brain,
    brain_of_integer,
    brain_power,
    chopped,
    code,
    directed_product,
    dithered,
    double,
    exponent_byte,
    extract,
    f32,
    flush,
    flushed,
    half,
    insert,
    lookup,
    numeric_max,
    numeric_min,
    of_brain,
    of_half,
    permute,
    rounded_to_integer,
    s16,
    s32,
    stochastic,
    truncated,
    value,
)

N = 256


@triton.jit
def table(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr, TEXTS: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c = tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)
    for k in tl.static_range(len(TEXTS)):
        r = tl.inline_asm_elementwise(TEXTS[k], "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)
        tl.store(out_ptr + k * N + i, r)


INTEGERS: dict[str, Reference] = {
    "add.u32 $0, $1, $2;": lambda a, b, c: a + b,
    "sub.s32 $0, $1, $2;": lambda a, b, c: a - b,
    "mul.lo.u32 $0, $1, $2;": lambda a, b, c: a * b,
    "mul.hi.u32 $0, $1, $2;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 $0, $1, $2;": lambda a, b, c: s32(a) * s32(b) >> 32,
    "mad.lo.s32 $0, $1, $2, $3;": lambda a, b, c: a * b + c,
    "mad.hi.u32 $0, $1, $2, $3;": lambda a, b, c: (a * b >> 32) + c,
    "{ .reg .b64 x; mul.wide.s32 x, $1, $2; shr.s64 x, x, 7; cvt.u32.u64 $0, x; }": lambda a, b, c: (
        s32(a) * s32(b) >> 7
    ),
    "{ .reg .b64 x; .reg .b64 y; mov.b64 y, {$1, $2}; mul.hi.u64 x, y, y; cvt.u32.u64 $0, x; }": lambda a, b, c: (
        (a | b << 32) ** 2 >> 64
    ),
    "{ .reg .b64 x; cvt.s64.s32 x, $3; mad.wide.s32 x, $1, $2, x; shr.u64 x, x, 32; cvt.u32.u64 $0, x; }": (
        lambda a, b, c: (s32(a) * s32(b) + s32(c)) >> 32
    ),
    "div.u32 $0, $1, $2;": lambda a, b, c: a // b if b else -1,
    "div.s32 $0, $1, $2;": lambda a, b, c: truncated(s32(a), s32(b)) if b else -1,
    "rem.u32 $0, $1, $2;": lambda a, b, c: a % b if b else -1,
    "rem.s32 $0, $1, $2;": lambda a, b, c: s32(a) - s32(b) * truncated(s32(a), s32(b)) if b else -1,
    "abs.s32 $0, $1;": lambda a, b, c: abs(s32(a)),
    "neg.s32 $0, $1;": lambda a, b, c: -s32(a),
    "min.s32 $0, $1, $2;": lambda a, b, c: min(s32(a), s32(b)),
    "min.u32 $0, $1, $2;": lambda a, b, c: min(a, b),
    "max.s32 $0, $1, $2;": lambda a, b, c: max(s32(a), s32(b)),
    "max.u32 $0, $1, $2;": lambda a, b, c: max(a, b),
    "sad.u32 $0, $1, $2, $3;": lambda a, b, c: abs(a - b) + c,
    "add.sat.s32 $0, $1, $2;": lambda a, b, c: max(min(s32(a) + s32(b), 2**31 - 1), -(2**31)),
    "dp4a.u32.s32 $0, $1, $2, $3;": lambda a, b, c: (
        c + sum((a >> 8 * i & 255) * ((b >> 8 * i & 255) - 256 * (b >> 8 * i + 7 & 1)) for i in range(4))
    ),
    "and.b32 $0, $1, $2;": lambda a, b, c: a & b,
    "or.b32 $0, $1, $2;": lambda a, b, c: a | b,
    "xor.b32 $0, $1, $2;": lambda a, b, c: a ^ b,
    "not.b32 $0, $1;": lambda a, b, c: ~a,
    "cnot.b32 $0, $1;": lambda a, b, c: int(a == 0),
    "lop3.b32 $0, $1, $2, $3, 0xC9;": lambda a, b, c: lookup(a, b, c, 0xC9),
    "{ .reg .b32 n; and.b32 n, $2, 63; shl.b32 $0, $1, n; }": lambda a, b, c: a << (b & 63) if b & 63 < 32 else 0,
    "{ .reg .b32 n; and.b32 n, $2, 63; shr.u32 $0, $1, n; }": lambda a, b, c: a >> (b & 63),
    "{ .reg .b32 n; and.b32 n, $2, 63; shr.s32 $0, $1, n; }": lambda a, b, c: s32(a) >> (b & 63),
    "{ .reg .b64 x; mov.b64 x, {$1, $2}; shl.b64 x, x, 9; shr.u64 x, x, 32; cvt.u32.u64 $0, x; }": lambda a, b, c: (
        (a | b << 32) << 9 >> 32
    ),
    "shf.l.wrap.b32 $0, $1, $2, $3;": lambda a, b, c: (a | b << 32) << (c & 31) >> 32,
    "{ .reg .b32 n; and.b32 n, $3, 63; shf.l.clamp.b32 $0, $1, $2, n; }": lambda a, b, c: (
        (a | b << 32) << min(c & 63, 32) >> 32
    ),
    "shf.r.wrap.b32 $0, $1, $2, $3;": lambda a, b, c: (a | b << 32) >> (c & 31),
    "bfe.u32 $0, $1, $2, $3;": lambda a, b, c: extract(a, b, c, False),
    "bfe.s32 $0, $1, $2, $3;": lambda a, b, c: extract(a, b, c, True),
    "bfe.u32 $0, $1, 5, 11;": lambda a, b, c: a >> 5 & 0x7FF,
    "bfe.s32 $0, $1, 5, 11;": lambda a, b, c: extract(a, 5, 11, True),
    "bfi.b32 $0, $1, $2, 7, 9;": lambda a, b, c: insert(a, b, 7, 9),
    "bfi.b32 $0, $1, $2, 25, 20;": lambda a, b, c: insert(a, b, 25, 20),
    "prmt.b32 $0, $1, $2, $3;": permute,
    "popc.b32 $0, $1;": lambda a, b, c: a.bit_count(),
    "clz.b32 $0, $1;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 $0, $1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 $0, $1;": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 $0, $1;": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "{ .reg .pred p; setp.lt.s32 p, $1, $2; selp.b32 $0, $1, $3, p; }": lambda a, b, c: a if s32(a) < s32(b) else c,
    "{ .reg .pred p; setp.ls.u32 p, $1, $2; selp.b32 $0, $1, $3, p; }": lambda a, b, c: a if a <= b else c,
    "{ .reg .pred p; .reg .pred q; setp.ne.s32 q, $3, 0; setp.hi.and.u32 p|q, $1, $2, q; selp.b32 $0, 1, 2, p;"
    " @q add.s32 $0, $0, 4; }": lambda a, b, c: (1 if a > b and c else 2) + (4 if a <= b and c else 0),
    "{ .reg .pred p; setp.gt.u32 p, $1, $2; not.pred p, p; @!p mov.b32 $0, 7; @p mov.b32 $0, 9; }": lambda a, b, c: (
        7 if a > b else 9
    ),
    "mov.b32 $0, $1;": lambda a, b, c: a,
    "{ .reg .b16 x; .reg .b16 y; mov.b32 {x, y}, $1; mov.b32 $0, {y, x}; }": lambda a, b, c: a >> 16 | a << 16,
    "{ .reg .b16 x; .reg .b16 y; mov.b32 {x, y}, $1; mul.lo.u16 x, x, y; cvt.u32.u16 $0, x; }": lambda a, b, c: (
        a * (a >> 16) & 0xFFFF
    ),
    "{ .reg .b16 x; .reg .b16 y; mov.b32 {x, y}, $1; mul.wide.s16 $0, x, y; }": lambda a, b, c: s16(a) * s16(a >> 16),
    "{ .reg .b16 x; .reg .b16 y; mov.b32 {x, y}, $1; shr.s16 x, x, 3; cvt.s32.s16 $0, x; }": lambda a, b, c: (
        s16(a) >> 3
    ),
    "add.u16x2 $0, $1, $2;": lambda a, b, c: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16,
    "max.s16x2 $0, $1, $2;": lambda a, b, c: (
        (max(s16(a), s16(b)) & 0xFFFF) | (max(s16(a >> 16), s16(b >> 16)) & 0xFFFF) << 16
    ),
    "{ .reg .b32 x; cvt.s32.s8 x, $1; cvt.u32.u8 $0, $2; add.s32 $0, $0, x; }": lambda a, b, c: (
        (a & 255) - 256 * (a >> 7 & 1) + (b & 255)
    ),
    "cvt.s8.s32 $0, $1;": lambda a, b, c: (a & 255) - 256 * (a >> 7 & 1),  # sign-extended into the wider register
    "cvt.u8.u32 $0, $1;": lambda a, b, c: a & 255,
    "cvt.pack.sat.s8.s32.b32 $0, $1, $2, $3;": lambda a, b, c: (
        c << 16 | (max(min(s32(a), 127), -128) & 255) << 8 | (max(min(s32(b), 127), -128) & 255)
    ),
}


FLOATS: dict[str, Reference] = {
    "add.rn.f32 $0, $1, $2;": double(lambda x, y: x + y),
    "sub.f32 $0, $1, $2;": double(lambda x, y: x - y),
    "mul.rn.f32 $0, $1, $2;": double(lambda x, y: x * y),
    "div.rn.f32 $0, $1, $2;": double(lambda x, y: x / y),
    "rcp.rn.f32 $0, $1;": double(lambda x, y: 1 / x if x else math.copysign(math.inf, x)),
    "sqrt.rn.f32 $0, $1;": double(lambda x, y: math.sqrt(x)),
    "neg.f32 $0, $1;": lambda a, b, c: a ^ 1 << 31,
    "abs.f32 $0, $1;": lambda a, b, c: a & ~(1 << 31),
    "copysign.f32 $0, $1, $2;": lambda a, b, c: a & 1 << 31 | b & ~(1 << 31),
    "max.f32 $0, $1, $2;": lambda a, b, c: bits(numeric_max(f32(a), f32(b))),
    "min.f32 $0, $1, $2;": lambda a, b, c: bits(numeric_min(f32(a), f32(b))),
    "max.NaN.f32 $0, $1, $2;": lambda a, b, c: bits(
        math.nan if math.isnan(f32(a)) or math.isnan(f32(b)) else numeric_max(f32(a), f32(b))
    ),
    "max.f32 $0, $1, $2, $3;": lambda a, b, c: bits(numeric_max(f32(a), f32(b), f32(c))),
    "min.abs.f32 $0, $1, $2, $3;": lambda a, b, c: bits(numeric_min(abs(f32(a)), abs(f32(b)), abs(f32(c)))),
    "max.xorsign.abs.f32 $0, $1, $2;": lambda a, b, c: bits(
        math.copysign(numeric_max(abs(f32(a)), abs(f32(b))), -1.0 if (a ^ b) >> 31 else 1.0)
    ),
    "mul.ftz.f32 $0, $1, $2;": lambda a, b, c: flushed(bits(flush(f32(a)) * flush(f32(b)))),
    "add.sat.f32 $0, $1, $2;": lambda a, b, c: bits(
        0.0 if math.isnan(f32(a) + f32(b)) else min(max(f32(bits(f32(a) + f32(b))), 0.0), 1.0)
    ),
    "{ .reg .pred p; setp.ltu.f32 p, $1, $2; selp.b32 $0, 1, 0, p; }": lambda a, b, c: int(not f32(a) >= f32(b)),
    "{ .reg .pred p; setp.neu.f32 p, $1, $2; selp.b32 $0, 1, 0, p; }": lambda a, b, c: int(f32(a) != f32(b)),
    "{ .reg .pred p; setp.ge.f32 p, $1, $2; selp.b32 $0, 1, 0, p; }": lambda a, b, c: int(f32(a) >= f32(b)),
    "{ .reg .pred p; setp.nan.f32 p, $1, $2; selp.b32 $0, 1, 0, p; }": lambda a, b, c: int(
        math.isnan(f32(a)) or math.isnan(f32(b))
    ),
    "{ .reg .pred p; testp.subnormal.f32 p, $1; selp.b32 $0, 1, 0, p; }": lambda a, b, c: int(
        0 < abs(f32(a)) < 2.0**-126
    ),
    "{ .reg .b64 x; .reg .b64 y; mov.b64 x, {$1, $2}; mov.b64 y, {$2, $3}; add.rn.f32x2 x, x, y;"
    " mov.b64 {$0, _}, x; }": double(lambda x, y: x + y),
    "{ .reg .b64 x; .reg .b64 y; mov.b64 x, {$3, $1}; mov.b64 y, {$3, $2}; mul.rn.f32x2 x, x, y;"
    " mov.b64 {_, $0}, x; }": double(lambda x, y: x * y),
    "mul.rp.f32 $0, $1, $2;": lambda a, b, c: directed_product(a, b, math.ceil),
    "mul.rm.f32 $0, $1, $2;": lambda a, b, c: directed_product(a, b, math.floor),
    "mul.rz.f32 $0, $1, $2;": lambda a, b, c: directed_product(a, b, math.trunc),
    "cvt.rzi.s32.f32 $0, $1;": lambda a, b, c: rounded_to_integer(f32(a), math.trunc, -(2**31), 2**31 - 1),
    "cvt.rni.s32.f32 $0, $1;": lambda a, b, c: rounded_to_integer(f32(a), round, -(2**31), 2**31 - 1),
    "cvt.rmi.u32.f32 $0, $1;": lambda a, b, c: rounded_to_integer(f32(a), math.floor, 0, 2**32 - 1),
    "cvt.rn.f32.s32 $0, $1;": lambda a, b, c: bits(float(s32(a))),
    "cvt.rn.f32.u32 $0, $1;": lambda a, b, c: bits(float(a)),
    "cvt.rmi.f32.f32 $0, $1;": lambda a, b, c: bits(float(np.floor(f32(a)))),
    "cvt.sat.f32.f32 $0, $1;": lambda a, b, c: bits(0.0 if math.isnan(f32(a)) else min(max(f32(a), 0.0), 1.0)),
    "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.u32.u16 $0, h; }": lambda a, b, c: half(f32(a)),
    "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }": lambda a, b, c: brain(f32(a)),
    "{ .reg .b16 h; cvt.rn.bf16.s32 h, $1; cvt.u32.u16 $0, h; }": lambda a, b, c: brain_of_integer(s32(a)),
    "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }": lambda a, b, c: bits(of_half(a)),
    "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.bf16 $0, h; }": lambda a, b, c: bits(of_brain(a)),
    "cvt.rn.f16x2.f32 $0, $1, $2;": lambda a, b, c: half(f32(a)) << 16 | half(f32(b)),
    "cvt.rn.bf16x2.f32 $0, $1, $2;": lambda a, b, c: brain(f32(a)) << 16 | brain(f32(b)),
    "cvt.rz.bf16x2.f32 $0, $1, $2;": lambda a, b, c: chopped(a) << 16 | chopped(b),
    "cvt.rna.tf32.f32 $0, $1;": lambda a, b, c: a if a >> 23 & 255 == 255 else a + 0x1000 & 0xFFFFE000,
    "add.rn.f16x2 $0, $1, $2;": both(lambda a, b, c: half(of_half(a) + of_half(b))),
    "mul.rn.bf16x2 $0, $1, $2;": both(lambda a, b, c: brain(of_brain(a) * of_brain(b))),
    "sub.rn.bf16x2 $0, $1, $2;": both(lambda a, b, c: brain(f32(bits(of_brain(a) - of_brain(b))))),
    "max.bf16x2 $0, $1, $2;": both(lambda a, b, c: brain(numeric_max(of_brain(a), of_brain(b)))),
    "abs.bf16x2 $0, $1;": lambda a, b, c: a & 0x7FFF7FFF,
    "neg.f16x2 $0, $1;": lambda a, b, c: a ^ 0x80008000,
    "{ .reg .b16 h; cvt.u16.u32 h, $1; add.rn.f32.bf16 $0, h, $2; }": lambda a, b, c: bits(of_brain(a) + f32(b)),
}


H = "{{ .reg .b16 h; {} cvt.u32.u16 $0, h; }}"
NARROW: dict[str, Reference] = {
    "{ .reg .b8 x; cvt.rn.satfinite.e2m1x2.f32 x, $1, $2; mov.b32 $0, {x, x, x, x}; }": lambda a, b, c: (
        (code("e2m1", f32(a)) << 4 | code("e2m1", f32(b))) * 0x01010101
    ),
    H.format("cvt.rn.satfinite.e4m3x2.f32 h, $1, $2;"): lambda a, b, c: (
        code("e4m3", f32(a)) << 8 | code("e4m3", f32(b))
    ),
    H.format("cvt.rn.satfinite.e5m2x2.f32 h, $1, $2;"): lambda a, b, c: (
        code("e5m2", f32(a)) << 8 | code("e5m2", f32(b))
    ),
    H.format("cvt.rn.satfinite.e4m3x2.f16x2 h, $1;"): lambda a, b, c: (
        code("e4m3", of_half(a >> 16)) << 8 | code("e4m3", of_half(a))
    ),
    H.format("cvt.rz.satfinite.ue8m0x2.f32 h, $1, $2;"): lambda a, b, c: (
        exponent_byte(f32(a), False) << 8 | exponent_byte(f32(b), False)
    ),
    H.format("cvt.rp.satfinite.ue8m0x2.f32 h, $1, $2;"): lambda a, b, c: (
        exponent_byte(f32(a), True) << 8 | exponent_byte(f32(b), True)
    ),
    "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 $0, h; }": lambda a, b, c: (
        half(value("e4m3", a >> 8)) << 16 | half(value("e4m3", a))
    ),
    "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e5m2x2 $0, h; }": lambda a, b, c: (
        half(value("e5m2", a >> 8)) << 16 | half(value("e5m2", a))
    ),
    "{ .reg .b8 x; .reg .b8 y; .reg .b8 z; .reg .b8 w; mov.b32 {x, y, z, w}, $1; cvt.rn.f16x2.e2m1x2 $0, y; }": (
        lambda a, b, c: half(value("e2m1", a >> 12)) << 16 | half(value("e2m1", a >> 8))
    ),
    "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.bf16x2.ue8m0x2 $0, h; }": lambda a, b, c: (
        brain_power(a >> 8 & 255) << 16 | brain_power(a & 255)
    ),
    H.format("cvt.rs.satfinite.e2m1x4.f32 h, {$1, $2, $3, $2}, $3;"): lambda a, b, c: (
        stochastic("e2m1", f32(a), c >> 24, 256) << 12
        | stochastic("e2m1", f32(b), c >> 16 & 255, 256) << 8
        | stochastic("e2m1", f32(c), c >> 8 & 255, 256) << 4
        | stochastic("e2m1", f32(b), c & 255, 256)
    ),
    "cvt.rs.satfinite.e4m3x4.f32 $0, {$1, $2, $3, $2}, $3;": lambda a, b, c: (
        stochastic("e4m3", f32(a), c >> 24, 256) << 24
        | stochastic("e4m3", f32(b), c >> 16 & 255, 256) << 16
        | stochastic("e4m3", f32(c), c >> 8 & 255, 256) << 8
        | stochastic("e4m3", f32(b), c & 255, 256)
    ),
    "cvt.rs.bf16x2.f32 $0, $1, $2, $3;": lambda a, b, c: dithered(a, c >> 16) << 16 | dithered(b, c & 0xFFFF),
}


def operands(seed: int, floating: bool) -> list[np.ndarray]:
    """Random patterns; for floats half of them near 1, and every special value against every other."""
    rng = np.random.default_rng(seed)
    out = [rng.integers(0, 2**32, N, dtype=np.uint64).astype(np.uint32) for _ in range(3)]
    if floating:
        for x in out:
            x[: N // 2] = (
                (rng.standard_normal(N // 2) * np.exp2(rng.integers(-9, 9, N // 2))).astype(np.float32).view("u4")
            )
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -2.5, 1e-40, 6.0, 5.0], np.float32).view(np.uint32)
        a, b = (g.reshape(-1) for g in np.meshgrid(special, special))
        out[0][-len(a) :], out[1][-len(b) :] = a, b
    else:
        edge = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 31, 32, 8], np.uint32)
        a, b = (g.reshape(-1) for g in np.meshgrid(edge, edge))
        out[0][-len(a) :], out[1][-len(b) :] = a, b
    return out


@pytest.mark.parametrize("group,floating", [("INTEGERS", False), ("FLOATS", True), ("NARROW", True)])
def test_opcodes(group: str, floating: bool) -> None:
    """Results that the manual fixes; a NaN operand's own bits are not fixed, so NaN results compare as NaN."""
    wanted: dict[str, Reference] = globals()[group]
    a, b, c = operands(7, floating)
    signature = {"a_ptr": "*i32", "b_ptr": "*i32", "c_ptr": "*i32", "out_ptr": "*i32"}
    compiled = compile_for(table, signature, {"N": N, "TEXTS": tuple(wanted)}, "sm_100", num_warps=1)
    tensors = [torch.from_numpy(x.view(np.int32)) for x in (a, b, c)]
    out = torch.zeros(len(wanted), N, dtype=torch.int32)
    run_ptx(compiled, (1,), dict(zip(("a_ptr", "b_ptr", "c_ptr", "out_ptr"), [*tensors, out])))
    got = out.numpy().view(np.uint32)
    for row, (text, reference) in zip(got, wanted.items(), strict=True):
        want = np.array([reference(int(x), int(y), int(z)) & M32 for x, y, z in zip(a, b, c)], np.uint32)
        if group == "INTEGERS" and ("div" in text or "rem" in text):
            row, want = row[b != 0], want[b != 0]
        bad = np.nonzero(row != want)[0]
        assert not len(bad), f"{text}: {len(bad)} differ, first {a[bad[0]]:#x} {b[bad[0]]:#x} {c[bad[0]]:#x} -> " \
            f"{row[bad[0]]:#x}, not {want[bad[0]]:#x}"  # fmt: skip
