"""lowprec.linear.measure: each number is what its definition says, for plain recipes and for awkward ones."""

import json
import math

import pytest
import torch
from torch import Tensor

from lowprec.linear import Call, load_precision, load_recipe
from lowprec.linear.measure import binades, cosine, decomposition, operand_measures, product_measures
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.weight import CodedWeight, encode_weight, payload
from lowprec.numerics import FORMATS, Stream, fixed_signs, rotate
from lowprec.numerics.error import bias, sqnr_db

RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """bf16 x (64, 96), w (80, 96), dy (64, 80), with an outlier in x."""
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(shape, generator=g) for shape in ((64, 96), (80, 96), (64, 80)))
    x[3, 5] = 40.0
    return {"x": x.bfloat16(), "w": (0.05 * w).bfloat16(), "dy": (1e-4 * dy).bfloat16()}


def call(name: str) -> Call:
    return Call(load_recipe(name), Stream(1, 2, 3, "layer"))


def test_operands_of_nvfp4(tensors: dict[str, Tensor]) -> None:
    """Each operand against `Format.quantize` itself, the rotated ones against rotation before and after."""
    found = operand_measures(tensors, call("nvfp4"))
    x, w = tensors["x"], tensors["w"]
    q = FORMATS["nvfp4"].quantize(x)
    assert found["fprop"]["x"]["sqnr_db"] == pytest.approx(sqnr_db(x, q.dequantize()), rel=1e-6)
    assert found["fprop"]["x"]["bias"] == pytest.approx(bias(x, q.dequantize()), abs=1e-7)
    assert found["fprop"]["x"]["amax"] == 40.0
    assert found["fprop"]["x"]["max_over_mean"] == pytest.approx(40.0 / x.float().abs().mean().item())
    zeros = ((q.values() == 0) & (x != 0)).sum() / (x != 0).sum()
    assert found["fprop"]["x"]["underflow_frac"] == pytest.approx(zeros.item())
    scale = q.block_scales().repeat_interleave(16, 1) * q.tensor_scale
    assert found["fprop"]["x"]["saturation_frac"] == pytest.approx((x.float().abs() > 6 * scale).float().mean().item())
    assert found["fprop"]["x"]["scale_log2"] == binades(q.block_scales())
    square = FORMATS["nvfp4_2d"].quantize(w).dequantize()
    assert found["fprop"]["w"]["sqnr_db"] == pytest.approx(sqnr_db(w, square), rel=1e-6)
    assert found["dgrad"]["w"] == found["fprop"]["w"], "the same codes, transposed"
    turned = rotate(x.T.contiguous(), 16, fixed_signs(16))
    expected = sqnr_db(turned, FORMATS["nvfp4"].quantize(turned).dequantize())
    assert found["wgrad"]["x"]["sqnr_db"] == pytest.approx(expected, rel=1e-6)
    assert found["wgrad"]["x"]["amax"] == 40.0, "of the tensor, not of the rotated one"


def test_products_of_nvfp4(tensors: dict[str, Tensor]) -> None:
    """fprop by hand; dgrad and wgrad with stochastic operands have no more bias than a few standard errors."""
    found = product_measures(tensors, call("nvfp4"))
    x, w = tensors["x"], tensors["w"]
    y = FORMATS["nvfp4"].quantize(x).dequantize() @ FORMATS["nvfp4_2d"].quantize(w).dequantize().T
    exact = x.float() @ w.float().T
    assert found["fprop"]["sqnr_db"] == pytest.approx(sqnr_db(exact, y), abs=1e-4)
    assert found["fprop"]["cosine"] == pytest.approx(torch.cosine_similarity(exact.flatten(), y.flatten(), 0).item())
    assert set(found) == {"fprop", "dgrad", "wgrad"} and all(10 < m["sqnr_db"] < 25 for m in found.values())


def test_a_weight_that_came_as_codes(tensors: dict[str, Tensor]) -> None:
    """Only the weight gradient can be measured, and it is the same as with the weight."""
    whole, recipe = product_measures(tensors, call("nvfp4")), load_recipe("nvfp4")
    w = tensors["w"]
    q = encode_weight(w, recipe, w.abs().amax().float())
    tensors["w"] = CodedWeight.of(payload(q)[None], recipe, (80, 96), q.tensor_scale)
    assert product_measures(tensors, call("nvfp4")) == {"wgrad": whole["wgrad"]}
    assert set(operand_measures(tensors, call("nvfp4"))) == {"wgrad"}


def test_an_unquantised_layer_has_nothing_to_measure(tensors: dict[str, Tensor]) -> None:
    assert product_measures(tensors, call("bf16")) == {} == operand_measures(tensors, call("bf16"))


def test_the_error_is_the_sum_of_its_parts(tensors: dict[str, Tensor]) -> None:
    """R = A + B + C; a clean input has no A and C; an unquantised product no B and C, and its gain is that of w."""
    arrived = {**tensors, "x": (tensors["x"].float() * 1.02).bfloat16()}
    d = decomposition(arrived, tensors["x"], call("nvfp4"))
    assert d["R"] == pytest.approx(d["A"] + d["B"] + d["C"], rel=1e-9) and min(d["R"], d["A"], d["B"]) > 0
    clean = decomposition(tensors, tensors["x"], call("nvfp4"))
    assert clean["A"] == clean["C"] == 0 and clean["R"] == clean["B"] and clean["gain"] is None
    exact = decomposition({**arrived, "x": tensors["x"] * 2}, tensors["x"], call("bf16"))
    assert exact["A"] == pytest.approx(1.0, rel=1e-2) and exact["gain"] == pytest.approx(1.0, rel=1e-2)


def test_binades_and_cosine() -> None:
    assert binades(torch.tensor([0.0, 1.0, 1.5, 0.25])) == {"zero": 0.25, "-2": 0.25, "0": 0.5}
    a = torch.tensor([3.0, 4.0])
    assert cosine(a, 2 * a) == pytest.approx(1) and cosine(a, torch.tensor([-4.0, 3.0])) == 0
    assert cosine(a, torch.zeros(2)) is None


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_measured(name: str, tensors: dict[str, Tensor]) -> None:
    """Splits, rotations, forward values, integers, attention's own: numbers, all finite, and JSON."""
    for recipe in load_precision(name).linear.values():
        found = operand_measures(tensors, Call(recipe, Stream(1, 2, 3, "layer")))
        products = product_measures(tensors, Call(recipe, Stream(1, 2, 3, "layer")))
        text = json.dumps([found, products], allow_nan=False)
        assert math.isfinite(len(text))
        assert set(products) == {role for role in ("fprop", "dgrad", "wgrad") if getattr(recipe, role).quantized}
        for role, operands in found.items():
            for measures in operands.values():
                assert 0 <= measures["underflow_frac"] <= 1 and 0 <= measures["saturation_frac"] <= 1
                assert sum(measures["scale_log2"].values()) == pytest.approx(1)
                assert measures["sqnr_db"] is None or measures["sqnr_db"] > 0, role
