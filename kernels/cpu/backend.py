"""CpuBackend: quantised matrix products on the CPU, in C++.

:meth:`CpuBackend.prepare` quantises an operand, along whichever axis is contracted, straight into the layout that the
products read; :meth:`CpuBackend.multiply` multiplies two of them: small integers (FP4, INT8, ...) on the int8 unit
(:file:`gemm_vnni.h`), everything else in bf16 (:file:`gemm_bf16.h`), which holds all elements exactly.

What is equal and what is bounded. Codes and scales are bit for bit those of :mod:`lowprec.numerics`. Products of
integers in blocks along k are bit for bit those of ``lowprec/linear/oracle.py`` as long as a block's sum of products
fits fp32's 24 bits (FP4: blocks up to 65536; INT8: up to 1024). Beyond, and where both operands have one scale along
all of k, the sum here is exact and rounded once; the definition's fp32 sum is not. FP8 and unquantised operands differ
by the order of an fp32 sum inside a block: ``2 k 2^-24 sum|a||b|``; the bf16 unit reads subnormals of unquantised
operands (below 1.2e-38) as zeros and makes no smaller products. Nothing depends on the number of threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels.cpu.build import load
from lowprec.kernels.cpu.operand import (
    ANY,
    INPUT_MAX,
    LARGEST_TILE,
    MODES,
    CodesArgs,
    OperandArgs,
    PackedArgs,
    PackedOperand,
    StoredOperand,
    code_scale,
    code_values,
    element_args,
    empty_packed,
    fill_scale,
    refuse_operand,
    store_args,
)
from lowprec.numerics import Format, QTensor, Stream, Window, fixed_signs
from lowprec.numerics import rotate as rotate_torch
from lowprec.numerics.hadamard import hadamard_order_refusal
from lowprec.numerics.scale import block_size

Prepared = PackedOperand | StoredOperand
OPERAND_NAMES = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}


class RotateArgs(ctypes.Structure):
    """``RotateArgs`` of hadamard.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "factors")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "n")),
        *((name, ctypes.c_int32) for name in ("bf16", "along_columns", "inverse", "threads")),
    )


@lru_cache(maxsize=16)
def _fixed_signs(size: int) -> Tensor:
    return fixed_signs(size)


def _signs(rotation: Any, stream: Stream, role: str, size: int) -> list[Tensor | None]:
    """The signs (size,) of each round of a rotation."""
    keys = [f"{role}.signs", f"{role}.signs2"][: rotation.rounds]
    if rotation.signs == "none":
        return [None for _ in keys]
    return [_fixed_signs(size) if rotation.signs == "fixed" else stream.signs(key, size) for key in keys]


def _factors(signs: Tensor | None, size: int) -> Tensor:
    """fp32 (size,): sign * size ** -0.5, what a block is multiplied with before the butterflies."""
    factor = torch.full((size,), size**-0.5, dtype=torch.float32, device="cpu")
    return factor if signs is None else factor * signs


@lru_cache(maxsize=32)
def _fixed_factors(size: int, signs: str) -> Tensor:
    return _factors(_fixed_signs(size) if signs == "fixed" else None, size)


def _contiguous(x: Tensor) -> tuple[Tensor, bool]:
    """x (rows, k) with one of its axes contiguous, and whether that is k."""
    if x.stride() == (1, x.shape[0]) and x.shape[0] > 1:
        return x, False
    return x.contiguous(), True


