"""Tensor parallelism with sequence parallelism: every matrix is cut, and between the matrices the sequence is.

A pair of matrices is cut so that nothing need be sent between them (Megatron-LM, arXiv:1909.08053): the first by its
output features (*column-parallel*: whole heads, parts of the MLP's width), the second by its input features
(*row-parallel*), whose products are then partial sums. Where no matrix is, each rank has T / tp of the tokens
(arXiv:2205.05198), so norms and residuals are neither computed nor kept twice::

    tokens      all T                       T / tp      all T                                    T / tp
                embed  -> reduce-scatter -> norm -> all-gather -> q k v, own heads, o -> reduce-scatter -> +
                                            norm -> all-gather -> gate up, silu, down -> reduce-scatter -> +
                                            norm -> all-gather -> lm_head -> logits of own part of the vocabulary

    cut by      rows (out): q k v gate up, and by vocabulary embed and lm_head            columns (in): o down

Each all-gather's backward is a reduce-scatter and the other way round, so a block sends as much as with two
all-reduces. The sum of partial products is taken in fp32 and rounded once (:mod:`lowprec.comm.activations`); the
partial products themselves have the activations' dtype, so in bf16 a sum over n ranks carries up to n + 1 roundings
where one process has one. A looked-up embedding is a sum of one row and zeros: exact.

Parameters become DTensors on the mesh's ``tp`` axis, all of them, the replicated norms too: optimizers and checkpoints
then see one kind. Activations stay plain tensors; what a quantised layer needs to know of its cut is its ``cuts``. The
gradient of a norm's weight comes from T / tp tokens (of q and k: from own heads) and is summed over ranks in fp32.

The model knows nothing of this: hooks and two replaced forwards do it. They lie inside a block's forward, so
recomputation runs them again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lowprec.comm.activations import copy_to, gather_sequence, scatter_sequence
from lowprec.comm.codec import Codec
from lowprec.comm.meter import Meter
from lowprec.linear import Plan
from lowprec.linear.attention import AttentionRecipe
from lowprec.linear.call import Cut
from lowprec.model import ModelConfig, Transformer
from lowprec.model.attention import Attention
from lowprec.model.mlp import MLP
from lowprec.model.norm import RMSNorm, rms_norm
from lowprec.parallel.mesh import World

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
"""Linear layers cut by their output features, as the embedding is by its rows."""

ROW = ("o_proj", "down_proj")
"""Linear layers cut by their input features."""


def tensor_parallel(
    model: Transformer, plan: Plan, world: World, codec: Codec | str = "none", meter: Meter | None = None
) -> None:
    """Cuts a model, also on the meta device, over the ``tp`` axis of the mesh; does nothing where that has one rank.

    Args:
        model: with ``plan`` applied.
        codec: what activations travel as; ``none`` is exact.
        meter: where their bytes are counted.

    Raises:
        ValueError: if heads, width or vocabulary do not divide, if blocks of a recipe would straddle ranks, or if a
            recipe of attention draws random bits.
    """
    axis = world.axis("tp")
    if axis.size == 1:
        return
    refuse(model.config, axis.size)
    for core in plan.cores.values():
        _refuse_noise(core.recipe)
    tokens = _Tokens(axis.group, codec, meter)
    _distribute(model, world.mesh["tp"])
    for module in model.modules():
        if isinstance(module, (Attention, MLP)):
            module.register_forward_pre_hook(tokens.before)
        elif isinstance(module, RMSNorm):
            module.forward = partial(_norm, module, tokens)  # type: ignore[method-assign]
    cut = Cut(axis.group, axis.size, axis.rank, count=partial(meter.add, "amax_all_reduce") if meter else None)
    for name, layer in plan.layers.items():
        kind = name.rsplit(".", 1)[-1]
        layer.cuts = {"in" if kind in ROW else "out": cut}
        if kind in ROW:
            layer.register_forward_hook(tokens.after)
    plan.refuse_cuts()
    model.lm_head.register_forward_pre_hook(tokens.before)
    first = axis.rank * (model.config.vocab_size // axis.size)
    model.embed.forward = partial(_look_up, model.embed, first, model.dtype)  # type: ignore[method-assign]
    model.embed.register_forward_hook(tokens.after)


def refuse(config: ModelConfig, ranks: int) -> None:
    """Raises ValueError if a model cannot be cut in so many equal parts."""
    for key in ("heads", "kv_heads", "ffn_dim"):
        size = getattr(config, key)
        if size % ranks:
            raise ValueError(
                f"parallel.tp={ranks} does not divide model.{key}={size}: every rank needs as many; "
                "choose a tp that divides it"
            )
    if config.vocab_size % ranks:
        raise ValueError(
            f"parallel.tp={ranks} does not divide the vocabulary of {config.vocab_size}: pad it with rows that no "
            f"token uses: set model.vocab_multiple={ranks}"
        )


def refuse_scan(config: ModelConfig, tp: int, cp: int) -> None:
    """Raises ValueError if Mamba-2 blocks would be cut: neither their heads nor their sequence are, so far."""
    for axis, ranks in (("tp", tp), ("cp", cp)):
        if ranks > 1 and config.count_blocks("M"):
            raise ValueError(
                f"parallel.{axis}={ranks}: the Mamba-2 blocks of model.pattern are not cut over ranks; set "
                f"parallel.{axis}=1 and share the parameters instead (parallel.shard), or use a pipeline (parallel.pp)"
            )


def _refuse_noise(recipe: AttentionRecipe | None) -> None:
    gemms = [] if recipe is None else [recipe.qk, recipe.pv, recipe.dv, recipe.dp, recipe.dq, recipe.dk]
    if any("stochastic" in (gemm.a.rounding, gemm.b.rounding) for gemm in gemms):
        raise ValueError(
            "parallel.tp: the attention recipe rounds stochastically, and its random bits run through all heads, of "
            "which a rank has some; round to nearest, or set parallel.tp=1"
        )


def _distribute(model: nn.Module, mesh: DeviceMesh) -> None:
    """Makes every parameter a DTensor; what was one parameter in two modules stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        kind = path.rsplit(".", 1)[-1]
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                cut = Shard(0) if kind in COLUMN or kind == "embed" else Shard(1) if kind in ROW else Replicate()
                made[parameter] = nn.Parameter(distribute_tensor(parameter, mesh, [cut], src_data_rank=None))
            setattr(module, name, made[parameter])


