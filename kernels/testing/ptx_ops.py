"""What PTX statements mean: integers, logic, selection, data movement between registers, and the table of all groups.

`execute(machine, statement, mask)` performs one statement for the threads of `mask` (None: all).  Floating point is in
`ptx_float`, conversions in `ptx_convert`, memory and warps in `ptx_transfer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ptx_convert, ptx_float, ptx_transfer
from .ptx_lanes import SIGNED, UNSIGNED, Array, Lanes, kind
from .ptx_parse import Fault, Statement, bits_of, members

Operation = Callable[[Any, Statement, Any], None]
_FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2")
_TYPE = re.compile(r"pred|[bsuf]\d+(x2)?|bf16(x2)?|tf32|u?e\d+m\d(x\d)?")
_MODIFIERS = {
    base: frozenset(words.split())
    for bases, words in (
        ("add sub", "rn ftz sat cc"),
        ("mul mad fma", "rn rz rm rp ftz sat relu lo hi wide"),
        ("div rcp sqrt rsqrt ex2 lg2 sin cos tanh", "rn ftz approx full"),
        ("neg abs", "ftz"),
        ("min max", "ftz NaN xorsign abs"),
        ("testp", "finite infinite number notanumber normal subnormal"),
        ("cvt", "rn rz rs rna rni rzi rmi rpi rp ftz sat satfinite relu pack"),
        ("setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"),
        ("shf", "l r wrap clamp"),
        ("bfind", "shiftamt"),
        ("cvta", "to global shared local const param"),
        ("shfl vote redux elect activemask", "sync bfly up down idx ballot all any uni add min max and or xor abs NaN"),
        ("bar barrier", "sync warp aligned"),
        ("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared"),
    )
    for base in bases.split()
}
_ANY_MODIFIER = ("ld", "ldu", "st", "atom", "red", "cp", "membar", "fence", "createpolicy")  # cache and ordering hints
_OUTSIDE = ("mma", "wgmma", "tcgen05", "mbarrier", "call", "tensormap", "setmaxnreg", "wmma")


def execute(m: Lanes, s: Statement, mask: Array | None) -> None:
    base = s.parts[0]
    check(s)
    if s.type in _FLOATS and base in ptx_float.OPERATIONS:
        return ptx_float.execute(m, s, mask)
    OPERATIONS[base](m, s, mask)


def check(s: Statement) -> None:
    """Refuses opcodes nobody here knows, and modifiers nobody looks at: they would change the meaning silently."""
    base = s.parts[0]
    if base not in OPERATIONS and base not in ptx_float.OPERATIONS:
        why = ": tensor cores, asynchronous copies and calls are outside of it" if base in _OUTSIDE else ""
        raise Fault(f"The opcode {s.opcode} is unknown to the executor{why}.")
    known = _MODIFIERS.get(base, frozenset())
    for part in s.parts[1:]:
        if base in _ANY_MODIFIER or part in known or _TYPE.fullmatch(part) or "__" in part:
            continue
        raise Fault(f"The modifier .{part} of {s.opcode} is unknown to the executor.")


def _move(m: Lanes, s: Statement, mask: Array | None) -> None:
    target, source = s.operands
    if s.type == "pred":
        return m.write(target, m.read(source, np.bool_), mask)
    whole = UNSIGNED[bits_of(s.type)]
    if target.startswith("{"):
        parts, value = members(target), m.read(source, whole)
        width = bits_of(s.type) // len(parts)
        for i, part in enumerate(parts):
            m.write(part, (value >> whole(i * width)).astype(UNSIGNED[width]), mask)
    elif source.startswith("{"):
        parts = members(source)
        width = bits_of(s.type) // len(parts)
        value = np.zeros(1, whole)
        for i, part in enumerate(parts):
            value = value | m.read(part, UNSIGNED[width]).astype(whole) << whole(i * width)
        m.write(target, value, mask)
    else:
        m.write(target, m.read(source, whole), mask)


def _logic(m: Lanes, s: Statement, mask: Array | None) -> None:
    base, type_ = s.parts[0], kind(s.type)
    values = [m.read(o, type_) for o in s.operands[1:]]
    if base == "not":
        out = ~values[0]
    elif base == "cnot":
        out = (values[0] == 0).astype(type_)
    else:
        out = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[base](*values)
    m.write(s.operands[0], out, mask)


def _lop3(m: Lanes, s: Statement, mask: Array | None) -> None:
    a, b, c = (m.read(o, np.uint32) for o in s.operands[1:4])
    table = int(m.read(s.operands[4], np.uint32)[0])
    out = np.zeros(1, np.uint32)
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    m.write(s.operands[0], out, mask)


def _shift(m: Lanes, s: Statement, mask: Array | None) -> None:
    type_ = kind(s.type)
    width = np.dtype(type_).itemsize * 8
    x, count = m.read(s.operands[1], type_), m.read(s.operands[2], np.uint32)
    inside = np.minimum(count, width - 1).astype(type_)
    if s.parts[0] == "shl":
        out = np.where(count < width, x << inside, type_(0))
    else:
        out = np.where(count < width, x >> inside, x >> type_(width - 1) if s.type[0] == "s" else type_(0))
    m.write_signed(s.operands[0], out.astype(type_), mask)


def _funnel(m: Lanes, s: Statement, mask: Array | None) -> None:
    low, high, count = (m.read(o, np.uint32).astype(np.uint64) for o in s.operands[1:])
    count = count & np.uint64(31) if "wrap" in s.parts else np.minimum(count, np.uint64(32))
    both = high << np.uint64(32) | low
    out = (both << count) >> np.uint64(32) if "l" in s.parts else both >> count
    m.write(s.operands[0], out.astype(np.uint32), mask)


def _field(m: Lanes, s: Statement, mask: Array | None) -> None:
    """bfe: `length` bits from `start`, sign-extended for signed types; bfi: written over those of b."""
    width = bits_of(s.type)
    type_, inserting = UNSIGNED[width], s.parts[0] == "bfi"
    first = m.read(s.operands[1], type_)
    start, length = (
        np.minimum(m.read(o, np.uint32) & 255, width).astype(np.uint64) for o in s.operands[3 if inserting else 2 :]
    )
    wide = first.astype(np.uint64)
    field = np.where(length >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1))
    if inserting:
        place = np.where(start < width, field << np.minimum(start, 63), np.uint64(0))
        out = (m.read(s.operands[2], type_).astype(np.uint64) & ~place) | ((wide << np.minimum(start, 63)) & place)
        return m.write(s.operands[0], out.astype(type_), mask)
    out = np.where(start < width, wide >> np.minimum(start, 63), np.uint64(0)) & field
    if s.type[0] == "s":
        last = np.minimum(np.where(length > 0, start + length - np.uint64(1), np.uint64(0)), width - 1)
        negative = ((wide >> last.astype(np.uint64)) & np.uint64(1)).astype(bool) & (length > 0)
        inside = np.where(start < width, np.uint64(2**width - 1) >> np.minimum(start, 63), np.uint64(0)) & field
        out = np.where(negative, out | ~inside, out)
    m.write(s.operands[0], out.astype(type_), mask)


def _permute(m: Lanes, s: Statement, mask: Array | None) -> None:
    if s.type != "b32":
        raise Fault(f"The mode of {s.opcode} is unknown to the executor.")
    a, b, selector = (m.read(o, np.uint32) for o in s.operands[1:])
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(1, np.uint32)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i)
        byte = (both >> ((chosen & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        out = out | byte << np.uint32(8 * i)
    m.write(s.operands[0], out, mask)


def _compare(m: Lanes, s: Statement, mask: Array | None) -> None:
    """setp.CMP{.BOOL}.TYPE p{|q}, a, b{, c}."""
    how, type_ = s.parts[1], s.type
    if type_ == "bf16":
        x, y = (ptx_convert.widen(m, o, "bf16") for o in s.operands[1:3])
    else:
        x, y = (m.read(o, kind(type_)) for o in s.operands[1:3])
    unordered = np.isnan(x) | np.isnan(y) if "f" in type_ else np.zeros(1, bool)
    if how in ("num", "nan"):
        out = unordered if how == "nan" else ~unordered
    else:
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how[:2])
        table = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
        out = (table[name] & ~unordered) | (unordered & how.endswith("u") & (len(how) == 3))
    other = ~out
    if len(s.operands) == 4:
        c = m.read(s.operands[3], np.bool_)
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[s.parts[2]]
        out, other = join(out, c), join(other, c)
    for target, value in zip(s.operands[0].split("|"), (out, other)):
        m.write(target, value, mask)


def _select(m: Lanes, s: Statement, mask: Array | None) -> None:
    type_ = UNSIGNED[bits_of(s.type)]
    a, b = (m.read(o, type_) for o in s.operands[1:3])
    m.write(s.operands[0], np.where(m.read(s.operands[3], np.bool_), a, b), mask)


def _count_bits(m: Lanes, s: Statement, mask: Array | None) -> None:
    width = bits_of(s.type)
    x = m.all(m.read(s.operands[1], UNSIGNED[width]))
    places = np.arange(width, dtype=x.dtype)
    digits = ((x[:, None] >> places) & x.dtype.type(1)).astype(bool)
    top = np.where(digits.any(1), width - 1 - np.argmax(digits[:, ::-1], 1), -1)
    if s.parts[0] == "popc":
        out = digits.sum(1)
    elif s.parts[0] == "clz":
        out = width - 1 - top
    elif s.parts[0] == "brev":
        return m.write(s.operands[0], (digits[:, ::-1] * (x.dtype.type(1) << places)).sum(1, dtype=x.dtype), mask)
    elif s.type[0] == "s":
        raise Fault(f"{s.opcode} of signed numbers is unknown to the executor.")
    else:  # bfind
        out = np.where(top >= 0, width - 1 - top if "shiftamt" in s.parts else top, 0xFFFFFFFF)
    m.write(s.operands[0], out.astype(np.uint32), mask)


def _arithmetic(m: Lanes, s: Statement, mask: Array | None) -> None:
    base, type_ = s.parts[0], kind(s.type.removesuffix("x2"))
    if s.type.endswith("x2"):  # two 16-bit numbers in a register
        values = [m.read(o, np.uint32).view(type_).reshape(-1, 2) for o in s.operands[1:]]
        pairs = np.broadcast_arrays(*values)
        table = {"add": np.add, "sub": np.subtract, "max": np.maximum, "min": np.minimum, "neg": np.negative}
        out = np.ascontiguousarray(table[base](*pairs).astype(type_))
        return m.write(s.operands[0], out.view(np.uint32).reshape(-1), mask)
    values = [m.read(o, type_) for o in s.operands[1:]]
    if "cc" in s.parts or base in ("addc", "subc", "madc"):
        raise Fault(f"Arithmetic with the carry flag ({s.opcode}) is unknown to the executor.")
    if base in ("mul", "mad"):
        return _product(m, s, values, mask)
    if base in ("div", "rem"):
        divisor = np.where(values[1] == 0, 1, values[1]).astype(type_)
        remainder = np.fmod(values[0], divisor)
        out = remainder if base == "rem" else (values[0] - remainder) // divisor
    elif base == "sad":
        out = values[2] + np.where(values[0] > values[1], values[0] - values[1], values[1] - values[0])
    elif "sat" in s.parts:
        wide = {"add": np.add, "sub": np.subtract}[base](values[0].astype(np.int64), values[1].astype(np.int64))
        out = np.clip(wide, np.iinfo(type_).min, np.iinfo(type_).max)
    else:
        table = {"add": np.add, "sub": np.subtract, "max": np.maximum, "min": np.minimum, "neg": np.negative}
        out = np.abs(values[0]) if base == "abs" else table[base](*values)
    m.write_signed(s.operands[0], out.astype(type_), mask)


def _product(m: Lanes, s: Statement, values: list[Array], mask: Array | None) -> None:
    width, signed = bits_of(s.type), s.type[0] == "s"
    table = SIGNED if signed else UNSIGNED
    if "wide" in s.parts:
        wide = table[2 * width]
        out = values[0].astype(wide) * values[1].astype(wide)
        if s.parts[0] == "mad":
            out = out + m.read(s.operands[3], wide)
        return m.write(s.operands[0], out, mask)
    if "hi" in s.parts and width == 64:
        a, b = np.broadcast_arrays(values[0], values[1])
        exact = [(int(p) * int(q)) >> 64 for p, q in zip(a, b)]
        out = np.array([v & (2**64 - 1) for v in exact], np.uint64).view(table[64])
    elif "hi" in s.parts:
        wide = table[2 * width]
        out = ((values[0].astype(wide) * values[1].astype(wide)) >> wide(width)).astype(table[width])
    else:
        out = values[0] * values[1]
    if s.parts[0] == "mad":
        out = out + values[2]
    m.write_signed(s.operands[0], out.astype(table[width]), mask)


def _dot4(m: Lanes, s: Statement, mask: Array | None) -> None:
    """dp4a.T.T d, a, b, c: four products of bytes, added to c."""
    a, b = (
        m.read(o, np.uint32).view(np.int8 if t[0] == "s" else np.uint8).reshape(-1, 4).astype(np.int64)
        for o, t in zip(s.operands[1:3], s.parts[1:3])
    )
    out = (a * b).sum(1) + m.read(s.operands[3], np.int32).astype(np.int64)
    m.write(s.operands[0], out.astype(np.int32), mask)


def _address_space(m: Lanes, s: Statement, mask: Array | None) -> None:
    m.write(s.operands[0], m.read(s.operands[1], UNSIGNED[bits_of(s.type)]), mask)


def _policy(m: Lanes, s: Statement, mask: Array | None) -> None:
    """createpolicy: a hint for the cache, which is not simulated."""
    m.write(s.operands[0], np.zeros(1, np.uint64), mask)


def _trap(m: Lanes, s: Statement, mask: Array | None) -> None:
    raise Fault("The kernel trapped.")


def _nothing(m: Lanes, s: Statement, mask: Array | None) -> None:
    """Ordering and hints: all threads run in lock step, so memory is always in order."""


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("and", "or", "xor", "not", "cnot"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("bfe", "bfi"), _field),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), _count_bits),
    **dict.fromkeys(("add", "sub", "mul", "mad", "div", "rem", "abs", "neg", "min", "max", "sad"), _arithmetic),
    **dict.fromkeys(("membar", "fence", "nop", "nanosleep", "prefetch", "prefetchu", "griddepcontrol"), _nothing),
    "mov": _move, "lop3": _lop3, "shf": _funnel, "prmt": _permute, "setp": _compare, "selp": _select, "dp4a": _dot4,
    "cvta": _address_space, "cvt": ptx_convert.convert, "createpolicy": _policy, "trap": _trap,
    **ptx_transfer.OPERATIONS,
}  # fmt: skip
