"""The autograd function and QuantizedLinear: gradients, random bits, padding, shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lowprec.linear import BF16, Gemm, LinearRecipe, Operand, Policy, QuantizedLinear, load_recipe
from lowprec.numerics import FORMATS, Clock, sqnr_db

RECIPES = ["bf16", "nvfp4", "mxfp8", "fp8_tensorwise", "fp8_blockwise"]


def layer(recipe, n=96, k=64, bias=False, **policy):
    torch.manual_seed(0)
    return QuantizedLinear(k, n, bias=bias, recipe=recipe, clock=Clock(seed=1), policy=Policy(**policy))


def run(linear, x, dy):
    """Forward and backward; returns y, dx, dw."""
    x = x.clone().requires_grad_()
    linear.weight.grad = None
    y = linear(x)
    y.backward(dy)
    return y.detach(), x.grad, linear.weight.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_recipe_is_nn_linear(dtype, bias):
    """Output and every gradient equal F.linear's with cast weights, bit for bit."""
    linear = layer("bf16", bias=bias)
    x, dy = torch.randn(3, 40, 64, dtype=dtype), torch.randn(3, 40, 96, dtype=dtype)
    y, dx, dw = run(linear, x, dy)
    x2, w2 = x.clone().requires_grad_(), linear.weight.detach().clone().requires_grad_()
    b2 = linear.bias.detach().clone().requires_grad_() if bias else None
    expected = F.linear(x2, w2.to(dtype), None if b2 is None else b2.to(dtype))
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(dx, x2.grad) and torch.equal(dw, w2.grad)
    assert b2 is None or torch.equal(linear.bias.grad, b2.grad)


def test_a_recipe_of_unquantised_products_still_equals_nn_linear_through_the_function():
    """Only dgrad quantised: y and dw are plain products of the same operands."""
    recipe = LinearRecipe("half", dgrad=load_recipe("nvfp4").dgrad)
    linear = layer(recipe)
    x, dy = torch.randn(40, 64), torch.randn(40, 96)
    y, dx, dw = run(linear, x, dy)
    w = linear.weight.detach()
    assert torch.equal(y, x @ w.T)
    torch.testing.assert_close(dw, dy.T @ x, rtol=1e-5, atol=1e-4)
    assert 10 < sqnr_db(dy @ w, dx) < 25


EXPECTED_DB = {"bf16": (100, 100, 100), "nvfp4": (16.7, 15.0, 15.6), "fp8_tensorwise": (28.6, 24.6, 24.6),
               "fp8_blockwise": (28.8, 28.8, 28.8), "mxfp8": (28.5, 28.5, 28.5)}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_noise_of_each_recipe(name):
    """SQNR of y, dx and dw on N(0, 1) data is what the formats' own noise predicts, within 0.6 dB."""
    torch.manual_seed(0)
    linear = layer(name, 384, 512)
    x, dy = torch.randn(256, 512), torch.randn(256, 384)
    w = linear.weight.detach()
    measured = [sqnr_db(ref, out) for ref, out in zip((x @ w.T, dy @ w, dy.T @ x), run(linear, x, dy))]
    for db, expected in zip(measured, EXPECTED_DB[name]):
        assert db > 100 if name == "bf16" else db == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("name", RECIPES)
def test_same_counters_same_bits_other_counters_other_bits(name):
    linear = layer(name)
    x, dy = torch.randn(64, 64), torch.randn(64, 96)
    first, again = run(linear, x, dy), run(linear, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for field in ("step", "micro"):
        setattr(linear.clock, field, 5)
        assert torch.equal(run(linear, x, dy)[0], first[0])  # no forward product of a shipped recipe is random
        assert torch.equal(run(linear, x, dy)[1], first[1]) == (name != "nvfp4")
        setattr(linear.clock, field, 0)


def test_recomputation_reuses_the_random_bits():
    """Activation checkpointing runs the forward twice; with stochastic rounding in all products the results agree."""
    rounded = Operand(FORMATS["nvfp4"], "stochastic")
    recipe = LinearRecipe("sr", *[Gemm(rounded, rounded)] * 3)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *[QuantizedLinear(64, 64, bias=False, recipe=recipe, clock=Clock(3), layer=str(i)) for i in range(3)]
    )
    x = torch.randn(32, 64)

    def grads(forward):
        net.zero_grad()
        inp = x.clone().requires_grad_()
        forward(inp).square().sum().backward()
        return [inp.grad, *[p.grad.clone() for p in net.parameters()]]

    plain = grads(net)
    for recomputed, expected in zip(grads(lambda inp: checkpoint(net, inp, use_reentrant=False)), plain):
        assert torch.equal(recomputed, expected)


