"""A product, whole: sources, rotations, splits, memory, sharing, and what may be kept for the backward."""

import dataclasses
from functools import partial

import pytest
import torch

from lowprec.linear import Call, Gemm, LinearRecipe, Operand, Policy, QuantizedLinear, Rotation, load_recipe
from lowprec.linear.product import product
from lowprec.linear.split import ChannelSplit, LowRankSplit, MeanSplit, ResidualSplit
from lowprec.linear.state import LayerState, end_step, memories_of
from lowprec.numerics import ELEMENTS, FORMATS, Clock, Element, Format, Stream, rotate, sqnr_db
from lowprec.numerics.element import minifloat

T, K, N = 96, 64, 48
NV, SQUARE = FORMATS["nvfp4"], FORMATS["nvfp4_2d"]


def wide(name="wide", block=(1, 16)):
    """A format with a 15-bit significand: products through it are exact to 1e-4."""
    return Format(name, "wide", block)


@pytest.fixture(autouse=True)
def wide_element(monkeypatch):
    monkeypatch.setitem(ELEMENTS, "wide", Element("wide", minifloat(5, 14)))


def make(seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(s, generator=g) for s in ((T, K), (N, K), (T, N)))
    return {"x": x + mean * (torch.arange(K) % 16 == 0), "w": w, "dy": dy}


def exact(role, t):
    return {"fprop": t["x"] @ t["w"].T, "dgrad": t["dy"] @ t["w"], "wgrad": t["dy"].T @ t["x"]}[role]


def run(recipe, tensors, seed=1, backend="torch", **call):
    call = Call(recipe, Stream(seed, layer="l"), Policy(backend), **call)
    return {role: product(role, tensors, call, torch.float32) for role in ("fprop", "dgrad", "wgrad")}


@pytest.mark.parametrize("signs", ["none", "fixed", "step"])
@pytest.mark.parametrize("size", [0, 16])
def test_every_rotation_cancels(size, signs):
    """Rotations of all axes of all products, inner and outer, with forward codes coming back: the three exact GEMMs."""
    tensor = wide("wide_tensor", (0, 0))
    turn, o = Rotation(size, signs), Operand(tensor)
    back = dataclasses.replace(o, reuse=True)
    recipe = LinearRecipe(
        "r", Gemm(o, o, turn), Gemm(o, back, None, turn), Gemm(o, Operand(tensor, source="fprop"), turn, turn)
    )
    tensors = make()
    for role, out in run(recipe, tensors).items():
        assert sqnr_db(exact(role, tensors), out) > 80, role


@pytest.mark.parametrize(
    "make_split",
    [
        lambda: MeanSplit("quantized"),
        lambda: MeanSplit("exact"),
        lambda: LowRankSplit(3, "quantized"),
        lambda: LowRankSplit(3, "exact"),
        lambda: ChannelSplit(wide("other", (1, 32)), 0.1),
        lambda: ResidualSplit(wide("other"), 0.2),
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_every_split_is_a_sum(make_split, rotated):
    """With near-exact elements the parts add up to the three exact GEMMs, whichever operands are split."""
    inner, split = Rotation(16) if rotated else None, make_split()
    plain, cut = Operand(wide()), Operand(wide(), split=split)
    w = plain if isinstance(split, (MeanSplit, ResidualSplit)) else cut
    recipe = LinearRecipe("r", Gemm(cut, w, inner), Gemm(cut, plain, inner), Gemm(cut, cut, inner))
    tensors = make(mean=5.0)
    for role, out in run(recipe, tensors).items():
        assert sqnr_db(exact(role, tensors), out) > 80, role


def test_an_exact_mean_takes_the_outliers_out():
    """Channels of mean 20 in NVFP4: a quantised centre helps the forward, an exact one helps more, wgrad most."""
    tensors = make(mean=20.0)
    centred = tensors["x"] - tensors["x"].mean(0)
    noise = {}
    for name, split in {"none": None, "averis": MeanSplit("quantized"), "exact": MeanSplit("exact")}.items():
        x = Operand(NV, split=split)
        out = run(LinearRecipe(name, Gemm(x, Operand(NV)), Gemm(), Gemm(Operand(NV), x)), tensors)
        noise[name] = [
            float((out[role] - exact(role, tensors)).norm() / (centred @ tensors["w"].T).norm())
            for role in ("fprop", "wgrad")
        ]
    assert noise["exact"][0] < noise["averis"][0] < noise["none"][0]
    assert noise["exact"][1] < 0.7 * noise["none"][1]


def test_ms_eden_draws_its_scales_from_the_stream():
    """Same counters, same numbers; other counters, others; MS-EDEN products are unbiased."""
    recipe, tensors = load_recipe("quartet2"), make()
    first = run(recipe, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), run(recipe, tensors).values()))
    assert not torch.equal(first["dgrad"], run(recipe, tensors, seed=2)["dgrad"])
    held = LinearRecipe("original", dgrad=load_recipe("quartet2_hp").dgrad)
    many = torch.stack([run(held, tensors, seed=s)["dgrad"] for s in range(100)])
    error = (many.mean(0) - exact("dgrad", tensors)).norm() / exact("dgrad", tensors).norm()
    alone = (many[0] - exact("dgrad", tensors)).norm() / exact("dgrad", tensors).norm()
    assert error < 1.3 * alone / 10  # 1 / sqrt(100), and room for the spread of the spread


