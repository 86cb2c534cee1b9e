"""Parts of a layer, in one process: whose noise they draw, by which maxima they round, and what cannot be cut."""

import copy
import re

import pytest
import torch
from torch import nn

from lowprec.linear import Gemm, LinearRecipe, Operand, Plan, QuantizedLinear, load_precision, load_recipe
from lowprec.linear.attention import AttentionCore
from lowprec.linear.backends import backend
from lowprec.linear.call import Call, Cut, Policy
from lowprec.linear.cut import aligned_run, bound, cut_refusal, positions
from lowprec.linear.split import MeanSplit
from lowprec.numerics import FORMATS, Clock, Format, Stream, Window

STREAM = Stream(7, 3, 2, "layer")


def cut(ranks=2, rank=0, index=None):
    return Cut(None, ranks, rank, index)


@pytest.mark.parametrize("first", [0, 8, 13])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_window_draws_the_noise_of_the_whole(first, scattered):
    """Rows anywhere, columns from anywhere, also inside a group of eight random numbers."""
    whole = STREAM.noise("r", (40, 37))
    rows = torch.tensor([31, 5, 6, 0]) if scattered else None
    part = STREAM.noise("r", (4, 20), window=Window((40, 37), first, rows))
    assert torch.equal(part, whole[rows if scattered else slice(4)][:, first : first + 20])


def test_a_window_of_a_transposed_view_is_that_of_its_memory():
    whole, part = torch.empty(48, 64), torch.empty(16, 32)
    window = Window((48, 64), 32, torch.arange(16, 32))
    assert torch.equal(STREAM.noise_like("r", part.T, window), STREAM.noise_like("r", whole.T)[32:64, 16:32])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_window_of_scales(transposed):
    """MS-EDEN draws one number a block, for 16 rows at a time: the part's are the whole's."""
    whole, rows = torch.empty(96, 128), torch.tensor([*range(64, 96), *range(16)])
    window, part = Window((96, 128), 64, rows), torch.empty(48, 32)
    if transposed:  # rows of the matrix are columns of the memory
        noise, all_noise = STREAM.scale_noise("r", part.T, 16, window), STREAM.scale_noise("r", whole.T, 16)
        assert torch.equal(noise, all_noise[64:96][:, [4, 5, 0]])
    else:
        noise, all_noise = STREAM.scale_noise("r", part, 16, window), STREAM.scale_noise("r", whole, 16)
        assert torch.equal(noise, all_noise[rows][:, 4:6])


@pytest.mark.parametrize("served", ["cpu", "cpu_portable", "torch"])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("rounding", ["stochastic", "ms_eden"])
def test_backends_know_windows(served, side, rounding):
    """Rows in another order and columns from the middle, of a matrix and of its transpose: codes of the whole."""
    operand, own, role = Operand(FORMATS["nvfp4"], rounding, 16), backend(served), {"a": "dgrad", "b": "wgrad"}[side]
    inner = load_recipe("quartet2").dgrad.inner if rounding == "ms_eden" else None
    gemm = Gemm(operand, operand, inner)
    whole = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.tensor([*range(128, 256), *range(128)]), slice(128, 384)
    part = whole[rows][:, columns].contiguous()
    window, amax = Window((256, 512), 128, rows), whole.abs().amax()
    x, of, pick = (part, whole, (rows, columns)) if side == "a" else (part.T, whole.T, (columns, rows))
    if inner:
        amax = backend("torch").prepare(of, Gemm(Operand(), Operand(), inner), side, STREAM, role).values.abs().amax()
    if reason := own.refuses(gemm, role, 256, 256, 256, torch.float32, whole.device):
        pytest.skip(reason)
    expected = own.unpacked(own.prepare(of, gemm, side, STREAM, role, amax), torch.float32)[0]
    found = own.unpacked(own.prepare(x, gemm, side, STREAM, role, amax, window), torch.float32)[0]
    assert torch.equal(found, expected[pick[0]][:, pick[1]])
    without = own.unpacked(own.prepare(x, gemm, side, STREAM, role, amax), torch.float32)[0]
    assert not torch.equal(found, without)


