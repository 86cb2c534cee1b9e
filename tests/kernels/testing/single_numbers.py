"""What GPU instructions do to one number, on Python integers and floats: the reference of `test_ptx_opcodes`.

Bits in, bits out.  Nothing here knows numpy arrays, or the code that is tested."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from lowprec.numerics.element import ELEMENTS

Reference = Callable[[int, int, int], int]
M32 = 0xFFFFFFFF


def s32(x: int) -> int:
    return (x & M32) - (1 << 32) * (x >> 31 & 1)


def f32(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x & M32))[0]


def bits(x: float) -> int:
    """Nearest float32 of a double; overflow to infinity; the GPU's NaN."""
    with np.errstate(over="ignore"):
        return 0x7FFFFFFF if math.isnan(x) else int(np.array(x).astype(np.float32).view(np.uint32))


def s16(x: int) -> int:
    return (x & 0xFFFF) - (1 << 16) * (x >> 15 & 1)


def extract(a: int, b: int, c: int, signed: bool) -> int:
    start, length = b & 255, c & 255
    sign = 0 if not signed or length == 0 else a >> min(start + length - 1, 31) & 1
    return sum((a >> start + i & 1 if start + i < 32 else sign) << i if i < length else sign << i for i in range(32))


def insert(a: int, b: int, start: int, length: int) -> int:
    field = sum(1 << i for i in range(start, min(start + length, 32)))
    return b & ~field | (a << start & field)


def permute(a: int, b: int, c: int) -> int:
    both = a | b << 32
    out = 0
    for i in range(4):
        sel = c >> 4 * i & 15
        byte = both >> 8 * (sel & 7) & 255
        out |= (255 * (byte >> 7) if sel & 8 else byte) << 8 * i
    return out


def lookup(a: int, b: int, c: int, t: int) -> int:
    return sum((t >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def truncated(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def double(op: Callable[[float, float], float]) -> Reference:
    """One operation of float32 numbers, exact enough in double to be rounded once more without harm (+ - x /)."""

    def reference(a: int, b: int, c: int) -> int:
        x, y = f32(a), f32(b)
        try:
            return bits(op(x, y))
        except ZeroDivisionError:
            sign = math.copysign(1, x) * math.copysign(1, y)
            return bits(math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, sign))
        except (OverflowError, ValueError):
            return bits(math.nan)

    return reference


def numeric_max(*xs: float) -> float:
    real = [x for x in xs if not math.isnan(x)]
    return max(real, key=lambda x: (x, math.copysign(1, x))) if real else math.nan


def numeric_min(*xs: float) -> float:
    return -numeric_max(*(-x for x in xs))


def rounded_to_integer(x: float, how: Callable[[float], float], low: int, high: int) -> int:
    return 0 if math.isnan(x) else high if x >= high else low if x <= low else int(how(x))


def half(x: float) -> int:
    with np.errstate(over="ignore"):
        return 0x7FFF if math.isnan(x) else int(np.array(x).astype(np.float16).view(np.uint16))


def brain(x: float) -> int:
    """Nearest bfloat16 of a double, by torch."""
    if math.isnan(x):
        return 0x7FFF
    return int(torch.tensor(x, dtype=torch.float64).float().bfloat16().view(torch.int16)) & 0xFFFF


def of_brain(x: int) -> float:
    return f32((x & 0xFFFF) << 16)


def of_half(x: int) -> float:
    return float(np.uint16(x & 0xFFFF).view(np.float16))


def both(one: Callable[[int, int, int], int]) -> Reference:
    return lambda a, b, c: one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def flushed(x: int) -> int:
    return x if math.isnan(f32(x)) else bits(flush(f32(x)))


def chopped(a: int) -> int:
    return 0x7FFF if math.isnan(f32(a)) else a >> 16


def brain_of_integer(x: int) -> int:
    """One rounding of an integer to 8 significant bits."""
    drop = max(abs(x).bit_length() - 8, 0)
    kept, rest = abs(x) >> drop, abs(x) & (1 << drop) - 1
    kept += rest * 2 > 1 << drop or (rest * 2 == 1 << drop and kept & 1)
    return brain(math.copysign(float(kept << drop), x))


def code(name: str, x: float) -> int:
    """Nearest code of a float in a small format, saturating; NaN as the manual says."""
    element = ELEMENTS[name]
    if math.isnan(x):
        return {"e2m1": 7, "e4m3": 0x7F, "e5m2": 0x7F}[name]
    index = int(element.encode(torch.tensor([min(max(x, -1e30), 1e30)])).item())
    sign = {"e2m1": 8, "e4m3": 128, "e5m2": 128}[name]
    return (index & (sign - 1)) | (sign if math.copysign(1, x) < 0 else 0)


def value(name: str, byte: int) -> float:
    if name == "e2m1":
        x = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][byte & 7]
        return -x if byte & 8 else x
    kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    return float(torch.tensor([byte & 255], dtype=torch.uint8).view(kind).float())


def stochastic(name: str, x: float, random: int, steps: int) -> int:
    """|x| between neighbours low < high goes up iff its place between them plus random/steps reaches 1."""
    sign = {"e2m1": 8, "e4m3": 128}[name]
    top = {"e2m1": 7, "e4m3": 0x7E}[name]
    if math.isnan(x):
        return {"e2m1": 7, "e4m3": 0x7F}[name]
    grid = [value(name, i) for i in range(top + 1)]
    low = max(i for i in range(top + 1) if grid[i] <= abs(x))
    if low < top:
        place = (abs(x) - grid[low]) / (grid[low + 1] - grid[low])
        low += place + random / steps >= 1
    return low | (sign if math.copysign(1, x) < 0 else 0)


def exponent_byte(x: float, up: bool) -> int:
    if math.isnan(x):
        return 255
    if x == 0:
        return 0
    if math.isinf(x):
        return 254
    mantissa, exponent = math.frexp(abs(x))
    return min(max(exponent + 126 + (up and mantissa > 0.5), 0), 254)


def brain_power(byte: int) -> int:
    return 0x7FFF if byte == 255 else brain(2.0 ** (byte - 127))


def dithered(a: int, random: int) -> int:
    if math.isnan(f32(a)):
        return 0x7FFF
    return a >> 16 if a >> 23 & 255 == 255 else a + random >> 16


def directed_product(a: int, b: int, whole: Callable[[Fraction], int]) -> int:
    """Bits of the product of two floats, its significand made an integer by `whole` (ceil, floor, trunc)."""
    x, y = f32(a), f32(b)
    if not math.isfinite(x) or not math.isfinite(y) or x == 0 or y == 0:
        return bits(x * y)
    exact = Fraction(x) * Fraction(y)
    unit = Fraction(2) ** (max(math.frexp(x * y)[1] - 1, -126) - 23)
    largest = (2 - 2.0**-23) * 2.0**127
    away = math.inf if whole(Fraction(1 if exact > 0 else -1, 2)) else largest
    result = away if abs(exact) > largest else abs(float(whole(exact / unit) * unit))
    return bits(math.copysign(result, x * y))
