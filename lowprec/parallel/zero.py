"""DeepSpeed's ZeRO instead of FSDP2: the same steps, metrics and checkpoints through another engine.

ZeRO (arXiv:1910.02054) splits what W data-parallel ranks would all hold. Stage 1 splits the optimizer's state (with the
fp32 masters), stage 2 also the gradients, stage 3 also the parameters, which is what FSDP2 does:

    a step at stage   gathered                              summed                        bytes a parameter
    1                 fp32 weights, once, after the update  fp32 gradients, once          4 + 2 x 4
    2                 the same                              ... for each micro-batch
    3                 fp32 weights, twice a micro-batch     ... for each micro-batch

What stays lowprec's: the optimizer (over DeepSpeed's flat fp32 pieces of parameters), the learning rate, the gradient's
norm and clipping, accumulation, checkpoints. DeepSpeed runs in fp32 mode: its parameters are the masters, and each
layer of a block sees them as copies in the compute dtype, at the very places where FSDP2 casts (`param_dtype`). So a
run equals FSDP2's but for the order of sums, and a checkpoint of either continues under the other, on any number of
ranks.

What this is not: a place for DeepSpeed's own optimizers, schedulers, fp16/bf16 modes, pipeline, tensor or sequence
parallelism. Settings in `parallel.deepspeed` reach it as they are (ZeRO++, arXiv:2306.10209: zero_quantized_weights,
zero_quantized_gradients, zero_hpz_partition_size; offloading; buckets) unless they are lowprec's to decide, gone from
the installed version, or would do nothing here; then a sentence says so. The bytes of its collectives are not in
`wire_bytes`: they happen inside DeepSpeed (its own `comms_logger` prints them).

Measured on DeepSpeed 0.19.8, torch 2.13, CPU and gloo. It needs private names of DeepSpeed in two places (the gradient
pieces, and the norm by which it decides whether to take a step): hence the pin below 0.20.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowprec.data import Batch
from lowprec.linear import Plan
from lowprec.model import Transformer
from lowprec.numerics import Clock
from lowprec.parallel.config import ParallelConfig
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

    deepspeed = load(world.device)
    check_layout(plan, world, config)
    zero_settings = settings(deepspeed, world, config)
    recompute(model, config.recompute)
    for block in model.layers:
        for module in block.modules():
            compute_in(module, dtype)
    model.to_empty(device=world.device)
    optimizer = make_optimizer(model)
    if type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"optim={type(optimizer).__name__}: DeepSpeed's ZeRO updates flat pieces of parameters, which only element-wise "
            f"optimizers may see ({', '.join(cls.__name__ for cls in ELEMENTWISE)}); choose one of these, or parallel=fsdp"
        )
    join(deepspeed, config.timeout_s)
    return ZeroEngine(model, optimizer, world, plan.clock, deepspeed, zero_settings)


class ZeroEngine(Engine):
    """A model under DeepSpeed. `optimizer` is ours, over DeepSpeed's pieces: its parameters are not the model's."""

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        world: World,
        clock: Clock,
        deepspeed: Any,
        zero_settings: dict[str, Any],
    ) -> None:
        """zero_settings: of :func:`settings`. A collective: DeepSpeed takes the parameters over."""
        super().__init__(model, optimizer, world, clock)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.deepspeed = deepspeed
        try:
            self.runner, self.zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_settings)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ValueError(refusal(deepspeed, error)) from error
        self.stage: int = zero_settings["zero_optimization"]["stage"]
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

    # ---- checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ...}: keys, shapes and sharding (rows over all ranks) of FSDP2. A collective; beyond
        the result, which holds 1/W of everything, one whole parameter at a time."""
        self._link_state()
        read = self.deepspeed.utils.safe_get_full_optimizer_state
        model: dict[str, DTensor] = {}
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            with self._whole([parameter]):
                model[name] = self._rows(parameter.data)
            vectors, scalars = self._state_of(name)
            state[name] = {key: value.clone() for key, value in scalars.items()}
            state[name] |= {key: self._rows(read(parameter, key)) for key in vectors}
        shared = dict(zip(self.model.parameters(), model))  # a tied head has two names
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            model[name] = model[shared[parameter]]
        groups = [
            {**group, "params": names} for group, names in zip(self.optimizer.param_groups, self.groups, strict=True)
        ]
        return {"model": model, "optim": {"state": state, "param_groups": groups}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, in place; also for one of FSDP2's. A collective."""
        self._link_state()
        saved = state["optim"]["state"]
        for name, parameter in self.model.named_parameters():
            with self._whole([parameter], write=True):
                parameter.data.copy_(state["model"][name].full_tensor())
            vectors, scalars = self._state_of(name)
            for key in vectors:
                self._write(parameter, key, saved[name][key].full_tensor())
            for key in scalars:
                for piece in self._pieces_of(name):
                    self.optimizer.state[piece][key].copy_(saved[name][key])
        self.zero.refresh_fp32_params()
        for group, settings in zip(self.optimizer.param_groups, state["optim"]["param_groups"], strict=True):
            group |= {key: value for key, value in settings.items() if key != "params"}

    def _whole(self, parameters: list[nn.Parameter], write: bool = False) -> AbstractContextManager[None]:
        """Inside, `parameter.data` is the whole tensor; with `write`, what the first rank leaves there stays."""
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _rows(self, whole: Tensor) -> DTensor:
        """A copy of this rank's rows of a tensor that all ranks have."""
        part = distribute_tensor(whole.detach(), self.world.fsdp, [Shard(0)], src_data_rank=None)
        assert isinstance(part, DTensor)
        return part.clone()

    def _write(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """This rank's piece of a state tensor."""
        if self.stage < 3:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # the last piece is padded
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


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """While `module` runs, its own parameters are `dtype` copies: in the block, where FSDP2 has `param_dtype`.

    Their gradients are so rounded to `dtype` before they are summed, in fp32, as FSDP2's are.
    """
    forward, parameters = module.forward, module._parameters
    if dtype == torch.float32 or not parameters:
        return

    def in_dtype(*inputs: Any) -> Any:
        copies = {name: p.to(dtype) for name, p in module._parameters.items() if p is not None}
        module.__dict__.update(copies)  # found before the parameters of these names
        try:
            return forward(*inputs)
        finally:
            for name in copies:
                del module.__dict__[name]

    module.forward = in_dtype  # type: ignore[method-assign]


# ---- settings


_CHECKPOINT = "checkpoints are lowprec's (train.checkpoint_every)"
_DTYPE = "dtypes are lowprec's (train.dtype and the precision recipe); DeepSpeed holds fp32 masters"
_SUM = "lowprec sums gradients and accumulates them by train.global_batch and train.micro_batch"
_LAYOUT = "DeepSpeed only shards here; other layouts are those of parallel=fsdp_tp, cp and pp"
OURS = {
    "optimizer": "the optimizer is lowprec's (optim=...), and DeepSpeed's 1-bit and 0/1 Adam no longer exist",
    "scheduler": "the learning rate is lowprec's (schedule=...)",
    "gradient_clipping": "gradients are clipped by train.clip_norm",
    "train_batch_size": _SUM,
    "train_micro_batch_size_per_gpu": _SUM,
    "gradient_accumulation_steps": _SUM,
    "managed_gradient_accumulation": _SUM,
    "gradient_allreduce_op": _SUM,
    "prescale_gradients": _SUM,
    "gradient_predivide_factor": _SUM,
    "fp16": _DTYPE,
    "bf16": _DTYPE,
    "torch_autocast": _DTYPE,
    "data_types": _DTYPE,
    "weight_quantization": _DTYPE,
    "activation_checkpointing": "activations are recomputed by parallel.recompute",
    "compile": "DeepSpeed's compiler is not supported",
    "tensor_parallel": _LAYOUT,
    "expert_parallel": _LAYOUT,
    "pipeline": _LAYOUT,
    "sequence_parallel_size": _LAYOUT,
    "seq_parallel_communication_data_type": _LAYOUT,
    "checkpoint": _CHECKPOINT,
    "data_efficiency": "data is lowprec's (data=...)",
    "zero_optimization.stage": "the stage is parallel.zero_stage (parallel=deepspeed_zero1, 2 or 3)",
    "zero_optimization.compute_grad_norm": "the norm is lowprec's",
    "zero_optimization.zenflow": "it has an update rule of its own",
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.zero_quantized_nontrainable_weights": "every parameter is trained",
}
"""Settings of DeepSpeed that lowprec decides or cannot serve, and why."""

PASSED = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "aio",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "dump_state",
)
"""Settings that reach DeepSpeed. It drops names that it does not know without a word: hence a list."""

ONLY_STAGE_3 = ("stage3_", "zero_hpz_partition_size", "zero_quantized_", "offload_param", "sub_group_size")
ONLY_CUDA = ("zero_quantized_weights", "zero_quantized_gradients")


def load(device: torch.device) -> Any:
    """The module `deepspeed`, on the run's device and quiet. Raises ValueError if it is missing or of another version."""
    os.environ["DS_ACCELERATOR"] = device.type
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        deepspeed = import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"parallel=deepspeed_zero needs the extra deepspeed ({error.name} is missing): pip install 'lowprec[deepspeed]'"
        ) from error
    if not deepspeed.__version__.startswith("0.19."):
        raise ValueError(
            f"parallel=deepspeed_zero is made for DeepSpeed 0.19 and finds {deepspeed.__version__}: "
            "pip install 'lowprec[deepspeed]'"
        )
    deepspeed.utils.logger.addFilter(lambda record: "OVERFLOW" not in record.getMessage())  # a step that is dropped
    return deepspeed


