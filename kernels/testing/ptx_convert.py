"""`cvt`: conversions between integers, floats, and every narrow format.

Packed results take the first operand in the HIGH part: `cvt.rn.satfinite.e2m1x2.f32 d, a, b` puts a in bits 4..7.  The
vector forms continue that order, `cvt.rs.satfinite.e2m1x4.f32 d, {a, b, e, f}, rbits` puts a in bits 12..15 and f in
bits 0..3 (read off TransformerEngine, which passes {x3, x2, x1, x0}).

Stochastic rounding adds random bits below the last mantissa bit and truncates: with k random bits r,
q = floor(|x| / 2^(E - m) + r / 2^k).  **Unverified on hardware**: which of the 32 bits belong to which element.  Here
element i (counted from the low end of d) of a x4 form takes k = 8 bits from bit 8 i, as TransformerEngine's software
fallback does; a x2 form (f16, bf16) takes k = 13 or 16 bits, the high element from bit 16.  Any other assignment is as
unbiased, but not the same bits.
"""

from __future__ import annotations

import numpy as np

from . import floats
from .ptx_float import narrow, widen
from .ptx_lanes import UNSIGNED, Array, Lanes, kind
from .ptx_parse import Fault, Statement, members

__all__ = ["convert", "widen"]
_NARROW = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(m: Lanes, s: Statement, mask: Array | None) -> None:
    if "pack" in s.parts:
        return _pack_integers(m, s, mask)
    target, source = s.parts[-2:]
    if target[:-2] in (*_NARROW, "ue8m0") or source[:-2] in (*_NARROW, "ue8m0"):
        return _narrow_formats(m, s, target, source, mask)
    if target in ("f16x2", "bf16x2") and source == "f32":
        return _pair_of_halves(m, s, target, mask)
    if target == "tf32":
        return _tf32(m, s, mask)
    if target[0] in "su" and source[0] in "su":
        return m.write_signed(s.operands[0], _integer(m, s, target, source), mask)
    value = widen(m, s.operands[1], source) if "f" in source else m.read(s.operands[1], kind(source))
    if "ftz" in s.parts and source == "f32":
        value = np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)
    if target[0] in "su":
        return m.write_signed(s.operands[0], _float_to_integer(value, s, target), mask)
    for name in _ROUND:  # float to float of the same kind, rounded to an integer
        if name in s.parts:
            value = _ROUND[name](value)
    value = _saturated(value, s)
    if any(r in s.parts for r in ("rm", "rp", "rs")):
        raise Fault(f"The rounding of {s.opcode} is unknown to the executor.")
    if "rz" in s.parts:
        if target not in ("f16", "bf16"):
            raise Fault(f"The rounding of {s.opcode} is unknown to the executor.")
        return m.write(s.operands[0], floats.encode(value, target, saturate=False, toward_zero=True), mask)
    if target in ("f16", "bf16") and value.dtype != np.float32:  # one rounding, from the wide value
        exact = value.astype(np.float64)
        return m.write(s.operands[0], floats.encode(exact, target, saturate="satfinite" in s.parts), mask)
    if target in ("f16", "bf16") and "satfinite" in s.parts:
        return m.write(s.operands[0], floats.encode(value, target), mask)
    wide = {"f32": np.float32, "f64": np.float64}.get(target, np.float32)
    m.write(s.operands[0], narrow(value.astype(wide), target), mask)


def _saturated(value: Array, s: Statement) -> Array:
    if "sat" in s.parts:
        value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
    return np.where(value < 0, np.zeros(1, value.dtype), value) if "relu" in s.parts else value


def _integer(m: Lanes, s: Statement, target: str, source: str) -> Array:
    value = m.read(s.operands[1], kind(source))
    if "sat" in s.parts:
        limit = np.iinfo(kind(target))
        value = np.clip(value.astype(object), limit.min, limit.max)
    return value.astype(kind(target))


def _pack_integers(m: Lanes, s: Statement, mask: Array | None) -> None:
    """cvt.pack.sat.{s16,u16,...,u2}.s32{.b32} d, a, b{, c}: saturated a above saturated b, c shifted above both."""
    name = s.parts[3]
    width, signed = int(name[1:]), name[0] == "s"
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    a, b = (np.clip(m.read(o, np.int32).astype(np.int64), low, high) & ((1 << width) - 1) for o in s.operands[1:3])
    c = m.read(s.operands[3], np.uint32).astype(np.int64) if len(s.operands) > 3 else np.zeros(1, np.int64)
    m.write(s.operands[0], ((c << 2 * width | a << width | b) & 0xFFFFFFFF).astype(np.uint32), mask)


