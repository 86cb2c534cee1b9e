"""Everything that is done to a model to run it on several processes, on one page and in the order it must happen.

    tensor -> context parallel -> recompute -> compile -> pipeline stages -> fully_shard -> codecs -> materialise

- The plan was applied before (on the meta device), so what is cut and sharded are the parameters of quantised layers.
- Parameters stay fp32: they are the master weights. FSDP2 gathers those of a block as `dtype` copies (`param_dtype`)
  and sums gradients in fp32 (`reduce_dtype`), also between micro-batches. The root (embedding, last norm, head) is
  gathered in fp32: in bf16 the gradient of a frequent token would be a bf16 sum of thousands of rows.
- Gradients are *summed* over ranks, not averaged: every micro-batch's loss is already divided by the number of
  targets of the whole step, so the sum is the gradient of the mean.
- Recomputation needs no saved random state: all random bits of quantised layers are functions of (seed, step, micro,
  layer).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lowprec.linear import Plan
from lowprec.model.transformer import Block, Transformer
from lowprec.parallel.config import ParallelConfig, Recompute
from lowprec.parallel.engine import Engine
from lowprec.parallel.mesh import World

MakeOptimizer = Callable[[nn.Module], Optimizer]


def parallelize(
    model: Transformer,
    plan: Plan,
    world: World,
    config: ParallelConfig,
    dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """Lays `model` (on the meta device, `plan` applied) over `world` and gives it uninitialised memory there.

    The caller fills the parameters afterwards, from a seed or from a checkpoint.
    """
    recompute(model, config.recompute)
    shard(model, list(model.layers), world, config, dtype)
    model.to_empty(device=world.device)
    return Engine(model, make_optimizer(model), world, plan.clock)


def recompute(model: Transformer, how: Recompute) -> None:
    """Wraps what is computed again in the backward pass."""
    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.layers:
        assert isinstance(block, Block)
        if how is Recompute.full:
            block.forward = again(block.forward)  # type: ignore[method-assign]
        elif how is Recompute.selective:
            block.attn.core = again(block.attn.core)
            block.mlp.activate = again(block.mlp.activate)


def shard(root: nn.Module, blocks: list[nn.Module], world: World, config: ParallelConfig, dtype: torch.dtype) -> None:
    """FSDP2 over shard x cp: each block is gathered by itself, and what is left of `root` together."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=world.fsdp, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=world.fsdp, mp_policy=root_policy, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
