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

from lowprec.comm import CommConfig
from lowprec.linear import Plan, QuantizedLinear
from lowprec.model.transformer import Block, Transformer
from lowprec.parallel.config import EngineKind, ParallelConfig, Recompute
from lowprec.parallel.context import context_parallel
from lowprec.parallel.engine import Engine
from lowprec.parallel.mesh import World
from lowprec.parallel.pipeline import Pipeline, cut
from lowprec.parallel.tensor import refuse_scan, tensor_parallel
from lowprec.parallel.transport import Transport

MakeOptimizer = Callable[[nn.Module], Optimizer]


def parallelize(
    model: Transformer,
    plan: Plan,
    world: World,
    config: ParallelConfig,
    comm: CommConfig,
    dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """Lays `model` (on the meta device, `plan` applied) over `world` and gives it uninitialised memory there.

    The caller fills the parameters afterwards, from a seed or from a checkpoint.
    """
    if config.engine is EngineKind.deepspeed:
        from lowprec.parallel.zero import build  # by need: DeepSpeed is an extra

        return build(model, plan, world, config, dtype, make_optimizer)
    transport = Transport(world, comm, plan, dtype)
    wire = (comm.activation_codec, transport.meter)
    refuse_scan(model.config, world.axis("tp").size, world.axis("cp").size)
    tensor_parallel(model, plan, world, *wire)
    context_parallel(model, plan, world, *wire)
    recompute(model, config.recompute, config.compile_with if config.compile else None)
    stages = cut(model, plan, world.axis("pp"), config.virtual_stages)
    roots: list[nn.Module] = [*stages] if stages else [model]
    for root in roots:
        shard(root, [module for module in root.modules() if isinstance(module, Block)], world, config, dtype)
        root.to_empty(device=world.device)
        transport.install(root)
    optimizer = make_optimizer(model)
    if stages:
        return Pipeline(model, optimizer, world, plan.clock, transport, stages, config.timeout_s)
    return Engine(model, optimizer, world, plan.clock, transport)


def recompute(model: Transformer, how: Recompute, compiler: str | None = None) -> None:
    """Wraps what is computed again in the backward pass, and compiles each block: around what is recomputed inside of
    it, inside of what recomputes it whole. Quantised products stay outside the graphs. A Mamba-2 block always computes
    what lies between its matrices again, but not twice."""
    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.layers:
        assert isinstance(block, Block)
        if how is Recompute.selective:
            if "*" in block.kinds:
                block.attn.core = again(block.attn.core)
            if "-" in block.kinds:
                block.mlp.activate = again(block.mlp.activate)
        if how is Recompute.full and "M" in block.kinds:
            block.mamba.between = block.mamba.mix
        if compiler:
            for layer in block.modules():
                if isinstance(layer, QuantizedLinear):
                    layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
            block.forward = torch.compile(block.forward, backend=compiler)  # type: ignore[method-assign]
        if how is Recompute.full:
            block.forward = again(block.forward)  # type: ignore[method-assign]


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
