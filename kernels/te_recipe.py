"""Our recipe as one of TransformerEngine's, or the reason why it is none. Data only: nothing of TransformerEngine is
imported, and any machine can ask.

TransformerEngine (2.15 and later) has five training recipes, each one format for all three products of a layer::

    NVFP4BlockScaling     e2m1, e4m3 scales of 1x16 under one fp32 scale a tensor; weights 16x16; gradients stochastic;
                          a 16-point Hadamard rotation of wgrad's contracted axis (arXiv:2509.25149)
    MXFP8BlockScaling     e4m3 (gradients maybe e5m2: HYBRID), e8m0 scales of 1x32, rounded up (arXiv:2506.08027)
    Float8BlockScaling    e4m3 or HYBRID, fp32 or power-of-two scales, 1x128 and 128x128 (arXiv:2412.19437)
    Float8CurrentScaling  e4m3 or HYBRID, one fp32 scale a tensor from its own maximum
    DelayedScaling        the same from the largest maximum of the last steps (arXiv:2209.05433)

:func:`te_product` maps one product: two operands and a rotation become *needs*, the options that must have a value for
TransformerEngine to compute the same thing. :func:`te_recipe` joins the needs of the three products; where they
contradict one another, no recipe of TransformerEngine is ours, although each product alone may be.

Every field of the recipe class is passed, also those that keep their default: TransformerEngine reads defaults from
NVTE_* environment variables, and a run's numbers must not depend on those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

from lowprec.numerics import Format

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
NVFP4, MXFP8, BLOCK = "NVFP4BlockScaling", "MXFP8BlockScaling", "Float8BlockScaling"
CURRENT, DELAYED = "Float8CurrentScaling", "DelayedScaling"
QPARAMS = {"x": "fp8_quant_fwd_inp", "w": "fp8_quant_fwd_weight", "dy": "fp8_quant_bwd_grad"}
DIMS = {"x": "x_block_scaling_dim", "w": "w_block_scaling_dim", "dy": "grad_block_scaling_dim"}
_ALL: dict[str, Any] = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
_PRODUCTS: dict[str, Any] = {"fp8_gemm_fprop": True, "fp8_gemm_dgrad": True, "fp8_gemm_wgrad": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    NVFP4: {
        "disable_rht": False,
        "disable_stochastic_rounding": False,
        "disable_2d_quantization": False,
        "row_scaled_activation": False,
        "nvfp4_4over6": "none",
        "nvfp4_4over6_e4m3_use_256": "all",
        "nvfp4_4over6_err_mode": "MAE",
        "fp4_format": "E2M1",
        "fp8_format": "E4M3",
        **_ALL,
    },
    MXFP8: {"margin": 0, "fp8_format": "E4M3", "enable_2d_quantization": False, **_ALL},
    BLOCK: {
        "use_f32_scales": False,
        "fp8_format": "E4M3",
        "x_block_scaling_dim": 1,
        "w_block_scaling_dim": 2,
        "grad_block_scaling_dim": 1,
        **_PRODUCTS,
        **_ALL,
    },
    CURRENT: {"use_power_2_scales": False, "fp8_format": "HYBRID", **_PRODUCTS, **_ALL},
    DELAYED: {
        "margin": 0,
        "fp8_format": "HYBRID",
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "scaling_factor_compute_algo": None,
        "reduce_amax": True,
        **_ALL,
    },
}
"""Every field that is passed, at TransformerEngine's default with no NVTE_* variable set; but the products sum in fp32
(``use_split_accumulator``), as ours do, where CURRENT's forward by default does not."""


@dataclass(frozen=True)
class TeChoice:
    """A recipe of TransformerEngine, written out.

    Attributes:
        recipe: the class in ``transformer_engine.common.recipe``.
        options: all fields that are passed to it; a Format by its name, an MMParams by its ``use_split_accumulator``.
        pow2: Float8BlockScaling: whether the scales of x, w, dy are powers of two (``QParams``, no field of it).
    """

    recipe: str
    options: tuple[tuple[str, Any], ...]
    pow2: tuple[tuple[str, bool], ...] = ()

    def missing(self, module: Any) -> str | None:
        """Why the installed ``transformer_engine.common.recipe`` cannot make it, or None."""
        known = signature(getattr(module, self.recipe)).parameters
        for name, value in self.options:
            if name not in known and value != DEFAULTS[self.recipe][name]:
                return f"the installed {self.recipe} has no option {name}, which must be {value!r}; install a newer one"
        return None

    def build(self, module: Any) -> Any:
        """The recipe object; ``module`` is ``transformer_engine.common.recipe``.

        Options that an older version does not know are left out where they only say what it does anyway.

        Raises:
            ValueError: if that version cannot express it.
        """
        if why := self.missing(module):
            raise ValueError(f"TransformerEngine: {why}")
        cls = getattr(module, self.recipe)
        known = signature(cls).parameters
        made = cls(**{name: _value(name, value, module) for name, value in self.options if name in known})
        for operand, power in self.pow2:  # class attributes, fixed by NVTE_* when the module was loaded
            setattr(made, QPARAMS[operand], module.QParams(power_2_scale=power, amax_epsilon=0.0))
        return made

    def __str__(self) -> str:
        usual = DEFAULTS[self.recipe]
        shown = [f"{name}={value!r}" for name, value in self.options if value != usual[name]]
        return f"{self.recipe}({', '.join(shown)})"


