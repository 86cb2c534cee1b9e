"""What quantising one layer does: to its products, and, by the first two derivatives of the loss, to the loss.

    output    ||Y - Yq||^2 / ||Y||^2           for each product Y = A B^T of the layer, only this layer being quantised
    Fisher    sum_w E[g_w^2] (w - Q(w))^2      g: gradient of a micro-batch's mean loss
    Hessian   Tr(H_l) / n_l  ||w - Q(w)||^2    HAWQ-V2, arXiv:1911.03852; n_l: the layer's weights

The trace is Hutchinson's: E[v^T H_l v] over vectors v of random signs, H_l v being a double backward pass through the
unquantised model in fp32. Each layer has a v of its own: one v for all layers is as many times cheaper as there are
layers and also unbiased, but its variance takes in the blocks of H between layers, and on a model of 28 layers its
standard error was 15 to 100 times as large. A trace may be negative where the loss is not convex.

What this is not: Fisher and Hessian see the error of the weight alone, in the forward product. Only the output errors
know of activations and gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowprec.data import IGNORED
from lowprec.linear import BF16, LinearRecipe, Operand, Policy, QuantizedLinear
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.linear.state import end_step
from lowprec.numerics import Clock
from lowprec.tools.capture import Captured, Loaded, Micro

Loss = Callable[[], Tensor]


def products(
    c: Captured, recipe: LinearRecipe, name: str, policy: Policy | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """The layer's three products, fp32, of the captured values: y (T, N), dx (T, K), dw (N, K) by role.

    The operands keep the values that the layer saw, but travel as fp32, so that the outputs are not rounded again. A
    recipe that remembers (delayed maxima, moving averages, collected channels) has seen these very tensors once before.
    """
    layer = _layer(c.w_NK, recipe, name, policy, seed)
    x_TK = c.x_TK.float().requires_grad_()

    def run(step: int) -> dict[str, Tensor]:
        layer.clock.step = step
        y_TN = layer(x_TK)
        dx_TK, dw_NK = torch.autograd.grad(y_TN, (x_TK, layer.weight), c.dy_TN.float())
        return {"fprop": y_TN.detach(), "dgrad": dx_TK, "wgrad": dw_NK}

    if not recipe.remembers:
        return run(0)
    begin, end = max((m.span for m in layer.state.memories.values() if m.kind == "total"), default=(0, 1))
    run(begin)
    end_step({name: layer.state}, begin)
    return run(end)


def output_errors(
    c: Captured, recipe: LinearRecipe, name: str, policy: Policy | None = None, seed: int = 0
) -> dict[str, float]:
    """||Y - Yq||^2 / ||Y||^2 by role: 0 for a product that the recipe leaves alone."""
    exact, quantized = products(c, BF16, name), products(c, recipe, name, policy, seed)
    return {
        role: _relative(exact[role], quantized[role]) if getattr(recipe, role).quantized else 0.0
        for role in GEMM_OPERANDS
    }


@torch.no_grad()
def weight_error(w_NK: Tensor, recipe: LinearRecipe, name: str, policy: Policy | None = None, seed: int = 0) -> Tensor:
    """Q(w) - w in the forward product, (N, K) fp32: the product of w with the unquantised identity.

    A rotation of the contracted axis cancels in it, so this is the error in the weight's own coordinates.
    """
    only_w = LinearRecipe(recipe.name, fprop=replace(recipe.fprop, a=Operand(), outer_a=None))
    eye_KK = torch.eye(w_NK.shape[1], device=w_NK.device)
    return _layer(w_NK, only_w, name, policy, seed)(eye_KK).T - w_NK.float()


def _layer(w_NK: Tensor, recipe: LinearRecipe, name: str, policy: Policy | None, seed: int) -> QuantizedLinear:
    out_features, in_features = w_NK.shape
    layer = QuantizedLinear(
        in_features, out_features, False, w_NK.device, torch.float32, recipe, Clock(seed), name, policy
    )
    layer.weight.data.copy_(w_NK)
    return layer


def _relative(exact: Tensor, quantized: Tensor) -> float:
    """Squared error over squared norm, in fp64; 0 for two zeros."""
    error, norm = ((exact - quantized).double().square().sum(), exact.double().square().sum())
    return float(error / norm) if norm else float(error)


def fisher(losses: Sequence[Loss], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E[g^2], the mean over `losses` of the squared gradient of each weight: shapes of the weights."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for loss in losses:
        for name, gradient in zip(weights, torch.autograd.grad(loss(), list(weights.values()))):
            sums[name] += gradient.square()
    return {name: total / len(losses) for name, total in sums.items()}


def hessian_traces(
    losses: Sequence[Loss], weights: Mapping[str, Tensor], probes: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Tr(H_l) of the mean of `losses` for each weight, with the standard error of the estimate.

    probes: products with each layer's block of the Hessian, at least two; the losses take turns. seed: of the signs.
    """
    assert probes >= 2, "a standard error needs two probes"
    generator = torch.Generator().manual_seed(seed)
    estimates: dict[str, list[float]] = {name: [] for name in weights}
    for probe in range(probes):
        gradients = torch.autograd.grad(losses[probe % len(losses)](), list(weights.values()), create_graph=True)
        for (name, weight), gradient in zip(weights.items(), gradients):
            v = (torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0).to(weight)
            (hv,) = torch.autograd.grad(gradient, weight, v, retain_graph=True)
            estimates[name].append(float((v * hv).double().sum()))
    traces = {name: torch.tensor(values, dtype=torch.float64) for name, values in estimates.items()}
    return {name: (float(t.mean()), float(t.std() / probes**0.5)) for name, t in traces.items()}


@contextmanager
def unquantised_losses(loaded: Loaded, count: int) -> Iterator[list[Loss]]:
    """Inside, the next `count` micro-batches as functions that give their mean loss, twice differentiable.

    The model runs in fp32 with every layer unquantised and torch's plain attention where fused ones would run.
    """
    dtype, loaded.model.dtype = loaded.model.dtype, torch.float32
    try:
        with loaded.plan.high_precision(), sdpa_kernel(SDPBackend.MATH):
            yield [partial(mean_loss, loaded, micro) for micro in loaded.micros(count)]
    finally:
        loaded.model.dtype = dtype


def mean_loss(loaded: Loaded, micro: Micro) -> Tensor:
    """Cross-entropy and z-loss per target of a micro-batch: training's loss in operations that differentiate twice."""
    targets_N = micro.batch.targets.to(loaded.device).flatten()
    logits_NV = loaded.forward(micro).flatten(0, 1).float()[targets_N != IGNORED]
    z_N = logits_NV.logsumexp(-1)
    chosen_N = logits_NV.gather(1, targets_N[targets_N != IGNORED][:, None])[:, 0]
    return (z_N - chosen_N + loaded.run.train.z_loss * z_N.square()).mean()
