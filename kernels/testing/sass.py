"""Machine code as a list of instructions, and which of them a thread executes.

**Main path**: the instructions reachable from the entry of the kernel along fall-through and branches, without entering
a subroutine.  A division that rounds correctly calls one for the rare operands that its fast sequence cannot do: the
call, the subroutine, and what is reachable only behind the call are off the path.  So is the code that `BRA.DIV`
enters, for a warp whose threads have diverged at a shuffle.  Both arms of an `if` are on the path, and an instruction
whose predicate is false still takes an issue slot, so the count is an upper bound.  NOPs are not counted.

**Loops**: a branch back to an earlier address closes a loop over the addresses between.  A count of executed
instructions weighs each instruction by the trips of the loops around it; nobody but the caller knows the trips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\S+):\s*$")
_PREDICATE = re.compile(r"@(!?U?P[0-9T]+)\s+(.*)")
_TARGET = re.compile(r"`\((\S+?)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None  # "P0", "!UP1"
    opcode: str  # "LDG.E.128"
    operands: str
    on_main_path: bool = True
    loops: tuple[int, ...] = ()  # addresses of the heads of the loops around it, outermost first

    def __str__(self) -> str:
        return f"{'@' + self.predicate + ' ' if self.predicate else ''}{self.opcode} {self.operands}".rstrip()


def parse(text: str) -> list[Instruction]:
    """Instructions of what `nvdisasm -c` printed of a cubin with one kernel, in order of address."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}  # name -> index of the instruction that follows
    for line in text.splitlines():
        if m := _LABEL.match(line):
            labels[m[1]] = len(found)
        elif m := _LINE.match(line):
            body, predicate = m[2].strip(), None
            if p := _PREDICATE.match(body):
                predicate, body = p[1], p[2]
            opcode, _, operands = body.partition(" ")
            found.append(Instruction(int(m[1], 16), predicate, opcode, operands.strip()))
    return _annotate(found, labels)


def _annotate(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    reached, loops = _reach(code, labels, _calling_blocks(code, labels))
    if not any(code[i].opcode.startswith("EXIT") for i in reached):  # no way around a call: then it is the main path
        reached, loops = _reach(code, labels, set())
    out = []
    for i, one in enumerate(code):
        around = sorted({code[a].address for a, b in loops if a <= i <= b})
        out.append(replace(one, on_main_path=i in reached and one.opcode != "NOP", loops=tuple(around)))
    return out


def _calling_blocks(code: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Instructions of the straight pieces of code that end in an unconditional call."""
    starts, out = set(labels.values()), set()
    for i, one in enumerate(code):
        if one.opcode.startswith("CALL") and one.predicate is None:
            out.add(i)
            while i not in starts and i > 0 and not code[i - 1].opcode.startswith(("BRA", "EXIT", "CALL", "RET")):
                i -= 1
                out.add(i)
    return out


def _reach(code: list[Instruction], labels: dict[str, int], avoid: set[int]) -> tuple[set[int], list[tuple[int, int]]]:
    """(instructions that the entry reaches, loops as (first, last) instruction)."""
    reached: set[int] = set()
    loops: list[tuple[int, int]] = []
    todo = [0]
    while todo:
        i = todo.pop()
        if i in reached or i in avoid or i >= len(code):
            continue
        reached.add(i)
        one = code[i]
        base, target = one.opcode.split(".")[0], _TARGET.search(one.operands)
        if base == "RET" or (base in ("EXIT", "BPT") and one.predicate is None):
            continue
        if base in ("BRA", "JMP") and ".DIV" not in one.opcode:
            to = labels[target[1]] if target else i + 1
            todo.append(to)
            if to < i:
                loops.append((to, i))
            if one.predicate is None and not re.match(r"!?U?P\d", one.operands):
                continue
        todo.append(i + 1)
    return reached, loops


def loop_heads(code: Sequence[Instruction]) -> list[int]:
    return sorted({head for one in code if one.on_main_path for head in one.loops})


_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def access_bytes(opcode: str) -> int:
    """Bytes that one thread moves with a load or store: LDG.E.128 -> 16, STG.E.U8 -> 1, LDG.E -> 4."""
    return next((_WIDTH[part] for part in opcode.split(".") if part in _WIDTH), 4)
