"""The probe: what low precision does to every layer, measured inside the run every so many steps.

A side batch, the first sequences of the validation data, passes forward and backward twice after a step's update: with
every layer unquantised, and with the recipes in force. Hooks take each linear layer's x and dy, and its weight as it is
gathered at that moment; :mod:`lowprec.linear.measure` does the rest, layer by layer. The numbers of the run do not
change: gradients are taken of activations only, nothing is remembered, random bits are functions of the step.

One line of ``probes.jsonl`` a probe::

    {"step", "tokens", "attempt", "seconds", "sharpness", "layers": {layer: {
        "gemms":    {"fprop": {"x": {measures}, "w": {...}, "out": {"sqnr_db", "bias", "cosine"}}, "dgrad": ...},
        "gradient": {"cosine"}     weight gradient against that of the unquantised pass: the errors of all layers
        "error":    {"R", "A", "B", "C", "gain"},                           of the output, arXiv:2509.23500
        "weight":   {"oscillation", "edq", "edq_bf16", "lost_frac"}}}}      see `lowprec.train.motion`

and a summary in metrics.jsonl: ``probe_grad_cosine`` (weight gradients of all layers as one vector),
``probe_sqnr_db`` (mean over products), ``probe_sharpness`` (of the loss at the logits, per cent; see
`lowprec.train.stability`), ``probe_s`` (seconds it took).

Cost: about four micro-batches of the size of the side batch, plus one quantisation of each operand by the definition;
it holds 2 (in + out) bytes a token of the side batch (``probe.tokens`` of it) and layer. The last ``probe.window``
steps before a probe also look at the weights twice (:mod:`lowprec.train.motion`), within their own time. On several
ranks everyone runs the same side batch, and the first rank's parts are measured: under tensor or context parallelism
its part of each matrix. Where the weight is gathered as codes (``comm``), there is no unquantised weight to compare
with: fprop and dgrad are left out.

What this is not: the error of the training batch. And it is refused with a pipeline or DeepSpeed, whose passes cannot
be split like this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.config import ProbeConfig, Run
from lowprec.data import IGNORED, Batch
from lowprec.linear import Call, LinearRecipe, Plan, QuantizedLinear
from lowprec.linear.call import Shared
from lowprec.linear.measure import cosine, decomposition, exact_product, operand_measures, product_measures
from lowprec.linear.plan import compile_pattern
from lowprec.linear.product import product
from lowprec.linear.weight import CodedWeight
from lowprec.model import cross_entropy
from lowprec.parallel import Engine, EngineKind, World
from lowprec.train.metrics import Record
from lowprec.train.stability import sharpness

HighPrecision = Callable[[], Any]
"""Makes a context inside of which every layer runs unquantised."""


def refuse(run: Run) -> None:
    """Raises ValueError where a probe is asked for and cannot be."""
    for key in ("every", "tokens", "window"):
        if getattr(run.probe, key) < 0:
            raise ValueError(f"probe.{key}={getattr(run.probe, key)} must not be negative (0 switches it off)")
    if not run.probe.every:
        return
    if run.probe.sequences < 1:
        raise ValueError(f"probe.sequences={run.probe.sequences} must be at least 1")
    if run.parallel.engine is not EngineKind.fsdp or run.parallel.pp > 1:
        raise ValueError(
            "probe.every needs FSDP2 without pipeline stages (parallel.pp=1, no DeepSpeed): set probe.every=0"
        )
    if not run.data.validation_sequences or not run.data.validation_frac:
        raise ValueError(
            "probe.every measures on validation data and there is none: set data.validation_sequences, or probe.every=0"
        )


class Probe:
    """Measures a model; see the module's text."""

    def __init__(
        self,
        config: ProbeConfig,
        plan: Plan,
        engine: Engine,
        world: World,
        validation: list[Batch],
        z_loss: float = 0.0,
    ) -> None:
        """Raises ValueError if ``probe.layers`` matches no layer that a recipe quantises."""
        self.config, self.plan, self.engine, self.world, self.z_loss = config, plan, engine, world, z_loss
        self.batch = _first(validation, config.sequences)
        recipes = {e.layer: plan.precision.versions(e.recipe) for e in plan.entries}
        pattern = compile_pattern(config.layers, list(recipes))
        self.names = [n for n in recipes if pattern.fullmatch(n) and any(r.quantized for r in recipes[n])]
        if not self.names and (config.layers != "*" or config.rules):
            raise ValueError(
                f"probe.layers={config.layers!r} matches no layer that the recipe quantises: change it, or set "
                "probe.every=0"
            )

    def due(self, steps_done: int) -> bool:
        """Whether to probe after so many steps."""
        return bool(self.config.every) and steps_done % self.config.every == 0

    def run(self, base: dict[str, LinearRecipe], high_precision: HighPrecision) -> Record:
        """``{"seconds", "layers"}``: measures under the recipes of ``base`` by layer; a collective.

        On ranks other than the first the layers are empty.
        """
        started_s = time.perf_counter()
        layers = {name: self.plan.layers[name] for name in self.names if base[name].quantized}
        clean: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        with high_precision():
            self._pass(layers, lambda name, layer, x, dy: clean[name].update(x=x, dy=dy))
        found: dict[str, Record] = {}
        self.engine.regather()

        def measure(name: str, layer: QuantizedLinear, x: Tensor, dy: Tensor) -> None:
            found[name] = self._measure(layer, base[name], x, dy, clean.pop(name))

        logits_BTV = self._pass(layers, measure)
        self.engine.regather()
        self.plan.policy.shared.clear()
        ordered = {name: found[name] for name in layers if name in found}
        at_logits = {}
        if self.engine.vocab is None:
            targets_N = self.engine.part(self.batch.targets).flatten()
            at_logits["sharpness"] = sharpness(logits_BTV.flatten(0, -2), targets_N)
        return {"seconds": time.perf_counter() - started_s} | at_logits | {"layers": ordered}

    def _pass(
        self, layers: dict[str, QuantizedLinear], seen: Callable[[str, QuantizedLinear, Tensor, Tensor], None]
    ) -> Tensor:
        """Forward and backward of the side batch; ``seen`` gets each layer's x (T, K) and dy (T, N) once.

        Returns the logits.
        """
        model, start = self.engine.model, dict[str, Tensor]()
        was_training = model.training
        model.eval()  # layers that remember take no notice
        self.plan.clock.micro = 0
        hooks = [model.embed.register_forward_hook(lambda _, __, out: start.update(embedding=out))]
        done: set[str] = set()
        for name, layer in layers.items() if self.world.is_first else ():
            # before the hooks of tensor parallelism: y and dy are to be the layer's own
            hooks.append(layer.register_forward_hook(partial(self._keep, name, done, seen), prepend=True))
        try:
            with torch.enable_grad():
                logits_BTV = model(*self.engine._inputs(self.batch))
                targets_BT = self.engine.part(self.batch.targets)
                loss_sum, z_sum = cross_entropy(logits_BTV, targets_BT, self.z_loss, self.engine.vocab)
                targets = int((self.batch.targets != IGNORED).sum())
                torch.autograd.grad((loss_sum + z_sum) / targets, [start["embedding"]])
        finally:
            for hook in hooks:
                hook.remove()
            model.train(was_training)
        return logits_BTV.detach()

    def _keep(
        self,
        name: str,
        done: set[str],
        seen: Callable[[str, QuantizedLinear, Tensor, Tensor], None],
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        y: Tensor,
    ) -> None:
        """A forward hook: keeps x now and calls ``seen`` when dy comes by; recomputation passes again, unheard."""
        if name in done or not y.requires_grad:
            return
        done.add(name)
        x_TK = self._rows(inputs[0])

        def backward(dy: Tensor) -> None:
            assert isinstance(layer, QuantizedLinear)
            with torch.no_grad():
                seen(name, layer, x_TK, self._rows(dy))

        y.register_hook(backward)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().flatten(0, -2)[: self.config.tokens or None].clone()

    def _measure(
        self, layer: QuantizedLinear, recipe: LinearRecipe, x: Tensor, dy: Tensor, clean: dict[str, Tensor]
    ) -> Record:
        weight = layer.weight.to_local() if hasattr(layer.weight, "to_local") else layer.weight
        coded = isinstance(weight, CodedWeight)
        tensors = {"x": x, "dy": dy, "w": weight if coded else weight.detach().to(x.dtype)}
        policy = replace(layer.policy, shared=Shared())  # the pass goes on with its own, the same on every rank
        call = Call(recipe, self.plan.clock.stream(layer.layer), policy, layer.state)
        gemms: dict[str, Record] = operand_measures(tensors, call)
        for role, measures in product_measures(tensors, call).items():
            gemms.setdefault(role, {})["out"] = measures
        out: Record = {"gemms": gemms}
        if recipe.quantized:
            gradient, exact = product("wgrad", tensors, call, torch.float32), exact_product("wgrad", clean)
            out["gradient"] = {"cosine": cosine(exact, gradient)}
            out["_gradient"] = [float(v) for v in _moments(exact, gradient)]
        if recipe.fprop.quantized and not coded:
            out["error"] = decomposition(tensors, clean["x"], call)
        return out


