"""Weights that arrive as codes: the same numbers as the weight itself, who may, what travels, what is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from lowprec.linear import (
    BF16,
    Gemm,
    LinearRecipe,
    Operand,
    Policy,
    QuantizedLinear,
    Rotation,
    load_precision,
    load_recipe,
)
from lowprec.linear.backends import backend as backend_of
from lowprec.linear.codes import padded, transposed
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.weight import (
    CodedWeight,
    codes_refusal,
    encode_weight,
    from_payload,
    local_amax,
    needs_amax,
    payload,
    payload_bytes,
)
from lowprec.numerics import FORMATS, Clock, Format, Stream

REFUSED = {
    "averis": "dgrad quantises the weight anew",
    "bf16": "fprop takes the weight unquantised",
    "bitnet_158": "spans all rows and is no maximum that ranks could agree on (mean)",
    "bitnet_158_median": "spans all rows and is no maximum that ranks could agree on (median)",
    "exploring_fp4": "dgrad quantises the weight anew",
    "exploring_fp4/exploring_fp4_attention": "dgrad quantises the weight anew",
    "fp4_all_the_way": "dgrad quantises the weight anew",
    "fp8_delayed": "amax: delayed of the weight is remembered",
    "fp8_rowwise": "format fp8_row_pow2 has one scale a row",
    "fp8_rowwise_hp_wgrad": "format fp8_row has one scale a row",
    "hp_mean": "the exact term of fprop (split by mean, exact) multiplies the weight itself",
    "hp_mean_ema": "the exact term of fprop (split by moving mean, exact) multiplies the weight itself",
    "int4_pow2": "dgrad quantises the weight anew",
    "int8_pow2": "dgrad quantises the weight anew",
    "lowprec_max": "the exact term of fprop",
    "lowprec_max/mxfp8": "dgrad quantises the weight anew",
    "masked_e8m3": "codes of 12 bits are no smaller",
    "metis_lowrank": "fprop splits the weight by rank 8",
    "mixed_nano/mxfp8": "dgrad quantises the weight anew",
    "mxfp4": "dgrad quantises the weight anew",
    "mxfp4_rht_sr": "fprop takes the weight unquantised",
    "mxfp8": "dgrad quantises the weight anew",
    "mxfp8/mxfp8_ceil": "dgrad quantises the weight anew",
    "mxfp8/mxfp8_even": "dgrad quantises the weight anew",
    "mxfp8/mxfp8_floor": "dgrad quantises the weight anew",
    "nvfp4_4over6": "dgrad quantises the weight anew",
    "quartet2_hp": "dgrad quantises the weight anew",
    "quartet_mxfp4": "the clip gradient of the weight needs the weight itself",
    "quest_fp4": "the trust gradient of the weight needs the weight itself",
    "quest_w1a1": "the clip gradient of the weight needs the weight itself",
    "quest_w4": "the trust gradient of the weight needs the weight itself",
    "quest_w4a4": "the trust gradient of the weight needs the weight itself",
    "ue5m3": "amax: hold of the weight is remembered",
    "ue5m3/ue5m3_down": "amax: hold of the weight is remembered",
    "ufp4": "dgrad quantises the weight anew",
}
SERVED = (
    "chon", "eden_46", "fp8_attention/fp8_tensorwise", "fp8_blockwise", "fp8_blockwise_pow2", "fp8_hybrid",
    "fp8_tensorwise", "halo0_fp8", "halo1_fp8", "halo1_int8", "halo2_block", "halo2_fp6", "halo2_fp8", "halo2_int8",
    "if4_eden", "mixed_nano", "nvfp4", "nvfp4/nvfp4_te_2_14", "nvfp4_deosc", "nvfp4_late_bf16", "quartet2",
    "tetrajet_v2",
)  # fmt: skip
BACKENDS = ("torch", "oracle", "cpu_portable", "cpu")


def shipped():
    """Every recipe of every shipped file: "file" for the one of its name, else "file/recipe"."""
    found = {"bf16": BF16}
    for path in sorted(RECIPES_FOLDER.glob("*.yaml")):
        for name, recipe in load_precision(path).linear.items():
            if name != "bf16":
                found[path.stem if name == path.stem else f"{path.stem}/{name}"] = recipe
    return found


RECIPES = shipped()


def test_every_shipped_recipe_is_served_or_refused_by_name():
    assert set(RECIPES) == set(SERVED) | set(REFUSED) and not set(SERVED) & set(REFUSED)
    for name, recipe in RECIPES.items():
        why = codes_refusal(recipe)
        assert (why is None) if name in SERVED else (REFUSED[name] in why), (name, why)


def weight(n, k):
    """Outliers in one column, rows of different size, one block of zeros; fp32."""
    generator = torch.Generator().manual_seed(n + k)
    w_NK = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    w_NK[:, 3] *= 20
    w_NK[16:32, 16:32] = 0
    return w_NK


def shards(w_NK, recipe, ranks, policy=None, dtype=torch.bfloat16):
    """What each rank has made of its rows."""
    parts = w_NK.chunk(ranks)
    amax = torch.stack([local_amax(part, recipe, policy, dtype) for part in parts]).amax()
    return [encode_weight(part, recipe, amax if needs_amax(recipe) else None, policy, dtype) for part in parts]


def coded(w_NK, recipe, ranks, policy=None, dtype=torch.bfloat16):
    codes = shards(w_NK, recipe, ranks, policy, dtype)
    bytes_WB = torch.stack([payload(q) for q in codes])
    return CodedWeight.of(bytes_WB, recipe, tuple(w_NK.shape), codes[0].tensor_scale, dtype)


def step(recipe, policy, w_NK, tokens, dtype=torch.bfloat16):
    """Forward and backward of a layer with this parameter: y, dx, dw."""
    layer = QuantizedLinear(w_NK.shape[1], w_NK.shape[0], False, recipe=recipe, clock=Clock(1), policy=policy)
    layer.weight = nn.Parameter(w_NK)
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(tokens, w_NK.shape[1], generator=generator).to(dtype).requires_grad_()
    y_TN = layer(x_TK)
    y_TN.backward(torch.randn(y_TN.shape, generator=generator).to(dtype) * 0.01)
    return y_TN.detach(), x_TK.grad, layer.weight.grad


def assert_same(recipe, policy, w_NK, ranks, tokens=48, dtype=torch.bfloat16):
    """Products of codes equal those of the weight, bit for bit."""
    expected = step(recipe, policy, w_NK.to(dtype), tokens, dtype)
    got = step(recipe, policy, coded(w_NK, recipe, ranks, policy, dtype), tokens, dtype)
    for name, one, other in zip(("y", "dx", "dw"), expected, got):
        assert type(other) is torch.Tensor and one.dtype == other.dtype
        assert torch.equal(one, other), (recipe.name, policy.backend, ranks, name)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SERVED)
def test_products_of_codes_equal_those_of_the_weight(name, backend):
    """y, dx and dw, from 1, 2 and 4 shards, tokens that are no whole tile."""
    recipe = RECIPES[name]
    if (name, backend) == ("if4_eden", "cpu"):
        with pytest.raises(ValueError, match="chooses between two elements"):
            assert_same(recipe, Policy(backend), weight(128, 128), 1)
        return
    rows = max(32, recipe.fprop.b.format.block[0])  # of a rank
    assert_same(recipe, Policy(backend), weight(2 * rows, 128), 2, tokens=33)
    if backend == "cpu":
        assert_same(recipe, Policy(backend), weight(4 * rows, 256), 4)
        assert_same(recipe, Policy(backend, save="codes"), weight(rows, 384), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_are_no_whole_tiles(backend):
    """in_features and out_features that the product pads, where no block straddles the edge of the matrix."""
    mixed = load_recipe("nvfp4").fprop
    mixed = LinearRecipe("mixed", dataclasses.replace(mixed, a=Operand(FORMATS["mxfp8"])), load_recipe("nvfp4").dgrad)
    policy = Policy(backend)
    assert_same(load_recipe("fp8_tensorwise"), policy, weight(40, 24), 2)
    assert_same(load_recipe("halo1_int8"), policy, weight(36, 48), 2)
    assert_same(load_recipe("nvfp4"), policy, weight(48, 80), 3)
    assert_same(mixed, policy, weight(48, 80), 1)  # x in blocks of 32, the weight in blocks of 16
    assert_same(load_recipe("tetrajet_v2"), policy, weight(40, 144), 2)


def test_a_whole_axis_of_twelve_times_eight_is_rotated_row_by_row():
    for name in ("halo1_int8", "halo2_fp8"):
        assert_same(load_recipe(name), Policy("cpu"), weight(192, 96), 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensorwise", "fp8_blockwise_pow2", "halo1_int8"])
def test_weights_of_zeros_of_extreme_size_and_not_finite(name, backend):
    recipe, policy = load_recipe(name), Policy(backend)
    assert_same(recipe, policy, torch.zeros(256, 128), 2)
    for power in (-100, 60):  # beyond what may be folded into bf16 codes
        w_NK = weight(256, 128) * 2.0**-20
        w_NK[:128] *= 2.0**power
        assert_same(recipe, policy, w_NK, 2)
    w_NK = weight(256, 128)
    w_NK[200, 5] = torch.nan  # the first shard has not seen it
    codes = shards(w_NK, recipe, 2, policy)
    y_TN = step(recipe, policy, coded(w_NK, recipe, 2, policy), 16)[0]
    expected = step(recipe, policy, w_NK.bfloat16(), 16)[0]
    assert torch.equal(y_TN.isnan(), expected.isnan()) and y_TN.isnan().any()
    assert bool(codes[0].dequantize().isnan().all()) == needs_amax(recipe)


def test_activations_in_fp32():
    assert_same(load_recipe("nvfp4"), Policy("cpu"), weight(64, 64), 2, dtype=torch.float32)
    assert_same(load_recipe("halo1_int8"), Policy("torch"), weight(64, 64), 2, dtype=torch.float32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SERVED)
def test_what_travels(name, ranks):
    """As many bytes as said; together the very codes of the whole matrix, those of torch, though C++ made them."""
    recipe, w_NK = RECIPES[name], weight(512, 128)
    [whole] = shards(w_NK, recipe, 1, Policy("torch"))
    codes = shards(w_NK, recipe, ranks)
    bytes_WB = torch.stack([payload(q) for q in codes])
    assert bytes_WB.dtype == torch.uint8 and bytes_WB.shape == (ranks, payload_bytes(recipe, 512 // ranks, 128))
    q = from_payload(bytes_WB, whole.format, (512, 128), codes[-1].tensor_scale)
    for one, other in ((whole.codes, q.codes), (whole.scales, q.scales), (whole.tensor_scale, q.tensor_scale)):
        assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one.float(), other.float()))


def test_bytes():
    """NVFP4: 4.5 bits a value for 1x16 blocks; 16x16 blocks need a scale a block; one scale: 4 bytes a rank."""
    for name, rows, k, expected in (
        ("eden_46", 64, 128, 64 * 128 * 4.5 / 8), ("nvfp4", 64, 128, 64 * 128 / 2 + 4 * 8),
        ("tetrajet_v2", 64, 192, 64 * 192 * 4.5 / 8 + 64 * 2 * 4), ("fp8_tensorwise", 24, 40, 24 * 40 + 4),
        ("fp8_blockwise", 256, 384, 256 * 384 + 2 * 3 * 4), ("halo1_int8", 16, 64, 16 * 64 + 4),
    ):  # fmt: skip
        assert payload_bytes(load_recipe(name), rows, k) == expected


def test_shapes_are_refused():
    nvfp4, blocks, turned = load_recipe("nvfp4"), load_recipe("fp8_blockwise"), load_recipe("halo1_int8")
    assert codes_refusal(nvfp4, 48, 96) is None and codes_refusal(blocks, 128, 256) is None
    assert "24 rows, which blocks of 16x16 do not divide" in codes_refusal(nvfp4, 24, 96)
    assert "0 rows" in codes_refusal(nvfp4, 0, 96)
    assert "192 rows, which blocks of 128x128" in codes_refusal(blocks, 192, 256)
    assert "in_features 200 is no multiple of a block of 128x128" in codes_refusal(blocks, 128, 200)
    assert "in_features 56 is padded before the rotation" in codes_refusal(turned, 16, 56)
    with pytest.raises(ValueError, match=r"recipe nvfp4 cannot have its weight as codes: .* gather the weight itself"):
        encode_weight(weight(24, 96), nvfp4, torch.ones(()))


def test_recipes_that_no_file_has_are_refused():
    square, two = Operand(FORMATS["nvfp4_2d"]), FORMATS["nvfp4_2d"]
    again = dataclasses.replace(square, reuse=True)
    good = LinearRecipe("r", Gemm(square, square), Gemm(square, again))
    turn = Rotation(16, "fixed")
    assert codes_refusal(good) is None
    rows = Gemm(square, Operand(FORMATS["int8_row"]))
    assert "one scale a row" in codes_refusal(LinearRecipe("r", rows, Gemm(square, Operand(source="fprop"))))
    for change, words in (
        ({"fprop": Gemm(square, square, outer_b=turn)}, "fprop rotates out_features"),
        ({"fprop": Gemm(square, square, Rotation(16, "step"))}, "anew in every micro-batch"),
        ({"fprop": Gemm(square, Operand(two, rounding="stochastic"))}, "rounds the weight by stochastic"),
        ({"dgrad": Gemm(square, again, turn)}, "dgrad rotates the weight"),
        ({"dgrad": Gemm(square, again, outer_b=turn)}, "dgrad rotates the weight"),
        ({"dgrad": Gemm(square, Operand())}, "dgrad takes the weight unquantised"),
        ({"dgrad": Gemm(square, Operand(FORMATS["nvfp4"], reuse=True))}, "cannot use the codes"),
        ({"fprop": Gemm(square, Operand(Format("rms", "int8", (0, 0), rule="rms")))}, "spans all rows"),
    ):
        assert words in codes_refusal(dataclasses.replace(good, **change)), words


def test_amax_is_asked_for_and_refused():
    with pytest.raises(ValueError, match="one scale of the whole matrix; give amax"):
        encode_weight(weight(32, 32), load_recipe("nvfp4"), None)
    with pytest.raises(ValueError, match="has no scale of the whole matrix; leave out amax"):
        encode_weight(weight(128, 128), load_recipe("fp8_blockwise"), torch.ones(()))


def test_a_coded_weight_has_no_numbers():
    w = coded(weight(64, 32), load_recipe("nvfp4"), 2)
    parameter = nn.Parameter(w.as_strided((64, 32), (32, 1), 0))
    assert isinstance(parameter, CodedWeight) and parameter.shape == (64, 32) and parameter.dtype == torch.bfloat16
    assert parameter.view_as(parameter).held is w.held and "nvfp4_2d" in repr(parameter)
    assert type(torch.zeros_like(parameter)) is torch.Tensor
    for misuse in (
        lambda: torch.add(w, 1),
        lambda: w.T,
        lambda: w.float(),
        lambda: w.view(-1),
        lambda: w.as_strided((64, 32), (1, 64)),
        lambda: torch.ones(2, 32) @ w.T,
    ):
        with pytest.raises(TypeError, match="holds codes and no numbers"):
            misuse()
    with pytest.raises(ValueError, match=r"from 2 ranks are uint8 \(2, 516\), got torch.uint8 \(2, 515\)"):
        CodedWeight.of(w.held.bytes_WB[:, 1:], w.held.recipe, (64, 32), w.held.tensor_scale)


def test_the_recipe_in_force_must_be_that_of_the_codes():
    layer = QuantizedLinear(32, 64, False, recipe="nvfp4", layer="layers.0.up_proj")
    layer.weight = nn.Parameter(coded(weight(64, 32), layer.recipe, 2))
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    layer(x)
    layer.recipe = BF16
    with pytest.raises(ValueError, match=r"layer 'layers.0.up_proj': its weight arrived as codes for recipe nvfp4"):
        layer(x)
    layer.recipe = load_recipe("nvfp4")
    with pytest.raises(ValueError, match=r"runs recipe nvfp4 on torch.float32; gather it again"):
        layer(x.float())


def test_refilling_shows_in_every_view():
    """The bytes are the caller's: overwritten in place, with a new tensor scale, the parameter is another weight."""
    recipe, first, second = load_recipe("nvfp4"), weight(64, 32), weight(64, 32) * 3 + 0.1
    parameter = nn.Parameter(coded(first, recipe, 2))
    other = coded(second, recipe, 2)
    parameter.held.bytes_WB.copy_(other.held.bytes_WB)
    parameter.detach().refill(recipe, other.held.tensor_scale)
    assert torch.equal(parameter.codes().dequantize(), other.codes().dequantize())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_codes_of_any_format_become_the_very_operand(name, backend):
    """Values, scales and products of loaded codes are those of the prepared matrix, on both sides of a product."""
    format, chosen = FORMATS[name], backend_of(backend)
    gemm, x, stream = Gemm(Operand(format), Operand(format)), weight(128, 256), Stream()
    if chosen.refuses(gemm, "fprop", 128, 128, 256, x.dtype, x.device):
        assert backend.startswith("cpu")
        return
    pairs = [(chosen.load(format.quantize(x), gemm, s), chosen.prepare(x, gemm, s, stream, "fprop")) for s in "ab"]
    for loaded, prepared in pairs:
        for one, other in zip(chosen.unpacked(loaded, x.dtype), chosen.unpacked(prepared, x.dtype)):
            assert one.shape == other.shape and torch.equal(one, other)
    out = [chosen.multiply(a, b, gemm, torch.float32) for a, b in zip(*pairs)]
    assert torch.equal(*out) and bool(out[0].isfinite().all())


@pytest.mark.parametrize("name", ["nvfp4_2d", "fp8_tensor", "fp8_128x128", "int8_tensor"])
def test_codes_padded_and_transposed(name):
    """Equal to quantising the padded, the transposed and the padded transposed matrix."""
    format, x = FORMATS[name], weight(128, 256)
    q = format.quantize(x)
    assert torch.equal(transposed(q).dequantize(), format.quantize(x.T).dequantize())
    wide = padded(q, 144, 384)
    expected = torch.nn.functional.pad(q.dequantize(), (0, 128, 0, 16))
    assert torch.equal(wide.dequantize(), expected)
    turned = padded(transposed(q), 384, 144)
    assert turned.codes.stride() == (1, 384) and torch.equal(turned.dequantize(), expected.T)