class _Tokens:
    """The tokens of a sequence between the ranks of a group: gathered before matrices, summed and scattered after."""

    def __init__(self, group: dist.ProcessGroup, codec: Codec | str, meter: Meter | None) -> None:
        self.group, self.codec, self.meter = group, codec, meter

    @torch.compiler.disable
    def gather(self, x_BSC: Tensor) -> Tensor:
        """All tokens; contiguous, because several linear layers will want rows of it."""
        return gather_sequence(x_BSC, 1, self.group, self.codec, self.meter).contiguous()

    @torch.compiler.disable
    def scatter(self, x_BTC: Tensor) -> Tensor:
        """The sum over ranks, of own tokens."""
        return scatter_sequence(x_BTC, 1, self.group, self.codec, self.meter).contiguous()

    @torch.compiler.disable
    def shared(self, weight: Tensor) -> Tensor:
        """A weight that each rank uses for its own tokens: fp32, and its gradient is the sum."""
        return copy_to(_local(weight).float(), self.group, meter=self.meter)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook: the first argument with all tokens."""
        return self.gather(args[0]), *args[1:]

    def after(self, module: nn.Module, args: tuple[Any, ...], y_BTC: Tensor) -> Tensor:
        """Hook: the output is a partial sum."""
        return self.scatter(y_BTC)


def _norm(norm: RMSNorm, tokens: _Tokens, x: Tensor) -> Tensor:
    return rms_norm(x, tokens.shared(norm.weight), norm.eps)


def _look_up(embed: nn.Embedding, first: int, dtype: torch.dtype, tokens_BT: Tensor) -> Tensor:
    """Rows of own tokens of the vocabulary, zeros for the others, already in the activations' dtype."""
    weight_VC = _local(embed.weight)
    index_BT = tokens_BT - first
    own_BT = (index_BT >= 0) & (index_BT < len(weight_VC))
    x_BTC = F.embedding(index_BT.where(own_BT, 0), weight_VC).to(dtype)
    return x_BTC.where(own_BT[..., None], 0.0)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
