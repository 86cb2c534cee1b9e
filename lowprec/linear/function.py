"""The one autograd function: every recipe runs through it.

Forward and backward make three products (:mod:`lowprec.linear.product`), by default of the *original* tensors, each
quantised for its own product (no double quantisation, arXiv:2509.25149 section 4.3). The stream is taken once in the
forward and kept, so a backward, and a forward that is run again by activation recomputation, draw the same random bits.

What is saved for the backward is x and the weight. With ``save: codes`` the codes of x for wgrad are made in the
forward and kept instead of x: 4.5 bits a value for NVFP4 where bf16 takes 16. The weight may be codes from the start
(:class:`~lowprec.linear.weight.CodedWeight`); its gradient is that of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear.call import TILE, Call, pad_to
from lowprec.linear.cut import bound
from lowprec.linear.product import keep, product
from lowprec.linear.weight import CodedWeight


class QuantizedLinearFunction(torch.autograd.Function):
    """``y = x w^T`` with the products of a :class:`LinearRecipe`."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, call: Call) -> Tensor:
        ctx.call, ctx.dtypes, ctx.kept = call, (x_TK.dtype, weight_NK.dtype), None
        w_NK = weight_NK.to(x_TK.dtype)
        if call.policy.save == "codes" and ctx.needs_input_grad[1]:
            ctx.kept = keep(x_TK, weight_NK.shape[0], call)
        ctx.save_for_backward(None if ctx.kept else x_TK, w_NK)
        return product("fprop", {"x": x_TK, "w": w_NK}, call, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK = ctx.saved_tensors
        tensors, (x_dtype, w_dtype) = {"dy": grads[0].contiguous(), "w": w_NK}, ctx.dtypes
        if x_TK is not None:
            tensors["x"] = x_TK
        dx_TK = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx_TK = product("dgrad", tensors, ctx.call, x_dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = product("wgrad", tensors, ctx.call, w_dtype, ctx.kept)
        return dx_TK, dw_NK, None


def quantized_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, call: Call) -> Tensor:
    """``y = x w^T + bias`` for x (..., in_features); weight and bias (fp32 masters) are cast to x's dtype."""
    if isinstance(weight_NK, CodedWeight) and (why := weight_NK.refusal(call.recipe, x.dtype)):
        raise ValueError(f"layer '{call.stream.layer}': {why}; gather it again for the recipe in force")
    if bias_N is not None and "in" in call.cuts:
        raise ValueError(
            f"layer '{call.stream.layer}': its bias would be added by each of the {call.cuts['in'].ranks} ranks that "
            "share in_features; leave the bias out, or add it once to the sum of their outputs"
        )
    bias_N = None if bias_N is None else bias_N.to(x.dtype)
    if not call.recipe.quantized:
        return F.linear(x, weight_NK.to(x.dtype), bias_N)
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = x_TK.shape[0]
    if call.cuts:
        call = bound(call, tokens, x_TK.shape[1], weight_NK.shape[0])
    if call.policy.pad == "zero" and not call.recipe.counts_rows and "tokens" not in call.cuts:
        x_TK = pad_to(x_TK, tokens + -tokens % TILE, x_TK.shape[1])  # once, not in every product
    y_TN = QuantizedLinearFunction.apply(x_TK, weight_NK, call)
    y = (y_TN if y_TN.shape[0] == tokens else y_TN[:tokens]).view(*x.shape[:-1], weight_NK.shape[0])
    return y if bias_N is None else y + bias_N
