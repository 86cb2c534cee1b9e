"""CpuBackend: quantised matrix products on the CPU, in C++.

One call quantises both operands, along whichever axis is contracted, straight into the layout the product reads, and
multiplies: FP4 on the int8 unit (:file:`gemm_vnni.h`), everything else in bf16 (:file:`gemm_bf16.h`). Codes and scales
are bit for bit those of :mod:`lowprec.numerics`; FP4 products are bit for bit those of ``lowprec/linear/oracle.py``,
whatever the number of threads; FP8 products differ by the order of an fp32 sum inside a block.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels.cpu.build import load
from lowprec.numerics import Format, Stream, fixed_signs

ELEMENT_CODES = {"e2m1": 0, "e4m3": 1, "e5m2": 2}
SCALE_CODES = {
    ("fp32", "rceil"): 0,
    ("fp32", "floor"): 0,
    ("e4m3", "rceil"): 1,
    ("e4m3", "floor"): 1,
    ("e8m0", "rceil"): 2,
    ("e8m0", "floor"): 3,
}
ROTATION_SIZES = (16, 32, 64, 128)
OPERAND_NAMES = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
INPUT_MAX = {torch.float32: torch.finfo(torch.float32).max, torch.bfloat16: torch.finfo(torch.bfloat16).max}


class OperandArgs(ctypes.Structure):
    """``OperandArgs`` of api.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("free_size", "free_block", "k_block")),
        *(
            (name, ctypes.c_int32)
            for name in ("bf16", "contiguous_k", "element", "scale_rule", "element_exponent", "stochastic")
        ),
        *((name, ctypes.c_float) for name in ("element_max", "input_max")),
        ("key", ctypes.c_uint32 * 2),
    )


