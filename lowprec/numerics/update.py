"""Stochastic rounding to bf16, and the AdamW update that needs it.

bf16 is the upper half of an fp32 number, so 16 random bits added to the lower half before it is cut off carry into the
upper half with exactly the probability ``lower half / 65536``: the mean over the bits is the number itself, no more to
one side than to the other.  ``Stream`` draws 16 bits an element, which fit exactly.

Why it matters: bf16 has 8 significant bits, so an update of less than 2^-9 of a weight is lost by rounding to nearest,
and with it the training of weights that are kept in bf16 alone.  Rounded stochastically it arrives in the mean
(arXiv:2010.06192; arXiv:2502.20566 for language models).  The same holds of second moments in bf16: with beta2 = 0.999
their exponential mean moves by less than half a step, and stops.

What this is not: as good as an fp32 master.  Every step adds the noise of a rounding, up to 2^-7 of the weight, which
the gradient must pull back; it is unbiased, and that is all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def stochastic_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up or down so that the mean over the bits is x.

    Args:
        x: any shape. bits: integers in [0, 65535] of that shape, int32: :meth:`lowprec.numerics.Stream.bits`.

    Returns:
        bf16. Infinities stay, NaN becomes the positive quiet NaN, and numbers beyond the largest bf16 become it or
        infinity.
    """
    high = (x.view(torch.int32) + bits) >> 16  # magnitudes grow with their bits, so "up" is away from zero
    return torch.where(x.isnan(), 0x7FC0, high).to(torch.int16).view(torch.bfloat16)


@dataclass(frozen=True)
class AdamW:
    """What AdamW (arXiv:1711.05101) multiplies by in its step number ``step`` (1, 2, ...); computed in fp64, used as
    fp32."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def factors(self) -> dict[str, float]:
        """decay = 1 - lr weight_decay, and the bias corrections."""
        return {
            "decay": 1 - self.lr * self.weight_decay,
            "new1": 1 - self.beta1,
            "keep2": self.beta2,
            "new2": 1 - self.beta2,
            "root": (1 - self.beta2**self.step) ** 0.5,
            "eps": self.eps,
            "rate": self.lr / (1 - self.beta1**self.step),
        }


def adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, update: AdamW) -> tuple[Tensor, Tensor, Tensor]:
    """The new (weight, mean, square), fp32 from fp32; every operation rounds once.

    ::

        mean   = mean + (grad - mean) (1 - beta1)
        square = square beta2 + grad grad (1 - beta2)
        weight = weight (1 - lr weight_decay) - lr / (1 - beta1^t) * (mean / (sqrt(square) / sqrt(1 - beta2^t) + eps))
    """
    f = {name: weight.new_full((), value) for name, value in update.factors.items()}  # rounded once to fp32
    mean = mean + (grad - mean) * f["new1"]
    square = square * f["keep2"] + (grad * grad) * f["new2"]
    size = square.double().sqrt().float()  # rounded correctly, which a CPU's fp32 square root of torch is not
    ratio = mean / (size / f["root"].expand_as(size) + f["eps"])
    return weight * f["decay"] - ratio * f["rate"], mean, square
