"""DeepSpeed's ZeRO instead of FSDP2: the same steps, metrics and checkpoints through another engine.

ZeRO (arXiv:1910.02054) splits what W data-parallel ranks would all hold. Stage 1 splits the optimizer's state and the
fp32 masters, stage 2 the gradients as well, and stage 3 the parameters too, which is what FSDP2 does:

    stage   weights, gathered in fp32                   gradients, summed in fp32
    1       once a step, after the update               all-reduce, once a step
    2       once a step, after the update               all-reduce, every micro-batch
    3       every micro-batch, forward and backward     reduce-scatter, every micro-batch

The optimizer (over DeepSpeed's flat fp32 pieces of parameters), the learning rate, the gradient's norm, clipping,
accumulation and checkpoints stay lowprec's. DeepSpeed runs in its fp32 mode: its parameters are the masters, and each
layer of a block sees them as copies in the compute dtype, at the very places where FSDP2 casts (`param_dtype`). So a
run equals FSDP2's but for the order of sums, and a checkpoint of either goes on under the other, on any number of
ranks. The price of fp32 is on the wire: FSDP2 gathers weights in bf16.

What this is not: a place for DeepSpeed's own optimizers, schedulers, fp16 and bf16 modes, pipeline, tensor or sequence
parallelism. Which of its settings pass and which are refused: :mod:`lowprec.parallel.zero_settings`. The bytes of its
collectives are not in `wire_bytes`: DeepSpeed sends them itself (its `comms_logger`, with `log_level: info`, tells).

Measured with DeepSpeed 0.19.8 on torch 2.13, CPU and gloo. Private names of DeepSpeed are used for its pieces of
gradients and state, and for the norm by which it decides whether to take a step: hence the pin below 0.20.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowprec.data import Batch
from lowprec.linear import Plan
from lowprec.model import Transformer
from lowprec.numerics import Clock
from lowprec.parallel import zero_settings
from lowprec.parallel.config import ParallelConfig, Recompute
from lowprec.parallel.engine import Engine, Loss
from lowprec.parallel.mesh import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lowprec.parallel.apply import MakeOptimizer

ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""What may update flat pieces of parameters: every element by itself, from state that is zero at first."""


def build(
    model: Transformer,
    plan: Plan,
    world: World,
    config: ParallelConfig,
    dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
) -> ZeroEngine:
    """As `parallelize`, which calls it: lays `model` (on the meta device, `plan` applied) over all ranks.

    The parameters are not initialised. The whole model in fp32 must fit on a device for a moment. Raises ValueError for
    settings that DeepSpeed or this device cannot serve, and if DeepSpeed is not installed.
    """
    from lowprec.parallel.apply import recompute

    deepspeed = zero_settings.load(world.device)
    zero_settings.check_layout(plan, world, config)
    settings = zero_settings.settings(deepspeed, world, config)
    recompute(model, config.recompute)
    for block in model.layers:
        for module in block.modules():
            compute_in(module, dtype, keep=config.recompute is Recompute.full)
    model.to_empty(device=world.device)
    optimizer = make_optimizer(model)
    if type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"optim: DeepSpeed's ZeRO updates flat pieces of parameters, which {type(optimizer).__name__} cannot;"
            f" choose one of {', '.join(cls.__name__ for cls in ELEMENTWISE)} (torch.optim), or parallel=fsdp"
        )
    zero_settings.join(deepspeed, config.timeout_s)
    return ZeroEngine(model, optimizer, world, plan.clock, deepspeed, settings)