def join(deepspeed: Any, timeout_s: int) -> None:
    """DeepSpeed takes the process group there is, and a group with the run's timeout for its collectives."""
    os.environ.setdefault("LOCAL_RANK", "0")  # a run without torchrun
    # It would compile a shared-memory all-reduce: two minutes, and for ever if a compilation was once interrupted.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    import_module("deepspeed.utils.groups")._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_s))


def check_layout(plan: Plan, world: World, config: ParallelConfig) -> None:
    """Raises ValueError for what DeepSpeed's engine does not do for lowprec."""
    for axis in ("pp", "replicate", "cp", "tp"):
        if world.axis(axis).size > 1:
            raise ValueError(
                f"parallel.{axis}={world.axis(axis).size}: DeepSpeed shards over all ranks and does nothing else here; "
                f"set it to 1, or choose parallel=fsdp with it"
            )
    if config.zero_stage not in (1, 2, 3):
        raise ValueError(f"parallel.zero_stage={config.zero_stage}: ZeRO has the stages 1, 2 and 3")
    if config.compile:
        raise ValueError("parallel.compile=true: blocks are not compiled under DeepSpeed's hooks; leave it out")
    if not config.reshard_after_forward:
        raise ValueError(
            "parallel.reshard_after_forward=false is FSDP2's; DeepSpeed keeps weights by "
            "parallel.deepspeed.zero_optimization.stage3_max_reuse_distance"
        )
    if plan.precision.deoscillation:
        raise ValueError(
            "deoscillation sets weights between two updates, and DeepSpeed's masters are out of its reach: leave it out, "
            "or choose parallel=fsdp"
        )


