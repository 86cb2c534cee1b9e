"""docs/kernels.md: the rows of the kernel report as a page.  Only the words are written by hand, here."""

from __future__ import annotations

from collections.abc import Sequence

from lowprec.kernels.testing.chips import chip_of
from lowprec.tools.kernel_measure import ROOFLINE_ELEMENTS, Row

INTRO = """# GPU kernels, by static account

**None of this was measured on a GPU.** We have none; no speed is claimed. Every number below is counted from code that
Triton compiled for a chip that was not there. This page is generated: `python tools/kernel_report.py --update`.

What stands behind a kernel, without a GPU:

1. **Definition.** `lowprec/numerics` in plain torch says what a format and a rounding mean. Kernels must give its codes
   and scales, bit for bit.
2. **Interpreter.** The Python of a kernel runs on numpy (Triton's interpreter, with its casts, fp8 and `dot_scaled`
   mended), over ragged shapes, zeros, subnormals, huge values, NaN and infinity.
3. **Compiled PTX, executed.** The text that Triton compiled for sm_90a, sm_100a and sm_120a runs on the CPU, all
   threads in lock step. It shows what the interpreter cannot see: layouts, operand order in inline assembly, accesses
   out of bounds or misaligned, what moves through memory. Tensor cores and TMA it cannot execute: such kernels are
   compiled, their machine code is read, and their numerics are checked in the interpreter only.
4. **Machine code, read.** No spills, registers, shared memory, widths of loads, and the instructions that were meant:
   rounding to FP4 by `cvt`, stochastic rounding by `cvt.rs`, block-scaled tensor-core products.

What only a GPU can show, and `make gpu-check` asks it: that `cvt.rs` takes the bytes of its random word in the
documented order, that a chip accepts the shared memory that was asked for, that library products agree, and any speed.

## How to read the tables

- **bytes, least**: bytes an element that a launch moves (32-byte sectors touched, each once), and the least that it
  must: every input once, every output once. A dash: tensor cores, not executed.
- **passes**: how often the input is read from memory, by this launch and those that it needs before it (a maximum).
- **instr**: instructions an element that are issued on the main path of the machine code. Both arms of a branch count;
  the subroutine of a division's rare operands does not.
- **regs, stack, shared**: registers a thread, bytes of spills a thread, bytes of shared memory a program.
- **warps**: warps that an SM holds at once, of those it could.
- **memory, issue**: microseconds for {elements:,} elements (8192 x 8192): bytes over the published bandwidth, and
  instructions over what all SMs can issue at the published clock. The larger one bounds the kernel from below; a kernel
  with issue under memory *can* be bound by memory. Latency, bank conflicts and launch overhead are not in it, nor is
  the time of tensor cores: products have none of the two. Of a product an element is a multiply-add of one stage.
- **meant**: whether the instructions that the kernel was written for are there; a dash where none is looked for.
"""

NOTES = """## What the numbers say

- Rounding to nearest, an 8192 x 8192 matrix to NVFP4 is bound by memory on a B200 by this account: rows, rows with
  columns, and columns rotated by 16 in the same pass (3.125 bytes an element leave time for 13.7 instructions).
- Stochastic rounding with the bits of a `Stream` (Philox, 16 bits an element, the definition's drawing) takes longer to
  issue than to move on a B200. `cvt.rs`, only on sm_100 and sm_103, takes 8 bits an element and about half
  the instructions; it is unbiased too, but is not the definition's drawing: it is asked for by name.
- Below sm_100 E2M1 is rounded in integer arithmetic instead of by `cvt`; compare sm_90 with sm_100.
- A rotation adds no pass over memory. A scale that spans the tensor or a row adds one, a maximum first; so do the two
  levels of NVFP4.
- Many kernels leave an SM only 8 or 12 warps, since a thread keeps 64 elements and more in registers. Whether so few
  warps keep the memory busy is a question for a GPU.

## Kernels of others

`python tools/kernel_report.py --public` prints the same columns for Triton kernels of other projects. It fetches their
files from GitHub, at a pinned commit, into your cache; nothing of them is in this repository. Their numbers depend on
what they compute: compare bytes and instructions only where the outputs are the same.
"""

HEAD = (
    "variant", "chip", "bytes", "least", "passes", "instr", "regs", "stack", "shared", "warps", "memory", "issue",
    "bound by", "meant",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    meant = "–" if not row.instructions_wanted else "yes" if row.instructions_wanted_found else "NO"
    roofline = row.bound != "tensor cores"
    return (
        row.variant, row.arch, number(row.bytes_per_element, 3), number(row.min_bytes_per_element, 3),
        number(row.passes, 1), number(row.instr_per_element, 1 if row.instr_per_element >= 1 else 3),
        str(row.registers), str(row.stack_bytes), str(row.shared_bytes),
        f"{row.occupancy_warps}/{chip_of(row.arch).warps}", number(row.memory_us if roofline else None, 1),
        number(row.issue_us if roofline else None, 1), row.bound, meant,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Aligned text for a terminal."""
    lines = [("kernel", *HEAD)] + [(row.kernel, *_cells(row)) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    out = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|",
    ]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])


def _chips(rows: Sequence[Row]) -> str:
    lines = []
    for arch in sorted({row.arch for row in rows}, key=lambda a: int(a[3:])):
        c = chip_of(arch)
        lines.append((arch, c.name, str(c.sms), f"{c.clock_ghz:g}", f"{c.bandwidth_gb_s:,.0f}", c.source))
    return _markdown(("chip", "part", "SMs", "GHz", "GB/s", "published"), lines, 2)


def page(rows: Sequence[Row]) -> str:
    """The whole of docs/kernels.md."""
    parts = [INTRO.format(elements=ROOFLINE_ELEMENTS)]
    parts.append("## Chips\n\n" + _chips(rows) + "\n")
    parts.append(f"## Kernels\n\nCompiled by Triton {', '.join(sorted({row.triton for row in rows}))}.\n")
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [_cells(row) for row in rows if row.kernel == kernel]
        parts.append(f"### {kernel}\n\n" + _markdown(HEAD, own, 2) + "\n")
    return "\n".join([*parts, NOTES])
