"""RMSNorm, arXiv:1910.07467: y = x / sqrt(mean(x^2) + eps) * weight, over the last axis, in fp32.

The weight is fp32 and the product is taken before the result is rounded once, to the input's dtype. No mean is
subtracted and there is no bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x_...C of any float dtype -> the same shape and dtype."""
    return F.rms_norm(x.float(), weight_C.shape, weight_C.float(), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x_...C of any float dtype -> the same shape and dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