def _value(name: str, value: Any, module: Any) -> Any:
    if name.endswith("_format"):
        return getattr(module.Format, value)
    return module.MMParams(use_split_accumulator=value) if name in _PRODUCTS else value


Needs = Mapping[str, Any]
"""What a product needs: ``recipe`` (the class), fields of it, and per operand ``pow2.x``, ``46.x``, ``256.x``."""


def te_product(gemm: Any, role: str) -> Needs | str:
    """What one product needs of TransformerEngine, or why it cannot serve it.

    Args:
        gemm: the product (``lowprec.linear.recipe.Gemm``).
        role: ``fprop``, ``dgrad`` or ``wgrad``.
    """
    if gemm.outer_a or gemm.outer_b:
        return "a free axis is rotated; TransformerEngine rotates only the contracted axis of wgrad"
    sides = dict(zip(OPERANDS[role], (gemm.a, gemm.b)))
    families = {}
    for name, operand in sides.items():
        if why := _unlike(name, operand):
            return why
        families[name], why = _family(operand)
        if why:
            return f"{name} is {operand.format.name}: {why}"
    first, second = families.values()
    if first != second:
        return f"{' and '.join(sides)} would need {first} and {second}; a recipe of TransformerEngine is one of them"
    if gemm.inner and not (first == NVFP4 and role == "wgrad"):
        return "the contracted axis is rotated; TransformerEngine rotates it in wgrad of NVFP4BlockScaling only"
    rules = {NVFP4: _nvfp4, BLOCK: _block}
    needs = rules[first](sides, gemm.inner, role) if first in rules else {}
    return needs if isinstance(needs, str) else _fp8(first, sides, needs)


def _unlike(name: str, operand: Any) -> str | None:
    """Why TransformerEngine has no such operand, whatever its format."""
    if operand.format is None:
        return f"{name} is not quantised; TransformerEngine's recipes quantise both operands of a product"
    if operand.split:
        return f"{name} is split by {operand.split}; TransformerEngine has no operand in parts"
    if operand.rounding == "ms_eden":
        return f"{name} is rounded by MS-EDEN; TransformerEngine rounds to nearest or stochastically"
    if operand.rounding == "stochastic" and name != "dy":
        return f"{name} is rounded stochastically; TransformerEngine rounds only gradients so"
    if operand.source == "fprop":
        return f"{name} is quantised from its forward value; TransformerEngine quantises the original"
    if operand.gradient != "ste":
        return f"{name} has the gradient {operand.gradient}; TransformerEngine's is straight through"
    if operand.amax == "hold":
        return f"the maximum of {name} is held for {operand.window} steps; TransformerEngine's is current or delayed"
    return None


def _family(operand: Any) -> tuple[str, str]:
    """The recipe class that has this format, and "", or anything and why none has."""
    f: Format = operand.format
    if f.rule != "absmax":
        return "", f"its scales follow the {f.rule} of a block; TransformerEngine's follow the maximum"
    if f.second:
        return "", f"a block chooses between {f.element} and {f.second}; TransformerEngine has one element"
    if f.guard != 1:
        return "", f"it has a guard of {f.guard:.4g}; TransformerEngine scales block maxima to the end of the grid"
    if f.element == "e2m1":
        return NVFP4, _unlike_nvfp4(f)
    if f.element not in ("e4m3", "e5m2"):
        return "", f"TransformerEngine has no element {f.element}"
    if f.targets:
        return "", f"its targets are {list(f.targets)}; TransformerEngine aims FP8 at the end of the grid"
    if f.scale == "e8m0":
        if f.block != (1, 32):
            return "", f"its blocks are {_size(f)}; MXFP8BlockScaling is served with 1x32"
        rounding = f.scale_rounding or "rceil"
        return (
            MXFP8,
            "" if rounding == "rceil" else f"its scales are rounded by {rounding}; TransformerEngine's by rceil",
        )
    if f.scale not in ("fp32", "pow2"):
        return "", f"TransformerEngine has no {f.scale} scales of {f.element}"
    if f.block == (0, 0):
        if operand.amax == "delayed":
            return DELAYED, "" if f.scale == "fp32" else "a delayed scale of TransformerEngine is no power of two"
        return CURRENT, ""
    if f.block in ((1, 128), (128, 128)):
        return BLOCK, ""
    return "", f"one scale spans {_size(f)}; TransformerEngine's FP8 has a tensor, 1x128, 128x128 or MX's 1x32"


