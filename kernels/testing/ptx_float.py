"""Floating-point statements: f32, f64, f16, bf16, pairs of them in a register, and mixed 16/32-bit forms.

One rounding, to nearest even, and NaN results in the GPU's canonical pattern (0x7fffffff, 0x7fff).  16-bit formats are
computed in float32, where one operation rounds harmlessly first (24 >= 2 x 11 + 2 bits); fma is exact (`floats.fma`).
`max`/`min` prefer the number over a NaN unless `.NaN`, and +0 over -0.  `.ftz` flushes subnormals of operands and
result.  Of directed rounding, `mul.{rz,rm,rp}.f32` is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import floats
from .ptx_lanes import FLOAT, Array, Lanes
from .ptx_parse import Fault, Statement

OPERATIONS = (
    "add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "neg", "abs",
    "min", "max", "copysign", "testp",
)  # fmt: skip
_NAN: dict[str, Any] = {"f32": np.uint32(0x7FFFFFFF), "f16": np.uint16(0x7FFF), "bf16": np.uint16(0x7FFF)}


def widen(m: Lanes, operand: str, type_: str) -> Array:
    """The operand's values in float32 (float64 for f64); (threads, 2) for packed pairs, low half first."""
    single = type_.removesuffix("x2")
    if single == "bf16":
        raw = m.read(operand, np.uint32 if type_ != single else np.uint16)
        out = floats.bf16_value(np.ascontiguousarray(raw).view(np.uint16))
    elif type_ != single:
        raw = m.read(operand, np.uint64 if single == "f32" else np.uint32)
        out = np.ascontiguousarray(raw).view(FLOAT[int(single[1:])]).astype(np.float32)
    else:
        out = m.read(operand, FLOAT[int(single[1:])])
        out = out if single == "f64" else out.astype(np.float32)
    return out.reshape(-1, 2) if type_ != single else out


def narrow(value: Array, type_: str) -> Array:
    """Values to the register's bits, NaN canonical."""
    single = type_.removesuffix("x2")
    if single == "bf16":
        wide = value.dtype == np.float64
        bits = floats.encode(value, "bf16", saturate=False) if wide else floats.bf16_bits(value)
    else:
        bits = np.ascontiguousarray(value.astype(FLOAT[int(single[1:])]))
        bits = bits.view(f"u{bits.itemsize}")
    if single in _NAN:
        bits = np.where(np.isnan(value), _NAN[single], bits).astype(bits.dtype)
    if type_ != single:
        bits = np.ascontiguousarray(bits).view(f"u{2 * bits.itemsize}").reshape(-1)
    return bits


def execute(m: Lanes, s: Statement, mask: Array | None) -> None:
    base, type_ = s.parts[0], s.type
    directed = next((r for r in ("rz", "rm", "rp") if r in s.parts), None)
    if directed and (base, type_) != ("mul", "f32"):
        raise Fault(f"The rounding of {s.opcode} is unknown to the executor.")
    if any(a in s.parts for a in ("approx", "full")) and base not in ("neg", "abs", "min", "max"):
        m.approximate.add(s.opcode)
    if base == "neg" or base == "abs" or base == "copysign":
        return _signs(m, s, mask)
    if base == "testp":
        return _test(m, s, mask)
    types = _operand_types(s)
    values = [widen(m, o, t) for o, t in zip(s.operands[1:], types, strict=True)]
    result = "f32" if len(s.parts) > 2 and s.parts[-2] == "f32" else type_
    if "ftz" in s.parts:
        values = [_flush(v) for v in values]
    if directed:  # the product of two float32 is exact in float64
        out = floats.directed(values[0].astype(np.float64) * values[1], directed)
    else:
        out = _max_min(s, values) if base in ("max", "min") else _compute(base, values, result)
    if "ftz" in s.parts:
        out = _flush(out)
    if "sat" in s.parts:
        out = np.clip(np.nan_to_num(out, nan=0.0), 0, 1)
    if "relu" in s.parts:
        out = np.where(out < 0, np.float32(0), out)
    m.write(s.operands[0], narrow(out, result), mask)


def _operand_types(s: Statement) -> list[str]:
    """Mixed forms, `add.f32.bf16 d, a, c` and `fma.rn.f32.bf16 d, a, b, c`: the last operand is f32."""
    count = len(s.operands) - 1
    if len(s.parts) > 2 and s.parts[-2] == "f32" and s.type in ("f16", "bf16"):
        return [s.type] * (count - 1) + ["f32"]
    return [s.type] * count


def _compute(base: str, v: list[Array], type_: str) -> Array:
    single = type_.removesuffix("x2")
    if base in ("fma", "mad"):
        if single == "f64":
            raise Fault("fma of float64 is unknown to the executor.")
        odd = floats.fma_to_odd(*v)
        return odd if single in ("bf16", "f16") else odd.astype(np.float32)
    table: dict[str, Any] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt,
        "rcp": lambda x: np.divide(x.dtype.type(1), x),
        "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
        "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
        "lg2": lambda x: np.log2(x.astype(np.float64)).astype(x.dtype),
        "sin": lambda x: np.sin(x.astype(np.float64)).astype(x.dtype),
        "cos": lambda x: np.cos(x.astype(np.float64)).astype(x.dtype),
        "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(x.dtype),
    }  # fmt: skip
    return table[base](*v)


def _max_min(s: Statement, v: list[Array]) -> Array:
    """max and min of two or three; `.abs` and `.xorsign.abs` compare magnitudes."""
    sign = None
    if "abs" in s.parts:
        if "xorsign" in s.parts:
            sign = np.signbit(v[0]) ^ np.signbit(v[1])
        v = [np.abs(x) for x in v]
    largest = s.parts[0] == "max"
    out = v[0]
    for x in v[1:]:
        keep = np.maximum if largest else np.minimum
        prefer = np.fmax if largest else np.fmin
        joined = (keep if "NaN" in s.parts else prefer)(out, x)
        zero = np.where(np.signbit(out) & np.signbit(x) if largest else np.signbit(out) | np.signbit(x), -0.0, 0.0)
        out = np.where((out == 0) & (x == 0), zero.astype(joined.dtype), joined)
    return out if sign is None else np.where(sign, -out, out)


def _signs(m: Lanes, s: Statement, mask: Array | None) -> None:
    """neg, abs, copysign act on the bits (and keep NaNs)."""
    single = s.type.removesuffix("x2")
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[single]
    total = width * (2 if s.type != single else 1)
    unit = np.dtype(f"u{total // 8}").type
    sign = unit(sum(1 << (i + width - 1) for i in range(0, total, width)))
    x = m.read(s.operands[1], unit)
    if s.parts[0] == "copysign":  # copysign.f32 d, a, b: magnitude of b, sign of a
        out = (m.read(s.operands[2], unit) & ~sign) | (x & sign)
    else:
        out = x ^ sign if s.parts[0] == "neg" else x & ~sign
    m.write(s.operands[0], out, mask)


def _test(m: Lanes, s: Statement, mask: Array | None) -> None:
    x = widen(m, s.operands[1], s.type)
    tiny = np.finfo(x.dtype).tiny
    table = {
        "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": (x != 0) & (np.abs(x) < tiny),
    }  # fmt: skip
    m.write(s.operands[0], table[s.parts[1]], mask)


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)
