"""facts.json: what a run is, in plain numbers, for readers that do not load lowprec (its scaling laws are one).

    version            1
    name, seed, steps, tokens, tokens_per_step      of the whole run, as planned
    parameters         {total, non_embedding}: see lowprec.model.count_parameters
    flops_per_token    training: three times the forward's matrix products, head and attention included
    loss_unit          "nats per token"
    optimizer, lr      the class and the peak learning rate
    schedule           {shape, warmup_steps, decay_steps, final_frac}: of the learning rate
    data               {sequences' length, tokenizer, vocabulary, hash of every source}
    precision          of the linear recipes that quantise, the one that most parameters inside the blocks begin with;
                       "bf16" only if none does
    quantized_frac     share of the parameters inside the blocks whose recipe quantises anything at the start
    operands           that recipe's six operands, each as in `operand_facts`; null = not quantised (or the forward's
                       value, dequantised)
    precision_schedule changes during training: [{from, of, recipe, gemm}], of one of the recipes that are used (`of`),
                       or one of its products (`gemm`; null: all), to another recipe
    attention          equations of quantised attention, one a product; null = none
    plan               fingerprint of the plan

What the precision is does not depend on how many blocks are left in bf16 (the same recipe keeps 3 of 4 blocks so, or 6
of 40), or the sizes of a ladder would differ in name: `quantized_frac` tells that. Everything follows from config.yaml
and data.json; it is written once a start, so that nobody has to compute it again.
"""

import re
from functools import cache
from typing import Any

import torch

from lowprec.config import Run, to_dict
from lowprec.linear import Plan
from lowprec.linear.recipe import BF16, GEMM_OPERANDS, Gemm, LinearRecipe, Operand
from lowprec.model import count_parameters, flops_per_token
from lowprec.numerics import Format
from lowprec.numerics.error import relative_error
from lowprec.numerics.scale import SCALE_BITS
from lowprec.optim import phases

Facts = dict[str, Any]


def facts_of(run: Run, plan: Plan, data: Facts) -> Facts:
    """The facts of a run (see above). `data` is the fingerprint that data.json holds."""
    t, parameters = run.train, count_parameters(run.model)
    warmup_steps, decay_steps = phases(t.steps, run.schedule)
    tokens_per_step = t.global_batch * run.data.seq_len
    recipe, quantized_frac = main_recipe(plan)
    schedule = to_dict(run)["schedule"]
    return {
        "version": 1,
        "name": run.name,
        "seed": run.seed,
        "steps": t.steps,
        "tokens": t.steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "parameters": {key: parameters[key] for key in ("total", "non_embedding")},
        "flops_per_token": flops_per_token(run.model, run.data.seq_len)["total"],
        "loss_unit": "nats per token",
        "optimizer": run.optim._target_.rpartition(".")[2],
        "lr": run.optim.lr,
        "schedule": {
            "shape": schedule["shape"],
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "final_frac": run.schedule.final_frac,
        },
        "data": {
            "seq_len": run.data.seq_len,
            "tokenizer": data["tokenizer"]["name"],
            "vocab_size": run.model.vocab_size,
            "hash": "+".join(str(source["hash"]) for source in data["sources"]),
        },
        "precision": recipe.name,
        "quantized_frac": quantized_frac,
        "operands": operands_of(recipe),
        "precision_schedule": [
            {"from": change.start, "of": change.recipe, "recipe": change.replacement.name, "gemm": change.gemm}
            for change in plan.precision.schedule
            if change.recipe in {entry.recipe for entry in plan.entries}
        ],
        "attention": plan.precision.attention.describe().splitlines() if plan.precision.attention else None,
        "plan": plan.fingerprint(),
    }


def main_recipe(plan: Plan) -> tuple[LinearRecipe, float]:
    """(the quantised recipe that most of the blocks' linear parameters follow at the start, the quantised share).

    The head is not counted. A tie goes to the recipe that comes first in the model. Nothing quantised: (BF16, 0).
    """
    sizes: dict[str, int] = {}
    for entry in plan.entries:
        if "." in entry.layer:  # inside a block
            sizes[entry.recipe] = sizes.get(entry.recipe, 0) + entry.out_features * entry.in_features
    recipes = plan.precision.at(0.0)
    quantized = {name: size for name, size in sizes.items() if recipes[name].quantized}
    main = recipes[max(quantized, key=lambda name: quantized[name])] if quantized else BF16
    return main, sum(quantized.values()) / sum(sizes.values())


def operands_of(recipe: LinearRecipe) -> Facts:
    """{"fprop.x": facts of the operand or None, ...} for the six operands."""
    found = {}
    for role, names in GEMM_OPERANDS.items():
        gemm: Gemm = getattr(recipe, role)
        for name, operand in zip(names, (gemm.a, gemm.b)):
            found[f"{role}.{name}"] = operand_facts(operand, gemm)
    return found


def operand_facts(operand: Operand, gemm: Gemm) -> Facts | None:
    """How one operand is quantised, or None if it is not.

    Format, element with exponent_bits and mantissa_bits (null for integers), bits of a code, bits_per_value with the
    block scales, block (0 = the whole axis), rounding, size of the inner rotation (null = none, 0 = the whole axis),
    split ("" = none), and gaussian_mse: the relative squared error of that format and rounding on independent Gaussian
    numbers, 256 rows of 1,024 (ms_eden: of its nearest rounding; a split: of its format alone).
    """
    f = operand.format
    if f is None:
        return None
    minifloat = re.fullmatch(r"e(\d+)m(\d+)", f.element)
    bits_per_value, gaussian_mse = measured(f, operand.rounding == "stochastic")
    return {
        "format": f.name,
        "element": f.element,
        "exponent_bits": int(minifloat[1]) if minifloat else None,
        "mantissa_bits": int(minifloat[2]) if minifloat else None,
        "bits": f.bits,
        "bits_per_value": bits_per_value,
        "block": list(f.block),
        "scale": f.scale,
        "rounding": operand.rounding,
        "rotation": gemm.inner.size if gemm.inner else None,
        "split": str(operand.split or ""),
        "gaussian_mse": gaussian_mse,
    }


@cache
def measured(f: Format, stochastic: bool) -> tuple[float, float]:
    """(bits a value with the block scales, relative squared error) of Gaussian numbers in a format."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1024, generator=generator)
    q = f.quantize(x, torch.rand(x.shape, generator=generator) if stochastic else None)
    stored_bits = q.codes.numel() * f.bits + q.scales.numel() * SCALE_BITS[f.scale]
    return stored_bits / x.numel(), relative_error(x, q.dequantize())