@pytest.mark.parametrize("served", ["cpu", "cpu_portable", "torch", "oracle"])
@pytest.mark.parametrize("name", ["fp8_row", "fp8_row_pow2", "int8_row", "nvfp4_row"])
def test_rows_may_be_rounded_by_given_maxima(served, name):
    """Halves of rows, scaled by the maxima of the whole rows, are halves of the whole; the row of a NaN is NaN."""
    format = FORMATS.get(name) or Format(name, "e2m1", (1, 16), "e4m3", "row")
    gemm, own = Gemm(Operand(format), Operand(format)), backend(served)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 32)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        if reason := own.refuses(gemm, "fprop", 32, 32, 32, dtype, x.device):
            pytest.skip(reason)
        now = x.to(dtype)
        amax = now.abs().amax(1, keepdim=True).float()
        amax[3] = torch.nan
        for memory in (lambda t: t, lambda t: t.T.contiguous().T):
            values, scale = own.unpacked(own.prepare(memory(now), gemm, "a", STREAM, "fprop"), torch.float32)
            half = own.prepare(memory(now[:, 32:]), gemm, "a", STREAM, "fprop", amax)
            found, own_scale = own.unpacked(half, torch.float32)
            found, whole = found * own_scale, (values * scale)[:, 32:]
            assert found[3].isnan().all()
            found[3] = whole[3]
            assert torch.equal(found, whole)


def test_maxima_of_another_shape_are_refused():
    x = torch.randn(4, 32)
    for name, shape in (("fp8_row", ()), ("fp8_row", (3, 1)), ("fp8_tensor", (4, 1)), ("mxfp8", ())):
        with pytest.raises(ValueError, match="amax must be one number for a format with one scale for the tensor"):
            FORMATS[name].quantize(x, amax=torch.ones(shape))


# ---- what cannot be cut


def test_what_would_straddle_is_named():
    """Blocks, rotations, groups and rows that draw noise together, along every axis."""
    nv, deepseek, quartet = (load_recipe(name) for name in ("nvfp4", "fp8_blockwise", "quartet2"))
    assert cut_refusal(nv, 256, 256, {"out": 4}) is None and cut_refusal(nv, 256, 256, {"in": 4}) is None
    assert "16x16 (w of fprop) would straddle ranks that hold 24 features" in cut_refusal(nv, 96, 256, {"out": 4})
    assert "128x128 (w of fprop)" in cut_refusal(deepseek, 256, 1024, {"out": 4})
    assert "needs multiples of 128" in cut_refusal(deepseek, 1024, 1024, {"tokens": 2}, 64)
    assert "1x128 (dy of wgrad) would straddle ranks that hold 64 tokens" in cut_refusal(
        deepseek, 1024, 1024, {"tokens": 2}, 64
    )
    assert "250 features (in) do not divide by 4" in cut_refusal(nv, 256, 250, {"in": 4})
    assert "rotation of wgrad (H16" in cut_refusal(nv, 256, 256, {"tokens": 2}, 8)
    assert "rotation of dgrad (H128" in cut_refusal(quartet, 256, 256, {"out": 4})
    assert "rotation of dgrad" in cut_refusal(load_recipe("halo2_block"), 1024, 1024, {"tokens": 2}, 64)
    assert cut_refusal(nv, 256, 256, {"out": 1, "in": 1}) is None
    assert cut_refusal(deepseek, 1024, 1024, {"tokens": 2}) is None  # how many are together is not known yet
    with pytest.raises(ValueError, match="unknown axis 'features'; choose among tokens, in, out"):
        cut_refusal(nv, 256, 256, {"features": 2})


def test_the_noise_of_ms_eden_is_drawn_for_sixteen_rows():
    eden = Operand(FORMATS["nvfp4"], "ms_eden", 16)
    recipe = LinearRecipe("r", dgrad=Gemm(eden, eden, load_recipe("quartet2").dgrad.inner))
    assert "for 16 rows at a time, would straddle" in cut_refusal(recipe, 256, 256, {"tokens": 2}, 24)
    assert cut_refusal(recipe, 256, 256, {"tokens": 2}, 48) is None


