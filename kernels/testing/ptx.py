"""An executor of compiled PTX: runs what Triton (or nvcc) compiled for a GPU on the CPU, all programs in lock step.

    run = run_ptx(compile_for(kernel, ...), (64,), {"x_ptr": x, "y_ptr": y, "n": 4096})   # results are written to y
    run.traffic["x_ptr", "load"].sectors ; run.counts["cvt.rn.satfinite.e2m1x2.f32"]

Every thread of the grid is one lane of numpy arrays (`ptx_lanes`); one statement is executed for all of them.  It is
the compiled text that runs, so it sees what Triton's interpreter cannot: layouts and packing chosen by the compiler,
operand order in inline asm, accesses that leave a tensor or are misaligned, how many bytes and 32-byte sectors move.

**Branches.**  Threads may disagree: they are split into groups by their next statement, the group that is furthest
behind runs first, and groups merge where they meet.  What no GPU would survive is an error: a barrier that only some
threads of a program reach, a shuffle with part of a warp.

**Known**: loads, stores and atomics on global and shared memory, integer, logic, float and packed arithmetic,
conversions among all narrow formats, shuffles, votes, reductions of a warp, ldmatrix/stmatrix, cp.async (done at
once).  **Not known**, and an error that says so: tensor cores (mma, wgmma, tcgen05), TMA, mbarriers, calls.

**Trust.**  Meanings are read from the PTX ISA manual and nothing was compared with a GPU.  Two things the manual's
text leaves to figures, and `ptx_convert` decides as NVIDIA's TransformerEngine does: in `cvt.rs...x4 d, {a, b, e, f},
rbits` the last operand f becomes the lowest bits of d, and it takes the lowest byte of rbits.  Operations whose last
bits a GPU may choose (`ex2.approx`, `div.full`, `rcp.approx`...) are computed correctly rounded and listed in
`run.approximate`: a kernel that must equal its definition should leave that list empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import ptx_ops
from .ptx_lanes import Array, Lanes
from .ptx_memory import Global, Shared, Traffic
from .ptx_parse import Fault, Program, Statement, parse

__all__ = ["Fault", "Run", "Traffic", "run_ptx"]


@dataclass(frozen=True)
class Run:
    """What an execution did, besides writing to its tensors."""

    traffic: dict[tuple[str, str], Traffic]  # (argument, "load" | "store" | "atomic")
    counts: Counter[str]  # opcode -> statements executed (once for all threads that did it together)
    approximate: set[str]

    def moved_bytes(self, unique: bool = True) -> int:
        """Bytes over all arguments and directions: every 32-byte sector once, or every request's sectors."""
        return sum(t.unique_bytes if unique else 32 * t.sectors for t in self.traffic.values())


def run_ptx(compiled: Any, grid: tuple[int, ...], args: Mapping[str, Any], *, steps: int = 200_000) -> Run:
    """Executes `compiled` (from `compile_for`) on CPU tensors and scalars, by name; tensors are changed in place."""
    names = list(compiled.arguments)
    wrong = [n for n in names if n not in args] + [n for n in args if n not in names]
    if wrong:
        raise ValueError(
            f"{compiled.name} takes {', '.join(names)} at run time; {', '.join(wrong)} is missing or unknown."
        )
    for name, divisor in getattr(compiled, "divisors", {}).items():
        if isinstance(args[name], int) and args[name] % divisor:
            raise ValueError(
                f"{compiled.name} was compiled for {name} a multiple of {divisor}, and it is {args[name]}."
            )
    program = parse(compiled.ptx)
    machine = Machine(program, grid, compiled.shared_bytes)
    machine.bind({n: args[n] for n in names})
    with np.errstate(all="ignore"):
        machine.run(steps)
    return Run(machine.memory.traffic, machine.counts, machine.approximate)


