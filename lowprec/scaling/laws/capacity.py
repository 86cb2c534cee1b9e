"""Capacity: the efficiency of a format from its error on Gaussian numbers (Panferov et al., arXiv:2506.01863).

    L = E + A / (N eff_N)^alpha + B / D^beta,     eff_N = c(g_w) c(g_a),     c(g) = L_c tanh(F log_{1/4} g)^C

g is the squared error of the format on numbers from a standard normal distribution, relative to their squares: 0.25 for
one bit less than nothing, a quarter for every further bit, so log_{1/4} g counts effective bits. Capacities multiply
over weights and activations (and sparsity). This law predicts a format that was never trained: measure its g (a
second), and read off eff_N.

Two parameters for all formats fit as well as one efficiency each (errors 2.1e-3 and 1.9e-3; 4.5e-3 for the law of
bits, arXiv:2411.04330). Everything published is at D = 100 N and for the forward pass. What it cannot know: outliers
that are not Gaussian and are not rotated away, and what stochastic rounding or a rotation does to a gradient. Option
`gradients` adds eff_D = tanh(F_g log_{1/4} g_g)^C_g for the output gradients, an extension of ours after the finding
that the backward's precision acts on tokens (arXiv:2505.14669); nobody has tested it.
"""

from typing import Any

import numpy as np

from lowprec.scaling.law import Columns, Param, Theta
from lowprec.scaling.laws.chinchilla import FEW_EXPONENTS, Chinchilla, backbone, yes_or_no


class Capacity(Chinchilla):
    """Options: `gradients` (false), `tied`. The factor L_c is 1 unless the YAML file frees it (`fixed: null`), so that
    the capacity of an exact format is 1; a run left alone (g = 0) has 1 exactly in any case."""

    formula = "L = E + A / (N c(gmse_w) c(gmse_a))^alpha + B / D^beta,  c(g) = L_c tanh(F log_1/4 g)^C"
    certainty = "the form is from the paper's text; the fitted L_c, F and C are not listed here"

    def __init__(self, gradients: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.gradients = yes_or_no("gradients", gradients)
        self.needs = ("N", "D", "gmse_w", "gmse_a", *(("gmse_g",) if self.gradients else ()))

    def params(self, columns: Columns) -> tuple[Param, ...]:
        found = [
            *backbone(self.tied, FEW_EXPONENTS),
            Param("F", 0.02, 5.0, (0.25, 0.4, 0.7)),
            Param("C", 0.1, 15.0, (1.0, 1.6, 3.0)),
            Param("L_c", 0.5, 1.5, (1.0,), fixed=1.0),
        ]
        if self.gradients:
            found += [Param("F_g", 0.02, 5.0, (0.4, 0.8)), Param("C_g", 0.1, 15.0, (1.0, 3.0))]
        return tuple(found)

    def effective(self, theta: Theta, columns: "Columns | str") -> tuple[Any, Any]:
        if isinstance(columns, str):
            raise ValueError(f"law capacity knows precisions by their error: give gmse_w, gmse_a of {columns!r}")
        top = theta.get("L_c", 1.0)
        eff_N = capacity(columns["gmse_w"], theta["F"], theta["C"], top) * capacity(
            columns["gmse_a"], theta["F"], theta["C"], top
        )
        return eff_N, capacity(columns["gmse_g"], theta["F_g"], theta["C_g"]) if self.gradients else 1.0


def capacity(gmse: Any, F: Any, C: Any, top: Any = 1.0) -> Any:
    """top tanh(F log_{1/4} gmse)^C; 1 where gmse is 0. Raises ValueError for errors outside [0, 1)."""
    gmse = np.asarray(gmse, dtype=np.float64)
    if not ((gmse >= 0) & (gmse < 1)).all():
        raise ValueError("a Gaussian error (gmse) is not in [0, 1): 0 is left alone, 1 rounds everything to zero")
    bits = -np.log(np.where(gmse > 0, gmse, 0.25)) / np.log(4.0)
    return np.where(gmse > 0, top * np.tanh(F * bits) ** C, 1.0)
