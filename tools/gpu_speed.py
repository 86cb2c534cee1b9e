"""Speed of the kernels on a GPU, against what its memory allows: the second half of `gpu_check`.

A launch is timed by CUDA events, as the median of repetitions on matrices much larger than the caches.  Its bytes are
the sizes of the tensors that it was given, each once, which is the least that it can move; bytes over bandwidth over
time is its share of the roofline.  The bandwidth is the one that the driver gives: the memory's clock and the width of
its bus.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.numerics import FORMATS, Stream
from lowprec.numerics.hadamard import fixed_signs
from lowprec.tools.gpu_checks import arch_of, driver_properties

SHAPE = (8192, 8192)
CASES = (  # format, what is made, rounding; "columns" too, rotated by 16 where it says so
    ("nvfp4", "rows", "nearest"), ("nvfp4", "rows + columns", "nearest"),
    ("nvfp4", "rows rotated", "nearest"), ("nvfp4", "rows rotated", "hardware stochastic"),
    ("nvfp4", "rows + columns rotated", "nearest"), ("nvfp4", "rows + columns rotated", "hardware stochastic"),
    ("nvfp4", "rows + columns rotated", "stochastic"), ("nvfp4_2d", "rows + columns", "nearest"),
    ("mxfp8", "rows + columns", "nearest"), ("fp8_128x128", "rows + columns", "nearest"),
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """One launch."""

    kernel: str
    case: str
    microseconds: float
    moved_bytes: int
    share: float  # of the time that its bytes need at full bandwidth


def bandwidth(device: torch.device) -> float:
    """Bytes a second: two transfers a clock of the memory, over the width of its bus."""
    known = driver_properties(device)
    return 2e3 * known["mem_clock_rate"] * known["mem_bus_width"] / 8


def least_bytes(launch: Any) -> int:
    """Of all tensors of a launch, each once."""
    found = {v.data_ptr(): v.numel() * v.element_size() for v in launch.args.values() if isinstance(v, Tensor)}
    return sum(found.values())


def seconds(run: Any, reps: int) -> float:
    """Median over repetitions, after three that are not counted."""
    times = []
    for _ in range(reps + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measure(device: torch.device, reps: int = 20) -> list[Speed]:
    """All launches of CASES; hardware rounding only where the chip has it."""
    from lowprec.kernels.triton.launch import quantize
    from lowprec.kernels.triton.rotate import Turn

    rate, out = bandwidth(device), []
    x = torch.randn(SHAPE, device=device, dtype=torch.bfloat16)
    for name, side, rounding in CASES:
        hardware, columns = rounding.startswith("hardware"), "columns" in side
        if hardware and arch_of(device) not in ("sm_100", "sm_103"):
            continue
        stream = None if rounding == "nearest" else Stream(1, 2, 3, "layer")
        turn = Turn.of(16, fixed_signs(16), fixed=True) if "rotated" in side else None
        turns = {"turn_columns" if columns else "turn": turn}
        launches: list[Any] = []

        def start(launch: Any, seen: list[Any] = launches) -> None:
            seen.append(launch)
            launch()

        quantize(
            x, FORMATS[name], columns=columns, stream=stream, hardware_noise=hardware, start=start,
            turn=turns.get("turn"), turn_columns=turns.get("turn_columns"),
        )  # fmt: skip
        for launch in launches:
            took, moved = seconds(launch, reps), least_bytes(launch)
            case = f"{name} {side}, {rounding}"
            out.append(Speed(launch.kernel.__name__, case, took * 1e6, moved, moved / rate / took))
    return out


def table(rows: list[Speed]) -> str:
    """Aligned text."""
    cells = [("kernel", "case", "us", "GB/s", "of the roofline")]
    for r in rows:
        rate = r.moved_bytes / r.microseconds / 1e3
        cells.append((r.kernel, r.case, f"{r.microseconds:.1f}", f"{rate:,.0f}", f"{r.share:.0%}"))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
