"""One row of the kernel report: a variant of a kernel, compiled for a chip that is not there, executed and counted.

Bytes are those of the compiled PTX as it runs on the CPU: every 32-byte sector that a launch touches, once, which is
what DRAM has to move at least.  Instructions are those of the machine code on its main path times the threads that
issue them, over the elements; registers, stack and shared memory are ptxas's.  From these follow occupancy and a static
roofline on the published speeds of the chip (:mod:`lowprec.kernels.testing.chips`).  Nothing here is a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from math import prod
from typing import Any

SOURCES = ("lowprec.kernels.triton.variants", "lowprec.tools.kernel_variants")
"""Modules whose ``variants()`` the report lists: a new file of kernels is one line there, or one word here."""
ROOFLINE_ELEMENTS = 1 << 26  # an 8192 x 8192 matrix


@dataclass(frozen=True)
class Row:
    """What is known of one variant on one chip; None where the compiled code cannot be executed here."""

    kernel: str
    variant: str
    arch: str
    bytes_per_element: float | None  # of the launch, unique 32-byte sectors
    min_bytes_per_element: float
    instr_per_element: float
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions_wanted_found: bool
    passes: float | None  # readings of the input by this launch and those before it
    occupancy_warps: int  # resident warps of an SM
    memory_us: float  # of ROOFLINE_ELEMENTS elements at the published bandwidth
    issue_us: float  # to issue the instructions of as many at the published clock
    bound: str  # the longer of the two, "memory" or "issue"; or "tensor cores", whose time is in neither
    instructions_wanted: dict[str, int]  # what the compiled text was searched for -> how often it is there
    triton: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.variant, self.arch

    def json(self) -> dict[str, Any]:
        return asdict(self)


def missing_triton() -> str | None:
    """Why nothing can be compiled here, in a sentence, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux: pip install 'lowprec[kernels]' (a GPU or a driver is not needed)."
    return None


def variants() -> list[Any]:
    """All variants of all kernels, in the order of SOURCES."""
    out = [v for name in SOURCES for v in import_module(name).variants()]
    names = [(v.kernel, v.name, chip) for v in out for chip in v.chips]
    assert len(set(names)) == len(names), "two variants of one name"
    return out


def chosen(kernels: Iterable[str] = (), arches: Iterable[str] = ()) -> list[tuple[Any, str]]:
    """(variant, chip) of the report; `kernels` are names of kernels, parts of variants, or begin "kernel: variant".

    Raises:
        ValueError: if a name matches nothing.
    """
    all_, kernels, arches = variants(), list(kernels), list(arches)
    for word in kernels:
        if not any(_matches(v, word) for v in all_):
            known = ", ".join(sorted({v.kernel for v in all_}))
            raise ValueError(f"no kernel or variant is called {word!r}; the kernels are {known}.")
    known_chips = sorted({chip for v in all_ for chip in v.chips})
    for arch in arches:
        if arch not in known_chips:
            raise ValueError(f"no kernel is compiled for {arch!r}; write one of {', '.join(known_chips)}.")
    wanted = [v for v in all_ if not kernels or any(_matches(v, word) for word in kernels)]
    return [(v, chip) for v in wanted for chip in v.chips if not arches or chip in arches]


def _matches(variant: Any, word: str) -> bool:
    return word == variant.kernel or word in variant.name or f"{variant.kernel}: {variant.name}".startswith(word)


def compile_launch(launch: Any, arch: str) -> Any:
    """A launch, compiled as the GPU's runtime would: integers that are multiples of 16 are promised to be."""
    from lowprec.kernels.testing.compile import compile_for, signature_of

    free = {p.name for p in launch.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    whole = [n for n, v in launch.args.items() if type(v) is int and v % 16 == 0 and n not in free]
    options = {"num_warps": launch.warps, **getattr(launch, "options", {})}
    return compile_for(launch.kernel, signature_of(launch.args), launch.constants, arch, align=whole, **options)


def innermost(error: BaseException) -> str:
    """An error's first cause in a line; of a compiler's message, which quotes the source first, the last line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if 'Compil' in type(error).__name__ else 0]}"


def measure(variant: Any, arch: str) -> Row:
    """Compile and execute all launches of a variant; the row is of the last.

    Raises:
        ValueError: if one does not compile.
    """
    import triton
    from triton.compiler.errors import CompilationError

    from lowprec.kernels.testing.ptx import run_ptx

    launches: list[Any] = []
    compiled: list[Any] = []
    runs: list[Any] = []

    def start(launch: Any) -> None:
        launches.append(launch)
        try:
            compiled.append(compile_launch(launch, arch))
        except CompilationError as error:
            raise ValueError(
                f"{variant.kernel}, {variant.name}, does not compile for {arch}: {innermost(error)}"
            ) from error
        if variant.executes:
            runs.append(run_ptx(compiled[-1], launch.grid, launch.args))

    variant.run(arch, start)
    assert launches, f"{variant.kernel}, {variant.name}, started nothing"
    last, c, n = launches[-1], compiled[-1], variant.elements
    moved = runs[-1].moved_bytes() / n if runs else None
    passes = None
    if runs and variant.input in last.args:
        x = last.args[variant.input]
        read = [r.traffic.get((variant.input, "load")) for r in runs]
        passes = sum(t.unique_bytes for t in read if t) / (x.numel() * x.element_size())
    per_program = n / prod(last.grid)
    if variant.trips == "longest":
        instructions = max(map(c.loop_instructions, c.loops)) * c.threads / per_program
    else:
        instructions = c.instructions_per_element(per_program, variant.trips)
    found = {text: c.count_ptx(text) for text in variant.wanted.get(arch, ())}
    memory = c.chip.memory_seconds((variant.min_bytes if moved is None else moved) * ROOFLINE_ELEMENTS)
    issue = c.chip.issue_seconds(instructions * ROOFLINE_ELEMENTS)
    return Row(
        variant.kernel, variant.name, arch, None if moved is None else round(moved, 4), round(variant.min_bytes, 4),
        round(instructions, 4), c.registers, c.stack_bytes, c.shared_bytes, all(found.values()),
        None if passes is None else round(passes, 2), c.warps_per_sm, round(memory * 1e6, 1), round(issue * 1e6, 1),
        "tensor cores" if variant.tensor_cores else "issue" if issue > memory else "memory", found, triton.__version__,
    )  # fmt: skip
