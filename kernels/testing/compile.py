"""Compile a Triton kernel for a chip that is not there, and read what came out.

    c = compile_for(kernel, {"x_ptr": "*bf16", "y_ptr": "*u8", "n": "i32"}, {"BLOCK": 1024}, "sm_100", align=["n"])
    assert c.stack_bytes == 0 and c.count(r"F2FP.*E2M1") and c.instructions_per_element(1024) < 10

Triton compiles ahead of time without a driver, and its wheel brings ptxas, cuobjdump and nvdisasm.  The forms are
sm_90a, sm_100a, sm_120a (sm_80 plain), so instructions of exactly that chip are allowed.  What no compiler checks and
`Compiled.over_limits` does: shared memory and tensor memory may exceed the chip's, and spills pass silently (they show
as stack).

Pointers are taken to be 16-byte aligned, as torch allocates them; integers that a caller promises to be multiples of
16 go into `align`, else rows of unknown length are loaded element by element.  `enable_fp_fusion` is off: a*b + c
contracted into one rounding would no longer equal the definition.

Results are kept in Triton's own cache, under the source, the options and the compiler's version.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from .chips import ARCHES, Chip, chip_of
from .sass import Instruction, access_bytes, loop_heads, parse

__all__ = ["ARCHES", "Compiled", "compile_for", "signature_of"]
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Compiled:
    """One kernel, one chip.  Numbers of instructions are those of one thread."""

    name: str
    arch: str
    ptx: str
    cubin: bytes
    metadata: Any  # Triton's: shared, tmem_size, num_warps, ...
    arguments: tuple[str, ...]  # names of the arguments left at run time, in order
    types: tuple[str, ...]  # their Triton types
    divisors: Mapping[str, int] = field(default_factory=dict)  # what the compiler was promised of them

    @property
    def chip(self) -> Chip:
        return chip_of(self.arch)

    @property
    def threads(self) -> int:
        """Threads of one program (warp-specialised kernels have more than num_warps x 32)."""
        found = re.search(r"\.reqntid\s+(\d+)", self.ptx)
        return int(found[1]) if found else 32 * self.metadata.num_warps

    @cached_property
    def _disassembly(self) -> tuple[str, str]:
        return _disassemble(self.cubin)

    @cached_property
    def _usage(self) -> dict[str, int]:
        return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", self._disassembly[0])}

    @property
    def sass(self) -> str:
        return self._disassembly[1]

    @property
    def registers(self) -> int:
        return self._usage["REG"]

    @property
    def stack_bytes(self) -> int:
        """Bytes of local memory of a thread: spilled registers."""
        return self._usage["STACK"]

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program (cuobjdump's figure adds the 1 KiB that the system keeps)."""
        return int(self.metadata.shared)

    @property
    def tensor_memory_columns(self) -> int:
        return int(getattr(self.metadata, "tmem_size", 0) or 0)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return parse(self.sass)

    @property
    def loops(self) -> list[int]:
        """Addresses of the heads of loops on the main path, the order in which `trips` are given."""
        return loop_heads(self.instructions)

    def count(self, pattern: str, main_path: bool = False) -> int:
        """Instructions of the machine code whose text ("@P0 LDG.E.128 R4, ...", from its start) matches `pattern`."""
        wanted = re.compile(pattern)
        return sum(bool(wanted.search(str(i))) for i in self.instructions if i.on_main_path or not main_path)

    def count_ptx(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def executed(self, trips: int | Sequence[int] | None = None) -> int:
        """Instructions that a thread issues on the main path (`sass`), loops weighed by `trips`: one number for all
        loops, or one for each of `loops`."""
        return sum(self._weights(trips).values())

    def _weights(self, trips: int | Sequence[int] | None) -> dict[Instruction, int]:
        heads = self.loops
        if heads and trips is None:
            raise ValueError(
                f"{self.name} on {self.arch} has {len(heads)} loops in its code: give `trips`, how often each runs."
            )
        each = dict(zip(heads, [trips] * len(heads) if isinstance(trips, int) else (trips or ()), strict=True))
        weights = {}
        for one in self.instructions:
            if one.on_main_path:
                weights[one] = 1
                for head in one.loops:
                    weights[one] *= each[head]
        return weights

    def instructions_per_element(self, elements: float, trips: int | Sequence[int] | None = None) -> float:
        """Issue slots per element of a program that does `elements` of them: executed instructions x threads /
        elements.  Loops may instead be measured one trip at a time: see `loop_instructions`."""
        return self.executed(trips) * self.threads / elements

    def loop_instructions(self, head: int) -> int:
        """Main-path instructions of one trip of the loop at `head`, inner loops once."""
        return sum(one.on_main_path and head in one.loops for one in self.instructions)

    def global_accesses(self, main_path: bool = True) -> dict[str, Counter[int]]:
        """{"load": {16: 4}, "store": {8: 2}, "atomic": {}}: how many instructions of which width in bytes."""
        out: dict[str, Counter[int]] = {"load": Counter(), "store": Counter(), "atomic": Counter()}
        kinds = {"LDG": "load", "LDGSTS": "load", "STG": "store", "ATOMG": "atomic", "REDG": "atomic", "RED": "atomic"}
        for one in self.instructions:
            kind = kinds.get(one.opcode.split(".")[0])
            if kind and (one.on_main_path or not main_path):
                out[kind][access_bytes(one.opcode)] += 1
        return out

    @property
    def ctas_per_sm(self) -> int:
        return self.chip.ctas_per_sm(self.registers, self.shared_bytes, self.threads)

    @property
    def warps_per_sm(self) -> int:
        """Occupancy: resident warps of an SM, of `chip.warps`."""
        return self.ctas_per_sm * -(-self.threads // 32)

    def over_limits(self) -> list[str]:
        """Sentences about what the chip would refuse, or do badly without a word; empty when all is well."""
        chip, out = self.chip, []
        if self.stack_bytes:
            out.append(f"{self.name} on {self.arch} spills: {self.stack_bytes} bytes of stack per thread.")
        if self.shared_bytes > chip.shared_per_cta_bytes:
            out.append(
                f"{self.name} needs {self.shared_bytes} bytes of shared memory; a program on {self.arch} has "
                f"{chip.shared_per_cta_bytes}."
            )
        if self.tensor_memory_columns > chip.tensor_memory_columns:
            out.append(f"{self.name} needs {self.tensor_memory_columns} columns of tensor memory on {self.arch}.")
        if not self.ctas_per_sm:
            out.append(f"No program of {self.name} fits on an SM of {self.arch}: {self.registers} registers.")
        return out


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    align: Iterable[str] | Mapping[str, int] = (),
    **options: Any,
) -> Compiled:
    """Compiles `kernel` for "sm_90", "sm_100", "sm_120" (or "sm_80").

    `signature`: Triton types of the arguments left at run time ("*bf16", "i32", "fp32", "tensordesc<u8[128, 64]>");
    `constants`: values of the others; `align`: names of integers that are multiples of 16, or {name: divisor}, which
    can also say that a pointer is aligned to less than 16 bytes; `options`: num_warps, num_stages, maxnreg, ...
    """
    chip = chip_of(arch)
    names = list(kernel.arg_names)
    run_time = {n: t for n, t in signature.items() if t != "constexpr"}
    unknown = [n for n in (*run_time, *constants) if n not in names]
    missing = [n for n in names if n not in run_time and n not in constants and n not in _defaults(kernel)]
    if unknown or missing:
        raise ValueError(
            f"{kernel.__name__}({', '.join(names)}) was given {'unknown ' + ', '.join(unknown) if unknown else ''}"
            f"{' and ' if unknown and missing else ''}{'nothing for ' + ', '.join(missing) if missing else ''}."
        )
    constants = {**{n: v for n, v in _defaults(kernel).items() if n not in run_time}, **constants}
    divisors = {n: 16 for n, t in run_time.items() if t.startswith("*")}
    divisors |= align if isinstance(align, Mapping) else dict.fromkeys(align, 16)
    full = {n: run_time.get(n, "constexpr") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", d]] for n, d in divisors.items() if d > 1}
    done = triton.compile(
        ASTSource(kernel, full, {(names.index(n),): v for n, v in constants.items()}, attributes),
        target=GPUTarget("cuda", chip.capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False, **options},
    )
    left = [n for n in names if n in run_time]
    return Compiled(
        kernel.__name__,
        arch,
        done.asm["ptx"],
        done.asm["cubin"],
        done.metadata,
        tuple(left),
        tuple(run_time[n] for n in left),
        divisors,
    )


def signature_of(args: Mapping[str, Any]) -> dict[str, str]:
    """Triton types of CPU tensors and numbers, as a launch would infer them: for `compile_for` before `run_ptx`."""
    out = {}
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            out[name] = "*" + canonicalize_dtype(value.dtype)
        elif isinstance(value, bool):
            out[name] = "i1"
        elif isinstance(value, int):
            out[name] = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        else:
            out[name] = "fp32"
    return out


def _defaults(kernel: Any) -> dict[str, Any]:
    return {p.name: p.default for p in kernel.params if p.has_default}


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as text, kept in Triton's cache beside the cubin's own hash."""
    cache = get_cache_manager(hashlib.sha256(b"lowprec-sass-1" + cubin).hexdigest())
    out = []
    for name, command in (("usage", ["cuobjdump", "-res-usage"]), ("sass", ["nvdisasm", "-c"])):
        path = cache.get_file(name)
        if path is None:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                environment = {**os.environ, "PATH": _TOOLS + os.pathsep + os.environ.get("PATH", "")}
                ran = subprocess.run(
                    [os.path.join(_TOOLS, command[0]), *command[1:], file.name],
                    capture_output=True,
                    text=True,
                    env=environment,
                )
            if ran.returncode:
                raise ValueError(f"{command[0]} of the Triton wheel could not read a cubin: {ran.stderr.strip()}")
            path = cache.put(ran.stdout + ran.stderr, name, binary=False)
        with open(path) as file_:
            out.append(file_.read())
    return out[0], out[1]
