"""kernels/cpu/qdq: every format, layout and instruction set gives the bits of the plain-torch definition."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lowprec.kernels.cpu import qdq
from lowprec.numerics import ELEMENTS, FORMATS, Format, Stream, rotate
from lowprec.tools.bench_quantize import awkward, broken, roundings, same_bits

STREAM = Stream(seed=3, step=5, micro=1, layer="layer")
MXFP4, NVFP4 = FORMATS["mxfp4"], FORMATS["nvfp4"]
MORE = [
    *(Format(f"{e}_{s}", e, (1, 32), s) for e in ("e1m2", "e3m2", "int4", "int8", "ternary") for s in ("fp32", "pow2")),
    *(Format(f"midrise{b}", f"midrise{b}", (1, 0)) for b in (1, 4, 8)),
    *(Format(f"{e}_bf16", e, (0, 0), "none") for e in ("e8m0_signed", "e8m3", "e8m7")),
    *(
        Format(f"{e}_{r}", e, (1, 32), "e8m0", scale_rounding=r)
        for e in ("e2m1", "e4m3", "e5m2", "e2m3", "int8")
        for r in ("rceil", "floor", "ceil", "even")
    ),
    dataclasses.replace(MXFP4, name="mxfp4_guard", guard=4 / 3),
    dataclasses.replace(NVFP4, name="nvfp4_guard", guard=17 / 16, tensor_max=256),
    dataclasses.replace(NVFP4, name="nvfp4_old", scale_rounding="te_2_14", zero="min"),
    dataclasses.replace(NVFP4, name="nvfp4_row", tensor_scale="row", zero="one"),
    dataclasses.replace(NVFP4, name="nvfp4_double", tensor_scale=128),
    dataclasses.replace(NVFP4, name="nvfp4_wide", scale="ue5m3", tensor_max=61440),
    dataclasses.replace(NVFP4, name="nvfp4_rms", rule="rms", coef=2.5),
    dataclasses.replace(NVFP4, name="nvfp4_46", tensor_max=256, targets=(6, 4)),
    dataclasses.replace(NVFP4, name="nvfp4_46_2d", block=(16, 16), tensor_max=256, targets=(6, 4), select="mae"),
    dataclasses.replace(NVFP4, name="nvfp4_46_row", tensor_scale="row", tensor_max=256, targets=(6, 4)),
    Format("choose", "e3m2", (4, 8), "fp32", targets=(28, 20, 16)),
    Format("odd", "e2m1", (3, 24), "fp32"),
    Format("short", "e2m1", (1, 8), "e8m0"),
    Format("dozen", "e2m1", (1, 12), "fp32"),
]
ALL = {f.name: f for f in [*FORMATS.values(), *MORE] if qdq.refuses(f) is None}


def definition(x: Tensor, format: Format, rounding: str) -> "qdq.QTensor":
    """Quantised in plain torch, with noise by the position in memory."""
    if rounding == "nearest":
        return format.quantize(x)
    noise = STREAM.noise("key", x.shape) if x.is_contiguous() else STREAM.noise("key", x.T.shape).T
    return format.quantize(x, noise)


def random(rounding: str) -> tuple[Stream, str] | None:
    return (STREAM, "key") if rounding == "stochastic" else None


def matrices() -> list[Tensor]:
    """Awkward and broken ones, ragged, as they are and as transposed views."""
    wide, nan = awkward(torch.float32), broken(torch.bfloat16)
    return [wide, wide.bfloat16().T, nan, awkward(torch.float32)[:37, :151].contiguous().T]


@pytest.mark.parametrize("name", ALL)
def test_values_codes_and_scales_are_those_of_the_definition(name: str) -> None:
    """Values in both dtypes, codes, block scales and tensor scales, for awkward, broken and transposed matrices."""
    format = ALL[name]
    for x in matrices():
        for rounding in roundings(format):
            q = definition(x, format, rounding)
            for dtype in qdq.DTYPES:
                y = qdq.quantize_dequantize(x, format, random(rounding), dtype=dtype)
                assert same_bits(y, q.dequantize(dtype)), (rounding, x.dtype, dtype)
            if format.bits > 8:
                continue
            own = qdq.quantize(x, format, random(rounding))
            assert torch.equal(own.codes, q.codes)
            assert same_bits(own.block_scales(), q.block_scales()) and own.scales.dtype == q.scales.dtype
            assert (own.tensor_scale is None) == (q.tensor_scale is None)
            if q.tensor_scale is not None and own.tensor_scale is not None:
                assert same_bits(own.tensor_scale, q.tensor_scale)


@pytest.mark.parametrize("size", [2, 8, 16, 64, 128])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8_row", "nvfp4_46"])
def test_rotation_in_the_kernel(name: str, size: int) -> None:
    """Rotated blocks of the contracted axis, of a matrix and of a transposed view, in both dtypes."""
    format = ALL[name]
    signs = STREAM.signs("signs", size)
    for x in (awkward(torch.float32)[:, :256].contiguous(), torch.randn(256, 48).bfloat16().T):
        own = qdq.run(x, format, torch.float32, factors=size**-0.5 * signs)
        assert same_bits(own.values, format.quantize(rotate(x, size, signs)).dequantize())


def test_amax_from_outside() -> None:
    """A held maximum replaces the tensor's own, under a tensor scale and for one block."""
    x, amax = awkward(torch.float32), torch.tensor(1.5)
    for name in ("nvfp4", "fp8_tensor"):
        own = qdq.quantize_dequantize(x, FORMATS[name], amax=amax)
        assert same_bits(own, FORMATS[name].quantize(x, amax=amax).dequantize())


