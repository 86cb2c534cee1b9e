"""TransformerEngine: which recipe is ours, why others are none, and kernels/te.py run against a double of it.

Nothing of TransformerEngine is needed. Where its package is installed (also without CUDA: the wheel of pure Python
parts), its recipe classes are loaded from their file and used as well, and the record is held to its sources.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys

import pytest
import torch

from lowprec.kernels import te_recipe
from lowprec.kernels.te_recipe import DEFAULTS, describe, te_product
from lowprec.linear.recipe import LinearRecipe, Operand, Rotation
from lowprec.numerics import FORMATS, Format
from lowprec.tools import te_signatures
from tests.kernels.te_double import RECORD, VERSIONS, Recorded, forward_only, four_six, recipe_of, shipped

CPU, BF16 = torch.device("cpu"), torch.bfloat16
NEWEST = VERSIONS[-1]


def real_recipes():
    """transformer_engine.common.recipe of the installed package, alone; None if there is none."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        return None
    path = f"{spec.submodule_search_locations[0]}/common/recipe/__init__.py"
    spec = importlib.util.spec_from_file_location("te_recipes_alone", path)
    module = sys.modules["te_recipes_alone"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- which recipe


def test_every_field_is_passed_at_the_recorded_default():
    for name, fields in DEFAULTS.items():
        recorded = Recorded(NEWEST).table[name].parameters
        assert set(recorded) == set(fields), name
        for field, value in fields.items():
            default = recorded[field].default
            if field.startswith("fp8_gemm"):
                assert value is True
            else:
                assert value == (default.removeprefix("Format.") if isinstance(default, str) else default), field


@pytest.mark.parametrize("version", VERSIONS)
def test_shipped_recipes_become_recipe_objects(version):
    modules = [Recorded(version).recipes]
    real = real_recipes()  # None unless transformer_engine is installed: then the record alone is tested against
    if real is not None and version == NEWEST:
        modules.append(real)
    served = 0
    for name, recipe in shipped().items():
        choice = te_recipe.te_recipe(recipe)
        if isinstance(choice, str):
            assert describe(recipe).startswith(("refuses, ", "serves ")), name
            continue
        served += 1
        for module in modules:
            made = choice.build(module)
            known = inspect.signature(type(made)).parameters
            for field, value in choice.options:
                if field in known:
                    got = getattr(made, field)
                    got = got.name if field.endswith("_format") else got
                    assert (got.use_split_accumulator if field.startswith("fp8_gemm") else got) == value, (name, field)
            for operand, power in choice.pow2:
                assert getattr(made, te_recipe.QPARAMS[operand]).power_2_scale is power
    assert served >= 12


def test_the_record_is_that_of_the_installed_version():
    if importlib.util.find_spec("transformer_engine") is None:
        assert set(RECORD) == {"2.15.0", "2.20.2"}  # read from the wheels of these versions by tools/te_signatures.py
        return
    version, read = te_signatures.opened(None)
    assert te_signatures.signatures(read) == RECORD[version]


SOURCE = """
import nowhere
class K:
    one: int = os.getenv('V', '0') == '1'
    mode: str = M.A
    free = 3
    def f(self, x, y=2, *args, z, **more): raise SystemExit
    @staticmethod
    def g(self, *, q='r'): ...
"""


def test_signatures_are_read_without_importing():
    files = {"a.py": SOURCE, "pytorch/__init__.py": f"from b import {', '.join(te_signatures.EXPORTED)}"}
    wanted = {"a.py": ("K", "K.f", "K.g")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(te_signatures, "WANTED", wanted)
        assert te_signatures.signatures(files.__getitem__) == {
            "a.py:K": "one=False, mode='M.A'",
            "a.py:K.f": "x, y=2, *args, z, **more",
            "a.py:K.g": "self, *, q='r'",
        }
        patch.setattr(te_signatures, "WANTED", {"a.py": ("K.h",)})
        with pytest.raises(ValueError, match=r"has no a\.py:K\.h any more"):
            te_signatures.signatures(files.__getitem__)


def test_environment_variables_change_nothing(monkeypatch):
    wanted = te_recipe.te_recipe(recipe_of("nvfp4"))
    for field in ("DISABLE_RHT", "DISABLE_STOCHASTIC_ROUNDING", "DISABLE_2D_QUANTIZATION", "ROW_SCALED_ACTIVATION"):
        monkeypatch.setenv(f"NVTE_NVFP4_{field}", "1")
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    monkeypatch.setenv("NVTE_BACKWARD_OVERRIDE", "dequantized")
    for module in filter(None, (Recorded(NEWEST).recipes, real_recipes())):
        made = wanted.build(module)
        assert not made.disable_rht and not getattr(made, "row_scaled_activation", False)
        assert made.backward_override is None
        made = te_recipe.te_recipe(recipe_of("fp8_blockwise_pow2")).build(module)
        assert made.fp8_quant_fwd_inp.power_2_scale and made.fp8_quant_bwd_grad.power_2_scale


ROTATED = {"inner": Rotation(16)}
SERVED = [
    (recipe_of("nvfp4"), "NVFP4BlockScaling()"),
    (recipe_of("nvfp4", wgrad={"inner": None}), "NVFP4BlockScaling(disable_rht=True)"),
    (
        recipe_of("nvfp4", dgrad={"a": Operand(FORMATS["nvfp4"])}, wgrad={"a": Operand(FORMATS["nvfp4"])}),
        "NVFP4BlockScaling(disable_stochastic_rounding=True)",
    ),
    (
        four_six(),
        "NVFP4BlockScaling(disable_rht=True, disable_2d_quantization=True, nvfp4_4over6='all', "
        "nvfp4_4over6_err_mode='MSE')",
    ),
    (
        four_six(w="nvfp4"),
        "NVFP4BlockScaling(disable_rht=True, disable_2d_quantization=True, nvfp4_4over6='activations', "
        "nvfp4_4over6_err_mode='MSE')",
    ),
    (
        four_six(tensor_max=448.0, select="mae"),
        "NVFP4BlockScaling(disable_rht=True, disable_2d_quantization=True, nvfp4_4over6='all', "
        "nvfp4_4over6_e4m3_use_256='none')",
    ),
    (recipe_of("fp8_blockwise"), "Float8BlockScaling(use_f32_scales=True)"),
    (recipe_of("fp8_tensorwise"), "Float8CurrentScaling()"),
    (recipe_of("fp8_delayed"), "DelayedScaling()"),
    (recipe_of("mxfp8"), "MXFP8BlockScaling()"),
    (forward_only("original"), "MXFP8BlockScaling(backward_override='high_precision')"),
    (forward_only("fprop"), "MXFP8BlockScaling(backward_override='dequantized')"),
    (
        recipe_of(
            "fp8_blockwise_pow2",
            fprop={"a": Operand(FORMATS["fp8_128x128_pow2"]), "b": Operand(FORMATS["fp8_1x128_pow2"])},
            dgrad={"b": Operand(FORMATS["fp8_1x128_pow2"])},
            wgrad={"b": Operand(FORMATS["fp8_128x128_pow2"])},
        ),
        "Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1)",
    ),
]


@pytest.mark.parametrize(("recipe", "as_what"), SERVED)
def test_served(recipe, as_what):
    assert describe(recipe) == f"serves as {as_what}"
    for role in ("fprop", "dgrad", "wgrad"):
        if getattr(recipe, role).quantized:
            choice, real = te_recipe.alone(getattr(recipe, role), role), real_recipes()
            assert type(choice.build(Recorded(NEWEST).recipes)).__name__ in as_what
            assert real is None or choice.missing(real) or type(choice.build(real)).__name__ in as_what


E4M3 = FORMATS["fp8_tensor"]
REFUSED = [
    ("nvfp4", {"fprop": ROTATED}, "fprop: the contracted axis is rotated; "),
    ("nvfp4", {"wgrad": {"inner": Rotation(32)}}, r"wgrad: the contracted axis is rotated by H32 \(fixed signs\)"),
    ("nvfp4", {"wgrad": {"inner": Rotation(16, "step")}}, r"rotated by H16 \(step signs\)"),
    ("nvfp4", {"fprop": {"outer_a": Rotation(16)}}, "fprop: a free axis is rotated"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["nvfp4"], "stochastic")}}, "x is rounded stochastically; .* only gradie"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["nvfp4_2d"])}}, "blocks of 16x16; .* weights only"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["nvfp4_row"])}}, "its fp32 scale spans a row"),
    ("nvfp4", {"dgrad": {"a": Operand(FORMATS["nvfp4_sr"], "stochastic")}}, "dgrad: dy is nvfp4_sr: .* guard of 1.062"),
    ("nvfp4", {"dgrad": {"a": Operand(FORMATS["nvfp4_46"])}}, "dy chooses 6 or 4 per block"),
    ("nvfp4", {"wgrad": {"b": Operand(FORMATS["nvfp4_46"])}}, "x chooses 6 or 4 and is rotated"),
    ("nvfp4", {"fprop": {"b": Operand()}}, "fprop: w is not quantised"),
    (
        "nvfp4",
        {"fprop": {"b": Operand(FORMATS["mxfp8"])}},
        "x and w would need NVFP4BlockScaling and MXFP8BlockScaling",
    ),
    ("nvfp4", {"dgrad": {"b": Operand(FORMATS["nvfp4"], source="fprop")}}, "w is quantised from its forward value"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["mxfp4"])}}, "e8m0 scales of 1x32"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["nvfp4_ue5m3"])}}, "ue5m3 scales of 1x16"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["if4"])}}, "a block chooses between e2m1 and if4_int"),
    ("nvfp4", {"fprop": {"a": Operand(dataclasses.replace(FORMATS["nvfp4"], zero="one"))}}, "is stored as 'one'"),
    ("nvfp4", {"fprop": {"a": Operand(dataclasses.replace(FORMATS["nvfp4"], targets=(4.0,)))}}, r"targets are \[4.0\]"),
    ("nvfp4", {"fprop": {"a": Operand(dataclasses.replace(FORMATS["nvfp4"], tensor_max=256.0))}}, "aimed at 256"),
    ("nvfp4", {"fprop": {"a": Operand(FORMATS["nvfp4"], amax="hold", window=50)}}, "held for 50 steps"),
    ("mxfp8", {"fprop": {"a": Operand(FORMATS["mxfp8_floor"])}}, "rounded by floor"),
    ("mxfp8", {"fprop": {"a": Operand(FORMATS["mxfp8_e5m2"])}}, "x is e5m2; .* gradients only"),
    ("mxfp8", {"dgrad": {"a": Operand(FORMATS["mxfp8"], "stochastic")}}, "rounds FP8 to nearest"),
    ("mxfp8", {"fprop": {"a": Operand(Format("wide", "e4m3", (1, 64), "e8m0"))}}, "blocks are 1x64"),
    ("fp8_blockwise", {"fprop": {"a": Operand(FORMATS["fp8_128x128"])}}, "both have 128x128 blocks"),
    ("fp8_blockwise", {"fprop": {"a": Operand(Format("half", "e4m3", (1, 64)))}}, "one scale spans 1x64"),
    ("fp8_tensorwise", {"fprop": {"a": Operand(FORMATS["fp8_tensor_pow2"])}}, "only one of x and w has power-of-two"),
    ("fp8_tensorwise", {"fprop": {"a": Operand(E4M3, gradient="trust")}}, "gradient trust"),
    ("fp8_delayed", {"fprop": {"a": Operand(E4M3, amax="delayed", window=16)}}, "histories of different lengths"),
    ("fp8_delayed", {"fprop": {"a": Operand(E4M3)}}, "would need Float8CurrentScaling and DelayedScaling"),
]