def _float_to_integer(value: Array, s: Statement, target: str) -> Array:
    """Rounded as the opcode says, saturating, NaN to zero."""
    how = next((name for name in _ROUND if name in s.parts), None)
    if how is None:
        raise Fault(f"{s.opcode} has no rounding.")
    return floats.to_integer(_ROUND[how](value), kind(target))


def _tf32(m: Lanes, s: Statement, mask: Array | None) -> None:
    """10 mantissa bits in a float32 register: `.rna` adds half and truncates, `.rn` is to even."""
    u = m.read(s.operands[1], np.uint32)
    half = np.uint32(0x1000) if "rna" in s.parts else np.uint32(0xFFF) + (u >> np.uint32(13) & np.uint32(1))
    if "rz" in s.parts:
        half = np.uint32(0)
    special = (u & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    m.write(s.operands[0], np.where(special, u, (u + half) & np.uint32(0xFFFFE000)), mask)


def _pair_of_halves(m: Lanes, s: Statement, target: str, mask: Array | None) -> None:
    """cvt.{rn,rz,rs}.{f16x2,bf16x2}.f32 d, a, b{, rbits}: a in the high half."""
    name = target[:-2]
    halves = []
    for i, operand in enumerate((s.operands[2], s.operands[1])):  # low, high
        value = _saturated(m.read(operand, np.float32), s)
        saturate = "satfinite" in s.parts
        if "rs" in s.parts:
            bits = 13 if name == "f16" else 16
            random = m.read(s.operands[3], np.uint32) >> np.uint32(16 * i) & np.uint32((1 << bits) - 1)
            halves.append(floats.encode(value, name, random / 2.0**bits, saturate))
        elif "rz" in s.parts:
            halves.append(floats.encode(value, name, saturate=saturate, toward_zero=True))
        elif name == "bf16" and not saturate:
            halves.append(floats.bf16_bits(value))
        else:
            halves.append(floats.encode(value, name, saturate=saturate))
    m.write(s.operands[0], halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << np.uint32(16), mask)


def _narrow_formats(m: Lanes, s: Statement, target: str, source: str, mask: Array | None) -> None:
    if source[:-2] in _NARROW or source == "ue8m0x2":
        return _unpack(m, s, target, source, mask)
    name, width = target[:-2], {"e2m1": 4}.get(target[:-2], 8)
    if source == "f32" and target.endswith("x4"):
        values = [m.read(o, np.float32) for o in reversed(members(s.operands[1]))]
        random = m.read(s.operands[2], np.uint32)
        noise: list[Array | None] = [(random >> np.uint32(8 * i) & np.uint32(255)) / 256.0 for i in range(4)]
    else:
        if source == "f32":
            values = [m.read(s.operands[2], np.float32), m.read(s.operands[1], np.float32)]
        else:  # f16x2, bf16x2: one register, its low half first
            both = widen(m, s.operands[1], source)
            values = [both[:, 0], both[:, 1]]
        noise = [None] * 2
    if target.endswith("x4") != ("rs" in s.parts):
        raise Fault(f"The rounding of {s.opcode} is unknown to the executor.")
    out = np.zeros(1, np.uint32)
    for i, (value, u) in enumerate(zip(values, noise)):
        value = _saturated(value, s)
        if name == "ue8m0":
            code = floats.e8m0_bits(value, "rp" in s.parts, "satfinite" in s.parts)
        else:
            code = floats.encode(value, name, u)
        out = out | code.astype(np.uint32) << np.uint32(width * i)
    m.write(s.operands[0], out.astype(UNSIGNED[width * len(values)]), mask)


def _unpack(m: Lanes, s: Statement, target: str, source: str, mask: Array | None) -> None:
    """cvt.rn.{f16x2,bf16x2}.{e2m1x2,e4m3x2,...,ue8m0x2} d, a: exact, low element to the low half."""
    name = source[:-2]
    width = 4 if name == "e2m1" else 8
    raw = m.read(s.operands[1], np.uint8 if width == 4 else np.uint16).astype(np.uint32)
    halves = []
    for i in range(2):
        code = raw >> np.uint32(width * i) & np.uint32((1 << width) - 1)
        value = floats.e8m0_value(code) if name == "ue8m0" else floats.decode(code, name)
        value = _saturated(value, s)
        halves.append(narrow(value, target[:-2]).astype(np.uint32))
    m.write(s.operands[0], halves[0] | halves[1] << np.uint32(16), mask)
