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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lowprec.data import Batch
from lowprec.model import Transformer
from lowprec.numerics import Clock
from lowprec.parallel.mesh import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lowprec.parallel.transport import Transport

Loss = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the micro-batch, logits, targets), both this rank's part -> what is differentiated, () fp32."""


_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # ranks of a pipeline hold different parameters


class Engine:
    """A sharded model and its optimizer.

    Attributes:
        model: this rank's part; parameter names are those of the whole model.
        optimizer: over its parameters.
        world: the mesh.
        clock: what keys random bits; the engine sets its micro-batch.
        transport: what FSDP2 sends, and the count of bytes; None where another library sends.
        vocab: the ranks that share the vocabulary of the logits, or None where a rank has all of it.
    """

    def __init__(
        self, model: Transformer, optimizer: Optimizer, world: World, clock: Clock, transport: Transport | None = None
    ) -> None:
        self.model, self.optimizer, self.world, self.clock = model, optimizer, world, clock
        self.transport = transport
        tensor = world.axis("tp")
        self.vocab: dist.ProcessGroup | None = tensor.group if tensor.size > 1 else None

    def init_weights(self, seed: int) -> None:
        """Draws the parameters: the same whatever the layout."""
        self.model.init_weights(seed)
        self._new_weights()

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
        self._new_weights()

    def drop_gradients(self) -> None:
        """Forgets the gradients: the step is not taken."""
        self.optimizer.zero_grad()

    def end_step(self, accept: Tensor | bool) -> None:
        """After the step and its last change of the weights: whether the update was made and sound."""
        if self.transport is not None:
            self.transport.end_step(accept)
        self._new_weights()

    @property
    def remarks(self) -> list[str]:
        """What is done otherwise than wished, and why; lines for the plan."""
        return [] if self.transport is None else self.transport.remarks

    def regather(self) -> None:
        """Frees what is gathered of the weights. Call where recipes change in between: their codes would not fit."""
        if self.transport is not None:
            self.transport.regather()

    def wire_bytes(self) -> dict[str, int]:
        """Logical bytes by collective since the last call (:mod:`lowprec.comm.meter`)."""
        return self.transport.meter.take() if self.transport is not None else {}

    @torch.no_grad()
    def next_logits(self, tokens: list[int]) -> Tensor:
        """(vocabulary,) fp32 on the CPU: what may follow `tokens`, the same on every rank; a collective.

        The sequence is filled up at its end, where a causal model does not look, to a length that the ranks can cut;
        if `model.max_seq_len` leaves no room for that, its first tokens are dropped.
        """
        cp, tp = self.world.axis("cp"), self.world.axis("tp")
        multiple = self.model.multiple
        tokens = tokens[-(self.model.config.max_seq_len // multiple * multiple) :]
        length = len(tokens) + -len(tokens) % multiple
        row_1T = torch.tensor([tokens + tokens[-1:] * (length - len(tokens))], device=self.world.device)
        wanted_T = self.part(torch.arange(length)[None])[0] == len(tokens) - 1  # on one rank of cp, a single token
        logits_V = self._next(row_1T, wanted_T)
        if cp.size > 1:
            dist.all_reduce(logits_V, group=cp.group)
        if tp.size > 1:
            part_V, logits_V = logits_V, logits_V.new_empty(tp.size * len(logits_V))
            dist.all_gather_single(logits_V, part_V, group=tp.group)
        return logits_V.cpu()

    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ...}, by the parameter names of the whole model; tensors stay sharded."""
        model, optim = get_state_dict(self.model, self.optimizer, options=_BY_NAME)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, in place."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            options=_BY_NAME,
        )
        self._new_weights()

    def _new_weights(self) -> None:
        if self.transport is not None:
            self.transport.new_weights()

    def _next(self, tokens_1T: Tensor, wanted_T: Tensor) -> Tensor:
        """(vocabulary / tp,) fp32: this rank's logits at the wanted of its tokens, or zeros."""
        return self.model(tokens_1T)[0, wanted_T].float().sum(dim=0)

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
