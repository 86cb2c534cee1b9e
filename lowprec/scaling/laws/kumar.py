"""Scaling laws for precision (Kumar et al., arXiv:2411.04330): bits of weights, activations and KV cache as parameters.

    training       L = E + A / N_eff^alpha + B / D^beta,      N_eff = N f_w f_a f_kv,   f_x = 1 - e^(-P_x / gamma_x)
    quantising     delta = C_T D^gD / N^gN e^(-P_post / g_post)
    both           delta = C_T D^gD / N_eff^gN e^(-P_post / g_post)  prod_x (1 - e^(-C_x (P_x - P_post)))

P_x are bits, 16 = left alone (which is 0.2 % of an efficiency short of 1 in the formula, as published). They answer:
how many bits to train in for a budget, and how much a model trained on more tokens loses when it is quantised after
training. From 465 runs of 30M to 220M parameters with integer formats per channel or tensor; runs with P_a <= 3 or
P_kv <= 3 diverged and were dropped. Bits are all they know: a format with better scales, a rotation or a smaller block
at equal bits is the same to them (`capacity` tells those apart), and e^(-P/gamma) fits later data of one to four bits
badly. Their conclusion of "7 to 8 bits" needs larger gammas than they print: compute it from your own fit.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, Param, ScalingLaw, Theta
from lowprec.scaling.laws.chinchilla import FEW_EXPONENTS, Chinchilla, backbone, surface, yes_or_no
from lowprec.scaling.laws.labels import value

OPERANDS = ("w", "a", "kv")
FULL = 16.0  # bits of what is left alone
LEAST = 1e-6  # of an efficiency: below its zero the power law has no value


class Kumar(Chinchilla):
    """The training law. Options: `operands` ([w, a, kv]): which have bits; `offsets` (false); `tied`.

    With `offsets`, f_x = 1 - e^(-(P_x - P0_x) / gamma_x): nothing is learned at P0_x bits. The paper fits an offset n_x
    inside the exponential without saying its sign; with n_x = P0_x / gamma_x the published values put the zero of
    activations at 3.1 bits, in agreement with the runs that diverged at 3. An operand that no run quantises gets no
    parameters, and a table without a column bits_kv is taken to leave the cache alone.
    """

    formula = "L = E + A / (N prod_x (1 - e^(-P_x/gamma_x)))^alpha + B / D^beta"
    certainty = (
        "coefficients are from the paper's text (appendix K), where the sign of the offsets n_x is not spelled out"
    )
    starts = FEW_EXPONENTS

    def __init__(self, operands: Iterable[str] = OPERANDS, offsets: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.operands = tuple(operands)
        if not self.operands or any(x not in OPERANDS for x in self.operands):
            raise ValueError(f"option operands is {list(self.operands)}; it lists some of {', '.join(OPERANDS)}")
        self.offsets = yes_or_no("offsets", offsets)
        self.needs = ("N", "D", *(f"bits_{x}" for x in self.operands if x != "kv"))

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return (*backbone(self.tied, self.starts), *self._gammas(columns))

    def _gammas(self, columns: Columns) -> list[Param]:
        found = []
        for x in self.operands:
            bits = np.asarray(bits_of(columns, x), dtype=np.float64)
            if (bits < FULL).any():
                found.append(Param(f"gamma_{x}", 0.05, 30.0, (0.8, 2.0, 4.0)))
                if self.offsets:
                    found.append(Param(f"P0_{x}", -8.0, float(bits.min()) - 0.05, (0.0,)))
        return found

    def effective(self, theta: Theta, columns: "Columns | str") -> tuple[Any, Any]:
        if isinstance(columns, str):
            raise ValueError(f"law kumar knows precisions by their bits: give bits_w, bits_a ... of {columns!r}")
        share: Any = 1.0
        for x in self.operands:
            bits = bits_of(columns, x)
            if f"gamma_{x}" in theta:
                share = share * -np.expm1((theta.get(f"P0_{x}", 0.0) - bits) / theta[f"gamma_{x}"])
            elif np.any(np.asarray(bits) < FULL):
                raise ValueError(f"there is no gamma_{x}: no run was fitted with fewer than {FULL:g} bits in bits_{x}")
        return np.where(np.real(share) > LEAST, share, LEAST), 1.0


def bits_of(columns: Columns, operand: str) -> Any:
    """Bits of one operand, (n,); 16 for a KV cache of which nothing is known."""
    return columns.get("bits_kv", FULL) if operand == "kv" else columns[f"bits_{operand}"]


class KumarPTQ(ScalingLaw):
    """Loss that post-training quantisation of the weights adds: grows with tokens, falls with size and bits.

    Answers: whether a model that was trained for long still survives quantisation, and for how many more tokens.
    Residuals are plain nats, since a measured degradation may be negative. Published for GPTQ and for models up to 1.7B
    parameters and 26B tokens; R2 .97.
    """

    needs = ("N", "D", "bits_post")
    formula = "delta = C_T D^gamma_D / N^gamma_N e^(-P_post / gamma_post)"
    certainty = (
        "coefficients are from the paper's text; it prints a b = 1.1277 beside them that the formula has no place for"
    )
    response = "delta"
    log_residuals = False

    def params(self, columns: Columns) -> tuple[Param, ...]:
        return post_params()

    def loss(self, theta: Theta, columns: Columns) -> Array:
        return degradation(theta, columns["N"], columns["D"], columns["bits_post"])


def post_params() -> tuple[Param, ...]:
    return (
        Param("C_T", 0.0, 1e6, linear=True, unit={"D": "-gamma_D", "N": "gamma_N"}),
        Param("gamma_D", 0.0, 1.5, (0.15, 0.3, 0.5, 0.8)),
        Param("gamma_N", 0.0, 1.5, (0.15, 0.3, 0.5, 0.8)),
        Param("gamma_post", 0.05, 10.0, (0.4, 0.7, 1.2)),
    )


def degradation(theta: Theta, N: Any, D: Any, bits: Any) -> Array:
    """C_T D^gamma_D / N^gamma_N e^(-bits / gamma_post)."""
    return theta["C_T"] * D ** theta["gamma_D"] * N ** -theta["gamma_N"] * np.exp(-bits / theta["gamma_post"])


class KumarUnified(Kumar):
    """Training and post-training precision together: the loss after training at P_x and quantising to P_post.

    Rows are (run, P_post), `loss` is after quantisation. A model trained in fewer bits is partly robust already (the
    last product), and delta is 0 if any operand was trained in P_post bits or fewer. C_w, C_a, C_kv were not
    printed, so the published set cannot predict. R2 .90 on more than 1,000 points.
    """

    formula = "L = kumar + C_T D^gamma_D / N_eff^gamma_N e^(-P_post/gamma_post) prod_x (1 - e^(-C_x (P_x - P_post)))"
    certainty = "C_w, C_a and C_kv were not published; the rest is from the paper's text"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.needs = (*self.needs, "bits_post")

    def params(self, columns: Columns) -> tuple[Param, ...]:
        C_T, *shapes = post_params()
        few = {"gamma_D": (0.4,), "gamma_N": (0.3,), "gamma_post": (0.5, 1.0)}
        shapes = [Param(p.name, p.low, p.high, few[p.name], unit=p.unit) for p in shapes]
        robust = [Param(f"C_{x}", 1e-3, 20.0, (0.5,)) for x in self.operands]
        starts = FEW_EXPONENTS[1::2]
        return (*backbone(self.tied, starts), *self._gammas(columns), C_T, *shapes, *robust)

    def gap(self, theta: Theta, columns: Columns) -> Array:
        """(n,) nats that quantising after training adds."""
        post, share = columns["bits_post"], self.effective(theta, columns)[0]
        rough: Any = 1.0
        for x in self.operands:
            rough = rough * -np.expm1(-value(theta, f"C_{x}") * np.maximum(bits_of(columns, x) - post, 0.0))
        return degradation(theta, columns["N"] * share, columns["D"], post) * rough

    def loss(self, theta: Theta, columns: Columns) -> Array:
        share = self.effective(theta, columns)[0]
        return surface(theta, columns["N"] * share, columns["D"]) + self.gap(theta, columns)
