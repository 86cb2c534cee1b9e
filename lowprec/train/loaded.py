"""A trained model in one process: the weights of a checkpoint, its plan, and where it stands in its data.

The run's config.yaml says what the model and its data are; a checkpoint gives the weights, what the recipes remember,
and the place in the data. Tensors are those of training, to the last bit: FSDP's cast of a block's parameters to the
compute dtype is done here too. No process group; nothing is written. Tools and `lowprec-eval` look at runs through it.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.config import Run, from_yaml
from lowprec.data import Batch, Data, Loader, build_data
from lowprec.linear import Plan, QuantizedLinear
from lowprec.linear.plan import compile_pattern
from lowprec.model import Transformer, cross_entropy
from lowprec.train import reader
from lowprec.train.checkpoint import committed
from lowprec.train.session import plan_model


@dataclass(frozen=True)
class Captured:
    """What one linear layer multiplied, in the dtype it saw (bf16, unless train.dtype says otherwise), on one device.

    x_TK (tokens, in), w_NK (out, in), dy_TN (tokens, out): dy is the gradient of the training loss, the mean over all
    targets of the global batch.
    """

    x_TK: Tensor
    w_NK: Tensor
    dy_TN: Tensor


@dataclass(frozen=True)
class Micro:
    """One micro-batch of training: its step, its number in the step, tokens, and the targets of the whole step."""

    step: int
    number: int
    batch: Batch
    num_targets: int


@dataclass
class Loaded:
    """A model with weights, its plan, and where it stands in its data. `step` counts the optimizer steps done."""

    run: Run
    model: Transformer
    plan: Plan
    data: Data
    step: int
    place: dict[str, Any] | None  # of the loader; None = the beginning

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    def micros(self, count: int) -> list[Micro]:
        """The next `count` micro-batches that training would take; the same on every call."""
        t = self.run.train
        loader = Loader(
            self.data.train,
            self.run.data.seq_len,
            t.global_batch,
            t.micro_batch,
            0,
            1,
            self.run.seed,
            self.place,
            steps=t.steps,
        )
        taken: list[Micro] = []
        while len(taken) < count:
            step, at = loader.next_step(), self.step + len(taken) * t.micro_batch // t.global_batch
            taken += [Micro(at, number, batch, step.num_targets) for number, batch in step.micros]
        loader.close()
        return taken[:count]

    def forward(self, micro: Micro) -> Tensor:
        """Logits (B, T, V) of a micro-batch, with the random bits and the recipes of its step."""
        self.plan.clock.step, self.plan.clock.micro = micro.step, micro.number
        ids_BT = micro.batch.document_ids
        return self.model(micro.batch.tokens.to(self.device), None if ids_BT is None else ids_BT.to(self.device))

    def backward(self, micro: Micro) -> Tensor:
        """Adds the gradient of this micro-batch's part of the training loss; returns its summed cross-entropy."""
        targets_BT = micro.batch.targets.to(self.device)
        loss_sum, z_sum = cross_entropy(self.forward(micro), targets_BT, self.run.train.z_loss)
        ((loss_sum + z_sum) / micro.num_targets).backward()
        return loss_sum.detach()

    def layers(self, match: str = "*") -> dict[str, QuantizedLinear]:
        """The planned linear layers that match, as in a rule (`*`, `{first:2}`, `{last:15%}`). ValueError if none."""
        names = list(self.plan.layers)
        pattern = compile_pattern(match, names)
        chosen = {name: layer for name, layer in self.plan.layers.items() if pattern.fullmatch(name)}
        if not chosen:
            raise ValueError(f"no linear layer matches '{match}'; the model has {', '.join(names[:8])}, ...")
        return chosen

    def capture(self, match: str = "*", tokens: int | None = None, high_precision: bool = False) -> dict[str, Captured]:
        """Run the next micro-batch forward and backward and keep the operands of the layers that match, by name.

        tokens: keep only that many (the first of the micro-batch, which always runs whole). high_precision: run with
        every layer unquantised; else with the plan. Leaves no gradients. Raises ValueError if no layer matches.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        found: dict[str, list[Tensor]] = {}
        layers = self.layers(match)
        hooks = [layer.register_forward_hook(partial(_keep, found, name, tokens)) for name, layer in layers.items()]
        try:
            with self.plan.high_precision() if high_precision else nullcontext():
                self.backward(self.micros(1)[0])
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)
        return {
            name: Captured(found[name][0], layer.weight.detach().to(found[name][0].dtype), found[name][1])
            for name, layer in layers.items()
        }


def _keep(
    found: dict[str, list[Tensor]], name: str, tokens: int | None, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> None:
    """A forward hook: keeps x now and dy when the backward pass comes by."""

    def rows(x: Tensor) -> Tensor:
        return x.detach().flatten(0, -2)[:tokens].clone()

    found[name] = [rows(inputs[0])]
    y.register_hook(lambda dy: found[name].append(rows(dy)))


def open_run(run_dir: Path, step: int | None = None, precision: Mapping[str, Any] | None = None) -> Loaded:
    """The model of a run folder with the weights of its newest checkpoint, or of the one after `step` steps.

    precision: another precision file's content instead of the run's; then the plan is that of its beginning.
    Raises ValueError if the folder holds no run, no complete checkpoint (of that step), or one that does not fit.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} holds no config.yaml; give the folder of a run (its run.dir)")
    run = from_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    found = committed(run_dir / "checkpoints")
    if not found:
        raise ValueError(
            f"{run_dir} holds no complete checkpoint; let the run reach one (train.checkpoint_every, or its end), or "
            "look at the initial weights of its recipe with --recipe"
        )
    if step is not None and step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    path = found[max(found) if step is None else step]
    if precision is not None:
        run = replace(run, precision=dict(precision))
    model, plan = materialise(run)
    wanted: dict[str, Any] = {"model": model.state_dict(), "progress": ""}
    index = reader.open_index(path)
    memories = {f"precision/{key}": tensor for key, tensor in plan.state_dict().items()}  # as TrainState names them
    held = index.state_dict_metadata
    wanted |= {k: t for k, t in memories.items() if getattr(held.get(k), "size", None) == t.shape}
    reader.read(wanted, path, index)
    read = {k.removeprefix("precision/"): t for k, t in wanted.items() if k in memories}
    plan.load_state_dict(plan.state_dict() | read)
    progress = json.loads(wanted["progress"])
    if precision is None:  # what the controller had raised when this was saved
        raised = progress.get("controller", {}).get("raised", [])
        plan.raised = {(name, gemm): (to, int(i)) for name, gemm, to, i in raised if to in plan.precision.linear}
    loaded = ready(run, model, plan, build_data(run.data, run.seed), progress["step"], progress["loader"])
    if precision is not None:
        plan.at(0.0)
    return loaded


def materialise(run: Run) -> tuple[Transformer, Plan]:
    model, plan = plan_model(run)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    return model, plan


@torch.no_grad()
def ready(run: Run, model: Transformer, plan: Plan, data: Data, step: int, place: dict[str, Any] | None) -> Loaded:
    """Weights as training computes with them, the plan at the step to come (the last one for a finished run)."""
    if run.model.tie_embeddings:  # a head of its own: what is asked is the head's product, not the embedding
        model.lm_head.weight = nn.Parameter(model.embed.weight.clone())
    for parameter in model.layers.parameters():
        parameter.copy_(parameter.to(model.dtype))  # FSDP gathers a block in the compute dtype
    plan.at(min(step, run.train.steps - 1) / run.train.steps)
    return Loaded(run, model, plan, data, step, place)
