"""The laws by class name: what `class:` in recipes/law/*.yaml may be.

chinchilla       loss over N and D; averaged N; repeated data        kumar            bits; post-training; both
efficiency       eff_N, eff_D per precision; per optimizer           capacity         eff_N from the Gaussian error
delta            an added gap per precision; share of layers         floating_point   exponent, mantissa, block
qat              quantisation-aware training                         post_training    QiD, bits to serve in
curves           whole curves under a learning rate's schedule       formula          an expression of one's own
"""

from lowprec.scaling.law import ScalingLaw
from lowprec.scaling.laws.capacity import Capacity
from lowprec.scaling.laws.chinchilla import AverageParameters, Chinchilla, DataConstrained
from lowprec.scaling.laws.curves import Annealing, MultiPower
from lowprec.scaling.laws.delta import Delta, MixedQuantization
from lowprec.scaling.laws.efficiency import Efficiency, OptimizerEfficiency
from lowprec.scaling.laws.floating_point import FloatingPoint
from lowprec.scaling.laws.formula import Formula
from lowprec.scaling.laws.kumar import Kumar, KumarPTQ, KumarUnified
from lowprec.scaling.laws.post_training import KBitInference, QiD
from lowprec.scaling.laws.qat import QAT, ComputeOptimalQAT

_LAWS: tuple[type[ScalingLaw], ...] = (
    Chinchilla, AverageParameters, DataConstrained, Efficiency, OptimizerEfficiency, Capacity, Kumar, KumarPTQ,
    KumarUnified, Delta, MixedQuantization, FloatingPoint, QAT, ComputeOptimalQAT, QiD, KBitInference, Annealing,
    MultiPower, Formula,
)  # fmt: skip
LAWS: dict[str, type[ScalingLaw]] = {law.__name__: law for law in _LAWS}
