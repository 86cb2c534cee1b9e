"""How far a tensor is from its reference: measures shared by tests, benchmarks and tools."""

from __future__ import annotations

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, x: Tensor) -> float:
    """Signal to quantisation-noise ratio, ``10 log10(sum(ref^2) / sum((ref - x)^2))`` in dB; inf if equal, in fp64."""
    signal = reference.double().square().sum()
    noise = (reference.double() - x.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))
