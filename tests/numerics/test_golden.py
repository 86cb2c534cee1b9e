"""Reference vectors bit for bit: codes, scales, tensor maxima; see tests/golden/README.md for who made them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowprec.numerics import ELEMENTS, FORMATS, Format, QTensor, fixed_signs, rotate

FOLDER = Path(__file__).parent.parent / "golden"
INPUTS = load_file(FOLDER / "formats.safetensors")
GOLDEN = {**INPUTS, **load_file(FOLDER / "variants.safetensors")}
KINDS = ("normal", "heavy", "zeros", "tiny", "subnormal", "huge", "outlier", "rowmix", "zeroblocks", "ties")
FOUR_SIX = {
    f"{free}x16.{select}.{bound}": replace(
        FORMATS["nvfp4_46"], block=(free, 16), select=select, tensor_max=float(bound)
    )
    for free in (1, 16)
    for select in ("mae", "mse")
    for bound in (448, 256)
}
ROUNDINGS = {
    f"{name}_{rounding}": replace(FORMATS[name], scale_rounding=rounding)
    for name in ("mxfp4", "mxfp8")
    for rounding in ("floor", "ceil", "even", "rceil")
}
NAMED = {**FORMATS, **FOUR_SIX, **ROUNDINGS, "te_2_14": replace(FORMATS["nvfp4"], scale_rounding="te_2_14")}
CASES = [key.removesuffix(".codes") for key in GOLDEN if key.endswith(".codes")]


def split(case: str) -> tuple[str, Format]:
    """`<kind>.<shape>.<dtype>.<format>` -> the input's key and the format."""
    kind, shape, dtype, name = case.split(".", 3)
    return f"{kind}.{shape}.{dtype}.x", NAMED[name]


def positive_zero(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes modulo the sign of zero."""
    return torch.where(codes == 2 ** (bits - 1), 0, codes)


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_equal_the_reference(case):
    """Bit for bit, over ten kinds of data, two shapes (one ragged) and two dtypes."""
    key, format = split(case)
    q = format.quantize(INPUTS[key])
    bits = ELEMENTS[format.element].bits
    expected = QTensor.unpack(GOLDEN[f"{case}.codes"], format)
    assert torch.equal(positive_zero(q.codes, bits), positive_zero(expected, bits))
    reference = GOLDEN[f"{case}.scales"]
    if reference.dtype == torch.float32:
        scales = 1 / q.block_scales() if case.endswith("fp8_row") else q.block_scales()  # that one stores multipliers
    else:
        scales = q.scales.view(torch.uint8)
    if format.block == (16, 16) and case.endswith("nvfp4_2d"):  # the reference repeats a square block's scale
        scales = scales.repeat_interleave(16, 0)[: reference.shape[0]]
    if case.endswith("fp8_row"):  # one over one over: within an ulp
        assert torch.allclose(scales.flatten(), reference.flatten(), rtol=2.0**-22, atol=0)
    else:
        assert torch.equal(scales.flatten(), reference.flatten())


def test_the_tensor_scale_is_the_reference_maximum():
    """`tensor_scale = amax / 2688`, the reference stores amax; 1 for zeros, and 1 / FLT_MAX under 8e-36."""
    keys = [key.removesuffix(".amax") for key in GOLDEN if key.endswith(".nvfp4.amax")]
    assert len(keys) > 20
    for key in keys:
        amax = GOLDEN[f"{key}.amax"].reshape(())
        largest = torch.finfo(torch.float32).max
        expected = torch.where(amax < 2688 / largest, 1 / largest, amax / 2688)
        expected = torch.where(amax == 0, 1.0, expected)
        assert torch.equal(FORMATS["nvfp4"].quantize(INPUTS[split(key)[0]]).tensor_scale, expected), key


def test_the_reference_covers_every_kind_and_format():
    """No file of vectors can shrink unseen."""
    assert len(CASES) >= 300
    assert {case.split(".")[0] for case in CASES} == set(KINDS)
    names = {case.split(".", 3)[3] for case in CASES}
    assert names >= {*FOUR_SIX, *ROUNDINGS, "te_2_14", "nvfp4", "nvfp4_2d", "nvfp4_row", "mxfp8", "mxfp4", "fp8_row"}
    assert names >= {f"fp8_{block}{pow2}" for block in ("tensor", "1x128", "128x128") for pow2 in ("", "_pow2")}


def test_the_orders_of_the_scale_differ_where_the_reference_says():
    """The two orders of operations give different scales on some of the vectors, so the test above tells them apart."""
    old, new = NAMED["te_2_14"], FORMATS["nvfp4"]
    inputs = [INPUTS[f"{kind}.32x64.bf16.x"] for kind in KINDS]
    assert any((old.quantize(x).scales.float() != new.quantize(x).scales.float()).any() for x in inputs)


@pytest.mark.parametrize(
    "case", [key.removesuffix(".rht_xt") for key in GOLDEN if key.endswith(".rht_xt") and "subnormal" not in key]
)
def test_rotation_equals_the_reference(case):
    """bf16 inputs; the reference's matmul flushes bf16 subnormals, so those are left out."""
    x = GOLDEN[f"{case}.x"].T
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 16))
    assert torch.equal(rotate(x, 16, fixed_signs(16)), GOLDEN[f"{case}.rht_xt"])
