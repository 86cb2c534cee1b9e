"""Format and QTensor: edge cases with their documented outcome, properties, and every field (see test_golden.py for the
reference vectors)."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.numerics import ELEMENTS, FORMATS, Format, QTensor, Stream, sqnr_db


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero(name):
    x = torch.zeros(32, 256)
    assert torch.equal(FORMATS[name].quantize(x).dequantize(), x)
    x[0, 0] = 1.0  # other blocks are all zero; a grid without a zero may fill the row
    out = FORMATS[name].quantize(x).dequantize()
    assert (out[1:] == 0).all() and (name == "quest_int4" or (out[0, 1:] == 0).all())
    assert out[0, 0] == 1 or FORMATS[name].rule != "absmax" or FORMATS[name].guard != 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_inf_are_loud(name, bad):
    """Everything under the poisoned scale is NaN; without a tensor scale the rest is untouched."""
    format = FORMATS[name]
    clean = Stream().noise("x", (256, 256)) - 0.5
    x = clean.clone()
    x[3, 5] = bad
    out = format.quantize(x).dequantize()
    assert out[3, 5].isnan()
    free, contracted = {True: (0, 0), "row": (1, 0), 128: (1, 128)}.get(format.tensor_scale or None, format.block)
    poisoned = torch.zeros(256, 256, dtype=torch.bool)
    poisoned[: free or 256, : contracted or 256] = True
    if free == 1:
        poisoned = torch.zeros(256, 256, dtype=torch.bool)
        poisoned[3, : contracted or 256] = True
    assert torch.equal(out.isnan(), poisoned)
    if format.tensor_scale is not True:
        assert torch.equal(out[~poisoned], format.quantize(clean).dequantize()[~poisoned])


@pytest.mark.parametrize("scale", [3e38, 1e-30, 1e-35])
@pytest.mark.parametrize("name", FORMATS)
def test_huge_and_small_tensors_keep_their_precision(name, scale):
    """The same data at another magnitude loses nothing but where it falls between powers of two (below 2.5 dB). A
    choice per block falls back on its first candidate, as squared errors leave the range of fp32."""
    format = FORMATS[name]
    x = Stream().noise("x", (64, 256)) - 0.5
    reference = sqnr_db(x, replace(format, targets=(), second=None).quantize(x).dequantize())
    if format.tensor_scale and scale == 1e-35:
        scale = 1e-34  # its tensor scale divides by 2688
    out = format.quantize(x * 2 * scale).dequantize()
    assert out.isfinite().all()
    assert sqnr_db(x, out.double() / (2 * scale)) > reference - 2.5


@pytest.mark.parametrize("name", FORMATS)
def test_precision_fades_to_zero_below_the_range_of_the_scales(name):
    """Down to fp32's smallest subnormal: finite, never NaN, never far above the input's maximum."""
    for magnitude in (1e-36, 1e-38, 1e-39, 1e-44):
        x = (Stream().noise("x", (32, 256)) - 0.5) * magnitude
        out = FORMATS[name].quantize(x).dequantize()
        assert out.isfinite().all() and out.abs().max() <= 1.5 * x.abs().max() + 1e-44


@pytest.mark.parametrize("name", FORMATS)
def test_divisors_flushed_to_zero_do_not_make_nan(name):
    """As on devices that flush subnormals: tiny blocks beside ordinary ones, and tensors of nothing else."""
    assert torch.set_flush_denormal(True), "this CPU cannot flush subnormals"
    try:
        x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
        for low in (1e-30, 1e-36, 1e-38, 3e-39, 1e-44):
            mixed = x.clone()
            mixed[16:] *= low
            for t in (mixed, x * low):
                assert FORMATS[name].quantize(t).dequantize().isfinite().all(), low
    finally:
        torch.set_flush_denormal(False)


def test_subnormals_of_mxfp8_keep_their_relative_precision():
    """E8M0 reaches 2^-127, so fp32-subnormal blocks still have three mantissa bits: half a step is |x| / 16."""
    x = (Stream().noise("x", (4, 64)) - 0.5) * 1e-39
    out = FORMATS["mxfp8"].quantize(x).dequantize()
    assert ((out - x).abs() <= x.abs() / 16 + 2.0**-137).all()


EXPECTED_DB = {
    "nvfp4": 20.4,
    "nvfp4_2d": 19.1,
    "mxfp4": 18.7,
    "mxfp8": 31.5,
    "fp8_tensor": 31.6,
    "fp8_1x128": 31.6,
    "int8_row": 40.0,
}


@pytest.mark.parametrize("name", EXPECTED_DB)
def test_precision_on_gaussian_data(name):
    """SQNR of N(0, 1) data, within 0.4 dB of what independent implementations of each format give."""
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(x, FORMATS[name].quantize(x).dequantize()) == pytest.approx(
        EXPECTED_DB[name], abs=0.4 if name != "int8_row" else 3
    )


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "mxfp4", "mxfp8", "fp8_tensor", "fp8_1x128"])
def test_stochastic_rounding_is_unbiased(name):
    """Means of 512 draws against their exact variance (hi - x)(x - lo): each within 5.5 sigma, their sum within 4."""
    format, n = FORMATS[name], 512
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    low, high = sorted_neighbours(format, x)
    draws = torch.stack(
        [format.quantize(x, Stream(step=i).noise("x", (16, 128))).dequantize() for i in range(n)]
    ).double()
    assert ((draws == low) | (draws == high)).all()
    inside = (low < x) & (
        x < high
    )  # a block's scale may round down and clip its maximum: no rounding of elements undoes that
    variance = ((high - x) * (x - low)).clamp(min=0)
    noise_step = (high - low) / 131072
    deviation = draws.mean(0) - x
    normal = inside & (variance * n > 10 * (high - low) ** 2)  # enough ups and downs for the normal approximation
    assert normal.sum() > 1000
    assert (deviation.abs() <= 5.5 * (variance / n).sqrt() + noise_step)[normal].all()
    assert deviation[inside].sum().abs() <= 4 * (variance[inside].sum() / n).sqrt() + noise_step[inside].sum()


def sorted_neighbours(format, x):
    """The two values each element may become: rounding with noise just below 1 and just above 0."""
    ends = [format.quantize(x, torch.full_like(x, u)).dequantize().double() for u in (1 - 2.0**-20, 2.0**-30)]
    return torch.minimum(*ends), torch.maximum(*ends)


def test_packing_layout_and_bytes():
    """Low nibble = even column; 4.5 bits a value and four bytes for NVFP4."""
    x = torch.tensor([[0.5, -6.0] + [0.0] * 14])
    q = Format("plain", "e2m1", (1, 16), "e8m0").quantize(x)
    assert q.pack()[0, 0] == (1 | 15 << 4)
    q = FORMATS["nvfp4"].quantize(torch.randn(64, 128))
    assert torch.equal(QTensor.unpack(q.pack(), q.format), q.codes)
    assert q.nbytes() == 64 * 128 // 2 + 64 * 8 + 4
    assert QTensor.unpack(q.pack()[:0], q.format).shape == (0, 128)
    assert FORMATS["mxfp8"].quantize(torch.randn(64, 128)).nbytes() == 64 * 128 + 64 * 4
    with pytest.raises(ValueError, match="even number of columns"):
        FORMATS["nvfp4"].quantize(torch.randn(2, 3)).pack()


def test_square_blocks_survive_the_transpose():
    x = torch.randn(48, 80)
    q, qt = FORMATS["nvfp4_2d"].quantize(x), FORMATS["nvfp4_2d"].quantize(x.T)
    assert torch.equal(q.codes.T, qt.codes) and torch.equal(q.scales.float().T, qt.scales.float())


@given(
    st.sampled_from(list(FORMATS)),
    st.integers(1, 40),
    st.integers(1, 140),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-30, 30),
    st.booleans(),
)
def test_any_shape_dtype_and_magnitude(name, rows, k, dtype, exponent, stochastic):
    """Shapes agree, results are finite, errors are below one element step under the block's scale, signs are kept."""
    format = FORMATS[name]
    if dtype == torch.float16:
        exponent = max(min(exponent, 3), -6)
    x = ((Stream().noise("x", (rows, k)) - 0.5) * 10.0**exponent).to(dtype)
    stochastic = stochastic and not (format.targets or format.second)
    q = format.quantize(x, Stream().noise("r", (rows, k)) if stochastic else None)
    out = q.dequantize()
    assert out.shape == x.shape and q.codes.dtype == torch.uint8 and out.isfinite().all()
    grid = ELEMENTS[format.element].values
    contracted = format.block[1] or k
    scale = q.row_scales().repeat_interleave(contracted, 1)[:, :k].double()
    if q.tensor_scale is not None:
        per_128 = q.tensor_scale.dim() == 2 and format.tensor_scale == 128
        scale = scale * (q.tensor_scale.repeat_interleave(128, 1)[:, :k] if per_128 else q.tensor_scale)
    size = x.double().abs()
    clipped = (size - grid[-1] * scale).clamp(min=0)
    gap = max(b - a for a, b in itertools.pairwise(grid))
    assert ((out - x.double()).abs() <= (gap * scale + clipped) * 1.0001).all()
    if format.rule == "absmax" and format.scale_rounding not in ("floor", "even"):
        # E4M3 scales round down by up to 1/17 and may vanish: the clipped part is below that share of the maximum.
        assert (clipped <= (size * 0.0667 + size.max() * 2.0**-18 if format.tensor_scale else size * 1e-6)).all()
    assert (out * x.float() >= 0).all()