def _size(f: Format) -> str:
    names = ["whole axis" if size == 0 else str(size) for size in f.block]
    return "a row" if f.block == (1, 0) else "x".join(names)


def _unlike_nvfp4(f: Format) -> str:
    if f.scale != "e4m3" or f.block not in ((1, 16), (16, 16)):
        return f"it has {f.scale} scales of {_size(f)}; TransformerEngine's e2m1 has e4m3 scales of 1x16 or 16x16"
    if f.tensor_scale is not True:
        spans = "row" if f.tensor_scale == "row" else "1x128"
        return f"its fp32 scale spans a {spans}; TransformerEngine trains with one a tensor"
    if f.zero != "keep":
        return f"a block scale of zero is stored as '{f.zero}'; TransformerEngine keeps it"
    chooses, order = set(f.targets) == {6.0, 4.0}, f.scale_rounding or "nearest"
    if f.targets and not chooses and f.targets != (6.0,):
        return f"its targets are {list(f.targets)}; TransformerEngine knows 6, and 6 or 4"
    if f.tensor_max not in ((448.0, 256.0) if chooses else (448.0,)):
        known = "448 or 256" if chooses else "448"
        return f"its largest block scale is aimed at {f.tensor_max:g}; TransformerEngine's at {known}"
    if order != ("te_2_14" if chooses else "nearest"):
        return f"its scales are rounded in the order '{order}'; TransformerEngine 2.15 and later has another here"
    return ""


def _nvfp4(sides: Mapping[str, Any], inner: Any, role: str) -> dict[str, Any] | str:
    needs: dict[str, Any] = {}
    for name, operand in sides.items():
        f = operand.format
        chooses = len(f.targets) > 1
        if name == "w":
            needs["disable_2d_quantization"] = f.block == (1, 16)
        elif f.block != (1, 16):
            return f"{name} is {f.name} with blocks of {_size(f)}; TransformerEngine has those for weights only"
        if name == "dy":
            needs["disable_stochastic_rounding"] = operand.rounding == "nearest"
            if chooses:
                return "dy chooses 6 or 4 per block; TransformerEngine's 4over6 is for weights and activations"
            continue
        needs[f"46.{name}"] = chooses
        if chooses:
            needs[f"256.{name}"] = f.tensor_max == 256
            if needs.setdefault("nvfp4_4over6_err_mode", f.select.upper()) != f.select.upper():
                return "x and w choose 6 or 4 by different errors; TransformerEngine has one nvfp4_4over6_err_mode"
    if needs.get("46.x"):
        if inner:
            return "x chooses 6 or 4 and is rotated; TransformerEngine's 4over6 does not go with its rotation"
        needs["disable_rht"] = True
    if role == "wgrad":
        if inner and (inner.size, inner.signs, inner.rounds) != (16, "fixed", 1):
            return f"the contracted axis is rotated by {inner}; TransformerEngine's rotation is H16 (fixed signs)"
        needs["disable_rht"] = inner is None
    return needs


def _block(sides: Mapping[str, Any], inner: Any, role: str) -> dict[str, Any] | str:
    dims = {name: 1 if operand.format.block[0] == 1 else 2 for name, operand in sides.items()}
    if sum(dims.values()) == 4:
        return f"{' and '.join(sides)} both have 128x128 blocks; TransformerEngine multiplies at most one such operand"
    needs: dict[str, Any] = {DIMS[name]: dim for name, dim in dims.items()}
    return needs | {f"pow2.{name}": operand.format.scale == "pow2" for name, operand in sides.items()}


def _fp8(recipe: str, sides: Mapping[str, Any], needs: Mapping[str, Any]) -> Needs | str:
    """``needs``, and what all FP8 recipes share: elements, roundings, one kind of scale, one history."""
    needs = dict(needs) | {"recipe": recipe}
    if recipe == NVFP4:
        return needs
    for name, operand in sides.items():
        if operand.rounding != "nearest":
            return f"{name} is rounded stochastically; TransformerEngine rounds FP8 to nearest"
        if name == "dy":
            needs["fp8_format"] = "E4M3" if operand.format.element == "e4m3" else "HYBRID"
        elif operand.format.element != "e4m3":
            return f"{name} is {operand.format.element}; TransformerEngine has e5m2 for gradients only"
    both = list(sides.values())
    if recipe == CURRENT:
        needs["use_power_2_scales"] = both[0].format.scale == "pow2"
        if both[0].format.scale != both[1].format.scale:
            return (
                f"only one of {' and '.join(sides)} has power-of-two scales; TransformerEngine has one option for all"
            )
    if recipe == DELAYED:
        needs["amax_history_len"] = both[0].window
        if both[0].window != both[1].window:
            return f"{' and '.join(sides)} have histories of different lengths; TransformerEngine has one for all"
    return needs


