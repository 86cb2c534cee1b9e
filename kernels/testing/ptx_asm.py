"""Inline assembly of a Triton kernel, executed as PTX on the arrays of the interpreter.

Every invocation is a lane with registers and nothing else: an asm text that touches memory or other threads is refused.
How elements share registers is described in `asm`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from . import ptx_ops
from .ptx_lanes import UNSIGNED, Array, Lanes
from .ptx_parse import Fault, Program, parse_body

_LETTER = {"r": 32, "f": 32, "h": 16, "l": 64, "d": 64, "c": 8}


@lru_cache(maxsize=64)
def _program(text: str, constraints: str) -> tuple[Program, int]:
    """(statements over registers op0, op1, ..., number of results)."""
    letters = [c.strip() for c in constraints.split(",")]
    operands = [c for c in letters if c.lstrip("=&") in _LETTER]
    if len(operands) != len([c for c in letters if not c.startswith("~")]):
        raise Fault(f"The constraints {constraints!r} of an inline asm are not understood.")
    program = Program("inline asm", [], 1, {f"op{i}": _LETTER[c.lstrip("=&")] for i, c in enumerate(operands)})
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    parse_body(re.sub(r"\$(\d+)|\$\{(\d+)(?::\w+)?\}", lambda m: f"op{m[1] or m[2]}", text), program)
    return program, sum(c.startswith("=") for c in operands)


def execute(text: str, constraints: str, values: Sequence[Array], results: Sequence[Any], pack: int) -> list[Array]:
    """Results (numpy, of dtypes `results`) of the shape that the `values` broadcast to."""
    program, outputs = _program(text, constraints)
    values = np.broadcast_arrays(*values) if values else [np.zeros(1)]
    shape = values[0].shape
    if values[0].size % pack:
        raise Fault(f"An inline asm that packs {pack} elements was given {values[0].size}.")
    lanes = Lanes(program, values[0].size // pack)
    number = outputs
    for value in values:
        for register in _registers(np.ascontiguousarray(value), pack):
            lanes.write(f"op{number}", register, None)
            number += 1
    if number != constraints.replace("~", "=").count(",") + 1 - constraints.count("~"):
        raise Fault(f"An inline asm with the constraints {constraints!r} was given {number} operands.")
    with np.errstate(all="ignore"):
        for one in program.code:
            if one.parts[0] in ("ld", "st", "atom", "red", "shfl", "redux", "vote", "bar", "bra", "cp"):
                raise Fault(f"`{one}` in an inline asm cannot be emulated: it is more than arithmetic on registers.")
            mask = None if one.predicate is None else lanes.all(lanes.read(one.predicate, np.bool_)) ^ one.negated
            ptx_ops.execute(lanes, one, mask)
    out, number = [], 0
    for result in results:
        dtype = np.dtype(result)
        many = _per_register(dtype, pack)
        columns = []
        for _ in range(pack // many):
            register = lanes.all(lanes.read(f"op{number}", UNSIGNED[max(8 * dtype.itemsize * many, 8)]))
            columns.append(register.view(f"u{dtype.itemsize}").reshape(lanes.count, many))
            number += 1
        out.append(np.ascontiguousarray(np.concatenate(columns, 1)).view(dtype).reshape(shape))
    if number != outputs:
        raise Fault(f"An inline asm has {outputs} results, and its kernel expects {number}.")
    return out


def _per_register(dtype: np.dtype[Any], pack: int) -> int:
    return min(max(32 // (8 * dtype.itemsize), 1), pack)


def _registers(value: Array, pack: int) -> list[Array]:
    """`pack` neighbours of an argument as one or several registers, first element in the low bits."""
    if value.dtype == np.bool_:
        value = value.view(np.uint8)
    many = _per_register(value.dtype, pack)
    whole = value.view(f"u{value.dtype.itemsize}").reshape(-1, pack)
    return [
        np.ascontiguousarray(whole[:, i : i + many]).view(f"u{value.dtype.itemsize * many}").reshape(-1)
        for i in range(0, pack, many)
    ]