class Machine(Lanes):
    def __init__(self, program: Program, grid: tuple[int, ...], shared_bytes: int):
        grid = (*grid, 1, 1)[:3]
        self.programs = grid[0] * grid[1] * grid[2]
        super().__init__(program, self.programs * program.threads)
        lane = np.arange(self.count, dtype=np.int64)
        self.cta, tid = lane // program.threads, lane % program.threads
        zero = np.zeros(1, np.int64)
        x, y, z = self.cta % grid[0], self.cta // grid[0] % grid[1], self.cta // (grid[0] * grid[1])
        self.special = {
            "%tid.x": tid, "%tid.y": zero, "%tid.z": zero,
            "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z,
            "%ntid.x": zero + program.threads, "%ntid.y": zero + 1, "%ntid.z": zero + 1,
            "%nctaid.x": zero + grid[0], "%nctaid.y": zero + grid[1], "%nctaid.z": zero + grid[2],
            "%laneid": tid % 32, "%warpid": tid // 32, "global_smem": zero,
        }  # fmt: skip
        self.memory, self.shared = Global(), Shared(self.programs, shared_bytes)
        self.parameters: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.alive = np.ones(self.count, np.bool_)

    def bind(self, args: Mapping[str, Any]) -> None:
        """Values of the parameters in order; those that Triton adds (scratch memory) are null."""
        values = [*args.items()]
        for i, (kind, name) in enumerate(self.program.parameters):
            argument, value = values[i] if i < len(values) else ("", 0)
            if isinstance(value, torch.Tensor):
                value = self.memory.add(argument, value)
            elif kind in ("f32", "f64"):
                value = int(np.array(value, f"f{int(kind[1:]) // 8}").view(f"u{int(kind[1:]) // 8}"))
            elif not isinstance(value, (int, bool, type(None))):
                raise ValueError(f"The argument {argument} must be a tensor or a whole number, not {value!r}.")
            self.parameters[name] = int(value or 0)

    def run(self, steps: int) -> None:
        code = self.program.code
        waiting: dict[int, Array] = {0: np.ones(self.count, np.bool_)}  # next statement -> threads
        while waiting:
            at = min(waiting)
            group = waiting.pop(at)
            whole = bool(group.all())
            while at < len(code):
                if waiting and at >= min(waiting):
                    waiting[at] = waiting.get(at, False) | group
                    break
                steps -= 1
                if steps < 0:
                    raise Fault(f"{self.program.name} did not end within the given number of steps.")
                one = code[at]
                mask = None if whole else group
                if one.predicate:
                    chosen = self.all(self.read(one.predicate, np.bool_)) ^ one.negated
                    mask = chosen if mask is None else chosen & mask
                base = one.parts[0]
                if base == "bra":
                    going = group if mask is None else mask
                    to = self.program.labels[one.operands[0]]
                    if going.any():
                        waiting[to] = waiting.get(to, False) | going
                        group = group & ~going
                        whole = False
                    at += 1
                    if not group.any():
                        break
                elif base in ("ret", "exit"):
                    leaving = group if mask is None else mask
                    self.alive &= ~leaving
                    group, whole = group & ~leaving, False
                    at += 1
                    if not group.any():
                        break
                else:
                    self.execute(one, mask)
                    at += 1

    def execute(self, one: Statement, mask: Array | None) -> None:
        self.counts[one.opcode] += 1
        if mask is not None and not mask.any():
            return
        try:
            ptx_ops.execute(self, one, mask)
        except Fault as fault:
            raise Fault(f"{fault}{self._thread(fault, mask)} [{one}; {self.program.name}]") from None
        except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise Fault(f"The form of `{one}` is unknown to the executor ({type(error).__name__}: {error}).") from error

    def _thread(self, fault: Fault, mask: Array | None) -> str:
        """Which thread of which program, when the fault knows."""
        if fault.access is None:
            return ""
        thread = fault.access if mask is None else int(np.nonzero(mask)[0][fault.access])
        place = [int(np.broadcast_to(self.special[f"%ctaid.{i}"], self.count)[thread]) for i in "xyz"]
        return f" In program ({place[0]}, {place[1]}, {place[2]}), thread {thread % self.program.threads}."
