"""Gaps that a precision adds to the loss: a power of tokens over a power of size.

    L = E + A / N^alpha + B / D^beta + k[p] D^gamma_D[p] / N^gamma_N[p]

The form of Chen et al. (arXiv:2505.14302) without the group size, one set for every precision p. It answers: what the
precision costs at a size and duration, and where a gap that grows with tokens passes what the speed-up buys. In fits of
public NVFP4 runs it extrapolates best to larger N (.002 nats) and overshoots in D beyond a few hundred tokens per
parameter, where the gap stops growing: use `efficiency` there.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.chinchilla import EXPONENTS, backbone, surface, yes_or_no
from lowprec.scaling.laws.labels import REFERENCES, masks, occurring, pick, references, value


class Delta(ScalingLaw):
    """Options: `by` ("precision"): the column of labels; `shared` (false): one gamma_D and gamma_N for all labels,
    which few runs a precision need; `reference`: labels without a gap.

    Gaps are non-negative. Fitted together with the surface; where every low-precision run has a reference run of the
    same N, D and data, the paired gaps are the sharper data.
    """

    formula = "L = E + A / N^alpha + B / D^beta + k[p] D^gamma_D[p] / N^gamma_N[p]"
    certainty = "the coefficients listed for NVFP4 are our own fit to public runs of 30M to 100M parameters"

    def __init__(
        self, by: str = "precision", shared: bool = False, reference: Iterable[str] = REFERENCES, **options: Any
    ) -> None:
        super().__init__(**options)
        self.by, self.shared = by, yes_or_no("shared", shared)
        self.reference = references(reference)
        self.needs = ("N", "D", by)

    def prepare(self, columns: Columns) -> Columns:
        """With one mask a label."""
        return {**columns, **masks("k", columns[self.by], self.reference)}

    def _exponents(self, label: str) -> tuple[str, str]:
        return ("gamma_D", "gamma_N") if self.shared else (f"gamma_D[{label}]", f"gamma_N[{label}]")

    def params(self, columns: Columns) -> tuple[Param, ...]:
        found: dict[str, Param] = {}
        for label in occurring(columns[self.by], self.reference):
            D_power, N_power = self._exponents(label)
            k = f"k[{label}]"
            found[k] = Param(k, 0.0, 1e3, linear=True, unit={"D": f"-{D_power}", "N": N_power})
            found[D_power] = Param(D_power, -0.3, 1.0, (0.0, 0.1, 0.25))
            found[N_power] = Param(N_power, -0.3, 1.5, (0.1, 0.25, 0.45))
        return (*backbone(starts=EXPONENTS[1::2]), *found.values())

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats above the reference."""
        found: Any = 0.0
        for key in [key for key in columns if key.startswith("k[")]:
            D_power, N_power = (value(theta, name) for name in self._exponents(key[2:-1]))
            delta = value(theta, key) * columns["D"] ** D_power * columns["N"] ** -N_power
            found = np.where(columns[key], delta, found)
        return found

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N"], columns["D"]) + self.gap(theta, columns)


class MixedQuantization(ScalingLaw):
    """Loss over the share of the parameters that is quantised. A form of our own:

        L = E + A / N^alpha + B / D^beta + k[p] r^g / N^gamma_N          r = quantized_frac, one k for every precision

    Cao et al. (arXiv:2410.06722) show that larger models bear a larger r, and say of their law that size and ratio act
    multiplicatively, which this form shares; their formula (about post-training quantisation, with the block size) was
    not at hand. Answers: how many layers to leave in bf16 for a loss that may be lost (`largest_share`). It assumes
    that layers are quantised in a fixed order, the harmless ones first (then g > 1) or not: g belongs to that order.
    """

    needs = ("N", "D", "precision", "quantized_frac")
    formula = "L = E + A / N^alpha + B / D^beta + k[p] r^g / N^gamma_N"
    certainty = "the form is our own; nothing published was used"

    def __init__(self, reference: Iterable[str] = REFERENCES, **options: Any) -> None:
        super().__init__(**options)
        self.reference = references(reference)

    def prepare(self, columns: Columns) -> Columns:
        """With one mask a precision, and shares of 0 out of the way. Raises ValueError for shares outside 0..1."""
        share = np.asarray(columns["quantized_frac"], dtype=np.float64)
        if not ((share >= 0) & (share <= 1)).all():
            raise ValueError("column 'quantized_frac' is not in 0..1; it is the share of quantised parameters")
        return {**columns, "share": np.where(share > 0, share, 1.0), "any": share > 0,
                **masks("k", columns["precision"], self.reference)}  # fmt: skip

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            *backbone(starts=EXPONENTS[1::2]),
            *(
                Param(f"k[{label}]", 0.0, 1e3, linear=True, unit={"N": "gamma_N"})
                for label in occurring(columns["precision"], self.reference)
            ),
            Param("g", 0.05, 10.0, (0.6, 1.0, 2.0)),
            Param("gamma_N", -0.3, 1.5, (0.1, 0.25, 0.45)),
        )

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats above the unquantised run."""
        gap = pick(theta, columns, "k", 0.0) * columns["share"] ** theta["g"] * columns["N"] ** -theta["gamma_N"]
        return np.where(columns["any"], gap, 0.0)

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N"], columns["D"]) + self.gap(theta, columns)

    def largest_share(self, theta: Theta, precision: str, N: float, gap: float) -> float:
        """The largest r whose gap is at most `gap` nats, at most 1; natural coefficients."""
        k = value(theta, f"k[{precision}]")
        return float(min(1.0, (gap * N ** theta["gamma_N"] / k) ** (1 / theta["g"]))) if k > 0 else 1.0
