"""How far a quantised tensor is from its reference: measures shared by tests, probes, benchmarks and tools.

All take tensors of one shape and any floating dtype, compute in fp64 and return a float without unit unless the name
says otherwise. ``relative_error`` is a power ratio: -10 log10 of it is the SQNR in dB. ``bias`` is what averaging over
tokens does not remove: the share by which a tensor's projection on itself shrinks. An error of zero mean has bias 0
whatever its size.
"""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(reference: Tensor, x: Tensor) -> float:
    """``sum((ref - x)^2) / sum(ref^2)``; 0 for two zero tensors, inf where only the reference is zero."""
    signal = reference.double().square().sum().item()
    noise = (reference.double() - x.double()).square().sum().item()
    return noise / signal if signal else (math.inf if noise else 0.0)


def sqnr_db(reference: Tensor, x: Tensor) -> float:
    """Signal to quantisation-noise ratio, ``-10 log10(relative_error)`` in dB; inf if equal."""
    error = relative_error(reference, x)
    return -10 * math.log10(error) if error else math.inf


def bias(reference: Tensor, x: Tensor) -> float:
    """``1 - <ref, x> / <ref, ref>``: positive where x is shorter along the reference; 0 for a zero reference."""
    signal = reference.double().square().sum().item()
    return 1 - (reference.double() * x.double()).sum().item() / signal if signal else 0.0


def underflow_frac(reference: Tensor, x: Tensor) -> float:
    """Share of the nonzero reference elements that became zero."""
    nonzero = reference != 0
    return (nonzero & (x == 0)).sum().item() / max(nonzero.sum().item(), 1)


def saturation_frac(u: Tensor, largest: float) -> float:
    """Share of scaled elements ``u = x / scale`` whose magnitude exceeds the element's ``largest`` value."""
    return (u.abs() > largest).sum().item() / max(u.numel(), 1)


def kurtosis(x: Tensor) -> float:
    """Fourth standardised moment, ``mean((x - m)^4) / mean((x - m)^2)^2``: 3 for Gaussian data, large with outliers;
    NaN for a constant tensor."""
    centred = x.double() - x.double().mean()
    variance = centred.square().mean()
    return (centred.square().square().mean() / variance.square()).item() if variance > 0 else math.nan