@pytest.mark.parametrize(("name", "products", "reason"), REFUSED)
def test_refused_with_the_reason(name, products, reason):
    recipe = recipe_of(name, **products)
    (role,) = products
    why = te_product(getattr(recipe, role), role)
    with pytest.raises(ValueError, match=rf"te refuses {role}: {'.*' + reason.split(': ', 1)[-1]}"):
        te_recipe.alone(getattr(recipe, role), role)
    assert isinstance(why, str) and describe(recipe) == f"refuses, {role}: {why}"
    assert isinstance(te_recipe.te_recipe(recipe), str) and te_recipe.refusal(recipe) == f"{role}: {why}"
    assert why.count(". ") == 0 and not why.endswith(".")  # one clause; who raises it ends the sentence


def test_products_that_no_single_recipe_has_are_served_one_by_one():
    nearest = recipe_of("nvfp4", dgrad={"a": Operand(FORMATS["nvfp4"])})
    assert describe(nearest) == (
        "serves fprop as NVFP4BlockScaling(disable_rht=True), dgrad as NVFP4BlockScaling(disable_rht=True, "
        "disable_stochastic_rounding=True), wgrad as NVFP4BlockScaling() (dgrad needs disable_stochastic_rounding=True "
        "and wgrad disable_stochastic_rounding=False; TransformerEngine has one for a layer)"
    )
    late = recipe_of("nvfp4", fprop={"a": Operand(), "b": Operand()})
    assert "fprop is not quantised; TransformerEngine can leave out the whole backward only" in describe(late)
    assert describe(LinearRecipe("plain")).startswith("not asked: nothing is quantised")


def test_an_option_that_a_version_lacks():
    choice = te_recipe.te_recipe(four_six())
    with pytest.raises(ValueError, match="has no option nvfp4_4over6, which must be 'all'; install a newer one"):
        choice.build(Recorded("2.15.0").recipes)
    assert choice.build(Recorded(NEWEST).recipes).nvfp4_4over6 == "all"


def test_the_page_is_what_the_code_says():
    assert te_signatures.PAGE.read_text() == te_signatures.page(), "run python -m lowprec.tools.te_signatures --page"
