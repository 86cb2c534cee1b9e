"""QuantizedLinear: ``nn.Linear`` with a recipe.

Parameters and state_dict keys are those of ``nn.Linear``, so checkpoints move freely between precisions. The recipe
is an attribute and not a type: it may change between two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowprec.linear.function import Policy, quantized_linear
from lowprec.linear.precision import load_recipe
from lowprec.linear.recipe import LinearRecipe
from lowprec.numerics import Clock


class QuantizedLinear(nn.Linear):
    """A linear layer whose three products follow a recipe.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        recipe: a :class:`LinearRecipe`, or the name of a shipped one such as ``"nvfp4"``.
        clock: what keys the random bits; advance ``layer.clock.step`` every step (a :class:`Plan` does it for all
        layers). layer: the layer's name in its model; keys the random bits.
        policy: backend and padding.
    """

    recipe: LinearRecipe
    clock: Clock
    layer: str
    policy: Policy

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recipe: LinearRecipe | str = "nvfp4",
        clock: Clock | None = None,
        layer: str = "linear",
        policy: Policy | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        self._configure(recipe, clock or Clock(), layer, policy or Policy())

    def _configure(self, recipe: LinearRecipe, clock: Clock, layer: str, policy: Policy) -> None:
        self.recipe, self.clock, self.layer, self.policy = recipe, clock, layer, policy

    @classmethod
    def convert(
        cls, linear: nn.Linear, recipe: LinearRecipe, clock: Clock, layer: str, policy: Policy
    ) -> QuantizedLinear:
        """Turn an existing layer into a quantised one in place: same object, same parameters, also on meta."""
        linear.__class__ = cls
        assert isinstance(linear, QuantizedLinear)
        linear._configure(recipe, clock, layer, policy)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the input's dtype."""
        return quantized_linear(input, self.weight, self.bias, self.recipe, self.clock.stream(self.layer), self.policy)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"