class CallArgs(ctypes.Structure):
    """``CallArgs`` of api.cpp."""

    _fields_ = (
        ("a", OperandArgs),
        ("b", OperandArgs),
        ("k", ctypes.c_int64),
        ("rotation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("factors", ctypes.c_void_p),
        ("counter", ctypes.c_uint32 * 2),
    )


@lru_cache(maxsize=16)
def _fixed_factors(size: int, signs: str) -> Tensor:
    ones = torch.full((size,), size**-0.5, dtype=torch.float32, device="cpu")
    return ones * fixed_signs(size) if signs == "fixed" else ones


def _factors(rotation: Any, stream: Stream, role: str) -> Tensor:
    """fp32 (size,): sign * size ** -0.5, what a block is multiplied with before the butterflies."""
    if rotation.signs == "step":
        return _fixed_factors(rotation.size, "none") * stream.signs(f"{role}.signs", rotation.size)
    return _fixed_factors(rotation.size, rotation.signs)


def _contiguous(x: Tensor) -> tuple[Tensor, bool]:
    """x (rows, k) with one of its axes contiguous, and whether that is k."""
    if x.stride() == (1, x.shape[0]) and x.shape[0] > 1:
        return x, False
    return x.contiguous(), True


def _fill(args: OperandArgs, x: Tensor, contiguous_k: bool, operand: Any, stream: Stream, key: str) -> None:
    format: Format = operand.format
    element = format.element_type
    args.data, args.free_size = x.data_ptr(), x.shape[0]
    args.free_block, args.k_block = format.block
    args.bf16, args.contiguous_k = x.dtype == torch.bfloat16, contiguous_k
    args.element, args.scale_rule = ELEMENT_CODES[format.element], SCALE_CODES[format.scale, format.scale_rounding or "rceil"]
    args.element_max, args.input_max = element.max, INPUT_MAX[x.dtype]
    args.element_exponent = int(element.max).bit_length() - 1
    if operand.rounding == "stochastic":
        args.stochastic = True
        args.key[:] = stream.key(key)


def _refuse_format(format: Format | None) -> str | None:
    if format is None:
        return "one operand is not quantised; both must be"
    if format.element not in ELEMENT_CODES:
        return f"format {format.name} has element {format.element}; the kernels know {', '.join(ELEMENT_CODES)}"
    free, contracted = format.block
    if contracted % 16 or contracted & (contracted - 1):
        return f"format {format.name} has blocks of {contracted} along k; the kernels know powers of two from 16, and 0"
    if free > 1 and free % 16:
        return (
            f"format {format.name} has blocks of {free} along the free axis; the kernels know 0, 1 and multiples of 16"
        )
    return None


class CpuBackend:
    """Quantised products on the CPU. Building happens at the first question, and a failure is an answer in words."""

    name = "cpu"

    def refuses(
        self, gemm: Any, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None.

        Args:
            gemm: its formats, roundings and rotation (``lowprec.linear.Gemm``).
            role: ``fprop``, ``dgrad`` or ``wgrad``.
            m, n, k: sizes of (m, k) times (k, n) after padding; None where the number of tokens is not known yet.
            dtype, device: of the operands.
        """
        if device.type != "cpu":
            return f"the C++ kernels serve tensors on the CPU, not on {device.type}"
        if dtype not in INPUT_MAX:
            return f"the operands are {dtype}; the C++ kernels read bfloat16 and float32"
        if role not in OPERAND_NAMES:
            return f"unknown product '{role}'; it serves {', '.join(OPERAND_NAMES)}"
        reason = _refuse_format(gemm.a.format) or _refuse_format(gemm.b.format)
        if reason:
            return reason
        blocks = gemm.a.format.block, gemm.b.format.block
        if blocks[0][1] != blocks[1][1]:
            return (
                f"the two operands have different blocks along the contracted axis ({blocks[0][1]} and {blocks[1][1]})"
            )
        if gemm.inner is not None and gemm.inner.size not in ROTATION_SIZES:
            return f"the rotation has size {gemm.inner.size}; the kernels know {', '.join(map(str, ROTATION_SIZES))}"
        k_multiple = max(16, blocks[0][1], gemm.inner.size if gemm.inner else 1)
        for axis, size, multiple in (
            ("m", m, max(16, blocks[0][0])),
            ("n", n, max(16, blocks[1][0])),
            ("k", k, k_multiple),
        ):
            if size is not None and (size % multiple or size == 0):
                return f"{axis} = {size} is not a positive multiple of {multiple}"
        return load()[1] or None

    def gemm(self, a: Tensor, b: Tensor, gemm: Any, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        """The product, for operands that :meth:`refuses` lets pass.

        Args:
            a, b: (m, k), (n, k), bf16 or fp32; transposed views are read in place.
            gemm, role: the product.
            stream: random bits of the layer.
            out_dtype: bf16 or fp32.

        Returns:
            (m, n) of ``out_dtype``.
        """
        assert a.shape[1] == b.shape[1] and out_dtype in INPUT_MAX, (a.shape, b.shape, out_dtype)
        out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype)
        call, keep = self._call(gemm, stream, role, a, b)
        if _library().lowprec_gemm(ctypes.byref(call), ctypes.c_void_p(out.data_ptr()), out_dtype == torch.bfloat16):
            raise MemoryError(f"no memory for the packed operands of {role} ({tuple(a.shape)} by {tuple(b.shape)})")
        del keep
        return out

    def quantize(self, x: Tensor, gemm: Any, side: str, stream: Stream, role: str) -> tuple[Tensor, Tensor, Tensor]:
        """What operand ``side`` ("a" or "b") of a product becomes: for tests and for looking inside.

        Args:
            x: (rows, k), bf16 or fp32.
            gemm, role, stream: as in :meth:`gemm`.

        Returns:
            Element values (rows, k), scales (rows, blocks) and tensor scale (), all fp32.
        """
        rows, k = x.shape
        operand = gemm.a if side == "a" else gemm.b
        values = torch.empty(rows, k)
        scales, tensor_scale = torch.empty(rows, k // (operand.format.block[1] or k)), torch.empty(())
        one_sided = type(gemm)(operand, operand, gemm.inner)
        call, keep = self._call(one_sided, stream, role, x, x, names=(OPERAND_NAMES[role][side == "b"],) * 2)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, scales, tensor_scale)]
        if _library().lowprec_quantize(ctypes.byref(call), *pointers):
            raise MemoryError(f"no memory for the packed operand ({rows}, {k})")
        del keep
        return values, scales, tensor_scale

    @staticmethod
    def _call(
        gemm: Any, stream: Stream, role: str, a: Tensor, b: Tensor, names: tuple[str, str] | None = None
    ) -> tuple[CallArgs, tuple[Tensor | None, ...]]:
        """The arguments of a call, and the tensors that must outlive it."""
        name_a, name_b = names or OPERAND_NAMES[role]
        (a, a_contiguous), (b, b_contiguous) = _contiguous(a), _contiguous(b)
        call = CallArgs(k=a.shape[1], threads=torch.get_num_threads())
        _fill(call.a, a, a_contiguous, gemm.a, stream, f"{role}.{name_a}")
        _fill(call.b, b, b_contiguous, gemm.b, stream, f"{role}.{name_b}")
        call.counter[:] = (stream.step & 0xFFFFFFFF, stream.micro & 0xFFFFFFFF)
        factors = _factors(gemm.inner, stream, role) if gemm.inner else None
        if factors is not None:
            call.rotation, call.factors = gemm.inner.size, factors.data_ptr()
        return call, (a, b, factors)


def _library() -> ctypes.CDLL:
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    return library


def backend() -> CpuBackend:
    """The backend, ready to run.

    Raises:
        RuntimeError: with the sentence why this machine cannot run it.
    """
    _library()
    return CpuBackend()
