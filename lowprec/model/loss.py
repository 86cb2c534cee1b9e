"""Cross entropy and z-loss over a vocabulary, in fp32, without keeping fp32 logits alive.

With z = logsumexp(l) for a token's logits l and its target y:

    loss = z - l[y]            d loss / d l = softmax(l) - onehot(y)
    z-loss = c z^2             d z-loss / d l = 2 c z softmax(l)

The z-loss (arXiv:2204.02311, section 5) keeps the normaliser of the softmax near 1.

Logits arrive in the compute dtype. Both passes walk over them a few rows at a time, so fp32 copies and probabilities
exist for one chunk only, in cache on a CPU; between the passes only z is kept. The gradient is computed in fp32 and
rounded once to the logits' dtype. Rows are independent, so results do not depend on the chunk. Sums are returned, not
means: the caller divides by the number of targets of the whole step, whichever rank or micro-batch they fell on.

Tensor parallelism cuts the vocabulary: with a `group`, each of its ranks holds the logits of a part, and only two
numbers a token and rank are exchanged, the logsumexp z_r of the part and the target's logit (0 where it is not in the
part). All ranks then have z = logsumexp_r(z_r), the same loss, and with it the gradient of their own logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # target of a token that is not counted


def cross_entropy(
    logits_BTV: Tensor, targets_BT: Tensor, z_loss: float = 0.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Summed losses of a batch -> (loss_sum, z_sum), fp32 scalars; train on their sum, report the first.

    logits_BTV: any float dtype. targets_BT: int64 in [0, V), or -100 to leave a token out of both sums.
    z_loss: the coefficient c; z_sum is 0 when it is 0.
    group: the ranks that share the vocabulary: each has an equal part of it, in rank order, and the same targets. Then
    this is a collective (forward only), and all ranks get the same sums.
    Raises ValueError if the shapes do not match or c is negative.
    """
    if logits_BTV.shape[:-1] != targets_BT.shape:
        raise ValueError(
            f"cross_entropy got logits of shape {tuple(logits_BTV.shape)} and targets of {tuple(targets_BT.shape)}: "
            "the targets need the logits' shape without the vocabulary axis."
        )
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}: it must be 0 (off) or positive.")
    return _CrossEntropy.apply(logits_BTV.flatten(0, -2), targets_BT.flatten(), float(z_loss), group)


def _chunks(logits_NV: Tensor) -> list[slice]:
    values = 1 << (19 if logits_NV.device.type == "cpu" else 26)  # a cache's worth of logits; a good launch on a GPU
    rows = max(1, values // logits_NV.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits_NV), rows)]


def _over_ranks(z_N: Tensor, chosen_N: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Both of the whole vocabulary, from those of the ranks' parts; one all-gather, combined alike on every rank."""
    mine_2N = torch.stack([z_N, chosen_N])
    all_R2N = mine_2N.new_empty(dist.get_world_size(group), *mine_2N.shape)
    dist.all_gather_single(all_R2N.view(-1), mine_2N.view(-1), group=group)
    return all_R2N[:, 0].logsumexp(dim=0), all_R2N[:, 1].sum(dim=0)  # one of the chosen is not zero: an exact sum


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, z_loss: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        z_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            z_N[rows] = logits_NV[rows].float().logsumexp(dim=-1)
        counted_N = targets_N != IGNORE
        index_N, here_N = targets_N, counted_N  # here: the target is in this rank's part
        if group is not None:
            index_N = targets_N - dist.get_rank(group) * logits_NV.shape[1]
            here_N = counted_N & (index_N >= 0) & (index_N < logits_NV.shape[1])
        index_N1 = index_N.where(here_N, 0)[:, None]
        chosen_N = logits_NV.gather(1, index_N1)[:, 0].float().where(here_N, 0.0)
        if group is not None:
            z_N, chosen_N = _over_ranks(z_N, chosen_N, group)
        ctx.save_for_backward(logits_NV, index_N1, counted_N, here_N, z_N)
        ctx.z_loss = z_loss
        loss_N = (z_N - chosen_N).where(counted_N, 0.0)
        return loss_N.sum(), z_loss * z_N.square().where(counted_N, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, d_z: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, index_N1, counted_N, here_N, z_N = ctx.saved_tensors
        hot_N1 = torch.where(here_N, -d_loss, 0.0)[:, None]
        soft_N1 = torch.where(counted_N, d_loss + 2 * ctx.z_loss * d_z * z_N, 0.0)[:, None]
        d_logits_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            d_RV = (logits_NV[rows].float() - z_N[rows, None]).exp_().mul_(soft_N1[rows])
            d_logits_NV[rows] = d_RV.scatter_add_(1, index_N1[rows], hot_N1[rows])
        return d_logits_NV, None, None, None