TWO_LEVEL = {"scale": "e4m3", "tensor_scale": True}
REFUSED = {
    "expected one of|unknown element 'e2m2'": ("e2m2", (1, 16), {}),
    "unknown scale 'fp16'": ("e2m1", (1, 16), {"scale": "fp16"}),
    "e4m3 block scales and a tensor_scale belong together": ("e2m1", (1, 16), {"scale": "e4m3"}),
    "fp32 block scales and a tensor_scale do not belong together": ("e2m1", (1, 16), {"tensor_scale": True}),
    "unknown tensor_scale 'column'": ("e2m1", (1, 16), {"scale": "e4m3", "tensor_scale": "column"}),
    "needs blocks within one row": ("e2m1", (16, 16), {"scale": "e4m3", "tensor_scale": 128}),
    "needs a block that divides 128": ("e2m1", (1, 48), {"scale": "e4m3", "tensor_scale": 128}),
    "unknown scale_rounding 'floor' for e4m3": ("e2m1", (1, 16), {**TWO_LEVEL, "scale_rounding": "floor"}),
    "fp32 scales have no scale_rounding": ("e2m1", (1, 16), {"scale_rounding": "floor"}),
    "block must be": ("e2m1", (1, -1), {}),
    "under rule absmax use guard": ("e2m1", (1, 16), {"coef": 2.0}),
    "need rule absmax, got rms": ("e2m1", (1, 16), {"rule": "rms", "targets": (6, 4)}),
    "at most 6": ("e2m1", (1, 16), {"targets": (8, 6)}),
    "not e8m0": ("e2m1", (1, 32), {"scale": "e8m0", "targets": (6, 4)}),
    "scale none measures nothing": ("e8m3", (1, 16), {"scale": "none", "guard": 2.0}),
    "marked by the sign bit of e4m3": ("e2m1", (1, 16), {"second": "if4_int"}),
    "must reach the same maximum": ("e2m1", (1, 16), {**TWO_LEVEL, "second": "int4"}),
    "zero is about e4m3 and ue5m3": ("e2m1", (1, 16), {"zero": "one"}),
    "tensor_max is about block scales under": ("e2m1", (1, 16), {"tensor_max": 256.0}),
    "beyond the largest e4m3 scale 448": ("e2m1", (1, 16), {**TWO_LEVEL, "tensor_max": 500.0}),
    "must be above 0": ("e2m1", (1, 16), {"guard": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_inadmissible_formats_are_refused_by_name(sentence):
    element, block, fields = REFUSED[sentence]
    with pytest.raises(ValueError, match=f"format mine: .*({sentence})"):
        Format("mine", element, block, **fields)


def test_bad_input_gets_a_sentence():
    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match="expected a floating matrix"):
        FORMATS["nvfp4"].quantize(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="noise has shape"):
        FORMATS["nvfp4"].quantize(x, torch.ones(16))
    with pytest.raises(ValueError, match="stochastic rounding is biased where each block picks"):
        FORMATS["nvfp4_46"].quantize(x, torch.full_like(x, 0.5))
    with pytest.raises(ValueError, match="MS-EDEN corrects"):
        FORMATS["mxfp4"].eden(x, torch.ones(2, 1))
    with pytest.raises(ValueError, match="one number a block is"):
        FORMATS["nvfp4_eden"].eden(x, torch.ones(2, 16))
