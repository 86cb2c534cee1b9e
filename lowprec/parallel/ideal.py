"""Ideal: how long a step's matrix products would take at the device's published peak, each in the precision it runs in.

    ideal_s = sum over products  FLOPs / (peak of the product's precision x devices)

The FLOPs are those of the model (lowprec/model/flops.py): what is computed again, padding, quantisation, rotations,
norms, the optimizer and communication are not in them. So `ideal_s` is below what any step can take, and `ideal_s /
step_s` is the share of the hardware's arithmetic that a run puts to use, whatever mixture of precisions it is made of.
MFU in the usual sense (arXiv:2204.02311, appendix B) divides by the time at the bf16 peak instead: a run in FP4 may
have an MFU above 1.

A product runs in the narrowest precision that holds both operands' codes: e2m1 is FP4; what e4m3 or e5m2 can express
is FP8; integers are INT8. Where the device has no such units, or slower ones, codes are multiplied in bf16, which holds
them too.
An unquantised operand makes it bf16. A split operand is counted once, though its parts may be multiplied one by one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowprec.linear import Plan
from lowprec.linear.attention import PRODUCTS
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand
from lowprec.model import ModelConfig, flops_per_token
from lowprec.numerics import ELEMENTS
from lowprec.parallel.devices import Hardware

PRECISIONS = ("fp4", "fp8", "int8", "bf16")
"""Narrowest first."""


@dataclass(frozen=True)
class Product:
    """One matrix product of a step."""

    layer: str
    role: str  # fprop, dgrad or wgrad; of attention qk ... dk; of a scan, scan
    recipe: str
    operands: str  # "nvfp4 x nvfp4_2d"
    precision: str  # the narrowest that holds both
    flops: float  # a token

    def runs_as(self, hardware: Hardware) -> str:
        """The precision whose peak counts: never one that is slower than bf16, which holds the codes as well."""
        peak = hardware.flops.get(self.precision, 0.0)
        return self.precision if peak >= hardware.flops["bf16"] else "bf16"

    def why(self, hardware: Hardware) -> str:
        """Why not as it might, or ""."""
        if self.runs_as(hardware) == self.precision:
            return ""
        units = f"{self.precision.upper()} units"
        lacks = f"slow {units}" if self.precision in hardware.flops else f"no {units}"
        return f"{hardware.name} has {lacks}: {self.operands} is multiplied in bf16"


def precision_of(operand: Operand) -> set[str]:
    """The precisions that hold an operand's codes exactly."""
    if operand.format is None:
        return {"bf16"}
    values = set(operand.format.element_type.values)
    held = {"fp4": ("e2m1",), "fp8": ("e2m1", "e4m3", "e5m2")}
    found = {name for name, elements in held.items() if any(values <= set(ELEMENTS[e].values) for e in elements)}
    integers = all(value == int(value) for value in values) and max(values) <= 127
    return found | ({"int8"} if integers else set()) | {"bf16"}


def narrowest(gemm: Gemm) -> str:
    """The precision of a product."""
    both = precision_of(gemm.a) & precision_of(gemm.b)
    return next(name for name in PRECISIONS if name in both)


def products(plan: Plan, model: ModelConfig, seq_len: int, progress_frac: float = 0.0) -> list[Product]:
    """Every product of a training step with the recipes of this progress, in the order of the layers."""
    found = []
    recipes, attention = plan.precision.at(progress_frac), plan.precision.attention
    for entry in plan.entries:
        recipe, flops = recipes[entry.recipe], 2.0 * entry.out_features * entry.in_features
        for role in GEMM_OPERANDS:
            found.append(_product(entry.layer, role, entry.recipe, getattr(recipe, role), flops))
    core = flops_per_token(model, seq_len, training=False)
    blocks = max(model.count_blocks("*"), 1)
    for role in PRODUCTS if core["attention_qk"] else ():
        gemm = getattr(attention, role) if attention else Gemm()
        name = "attention" if attention else "bf16"
        found.append(_product("attention", role, name, gemm, core["attention_qk"] / blocks, blocks))
    scan = 3 * (core.get("mamba_scan", 0.0) + core.get("mamba_conv", 0.0))
    return found + ([_product("scan", "scan", "bf16", Gemm(), scan)] if scan else [])


def _product(layer: str, role: str, recipe: str, gemm: Gemm, flops: float, times: int = 1) -> Product:
    operands = " x ".join(side.format.name if side.format else "bf16" for side in (gemm.a, gemm.b))
    return Product(layer, role, recipe, operands, narrowest(gemm), flops * times)


def flops_by_precision(found: Iterable[Product], hardware: Hardware | None = None) -> dict[str, float]:
    """FLOPs a token by the precision that runs on a device, or that would be the narrowest; fp4 first."""
    total = dict.fromkeys(PRECISIONS, 0.0)
    for product in found:
        total[product.runs_as(hardware) if hardware else product.precision] += product.flops
    return {name: flops for name, flops in total.items() if flops}


def ideal_s(flops: Mapping[str, float], tokens: float, hardware: Hardware, devices: int) -> dict[str, float]:
    """Seconds by precision for so many tokens, from FLOPs a token by precision."""
    return {name: each * tokens / (hardware.flops[name] * devices) for name, each in flops.items()}
