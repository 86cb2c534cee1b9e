"""The one autograd function: every recipe runs through it.

Forward and backward make three products of the *original* tensors, each quantised for its own product (no double
quantisation, arXiv:2509.25149 section 4.3). The stream is taken once in the forward and kept, so a backward, and a
forward that is run again by activation recomputation, draw the same random bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear.backends import choose
from lowprec.linear.recipe import Gemm, LinearRecipe
from lowprec.numerics import Stream

TOKEN_TILE = 16
"""Rows of activations are padded to a multiple of this: kernels work in tiles, and zero rows change no number."""


@dataclass(frozen=True)
class Policy:
    """How a layer's products are served: the wanted backend, and what happens to sizes that no block divides."""

    backend: str = "auto"
    pad: str = "zero"  # "zero" | "refuse"


def _pad(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zero-pad a matrix (possibly a transposed view) to (rows, cols), keeping its memory order."""
    if x.shape == (rows, cols):
        return x
    if x.stride(0) < x.stride(1):
        return _pad(x.T, cols, rows).T
    return F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))


def product(
    a: Tensor, b: Tensor, gemm: Gemm, role: str, stream: Stream, policy: Policy, out_dtype: torch.dtype
) -> Tensor:
    """One product ``a b^T``: pad to whole blocks (or refuse by name), choose the backend, multiply, cut back."""
    (m, k), n = a.shape, b.shape[0]
    multiple_m, multiple_n, multiple_k = gemm.multiples()
    mp, np, kp = m + -m % multiple_m, n + -n % multiple_n, k + -k % multiple_k
    if (mp, np, kp) != (m, n, k):
        if policy.pad == "refuse":
            raise ValueError(
                f"layer '{stream.layer}': {role} multiplies ({m}, {k}) by ({k}, {n}), but its blocks need multiples of "
                f"{multiple_m}, {multiple_n} and {multiple_k} (rows, columns, contracted); set pad: zero or other sizes"
            )
        a, b = _pad(a, mp, kp), _pad(b, np, kp)
    chosen, _ = choose(policy.backend, gemm, role, mp, np, kp, a.dtype, a.device)
    out = chosen.gemm(a, b, gemm, stream, role, out_dtype)
    return out if out.shape == (m, n) else out[:m, :n]


class QuantizedLinearFunction(torch.autograd.Function):
    """``y = x w^T`` with the products of a :class:`LinearRecipe`."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, recipe: LinearRecipe, stream: Stream, policy: Policy
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.recipe, ctx.stream, ctx.policy = recipe, stream, policy
        return product(x_TK, weight_NK.to(x_TK.dtype), recipe.fprop, "fprop", stream, policy, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_TN = grads[0].contiguous()
        x_TK, weight_NK = ctx.saved_tensors
        recipe, stream, policy = ctx.recipe, ctx.stream, ctx.policy
        dx_TK = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx_TK = product(dy_TN, weight_NK.to(x_TK.dtype).T, recipe.dgrad, "dgrad", stream, policy, x_TK.dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = product(dy_TN.T, x_TK.T, recipe.wgrad, "wgrad", stream, policy, weight_NK.dtype)
        return dx_TK, dw_NK, None, None, None


def quantized_linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, recipe: LinearRecipe, stream: Stream, policy: Policy
) -> Tensor:
    """``y = x w^T + bias`` for x (..., in_features); weight and bias (fp32 masters) are cast to x's dtype."""
    bias_N = None if bias_N is None else bias_N.to(x.dtype)
    if not recipe.quantized:
        return F.linear(x, weight_NK.to(x.dtype), bias_N)
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = x_TK.shape[0]
    if policy.pad == "zero":
        x_TK = _pad(x_TK, tokens + -tokens % TOKEN_TILE, x_TK.shape[1])
    y_TN = QuantizedLinearFunction.apply(x_TK, weight_NK, recipe, stream, policy)
    y = y_TN[:tokens].view(*x.shape[:-1], weight_NK.shape[0])
    return y if bias_N is None else y + bias_N
