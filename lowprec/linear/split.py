"""Splits: an operand as a sum of parts, each treated in its own way.

Some of what a tensor holds ruins the scale of the rest, and is cheap to take out::

    mean      x = 1 c^T + r      c = mean over tokens. The centre is quantised too (Averis, arXiv:2603.10444) or kept
                                 exact, as a rank-one term of the product; it may be the batch's own mean or an
                                 exponential moving average of earlier steps, which is causal and becomes a bias
    lowrank   x = u v^T + r      the leading directions, found by a random projection (Metis, arXiv:2509.00404)
    channels  x = x m + x (1-m)  the strongest features in a wider format (TetraJet-v2's OutControl, arXiv:2510.27527)
    residual  x = Q(x) + m (x - Q(x)) ...  the strongest features once more, their rounding error quantised again
                                 (CHON, arXiv:2602.02047)

So an operand is a list of matrices to be quantised (:class:`Part`) and perhaps one product of thin factors
(:class:`Thin`). With ``a = sum a_i + u_a v_a^T`` and likewise for ``b``, the product is::

    a b^T = sum_ij Q(a_i) Q(b_j)^T  +  u_a (v_a^T b)^T  +  (a_r v_b) u_b^T

where the thin terms meet the unquantised other side if they are exact, and its dequantised parts if they are
quantised themselves. ``a_r`` is ``a`` without its thin term, so the identity holds whatever was taken out; for means
of the batch the cross terms vanish by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.numerics import Format, Stream

TERMS = ("quantized", "exact")
STATS = ("batch", "ema")


@dataclass(frozen=True)
class MeanSplit:
    """The mean over tokens, apart.

    Attributes:
        term: ``quantized`` (the centre gets the operand's format) or ``exact``.
        stat: ``batch`` (of the tensor at hand) or ``ema`` (of earlier steps; zero before the first).
        decay: of the moving average, per step.
    """

    term: str = "quantized"
    stat: str = "batch"
    decay: float = 0.99

    def __post_init__(self) -> None:
        if self.term not in TERMS or self.stat not in STATS or not 0 <= self.decay < 1:
            raise ValueError(
                f"split mean: term is one of {', '.join(TERMS)}, stat one of {', '.join(STATS)}, 0 <= decay < 1; got "
                f"{self.term}, {self.stat}, {self.decay}"
            )

    @property
    def remembers(self) -> bool:
        return self.stat == "ema"

    def __str__(self) -> str:
        return f"{'moving ' if self.remembers else ''}mean, {self.term}"


@dataclass(frozen=True)
class LowRankSplit:
    """The leading ``rank`` directions, apart."""

    rank: int
    term: str = "quantized"
    remembers = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.term not in TERMS:
            raise ValueError(
                f"split lowrank: rank >= 1 and term one of {', '.join(TERMS)}, got {self.rank}, {self.term}"
            )

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.term}"


@dataclass(frozen=True)
class ChannelSplit:
    """The strongest share ``top`` of features in another format.

    Attributes:
        format: of those features.
        top: share, 0 to 1; rounded up to whole features.
        collect: steps [first, last) over which energy is summed before features are chosen for good; None chooses anew
            from every tensor.
    """

    format: Format
    top: float
    collect: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top < 1 or (self.collect is not None and not 0 <= self.collect[0] < self.collect[1]):
            raise ValueError(f"split channels: 0 < top < 1 and collect [first, last), got {self.top}, {self.collect}")

    @property
    def remembers(self) -> bool:
        return self.collect is not None

    def __str__(self) -> str:
        return f"channels, top {self.top:.0%} in {self.format.name}"


@dataclass(frozen=True)
class ResidualSplit:
    """The rounding error of the strongest share ``top`` of features, quantised once more in ``format``."""

    format: Format
    top: float
    remembers = False

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise ValueError(f"split residual: 0 < top <= 1, got {self.top}")

    def __str__(self) -> str:
        return f"residual, top {self.top:.0%} in {self.format.name}"


Split = MeanSplit | LowRankSplit | ChannelSplit | ResidualSplit


def strongest(energy_K: Tensor, top: float) -> Tensor:
    """Mask (K,) of the ``ceil(top * K)`` features of largest energy; ties to the lower index."""
    count = math.ceil(top * energy_K.numel())
    order = energy_K.nan_to_num(nan=torch.inf).sort(descending=True, stable=True).indices
    mask = torch.zeros_like(energy_K, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def factors(x: Tensor, rank: int, stream: Stream, key: str) -> tuple[Tensor, Tensor]:
    """Thin factors (rows, r), (k, r) in fp32 with ``u v^T`` near x: one step of a randomised range finder."""
    x = x.float()
    probe = stream.signs(key, x.shape[1] * rank, x.device).view(x.shape[1], rank)
    u = torch.linalg.qr(x @ probe).Q
    return u, x.T @ u