def test_large_results_and_threads() -> None:
    """A matrix large enough to be written past the caches, and any number of threads: the same bits."""
    x = torch.randn(1040, 2048, generator=torch.Generator().manual_seed(0))
    expected = definition(x, NVFP4, "stochastic").dequantize()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(qdq.quantize_dequantize(x, NVFP4, random("stochastic")), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_other_instruction_sets_give_the_same_bits(march: str) -> None:
    """The library built for CPUs with SSE2 and AVX2 only; on other CPUs than x86-64 there is nothing to compare."""
    library, reason = qdq.load(march)
    if library is None:
        pytest.skip(reason)
    assert library.lowprec_qdq_lanes() == {"x86-64": 4, "haswell": 8}[march]
    names = ("nvfp4", "nvfp4_2d", "mxfp8", "fp8_128x128", "int8_row", "nvfp4_46", "e8m3_bf16", "midrise4", "short")
    for name in (*names, "dozen"):
        for x in (awkward(torch.bfloat16), broken(torch.float32).T):
            for rounding in roundings(ALL[name]):
                for dtype in qdq.DTYPES:
                    own, other = (
                        qdq.run(x, ALL[name], dtype, random(rounding), march=m).values for m in ("native", march)
                    )
                    assert same_bits(own, other), (name, rounding)
    turned = [qdq.run(awkward(torch.bfloat16).T[:, :128].contiguous(), NVFP4, torch.float32, march=m,
                      factors=torch.full((128,), 128**-0.5)).values for m in ("native", march)]  # fmt: skip
    assert same_bits(*turned)


def test_every_element_is_understood_or_named() -> None:
    """Of the signed elements only the uneven grid of IF4 has no kernel, and the refusal names it."""
    unknown = {name for name, element in ELEMENTS.items() if element.signed and qdq.grid(element) is None}
    assert unknown == {"if4_int"}
    with pytest.raises(ValueError, match=r"if4_int.*use Format.quantize"):
        qdq.quantize_dequantize(torch.ones(2, 32), Format("f", "if4_int", (1, 16)))


@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(2, 32, dtype=torch.float64), torch.ones(0, 32)])
def test_refuses_in_words(x: Tensor) -> None:
    """A vector, fp64 and an empty matrix are refused with a sentence."""
    with pytest.raises(ValueError, match="cannot quantise"):
        qdq.quantize_dequantize(x, NVFP4)


@pytest.mark.parametrize("shape", [(64, 96, 128), (35, 70, 33), (13, 200, 1100)])
def test_product_of_bf16_with_fp32_sums(shape: tuple[int, int, int]) -> None:
    """Ragged sizes, all four layouts, scales of rows and of the whole: within the bound of an fp32 sum in any order."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    scale_a, scale_b = torch.rand(m, 1, generator=generator), torch.tensor(0.5)
    exact = (a.double() @ b.double().T) * scale_a.double() * 0.5
    bound = (a.double().abs() @ b.double().abs().T) * scale_a.double() * 0.5 * (k + 2) * 2**-23
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            out = qdq.product(left, right, scale_a, scale_b)
            if out is None:
                pytest.skip("this CPU has no AVX512-BF16")
            assert ((out - exact).abs() <= bound).all()
