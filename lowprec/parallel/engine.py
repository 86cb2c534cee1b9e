"""Engine: what the training loop asks of a layout, whatever the layout is.

    engine.backward(micros, loss)       gradients of the step's micro-batches, accumulated and summed over ranks
    engine.clip(max_norm)               the gradient's norm over the whole mesh, and clipping
    engine.update(lr)                   the optimizer's step
    engine.logits(tokens, ids)          this rank's part of the logits, without gradient
    engine.next_logits(tokens)          the logits of the next token, whole, on every rank

This class serves FSDP2, HSDP, tensor and context parallel: one model that every rank runs through. A pipeline
(:mod:`lowprec.parallel.pipeline`) and DeepSpeed (:mod:`lowprec.parallel.zero`) override what differs.

A rank's logits may be a part of the whole: of the sequence (context parallel: ``part`` cuts targets alike), of the
vocabulary (tensor parallel: ``vocab`` is the group that shares it), or none (pipeline: only the last stage has any).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lowprec.data import Batch
from lowprec.model import Transformer
from lowprec.numerics import Clock
from lowprec.parallel.mesh import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

Loss = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the micro-batch, logits, targets), both this rank's part -> what is differentiated, () fp32."""


class Engine:
    """A sharded model and its optimizer.

    Attributes:
        model: this rank's part; parameter names are those of the whole model.
        optimizer: over its parameters.
        world: the mesh.
        clock: what keys random bits; the engine sets its micro-batch.
        vocab: the ranks that share the vocabulary of the logits, or None where a rank has all of it.
    """

    def __init__(self, model: Transformer, optimizer: Optimizer, world: World, clock: Clock) -> None:
        self.model, self.optimizer, self.world, self.clock = model, optimizer, world, clock
        tensor = world.axis("tp")
        self.vocab: dist.ProcessGroup | None = tensor.group if tensor.size > 1 else None

    def init_weights(self, seed: int) -> None:
        """Draws the parameters: the same whatever the layout."""
        self.model.init_weights(seed)

    def backward(self, micros: list[tuple[int, Batch]], loss: Loss) -> None:
        """Accumulates the gradients of `micros`, (number, batch) each; only the last backward sums over ranks."""
        for i, (micro, batch) in enumerate(micros):
            self.clock.micro = micro
            self._accumulate(is_last=i == len(micros) - 1)
            loss(micro, self.model(*self._inputs(batch)), self.part(batch.targets)).backward()

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor | None:
        """This rank's part of the logits of a batch, or None where other ranks have them; a collective."""
        return self.model(*self._inputs(batch))

    def part(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of a (batch, tokens) tensor, on the device: what its logits are compared with."""
        return self.model.part(x_BT.to(self.world.device), 1)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their common L2 norm is at most `max_norm` (0 = any); returns the norm before.

        Squares are summed in fp64, each element of the gradient once over the whole mesh, so the norm does not depend
        on the layout; torch's own does, from the fourth digit on (CPU, fp32), and so would the run, through clipping.
        """
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for gradient in self._gradients():
            if _is_counted_here(gradient):
                square += _local(gradient).square().sum(dtype=torch.float64)
        if self.world.axis("replicate").rank != 0:
            square.zero_()  # the copies of another rank
        if self.world.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt().float()
        if max_norm:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self._gradients():
                _local(gradient).mul_(scale)
        return norm

    def update(self, lr: float) -> None:
        """One step of the optimizer with the gradients there are, which are gone afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forgets the gradients: the step is not taken."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def next_logits(self, tokens: list[int]) -> Tensor:
        """(vocabulary,) fp32 on the CPU: what may follow `tokens`, the same on every rank; a collective."""
        tokens_1T = torch.tensor([tokens], device=self.world.device)
        return self.model(tokens_1T)[0, -1].float().cpu()

    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ...}, by the parameter names of the whole model; tensors stay sharded."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, in place."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        device = self.world.device
        return batch.tokens.to(device), None if batch.document_ids is None else batch.document_ids.to(device)

    def _accumulate(self, is_last: bool) -> None:
        """Says whether the next backward pass is the step's last: only that one sums over ranks and frees weights."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last)
        self.model.set_reshard_after_backward(is_last)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _is_counted_here(gradient: Tensor) -> bool:
    """Whether this rank's part of a gradient is its own: of the ranks with equal parts the first counts it."""
    if not isinstance(gradient, DTensor):
        return True
    coordinate = gradient.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(c == 0 for c, placement in zip(coordinate, gradient.placements) if placement.is_replicate())