def choice(needs: Needs, override: str | None = None) -> TeChoice:
    """The recipe that meets the needs; what they leave open keeps its default."""
    recipe = needs["recipe"]
    options = {name: needs.get(name, value) for name, value in DEFAULTS[recipe].items()}
    options["backward_override"] = override
    pow2: tuple[tuple[str, bool], ...] = ()
    if recipe == NVFP4:
        options["nvfp4_4over6"] = _scope(needs.get("46.x", False), needs.get("46.w", False))
        options["nvfp4_4over6_e4m3_use_256"] = _scope(needs.get("256.x", True), needs.get("256.w", True))
    if recipe == BLOCK:
        given = {name: needs[key] for name in QPARAMS if (key := f"pow2.{name}") in needs}
        pow2 = tuple((name, given.get(name, True)) for name in QPARAMS)
        options["use_f32_scales"] = not any(given.values())
        if DIMS["w"] not in needs and 2 in (needs.get(DIMS["x"]), needs.get(DIMS["dy"])):
            options[DIMS["w"]] = 1  # no part of this product; TransformerEngine allows one square operand in all
    return TeChoice(recipe, tuple(options.items()), pow2)


def _scope(x: bool, w: bool) -> str:
    return {(False, False): "none", (True, False): "activations", (False, True): "weights", (True, True): "all"}[x, w]


@lru_cache(maxsize=512)
def alone(gemm: Any, role: str) -> TeChoice:
    """The recipe by which one product is computed: without the rotation unless this product is the one that has it.

    Raises:
        ValueError: if TransformerEngine cannot serve the product.
    """
    needs = te_product(gemm, role)
    if isinstance(needs, str):
        raise ValueError(f"te refuses {role}: {needs}; use backend 'auto'")
    return choice({"disable_rht": True, **needs} if needs["recipe"] == NVFP4 else needs)


def te_recipe(recipe: Any) -> TeChoice | str:
    """A whole layer's recipe (``lowprec.linear.recipe.LinearRecipe``) as one of TransformerEngine's, or why not."""
    quantized = [role for role in OPERANDS if getattr(recipe, role).quantized]
    if not quantized:
        return "nothing is quantised; the layer needs no recipe"
    joined: dict[str, tuple[str, Any]] = {}
    for role in quantized:
        needs = te_product(getattr(recipe, role), role)
        if isinstance(needs, str):
            return f"{role}: {needs}"
        for key, value in needs.items():
            before, wanted = joined.setdefault(key, (role, value))
            if wanted != value:
                return (
                    f"{before} needs {key}={wanted!r} and {role} {key}={value!r}; TransformerEngine has one for a layer"
                )
    override = None
    if len(quantized) < 3:
        sources = {recipe.dgrad.b.source, recipe.wgrad.b.source}
        if quantized != ["fprop"] or len(sources) > 1:
            rest = " and ".join(role for role in OPERANDS if role not in quantized)
            return f"{rest} is not quantised; TransformerEngine can leave out the whole backward only"
        override = "high_precision" if sources == {"original"} else "dequantized"
        if joined["recipe"][1] == DELAYED:
            return "the backward is not quantised; DelayedScaling has no backward_override"
    return choice({key: value for key, (_, value) in joined.items()}, override)


def refusal(recipe: Any) -> str | None:
    """Why TransformerEngine cannot serve all quantised products of a recipe, or None."""
    for role in OPERANDS:
        if getattr(recipe, role).quantized and isinstance(why := te_product(getattr(recipe, role), role), str):
            return f"{role}: {why}"
    return None


def describe(recipe: Any) -> str:
    """One sentence for the plan: as what TransformerEngine serves a recipe, or why it refuses."""
    if why := refusal(recipe):
        return f"refuses, {why}"
    whole = te_recipe(recipe)
    if isinstance(whole, TeChoice):
        return f"serves as {whole}"
    roles = [role for role in OPERANDS if getattr(recipe, role).quantized]
    if not roles:
        return f"not asked: {whole}"
    return "serves " + ", ".join(f"{r} as {alone(getattr(recipe, r), r)}" for r in roles) + f" ({whole})"
