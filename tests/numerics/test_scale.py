"""Scale rules: statistics, guards, choices per block, tensor scales, and what becomes of scales that underflow."""

from dataclasses import replace

import pytest
import torch

from lowprec.numerics import ELEMENTS, FORMATS, Format, QTensor
from lowprec.numerics.scale import block_size, power_of_two, tree_sum


def test_tree_sum_order():
    """Halves are added to halves; seven elements count as eight with a zero."""
    t = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    e = torch.cat([t, torch.zeros(3, 1)], 1)
    e = e[:, :4] + e[:, 4:]
    e = e[:, :2] + e[:, 2:]
    assert torch.equal(tree_sum(t, 1), e[:, :1] + e[:, 1:])


@pytest.mark.parametrize("magnitude", [1e-40, 1e-20, 1.0, 1e30])
def test_block_statistics(magnitude):
    """rms, std, mean, median against fp64, where squares would leave the range of fp32 too."""
    x = (torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) + 0.3) * magnitude
    blocks = x.reshape(3, 2, 3, 32)
    d = blocks.double().transpose(1, 2).flatten(2)
    expected = {
        "absmax": d.abs().amax(2),
        "rms": d.square().mean(2).sqrt(),
        "std": d.var(2, correction=0).sqrt(),
        "mean": d.abs().mean(2),
        "median": d.abs().median(2).values,
    }
    for rule, value in expected.items():
        size = block_size(blocks, rule, 1.0 if rule == "absmax" else 2.0).double()
        wanted = value * (1 if rule == "absmax" else 2)
        assert ((size - wanted).abs() <= 4e-7 * wanted + 2e-45).all(), rule


def test_published_scale_rules():
    """BitNet: scale = mean |w|; QuEST: step = 2 coef rms / 15; Quartet's MXFP4: 2^floor(log2(0.48707976 sigma))."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    q = FORMATS["ternary_mean"].quantize(x)
    assert q.scales.item() == pytest.approx(x.abs().mean().item(), rel=1e-6)
    assert torch.equal(q.values(), (x / q.scales).round().clamp(-1, 1))
    assert FORMATS["ternary_median"].quantize(x).scales.item() == pytest.approx(x.abs().median().item(), rel=1e-6)
    q = FORMATS["quest_int4"].quantize(x)
    step = 2 * 2.51393058 * x.square().mean(1, keepdim=True).sqrt() / 15
    assert torch.allclose(q.scales, step, rtol=1e-6)
    assert torch.equal(q.values(), ((x / q.scales).clamp(-7.5, 7.5) + 0.5).round().clamp(-7, 8) - 0.5)
    quartet = Format("quartet", "e2m1", (1, 32), "e8m0", scale_rounding="floor", rule="std", coef=4 * 0.48707976)
    sigma = x.view(8, 8, 32).std(2, correction=0)
    assert torch.equal(quartet.quantize(x).scales.float(), torch.exp2((0.48707976 * sigma).log2().floor()))


def test_pow2_scales_never_clip_and_lose_at_most_a_factor_of_two():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q, exact = FORMATS["fp8_1x128_pow2"].quantize(x), FORMATS["fp8_1x128"].quantize(x)
    assert (torch.frexp(q.scales).mantissa == 0.5).all()
    assert ((q.scales >= exact.scales) & (q.scales < 2 * exact.scales)).all()


def test_guards_keep_stochastic_rounding_from_clipping():
    """17/16 covers the rounding down of an e4m3 scale; 4/3 the floor of OCP's e8m0 scale. Without them values clip."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for name, guarded in (("nvfp4_sr", True), ("mxfp4_sr", True), ("nvfp4", False), ("mxfp4_floor", False)):
        q, u = FORMATS[name]._quantize(x, None, None)
        assert (bool((u.abs() <= 6).all())) is guarded, name
    q = FORMATS["mxfp4_sr"].quantize(x)
    assert q.tensor_scale == torch.tensor(4 / 3)
    assert torch.equal(q.scales.float(), FORMATS["mxfp4_floor"].quantize(x).scales.float())


