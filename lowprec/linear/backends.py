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
from typing import Protocol

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.recipe import Gemm
from lowprec.numerics import Stream


class Backend(Protocol):
    """What a backend must do."""

    name: str

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None. A size that is not known yet (tokens) is None."""

    def gemm(self, a: Tensor, b: Tensor, gemm: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        """(m, k), (n, k) -> (m, n); operands may be transposed views and are padded to whole blocks."""


class Native:
    """The unquantised product."""

    name = "native"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return "it only serves unquantised products" if gemm.quantized else None

    def gemm(self, a: Tensor, b: Tensor, gemm: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        return (a @ b.T).to(out_dtype)


class Torch:
    """Exact operands, one fp32 product."""

    name = "torch"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return None

    def gemm(self, a: Tensor, b: Tensor, gemm: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        qa, qb = oracle.prepare_both(a, b, gemm, stream, role)
        return (qa.blockscaled() @ qb.blockscaled().T * (qa.tensor_scale * qb.tensor_scale)).to(out_dtype)


class Oracle:
    """The definition."""

    name = "oracle"

    def refuses(
        self, gemm: Gemm, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        return None

    def gemm(self, a: Tensor, b: Tensor, gemm: Gemm, stream: Stream, role: str, out_dtype: torch.dtype) -> Tensor:
        return oracle.gemm(a, b, gemm, stream, role, out_dtype)


@lru_cache(maxsize=1)
def _cpu() -> Backend:
    from lowprec.kernels.cpu import CpuBackend  # loaded by need: it may build itself with the C++ compiler

    return CpuBackend()


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
