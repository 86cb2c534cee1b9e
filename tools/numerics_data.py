"""Synthetic tensors with the five properties of real ones that break number formats.

One linear layer sees x (tokens T, inputs K), w (outputs N, inputs K) and dy (tokens T, outputs N). Trained models hand
it tensors that are not Gaussian; each kind below isolates one way in which they are not:

``gaussian``          all independent normal; w has variance 1 / K. The yardstick.
``student_t``         x and dy from Student's t with 3 degrees of freedom: single large values anywhere.
``outlier_channels``  one channel in 64 of x and of dy is 30 times larger: it meets every block along tokens, and a few
                      blocks along channels (LLM.int8(), arXiv:2208.07339).
``outlier_tokens``    one token in 256 of x and of dy is 100 times larger, such as a massive activation at the first
                      token (arXiv:2402.17762): it takes the range of a scale that it shares with other tokens.
``channel_means``     one channel in 50 of x has the mean 20, one in 50 of dy the mean 3 (arXiv:2603.10444): what all
                      tokens have in common wastes the range, and is no noise that averages out.

What this is not: data. For the real thing capture tensors of a run (``lowprec-numerics --capture``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("gaussian", "student_t", "outlier_channels", "outlier_tokens", "channel_means")


@dataclass(frozen=True)
class Tensors:
    """The three tensors of one linear layer, in one dtype: x (tokens, in), w (out, in), dy (tokens, out)."""

    x_TK: Tensor
    w_NK: Tensor
    dy_TN: Tensor


def _shares(size: int, one_in: int, generator: torch.Generator) -> Tensor:
    """Indices of one in ``one_in`` of ``size`` places, at least one, in random places."""
    return torch.randperm(size, generator=generator)[: max(1, size // one_in)]


def _student_t(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, fp32: a normal over the root of a chi-squared / 3."""
    chi2 = sum(torch.randn(shape, generator=generator).square() for _ in range(3))
    return torch.randn(shape, generator=generator) * (3 / chi2) ** 0.5


def draw(
    kind: str, shape: tuple[int, int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16, places: int = 0
) -> Tensors:
    """Tensors of one kind, the same on every call.

    Args:
        kind: one of ``KINDS``.
        shape: (tokens, in, out).
        seed: of the values. places: seed of where the outliers are, so that another draw of the same layer keeps them.
        dtype: of the result.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown data '{kind}'; choose one of {', '.join(KINDS)}")
    tokens, inputs, outputs = shape
    values, where = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(places)
    x_TK, dy_TN = torch.randn(tokens, inputs, generator=values), torch.randn(tokens, outputs, generator=values)
    w_NK = torch.randn(outputs, inputs, generator=values) * inputs**-0.5
    for a, mean in ((x_TK, 20.0), (dy_TN, 3.0)):
        if kind == "student_t":
            a.copy_(_student_t((a.shape[0], a.shape[1]), values))
        elif kind == "outlier_channels":
            a[:, _shares(a.shape[1], 64, where)] *= 30
        elif kind == "outlier_tokens":
            a[_shares(tokens, 256, where)] *= 100
        elif kind == "channel_means":
            a[:, _shares(a.shape[1], 50, where)] += mean
    return Tensors(x_TK.to(dtype), w_NK.to(dtype), dy_TN.to(dtype))