def test_a_choice_per_block_never_has_a_larger_error():
    """4-over-6 and IF4 against each of their candidates alone, block by block; both candidates are used."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for format in (FORMATS["nvfp4_46"], replace(FORMATS["nvfp4_46"], select="mae"), FORMATS["if4"]):
        power = 1 if format.select == "mae" else 2
        errors = []
        alone = [format, replace(format, targets=(), second=None)]
        if format.second:
            alone.append(replace(format, element=format.second, second=None))
        for candidate in alone:
            d = (candidate.quantize(x).dequantize() - x).abs().pow(power)
            errors.append(d.view(64, 32, 16).double().sum(2))
        assert (errors[0] <= torch.stack(errors[1:]).amin(0) * (1 + 1e-5)).all()
        assert 0.1 < (errors[0] < errors[1] * (1 - 1e-6)).double().mean() < 0.9


def test_the_second_element_is_the_sign_bit_of_the_scale():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    q = FORMATS["if4"].quantize(x)
    second = q.scales.float().signbit().repeat_interleave(16, 1)
    assert 0.2 < second.double().mean() < 0.8 and (q.block_scales() > 0).all()
    assert torch.equal(q.values()[second], ELEMENTS["if4_int"].decode(q.codes)[second])
    assert torch.equal(q.values()[~second], ELEMENTS["e2m1"].decode(q.codes)[~second])


def test_what_becomes_of_scales_that_underflow():
    """A block 2^20 below the maximum: keep, one and min in e4m3, and ue5m3, which still represents it."""
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-20
    sizes = {}
    for zero in ("keep", "one", "min"):
        q = replace(FORMATS["nvfp4"], zero=zero).quantize(x)
        sizes[zero] = q.block_scales()[0, 1].item()
        value = q.dequantize()[0, 16:].unique().item()
        assert 0.5 * 2.0**-20 < value < 1.5 * 2.0**-20 if zero == "min" else value == 0
    assert sizes == {"keep": 0, "one": 1, "min": 2.0**-9}
    q = FORMATS["nvfp4_ue5m3"].quantize(x)
    assert q.scales.dtype == torch.uint8 and torch.allclose(q.dequantize(), x, rtol=0.1)
    assert torch.equal(ELEMENTS["ue5m3"].decode(q.scales), q.block_scales())


def test_tensor_scales_by_row_and_by_128():
    """Rows or stretches of different magnitude are quantised as if they were alone."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-6], [1e6], [1e-12]])
    q = FORMATS["nvfp4_row"].quantize(x)
    assert q.tensor_scale.shape == (4, 1)
    rows = [FORMATS["nvfp4"].quantize(x[i : i + 1]) for i in range(4)]
    assert torch.equal(q.dequantize(), torch.cat([r.dequantize() for r in rows]))
    x[:, 128:256] *= 1e-7
    q = FORMATS["nvfp4_double"].quantize(x)
    assert q.tensor_scale.shape == (4, 3)
    alone = replace(FORMATS["nvfp4"], zero="min")
    for i, j in ((0, 0), (1, 1), (3, 2)):
        part = alone.quantize(x[i : i + 1, 128 * j : 128 * j + 128])
        assert torch.equal(q.dequantize()[i : i + 1, 128 * j : 128 * j + 128], part.dequantize())
    assert q.nbytes() == 4 * 150 + 4 * 19 + 4 * 12


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_46", "fp8_tensor", "fp8_tensor_pow2", "int8_tensor"])
def test_a_given_maximum_replaces_the_tensors_own(name):
    """The same number changes nothing; half of it saturates what lies above; NaN stays loud."""
    format = FORMATS[name]
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    own, given = format.quantize(x), format.quantize(x, amax=x.abs().max())
    assert torch.equal(own.codes, given.codes) and torch.equal(own.dequantize(), given.dequantize())
    half = format.quantize(x, amax=x.abs().max() / 2).dequantize()
    if name != "nvfp4" and name != "nvfp4_46":  # with block scales the headroom of e4m3 decides, see the 448 below
        assert half.abs().max() <= x.abs().max() / 2 * 1.001 or name == "fp8_tensor_pow2"
    assert torch.allclose(half.clamp(-0.5, 0.5), x.clamp(-0.5, 0.5), atol=0.3)
    eighth = replace(format, tensor_max=448.0).quantize(x, amax=x.abs().max() / 8) if format.tensor_scale else None
    assert eighth is None or eighth.block_scales().max() == 448
    x[0, 0] = torch.inf
    assert format.quantize(x, amax=torch.tensor(4.0)).dequantize()[0, 0].isnan()
    assert format.quantize(torch.ones(2, 32), amax=torch.tensor(torch.inf)).dequantize().isnan().all()
    with pytest.raises(ValueError, match="amax must be one number"):
        FORMATS["nvfp4_row"].quantize(x, amax=torch.tensor(1.0))


def test_masked_mantissas_need_no_scale():
    """To FP8 and back: e8m3 keeps three mantissa bits of bf16 at any magnitude; codes of eleven to sixteen bits."""
    x = (torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * 1e20).bfloat16()
    for bits, name in ((12, "e8m3"), (16, "e8m7")):
        format = Format(name, name, (1, 0), "none")
        q = format.quantize(x)
        assert format.bits == bits and q.codes.dtype == torch.int32
        assert ((q.dequantize() - x.float()).abs() <= x.float().abs() * 2.0 ** -(bits - 8)).all()
        assert torch.equal(QTensor.unpack(q.pack(), format), q.codes) and q.pack().dtype == torch.int16
        assert q.nbytes() == 2 * x.numel()
    assert torch.equal(Format("bf16", "e8m7", (1, 0), "none").quantize(x).dequantize(), x.float())


def test_powers_of_two_are_exact():
    """Every scale that e8m0 can store, the subnormal 2^-127 included, against fp64."""
    exponent = torch.arange(-127, 128, dtype=torch.int32)
    assert torch.equal(power_of_two(exponent).double(), torch.pow(2.0, exponent.double()))


def test_roundings_of_e8m0_scales():
    """Around every power of two and sqrt(2): each rounding against its formula in fp64."""
    size = torch.cat(
        [2.0**e * torch.tensor([0.99, 1.0, 1.01, 1.2, 1.42, 1.49, 1.51, 1.7, 1.9]) for e in range(-90, 90)]
    )
    x = torch.zeros(len(size), 32)
    x[:, 7] = size
    log = size.double().log2()
    expected = {
        "rceil": (size.double() / 6).log2().ceil(),
        "floor": log.floor() - 2,
        "ceil": log.ceil() - 2,
        "nearest": (size.double() / 6).log2().round(),
        "even": ((size.double() / 2.0 ** log.floor() * 2 + 0.5).floor() / 2 * 2.0 ** log.floor()).log2().floor() - 2,
    }
    for rounding, exponent in expected.items():
        q = replace(FORMATS["mxfp4"], scale_rounding=rounding).quantize(x)
        assert torch.equal(q.block_scales()[:, 0].double(), 2.0**exponent), rounding