def test_the_clock_may_move_on_between_forward_and_backward():
    """The backward draws the bits of its own forward (pipelines interleave micro-batches)."""
    linear = layer("nvfp4")
    x, dy = torch.randn(64, 64), torch.randn(64, 96)
    expected = run(linear, x, dy)[1]
    inp = x.clone().requires_grad_()
    y = linear(inp)
    linear.clock.step, linear.clock.micro = 9, 9
    y.backward(dy)
    assert torch.equal(inp.grad, expected)


def test_averaging_stochastic_gradients_approaches_the_truth():
    """64 draws of dgrad: noise of dy falls by 18 dB until the clipping of block maxima shows."""
    recipe = LinearRecipe("g", dgrad=Gemm(Operand(FORMATS["nvfp4"], "stochastic"), Operand()))
    linear = layer(recipe, backend="torch")
    x, dy = torch.randn(64, 64), torch.randn(64, 96)
    reference = dy @ linear.weight.detach()
    draws = []
    for step in range(64):
        linear.clock.step = step
        draws.append(run(linear, x, dy)[1])
    single, mean = sqnr_db(reference, draws[0]), sqnr_db(reference, torch.stack(draws).mean(0))
    assert mean > single + 10


@pytest.mark.parametrize("name", RECIPES)
def test_ragged_sizes_are_padded(name):
    """Sizes that no block divides: same as a hand-padded layer, cut back."""
    linear = layer(name, 50, 42)
    x, dy = torch.randn(37, 42), torch.randn(37, 50)
    y, dx, dw = run(linear, x, dy)
    big = QuantizedLinear(128, 128, bias=False, recipe=load_recipe(name), clock=Clock(1))
    with torch.no_grad():
        big.weight.zero_()[:50, :42] = linear.weight
    yb, dxb, dwb = run(big, F.pad(x, (0, 86, 0, 91)), F.pad(dy, (0, 78, 0, 91)))
    assert y.shape == (37, 50) and dx.shape == x.shape and dw.shape == linear.weight.shape
    torch.testing.assert_close(y, yb[:37, :50], rtol=1e-5, atol=1e-5)
    if name != "nvfp4":  # its random bits are counted along the padded rows, whose lengths differ here
        torch.testing.assert_close(dx, dxb[:37, :42], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dw, dwb[:50, :42], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_any_number_of_tokens_gives_the_definition(tokens):
    """Activations are padded to whole tiles: every backend still gives the oracle's numbers, random bits included."""
    x, dy = torch.randn(tokens, 64), torch.randn(tokens, 96)
    expected = run(layer("nvfp4", backend="oracle"), x, dy)
    for backend in ("auto", "torch"):
        for out, reference in zip(run(layer("nvfp4", backend=backend), x, dy), expected):
            torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)


def test_padding_can_be_refused_by_name():
    linear = layer("nvfp4", 50, 64, pad="refuse")
    linear.layer = "layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=r"layer 'layers.0.mlp.up_proj': fprop multiplies \(32, 64\) by \(64, 50\)"):
        linear(torch.randn(32, 64))


@pytest.mark.parametrize("name", RECIPES)
def test_nan_reaches_the_output(name):
    linear = layer(name)
    x = torch.randn(32, 64)
    x[3, 5] = torch.nan
    assert linear(x)[3].isnan().all()


def test_parameters_and_keys_are_those_of_nn_linear():
    linear, plain = layer("nvfp4", bias=True), torch.nn.Linear(64, 96)
    assert linear.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(linear.state_dict())
    assert "recipe=nvfp4" in repr(linear)
    assert QuantizedLinear(4, 4).recipe == load_recipe("nvfp4") and layer(BF16).recipe is BF16
