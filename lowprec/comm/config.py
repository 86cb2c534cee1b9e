"""CommConfig: what travels as what. Hydra composes it from ``recipes/comm/*.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lowprec.comm.codec import CODECS, PLAIN, QUANTIZED, Codec
from lowprec.comm.feedback import Feedback


class GradientRounding(Enum):
    """How codes of gradients are rounded."""

    nearest = "nearest"
    stochastic = "stochastic"


class FeedbackKind(Enum):
    """What happens to the error of codes of gradients: see :mod:`lowprec.comm.feedback`."""

    none = "none"
    ef = "ef"
    loco = "loco"


@dataclass
class CommConfig:
    """Codecs are names of :mod:`lowprec.comm.codec`: fp32, bf16, fp8, int8, int4, nvfp4."""

    weights: str = "compute"  # matrices that travel as they are: a codec, or `compute`, the dtype they are used in
    codes: bool = False  # matrices of quantised layers travel as the codes their products use; the loss does not change
    gradients: str = "fp32"  # codec of the reduce-scatter; sums are fp32 whatever it is
    gradients_between: str = ""  # ... between nodes: of HSDP's all-reduce ("" = the same), or, where parameters are
    # sharded over all ranks, of a second level of the reduce-scatter ("" = one level)
    activations: str = ""  # codec between tensor- or context-parallel ranks; "" = exact
    rotation: int = 0  # gradients: size of the Hadamard blocks that are rotated before they are quantised; 0 = none
    rounding: GradientRounding = GradientRounding.nearest
    feedback: FeedbackKind = FeedbackKind.none
    feedback_reset: int = 0  # forget the errors every so many steps; 0 = never
    hpz: bool = False  # keep 1/L of the weights on each of a node's L ranks: the second gather of a step stays inside
    ranks_per_node: int = 0  # L, of hpz and of gradients_between; 0 = as many as torchrun started here

    def check(self) -> None:
        """Raises ValueError where a setting is unknown or two contradict each other."""
        options = ", ".join(CODECS)
        for key, empty in (("weights", "compute"), ("gradients", None), ("gradients_between", ""), ("activations", "")):
            value = getattr(self, key)
            if value not in CODECS and value != empty:
                also = "" if empty is None else f", or {empty or 'leave it empty'}"
                raise ValueError(f"comm.{key}={value} is no codec; choose one of {options}{also}")
        quantised = any(name in QUANTIZED for name in (self.gradients, self.gradients_between))
        if self.rotation and not quantised:
            raise ValueError(
                f"comm.rotation={self.rotation}: comm.gradients={self.gradients} is not quantised; choose fp8, int8,"
                " int4 or nvfp4, or no rotation"
            )
        if self.rotation < 0 or self.rotation == 1 or self.rotation & (self.rotation - 1):
            raise ValueError(f"comm.rotation={self.rotation} is no power of two; choose 16, 32, 64 or 128, or 0")
        if self.rounding is GradientRounding.stochastic and not quantised:
            raise ValueError(
                f"comm.rounding=stochastic: comm.gradients={self.gradients} is not quantised; choose fp8, int8, int4 or"
                " nvfp4, or rounding=nearest"
            )
        if self.ranks_per_node < 0:
            raise ValueError(f"comm.ranks_per_node={self.ranks_per_node}: give a number of ranks, or 0 for torchrun's")
        if self.feedback is not FeedbackKind.none and self.gradients == "fp32":
            raise ValueError("comm.feedback: gradients of fp32 leave no error to feed back; set comm.feedback=none")
        if self.feedback_reset < 0 or (self.feedback_reset and self.feedback is FeedbackKind.none):
            raise ValueError(
                f"comm.feedback_reset={self.feedback_reset}: give steps (0 = never), together with comm.feedback=ef or"
                " loco"
            )

    @property
    def gradient_codec(self) -> Codec:
        """Of the reduce-scatter."""
        return self._gradients(self.gradients)

    @property
    def between_codec(self) -> Codec:
        """Of gradients on the second level."""
        return self._gradients(self.gradients_between or self.gradients)

    @property
    def weight_codec(self) -> Codec | None:
        """Of matrices that travel as they are; None = the dtype they are used in."""
        return None if self.weights == "compute" else CODECS[self.weights]

    @property
    def activation_codec(self) -> Codec | str:
        """As :mod:`lowprec.comm.activations` takes it."""
        return CODECS[self.activations] if self.activations else "none"

    def new_feedback(self) -> Feedback | None:
        """An empty error memory for one module, or None."""
        if self.feedback is FeedbackKind.none:
            return None
        return Feedback(self.feedback.value, self.feedback_reset)

    def _gradients(self, name: str) -> Codec:
        return CODECS[name] if name in PLAIN else Codec(name, self.rotation, self.rounding.value)
