"""ScaledMM: quantised matrix products by ``torch.nn.functional.scaled_mm``, that is cuBLASLt (CUTLASS for some).

Which recipe of the library a pair of formats becomes, and in which layout it wants the scales (torch 2.10 and later):

=========================  ===============================  ============================================  ==========
formats                    ScalingType                      scales                                        capability
=========================  ===============================  ============================================  ==========
fp8, one scale             TensorWise                       fp32 ()                                       8.9
fp8, one scale a row       RowWise                          fp32 (m, 1) and (1, n)                        8.9
fp8 1x128, 128x128         BlockWise1x128, 128x128          fp32 (rows, k/128), rows contiguous; of       9.0 only
                                                            128x128 (k/128 padded to 4, rows/128)
MXFP8                      BlockWise1x32                    e8m0, swizzled 32_4_4 (`coded`)               10.0
NVFP4                      BlockWise1x16 and TensorWise     e4m3, swizzled, and fp32 ()                   10.0
=========================  ===============================  ============================================  ==========

The left matrix is (m, k) with k contiguous, the right one (k, n) likewise: the transpose of our operand b.  What the
library does not take (a tensor scale of its own for MXFP8, rows under fp32 output) multiplies an fp32 product.
It refuses two 128 x 128 operands, E5M2 times E5M2, MXFP4 (not in torch's CUDA builds), and sizes that are no multiples
of 16 (FP4: k of 32).  Sums are fp32, ``use_fast_accum`` off; on Ada and Hopper FP8 loses bits in between
(:mod:`lowprec.kernels.triton.gemm`).

Operands are quantised by the Triton kernels on a GPU; on the CPU, where the library knows FP8 with one scale for the
tensor or a row, by the definition.  Speed was not measured by us.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.kernels import coded
from lowprec.kernels.coded import FP8, Coded
from lowprec.kernels.triton_backend import refuse_device
from lowprec.numerics import QTensor, Stream, Window

CAPABILITY = {"fp8": (8, 9), "fp8_blocks": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}


class ScaledMM:
    """Quantised by kernels or the definition, multiplied by the library."""

    name = "scaled_mm"

    def refuses(
        self, gemm: Any, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None; arguments as for every backend."""
        if not hasattr(F, "scaled_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; it came with 2.10"
        reason = coded.refuse_operands(gemm, role, dtype, (m, n, k)) or _refuse_formats(gemm)
        if reason:
            return reason
        known = coded.kind(gemm.a.format)
        assert known is not None
        if device.type == "cpu":
            return None if known == "fp8" else "on the CPU the library multiplies FP8 with one scale a tensor or a row"
        reason = refuse_device(device, CAPABILITY[known])
        if reason is None and known == "fp8_blocks" and torch.cuda.get_device_capability(device)[0] != 9:
            reason = "the library multiplies FP8 in blocks of 128 on Hopper (compute capability 9.0) only"
        step = 32 if known == "nvfp4" else 16
        if reason is None and (n % 16 or (k or 0) % step):
            reason = f"n = {n} must be a multiple of 16 and k = {k} one of {step}"
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
        swizzled = coded.form(gemm.a.format, gemm.b.format) == "scaled"
        return coded.prepared(x, gemm, side, stream, role, amax, window, swizzled, kernels=x.device.type == "cuda")

    def load(self, q: QTensor, gemm: Any, side: str) -> Coded:
        """What :meth:`prepare` makes of a matrix, from its codes (rows, k); maybe a transposed view."""
        return Coded.of(q, swizzled=coded.form(gemm.a.format, gemm.b.format) == "scaled")

    def multiply(self, a: Coded, b: Coded, gemm: Any, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n) of ``out_dtype``, bf16 or fp32."""
        call, outside = arguments(a, b, out_dtype)
        out = F.scaled_mm(**call)
        return out if outside is None else (out * outside).to(out_dtype)

    def stored(self, prepared: Coded, gemm: Any, side: str) -> Coded:
        """The operand as it is: packed already."""
        return prepared

    def unpacked(self, prepared: Coded, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """values * block scales (rows, k) in ``dtype``, and the tensor scale () or (rows, 1)."""
        return prepared.unpacked(dtype)


def _refuse_formats(gemm: Any) -> str | None:
    a, b = gemm.a.format, gemm.b.format
    if coded.kind(a) == "mxfp4":
        return "torch's CUDA builds multiply no MXFP4"
    if a.element == b.element == "e5m2":
        return "the library does not multiply E5M2 by E5M2"
    if "e5m2" in (a.element, b.element) and coded.kind(a) in ("mxfp8", "fp8_blocks"):
        return "the library multiplies block-scaled FP8 in E4M3 only"
    if b.element == "e5m2" and (1, 0) in (a.block, b.block):
        return "the library takes E5M2 with one scale a row on the left only"
    if coded.kind(a) == "fp8_blocks" and torch.version.cuda and _cuda() < (12, 9):
        return "FP8 in blocks of 128 needs a torch built with CUDA 12.9 or later"
    return None


def _cuda() -> tuple[int, ...]:
    return tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])


def arguments(a: Coded, b: Coded, out_dtype: torch.dtype) -> tuple[dict[str, Any], Tensor | None]:
    """What ``torch.nn.functional.scaled_mm`` is called with, and what is left to multiply its (then fp32) output."""
    known = coded.kind(a.format)
    call: dict[str, Any] = {"mat_a": _matrix(a), "mat_b": _matrix(b).t(), "output_dtype": out_dtype}
    scaling, outside = F.ScalingType, None
    if known == "fp8":
        sa, sb = a.scales, b.scales
        if sa.numel() == sb.numel() == 1:
            one_a, one_b, recipe = sa.reshape(()), sb.reshape(()), scaling.TensorWise
        elif out_dtype == torch.bfloat16:
            one_a = sa.expand(a.shape[0], 1).contiguous()
            one_b, recipe = sb.expand(b.shape[0], 1).reshape(1, -1).contiguous(), scaling.RowWise
        else:  # CUTLASS, which serves rows on some chips, rounds its output to 16 bits
            one_a = one_b = torch.ones((), device=sa.device)
            recipe, outside = scaling.TensorWise, sa.reshape(-1, 1) * sb.reshape(1, -1)
        call |= {"scale_a": one_a, "scale_recipe_a": recipe, "scale_b": one_b, "scale_recipe_b": recipe}
    elif known == "fp8_blocks":
        square = [x.format.block[0] == 128 and x.shape[0] % 128 == 0 for x in (a, b)]
        square[1] = square[1] and not square[0]  # not both
        for side, x, keeps in (("a", a, square[0]), ("b", b, square[1])):
            call[f"scale_{side}"] = _square_scales(x) if keeps else _row_scales(x)
            call[f"scale_recipe_{side}"] = scaling.BlockWise128x128 if keeps else scaling.BlockWise1x128
    else:
        swizzled, plain = F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE
        block = scaling.BlockWise1x16 if known == "nvfp4" else scaling.BlockWise1x32
        levels = [torch.ones((), device=x.codes.device) if x.level is None else x.level for x in (a, b)]
        two = known == "nvfp4" and all(level.numel() == 1 for level in levels)
        for side, x, level in (("a", a, levels[0]), ("b", b, levels[1])):
            scales = x.scales.view(coded.SCALE_TYPES[x.format.scale])
            call[f"scale_{side}"] = [scales, level.reshape(())] if two else scales
            call[f"scale_recipe_{side}"] = [block, scaling.TensorWise] if two else block
            call[f"swizzle_{side}"] = [swizzled, plain] if two else swizzled
        if not two and (a.level is not None or b.level is not None):
            outside = levels[0].reshape(-1, 1) * levels[1].reshape(1, -1)
    if outside is not None:
        call["output_dtype"] = torch.float32
    return call, outside


def _matrix(x: Coded) -> Tensor:
    """Codes (rows, k) in the library's dtype."""
    return x.codes.view(torch.float4_e2m1fn_x2 if x.format.element == "e2m1" else FP8[x.format.element])


def _row_scales(x: Coded) -> Tensor:
    """Scales per 1 x 128 as fp32 (rows, k / 128) with rows contiguous."""
    scales = x.scales.repeat_interleave(x.format.block[0], dim=0)[: x.shape[0]]
    return scales.t().contiguous().t()


def _square_scales(x: Coded) -> Tensor:
    """Scales per 128 x 128 as fp32 (k / 128 padded to a multiple of 4, rows / 128) with the first axis contiguous."""
    return F.pad(x.scales, (0, -x.scales.shape[1] % 4)).contiguous().t()
