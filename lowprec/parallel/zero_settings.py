"""What DeepSpeed is told: its settings, checked, and how it is started.

`parallel.deepspeed` is DeepSpeed's own configuration (https://www.deepspeed.ai/docs/config-json), for example

    parallel=deepspeed_zero2 +parallel.deepspeed.communication_data_type=bf16
    parallel=deepspeed_zero3 +parallel.deepspeed.zero_optimization.zero_hpz_partition_size=8

and reaches it as it is, ZeRO++ (arXiv:2306.10209: zero_quantized_weights, zero_quantized_gradients,
zero_hpz_partition_size), offloading and buckets included. Refused, in a sentence, is what lowprec decides itself
(OURS), what the installed version no longer has (it says so), and what would fail or do nothing on these ranks.
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from lowprec.linear import Plan
from lowprec.parallel.config import ParallelConfig
from lowprec.parallel.mesh import World

_CHECKPOINT = "checkpoints are lowprec's (train.checkpoint_every)"
_DTYPE = "dtypes are lowprec's (train.dtype and the precision recipe), and DeepSpeed holds fp32 masters"
_SUM = "lowprec sums gradients and accumulates them by train.global_batch and train.micro_batch"
_LAYOUT = "DeepSpeed only shards here; for other layouts choose parallel=tp, fsdp_tp, cp or pp"
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
    "compile": "blocks are not compiled under DeepSpeed's hooks",
    "tensor_parallel": _LAYOUT,
    "expert_parallel": _LAYOUT,
    "pipeline": _LAYOUT,
    "sequence_parallel_size": _LAYOUT,
    "seq_parallel_communication_data_type": _LAYOUT,
    "checkpoint": _CHECKPOINT,
    "data_efficiency": "data is lowprec's (data=...)",
    "zero_optimization.stage": "the stage is parallel.zero_stage (parallel=deepspeed_zero1, 2 or 3)",
    "zero_optimization.memory_efficient_linear": "it would replace torch's linear layer in the whole process",
    "zero_optimization.compute_grad_norm": "the norm is lowprec's",
    "zero_optimization.zenflow": "it has an update rule of its own",
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19 mixes up the optimizer's state of parameters under it",
    "zero_optimization.zero_quantized_nontrainable_weights": "every parameter is trained",
}
"""Settings of DeepSpeed that lowprec decides or cannot serve, and why."""

PASSED = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "log_level",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
)
"""Settings that reach DeepSpeed. It drops a name that it does not know without a word: hence a list."""

ONLY_STAGE_3 = (
    "stage3_",
    "zero_hpz_partition_size",
    "zero_quantized_",
    "offload_param",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)
"""Beginnings of the names in `zero_optimization` that the other stages do not read."""

_UNSAID = ("OVERFLOW", "untested optimizer")
"""Warnings of DeepSpeed that tell nothing: the guard says why a step is dropped, and optimizers are tested here."""


def load(device: torch.device) -> Any:
    """The module `deepspeed`, for the run's device, and quiet. Raises ValueError if it, or its version, is missing."""
    os.environ["DS_ACCELERATOR"] = device.type
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    install = "pip install 'lowprec[deepspeed]'"
    try:
        deepspeed = import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise ValueError(f"parallel.engine=deepspeed needs the extra deepspeed ({error}): {install}") from error
    if not deepspeed.__version__.startswith("0.19."):
        raise ValueError(f"parallel.engine=deepspeed needs DeepSpeed 0.19, not {deepspeed.__version__}: {install}")
    deepspeed.utils.logger.addFilter(lambda record: not any(text in record.getMessage() for text in _UNSAID))
    return deepspeed


def join(deepspeed: Any, timeout_s: int) -> None:
    """DeepSpeed takes the process group there is, and one with the run's timeout for its collectives."""
    os.environ.setdefault("LOCAL_RANK", "0")  # a run without torchrun
    # What it believes it could compile: nothing. It would compile a shared-memory all-reduce at once, which takes two
    # minutes, or for ever if a compilation was interrupted before.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(verbose=False)
    groups: Any = import_module("deepspeed.utils.groups")
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_s))