@pytest.mark.parametrize(
    ("format", "axis", "reason"),
    [
        (Format("column", "e4m3", (0, 16)), "tokens", r"block of 0x16 \(x of fprop\) looks at .* axis 'tokens'"),
        (Format("two", "e2m1", (1, 0), "e4m3", True), "in", r"a block of 1x0 .* whole axis 'in'"),
        (Format("wide", "e2m1", (1, 16), "e4m3", 128), "in", r"scale of 1x128 .* 64 features each; .* of 128"),
        (Format("m", "e2m1", (1, 16), "e4m3", True, rule="rms", coef=2.0), "tokens", "rule rms of format m.*'tokens'"),
    ],
)  # fmt: skip
def test_scales_that_span_an_axis(format, axis, reason):
    recipe = LinearRecipe("r", Gemm(Operand(format), Operand()))
    said = cut_refusal(recipe, 128, 128, {axis: 2}, 64)
    assert said is not None and re.search(reason, said), said
    assert cut_refusal(recipe, 128, 128, {"out": 2}) is None  # the product's other operand is not quantised


def test_a_quantised_centre_is_a_row_of_features():
    """Its blocks lie along features, also where the operand's lie along tokens."""
    x = Operand(FORMATS["nvfp4"], split=MeanSplit("quantized"))
    recipe = LinearRecipe("r", wgrad=Gemm(Operand(), x))
    assert cut_refusal(recipe, 128, 128, {"in": 2}) is None
    assert "(centre of x)" in cut_refusal(recipe, 128, 48, {"in": 2})


# ---- places


def test_where_rows_lie():
    """Contiguous parts, an index, and the longest runs that are together and aligned."""
    assert positions(cut(4, 2), 6).tolist() == list(range(12, 18)) and aligned_run(cut(4, 2), 6) == 6
    zigzag = cut(2, 0, lambda rows: torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]))
    assert aligned_run(zigzag, 8) == 4
    assert aligned_run(cut(2, 0, lambda rows: torch.arange(8) + 2), 8) == 2
    with pytest.raises(ValueError, match="the place of each of 8 rows"):
        positions(cut(2, 0, lambda rows: torch.arange(3)), 8)


def test_a_run_that_is_too_short_is_refused_when_it_is_seen():
    """The runs of tokens are those of the index: 16 at a time do not hold a rotation of 32."""
    call = Call(load_recipe("quartet_mxfp4"), Stream(layer="layers.3.o_proj"), cuts={"tokens": cut(2, 1, chunks(16))})
    with pytest.raises(
        ValueError, match=r"'layers.3.o_proj': recipe quartet_mxfp4 .* 'tokens' over 2 .*16 tokens each"
    ):
        bound(call, 64, 128, 128)
    assert bound(Call(call.recipe, call.stream, cuts={"tokens": cut(2, 1, chunks(32))}), 64, 128, 128).sizes == {
        "tokens": 64, "in": 128, "out": 128,
    }  # fmt: skip


def chunks(size):
    """Every other chunk of so many rows."""
    return lambda rows: torch.arange(2 * rows).view(-1, 2, size)[:, 1].flatten()


def test_a_cut_of_one_rank_is_none():
    """Same numbers, nothing communicated: there is no group to do it with."""
    layers = [QuantizedLinear(64, 32, False, recipe="fp8_tensorwise", clock=Clock(1)) for _ in range(2)]
    layers[1].weight.data.copy_(layers[0].weight.data)
    layers[1].cuts = {"in": cut(1), "out": cut(1)}
    x = torch.randn(16, 64)
    assert torch.equal(*(layer(x) for layer in layers))