def rotate(x: Tensor, n: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """:func:`lowprec.numerics.rotate` of a matrix x (rows, k), bit for bit, in x's memory order.

    In C++ for powers of two, bf16 and fp32, and sizes that are multiples of 16; else by the definition itself.
    """
    source, contiguous_k = _contiguous(x)
    rows, columns = (x.shape[0], x.shape[1]) if contiguous_k else (x.shape[1], x.shape[0])
    if x.dtype not in INPUT_MAX or n < 2 or n & (n - 1) or x.shape[1] % n or columns % 16 or load()[0] is None:
        return rotate_torch(x, n, signs, inverse)
    out = torch.empty_strided(source.shape, source.stride(), dtype=x.dtype)
    factors = _factors(signs, n)
    factors = factors.repeat(16 // n) if n < 16 else factors
    args = RotateArgs(
        source.data_ptr(), out.data_ptr(), factors.data_ptr(), rows, columns, n,
        x.dtype == torch.bfloat16, contiguous_k, inverse, torch.get_num_threads(),
    )  # fmt: skip
    _library().lowprec_rotate(ctypes.byref(args))
    return out


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
        if gemm.a.format is None and gemm.b.format is None:
            return "neither operand is quantised"
        for operand in (gemm.a, gemm.b):
            reason = refuse_operand(operand.format, operand.rounding, operand.group, dtype)
            if reason:
                return reason
        reason = _refuse_sizes(gemm, m, n, k)
        return reason or load()[1] or None

    def prepare(
        self,
        x: Tensor,
        gemm: Any,
        side: str,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> PackedOperand:
        """Rotate, quantise and pack one operand of a product that :meth:`refuses` lets pass.

        Args:
            x: (rows, k), bf16 or fp32; a transposed view is read in place.
            gemm, side, role: the product, and whether x is its ``a`` or its ``b``.
            stream: random bits of the layer.
            amax: () or (rows, 1) fp32, the maximum to use instead of the tensor's, or the rows', own.
            window: where x lies in the matrix whose noise it draws, both as they lie in memory; None = it is all.
        """
        return self._prepare(x, gemm, side, stream, role, amax, may_fold=True, window=window)

    def load(self, q: QTensor, gemm: Any, side: str) -> PackedOperand:
        """What :meth:`prepare` makes of a matrix, from its codes (rows, k) in the operand's format, also transposed."""
        args = OperandArgs.from_buffer_copy(_constants(gemm, side, torch.bfloat16))
        (args.free_size, args.k), args.threads, args.may_fold = q.shape, torch.get_num_threads(), True
        codes, args.contiguous_k = _contiguous(q.codes)
        scales, outer = q.product_scales()
        if q.format.tensor_scale == 128 and outer.dim() == 2:  # one per row and 128 elements, and k is 128
            scales, outer = scales * outer, torch.ones(())
        values, scales, outer = code_values(q.format.element), scales.contiguous(), outer.contiguous()
        pointers = [t.data_ptr() for t in (codes, values, scales, outer)]
        made = _empty(args, q.format, q.format.block[1] or q.shape[1])
        given = CodesArgs(*pointers, q.format.bits <= 4)
        _library().lowprec_load(ctypes.byref(args), ctypes.byref(given), ctypes.byref(made.args))
        return made

    def multiply(self, a: Prepared, b: Prepared, gemm: Any, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n) of ``out_dtype``, bf16 or fp32."""
        a, b = _restored(a), _restored(b)
        assert a.k == b.k and out_dtype in INPUT_MAX, (a.k, b.k, out_dtype)
        if not (a.args.int8 and b.args.int8 and a.args.block == b.args.block and a.args.biased and not b.args.biased):
            a, b = _as_bf16(a), _as_bf16(b)
        out = torch.empty(a.rows, b.rows, dtype=out_dtype)
        pointers = ctypes.byref(a.args), ctypes.byref(b.args), ctypes.c_void_p(out.data_ptr())
        _library().lowprec_multiply(*pointers, out_dtype == torch.bfloat16, torch.get_num_threads())
        return out

    def stored(self, prepared: PackedOperand, gemm: Any, side: str) -> StoredOperand:
        """The operand in little memory, to be kept for the backward: 4, 8 or 16 bits a code, 16 or 32 a block scale."""
        args, bits = store_args(prepared.args, prepared.element)
        codes = prepared.rows * prepared.k * bits // 8
        scales = prepared.rows * (prepared.k // prepared.args.block_size) * (2 if args.scales_bf16 else 4)
        memory = torch.empty(codes + scales + 4 * prepared.rows, dtype=torch.uint8)
        args.codes, args.scales = memory.data_ptr(), memory.data_ptr() + codes
        _library().lowprec_store(ctypes.byref(prepared.args), ctypes.byref(args), torch.get_num_threads())
        memory[codes + scales :] = prepared.outer()
        return StoredOperand(memory, args, dataclasses.replace(prepared, memory=torch.empty(0, dtype=torch.uint8)))

    def unpacked(self, prepared: Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a prepared operand stands for: values * block scales (rows, k), and the tensor scale () or (rows, 1).

        Args:
            dtype: of the values, bf16 or fp32; FP4 and INT8 values times E4M3 or power-of-two scales are exact in bf16.
        """
        assert dtype in INPUT_MAX, dtype
        prepared = _restored(prepared)
        out = torch.empty(prepared.rows, prepared.k, dtype=dtype)
        pointer, is_bf16 = ctypes.c_void_p(out.data_ptr()), dtype == torch.bfloat16
        _library().lowprec_dequantise(ctypes.byref(prepared.args), pointer, is_bf16, False, torch.get_num_threads())
        return out, prepared.tensor_scale

    def gemm(self, a: Tensor, b: Tensor, gemm: Any, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        """:meth:`prepare` both, :meth:`multiply`."""
        pa, pb = self.prepare(a, gemm, "a", stream, role), self.prepare(b, gemm, "b", stream, role)
        return self.multiply(pa, pb, gemm, out_dtype)

    def quantize(
        self, x: Tensor, gemm: Any, side: str, stream: Stream, role: str, amax: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What operand ``side`` ("a" or "b") of a product becomes, in parts.

        Returns:
            Element values (rows, k), scales (rows, blocks) and tensor scale () or (rows, 1), all fp32.
        """
        packed = self._prepare(x, gemm, side, stream, role, amax, may_fold=False)
        values, scales = torch.empty(packed.rows, packed.k), torch.empty(packed.rows, packed.k // packed.args.block)
        pointers = ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(scales.data_ptr())
        _library().lowprec_unpack(ctypes.byref(packed.args), *pointers, torch.get_num_threads())
        return values, scales, packed.tensor_scale

    @staticmethod
    def _prepare(
        x: Tensor,
        gemm: Any,
        side: str,
        stream: Stream,
        role: str,
        amax: Tensor | None,
        may_fold: bool,
        window: Window | None = None,
    ) -> PackedOperand:
        operand = gemm.a if side == "a" else gemm.b
        format: Format | None = operand.format
        rows, k = x.shape
        args = OperandArgs.from_buffer_copy(_constants(gemm, side, x.dtype))
        args.free_size, args.k, args.threads, args.may_fold = rows, k, torch.get_num_threads(), may_fold
        keep: list[Tensor] = []  # what the arguments point to
        measured = None if format is None or format.rule == "absmax" else format
        if gemm.inner is not None:
            size = gemm.inner.size or k
            signs = _signs(gemm.inner, stream, role, size)
            if size > LARGEST_TILE or size & (size - 1) or measured:
                for one in signs:
                    x = rotate(x, size, one)
            else:
                fixed = gemm.inner.signs != "step"
                keep += [_fixed_factors(size, gemm.inner.signs) if fixed else _factors(one, size) for one in signs]
                args.rotation, args.rounds = size, len(signs)
                args.factors[: len(signs)] = [factors.data_ptr() for factors in keep]
        if measured is not None:
            keep.append(_sizes(x, measured))
            args.sizes = keep[-1].data_ptr()
        if amax is not None:
            assert format is not None and amax.numel() in (1, rows), amax.shape
            keep.append(amax.detach().float().reshape(-1).contiguous())
            if format.amax_of == "row" and not format.tensor_scale:  # a row is one block, whose size is given
                args.sizes = keep[-1].data_ptr()
            else:
                args.amax = keep[-1].data_ptr()
        x, args.contiguous_k = _contiguous(x)
        args.place.all_rows, args.place.columns = (rows, k) if args.contiguous_k else (k, rows)
        if window is not None:
            (args.place.all_rows, args.place.columns), args.place.first_column = window.shape, window.first_column
            if window.rows is not None:
                assert window.rows.numel() == (rows if args.contiguous_k else k), (window.rows.shape, x.shape)
                keep.append(window.rows.contiguous())
                args.place.rows = keep[-1].data_ptr()
        args.data, args.bf16 = x.data_ptr(), x.dtype == torch.bfloat16
        block = k if format is None else format.block[1] or k
        if operand.rounding != "nearest":
            key = f"{role}.{OPERAND_NAMES[role][side == 'b']}"
            if operand.rounding == "stochastic":
                args.key[:] = stream.key(key)
            else:
                args.scale_key[:] = stream.key(f"{key}.scale")
            args.counter[:] = (stream.step & 0xFFFFFFFF, stream.micro & 0xFFFFFFFF)
        made = _empty(args, format, block)
        _library().lowprec_prepare(ctypes.byref(args), ctypes.byref(made.args))
        del keep
        return made


def _empty(args: OperandArgs, format: Format | None, block: int) -> PackedOperand:
    """Room for the operand that the arguments describe, with ``block`` contracted elements under one scale."""
    memory, packed = empty_packed(args.free_size, args.k, block, bool(args.int8), bool(args.may_fold))
    packed.biased, packed.code_scale = args.biased, args.code_scale
    packed.uniform = format is not None and format.block[0] != 1
    packed.code_max = args.code_scale * args.element.max
    _library().lowprec_advise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel()))
    by_row = format is not None and format.tensor_scale == "row"
    return PackedOperand(args.free_size, args.k, memory, packed, by_row, format.element if format else None)


def _refuse_sizes(gemm: Any, m: int | None, n: int, k: int | None) -> str | None:
    """Why the sizes of a product do not fit its blocks, or None."""
    blocks = [operand.format.block if operand.format else (1, 0) for operand in (gemm.a, gemm.b)]
    groups = [operand.group for operand in (gemm.a, gemm.b) if operand.rounding == "ms_eden"]
    groups += [128 for operand in (gemm.a, gemm.b) if operand.format and operand.format.tensor_scale == 128]
    rotation = max(gemm.inner.size, 1) if gemm.inner else 1
    multiple = math.lcm(16, blocks[0][1] or 1, blocks[1][1] or 1, rotation, *groups)
    for axis, size, least in (("m", m, max(16, blocks[0][0])), ("n", n, max(16, blocks[1][0])), ("k", k, multiple)):
        if size is not None and (size % least or size == 0):
            return f"{axis} = {size} is not a positive multiple of {least}"
    if gemm.inner and not gemm.inner.size and k is not None and hadamard_order_refusal(k):
        return hadamard_order_refusal(k)
    if k is not None and _int8(gemm):
        longest = (2**31 - 1) // math.prod(
            int((code_scale(f.element) or 1) * f.element_type.max) for f in _formats(gemm)
        )
        if (blocks[0][1] or k) > longest:
            return f"k = {k}: the int32 sum of a block may overflow beyond {longest}"
    return None


def _formats(gemm: Any) -> list[Format]:
    return [operand.format for operand in (gemm.a, gemm.b) if operand.format is not None]


def _int8(gemm: Any) -> bool:
    """Whether a product runs on the int8 unit: integers on both sides, in the same blocks along k."""
    formats = _formats(gemm)
    same = len(formats) == 2 and formats[0].block[1] == formats[1].block[1]
    return same and all(code_scale(format.element) is not None for format in formats)


@lru_cache(maxsize=1024)
def _constants(gemm: Any, side: str, dtype: torch.dtype) -> OperandArgs:
    """What the arguments of an operand are whatever its tensor, its size and the random bits."""
    operand = gemm.a if side == "a" else gemm.b
    args = OperandArgs(biased=side == "a")
    if operand.format is None:
        args.element.kind = ANY
        return args
    format: Format = operand.format
    args.free_block, args.k_block = format.block
    args.mode, args.group = MODES[operand.rounding], operand.group
    args.element.kind, args.element.min_exponent, args.element.mantissa = element_args(format.element)
    args.element.max = format.element_type.max
    args.int8 = _int8(gemm)
    args.code_scale = code_scale(format.element) or 1.0
    fill_scale(args.scale, format, dtype)
    return args


def _sizes(x: Tensor, format: Format) -> Tensor:
    """Sizes of the blocks of x (rows, k), fp32 (R, C), by the format's rule: the definition itself."""
    free, contracted = format.block[0] or x.shape[0], format.block[1] or x.shape[1]
    blocks = x.float().unflatten(1, (-1, contracted)).unflatten(0, (-1, free))
    return block_size(blocks, format.rule, format.coef).contiguous()


def _as_bf16(packed: PackedOperand) -> PackedOperand:
    """The same operand with bf16 values for codes: for a partner prepared for another product."""
    if not packed.args.int8:
        return packed
    memory, args = empty_packed(packed.rows, packed.k, packed.args.block, int8=False, may_fold=False)
    places = {name: getattr(args, name) for name in ("codes", "block_scales", "outer")}
    args = PackedArgs.from_buffer_copy(packed.args)
    for name, place in places.items():
        setattr(args, name, place)
    args.int8, args.scales = False, args.block_scales
    ctypes.memmove(args.block_scales, packed.args.block_scales, packed.rows * (packed.k // args.block) * 4)
    ctypes.memmove(args.outer, packed.args.outer, packed.rows * 4)
    _library().lowprec_to_bf16(ctypes.byref(packed.args), ctypes.byref(args), torch.get_num_threads())
    return dataclasses.replace(packed, memory=memory, args=args)


def _restored(operand: Prepared) -> PackedOperand:
    """The operand as the products read it."""
    if isinstance(operand, PackedOperand):
        return operand
    was, old = operand.packed, operand.packed.args
    folded = old.block != old.block_size
    memory, args = empty_packed(was.rows, was.k, old.block_size, bool(old.int8), folded)
    places = {name: getattr(args, name) for name in ("codes", "scales", "block_scales", "starts", "outer")}
    args = PackedArgs.from_buffer_copy(old)
    for name, place in places.items():
        setattr(args, name, place)
    if not folded:
        args.scales = args.block_scales
    packed = dataclasses.replace(was, memory=memory, args=args)
    packed.outer().copy_(operand.memory[-4 * was.rows :])
    _library().lowprec_restore(ctypes.byref(args), ctypes.byref(operand.args), torch.get_num_threads())
    return packed


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
