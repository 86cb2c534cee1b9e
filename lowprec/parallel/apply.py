"""Everything that is done to a model to run it on several processes, on one page and in the order it must happen.

    recompute -> fully_shard each block -> fully_shard the rest -> materialise

- The plan was applied before (on the meta device), so what is sharded are the parameters of quantised layers.
- Parameters stay fp32: they are the master weights. FSDP2 gathers those of a block as `dtype` copies (`param_dtype`)
  and sums gradients in fp32 (`reduce_dtype`), also between micro-batches. The root (embedding, last norm, head) is
  gathered in fp32: in bf16 the gradient of a frequent token would be a bf16 sum of thousands of rows.
- Gradients are *summed* over ranks, not averaged: every micro-batch's loss is already divided by the number of
  targets of the whole step, so the sum is the gradient of the mean.
- Recomputation needs no saved random state: all random bits of quantised layers are functions of (seed, step, micro,
  layer).
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from lowprec.parallel.config import ParallelConfig, Recompute
from lowprec.parallel.mesh import World


def parallelize(
    model: nn.Module, blocks: Iterable[nn.Module], world: World, config: ParallelConfig, dtype: torch.dtype
) -> None:
    """Shards `model` (on the meta device) over `world` in place and gives it uninitialised memory there.

    `blocks` are the units that are gathered and recomputed together (the transformer blocks). The caller initialises
    the parameters afterwards, from a seed or from a checkpoint.
    """
    blocks = list(blocks)
    if config.recompute is Recompute.full:
        for block in blocks:
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=world.mesh, mp_policy=root_policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    model.to_empty(device=world.device)


def accumulate(model: nn.Module, is_last: bool) -> None:
    """Says whether the next backward pass is the step's last: only that one sums over ranks and frees weights."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last)
    model.set_reshard_after_backward(is_last)
