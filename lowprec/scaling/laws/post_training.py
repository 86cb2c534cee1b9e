"""Quantisation after training: what it costs, and how many bits to serve a model in.

See also :class:`lowprec.scaling.laws.kumar.KumarPTQ`, which is exponential in the bits where QiD is a power.
"""

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.labels import masks, occurring, pick


class QiD(ScalingLaw):
    """Quantisation-induced degradation (Ouyang et al., arXiv:2411.17691).

        delta = k D^beta / (N^alpha P^gamma)            P = bits_post

    Answers: how long a model may be trained before it no longer quantises well, and how "fully trained" a model is by
    how much it suffers. From some 1,500 checkpoints of the Pythia suite, 160M to 12B parameters, 1B to 206B tokens;
    extrapolated by its authors to 1e14 tokens, which is far. Checkpoints in the middle of a cosine
    schedule are not finished runs: that part of the growth with D which is annealing's is not the quantiser's.
    """

    needs = ("N", "D", "bits_post")
    formula = "delta = k D^beta / (N^alpha P^gamma)"
    response = "delta"
    log_residuals = False
    certainty = "the joint set is recalled; the exponent of D alone (.5316) is from a third-party note"

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (
            Param("k", 0.0, 1e6, linear=True, unit={"D": "-beta", "N": "alpha"}),
            Param("beta", 0.0, 1.5, (0.15, 0.3, 0.5, 0.8)),
            Param("alpha", 0.0, 1.5, (0.1, 0.2, 0.35, 0.6)),
            Param("gamma", 0.5, 12.0, (3.0, 4.5, 6.0)),
        )

    def loss(self, theta: Theta, columns: Columns) -> Array:
        size = columns["N"] ** -theta["alpha"] * columns["bits_post"] ** -theta["gamma"]
        return theta["k"] * columns["D"] ** theta["beta"] * size


class KBitInference(ScalingLaw):
    """Loss against the bits of the whole model (the question of Dettmers and Zettlemoyer, arXiv:2212.09720).

        L = E + A[P] / (N P)^alpha            N P = model bits, P = bits_post: one A for every width

    Published: 35,000 experiments on zero-shot accuracy of 19M to 176B parameter models, in which curves over model bits
    are nearly parallel and 4 bits almost always lie on top. The curves were drawn by interpolation: **the formula is
    our own**, the simplest with parallel curves. At a memory limit the best width is that of the smallest A
    (`best_bits`), whatever the size. It ignores the tokens: compare models of one family. Three bits and fewer break
    the parallel where the quantiser fails. Option `response`: the column that is predicted, "loss" or an error rate
    (1 - accuracy).
    """

    needs = ("N", "bits_post")
    formula = "L = E + A[P] / (N P)^alpha"
    certainty = "the form is our own; the paper interpolates"

    def __init__(self, response: str = "loss", **options: object) -> None:
        super().__init__(**options)
        self.response = response

    def prepare(self, columns: Columns) -> Columns:
        return {**columns, **masks("A", columns["bits_post"])}

    def params(self, columns: Columns) -> tuple[Param, ...]:
        widths = sorted(occurring(columns["bits_post"]), key=float)
        return (
            Param("E", 0.0, None, linear=True),
            *(Param(f"A[{width}]", 0.0, 1e3, linear=True, unit={"N": "alpha"}) for width in widths),
            Param("alpha", 0.02, 1.5, tuple(np.geomspace(0.03, 1.2, 24))),
        )

    def loss(self, theta: Theta, columns: Columns) -> Array:
        bits = columns["N"] * columns["bits_post"]
        return theta["E"] + pick(theta, columns, "A", 0.0) * bits ** -theta["alpha"]

    def best_bits(self, theta: Theta) -> float:
        """The fitted width of the smallest loss at equal model bits."""
        widths = [key for key in theta if key.startswith("A[")]
        return float(min(widths, key=lambda key: theta[key])[2:-1])
