"""Efficiencies: a precision as a share of the parameters and a share of the tokens.

    L = ( A / (N eff_N)^alpha + B / (D eff_D)^beta )^gamma + E

QuEST (Panferov et al., arXiv:2502.05003) fits one eff_N for every forward precision with gamma = 1; Quartet (Castro et
al., arXiv:2505.14669) fits gamma and the surface on BF16 runs first, and finds that the precision of the forward pass
sets eff_N and that of the backward pass eff_D. A reference (bf16) has efficiency 1 exactly. See also free eff_C for
compression in general, arXiv:2502.16440.

They answer: which precision trains best per unit of compute. If it is s times faster end to end, it pays when

    s eff_N eff_D > 1

at the compute-optimal point of any budget (with gamma too). What they cannot do: predict a format that was not trained
(`capacity` can), or a gap that grows without bound with tokens (`delta` can); fits of public NVFP4 runs say that
efficiencies extrapolate better in D, the additive gap better in N.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, Theta
from lowprec.scaling.laws.chinchilla import FEW_EXPONENTS, Chinchilla, backbone, surface
from lowprec.scaling.laws.labels import REFERENCES, masks, occurring, pick, references, value

STARTS = (0.03, 0.15, 0.4, 0.7, 0.9)


class Efficiency(Chinchilla):
    """Options: `eff_N`, `eff_D`: the column whose labels have an efficiency (null: none); `gamma`: 1 or "free";
    `reference`: labels of efficiency 1; `tied`.

    Some run must have a reference label: with none, the efficiencies have no scale and the fit says that its parameters
    cannot be told apart. E and gamma are poorly known from one decade of sizes; the efficiencies are well known anyway.
    """

    formula = "L = (A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E"

    def __init__(
        self,
        eff_N: "str | None" = "precision",
        eff_D: "str | None" = None,
        gamma: "float | str" = 1,
        reference: Iterable[str] = REFERENCES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if gamma not in (1, "free"):
            raise ValueError(f"option gamma is {gamma!r}; it can be 1 or free")
        if not eff_N and not eff_D:
            raise ValueError("law efficiency needs eff_N or eff_D: the column whose labels have an efficiency")
        self.by = {name: column for name, column in (("eff_N", eff_N), ("eff_D", eff_D)) if column}
        self.free_gamma = gamma == "free"
        self.reference = references(reference)
        self.needs = ("N", "D", *dict.fromkeys(self.by.values()))

    def prepare(self, columns: Columns) -> Columns:
        """With one mask a label: ``eff_N[nvfp4]``."""
        found = dict(columns)
        for name, column in self.by.items():
            found |= masks(name, columns[column], self.reference)
        return found

    def params(self, columns: Columns) -> tuple[Param, ...]:
        labels = [
            Param(f"{name}[{label}]", 1e-3, 1.5, STARTS)
            for name, column in self.by.items()
            for label in occurring(columns[column], self.reference)
        ]
        if not self.free_gamma:
            return (*backbone(self.tied), *labels)
        E, A, B, *exponents = backbone(self.tied, FEW_EXPONENTS)
        A, B = (Param(p.name, 1e-6, 300.0, (0.3, 1.0, 3.0), unit=p.unit) for p in (A, B))
        return (E, A, B, *exponents, Param("gamma", 0.05, 1.5, (0.3, 0.6, 1.0)), *labels)

    def effective(self, theta: Theta, columns: "Columns | str") -> tuple[Any, Any]:
        if isinstance(columns, str):
            label = np.array([columns], dtype=object)
            eff_N, eff_D = self.effective(theta, dict.fromkeys(self.by.values(), label))
            return np.ravel(eff_N)[0], np.ravel(eff_D)[0]
        if any(column in columns and not _prepared(columns, name) for name, column in self.by.items()):
            columns = self.prepare(columns)
        return pick(theta, columns, "eff_N", 1.0), pick(theta, columns, "eff_D", 1.0)

    def loss(self, theta: Theta, columns: Columns) -> Array:
        eff_N, eff_D = self.effective(theta, columns)
        N, D = columns["N"] * eff_N, columns["D"] * eff_D
        if "gamma" not in theta:
            return surface(theta, N, D)
        return theta["E"] + surface({**theta, "E": 0.0}, N, D) ** theta["gamma"]

    def efficiencies(self, theta: Theta) -> dict[str, tuple[float, float]]:
        """{label: (eff_N, eff_D)} of all fitted labels; 1 where a label has none."""
        labels = dict.fromkeys(key.partition("[")[2][:-1] for key in theta if key.startswith(("eff_N[", "eff_D[")))
        return {n: (float(theta.get(f"eff_N[{n}]", 1.0)), float(theta.get(f"eff_D[{n}]", 1.0))) for n in labels}


def _prepared(columns: Columns, name: str) -> bool:
    return any(key.startswith(f"{name}[") for key in columns)


class OptimizerEfficiency(Chinchilla):
    """Parameter efficiency of a precision under each optimizer (Vlassis et al., arXiv:2509.23500).

        L = E + A[optimizer] / (N rho[optimizer|precision])^alpha + B / D^beta

    Answers: whether an optimizer that wins in bf16 still wins when quantised: rho is the share of the parameters that
    the precision leaves, and A what the optimizer makes of a size in bf16. The paper fits a surface for every optimizer
    at D = 20 N, where N and D cannot be told apart; E, B and the exponents shared among optimizers are our
    simplification, which a ladder of ordinary size can bear. Every optimizer needs bf16 runs, or its A and rho are one.
    """

    needs = ("N", "D", "optimizer", "precision")
    formula = "L = E + A[optimizer] / (N rho[optimizer|precision])^alpha + B / D^beta"
    certainty = "the published rho are recalled, not read; that the rest is shared among optimizers is our choice"

    def __init__(self, reference: Iterable[str] = REFERENCES, **options: Any) -> None:
        super().__init__(**options)
        self.reference = references(reference)

    def prepare(self, columns: Columns) -> Columns:
        pairs = self._pairs(columns)
        return {**columns, **masks("A", columns["optimizer"]), **masks("rho", pairs, [""])}

    def _pairs(self, columns: Columns) -> Array:
        """(n,) "optimizer|precision"; "" for a reference precision."""
        low = {reference.lower() for reference in self.reference}
        pairs = zip(columns["optimizer"], columns["precision"])
        return np.array(["" if p.lower() in low else f"{o}|{p}" for o, p in pairs], dtype=object)

    def params(self, columns: Columns) -> tuple[Param, ...]:
        E, A, *others = backbone(self.tied)
        sizes = [
            Param(f"A[{label}]", A.low, A.high, linear=True, unit=A.unit) for label in occurring(columns["optimizer"])
        ]
        shares = [Param(f"rho[{label}]", 1e-3, 1.5, STARTS) for label in occurring(self._pairs(columns), [""])]
        return (E, *sizes, *others, *shares)

    def effective(self, theta: Theta, columns: "Columns | str") -> tuple[Any, Any]:
        """(rho, 1) against the same optimizer in the reference. A label is "optimizer|precision"."""
        if isinstance(columns, str):
            return value(theta, f"rho[{columns}]"), 1.0
        if not _prepared(columns, "A"):
            columns = self.prepare(columns)
        return pick(theta, columns, "rho", 1.0), 1.0

    def loss(self, theta: Theta, columns: Columns) -> Array:
        eff_N, eff_D = self.effective(theta, columns)
        A = pick(theta, columns, "A", 0.0)
        return surface({**theta, "A": A}, columns["N"] * eff_N, columns["D"] * eff_D)
