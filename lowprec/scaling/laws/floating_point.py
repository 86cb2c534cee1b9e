"""Floating-point training (Sun et al., arXiv:2501.02423, the Capybara law): exponent bits, mantissa bits, block size.

    L = E + A / N^alpha + B / D^beta + k D^beta / N^alpha  log2(block) / ((e + 1/2)^delta (m + 1/2)^nu)

e exponent and m mantissa bits (the paper's E and M), block = values that share a scale; k = 1/gamma of the paper. The
last term grows with tokens, so beyond

    D_crit = ( B N^alpha (e + 1/2)^delta (m + 1/2)^nu / (k log2 block) )^(1 / (2 beta))

more data makes a model *worse*. It answers: how to split bits into exponent and mantissa, what a smaller block buys,
and where more tokens hurt. From 366 runs of 41M to 679M parameters, 10B to 100B tokens; quantised were the weights
and the operands of the backward products, not the forward's activations; checked at 1.2B, 7B and 70B by a figure only.
It does not know element types without exponents, two-level scales, rotations or stochastic rounding, and D_crit is an
extrapolation by orders of magnitude. A layer left alone is e = 8, m = 7, block = 1: log2(1) = 0 and no gap.
"""

import math
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.chinchilla import FEW_EXPONENTS, backbone, surface


class FloatingPoint(ScalingLaw):
    """See the module. Columns exponent_bits, mantissa_bits, block: of the forward's weights."""

    needs = ("N", "D", "exponent_bits", "mantissa_bits", "block")
    formula = "L = E + A / N^alpha + B / D^beta + k D^beta / N^alpha log2(block) / ((e + .5)^delta (m + .5)^nu)"

    def prepare(self, columns: Columns) -> Columns:
        """With log2 of the block. Raises ValueError for a block below 1."""
        if (np.asarray(columns["block"]) < 1).any():
            raise ValueError("column 'block' has values below 1; it is the number of values that share a scale")
        return {**columns, "log2_block": np.log2(columns["block"])}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            *backbone(starts=FEW_EXPONENTS),
            Param("k", 0.0, 1e3, linear=True, unit={"D": "-beta", "N": "alpha"}),
            Param("delta", 0.1, 10.0, (1.0, 2.0, 3.2)),
            Param("nu", 0.1, 10.0, (1.0, 2.0, 3.2)),
        )

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats above the unquantised surface."""
        grid = exactness(theta, columns["exponent_bits"], columns["mantissa_bits"])
        growth = columns["D"] ** theta["beta"] * columns["N"] ** -theta["alpha"]
        return theta["k"] * growth * columns["log2_block"] / grid

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N"], columns["D"]) + self.gap(theta, columns)

    def critical_tokens(self, theta: Theta, N: Any, exponent_bits: Any, mantissa_bits: Any, block: Any) -> Any:
        """D_crit of a model of N parameters, from natural coefficients; inf without a shared scale (block 1)."""
        grid = exactness(theta, exponent_bits, mantissa_bits)
        with np.errstate(divide="ignore"):
            ratio = theta["B"] * N ** theta["alpha"] * grid / (theta["k"] * np.log2(block))
        return ratio ** (1 / (2 * theta["beta"]))

    def best_split(self, theta: Theta, bits: int) -> tuple[int, int]:
        """(exponent bits, mantissa bits) of the smallest gap; `bits` counts the sign too. The optimum over real numbers
        is m = nu bits / (delta + nu) - 1/2."""
        splits = [(e, bits - 1 - e) for e in range(bits)]
        return max(splits, key=lambda s: math.log(exactness(theta, *s)))


def exactness(theta: Theta, exponent_bits: Any, mantissa_bits: Any) -> Any:
    """(e + 1/2)^delta (m + 1/2)^nu."""
    return (exponent_bits + 0.5) ** theta["delta"] * (mantissa_bits + 0.5) ** theta["nu"]
