"""Rotations in the interpreter: of a matrix, and fused with quantisation, equal to the definition bit for bit."""

import pytest
import torch
from torch import Tensor

from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton.launch import quantize
from lowprec.kernels.triton.rotate import Turn, rotate
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.hadamard import fixed_signs
from lowprec.numerics.hadamard import rotate as defined
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import assert_equal, assert_same

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")


def hard(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers with zero, negative zero, subnormal, tiny and huge blocks."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k))
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-39
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, ::2] = 0
    x[6] = x[6].sign() * 5e37  # the sum of a block would overflow if it were not scaled first
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """Patterns, which tell zeros apart; one NaN is as good as another."""
    return torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)


def signs_of(n: int, kind: str) -> Tensor | None:
    return {"none": None, "fixed": fixed_signs(n), "step": STREAM.signs("wgrad.signs", n)}[kind]


@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["none", "fixed", "step"])
def test_a_matrix_is_rotated_and_turned_back(n: int, kind: str) -> None:
    """Both orders of memory, more than one tile, signs compiled in and given at run time."""
    x, signs = hard(131, 256), signs_of(n, kind)
    turns = [Turn.of(n, signs, fixed) for fixed in (True, False)]
    for one, turn in ((x, turns[0]), (x.T.contiguous().T, turns[1])):
        with interpreted():
            out = rotate(one, n, turn)
            back = rotate(one, n, turn, inverse=True)
        assert torch.equal(bits(out), bits(defined(x, n, signs)))
        assert torch.equal(bits(back), bits(defined(x, n, signs, inverse=True)))
        assert out.stride() == one.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_shapes_and_what_a_chip_would_do(dtype: torch.dtype) -> None:
    """Also the packed arithmetic of sm_100, whose instructions the interpreter executes; views; three axes; no rows."""
    x, signs = hard(33, 128, dtype).clamp(-6e4, 6e4), fixed_signs(16)
    for one in (x, x[:, 32:96], x[::2], x.reshape(3, 11, 128), x[:0]):
        with interpreted():
            out = rotate(one, 16, signs, arch="sm_100")
        assert out.dtype == dtype and torch.equal(bits(out), bits(defined(one, 16, signs)))


def expected(x: Tensor, name: str, turn: tuple[int, str] | None, noise: Tensor | None) -> object:
    turned = defined(x, turn[0], signs_of(*turn)) if turn else x
    return FORMATS[name].quantize(turned, noise)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("nvfp4", None, (16, "fixed")),
        ("nvfp4", (16, "step"), None),
        ("nvfp4", (128, "step"), (32, "none")),
        ("nvfp4_2d", (16, "fixed"), (16, "step")),
        ("mxfp8", (32, "step"), (64, "fixed")),
        ("fp8_row", None, (16, "fixed")),
        ("fp8_tensor", (64, "none"), (128, "step")),
    ],
)
def test_rotation_and_quantisation_in_one(
    name: str, rows: tuple[int, str] | None, columns: tuple[int, str] | None, along: bool, stochastic: bool
) -> None:
    """Noise is that of the place in the matrix before the rotation."""
    x = hard(128, 256)
    x[7:64] = x[64:121]
    x = x if along else x.T.contiguous().T
    turns = [Turn.of(one[0], signs_of(*one), one[1] == "fixed") if one else None for one in (rows, columns)]
    stream = STREAM if stochastic else None
    with interpreted():
        out = quantize(x, FORMATS[name], columns=True, stream=stream, turn=turns[0], turn_columns=turns[1])
    assert out.rows and out.columns
    noise = STREAM.noise_like("rows", x) if stochastic else None
    noise_t = STREAM.noise_like("columns", x.T) if stochastic else None
    assert_equal(out.rows.qtensor(), expected(x, name, rows, noise))
    assert_equal(out.columns.qtensor(), expected(x.T, name, columns, noise_t))


def test_ragged_free_axis_and_packed_arithmetic() -> None:
    """As sm_100 computes, f32x2 and cvt: rows that end inside a tile, one direction at a time."""
    for x in (hard(77, 80), hard(80, 77).T):
        for arch in (None, "sm_100"):
            with interpreted():
                out = quantize(x, FORMATS["nvfp4"], turn=Turn.of(16, fixed_signs(16), True), arch=arch)
            assert out.rows
            assert_equal(out.rows.qtensor(), expected(x, "nvfp4", (16, "fixed"), None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_poison_fills_its_block(bad: float) -> None:
    x = torch.randn(32, 64).bfloat16()
    x[5, 17] = bad
    with interpreted():
        out = quantize(x, FORMATS["mxfp8"], turn=Turn(32), columns=True, turn_columns=Turn(16))
    assert out.rows and out.columns
    for got, wanted in ((out.rows, defined(x, 32)), (out.columns, defined(x.T, 16))):
        assert_same(got.qtensor().dequantize(), FORMATS["mxfp8"].quantize(wanted).dequantize())


def test_one_pass_finds_the_maxima_of_both_directions() -> None:
    """NVFP4 rotated along columns only: two launches, of which the first looks at one direction."""
    launches = []
    x = torch.randn(128, 128).bfloat16()
    quantize(x, FORMATS["nvfp4"], columns=True, turn_columns=Turn(16), start=launches.append)
    assert [one.kernel.__name__ for one in launches] == ["amax_kernel", "quantize_kernel"]
    first = launches[0].constants
    assert (first["ROW_OUT"], first["COLUMN_OUT"], first["PLAIN"]) == (False, True, True)


def test_what_is_refused() -> None:
    x = torch.randn(32, 48)
    with pytest.raises(ValueError, match="blocks of 16, 32, 64 or 128, not of 8"):
        Turn(8)
    with pytest.raises(ValueError, match="16 signs"):
        Turn.of(16, torch.ones(8))
    with pytest.raises(ValueError, match="of 32 does not divide the axis of 48"):
        quantize(x, FORMATS["nvfp4"], turn=Turn(32))
    with pytest.raises(ValueError, match="of 64 does not divide the axis of 32"):
        quantize(x, FORMATS["nvfp4"], columns=True, turn_columns=Turn(64))
    with pytest.raises(ValueError, match="does not divide"):
        rotate(x, 32)
    with pytest.raises(ValueError, match="rotation of 16, not of 32"):
        rotate(x, 32, Turn(16))
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        rotate(x.double(), 16)
