"""QuantizedLinear: ``nn.Linear`` with a recipe.

Parameters and state_dict keys are those of ``nn.Linear``, so checkpoints move freely between precisions. The recipe
is an attribute and not a type: it may change between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.linear.call import Call, Cut, Policy
from lowprec.linear.function import quantized_linear
from lowprec.linear.precision import load_recipe
from lowprec.linear.recipe import LinearRecipe
from lowprec.linear.state import LayerState, memories_of
from lowprec.numerics import Clock


class QuantizedLinear(nn.Linear):
    """A linear layer whose three products follow a recipe.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        recipe: a :class:`LinearRecipe`, or the name of a shipped one such as ``"nvfp4"``.
        clock: what keys the random bits; advance ``layer.clock.step`` every step (a :class:`Plan` does it for all
        layers). layer: the layer's name in its model; keys the random bits.
        policy: backend and padding.

    Attributes:
        cuts: the axes (``tokens``, ``in``, ``out``) of which this rank holds a part; empty unless tensor or context
            parallelism sets them (:mod:`lowprec.linear.cut`). The output, and the input's gradient, are then partial
            sums over ``in`` and over ``out``. ``weight`` may be a DTensor: the layer computes with its local part.
    """

    recipe: LinearRecipe
    clock: Clock
    layer: str
    policy: Policy
    state: LayerState
    cuts: dict[str, Cut]

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
        self._configure([recipe], clock or Clock(), layer, policy or Policy())

    def _configure(self, recipes: Iterable[LinearRecipe], clock: Clock, layer: str, policy: Policy) -> None:
        recipes = list(recipes)
        self.recipe, self.clock, self.layer, self.policy = recipes[0], clock, layer, policy
        self.cuts = {}
        self.state = LayerState(memories_of(recipes, self.out_features, self.in_features))

    @classmethod
    def convert(
        cls, linear: nn.Linear, recipes: Iterable[LinearRecipe], clock: Clock, layer: str, policy: Policy
    ) -> QuantizedLinear:
        """Turn an existing layer into a quantised one in place: same object, same parameters, also on meta.

        Args:
            linear: the layer.
            recipes: the recipe to begin with, then all that the layer may be given later; they decide what it
                remembers between steps.
            clock, layer, policy: as in the constructor.
        """
        linear.__class__ = cls
        assert isinstance(linear, QuantizedLinear)
        linear._configure(recipes, clock, layer, policy)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the input's dtype."""
        stream = self.clock.stream(self.layer)
        observe = self.training and torch.is_grad_enabled()
        call = Call(self.recipe, stream, self.policy, self.state, observe, self.cuts)
        return quantized_linear(input, _local(self.weight), _local(self.bias), call)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # .to(), .cuda(), .to_empty(): the state goes where the weight goes
        if self.weight.device.type != "meta":
            self.state.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def _local(parameter: Any) -> Any:
    """This rank's part of a parameter; its gradient is that of the part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a DTensor, slow to import
