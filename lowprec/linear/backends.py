"""Backends: who computes a product, and why not the others.

Four answers exist, tried in this order under ``backend: auto``:

``native``  both operands unquantised: one ``a @ b.T`` in the tensors' dtype, what ``nn.Linear`` does.
``cpu``     C++ (``kernels/cpu``): FP4 on int8 VNNI, bit-equal to the oracle; FP8 and MX in bf16, within its bound.
``torch``   quantises exactly as the oracle, then one fp32 product of the block-scaled operands: any device, any recipe.
``oracle``  the definition, block by block (:mod:`lowprec.linear.oracle`): slow, for tests and for bisecting.

A backend that cannot serve a product says so in words; the plan prints those words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm
from lowprec.numerics import Stream

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
        self, x: Tensor, gemm: Gemm, side: Side, stream: Stream, role: str, amax: Tensor | None = None
    ) -> Packed:
        """x (rows, k), maybe a transposed view, rotated and quantised as operand ``side`` of the product. It may be
        kept and multiplied any number of times; ``amax`` () replaces the tensor's own maximum."""

    def multiply(self, a: Packed, b: Packed, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n)."""

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
        self, x: Tensor, gemm: Gemm, side: Side, stream: Stream, role: str, amax: Tensor | None = None
    ) -> Tensor:
        return x

    def multiply(self, a: Tensor, b: Tensor, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        return (a @ b.T).to(out_dtype)

    def unpacked(self, prepared: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return prepared.to(dtype), torch.ones((), device=prepared.device)


class Oracle:
    """The definition."""

    name = "oracle"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return None

    def prepare(
        self, x: Tensor, gemm: Gemm, side: Side, stream: Stream, role: str, amax: Tensor | None = None
    ) -> oracle.Prepared:
        name = GEMM_OPERANDS[role][side == "b"]
        return oracle.prepare(x, getattr(gemm, side), gemm.inner, stream, role, name, amax)

    def multiply(self, a: oracle.Prepared, b: oracle.Prepared, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
        return oracle.multiply(a, b).to(out_dtype)

    def unpacked(self, prepared: oracle.Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return prepared.blockscaled().to(dtype), prepared.tensor_scale


class Torch(Oracle):
    """Exact operands, one fp32 product."""

    name = "torch"

    def multiply(self, a: oracle.Prepared, b: oracle.Prepared, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
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

    found = CpuBackend()
    return found if hasattr(found, "prepare") else _Whole(found)


class _Whole(Torch):  # until the C++ backend prepares and multiplies in two calls
    name = "cpu"

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def refuses(self, gemm, role, m, n, k, dtype, device):
        if (
            gemm.a.rounding == "ms_eden"
            or gemm.b.rounding == "ms_eden"
            or (gemm.inner and (gemm.inner.rounds > 1 or not gemm.inner.size))
        ):
            return "not yet"
        for o in (gemm.a, gemm.b):
            f = o.format
            if f and (
                f.targets
                or f.second
                or f.guard != 1
                or f.tensor_max != 448
                or f.rule != "absmax"
                or f.tensor_scale not in (True, False)
                or f.zero != "keep"
                or o.amax != "current"
            ):
                return "not yet"
        try:
            return self.inner.refuses(gemm, role, m, n, k, dtype, device)
        except Exception as e:
            return f"not yet {e}"

    def prepare(self, x, gemm, side, stream, role, amax=None):
        return (x, stream, role, side, gemm)

    def multiply(self, a, b, gemm, out_dtype):
        return self.inner.gemm(a[0], b[0], gemm, a[1], a[2], out_dtype)

    def unpacked(self, prepared, dtype):
        x, stream, role, side, gemm = prepared
        return Torch().unpacked(Torch().prepare(x, gemm, side, stream, role), dtype)


ORDER = ("native", "cpu", "torch", "oracle")
CHOICES = ("auto", *ORDER[1:])


def backend(name: str) -> Backend:
    """The backend of that name."""
    makers: dict[str, Callable[[], Backend]] = {"native": Native, "cpu": _cpu, "torch": Torch, "oracle": Oracle}
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
    for name in ORDER if wanted == "auto" else ("native", wanted):
        candidate = backend(name)
        reason = candidate.refuses(gemm, role, m, n, k, dtype, device)
        if reason is None:
            return candidate, tuple(refusals)
        if name != "native":
            refusals.append(f"{name}: {reason}")
    raise ValueError(f"backend '{wanted}' refuses {role} ({refusals[-1]}); use backend 'auto' or 'torch'")
