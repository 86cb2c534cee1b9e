"""PTX text -> a list of statements with resolved registers.

Handled: one `.entry` of a module; scoped blocks `{ .reg ...; }`, as inline asm makes them, whose registers may repeat
names of other blocks; labels; vector operands; predicates.  Operands stay strings ("%r7", "0f3F800000", "[%rd1+16]",
"{%r1, %r2}"), split once here; a register of an inner scope gets the number of its scope: "b0@3".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_BITS = {"pred": 1}


class Fault(RuntimeError):
    """The compiled code did something that a GPU would not do well either, or that the executor does not know."""

    def __init__(self, text: str, access: int | None = None):
        super().__init__(text)
        self.access = access  # number of the offending thread among those that took part


@dataclass(frozen=True)
class Statement:
    predicate: str | None
    negated: bool
    parts: tuple[str, ...]  # the opcode at its dots: ("ld", "global", "v4", "b32")
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)

    @property
    def type(self) -> str:
        return self.parts[-1]

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, str]]  # (type, name)
    threads: int
    widths: dict[str, int] = field(default_factory=dict)  # register -> bits; 1 for predicates
    code: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def bits_of(kind: str) -> int:
    """ "b32" -> 32, "pred" -> 1, "bf16x2" -> 32, "e2m1x2" -> 8."""
    packed = {"e2m1x2": 8, "e4m3x2": 16, "e5m2x2": 16, "ue8m0x2": 16, "e2m1x4": 16, "e4m3x4": 32, "e5m2x4": 32}
    if kind in packed:
        return packed[kind]
    m = re.fullmatch(r"[a-z]+(\d+)(?:x(\d))?", kind)
    return _BITS[kind] if m is None else int(m[1]) * int(m[2] or 1)


def parse(ptx: str) -> Program:
    ptx = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", ptx, flags=re.S))
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.S)
    if head is None:
        raise Fault("The PTX has no .entry with a body.")
    parameters = re.findall(
        r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b[^,]*?([\w$]+)(?:\[\d+\])?\s*(?=,|$)", head[2].strip()
    )
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    program = Program(head[1], parameters, int(threads[1]) if threads else 128)
    parse_body(ptx[head.end() :], program)
    return program


def parse_body(text: str, program: Program) -> None:
    """Statements up to the closing brace of the body (or the end of the text)."""
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.M)
    scopes: list[dict[str, str]] = [{}]  # name -> resolved name, innermost last
    opened = 0
    position = 0
    start = re.compile(r"\s*(?:([{};])|(\$?[A-Za-z_%][\w$%]*)\s*:(?!:))")
    while position < len(text):
        if m := start.match(text, position):
            position = m.end()
            if m[1] == "{":
                opened += 1
                scopes.append({"": str(opened)})
            elif m[1] == "}":
                scopes.pop()
                if not scopes:
                    return
            elif m[2]:
                program.labels[m[2]] = len(program.code)
            continue
        end = text.find(";", position)
        if end < 0:
            break
        _statement(" ".join(text[position:end].split()), program, scopes)
        position = end + 1


def _statement(text: str, program: Program, scopes: list[dict[str, str]]) -> None:
    if text.startswith(".reg"):
        m = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text)
        assert m is not None, text
        for name in re.split(r"\s*,\s*", m[2]):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                number = scopes[-1].get("")
                resolved = f"{one}@{number}" if number else one
                scopes[-1][one] = resolved
                program.widths[resolved] = bits_of(m[1])
        return
    if text.startswith("."):  # .pragma, .shared: nothing to execute
        return
    guard = re.match(r"@(!?)([%\w$]+)\s+(.*)", text)
    predicate = None
    if guard:
        predicate, text = _resolve(guard[2], scopes), guard[3]
    opcode, _, rest = text.partition(" ")
    # "mov .s32 x, -1" is legal: a type after a blank belongs to the opcode
    while rest.startswith("."):
        more, _, rest = rest.partition(" ")
        opcode += more
    operands = tuple(
        re.sub(r"[%$A-Za-z_][\w$%.]*", lambda m: _resolve(m[0], scopes), o) if o[0] != "0" else o for o in _split(rest)
    )
    statement = Statement(predicate, bool(guard and guard[1]), tuple(opcode.replace("::", "__").split(".")), operands)
    program.code.append(statement)


def _resolve(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", text) if part.strip()]


def members(operand: str) -> list[str]:
    """ "{%r1, %r2}" -> ["%r1", "%r2"]; a single register -> [it]."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def address(operand: str) -> tuple[str, int]:
    """ "[%rd4+-16]" -> ("%rd4", -16)."""
    m = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if m is None:
        raise Fault(f"The address {operand} is not understood.")
    return m[1], int(m[2], 0) if m[2] else 0
