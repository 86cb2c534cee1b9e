"""Statements that move data: parameters, global and shared memory, atomics, and the threads of a warp among themselves.

Threads of a warp that exchange data must all take part; a shuffle in a divergent warp is an error.  `cp.async` copies
at once (its waits are then empty, so a missing wait is not seen).  Atomics of many threads on one address happen in
the order of threads, which on a GPU is any order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .ptx_lanes import FLOAT, UNSIGNED, Array, kind
from .ptx_parse import Fault, Statement, address, bits_of, members


def _active(m: Any, mask: Array | None) -> Array:
    return np.ones(m.count, np.bool_) if mask is None else mask


def _addresses(m: Any, operand: str, space: str) -> Array:
    base, offset = address(operand)
    width = m.program.widths.get(base, 64)
    value = m.all(m.read(base, UNSIGNED[width]).astype(np.uint64)) + np.uint64(offset & (2**64 - 1))
    return value.astype(np.int64) if space == "shared" else value


def _space(s: Statement) -> str:
    for name in ("global", "shared", "param", "local", "const"):
        if any(p == name or p.startswith(name + "__") for p in s.parts):
            return name
    return "generic"


def _vector(s: Statement) -> int:
    return next((int(p[1:]) for p in s.parts if re.fullmatch(r"v[248]", p)), 1)


def _load(m: Any, s: Statement, mask: Array | None) -> None:
    space, width = _space(s), bits_of(s.type) // 8
    registers = members(s.operands[0])
    if space == "param":
        name, offset = address(s.operands[1])
        value = np.full(1, m.parameters[name] & (2**64 - 1), np.uint64) >> np.uint64(8 * offset)
        return m.write(registers[0], value.astype(UNSIGNED[8 * width]), mask)
    total = width * _vector(s)
    active = _active(m, mask)
    where = _addresses(m, s.operands[1], space)
    raw = np.zeros((m.count, total), np.uint8)
    if space == "shared":
        raw[active] = m.shared.data[m.shared.cells(m.cta[active], where[active], total, "A load")]
    elif space == "global":
        raw[active] = m.memory.load(where[active], total, m.cta[active])
        m.memory.account("load", where, active, total)
    else:
        raise Fault(f"Loads from {space} memory are unknown to the executor.")
    columns = raw.view(UNSIGNED[8 * width])
    for i, register in enumerate(registers):
        value = np.ascontiguousarray(columns[:, i])
        if s.type[0] == "s":
            m.write_signed(register, value.view(kind(s.type)), mask)
        else:
            m.write(register, value, mask)


def _store(m: Any, s: Statement, mask: Array | None) -> None:
    space, width = _space(s), bits_of(s.type) // 8
    active = _active(m, mask)
    where = _addresses(m, s.operands[0], space)
    values = [m.all(m.read(r, UNSIGNED[8 * width])) for r in members(s.operands[1])]
    raw = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)[active]
    if space == "shared":
        m.shared.data[m.shared.cells(m.cta[active], where[active], raw.shape[1], "A store")] = raw
    elif space == "global":
        m.memory.store(where[active], raw, m.cta[active])
        m.memory.account("store", where, active, raw.shape[1])
    else:
        raise Fault(f"Stores to {space} memory are unknown to the executor.")


_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
}  # fmt: skip


def _atomic(m: Any, s: Statement, mask: Array | None) -> None:
    """atom: d, [a], b{, c}; red: [a], b."""
    result, rest = (s.operands[0], s.operands[1:]) if s.parts[0] == "atom" else ("_", s.operands)
    space, type_ = _space(s), s.type
    if _vector(s) > 1 or type_ in ("bf16", "bf16x2", "f16x2"):
        raise Fault(f"The atomic operation {s.opcode} is unknown to the executor.")
    dtype = FLOAT[int(type_[1:])] if type_[0] == "f" else kind(type_)
    active = _active(m, mask)
    where, width = _addresses(m, rest[0], space), np.dtype(dtype).itemsize
    values = m.all(m.read(rest[1], dtype))[active]
    if "cas" in s.parts:
        new = m.all(m.read(rest[2], dtype))[active]

        def combine(old: Array, which: Array) -> Array:
            return np.where(old == values[which], new[which], old)
    else:
        operation = next((_COMBINE[p] for p in s.parts if p in _COMBINE), None)
        if operation is None:
            raise Fault(f"The atomic operation {s.opcode} is unknown to the executor.")

        def combine(old: Array, which: Array) -> Array:
            return operation(old, values[which])

    found = np.zeros(m.count, dtype)
    if space == "shared":
        found[active] = m.shared.update(m.cta[active], where[active], dtype, combine)
    else:
        found[active] = m.memory.update(where[active], dtype, combine)
        m.memory.account("atomic", where, active, width)
    m.write(result, found, mask)


def _copy_async(m: Any, s: Statement, mask: Array | None) -> None:
    """cp.async.{ca,cg}.shared.global [to], [from], bytes{, from_bytes}; the rest is filled with zeros."""
    if "bulk" in s.parts or "mbarrier" in s.parts:
        raise Fault(f"The opcode {s.opcode} is unknown to the executor: it needs the asynchronous copy engine.")
    if s.parts[2] in ("commit_group", "wait_group", "wait_all"):
        return
    width = int(s.operands[2], 0)
    active = _active(m, mask)
    to, source = _addresses(m, s.operands[0], "shared"), _addresses(m, s.operands[1], "global")
    wanted = m.all(m.read(s.operands[3], np.uint32)) if len(s.operands) > 3 else np.full(m.count, width, np.uint32)
    raw = np.zeros((m.count, width), np.uint8)
    for size in np.unique(wanted[active]):
        some = active & (wanted == size)
        if size and size == width:
            raw[some] = m.memory.load(source[some], width, m.cta[some])
            m.memory.account("load", source, some, width)
        elif size:
            raise Fault("cp.async of a part of its bytes is unknown to the executor.")
    m.shared.data[m.shared.cells(m.cta[active], to[active], width, "An asynchronous copy")] = raw[active]


def _warps(m: Any, mask: Array | None, s: Statement) -> None:
    if m.count % 32:
        raise Fault(f"{s.opcode} needs whole warps.")
    if mask is not None:
        members_ = mask.reshape(-1, 32)
        if (members_.any(1) != members_.all(1)).any():
            raise Fault(f"{s.opcode} is executed by a part of a warp.")


def _shuffle(m: Any, s: Statement, mask: Array | None) -> None:
    """shfl.sync.{bfly,up,down,idx}.b32 d{|p}, a, b, c, members: c holds the clamp and the segment mask."""
    _warps(m, mask, s)
    value, b, c = (m.all(m.read(o, np.uint32)).reshape(-1, 32) for o in s.operands[1:4])
    lane = np.arange(32, dtype=np.int64)
    b, clamp, segment = (b & 31).astype(np.int64), (c & 31).astype(np.int64), (c >> 8 & 31).astype(np.int64)
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    mode = s.parts[2]
    other = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": first | (b & ~segment & 31)}[mode]
    valid = other >= last if mode == "up" else other <= last
    other = np.where(valid, other, lane)
    target, _, predicate = s.operands[0].partition("|")
    m.write(target, np.take_along_axis(value, other, 1).reshape(-1), mask)
    if predicate:
        m.write(predicate, np.broadcast_to(valid, value.shape).reshape(-1), mask)


def _reduce(m: Any, s: Statement, mask: Array | None) -> None:
    _warps(m, mask, s)
    x = m.all(m.read(s.operands[1], np.float32 if s.type == "f32" else kind(s.type))).reshape(-1, 32)
    if "abs" in s.parts:
        x = np.abs(x)
    table = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.minimum if "NaN" in s.parts or s.type != "f32" else np.fmin,
        "max": np.maximum if "NaN" in s.parts or s.type != "f32" else np.fmax,
    }  # fmt: skip
    out = table[s.parts[2]].reduce(x, axis=1, dtype=x.dtype)
    m.write(s.operands[0], np.repeat(out, 32), mask)


def _vote(m: Any, s: Statement, mask: Array | None) -> None:
    _warps(m, mask, s)
    x = m.all(m.read(s.operands[1], np.bool_)).reshape(-1, 32)
    if s.parts[2] == "ballot":
        out = (x.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
    else:
        out = {"all": x.all(1), "any": x.any(1), "uni": x.all(1) | ~x.any(1)}[s.parts[2]]
    m.write(s.operands[0], np.repeat(out, 32), mask)


def _elect(m: Any, s: Statement, mask: Array | None) -> None:
    """One thread of the warp: the first."""
    _warps(m, mask, s)
    number, _, chosen = s.operands[0].partition("|")
    m.write(number, np.zeros(1, np.uint32), mask)
    m.write(chosen, np.arange(m.count) % 32 == 0, mask)


def _barrier(m: Any, s: Statement, mask: Array | None) -> None:
    """Everybody waits: bar.warp.sync for the warp, bar.sync 0 for the program."""
    if "warp" in s.parts:
        return _warps(m, mask, s)
    if s.opcode not in ("bar.sync", "barrier.sync", "barrier.sync.aligned") or s.operands != ("0",):
        raise Fault("This barrier is unknown to the executor.")
    here = np.bincount(m.cta[_active(m, mask)], minlength=m.programs)
    if ((here > 0) & (here != np.bincount(m.cta[m.alive], minlength=m.programs))).any():
        raise Fault("A barrier is reached by a part of the threads of a program.")


def _matrix(m: Any, s: Statement, mask: Array | None) -> None:
    """ldmatrix / stmatrix of 8x8 matrices of 16-bit elements: thread 8 i + r names row r of matrix i, thread t holds
    elements (t / 4, 2 (t % 4) ..+1), or with .trans elements (2 (t % 4) ..+1, t / 4)."""
    _warps(m, mask, s)
    if s.type != "b16" or "m8n8" not in s.parts:
        raise Fault(f"The form of {s.opcode} is unknown to the executor.")
    loading = s.parts[0] == "ldmatrix"
    where, registers = (s.operands[1], s.operands[0]) if loading else s.operands[:2]
    rows, lane = _addresses(m, where, "shared").reshape(-1, 32), np.arange(32)
    chosen = slice(None) if mask is None else mask.reshape(-1, 32).all(1)
    cta = m.cta.reshape(-1, 32)[chosen]
    for i, register in enumerate(members(registers)):
        row = rows[chosen, 8 * i : 8 * i + 8]
        m.shared.cells(cta[:, :8].reshape(-1), row.reshape(-1), 16, s.opcode)
        if "trans" in s.parts:
            first, column = (lane % 4) * 2, 2 * (lane // 4)
            low, high = row[:, first] + column, row[:, first + 1] + column
            cells = np.stack([low, low + 1, high, high + 1], -1)
        else:
            cells = (row[:, lane // 4] + lane % 4 * 4)[..., None] + np.arange(4)
        if loading:
            value = np.zeros((len(rows), 32), np.uint32)
            value[chosen] = np.ascontiguousarray(m.shared.data[cta[..., None], cells]).view(np.uint32)[..., 0]
            m.write(register, value.reshape(-1), mask)
        else:
            value = m.all(m.read(register, np.uint32)).reshape(-1, 32, 1)[chosen]
            m.shared.data[cta[..., None], cells] = np.ascontiguousarray(value).view(np.uint8)


OPERATIONS: dict[str, Callable[[Any, Statement, Any], None]] = {
    "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "cp": _copy_async, "shfl": _shuffle,
    "redux": _reduce, "vote": _vote, "ldmatrix": _matrix, "stmatrix": _matrix,
    "elect": _elect, "bar": _barrier, "barrier": _barrier,
}  # fmt: skip
