"""Chinchilla: loss over parameters and tokens (Hoffmann et al., arXiv:2203.15556; refitted by Besiroglu et al.,
arXiv:2404.10102), and what other laws build on it.

    L(N, D) = E + A / N^alpha + B / D^beta

E is the entropy of the text, the other two what finite size and finite data cost.

Two families of precision laws share this surface. In one, low precision makes a model of N parameters behave like one
of N eff_N, trained on D eff_D tokens: subclasses of :class:`Chinchilla` that implement `effective`. For those, training
that is s times faster pays if s eff_N eff_D > 1, whatever A, B and the exponents are. In the other it adds a *gap* to
the loss: classes with a method `gap`.

It answers: how large a model, on how many tokens, for a budget; and what loss a larger budget buys. It does not know
about repeated data, schedules that were not finished, or models that change size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta

EXPONENTS = (0.03, 0.08, 0.13, 0.18, 0.23, 0.28, 0.33, 0.38, 0.43, 0.48, 0.53, 0.58, 0.66, 0.74, 0.84, 0.94, 1.07, 1.2)
FEW_EXPONENTS = (0.08, 0.2, 0.33, 0.48, 0.66, 0.94)  # for laws with a grid over other parameters


def backbone(tied: bool = False, starts: tuple[float, ...] = EXPONENTS) -> tuple[Param, ...]:
    """E, A, B, alpha, beta: what most other laws begin with. `tied`: beta = alpha, and is no parameter."""
    return (
        Param("E", 0.0, None, linear=True),
        Param("A", 0.0, 1e3, linear=True, unit={"N": "alpha"}),
        Param("B", 0.0, 1e3, linear=True, unit={"D": "alpha" if tied else "beta"}),
        Param("alpha", 0.02, 1.5, starts),
        *(() if tied else (Param("beta", 0.02, 1.5, starts),)),
    )


def surface(theta: Theta, N: Any, D: Any) -> Array:
    """E + A / N^alpha + B / D^beta, with beta = alpha where there is none."""
    beta = theta.get("beta", theta["alpha"])
    return theta["E"] + theta["A"] * N ** -theta["alpha"] + theta["B"] * D**-beta


def yes_or_no(name: str, value: object) -> bool:
    """An option of a law that is true or false. Raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"option {name} is {value!r}; it can be true or false")
    return value


class Chinchilla(ScalingLaw):
    """Options: `tied` (false): one exponent for both, as Kumar et al. and Muennighoff et al. fit it."""

    formula = "L = E + A / N^alpha + B / D^beta"
    starts: tuple[float, ...] = EXPONENTS

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.tied = yes_or_no("tied", tied)

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return backbone(self.tied, self.starts)

    def effective(self, theta: Theta, columns: "Columns | str") -> tuple[Any, Any]:
        """(eff_N, eff_D): shares of the parameters and of the tokens that count, of runs or of one precision by label.

        `columns` need only those about the precision, not N and D. One number stands for all runs.
        """
        return 1.0, 1.0

    def loss(self, theta: Theta, columns: Columns) -> Array:
        eff_N, eff_D = self.effective(theta, columns)
        return surface(theta, columns["N"] * eff_N, columns["D"] * eff_D)


class AverageParameters(Chinchilla):
    """The surface with N averaged over training: sparse pretraining and growth (Jin et al., arXiv:2501.12486).

        L = E + A / N_mean^alpha + B / D^beta,    N_mean = mean over the tokens of the parameters active at that token

    Answers: what a pruning or growing schedule costs in loss: two runs of one N_mean and D end at one loss, whatever
    their final sizes. Shown for gradual pruning from 25 % to 75 % of training, 58M to 468M parameters. That a schedule
    of *precisions* follows with N_eff averaged over tokens is an idea that nobody has tested. N_mean is in the units of
    N: both without embeddings or both with.
    """

    needs = ("N", "D", "N_mean")
    formula = "L = E + A / N_mean^alpha + B / D^beta"
    certainty = "the form is from the abstract of arXiv:2501.12486; its coefficients are not listed here"
    pivots: Mapping[str, str] = {"N": "N", "N_mean": "N", "D": "D"}

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return surface(theta, columns["N_mean"], columns["D"])


class DataConstrained(Chinchilla):
    """Repeated data (Muennighoff et al., arXiv:2305.16264).

        L  = E + A / n^alpha + B / d^beta
        d  = U_D + U_D R_D (1 - exp(-(D/U_D - 1) / R_D))        tokens repeated D/U_D times are worth fewer
        n  = U_N + U_N R_N (1 - exp(-(N/U_N - 1) / R_N))        parameters beyond what U_D can teach are worth fewer
        U_D = distinct tokens,   U_N = min(N, compute-optimal N for U_D tokens)

    R_D is the number of repetitions after which another is worth 1/e of new data. Answers: whether to repeat, to shrink
    the model, or to look for data. `excess: false` leaves N alone (n = N): right if no run had more parameters than its
    data deserve, in which case R_N cannot be fitted. Not about the order of the repetitions or data quality. The
    published constants do not reproduce the losses of the paper's figures (their authors say so, datablations issue 9).
    """

    needs = ("N", "D", "unique_tokens")
    formula = "L = E + A / n(N, U)^alpha + B / d(D, U)^beta"
    certainty = "the published constants do not reproduce the paper's own figures"
    pivots: Mapping[str, str] = {"N": "N", "D": "D", "unique_tokens": "D"}

    def __init__(self, excess: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.excess = yes_or_no("excess", excess)

    def prepare(self, columns: Columns) -> Columns:
        """Distinct tokens are at most those trained on."""
        return {**columns, "unique_tokens": np.minimum(columns["unique_tokens"], columns["D"])}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        E, A, B, *exponents = backbone(self.tied, FEW_EXPONENTS)
        repeats = Param("R_D", 0.1, 1e3, (4.0, 15.0, 60.0))
        if not self.excess:
            return (E, A, B, *exponents, repeats)
        A, B = (Param(p.name, 1e-6, 20.0, (0.1, 0.3, 1.0), unit=p.unit) for p in (A, B))  # U_N depends on A / B
        return (E, A, B, *exponents, repeats, Param("R_N", 0.1, 1e3, (5.0,)))

    def loss(self, theta: Theta, columns: Columns) -> Array:
        N, D, unique = columns["N"], columns["D"], columns["unique_tokens"]
        tokens = saturate(D, unique, theta["R_D"])
        if not self.excess:
            return surface(theta, N, tokens)
        alpha = theta["alpha"]
        beta = theta.get("beta", alpha)
        optimal = (alpha * theta["A"] / (beta * theta["B"]) * unique**beta) ** (1 / alpha)
        deserved = np.where(np.real(optimal) < N, optimal, N)  # the minimum, for complex parameters too
        return surface(theta, saturate(N, deserved, theta["R_N"]), tokens)


def saturate(amount: Any, unique: Any, scale: Any) -> Any:
    """What `amount` of something is worth of which only `unique` is new, R = `scale`: see :class:`DataConstrained`."""
    return unique * (1 + scale * (1 - np.exp(-(amount / unique - 1) / scale)))
