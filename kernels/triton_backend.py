"""TritonBackend: quantised matrix products on NVIDIA GPUs, by Triton kernels alone.

:mod:`lowprec.kernels.triton.launch` quantises, :mod:`lowprec.kernels.triton.gemm` multiplies.  Codes and scales are bit
for bit those of :mod:`lowprec.numerics`; products agree with the definition to the bound that `gemm` gives.  Rotations,
formats and parts of matrices that are shared by ranks are quantised by the definition where no kernel knows them, and
multiplied all the same.

It serves pairs of operands of one kind: NVFP4, MXFP4, MXFP8, FP8 with one scale for the tensor or a row, FP8 in blocks
of 128.  On a GPU of compute capability 8.9 or more; block-scaled tensor cores begin with 10.0, before it NVFP4 and MX
are widened in registers, which saves memory traffic and no arithmetic.  Speed was not measured by us.

Tensors on the CPU are served only inside of `lowprec.kernels.testing.interpreter.interpreted`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels import coded
from lowprec.kernels.coded import Coded
from lowprec.numerics import QTensor, Stream, Window

LEAST = (8, 9)


def interpreting() -> bool:
    """Whether Triton kernels are interpreted just now, so that they run on CPU tensors. Imports nothing."""
    jit = sys.modules.get("triton.runtime.jit")
    return jit is not None and jit.JITFunction.run.__module__ != "triton.runtime.jit"


def refuse_device(device: torch.device, least: tuple[int, int]) -> str | None:
    """Why tensors there cannot be multiplied by tensor cores of compute capability ``least``, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {device.type}"
    if torch.version.hip:
        return "it was written for NVIDIA GPUs and not tried on ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        return f"it needs compute capability {least[0]}.{least[1]}, the GPU has {capability[0]}.{capability[1]}"
    return None


class TritonBackend:
    """Quantised and multiplied by Triton kernels."""

    name = "triton"

    def refuses(
        self, gemm: Any, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None; arguments as for every backend."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type != "cpu" or not interpreting():
            reason = refuse_device(device, LEAST)
            if reason:
                return reason
        reason = coded.refuse_operands(gemm, role, dtype, (m, n, k))
        if reason is None and device.type == "cuda" and coded.kind(gemm.a.format) == "nvfp4":
            old = torch.cuda.get_device_capability(device) < (10, 0) and _version() < (3, 8)
            return "this Triton cannot widen NVFP4 below compute capability 10.0; install 3.8 or later" if old else None
        return reason

    def prepare(
        self,
        x: Tensor,
        gemm: Any,
        side: str,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> Coded:
        """Rotate and quantise x (rows, k), maybe a transposed view; as every backend does."""
        return coded.prepared(x, gemm, side, stream, role, amax, window, swizzled=_swizzled(gemm), kernels=True)

    def load(self, q: QTensor, gemm: Any, side: str) -> Coded:
        """What :meth:`prepare` makes of a matrix, from its codes (rows, k); maybe a transposed view."""
        return Coded.of(q, _swizzled(gemm))

    def multiply(self, a: Coded, b: Coded, gemm: Any, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n) of ``out_dtype``, bf16 or fp32."""
        from lowprec.kernels.triton.gemm import multiply

        return multiply(a, b, out_dtype)

    def stored(self, prepared: Coded, gemm: Any, side: str) -> Coded:
        """The operand as it is: packed already."""
        return prepared

    def unpacked(self, prepared: Coded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """values * block scales (rows, k) in ``dtype``, and the tensor scale () or (rows, 1)."""
        return prepared.unpacked(dtype)


def _version() -> tuple[int, ...]:
    """Triton's, without importing it."""
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def _swizzled(gemm: Any) -> bool:
    """Scales of one byte lie as the tensor cores of Blackwell read them."""
    return coded.form(gemm.a.format, gemm.b.format) == "scaled"
