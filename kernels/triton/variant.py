"""Variant: a kernel as it is started for one purpose, with what it has to move and the instructions it was written for.

A file with kernels' variants has a function ``variants() -> list[Variant]``; the kernel report compiles each for the
chips it names, executes what was compiled, and sets what moved against ``min_bytes``.  Shapes are small and whole: a
few tiles, no ragged edge, so that what is counted of one program holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CHIPS = ("sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Variant:
    """`run(arch, start)` does the whole job for a chip, on CPU tensors, and hands every launch to `start`, as
    ``quantize(x, format, arch=arch, start=start)`` does.  The row of the report is of the last launch; those before it
    count as passes over memory."""

    kernel: str  # "quantize"
    name: str  # "nvfp4 rows, nearest"
    run: Callable[[str, Callable[[Any], None]], Any]
    elements: int  # of the matrix or vector: what bytes and instructions are divided by
    min_bytes: float  # per element, that the last launch must move: each input once, each output once
    wanted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # chip -> regexes the PTX must contain
    most: Mapping[str, float] = field(default_factory=dict)  # chip -> instructions per element, at most
    chips: tuple[str, ...] = CHIPS
    trips: int | Literal["longest"] | None = None  # of the loops of a program; "longest": one trip of the longest only
    executes: bool = True  # False: tensor cores, TMA; it is compiled and read, not executed, and its bytes are unknown
    input: str = "x_ptr"  # the argument whose reading makes a pass over memory
    tensor_cores: bool = False  # they bound it, and not what the roofline of the report knows