def summary(found: Record) -> Record:
    """The keys of metrics.jsonl from what `Probe.run` found; takes its sums out."""
    layers = found["layers"].values()
    moments = [layer.pop("_gradient") for layer in layers if "_gradient" in layer]
    ratios = [g["out"]["sqnr_db"] for layer in layers for g in layer["gemms"].values() if "out" in g]
    ratios = [ratio for ratio in ratios if ratio is not None]
    record: Record = {"probe_s": found["seconds"]}
    if "sharpness" in found:
        record["probe_sharpness"] = found["sharpness"]
    if moments:
        dot, a, b = (sum(m[i] for m in moments) for i in range(3))
        record["probe_grad_cosine"] = dot / (a * b) ** 0.5 if 0 < a * b < math.inf else None
    if ratios:
        record["probe_sqnr_db"] = sum(ratios) / len(ratios)
    return record


def _moments(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """<a, b>, <a, a>, <b, b> in fp64."""
    a, b = a.double(), b.double()
    yield from ((a * b).sum(), a.square().sum(), b.square().sum())


def _first(batches: list[Batch], sequences: int) -> Batch:
    """The first sequences of the validation data, at most those of its first batch."""
    batch = batches[0]
    ids = None if batch.document_ids is None else batch.document_ids[:sequences]
    return Batch(batch.tokens[:sequences], batch.targets[:sequences], ids)
