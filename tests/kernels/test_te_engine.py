"""kernels/te.py, run: forward and backward on the CPU against a double of TransformerEngine (te_double.py)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys

import pytest
import torch

from lowprec.kernels import te
from lowprec.kernels.te import TeBackend
from lowprec.kernels.te_recipe import describe
from lowprec.linear import Plan, QuantizedLinear, backends, load_precision, verify
from lowprec.linear.call import Policy
from lowprec.linear.precision import Rule
from lowprec.linear.recipe import LinearRecipe, Operand, Rotation
from lowprec.numerics import FORMATS, Stream
from tests.kernels.te_double import VERSIONS, forward_only, four_six, installed, recipe_of, shipped

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(params=VERSIONS)
def double(request, monkeypatch):
    return installed(request.param, monkeypatch)


@pytest.fixture
def newest(monkeypatch):
    return installed(VERSIONS[-1], monkeypatch)


@pytest.fixture(autouse=True)
def fresh():
    yield
    for cached in (te.engine, te.unavailable, te.quantizers, backends.choose, verify._found):
        cached.cache_clear()


def layer_of(recipe, backend, inputs=128, outputs=256):
    torch.manual_seed(0)
    layer = QuantizedLinear(inputs, outputs, True, dtype=torch.float32, recipe=recipe, policy=Policy(backend))
    if recipe.remembers:
        layer.clock.step = 1
    return layer


def run(layer, micro_batches=1, tokens=256):
    """Output, input gradient, and accumulated gradients of one step."""
    generator = torch.Generator().manual_seed(1)
    for micro in range(micro_batches):
        x = torch.randn(tokens, layer.in_features, generator=generator).to(BF16).requires_grad_()
        dy = torch.randn(tokens, layer.out_features, generator=generator).to(BF16)
        layer.clock.micro = micro
        y = layer(x.view(2, -1, layer.in_features))
        y.backward(dy.view_as(y))
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


NEAREST = recipe_of(
    "nvfp4", dgrad={"a": Operand(FORMATS["nvfp4"])}, wgrad={"a": Operand(FORMATS["nvfp4"]), "inner": Rotation(16)}
)
ENGINES = [recipe_of(n) for n in ("mxfp8", "fp8_blockwise", "fp8_blockwise_pow2", "fp8_hybrid", "fp8_tensorwise")] + [
    recipe_of("fp8_delayed"),
    NEAREST,
    forward_only("original"),
]


@pytest.mark.parametrize("recipe", ENGINES, ids=lambda recipe: recipe.name)
def test_a_layer_by_the_double_equals_the_definition(recipe, double):
    ours, theirs = layer_of(recipe, "torch"), layer_of(recipe, "te")
    wanted, got = run(ours, micro_batches=2), run(theirs, micro_batches=2)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype and got[name].shape == wanted[name].shape
        assert error(got[name], wanted[name]) < 2e-3, name
    layouts = [given["layout"] for place, given in double.calls if place == "general_gemm"]
    backward = ["NN", "NT"] if recipe.dgrad.quantized else []
    assert layouts == ["TN", *backward] * 2
    assert all(given["grad"] == (given["layout"] != "TN") for p, given in double.calls if p == "general_gemm")


def test_four_over_six_by_the_double(newest):
    recipe = four_six()
    plain = dataclasses.replace(
        recipe,
        dgrad=dataclasses.replace(recipe.dgrad, a=Operand(FORMATS["nvfp4"])),
        wgrad=dataclasses.replace(recipe.wgrad, a=Operand(FORMATS["nvfp4"])),
    )
    wanted, got = run(layer_of(plain, "torch")), run(layer_of(plain, "te"))
    assert all(error(got[name], wanted[name]) < 2e-3 for name in wanted)


def test_values_of_the_forward_in_the_backward(newest):
    recipe = forward_only("fprop")
    wanted, got = run(layer_of(recipe, "torch")), run(layer_of(recipe, "te"))
    assert all(error(got[name], wanted[name]) < 4e-3 for name in wanted)


def test_stochastic_gradients_have_the_error_that_they_should(newest):
    recipe = recipe_of("nvfp4")
    exact, wanted = run(layer_of(LinearRecipe("plain"), "torch")), run(layer_of(recipe, "torch"))
    got = run(layer_of(recipe, "te"))
    for name in ("dx", "dw"):
        assert error(got[name], wanted[name]) > 0.02  # other random bits
        assert 0.8 < error(got[name], exact[name]) / error(wanted[name], exact[name]) < 1.25
    assert error(got["y"], wanted["y"]) < 2e-3


def planned(name: str, model=None, **fields) -> Plan:
    precision = dataclasses.replace(load_precision(name), rules=(Rule("*", name),), **fields)
    return Plan.of(model or torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 256, bias=False)}), precision)


def test_the_start_up_check_passes_and_sees_gradients_of_zero(newest, monkeypatch):
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 256, bias=False)})
    plan = planned("nvfp4", model, backend="te")
    plan.apply(model)
    assert "te 3 products" in verify.verify(plan, 128, BF16, CPU)
    verify._found.cache_clear()
    product = te.engine().general_gemm
    zero = lambda *a, **k: (product(*a, **k)[0] * (not k["grad"]),)  # noqa: E731
    monkeypatch.setattr(te.engine(), "general_gemm", zero)
    with pytest.raises(ValueError, match="dgrad: backend 'te' on cpu is not the definition"):
        verify.verify(plan, 128, BF16, CPU)


def test_the_plan_says_what_it_becomes_or_stops():
    said = "note: te (backend: te), recipe nvfp4: serves as NVFP4BlockScaling()"
    assert said in planned("nvfp4").table(device="cuda") and "te (" not in planned("nvfp4").table()
    assert "recipe averis: refuses, fprop: x is split by mean" in planned("averis").table(device="cuda")
    with pytest.raises(ValueError, match=r"recipe averis: backend 'te' refuses, fprop: .* parts; use backend 'auto'"):
        planned("averis", backend="te")
    assert planned("nvfp4_late_bf16", backend="te").policy.backend == "te"


def test_delayed_scales_come_from_the_layers_memory(newest):
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(32, 48, bias=False)})
    precision = dataclasses.replace(load_precision("fp8_delayed"), rules=(Rule("*", "fp8_delayed"),))
    results = {}
    for name in ("torch", "te"):
        copied = copy.deepcopy(model)
        plan = Plan.of(copied, precision, backend=name)
        plan.apply(copied)
        torch.manual_seed(3)
        for step, size in enumerate((8.0, 1.0)):
            plan.clock.step = step
            x = (torch.randn(64, 32) * size).to(BF16)
            out = copied["proj"](x)
            out.backward(torch.ones_like(out))
            plan.end_step(step)
        results[name] = out.detach(), copied["proj"].weight.grad, plan.state_dict()
    scales = [given["scale"].item() for place, given in newest.calls if place == "Float8Quantizer.__init__"]
    assert scales[0] == scales[4] > 0  # x of step 0 was eight times larger, and step 1 still remembers it
    assert error(results["te"][0], results["torch"][0]) < 2e-3 and error(results["te"][1], results["torch"][1]) < 2e-3
    assert results["te"][2].keys() == results["torch"][2].keys()
    assert all(torch.equal(value, results["te"][2][key]) for key, value in results["torch"][2].items())


def test_codes_of_the_input_may_be_kept(newest):
    layer = layer_of(recipe_of("mxfp8"), "te")
    wanted = run(layer)
    layer.weight.grad = layer.bias.grad = None
    layer.policy = Policy("te", save="codes")
    got = run(layer)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# ---- refusals when it runs


def refused(recipe=None, role="fprop", m=64, n=64, k=64, dtype=BF16, devices=("cpu",)):
    recipe = recipe or recipe_of("nvfp4")
    te.unavailable.cache_clear()
    te.engine.cache_clear()
    return TeBackend(devices).refuses(getattr(recipe, role), role, m, n, k, dtype, CPU)


def test_refusals_of_sizes_types_and_places(newest, monkeypatch):
    assert refused() is None and refused(m=None) is None
    assert refused(devices=("cuda",)) == (
        "TransformerEngine serves NVFP4BlockScaling(disable_rht=True) on CUDA devices, not on cpu"
    )
    assert refused(k=48) == "64 x 48 by 48 x 64: NVFP4BlockScaling needs sizes above 0 that 32 divides"
    assert refused(recipe_of("fp8_blockwise"), n=64, m=128, k=128).endswith("needs sizes above 0 that 128 divides")
    assert refused(recipe_of("fp8_tensorwise"), m=16, k=48) is None and refused(m=0)
    assert refused(dtype=torch.float32) == "the operands are torch.float32; NVFP4BlockScaling is served in bfloat16"
    assert refused(recipe_of("mxfp8"), dtype=torch.float32) is None
    assert "te_2_14" in refused(load_precision("nvfp4").linear["nvfp4_te_2_14"])
    monkeypatch.setenv("NVTE_USE_FAST_MATH", "1")
    assert "NVTE_USE_FAST_MATH is set" in refused()


def test_refusals_of_installations(newest, monkeypatch):
    pytorch = newest.modules["transformer_engine.pytorch"]
    monkeypatch.setattr(pytorch, "is_nvfp4_available", lambda return_reason: (False, "compute capability 9.0"))
    assert refused() == "TransformerEngine has no NVFP4BlockScaling here: compute capability 9.0"
    monkeypatch.setattr(newest.modules["transformer_engine"], "__version__", "2.14.1")
    assert refused() == "TransformerEngine 2.14.1 is too old; install 2.15 or later"
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)  # as if its import failed
    assert refused().startswith("TransformerEngine does not load (")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused() == "TransformerEngine is not installed; pip install --no-build-isolation 'lowprec[te]'"


def test_what_transformer_engine_cannot_take(newest):
    backend, gemm = TeBackend(("cpu",)), recipe_of("nvfp4").fprop
    x = torch.randn(32, 32).to(BF16)
    with pytest.raises(
        ValueError, match="te: NVFP4BlockScaling takes the maximum of what it sees, but that of x in fprop"
    ):
        backend.prepare(x, gemm, "a", Stream(), "fprop", amax=torch.ones(()))
    with pytest.raises(ValueError, match="te: the weight arrived as codes of nvfp4"):
        backend.load(FORMATS["nvfp4"].quantize(x), gemm, "b")
    kept = backend.prepare(x.T, recipe_of("mxfp8").wgrad, "b", Stream(), "wgrad")
    assert kept.nbytes == kept.tensor.column_wise.nbytes  # the row-wise codes are let go
    with pytest.raises(ValueError, match="turns back the codes of the forward only"):
        backend.unpacked(kept, BF16)
    shared = backend.prepare(x, recipe_of("fp8_tensorwise").fprop, "a", Stream(), "fprop", amax=torch.tensor(448.0))
    assert torch.equal(shared.tensor.row_wise, x.to(torch.float8_e4m3fn).float())  # by all ranks' maximum: scale 1


def test_nothing_is_imported_until_it_is_asked_for():
    assert not any(name.split(".")[0] == "transformer_engine" for name in sys.modules)
    assert [describe(recipe) for recipe in shipped().values()]
    assert backends.backend("te").refuses(recipe_of("nvfp4").fprop, "fprop", 64, 64, 64, BF16, CPU)
    assert not any(name.split(".")[0] == "transformer_engine" for name in sys.modules)
    assert "te" in backends.CHOICES and "te" not in backends.ORDER
