"""The quantise kernels in the interpreter equal `Format.quantize`, bit for bit."""

import re
from pathlib import Path

import pytest
import torch

from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton import layout
from lowprec.kernels.triton.launch import quantize
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import assert_equal, assert_same

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")
NAMES = [
    "nvfp4", "nvfp4_2d", "mxfp4", "mxfp4_sr", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "mxfp8_floor", "mxfp8_ceil",
    "mxfp8_even", "mxfp8_e5m2", "fp8_tensor", "fp8_tensor_e5m2_pow2", "fp8_row", "fp8_1x128", "fp8_128x128",
    "fp8_1x128_pow2",
]  # fmt: skip


def hard(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers with zero, subnormal, tiny and huge blocks, and ties."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k)).to(dtype)
    x[0, : k // 2] = 0
    x[-1, : k // 3] *= 1e-39
    x[rows // 2] *= 1e30
    x[rows // 3] = torch.tensor([0.25, -0.75, 1.25, 2.5, 3.5, -5.0, 6.0, -0.0]).repeat(-(-k // 8))[:k].to(dtype)
    return x


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_columns_equal_the_definition(name: str, stochastic: bool) -> None:
    """Ragged in both axes; noise groups straddle rows when stochastic."""
    f, x = FORMATS[name], hard(27, 75)
    with interpreted():
        out = quantize(x, f, columns=True, stream=STREAM if stochastic else None)
    noise = STREAM.noise("rows", x.shape) if stochastic else None
    noise_t = STREAM.noise_like("columns", x.T) if stochastic else None
    assert out.rows and out.columns
    assert_equal(out.rows.qtensor(), f.quantize(x, noise))
    assert_equal(out.columns.qtensor(), f.quantize(x.T, noise_t))


@pytest.mark.parametrize("shape", [(1, 16), (1, 8), (3, 40), (65, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One row, less than a block, more than a tile; whole noise groups."""
    f, x = FORMATS["nvfp4"], hard(*shape, dtype).clamp(-6e4, 6e4)
    with interpreted():
        out = quantize(x, f, stream=STREAM)
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, STREAM.noise("rows", x.shape)))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_row"])
def test_transposed_and_strided_inputs(name: str) -> None:
    f = FORMATS[name]
    for x in (hard(48, 32).T, hard(32, 96)[:, 16:64], hard(64, 64)[::2, ::2]):
        with interpreted():
            out = quantize(x, f, columns=True)
        assert out.rows and out.columns
        assert_equal(out.rows.qtensor(), f.quantize(x))
        assert_equal(out.columns.qtensor(), f.quantize(x.T))
    x = hard(48, 32).T
    with interpreted():
        out = quantize(x, f, stream=STREAM)
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, STREAM.noise_like("rows", x)))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "mxfp8", "fp8_tensor", "fp8_row", "fp8_1x128"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_under_its_scale(name: str, bad: float) -> None:
    f, x = FORMATS[name], hard(20, 64)
    x[5, 17] = bad
    with interpreted():
        out = quantize(x, f, columns=True)
    assert out.rows and out.columns
    assert_equal(out.rows.qtensor(), f.quantize(x))
    assert_equal(out.columns.qtensor(), f.quantize(x.T))
    assert_same(out.rows.qtensor().dequantize(), f.quantize(x).dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "mxfp8"])
def test_swizzled_scales(name: str) -> None:
    """Read back they are those of the plain layout; what pads whole tiles is zero."""
    f, x = FORMATS[name], hard(130, 80)
    with interpreted():
        out = quantize(x, f, columns=True, swizzle=True)
    assert out.rows and out.columns
    assert_equal(out.rows.qtensor(), f.quantize(x))
    assert_equal(out.columns.qtensor(), f.quantize(x.T))
    blocks = f.quantize(x).row_scales() if name != "nvfp4_2d" else None
    if blocks is not None:
        assert int((out.rows.scales.view(torch.uint8) != 0).sum()) <= blocks.numel()


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor", "fp8_row"])
def test_a_given_maximum(name: str) -> None:
    f, x = FORMATS[name], torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    amax = torch.tensor(2.0) if f.amax_of == "tensor" else torch.linspace(0.5, 3, 6)[:, None]
    with interpreted():
        out = quantize(x, f, amax=amax)
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, amax=amax))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e38])
def test_tensors_at_the_ends_of_the_range(scale: float) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)) * scale
    for name in ("nvfp4", "mxfp4", "fp8_tensor"):
        with interpreted():
            out = quantize(x, FORMATS[name])
        assert out.rows
        assert_equal(out.rows.qtensor(), FORMATS[name].quantize(x))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "mxfp8", "fp8_tensor", "fp8_row", "fp8_1x128"])
def test_empty_matrices(name: str) -> None:
    f = FORMATS[name]
    for shape in ((0, 32), (32, 0)):
        out = quantize(torch.zeros(shape), f, columns=True)  # starts nothing
        assert out.rows and out.columns
        assert_equal(out.rows.qtensor(), f.quantize(torch.zeros(shape)))
        assert_equal(out.columns.qtensor(), f.quantize(torch.zeros(shape).T))


def test_what_is_refused() -> None:
    x = torch.randn(16, 32)
    for name, word in (("ternary_mean", "mean"), ("quest_int4", "midrise4")):
        with pytest.raises(ValueError, match=word):
            quantize(x, FORMATS[name])
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        quantize(x.double(), FORMATS["nvfp4"])
    with pytest.raises(ValueError, match="split it"):
        quantize(torch.empty_strided((2, 16), (1 << 24, 1)), FORMATS["nvfp4"])
    with pytest.raises(ValueError, match="sm_100 or sm_103"):
        quantize(x, FORMATS["mxfp4"], stream=STREAM, hardware_noise=True)
    with pytest.raises(ValueError, match="give one"):
        quantize(x, FORMATS["nvfp4"], hardware_noise=True)
    with pytest.raises(ValueError, match="swizzled"):
        quantize(x, FORMATS["fp8_1x128"], swizzle=True)


def test_bounds_of_static_loops_are_no_fields() -> None:
    """Triton before 3.8, which torch brings with CUDA, takes no field of a tuple as a bound; 3.9, used here, does."""
    files = list(Path(layout.__file__).parent.glob("*.py"))
    assert len(files) > 15
    assert [f.name for f in files if re.search(r"static_range\([^)]*\bF\.", f.read_text())] == []
