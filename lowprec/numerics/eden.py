"""MS-EDEN: unbiased rounding that puts the randomness into the block scales (Quartet II, arXiv:2601.22813).

Stochastic rounding of the elements is unbiased but doubles the error. EDEN rounds the (randomly rotated) elements to
nearest and instead corrects the length of each group of ``group`` elements: with ``u = x * multiplier`` and ``q =
nearest(u)``, ::

    S = <u, u> / <u, q>          stored scale = SR_e4m3(scale * S)

so that ``<x, Q(x)> = <x, x>`` in expectation. Over the random rotation the rest of the error has no preferred
direction, which makes the *unrotated* estimate unbiased. The correction lies within a few per cent of 1 and e4m3 has
steps of a sixteenth, hence stochastic rounding of the scales: one random number per block instead of one per element.

What this is not: unbiased without fresh signs in every step, nor exactly unbiased on data that one sign-randomised
Hadamard block does not make Gaussian (sparse outliers): there the averaged error stops at a plateau, which a second
rotation round lowers (``docs/numerics.md``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.numerics.element import ELEMENTS
from lowprec.numerics.scale import tree_sum


def correction(u: Tensor, q: Tensor, group: int) -> Tensor:
    """S of every group: u, q (rows, k) fp32 -> (rows, ceil(k / group)); 1 where a group is zero or not finite."""
    pad = (0, -u.shape[1] % group)
    u, q = (F.pad(t, pad).unflatten(1, (-1, group)) for t in (u, q))
    uq = tree_sum(u * q, 2)[..., 0]
    s = tree_sum(u * u, 2)[..., 0] / torch.where(uq == 0, 1.0, uq)
    return torch.where((uq > 0) & s.isfinite(), s, 1.0)


def corrected_scales(scales: Tensor, s: Tensor, per_group: int, storage: str, noise: Tensor) -> Tensor:
    """Block scales (rows, blocks) fp32 times their group's S, rounded stochastically where the storage rounds; fp32."""
    wanted = scales * s.repeat_interleave(per_group, dim=1)[:, : scales.shape[1]]
    return wanted if storage == "fp32" else ELEMENTS[storage].round(wanted, noise)
