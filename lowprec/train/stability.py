"""Measures of stability: how sharp the loss is, how often it spikes, how much the learning rate matters.

"To FP8 and Back Again" (arXiv:2405.18710) judges a precision by the share of runs that fail on a grid of learning
rates and seeds, not by one curve, and by the sharpness of the loss at the logits, which grows before a run diverges.
The other two are the spike score of OLMo 2 (arXiv:2501.00656) and the learning-rate sensitivity of arXiv:2309.14322.
Nothing here reads files; :mod:`lowprec.tools.stability` prepares the grid and reports.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

import torch
from torch import Tensor

FEWEST = 20  # steps before a step that a spike is judged by


@torch.no_grad()
def sharpness(logits_NV: Tensor, targets_N: Tensor, epsilon: float = 1e-3) -> float:
    """Keskar's sharpness (arXiv:1609.04836) of the cross-entropy f of a token as a function of its logits x, per cent::

        phi = 100 (max f(x + d) - f(x)) / (1 + f(x))        over |d_i| <= epsilon (|x_i| + 1),  mean over tokens

    Usually the maximum is searched by L-BFGS-B; here it is exact: f rises with every logit but the target's, with
    which it falls, so the maximum is the corner where the target's is lowered and all others are raised.

    Args:
        logits_NV: any floating dtype. targets_N: int64 in [0, V); negative ones are left out (NaN if all are).
        epsilon: size of the box.
    """
    keep_N = targets_N >= 0
    x_NV, target_N = logits_NV[keep_N].float(), targets_N[keep_N]
    reach_NV = epsilon * (x_NV.abs() + 1)
    worst_NV = x_NV + reach_NV
    worst_NV.scatter_add_(1, target_N[:, None], -2 * reach_NV.gather(1, target_N[:, None]))
    f_N, worst_N = (torch.nn.functional.cross_entropy(x, target_N, reduction="none") for x in (x_NV, worst_NV))
    return (100 * (worst_N - f_N) / (1 + f_N)).mean().item()


def spikes(losses: Sequence[float | None], window: int = 1000, sigmas: float = 7.0) -> list[int]:
    """Indices of the losses at least ``sigmas`` standard deviations above the mean of up to ``window`` before them.

    None and what is not finite is a spike. The first FEWEST finite losses cannot be judged and are none.
    """
    found: list[int] = []
    before: list[float] = []
    for i, loss in enumerate(losses):
        if loss is None or not math.isfinite(loss):
            found.append(i)
            continue
        if len(before) >= FEWEST:
            mean, deviation = fmean(before[-window:]), pstdev(before[-window:])
            if deviation > 0 and loss >= mean + sigmas * deviation:
                found.append(i)
        before.append(loss)
    return found


def spike_score(losses: Sequence[float | None], window: int = 1000, sigmas: float = 7.0) -> float:
    """Share of the steps that are spikes (OLMo 2, arXiv:2501.00656: 7 sigmas over 1,000 steps); 0 for no step."""
    return len(spikes(losses, window, sigmas)) / len(losses) if losses else 0.0


def lr_sensitivity(final_losses: Mapping[float, float | None], initial_loss: float) -> float:
    """Mean over learning rates of ``min(loss, initial) - best`` (arXiv:2309.14322), nats: 0 if the rate did not matter.

    Args:
        final_losses: by learning rate; None for a run that diverged, which counts as the initial loss.
        initial_loss: of an untrained model.

    Raises:
        ValueError: without any learning rate.
    """
    if not final_losses:
        raise ValueError("the sensitivity to the learning rate needs the loss of at least one")
    capped = [initial_loss if loss is None else min(loss, initial_loss) for loss in final_losses.values()]
    return fmean(capped) - min(capped)
