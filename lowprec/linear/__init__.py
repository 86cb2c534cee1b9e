"""linear: one linear layer in any precision recipe.

>>> from lowprec.linear import QuantizedLinear, Plan, load_precision, load_recipe
>>> layer = QuantizedLinear(1024, 4096, bias=False, recipe="nvfp4")     # one layer
>>> print(load_recipe("nvfp4").describe())
>>> plan = Plan.of(model, load_precision("nvfp4"), seed=1)              # a whole model
>>> print(plan.table())
>>> plan.apply(model)
"""

from lowprec.linear.call import Call, Policy
from lowprec.linear.function import quantized_linear
from lowprec.linear.module import QuantizedLinear
from lowprec.linear.plan import Plan
from lowprec.linear.precision import Precision, Rule, load_precision, load_recipe
from lowprec.linear.recipe import BF16, Gemm, LinearRecipe, Operand, Rotation

__all__ = [
    "BF16", "Call", "Gemm", "LinearRecipe", "Operand", "Plan", "Policy", "Precision", "QuantizedLinear", "Rotation",
    "Rule", "load_precision", "load_recipe", "quantized_linear",
]  # fmt: skip