class ZeroEngine(Engine):
    """A model under DeepSpeed. `optimizer` is ours, over DeepSpeed's pieces: its parameters are not the model's."""

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        world: World,
        clock: Clock,
        deepspeed: Any,
        settings: dict[str, Any],
    ) -> None:
        """settings: DeepSpeed's, checked. A collective: DeepSpeed takes the parameters over."""
        super().__init__(model, optimizer, world, clock)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.deepspeed = deepspeed
        try:
            self.runner, self.zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ValueError(zero_settings.refusal(deepspeed, error)) from error
        self.stage: int = settings["zero_optimization"]["stage"]
        # DeepSpeed measures the gradient's norm, in fp32, to decide whether to take a step: it is told instead.
        self._told = torch.zeros((), device=world.device)  # 0 = take it, infinite = do not
        self._has_gradients = False
        if self.stage == 3:
            self.zero._get_norm_groups = lambda: [self._told]
        else:
            self.zero.scaled_global_norm = lambda: self._told

    def init_weights(self, seed: int) -> None:
        """Draws the parameters: the same whatever the layout."""
        with self._whole(list(self.model.parameters()), write=True):
            self.model.init_weights(seed)
        self.zero.refresh_fp32_params()

    def backward(self, micros: list[tuple[int, Batch]], loss: Loss) -> None:
        """Accumulates the gradients of `micros`, (number, batch) each. Sums over ranks: stage 1 at the last, others at
        every one, which is what lets them keep 1/W of the gradients."""
        for i, (micro, batch) in enumerate(micros):
            self.clock.micro = micro
            self.runner.set_gradient_accumulation_boundary(i == len(micros) - 1)
            logits = self.runner(*self._inputs(batch))
            self.runner.backward(loss(micro, logits, self.part(batch.targets)), scale_wrt_gas=False)
        self._has_gradients = True
        if self.stage == 3:  # which knows only means
            for gradient in self._gradients():
                gradient.mul_(self.world.size)

    def update(self, lr: float) -> None:
        """One step of the optimizer with the gradients there are, which are gone afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._told.zero_()
        self.runner.step()
        self._has_gradients = False

    def drop_gradients(self) -> None:
        """Forgets the gradients: the step is not taken."""
        if self._has_gradients:
            self._told.fill_(torch.inf)
            self.runner.step()
            self._has_gradients = False

    @property
    def remarks(self) -> list[str]:
        """What is done otherwise than wished, and why; lines for the plan."""
        return ["note: wire_bytes does not count what DeepSpeed sends"] if self.world.size > 1 else []

    # ---- checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ...}: keys, shapes and sharding (rows over all ranks) of FSDP2. A collective; beyond
        the result, which holds 1/W of everything, one whole parameter at a time."""
        self._link_state()
        read = self.deepspeed.utils.safe_get_full_optimizer_state
        model: dict[str, DTensor] = {}
        optim: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            with self._whole([parameter]):
                model[name] = self._rows(parameter.data)
            vectors, scalars = self._state_of(name)
            state = {key: value.clone() for key, value in scalars.items()}
            state |= {key: self._rows(read(parameter, key)) for key in vectors}
            optim |= {f"state.{name}.{key}": value for key, value in state.items()}
        names = dict(zip(self.model.parameters(), model))
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            model[name] = model[names[parameter]]  # a tied head has two
        for group, members in zip(self.optimizer.param_groups, self.groups, strict=True):
            optim |= {f"param_groups.{n}.{key}": v for n in members for key, v in group.items() if key != "params"}
        return {"model": model, "optim": optim}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, in place; also for one of FSDP2's. A collective."""
        self._link_state()
        optim = state["optim"]
        for name, parameter in self.model.named_parameters():
            with self._whole([parameter], write=True):
                parameter.data.copy_(state["model"][name].full_tensor())
            vectors, scalars = self._state_of(name)
            for key in vectors:
                self._write(parameter, key, optim[f"state.{name}.{key}"].full_tensor())
            for key in scalars:
                for piece in self._pieces_of(name):
                    self.optimizer.state[piece][key].copy_(optim[f"state.{name}.{key}"])
        self.zero.refresh_fp32_params()
        for group, members in zip(self.optimizer.param_groups, self.groups, strict=True):
            group |= {key: optim[f"param_groups.{members[0]}.{key}"] for key in group if key != "params"}

    def _whole(self, parameters: list[nn.Parameter], write: bool = False) -> AbstractContextManager[None]:
        """Inside, `parameter.data` is the whole tensor; with `write`, what the first rank leaves there stays."""
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _rows(self, whole: Tensor) -> DTensor:
        """A copy of this rank's rows of a tensor that all ranks have."""
        part = distribute_tensor(whole.detach(), self.world.fsdp, [Shard(0)], src_data_rank=None).clone()
        assert isinstance(part, DTensor)
        return part

    def _write(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """This rank's piece of a state tensor."""
        if self.stage < 3:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # pieces are of equal size: the last is padded
        padded = F.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        piece = padded.view(self.world.size, size)[self.world.rank]
        self.deepspeed.utils.safe_set_local_optimizer_state(parameter, piece, key)

    def _state_of(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The optimizer's state of the first piece of the group that `name` is in: (per element, scalars)."""
        piece = self._pieces_of(name)[0]
        state = {key: value for key, value in self.optimizer.state[piece].items() if isinstance(value, Tensor)}
        vectors = {key: value for key, value in state.items() if value.shape == piece.shape}
        return vectors, {key: value for key, value in state.items() if key not in vectors}

    def _link_state(self) -> None:
        """Lets DeepSpeed find the optimizer's state by parameter. By itself it looks after the first of all groups has
        made its step, when the others have no state yet (0.19.8)."""
        if not self.optimizer.state:
            self._make_state()
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _make_state(self) -> None:
        """The optimizer's state before its first step: made by a step of nothing, then set to 0."""
        pieces = self._pieces()
        before = [(group, group["params"], group["lr"]) for group in self.optimizer.param_groups]
        for i, (group, _, _) in enumerate(before):
            group["params"], group["lr"] = [piece for j, piece in pieces if j == i], 0.0
        gradients = [piece.grad for _, piece in pieces]
        for _, piece in pieces:
            piece.grad = torch.zeros_like(piece)
        self.optimizer.step()
        for (_, piece), gradient in zip(pieces, gradients):
            piece.grad = gradient
        for group, params, lr in before:
            group["params"], group["lr"] = params, lr
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    # ---- DeepSpeed's pieces of this rank

    def _pieces(self) -> list[tuple[int, Tensor]]:
        """(group of the optimizer, flat fp32 masters), several of a group only at stage 3."""
        if self.stage == 3:
            pieces = self.zero.fp32_partitioned_groups_flat
            return [(self.zero.sub_group_to_group_id[i], piece) for i, piece in enumerate(pieces)]
        return list(enumerate(self.zero.single_partition_of_fp32_groups))

    def _pieces_of(self, name: str) -> list[Tensor]:
        """Those of the group that a parameter is in."""
        return [piece for i, piece in self._pieces() if name in self.groups[i]]

    def _gradients(self) -> list[Tensor]:
        """Flat fp32, each element of the gradient on one rank, and padding of zeros."""
        if self.zero.offload_optimizer if self.stage == 3 else self.zero.cpu_offload:
            return [piece.grad for _, piece in self._pieces() if piece.grad is not None]
        return [gradient for part in self.zero.averaged_gradients.values() for gradient in part or ()]


def compute_in(module: nn.Module, dtype: torch.dtype, keep: bool = False) -> None:
    """While `module` runs, its own parameters are `dtype` copies: in the block, where FSDP2 has `param_dtype`.

    Their gradients are so rounded to `dtype` before they are summed, in fp32, as FSDP2's are. The copies are not kept
    for the backward pass, or ZeRO-3 would end the forward pass with a whole model: they are made again from the
    parameters, which are gathered again by then. `keep`: they are (what is recomputed does not outlive its block).
    """
    forward = module.forward
    if dtype == torch.float32 or not module._parameters:
        return

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, *view = kept
        return module._parameters[name].detach().to(dtype).as_strided(*view)  # type: ignore[union-attr]

    def in_dtype(*inputs: Any) -> Any:
        copies = {name: p.to(dtype) for name, p in module._parameters.items() if p is not None}
        names = {copy.untyped_storage().data_ptr(): name for name, copy in copies.items()}

        def pack(x: Tensor) -> Any:
            name = names.get(x.untyped_storage().data_ptr())
            return x if name is None else (name, x.size(), x.stride(), x.storage_offset())

        module.__dict__.update(copies)  # found before the parameters of these names
        try:
            with nullcontext() if keep else saved_tensors_hooks(pack, unpack):
                return forward(*inputs)
        finally:
            for name in copies:
                del module.__dict__[name]

    module.forward = in_dtype
