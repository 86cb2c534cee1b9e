"""The definition of a product: against reference vectors, exact arithmetic, and every recipe's plumbing."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowprec.linear import BF16, Gemm, LinearRecipe, Operand, load_recipe, oracle
from lowprec.linear.backends import backend, gemm
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.numerics import ELEMENTS, FORMATS, Element, Format, Stream, sqnr_db
from lowprec.numerics.element import minifloat

RECIPES = ["bf16", "nvfp4", "mxfp8", "fp8_tensorwise", "fp8_blockwise", "quartet2", "mxfp4_rht_sr", "ufp4"]


def operands(role, x_TK, w_NK, dy_TN):
    """The views (a, b) that a layer multiplies in this product."""
    return {"fprop": (x_TK, w_NK), "dgrad": (dy_TN, w_NK.T), "wgrad": (dy_TN.T, x_TK.T)}[role]


def nearest(gemm):
    """The same product without stochastic rounding."""
    return dataclasses.replace(
        gemm, a=dataclasses.replace(gemm.a, rounding="nearest"), b=dataclasses.replace(gemm.b, rounding="nearest")
    )


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_blockwise", "fp8_blockwise_pow2"])
def test_fp8_products_equal_the_reference(name):
    """Within the order of an fp32 sum of the same operands; bit for bit with power-of-two scales."""
    golden = Path(__file__).parent.parent / "golden"
    inputs, outputs = load_file(golden / "nvfp4_gemm.safetensors"), load_file(golden / "fp8_gemm.safetensors")
    for role, out in (("fprop", "y"), ("dgrad", "dx"), ("wgrad", "dw")):
        a, b = operands(role, inputs["x"], inputs["w"], inputs["dy"])
        qa, qb = oracle.prepare_both(a, b, getattr(load_recipe(name), role), Stream(), role)
        result, expected = oracle.multiply(qa, qb)[:32], outputs[f"{name}.{out}"]
        exact = [(q.blockscaled() * q.tensor_scale).double().abs() for q in (qa, qb)]
        bound = 2 * a.shape[1] * 2.0**-24 * (exact[0] @ exact[1].T)[:32]
        assert ((result.double() - expected.double()).abs() <= bound).all(), role
        assert name != "fp8_blockwise_pow2" or torch.equal(result, expected), role


def test_nvfp4_products_equal_the_reference():
    """dx and dw bit for bit; y to one fp32 ulp, because the reference multiplies the tensor scales in another order."""
    golden = load_file(Path(__file__).parent.parent / "golden" / "nvfp4_gemm.safetensors")
    for role, out in (("fprop", "y"), ("dgrad", "dx"), ("wgrad", "dw")):
        a, b = operands(role, golden["x"], golden["w"], golden["dy"])
        result = oracle.gemm(a, b, nearest(getattr(load_recipe("nvfp4"), role)), Stream(), role, torch.float32)
        if out == "y":
            torch.testing.assert_close(result, golden[out], rtol=2.0**-22, atol=0)
        else:
            assert torch.equal(result, golden[out])


@pytest.mark.parametrize("role", GEMM_OPERANDS)
@pytest.mark.parametrize("name", RECIPES)
def test_near_fp32_elements_give_exact_products(name, role, monkeypatch):
    """With 15-bit significands for elements only blocks, scales, rotations and transposes remain: > 85 dB."""
    monkeypatch.setitem(ELEMENTS, "wide", Element("wide", minifloat(5, 14)))

    def widen(operand):
        if operand.format is None:
            return operand
        return dataclasses.replace(operand, format=Format(operand.format.name, "wide", operand.format.block))

    spec = getattr(load_recipe(name), role)
    spec = dataclasses.replace(spec, a=widen(spec.a), b=widen(spec.b))
    g = torch.Generator().manual_seed(0)
    a, b = operands(
        role, torch.randn(128, 256, generator=g), torch.randn(384, 256, generator=g), torch.randn(128, 384, generator=g)
    )
    result = oracle.gemm(a, b, spec, Stream(), role, torch.float32)
    assert sqnr_db(a.double() @ b.double().T, result) > 85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("role", GEMM_OPERANDS)
@pytest.mark.parametrize("name", RECIPES)
def test_torch_backend_multiplies_the_same_operands(name, role, dtype):
    """One fp32 product instead of a sum of blocks: within (k + blocks) 2^-24 sum |a||b| of it, in fp32."""
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(s, generator=g).to(dtype) for s in ((128, 256), (384, 256), (128, 384)))
    a, b = operands(role, x, w, dy)
    spec = getattr(load_recipe(name), role)
    qa, qb = oracle.prepare_both(a, b, spec, Stream(), role)
    expected = oracle.multiply(qa, qb)
    result = gemm(backend("torch"), a, b, spec, Stream(), role, torch.float32)
    magnitude = qa.blockscaled().abs().double() @ qb.blockscaled().abs().double().T * qa.tensor_scale * qb.tensor_scale
    assert ((result - expected).abs() <= 2 * a.shape[1] * 2.0**-24 * magnitude).all()


def test_fp4_block_sums_are_exact():
    """Inside a block nothing is rounded: the fp64 sum of a block equals the fp32 one bit for bit."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 256, generator=g), torch.randn(64, 256, generator=g)
    spec = Gemm(Operand(FORMATS["nvfp4"]), Operand(FORMATS["nvfp4"]))
    qa, qb = oracle.prepare_both(a, b, spec, Stream(), "fprop")
    wide = [dataclasses.replace(q, values=q.values.double()) for q in (qa, qb)]
    for start in range(0, 256, 16):
        part = slice(start, start + 16)
        assert torch.equal(
            (wide[0].values[:, part] @ wide[1].values[:, part].T).float(), qa.values[:, part] @ qb.values[:, part].T
        )


def test_noise_belongs_to_the_place_in_memory():
    """A transposed view is rounded with the transposed noise, so kernels need no transposed copy."""
    x = torch.randn(32, 48)
    stream = Stream(seed=1, layer="l")
    assert torch.equal(stream.noise_like("wgrad.dy", x.T), stream.noise_like("wgrad.dy", x).T)


def test_rotation_signs_follow_their_kind():
    recipe = load_recipe("nvfp4")
    assert recipe.wgrad.inner is not None
    x = torch.eye(64)
    first = oracle.turned(x, recipe.wgrad.inner, Stream(step=1), "wgrad")
    assert torch.equal(first, oracle.turned(x, recipe.wgrad.inner, Stream(step=2), "wgrad"))
    stepwise = dataclasses.replace(recipe.wgrad.inner, signs="step", size=64)
    draws = [oracle.turned(x, stepwise, Stream(step=i), "wgrad") for i in range(4)]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))


def test_one_quantised_operand_is_served():
    """Weight-only recipes: the other operand keeps its dtype's values."""
    x, w = torch.randn(32, 64), torch.randn(16, 64)
    spec = Gemm(Operand(), Operand(FORMATS["int8_row"]))
    expected = x.double() @ FORMATS["int8_row"].quantize(w).dequantize().double().T
    assert sqnr_db(expected, oracle.gemm(x, w, spec, Stream(), "fprop", torch.float32)) > 120


def test_describe_prints_three_equations():
    text = load_recipe("nvfp4").describe()
    assert text.splitlines()[0] == "fprop  y = x w^T  with  x: nvfp4, w^T: nvfp4_2d"
    assert "dy: nvfp4~, w: nvfp4_2d (reused)" in text and "rotated by H16 (fixed signs)" in text
    assert not BF16.quantized and LinearRecipe("a", fprop=Gemm(Operand(FORMATS["nvfp4"]))).quantized
