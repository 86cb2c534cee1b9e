"""Every format the kernels accept, interpreted: edge values, forward and transposed, equal to `Format.quantize`."""

import dataclasses

import pytest
import torch

from lowprec.comm.codec import QUANTIZED
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton.launch import quantize
from lowprec.kernels.triton.recipe import refuse
from lowprec.numerics.element import ELEMENTS
from lowprec.numerics.format import Format
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import assert_equal
from tests.kernels.triton.test_triton_quantize import hard

STREAM = Stream(7, 11, 2, "formats")
REFUSED = ("ternary_mean", "ternary_median", "quest_int4", "quest_fp4")
MORE = {  # combinations that have no name of their own
    f.name: f
    for f in (
        *QUANTIZED.values(),
        Format("int3_1x16", "int3", (1, 16)),
        Format("int6_16x16", "int6", (16, 16), "pow2"),
        Format("mxint8", "int8", (1, 64), "e8m0", scale_rounding="nearest"),
        Format("mx_guard", "e5m2", (32, 32), "e8m0", scale_rounding="ceil", guard=1.5),
        Format("row_46", "e2m1", (1, 32), "e4m3", "row", targets=(4.0, 6.0), select="mae"),
        Format("group_if4", "e2m1", (1, 64), "e4m3", 128, second="if4_int", zero="min"),
        Format("if4_46", "e2m1", (1, 16), "e4m3", True, targets=(6.0, 4.0), second="if4_int", tensor_max=256.0),
        Format("square_46", "e2m1", (16, 32), "e4m3", True, targets=(6.0, 4.0), tensor_max=256.0),
        Format("plain_two", "e4m3", (1, 128), "fp32", targets=(448.0, 416.0)),
        Format("tall_ue5m3", "e3m2", (128, 16), "ue5m3", True, scale_rounding="te_2_14"),
    )
}
ACCEPTED = {n: f for n, f in (FORMATS | MORE).items() if n not in REFUSED}
# one of each kind is rounded stochastically too
DRAWN = {(f.element, f.scale, f.block[1], f.tensor_scale): n for n, f in ACCEPTED.items() if not f._chooses}.values()


def edges(rows: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`hard`, and rows of subnormals, of the largest numbers, of exact grid values and their neighbours."""
    x = hard(rows, k, torch.float32)
    x[3] = torch.randn(k, generator=torch.Generator().manual_seed(3)) * 2.0**-130
    x[4, : k // 2] = torch.finfo(dtype).max * torch.tensor([1.0, -0.75, 0.5]).repeat(k)[: k // 2]
    grid = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 448.0]).repeat(-(-k // 8))[:k]
    x[6], x[7] = grid.nextafter(torch.zeros(())), -grid.nextafter(torch.full((), torch.inf))
    x[8, -1] = 2.0**-149
    return x.to(dtype)


def check(format: Format, x: torch.Tensor, stochastic: bool, columns: bool = True, swizzle: bool = False) -> None:
    stream = STREAM if stochastic else None
    with interpreted():
        out = quantize(x, format, columns=columns, stream=stream, swizzle=swizzle)
    assert out.rows
    assert_equal(out.rows.qtensor(), format.quantize(x, STREAM.noise_like("rows", x) if stochastic else None))
    if columns:
        assert out.columns
        noise_t = STREAM.noise_like("columns", x.T) if stochastic else None
        assert_equal(out.columns.qtensor(), format.quantize(x.T, noise_t))


def test_all_named_formats_but_those_of_other_statistics_are_accepted() -> None:
    assert {name for name, f in (FORMATS | MORE).items() if refuse(f)} == set(REFUSED)


@pytest.mark.parametrize("name", ACCEPTED)
def test_rows_and_columns_of_edge_values(name: str) -> None:
    """Ragged in both axes, fp32; stochastically without the largest numbers, beside which others are zero."""
    f, x = ACCEPTED[name], edges(21, 75)
    check(f, x, False)
    if name in DRAWN:
        check(f, x.where(x.abs() < 1e4, torch.zeros(())), True, columns=False)


@pytest.mark.parametrize("name", ["nvfp4_46", "if4", "nvfp4_double", "int4_row"])
def test_other_shapes_dtypes_and_strides(name: str) -> None:
    f = ACCEPTED[name]
    for x in (hard(1, 40), hard(48, 136).T, edges(16, 32, torch.bfloat16)[:, 8:24]):
        check(f, x, False)
    check(f, hard(40, 24).T, not f._chooses)


@pytest.mark.parametrize("name", ["nvfp4_46", "if4", "nvfp4_double", "nvfp4_row", "nvfp4_ue5m3", "int8_row"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_poison(name: str, bad: float) -> None:
    f, x = ACCEPTED[name], hard(20, 136)
    x[5, 17] = bad
    check(f, x, False)


@pytest.mark.parametrize("name", ["nvfp4_ue5m3", "if4"])
def test_swizzled_scales_of_two_levels(name: str) -> None:
    check(ACCEPTED[name], hard(130, 80), False, columns=False, swizzle=True)


@pytest.mark.parametrize("name", ["nvfp4_46", "nvfp4_row", "nvfp4_ue5m3"])
def test_a_given_maximum_of_two_levels(name: str) -> None:
    f, x = ACCEPTED[name], torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    amax = torch.tensor(2.0) if f.amax_of == "tensor" else torch.linspace(0.5, 3, 6)[:, None]
    with interpreted():
        out = quantize(x, f, amax=amax)
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, amax=amax))


def test_every_integer_and_minifloat_up_to_eight_bits_is_accepted() -> None:
    for element in ELEMENTS.values():
        reason = refuse(Format("any", element.name, (1, 32)))
        known = element.name.startswith(("int", "e2", "e3", "e4", "e5", "e1m2", "ternary"))
        assert (reason is None) == known, element.name
        assert reason is None or (reason.startswith("format any: ") and reason.count(".") == 0)


def test_refusals_are_sentences() -> None:
    base = FORMATS["nvfp4"]
    for f, word in (
        (FORMATS["quest_fp4"], "rms"),
        (FORMATS["quest_int4"], "midrise4"),
        (Format("plain", "e4m3", (0, 0), "none"), "need a scale"),
        (Format("odd", "e2m1", (1, 24)), "powers of two"),
        (Format("whole", "e4m3", (1, 0), "e8m0"), "small blocks"),
        (Format("whole_two", "e4m3", (1, 0), targets=(448.0, 416.0)), "small blocks"),
        (Format("second", "e2m1", (1, 16), "e4m3", True, second="e2m1"), "if4_int"),
    ):
        with pytest.raises(ValueError, match=word):
            quantize(torch.randn(16, 32), f)
    with pytest.raises(ValueError, match="biased"):
        quantize(torch.randn(16, 32), FORMATS["if4"], stream=STREAM)
    assert refuse(dataclasses.replace(base, name="other")) is None
