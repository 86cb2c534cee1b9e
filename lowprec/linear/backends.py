"""Backends: who computes a product, and why not the others.

Eight answers exist. Under ``backend: auto`` those that serve the tensors' device are asked in this order:

``native``        both operands unquantised: one ``a @ b.T`` in the tensors' dtype, what ``nn.Linear`` does.
``scaled_mm``     CUDA: Triton quantises, ``torch.nn.functional.scaled_mm`` (cuBLASLt) multiplies; within its bound.
``triton``        CUDA: Triton quantises and multiplies what the library does not; within its bound.
``cpu``           CPU: C++ (``kernels/cpu``): FP4 and integers on int8 VNNI, equal to the oracle; FP8, MX in bf16,
                  within its bound.
``cpu_portable``  CPU: C++ for any CPU quantises, torch multiplies, in bf16 where that is exact.
``torch``         quantises exactly as the oracle, then one fp32 product: any device, any recipe.
``oracle``        the definition, block by block (:mod:`lowprec.linear.oracle`): slow, for tests and for bisecting.
``te``            only if named: TransformerEngine on CUDA, whose codes are not in all cases the definition's.

All but ``te`` quantise bit for bit as the oracle does; before a run trains, :mod:`lowprec.linear.verify` holds each of
them to it. A backend that cannot serve a product says so in words; the plan prints those words. A backend is imported,
and with it Triton, a compiler or TransformerEngine, when it is first asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe
from lowprec.numerics import Format, QTensor, Stream, Window, rotate

Side = Literal["a", "b"]
Packed = Any
"""A prepared operand: each backend has its own kind; all have ``nbytes``."""


class Backend(Protocol):
    """What a backend must do: for operands without splits and outer rotations, padded to whole blocks."""

    name: str

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None. A size that is not known yet (tokens) is None."""

    def prepare(
        self,
        x: Tensor,
        gemm: Gemm,
        side: Side,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> Packed:
        """x (rows, k), maybe a transposed view, rotated and quantised as operand ``side`` of the product. It may be
        kept and multiplied any number of times; ``amax`` () or (rows, 1) replaces the tensor's or the rows' own
        maximum, and ``window`` says whose noise x draws if it is a part of a larger matrix."""

    def load(self, q: QTensor, gemm: Gemm, side: Side) -> Packed:
        """What :meth:`prepare` makes of a matrix, from its codes (rows, k) in the operand's format; rotated already,
        maybe a transposed view."""

    def multiply(self, a: Packed, b: Packed, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n)."""

    def stored(self, prepared: Packed, gemm: Gemm, side: Side) -> Packed:
        """The same in as little memory as the backend knows, to be kept; ``multiply`` takes it too."""

    def unpacked(self, prepared: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a prepared operand stands for: values * block scales (rows, k), and the tensor scale () or (rows, 1)."""


class Native:
    """The unquantised product."""

    name = "native"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return "it only serves unquantised products" if gemm.a.format or gemm.b.format or gemm.inner else None

    def prepare(
        self,
        x: Tensor,
        gemm: Gemm,
        side: Side,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> Tensor:
        return x

    def load(self, q: QTensor, gemm: Gemm, side: Side) -> Tensor:
        raise TypeError(f"an unquantised operand is no codes of {q.format.name}")

    def multiply(self, a: Tensor, b: Tensor, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        return (a @ b.T).to(out_dtype)

    def stored(self, prepared: Tensor, gemm: Gemm, side: Side) -> Tensor:
        return prepared

    def unpacked(self, prepared: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return prepared.to(dtype), torch.ones((), device=prepared.device)


Operands = oracle.Prepared | oracle.Stored


def _unpack(operand: Operands) -> oracle.Prepared:
    return operand.unpack() if isinstance(operand, oracle.Stored) else operand


class Oracle:
    """The definition."""

    name = "oracle"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return None

    def prepare(
        self,
        x: Tensor,
        gemm: Gemm,
        side: Side,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> oracle.Prepared:
        name = GEMM_OPERANDS[role][side == "b"]
        return oracle.prepare(x, getattr(gemm, side), gemm.inner, stream, role, name, amax, window)

    def load(self, q: QTensor, gemm: Gemm, side: Side) -> oracle.Prepared:
        return oracle.prepared(q)

    def multiply(self, a: Operands, b: Operands, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        return oracle.multiply(_unpack(a), _unpack(b)).to(out_dtype)

    def stored(self, prepared: oracle.Prepared, gemm: Gemm, side: Side) -> Operands:
        format = getattr(gemm, side).format
        return prepared if format is None else oracle.Stored.of(prepared, format)

    def unpacked(self, prepared: oracle.Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return prepared.blockscaled().to(dtype), prepared.tensor_scale


class Torch(Oracle):
    """Exact operands, one fp32 product."""

    name = "torch"

    def multiply(self, a: Operands, b: Operands, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        a, b = _unpack(a), _unpack(b)
        scale = a.tensor_scale.reshape(-1, 1) * b.tensor_scale.reshape(1, -1)
        return (a.blockscaled() @ b.blockscaled().T * scale).to(out_dtype)


def gemm(
    chosen: Backend, a: Tensor, b: Tensor, spec: Gemm, stream: Stream, role: str, out_dtype: torch.dtype
) -> Tensor:
    """``a b^T`` in one call: prepare both, multiply."""
    pa, pb = chosen.prepare(a, spec, "a", stream, role), chosen.prepare(b, spec, "b", stream, role)
    return chosen.multiply(pa, pb, spec, out_dtype)


@lru_cache(maxsize=1)
def _cpu() -> Backend:
    from lowprec.kernels.cpu import CpuBackend  # loaded by need: it may build itself with the C++ compiler

    return CpuBackend()


@lru_cache(maxsize=1)
def _portable() -> Backend:
    from lowprec.kernels.cpu.qdq_backend import PortableBackend

    return PortableBackend()


@lru_cache(maxsize=1)
def _scaled_mm() -> Backend:
    from lowprec.kernels.scaled_mm import ScaledMM

    return ScaledMM()


@lru_cache(maxsize=1)
def _triton() -> Backend:
    from lowprec.kernels.triton_backend import TritonBackend

    return TritonBackend()


@lru_cache(maxsize=1)
def _te() -> Backend:
    from lowprec.kernels.te import TeBackend

    return TeBackend()


def te_says(recipe: LinearRecipe) -> str:
    """Whether TransformerEngine can express a recipe, as which of its own, or why not; imports nothing of it."""
    from lowprec.kernels.te_recipe import describe

    return describe(recipe)


def rotator(wanted: str, device: torch.device) -> Callable[[Tensor, int, Tensor | None, bool], Tensor]:
    """Who rotates matrices around the products: :func:`lowprec.numerics.rotate`, or C++ that equals it bit for bit."""
    if wanted in ("auto", "cpu") and device.type == "cpu":
        from lowprec.kernels.cpu import rotate as fast  # falls back to the definition by itself

        return fast
    return rotate


def quantized(wanted: str, x: Tensor, format: Format, amax: Tensor | None) -> QTensor:
    """``format.quantize(x, amax=amax)``, around the products: in C++, which equals it bit for bit, where it serves."""
    if wanted not in ("torch", "oracle") and x.device.type == "cpu":
        from lowprec.kernels.cpu import qdq

        if qdq.refuses(format) is None and format.bits <= 8 and x.dtype in qdq.DTYPES and qdq.load()[0] is not None:
            return qdq.quantize(x, format, amax=amax)
    return format.quantize(x, amax=amax)


ORDER = ("native", "scaled_mm", "triton", "cpu", "cpu_portable", "torch", "oracle")
CHOICES = ("auto", *ORDER[1:], "te")
DEVICES = {"scaled_mm": "cuda", "triton": "cuda", "cpu": "cpu", "cpu_portable": "cpu"}
"""Who is asked under ``auto`` only for tensors on such a device."""


def backend(name: str) -> Backend:
    """The backend of that name."""
    makers: dict[str, Callable[[], Backend]] = {
        "native": Native,
        "scaled_mm": _scaled_mm,
        "triton": _triton,
        "te": _te,
        "cpu": _cpu,
        "cpu_portable": _portable,
        "torch": Torch,
        "oracle": Oracle,
    }
    return makers[name]()


@lru_cache(maxsize=4096)
def choose(
    wanted: str, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[Backend, tuple[str, ...]]:
    """Pick the backend of one product.

    Args:
        wanted: ``auto`` or a backend's name; an unquantised product is always ``native``.
        gemm, role: the product.
        m, n, k: its sizes after padding; None where the number of tokens is not known yet.
        dtype, device: of the activations.

    Returns:
        The backend, and why each one before it in the order refused.

    Raises:
        ValueError: if ``wanted`` is unknown, or is named and refuses.
    """
    if wanted not in CHOICES:
        raise ValueError(f"unknown backend '{wanted}'; choose one of {', '.join(CHOICES)}")
    refusals: list[str] = []
    served = [name for name in ORDER if DEVICES.get(name, device.type) == device.type]
    for name in served if wanted == "auto" else ("native", wanted):
        candidate = backend(name)
        reason = candidate.refuses(gemm, role, m, n, k, dtype, device)
        if reason is None:
            return candidate, tuple(refusals)
        if name != "native":
            refusals.append(f"{name}: {reason}")
    raise ValueError(f"backend '{wanted}' refuses {role} ({refusals[-1]}); use backend 'auto' or 'torch'")
