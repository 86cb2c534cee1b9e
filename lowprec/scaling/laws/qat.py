"""Quantisation-aware training: how its error grows with tokens, group size and bits.

Chen et al., arXiv:2505.14302, the error of W4A4, W4A16 or W16A4 trained from scratch, on top of a BF16 Chinchilla law:

    delta = k D^gamma_D (log2 G)^gamma_G / N^gamma_N            G values share a scale

Dremov et al., arXiv:2509.22935, full precision first and then quantised, by tokens per byte of parameters
S = D/(N P/8):

    delta = theta 2^(-kappa P) + phi 2^(-chi P) / (N^psi S_qat^omega) + lambda 2^(-mu P) / (N^nu S_fp^xi S_qat^rho)
    best share of quantised tokens   f* = exp(-a / ln S),  a = 6.7297

Both quantise with straight-through gradients in bf16 arithmetic; neither is about gradients or backward products in low
precision.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.chinchilla import FEW_EXPONENTS, backbone, surface, yes_or_no
from lowprec.scaling.laws.labels import value

FULL = 16.0  # bits of what is left alone
SOME_EXPONENTS = FEW_EXPONENTS[1:5]


class QAT(ScalingLaw):
    """Chen's law. Parts: "w" for runs that quantise weights alone, "a" for activations alone, "wa" for both.

    Option `joint` (true): runs that quantise both have a part of their own, as W4A4 in the paper. false: their error is
    both (delta_w + delta_a) with one number `both` (.906 in the paper), which tells weights and activations apart and
    needs runs that quantise only one of them. One bit width at a time: the law has no term for bits.

    Answers: how small a group must be; whether weights or activations limit (weights grow faster with tokens); whether
    the input of the second feed-forward layer deserves 8 bits (a set of coefficients of its own). From 268 runs of 74M
    to 595M parameters on 10B to 100B tokens, held out 973M: 4.7 % relative error of delta for W4A4, 8.6 % without D.
    """

    needs = ("N", "D", "bits_w", "bits_a", "block")
    formula = "L = E + A / N^alpha + B / D^beta + k D^gamma_D (log2 G)^gamma_G / N^gamma_N"
    certainty = "coefficients are from a third-party note; they agree with one another (W4A4 and .906 (W4A16 + W16A4))"

    def __init__(self, joint: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.joint = yes_or_no("joint", joint)

    def prepare(self, columns: Columns) -> Columns:
        """With masks of the parts and log2 of the group. Raises ValueError for groups of one and mixed bit widths."""
        block = np.asarray(columns["block"], dtype=np.float64)
        w, a = (np.asarray(columns[f"bits_{x}"], dtype=np.float64) < FULL for x in "wa")
        if (block[w | a] <= 1).any():
            raise ValueError("column 'block' has values up to 1 in quantised runs; it is how many values share a scale")
        for x, mask in zip("wa", (w, a)):
            if len(widths := np.unique(np.asarray(columns[f"bits_{x}"])[mask])) > 1:
                raise ValueError(
                    f"law qat is about one bit width, and bits_{x} has {', '.join(f'{b:g}' for b in widths)}: fit them "
                    "apart, or use the law delta, kumar or capacity"
                )
        logs = np.log2(np.where(w | a, block, 2.0))
        return {**columns, "log2_block": logs, "quantised_w": w, "quantised_a": a}

    def _parts(self, columns: Columns) -> tuple[str, ...]:
        w, a = (np.asarray(columns[f"bits_{x}"], dtype=np.float64) < FULL for x in "wa")
        apart = {"w": w & ~a, "a": a & ~w, "wa": w & a} if self.joint else {"w": w, "a": a}
        return tuple(name for name, mask in apart.items() if mask.any())

    def params(self, columns: Columns) -> tuple[Param, ...]:
        found: list[Param] = []
        for part in self._parts(columns):
            found += [
                Param(f"k[{part}]", 0.0, 1e3, linear=True, unit={"D": f"-gamma_D[{part}]", "N": f"gamma_N[{part}]"}),
                Param(f"gamma_N[{part}]", 0.0, 1.5, (0.2, 0.35)),
                Param(f"gamma_D[{part}]", -0.2, 1.0, (0.05, 0.15)),
                Param(f"gamma_G[{part}]", 0.0, 3.0, (0.4, 0.9)),
            ]
        w, a = (np.asarray(columns[f"bits_{x}"], dtype=np.float64) < FULL for x in "wa")
        if not self.joint and (w & a).any():
            found.append(Param("both", 0.2, 2.0, (0.9,)))
        return (*backbone(starts=FEW_EXPONENTS), *found)

    def part(self, theta: Theta, part: str, N: Any, D: Any, group: Any) -> Any:
        """delta of one part ("w", "a", "wa") in nats at N, D and a group size above 1, from natural coefficients."""
        return self._delta(theta, part, N, D, np.log2(group))

    def _delta(self, theta: Theta, part: str, N: Any, D: Any, logs: Any) -> Any:
        k, N_power, D_power, G_power = (
            value(theta, f"{name}[{part}]") for name in ("k", "gamma_N", "gamma_D", "gamma_G")
        )
        return k * D**D_power * logs**G_power * N**-N_power

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats above the unquantised surface."""
        w, a, where = (
            columns["quantised_w"],
            columns["quantised_a"],
            (columns["N"], columns["D"], columns["log2_block"]),
        )
        found: Any = 0.0
        if self.joint:
            for part, mask in (("w", w & ~a), ("a", a & ~w), ("wa", w & a)):
                if mask.any():
                    found = np.where(mask, self._delta(theta, part, *where), found)
            return found
        for part, mask in (("w", w), ("a", a)):
            if mask.any():
                found = found + np.where(mask, self._delta(theta, part, *where), 0.0)
        return np.where(w & a, value(theta, "both"), 1.0) * found if (w & a).any() else found

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N"], columns["D"]) + self.gap(theta, columns)


