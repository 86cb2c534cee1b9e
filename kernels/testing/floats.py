"""Number formats as bits, in numpy: what a conversion instruction of a GPU does to one number.

A minifloat with `m` mantissa bits and smallest normal exponent `low` is an ordered list of magnitudes, and a code is a
place in it: code = q + (E - low) 2^m, where E = max(floor(log2 |x|), low) and q = round(|x| / 2^(E - m)).  A carry out
of the mantissa runs into the exponent by itself, subnormals have E = low, and infinity of IEEE-like formats is just the
code after the largest finite one.  All of it is exact in float64, so one rounding happens: to nearest even, towards
zero, or q = floor(|x| / 2^(E - m) + u) with u in [0, 1) for stochastic rounding.

Saturation, NaN and the order of packed values follow the PTX manual (`cvt`): `.satfinite` clamps infinity too, NaN
becomes 0x7f in fp8, +6 in E2M1, 0xff in E8M0.  What no manual text settles is said in `ptx_convert`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Mini:
    mantissa: int
    low: int  # exponent of the smallest normal number
    largest: int  # code of the largest finite magnitude
    nan: int
    bits: int

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)


MINI = {
    "e2m1": Mini(1, 0, 7, 7, 4),
    "e2m3": Mini(3, 0, 31, 31, 6),
    "e3m2": Mini(2, -2, 31, 31, 6),
    "e4m3": Mini(3, -6, 0x7E, 0x7F, 8),
    "e5m2": Mini(2, -14, 0x7B, 0x7F, 8),
    "f16": Mini(10, -14, 0x7BFF, 0x7FFF, 16),
    "bf16": Mini(7, -126, 0x7F7F, 0x7FFF, 16),
    "tf32": Mini(10, -126, 0x3FBFF, 0x3FFFF, 19),
}


def encode(x: Array, name: str, noise: Array | None = None, saturate: bool = True, toward_zero: bool = False) -> Array:
    """Codes of floats `x` (float32 or float64).  `noise` in [0, 1) makes the rounding stochastic; without `saturate`
    an overflow is infinity (formats that have one)."""
    f = MINI[name]
    with np.errstate(invalid="ignore"):  # signalling NaNs
        a = np.abs(np.asarray(x, np.float64))
    finite = np.where(np.isfinite(a), a, 0.0)
    exponent = np.where(finite > 0, np.maximum(np.frexp(finite)[1] - 1, f.low), f.low)
    q = np.ldexp(finite, f.mantissa - exponent)
    q = np.floor(q + noise) if noise is not None else np.trunc(q) if toward_zero else np.rint(q)
    code = q.astype(np.int64) + (exponent.astype(np.int64) - f.low) * (1 << f.mantissa)
    code = np.minimum(code, f.largest if saturate or toward_zero else f.largest + 1)
    code = np.where(np.isinf(a), f.largest if saturate else f.largest + 1, code)
    code = np.where(np.signbit(x) & ~np.isnan(a), code | f.sign, code)
    return np.where(np.isnan(a), f.nan, code).astype(
        np.uint32 if f.bits > 16 else np.uint16 if f.bits > 8 else np.uint8
    )


def decode(code: Array, name: str) -> Array:
    """float32 values of codes: exact for every format here."""
    f = MINI[name]
    magnitude = np.asarray(code).astype(np.int64) & (f.sign - 1)
    step = np.maximum((magnitude >> f.mantissa) - 1, 0)
    x = np.ldexp((magnitude - (step << f.mantissa)).astype(np.float64), (step + f.low - f.mantissa).astype(np.int32))
    if f.nan > f.largest:  # formats with only a NaN after the largest number (e4m3), or infinity first
        x = np.where(magnitude > f.largest, np.nan, x)
        if f.nan > f.largest + 1:
            x = np.where(magnitude == f.largest + 1, np.inf, x)
    return np.where(np.asarray(code).astype(np.int64) & f.sign, -x, x).astype(np.float32)


def directed(exact: Array, rounding: str) -> Array:
    """float64 -> float32 towards zero ("rz"), down ("rm") or up ("rp"); overflow stops at the largest finite number
    where the direction is away from infinity."""
    nearest = exact.astype(np.float32)
    up, down = np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))
    too_low, too_high = nearest < exact, nearest > exact
    if rounding == "rz":
        too_low, too_high = too_low & (exact < 0), too_high & (exact > 0)
    return np.where(too_low & (rounding != "rm"), up, np.where(too_high & (rounding != "rp"), down, nearest))


def bf16_bits(x: Array) -> Array:
    """float32 -> bits of bfloat16, nearest even; the common case of `encode`, in three integer operations."""
    u = np.asarray(x, np.float32).view(np.uint32)
    r = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def bf16_value(bits: Array) -> Array:
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def e8m0_bits(x: Array, up: bool, saturate: bool = True) -> Array:
    """float32 -> exponent byte (value 2^(byte - 127)) of |x|: towards zero or up (`cvt.rz/.rp...ue8m0x2`)."""
    a = np.abs(np.asarray(x, np.float64))
    mantissa, exponent = np.frexp(np.where(np.isfinite(a), a, 0.0))
    power = exponent - 1 + (np.asarray(up) & (mantissa > 0.5))
    byte = np.where(a == 0, 0, np.clip(power + 127, 0, 254 if saturate else 255))
    byte = np.where(np.isinf(a), 254 if saturate else 255, byte)
    return np.where(np.isnan(a), 255, byte).astype(np.uint8)


def e8m0_value(byte: Array) -> Array:
    b = np.asarray(byte).astype(np.int32)
    return np.where(b == 255, np.nan, np.ldexp(1.0, b - 127)).astype(np.float32)


def to_integer(x: Array, dtype: Any) -> Array:
    """Floats that are whole numbers already to integers: saturating, NaN to 0."""
    limit = np.iinfo(dtype)
    whole = np.asarray(x, np.float64)
    whole = np.where(np.isnan(whole), 0.0, whole)
    inside = np.clip(whole, float(limit.min), np.nextafter(float(limit.max) + 1, 0)).astype(dtype)
    return np.where(whole >= float(limit.max), limit.max, inside).astype(dtype)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of float32 (or narrower) operands in float64, rounded to odd: the last bit is set when the result is not
    exact.  A second rounding, to at most 51 bits, is then the only one that shows (Boldo, Melquiond, 2008)."""
    p, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)  # the product is exact
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # two-sum: s + error is the exact sum
    bits = np.ascontiguousarray(s).view(np.int64)
    away = (error > 0) == (s > 0)
    nudge = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(s), np.where(away, 1, -1), 0)
    return (bits + nudge).view(np.float64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a*b + c with one rounding."""
    return fma_to_odd(a, b, c).astype(np.float32)