def test_forward_values_come_back_exactly():
    """source: fprop without a format is the straight-through gradient of what the forward multiplied."""
    value = Operand(source="fprop")
    recipe = LinearRecipe("ste", Gemm(Operand(NV), Operand(SQUARE)), Gemm(b=value), Gemm(b=value))
    tensors = make()
    out = run(recipe, tensors)
    x, w = NV.quantize(tensors["x"]).dequantize(), SQUARE.quantize(tensors["w"]).dequantize()
    torch.testing.assert_close(out["dgrad"], tensors["dy"] @ w, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out["wgrad"], tensors["dy"].T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gradient", ["trust", "clip"])
def test_gradients_are_masked_in_the_rotated_space(gradient):
    """dx is H^T (mask * H dx): QuEST's trust estimator and clipping, for x and for w, against the formula by hand."""
    format = Format("q", "midrise4", (1, 0), rule="rms", coef=1.5)
    o = Operand(format, gradient=gradient)
    recipe = LinearRecipe("q", Gemm(o, o, Rotation(16, "none")), Gemm(b=Operand(source="fprop")), Gemm())
    tensors = make()
    turned = {name: rotate(tensors[name], 16) for name in ("x", "w")}
    scale = {name: 1.5 * t.square().mean(1, keepdim=True).sqrt() / 7.5 for name, t in turned.items()}
    reach = 7.5 if gradient == "clip" else 8.0
    mask = {name: turned[name].abs() <= reach * scale[name] for name in turned}
    w_q = format.quantize(turned["w"]).dequantize()
    out = run(recipe, tensors)
    expected = rotate((tensors["dy"] @ w_q) * mask["x"], 16, inverse=True)
    torch.testing.assert_close(out["dgrad"], expected, rtol=1e-4, atol=1e-4)
    expected = rotate(rotate(exact("wgrad", tensors), 16) * mask["w"], 16, inverse=True)
    torch.testing.assert_close(out["wgrad"], expected, rtol=1e-4, atol=1e-4)
    assert 0 < (~mask["x"]).float().mean() < 0.3


def test_delayed_scaling_uses_the_history():
    """Step 0 uses the current maximum; step 1 the one of step 0, so that a ten times larger tensor saturates."""
    o = Operand(FORMATS["fp8_tensor"], amax="delayed", window=4)
    recipe = LinearRecipe("d", Gemm(o, Operand(FORMATS["fp8_tensor"])))
    state = LayerState(memories_of([recipe], N, K))
    tensors = make()
    first = run(recipe, tensors, state=state, observe=True)["fprop"]
    assert sqnr_db(exact("fprop", tensors), first) > 27
    end_step({"l": state}, 0)
    large = {**tensors, "x": tensors["x"] * 10}
    out = run(recipe, large, state=state, observe=True)["fprop"]
    limit = tensors["x"].abs().max()
    expected = large["x"].clamp(-limit, limit) @ large["w"].T
    assert sqnr_db(expected, out) > 25 and sqnr_db(exact("fprop", large), out) < 5
    end_step({"l": state}, 1)
    assert sqnr_db(exact("fprop", large), run(recipe, large, state=state)["fprop"]) > 25


def test_moving_centre_is_causal():
    """An EMA centre is that of earlier steps: nothing at first, then the mean; the product stays exact either way."""
    x = Operand(wide(), split=MeanSplit("exact", "ema", 0.5))
    recipe = LinearRecipe("e", Gemm(x, Operand(wide())), Gemm(), Gemm(Operand(wide()), x))
    state = LayerState(memories_of([recipe], N, K))
    for step in range(3):
        tensors = make(seed=step, mean=10.0)
        for role, out in run(recipe, tensors, state=state, observe=True).items():
            assert sqnr_db(exact(role, tensors), out) > 80, (step, role)
        end_step({"l": state}, step)
    assert state.mean("x.mean")[0] > 9


def test_activations_are_prepared_once_for_layers_that_share_them():
    """q, k and v: the same numbers as without sharing, and one preparation of x a product instead of three."""
    clock, tensors = Clock(1), make()
    count = {True: 0, False: 0}
    grads = {}
    for shared in (True, False):
        policy = Policy("torch")
        if not shared:
            policy.shared.get = lambda slot, x, what, make: make()
        original = policy.shared.get

        def counting(slot, x, what, make, original=original, shared=shared):
            def made():
                count[shared] += 1
                return make()

            return original(slot, x, what, made)

        policy.shared.get = counting
        torch.manual_seed(0)
        layers = [QuantizedLinear(K, N, False, recipe="nvfp4", clock=clock, layer=n, policy=policy) for n in "qkv"]
        x = tensors["x"].clone().requires_grad_()
        sum(layer(x).square().sum() for layer in layers).backward()
        grads[shared] = [x.grad, *(layer.weight.grad for layer in layers)]
    assert all(torch.equal(a, b) for a, b in zip(grads[True], grads[False]))
    assert count == {True: 2, False: 6}


def test_a_changed_activation_is_prepared_anew():
    """Sharing goes by contents: an in-place change of x shows in the next product."""
    layer = QuantizedLinear(K, N, False, recipe="nvfp4", policy=Policy("torch"))
    x = make()["x"]
    with torch.no_grad():
        first = layer(x)
        x.mul_(-1)
        assert torch.equal(layer(x), -first)


def noting(shapes, tensor):
    shapes.append(tensor.shape)
    return tensor


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "quartet2", "halo2_fp8", "nvfp4_4over6"])
def test_keeping_codes_changes_no_number(name):
    """save: codes against save: inputs: equal gradients, and x is not among the saved tensors."""
    found = []
    for save in ("inputs", "codes"):
        torch.manual_seed(0)
        layer = QuantizedLinear(K, N, False, recipe=name, clock=Clock(1), policy=Policy("torch", save=save))
        x, shapes = make()["x"].requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(partial(noting, shapes), lambda t: t):
            y = layer(x)
        assert (x.shape in shapes) == (save == "inputs")
        y.square().sum().backward()
        found.append((x.grad, layer.weight.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_formats_that_count_zeros_are_not_padded():
    """A mean over a block, or a grid without zero, would see padding: odd sizes give the definition, or a refusal."""
    o = Operand(Format("q", "midrise4", (1, 0), rule="rms", coef=2.0))
    g = torch.Generator().manual_seed(0)
    t = {"x": torch.randn(37, 42, generator=g), "w": torch.randn(50, 42, generator=g)}
    out = product("fprop", t, Call(LinearRecipe("q", Gemm(o, o)), Stream(), Policy("auto")), torch.float32)
    expected = o.format.quantize(t["x"]).dequantize() @ o.format.quantize(t["w"]).dequantize().T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    blocks = Operand(Format("q", "midrise4", (1, 16), rule="rms", coef=2.0))
    with pytest.raises(
        ValueError, match="contracts 42 values, which its blocks would pad to 48, but its format counts"
    ):
        product("fprop", t, Call(LinearRecipe("q", Gemm(blocks, blocks)), Stream(), Policy()), torch.float32)
