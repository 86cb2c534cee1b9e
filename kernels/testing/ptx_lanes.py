"""The registers of many threads at once: one numpy array a register, one entry a thread.

Registers hold bits (unsigned arrays, or booleans for predicates) and are read as any type of any width up to theirs,
as PTX does; an array of length 1 stands for a value that all threads share.  A write under a mask keeps what the other
threads had.  A register read before it was written holds a pattern that no kernel wants (LLVM leaves some undefined).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_parse import Fault, Program

Array = NDArray[Any]
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_UNWRITTEN = 0x7FC0_DEAD_7FC0_DEAD
_INTEGER = re.compile(r"-?(?:0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?")


def kind(name: str) -> Any:
    """numpy dtype of a PTX type: "f32", "s16", "u64", "b32"; predicates are booleans."""
    if name == "pred":
        return np.bool_
    tables: dict[str, dict[int, Any]] = {"f": FLOAT, "s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}
    table = tables.get(name[0])
    width = int(name[1:]) if name[1:].isdigit() else 0
    if table is None or width not in table:
        raise Fault(f"The PTX type {name} is not one that this operation is known for.")
    return table[width]


class Lanes:
    def __init__(self, program: Program, count: int):
        self.program, self.count = program, count
        self.registers: dict[str, Array] = {}
        self.special: dict[str, Array] = {}
        self.approximate: set[str] = set()  # opcodes executed whose last bits the manual leaves open

    def read(self, operand: str, as_kind: Any) -> Array:
        kind_ = np.dtype(as_kind)
        width = kind_.itemsize * 8
        if operand[0] == "!":
            return ~self.read(operand[1:], as_kind)
        if operand in self.special:
            return self.special[operand].astype(UNSIGNED[width]).view(kind_)
        if operand[0].isdigit() or operand[0] == "-":
            return _immediate(operand, kind_)
        if operand not in self.registers:
            self.registers[operand] = self._unwritten(operand)
        value = self.registers[operand]
        if value.dtype == np.bool_ or kind_ == np.bool_:
            return value
        have = value.dtype.itemsize * 8
        return value.view(kind_) if have == width else value.astype(UNSIGNED[width]).view(kind_)

    def _unwritten(self, operand: str) -> Array:
        width = self.program.widths.get(operand)
        if width is None:
            raise Fault(f"The operand {operand} is no register, constant or special register that is known.")
        if width == 1:
            return np.zeros(1, np.bool_)
        width = max(width, 8)
        return np.full(1, _UNWRITTEN & ((1 << width) - 1), UNSIGNED[width])

    def write(self, operand: str, value: Array, mask: Array | None) -> None:
        if operand == "_":
            return
        width = self.program.widths.get(operand)
        if width is None:
            raise Fault(f"The result register {operand} was not declared.")
        if width == 1:
            value = np.asarray(value).astype(np.bool_)
        else:
            value = np.ascontiguousarray(value)
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
            if value.dtype.itemsize * 8 != width:
                value = value.astype(UNSIGNED[width])
        if mask is not None:
            old = self.registers.get(operand)
            value = np.where(mask, value, self._unwritten(operand) if old is None else old)
        self.registers[operand] = value

    def write_signed(self, operand: str, value: Array, mask: Array | None) -> None:
        """A signed result narrower than its register is sign-extended."""
        width = self.program.widths.get(operand, 0)
        if value.dtype.itemsize * 8 < width:
            value = value.astype(SIGNED[width])
        self.write(operand, value, mask)

    def all(self, value: Array) -> Array:
        """The same value, one entry per thread."""
        return np.ascontiguousarray(np.broadcast_to(value, (self.count,)))


def _immediate(text: str, kind_: np.dtype[Any]) -> Array:
    width = kind_.itemsize * 8
    if text.startswith("0f"):
        bits = np.array([int(text[2:], 16)], np.uint32)
        return bits.view(kind_) if width == 32 else bits.view(np.float32).astype(kind_)
    if text.startswith("0d"):
        return np.array([int(text[2:], 16)], np.uint64).view(kind_)
    if not _INTEGER.fullmatch(text):
        raise Fault(f"The constant {text} is not understood.")
    value = int(text.rstrip("U"), 0)
    if kind_ == np.bool_:
        return np.array([bool(value)])
    return np.array([value & ((1 << width) - 1)], UNSIGNED[width]).view(kind_)