class ComputeOptimalQAT(ScalingLaw):
    """Dremov's law of full-precision training followed by weight-only QAT. Column qat_frac: share of quantised tokens.

    Three errors: of the bits for ever, of too little QAT, and of full-precision training that QAT has to undo. The last
    is left out where all tokens were quantised (S_fp = 0 has no power): those runs are not the limit of a short first
    phase. Answers: what share of the tokens to train quantised (`best_share` from the fit,
    `predicted_share` from their one-number rule, mean absolute error .091), and which bits win under a memory limit.
    757 runs of 86M to 2.2B parameters, 1 to 6 bits, 2.3B to 1.4T tokens. Fourteen parameters: without several shares,
    bits, sizes and durations it cannot be fitted. Their further result, to decay the learning rate while quantising
    instead of before, is not in the formula.
    """

    needs = ("N", "D", "bits_w", "qat_frac")
    formula = (
        "L = E + A / N^alpha + B / D^beta + theta 2^(-kappa P) + phi 2^(-chi P) / (N^psi S_qat^omega) "
        "+ lambda 2^(-mu P) / (N^nu S_fp^xi S_qat^rho)"
    )
    certainty = "form and a are from third-party notes; the other coefficients were not found"
    pivots: Mapping[str, str] = {"N": "N", "D": "N"}  # tokens per byte stay what they are
    a = 6.7297

    def prepare(self, columns: Columns) -> Columns:
        """With a mask and tokens per byte of both phases. Raises ValueError for quantised weights without QAT."""
        bits, share = np.asarray(columns["bits_w"], np.float64), np.asarray(columns["qat_frac"], np.float64)
        on = bits < FULL
        if (on & ~((share > 0) & (share <= 1))).any():
            raise ValueError("column 'qat_frac' must be above 0 and at most 1 where bits_w is below 16")
        per_byte = columns["D"] / (columns["N"] * bits / 8)
        both = on & (share < 1)
        phases = {"S_qat": np.where(on, per_byte * share, 1.0), "S_fp": np.where(both, per_byte * (1 - share), 1.0)}
        return {**columns, "quantised": on, "two_phases": both, **phases}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            *backbone(starts=SOME_EXPONENTS),
            Param("theta", 0.0, 1e3, linear=True),
            Param("phi", 0.0, 1e3, linear=True, unit={"N": "psi"}),
            Param("lambda", 0.0, 1e3, linear=True, unit={"N": "nu"}),
            Param("kappa", 0.05, 5.0, (0.5, 1.2)),
            Param("chi", 0.0, 5.0, (0.5,)),
            Param("psi", -1.0, 1.5, (0.2,)),
            Param("omega", 0.0, 2.0, (0.3, 0.7)),
            Param("mu", 0.0, 5.0, (0.5,)),
            Param("nu", -1.0, 1.5, (0.2,)),
            Param("xi", -1.5, 1.5, (-0.3, 0.2)),
            Param("rho", -1.0, 2.0, (0.3,)),
        )

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats above a full-precision run of as many tokens."""
        N, bits, S_qat, S_fp = (columns[name] for name in ("N", "bits_w", "S_qat", "S_fp"))
        floor = theta["theta"] * 2.0 ** (-theta["kappa"] * bits)
        short = theta["phi"] * 2.0 ** (-theta["chi"] * bits) * N ** -theta["psi"] * S_qat ** -theta["omega"]
        undo = theta["lambda"] * 2.0 ** (-theta["mu"] * bits) * N ** -theta["nu"] * S_fp ** -theta["xi"]
        undo = np.where(columns["two_phases"], undo * S_qat ** -theta["rho"], 0.0)
        return np.where(columns["quantised"], floor + short + undo, 0.0)

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N"], columns["D"]) + self.gap(theta, columns)

    def predicted_share(self, N: float, D: float, bits: float) -> float:
        """f* = exp(-a / ln S), the published rule; 0 where there is at most one token per byte of parameters."""
        S = D / (N * bits / 8)
        return math.exp(-self.a / math.log(S)) if S > 1 else 0.0

    def best_share(self, theta: Theta, N: float, D: float, bits: float, points: int = 999) -> float:
        """The share of quantised tokens with the smallest loss, of `points` within 0..1, from natural coefficients."""
        share = np.linspace(0, 1, points + 2)[1:-1]
        columns = {"N": N, "D": D, "bits_w": np.full(points, bits), "qat_frac": share}
        return float(share[np.argmin(self.loss(theta, self.prepare(columns)))])
