"""gpu_check: on a machine with a GPU, are the kernels right there, and how fast are they?

    python tools/gpu_check.py                          # make gpu-check
    python tools/gpu_check.py --only nvfp4 --no-speed
    python tools/gpu_check.py --interpret              # the checks on a CPU, in Triton's interpreter, small

First correctness (:mod:`lowprec.tools.gpu_checks`): quantise kernels against the definition, every kernel against the
executor of compiled PTX, every GPU backend against the oracle.  Then speed: each quantise kernel's share of what the
memory allows (:mod:`lowprec.tools.gpu_speed`), and linear layers, forward and backward, against bf16, TransformerEngine
and torchao (`bench_linear --device cuda`).

Exit code 0 if all agree, 1 if something differs (speed is then not measured: nobody needs a wrong kernel's), 2 without
a GPU.  lowprec's authors have no GPU: a report of what this prints is welcome, whatever it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch

from lowprec.tools import bench_linear
from lowprec.tools.kernel_measure import innermost, missing_triton

GROUPS = ("definition", "kernels", "backends", "chip")
LINEAR_RECIPES = ["nvfp4", "mxfp8", "fp8_tensorwise", "fp8_blockwise"]
LINEAR_SHAPE = (16384, 4096, 14336)


def correctness(device: torch.device, groups: Iterable[str], only: str, small: bool) -> int:
    """Run the checks and print what they find; the number of mismatches."""
    from lowprec.tools.gpu_checks import LeftOut, checks

    right, wrong, left = 0, 0, 0
    for check in checks(device, tuple(groups), only, small):
        try:
            found = check.run()
        except LeftOut as reason:
            left += 1
            print(f"left out  {check.group}: {check.name}: {reason}")
            continue
        except Exception as error:  # a kernel that does not compile or launch there is a finding, the rest goes on
            found = innermost(error)
        if found:
            wrong += 1
            print(f"WRONG     {check.group}: {check.name}: {found}")
        else:
            right += 1
            print(f"equal     {check.group}: {check.name}")
    print(f"{right} checks agree, {wrong} differ, {left} left out")
    if not right + wrong:
        raise ValueError(f"nothing was checked: no check of {', '.join(groups)} contains {only!r}.")
    return wrong


def speed(device: torch.device, reps: int) -> bool:
    """Print both tables; False if a linear layer is not as precise as its definition."""
    from lowprec.tools import gpu_speed

    rows, k = gpu_speed.SHAPE
    rate = f"{gpu_speed.bandwidth(device) / 1e9:,.0f} GB/s by its driver"
    print(f"\n{torch.cuda.get_device_name(device)}, {rate}; {rows} x {k} bf16\n")
    print(gpu_speed.table(gpu_speed.measure(device, reps)))
    t, inputs, outputs = LINEAR_SHAPE
    print(f"\nlinear {inputs} -> {outputs}, {t} tokens, forward + backward; time over bf16 nn.Linear\n")
    layers, refused = bench_linear.measure_backends(
        LINEAR_RECIPES, LINEAR_SHAPE, reps, bench_linear.GPU_BACKENDS, "cuda"
    )
    print(bench_linear.table(layers))
    for line in refused:
        print(f"not measured: {line}")
    return all(row.right for row in layers)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser("gpu_check", description="Correctness, then speed, of the kernels on this GPU.")
    p.add_argument("--interpret", action="store_true", help="the checks on the CPU, in the interpreter; no speed")
    p.add_argument("--only", default="", help="checks whose name contains this")
    p.add_argument("--group", choices=GROUPS, action="append", help="definition, kernels, backends, chip; repeatable")
    p.add_argument("--no-speed", action="store_true", help="only correctness")
    p.add_argument("--reps", type=int, default=20, help="measurements of each speed (default: %(default)s)")
    a = p.parse_args(argv)
    reason = missing_triton() or (None if a.interpret else bench_linear.missing_gpu())
    if reason:
        hint = "" if a.interpret or missing_triton() else "; --interpret runs the checks on the CPU"
        print(f"gpu_check: {reason}{hint}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if a.interpret else "cuda")
    try:
        with _context(a.interpret):
            wrong = correctness(device, a.group or GROUPS, a.only, small=a.interpret)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if wrong or a.interpret or a.no_speed:
        return 1 if wrong else 0
    return 0 if speed(device, a.reps) else 1


def _context(interpret: bool) -> contextlib.AbstractContextManager[None]:
    if not interpret:
        return contextlib.nullcontext()
    from lowprec.kernels.testing.interpreter import interpreted

    return interpreted()


if __name__ == "__main__":
    sys.exit(main())