def test_a_bias_is_added_once():
    layer = QuantizedLinear(64, 32, recipe="mxfp8", layer="down_proj")
    layer.cuts = {"in": cut()}
    with pytest.raises(ValueError, match="layer 'down_proj': its bias would be added by each of the 2 ranks"):
        layer(torch.randn(16, 64))


# ---- the plan of a model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.core = nn.functional.scaled_dot_product_attention


def planned(**fields):
    model = nn.ModuleDict({"layers": nn.ModuleList(Attention() for _ in range(4))})
    node = {"rules": [{"match": "*", "recipe": "nvfp4"}], "linear": {"nvfp4": {"fprop": {"x": "nvfp4", "w": "nvfp4"}}}}
    plan = Plan.of(model, load_precision({**copy.deepcopy(node), **fields}), seed=1)
    plan.apply(model)
    return plan


def test_a_plan_may_keep_some_layers():
    """A pipeline stage: schedule, memory and evaluation go on with what is there; the fingerprint stays."""
    memory = {"d": {"fprop": {"x": {"format": "fp8_tensor", "amax": "delayed", "window": 4}, "w": "fp8_tensor"}}}
    plan = planned(linear=memory, rules=[{"match": "*", "recipe": "d"}], attention="fp8_attention")
    before = plan.fingerprint()
    plan.keep({"layers.2.q_proj", "layers.2.o_proj", "layers.2"})
    assert list(plan.layers) == ["layers.2.q_proj", "layers.2.o_proj"] and list(plan.cores) == ["layers.2"]
    plan.at(0.5)
    plan.end_step(0)
    assert list(plan.state_dict()) == ["layers.2.q_proj/fprop.x.amax", "layers.2.o_proj/fprop.x.amax"]
    with plan.high_precision():
        assert not plan.layers["layers.2.q_proj"].recipe.quantized
    assert plan.fingerprint() == before


def test_a_plan_refuses_cuts_of_any_recipe_to_come():
    """Also of one that a schedule brings in at half time; by default the cuts that the layers have."""
    mx, nv = {"fprop": {"x": "mxfp8", "w": "mxfp8"}}, {"fprop": {"x": "nvfp4", "w": "nvfp4"}}
    plan = planned(linear={"nvfp4": nv, "mx": mx}, schedule=[{"from": 0.5, "set": {"nvfp4": "mx"}}])
    plan.refuse_cuts({"layers.0.q_proj": {"out": 2}})
    plan.refuse_cuts()
    with pytest.raises(
        ValueError, match=r"layer 'layers.0.q_proj': recipe nvfp4 cannot be cut 'in' over 4 ranks: .*1x32"
    ):
        plan.refuse_cuts({"layers.0.q_proj": {"in": 4}})
    with pytest.raises(ValueError, match=r"no linear layer 'layers.9.q_proj' to cut; the plan has layers.0.q_proj"):
        plan.refuse_cuts({"layers.9.q_proj": {"in": 4}})
    plan.layers["layers.1.o_proj"].cuts = {"in": cut(8), "out": cut(1)}
    with pytest.raises(ValueError, match=r"layer 'layers.1.o_proj'.*'in' over 8 ranks: .*hold 8 features"):
        plan.refuse_cuts()


@pytest.mark.parametrize("name", ["fp8_attention", "int8_attention"])
def test_heads_of_attention_are_quantised_one_by_one(name):
    """Some of the heads, as a tensor-parallel rank has them, give their part of what all give."""
    q, k, v = (
        torch.randn(2, heads, 40, 32, generator=torch.Generator().manual_seed(i)) for i, heads in enumerate((8, 4, 4))
    )
    core = AttentionCore(None, load_precision(name).attention, Clock(1), "attn", Policy())
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    part = [t[:, t.shape[1] // 2 :].clone().requires_grad_() for t in (q, k, v)]
    y, own = core(*whole, None), core(*part, None)
    assert torch.equal(own, y[:, 4:])
    y.sum().backward()
    own.sum().backward()
    assert all(torch.equal(b.grad, a.grad[:, a.shape[1] // 2 :]) for a, b in zip(whole, part))