def settings(deepspeed: Any, world: World, config: ParallelConfig) -> dict[str, Any]:
    """What DeepSpeed is started with. Raises ValueError for what cannot be passed on to it."""
    given = dict(config.deepspeed)
    zero = given.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError("parallel.deepspeed.zero_optimization must be a mapping")
    complete = {
        **given,
        "zero_optimization": {**zero, "stage": config.zero_stage},
        "train_micro_batch_size_per_gpu": 1,  # only for its throughput figures, which nobody reads
        "gradient_allreduce_op": "mean" if config.zero_stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": given.get("steps_per_print"),
    }
    try:  # first, for it knows what it no longer has
        import_module("deepspeed.runtime.config").DeepSpeedConfig({**complete, **config.deepspeed})
    except Exception as error:
        raise ValueError(refusal(deepspeed, error)) from error
    for key in (*given, *(f"zero_optimization.{key}" for key in zero)):
        if key in OURS:
            raise ValueError(f"parallel.deepspeed.{key}: {OURS[key]}; remove it")
        if "." not in key and key not in PASSED:
            raise ValueError(
                f"parallel.deepspeed.{key} is nothing that lowprec passes on to DeepSpeed; that is {', '.join(PASSED)}"
            )
    check_zero(zero, world, config.zero_stage)
    return complete


def check_zero(zero: dict[str, Any], world: World, stage: int) -> None:
    """Raises ValueError for settings of `zero_optimization` that would fail or do nothing on these ranks."""
    where = "parallel.deepspeed.zero_optimization"
    for key in zero:
        if stage < 3 and key.startswith(ONLY_STAGE_3):
            raise ValueError(
                f"{where}.{key}: ZeRO-{stage} does not read it; remove it, or choose parallel=deepspeed_zero3"
            )
    for key in ONLY_CUDA:
        if zero.get(key) and world.device.type == "cpu":
            raise ValueError(f"{where}.{key}: DeepSpeed has no kernel for it on CPU; remove it, or run on CUDA")
    nodes = world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if zero.get("zero_quantized_gradients") and nodes < 2:
        raise ValueError(
            f"{where}.zero_quantized_gradients: DeepSpeed quantises between nodes, and there is one; remove it"
        )
    ranks = zero.get("zero_hpz_partition_size", 1)
    if ranks > 1 and world.size % ranks:
        raise ValueError(f"{where}.zero_hpz_partition_size={ranks} does not divide the {world.size} ranks")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise ValueError(f"{where}.{key}.device=nvme: lowprec's checkpoints need it in memory; choose cpu")


def refusal(deepspeed: Any, error: BaseException) -> str:
    """One sentence out of what DeepSpeed raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"DeepSpeed {deepspeed.__version__} refuses parallel.deepspeed: {' '.join(lines)}"
