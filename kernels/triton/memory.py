"""What every launch needs to know: how a matrix lies in memory, which chip it is for; a kernel with its arguments."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 1 << 24  # offsets within a tile of 128 lines are reckoned in 32 bits


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with; `args` are left at run time, `constants` are compiled in."""

    kernel: Any
    grid: tuple[int, int]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int

    def __call__(self) -> None:
        if self.grid[1] > 65535:
            raise ValueError(
                f"The matrix takes {self.grid[1]} programs of rows, and CUDA starts 65535: split it by rows."
            )
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton asks for the current one
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, enable_fp_fusion=False)


def arch_of(x: Tensor) -> str:
    """ "sm_100" of a tensor on a GPU; on the CPU, where kernels are interpreted, the oldest: all in software."""
    if x.device.type != "cuda":
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def capability(x: Tensor, arch: str | None) -> int:
    """100 of sm_100: what a kernel's CHIP is; 0, in plain language only, where it is interpreted."""
    if arch is None and x.device.type != "cuda":
        return 0
    return int((arch or arch_of(x)).removeprefix("sm_"))


def memory_of(x: Tensor) -> tuple[Tensor, bool, int]:
    """x with a unit stride, whether that is the last axis's, and the other stride."""
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"Expected a matrix of fp32, bf16 or fp16, got {x.dtype} of shape {tuple(x.shape)}.")
    along = x.stride(0) >= x.stride(1)  # as `Stream.noise_like` sees it, which indexes noise by memory
    lines = x if along else x.T
    if lines.stride(1) != 1:
        lines = lines.contiguous()
    x, pitch = (lines if along else lines.T), lines.stride(0)
    if pitch >= LONGEST:
        raise ValueError(f"Lines of a matrix lie {pitch} elements apart; kernels take fewer than {LONGEST}: split it.")
    return x, along, pitch


def in_pieces(x: Tensor, pitch: int) -> bool:
    """Whether lines begin where no 16 bytes can be read at once, so that every element is loaded by itself."""
    return bool(pitch % 16 or x.data_ptr() % 16)


def signed(word: int) -> int:
    """A word of 32 bits as the int that an i32 argument holds."""
    return word - (1 << 32) if word >= 1 << 31 else word