def check_layout(plan: Plan, world: World, config: ParallelConfig) -> None:
    """Raises ValueError for what lowprec does not do with DeepSpeed."""
    for axis in ("pp", "replicate", "cp", "tp"):
        size = world.axis(axis).size
        if size > 1:
            raise ValueError(
                f"parallel.{axis}={size}: DeepSpeed only shards here, over all ranks; set it to 1, or choose"
                " parallel.engine=fsdp"
            )
    if config.zero_stage not in (1, 2, 3):
        raise ValueError(f"parallel.zero_stage={config.zero_stage}: ZeRO has the stages 1, 2 and 3")
    if config.compile:
        raise ValueError("parallel.compile=true: blocks are not compiled under DeepSpeed's hooks; set it to false")
    if not config.reshard_after_forward:
        raise ValueError(
            "parallel.reshard_after_forward=false is FSDP2's: with ZeRO-3 set"
            " parallel.deepspeed.zero_optimization.stage3_max_reuse_distance instead"
        )
    if plan.precision.deoscillation:
        raise ValueError(
            "deoscillation sets weights between two updates, and DeepSpeed's masters are out of its reach: leave it"
            " out, or choose parallel=fsdp"
        )


def settings(deepspeed: Any, world: World, config: ParallelConfig) -> dict[str, Any]:
    """What DeepSpeed is started with. Raises ValueError for what cannot be passed on to it."""
    given = dict(config.deepspeed)
    zero = given.get("zero_optimization") or {}
    if not isinstance(zero, dict):
        raise ValueError(f"parallel.deepspeed.zero_optimization={zero} must be a mapping, like {{overlap_comm: true}}")
    for key in (*given, *(f"zero_optimization.{key}" for key in zero)):
        if key in OURS:
            raise ValueError(f"parallel.deepspeed.{key}: {OURS[key]}; remove it")
    complete = {
        "steps_per_print": None,
        **given,
        "zero_optimization": {**zero, "stage": config.zero_stage, "memory_efficient_linear": False},
        "train_micro_batch_size_per_gpu": 1,  # enters only its throughput, which nobody reads
        "gradient_allreduce_op": "mean" if config.zero_stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    try:  # knows what it no longer has, and the names in zero_optimization
        import_module("deepspeed.runtime.config").DeepSpeedConfig(complete)
    except Exception as error:
        raise ValueError(refusal(deepspeed, error)) from error
    for key in given:
        if key not in PASSED:
            raise ValueError(
                f"parallel.deepspeed.{key} is not passed on to DeepSpeed: remove it; what can be set is"
                f" {', '.join(PASSED)}"
            )
    _check_zero(zero, world, config.zero_stage)
    return complete


def _check_zero(zero: dict[str, Any], world: World, stage: int) -> None:
    where = "parallel.deepspeed.zero_optimization"
    for key in zero:
        if stage < 3 and key.startswith(ONLY_STAGE_3):
            raise ValueError(
                f"{where}.{key}: ZeRO-{stage} does not read it; remove it, or choose parallel.zero_stage=3"
            )
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key) and world.device.type == "cpu":
            raise ValueError(f"{where}.{key}: DeepSpeed has no kernels for it on CPU; remove it, or run on CUDA")
    if zero.get("zero_quantized_gradients") and world.size < 2 * torch.cuda.device_count():
        raise ValueError(f"{where}.zero_quantized_gradients: it acts between nodes, and this is one; remove it")
    ranks = zero.get("zero_hpz_partition_size", 1)
    if ranks > 1 and world.size % ranks:
        raise ValueError(f"{where}.zero_hpz_partition_size={ranks} does not divide the {world.size} ranks")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise ValueError(f"{where}.{key}.device=nvme: lowprec's checkpoints need it in memory; choose cpu")


def refusal(deepspeed: Any, error: BaseException) -> str:
    """One sentence out of what DeepSpeed raised."""
    details = getattr(error, "errors", None)  # pydantic's
    if callable(details):
        text = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details())
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return f"DeepSpeed {deepspeed.__version__} refuses parallel.deepspeed: {text}"
