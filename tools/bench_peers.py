"""Layers of other libraries to measure ours against: TransformerEngine's and torchao's, where they are installed.

One linear layer without bias, parameters in bf16, used as its documentation says: TransformerEngine under ``autocast``
with the recipe of the same name, torchao's float8 layers compiled.  Their recipes are the nearest of ours, not equal:
NVFP4 of both rounds gradients stochastically with its own random bits.  None of it ran on a machine of ours.

    step = peer("te", "nvfp4", x, dy, w)  # a function that does forward and backward, or a sentence why there is none
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PEERS = {"te": "transformer_engine", "torchao": "torchao"}
TE_RECIPES = {
    "nvfp4": "NVFP4BlockScaling", "mxfp8": "MXFP8BlockScaling", "fp8_blockwise": "Float8BlockScaling",
    "fp8_tensorwise": "Float8CurrentScaling", "fp8_delayed": "DelayedScaling",
}  # fmt: skip
TORCHAO_RECIPES = ("nvfp4", "mxfp8", "fp8_tensorwise", "fp8_rowwise")
SIGNS = (1, -1) * 8  # any will do: no speed depends on them

Step = Callable[[], Any]


def peer(library: str, recipe: str, x: Tensor, dy: Tensor, w: Tensor) -> Step | str:
    """Forward and backward of that library's nearest layer on x (tokens, in), dy (tokens, out), w (out, in) of bf16."""
    known = TE_RECIPES if library == "te" else TORCHAO_RECIPES
    if recipe not in known:
        return "no such recipe"
    if importlib.util.find_spec(PEERS[library]) is None:
        return "not installed"
    try:
        forward = (_te if library == "te" else _torchao)(recipe, x, w)
        step = _step(forward, x, dy, w)
        step()
    except Exception as error:  # of another library, on a machine that we have not seen: its words, and on with ours
        return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return step


def _step(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, w: Tensor) -> Step:
    x = x.detach().clone().requires_grad_()

    def run() -> None:
        x.grad = None
        forward(x).backward(dy)

    return run


def _te(recipe: str, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]
    from transformer_engine.common import recipe as recipes  # type: ignore[import-not-found]

    chosen = getattr(recipes, TE_RECIPES[recipe])()
    layer = te.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=torch.bfloat16, device=x.device)
    with torch.no_grad():
        layer.weight.copy_(w)

    def forward(a: Tensor) -> Tensor:
        layer.weight.grad = None
        with te.autocast(enabled=True, recipe=chosen):
            return layer(a)

    return forward


def _torchao(recipe: str, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16, device=x.device)
    with torch.no_grad():
        linear.weight.copy_(w)
    if recipe == "nvfp4":
        from torchao.prototype.moe_training.nvfp4_training.nvfp4_linear import (  # type: ignore[import-not-found]
            nvfp4_linear,
        )

        return lambda a: nvfp4_linear(a, linear.weight, sign_vector=SIGNS)
    holder = nn.Sequential(linear)
    if recipe == "mxfp8":
        from torchao.prototype.moe_training.config import (  # type: ignore[import-not-found]
            MXFP8TrainingOpConfig,
            MXFP8TrainingRecipe,
        )
        from torchao.quantization.quant_api import quantize_  # type: ignore[import-not-found]

        quantize_(
            holder,
            config=MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_RCEIL),
            filter_fn=lambda m, _: isinstance(m, nn.Linear),
        )
    else:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

        name = "tensorwise" if recipe == "fp8_tensorwise" else "rowwise"
        convert_to_float8_training(holder, config=Float8LinearConfig.from_recipe_name(name))
    compiled = torch.compile(holder)

    def forward(a: Tensor) -> Tensor:
        for parameter in holder.parameters():
            parameter.grad = None
        return compiled(a)

    return forward
