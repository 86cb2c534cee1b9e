"""The C++ kernels against the plain-torch definition: same codes, same scales, same FP4 products, bit for bit."""

import math

import pytest
import torch
from torch import Tensor

from lowprec.kernels.cpu import CpuBackend
from lowprec.kernels.cpu.build import Unavailable, cpu_description, load
from lowprec.linear import Gemm, Operand, Rotation, oracle
from lowprec.numerics import FORMATS, Format, Stream

try:
    cpu_description()
    MISSING = ""
except Unavailable as error:
    MISSING = str(error)
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=MISSING
)  # the processor, nothing else: a failed build is a failure

STREAM = Stream(seed=3, step=7, micro=2, layer="layers.0.mlp.up_proj")
CPU = CpuBackend()
KINDS = ("normal", "heavy", "zeros", "zero blocks", "subnormal", "huge", "outlier", "ties", "mixed")
FP4_PAIRS = (("nvfp4", "nvfp4_2d"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"))
FP8_PAIRS = (
    ("mxfp8", "mxfp8"),
    ("mxfp8", "mxfp8_e5m2"),
    ("mxfp4", "mxfp8"),
    ("fp8_tensor", "fp8_tensor_e5m2"),
    ("fp8_1x128", "fp8_128x128"),
    ("fp8_1x128", "fp8_1x128"),
    ("fp8_row", "fp8_tensor"),
)


def draw(kind: str, rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(rows, k) of a kind that exercises one corner of the formats."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g)
    if kind == "heavy":
        x = x * torch.exp(2 * torch.randn(rows, 1, generator=g) + 3 * torch.randn(1, k, generator=g))
    elif kind == "zeros":
        x = x * 0
    elif kind == "zero blocks":
        x[:17], x[:, :32] = 0, 0
    elif kind == "subnormal":
        x = x * 1e-39
    elif kind == "huge":
        x = x.clamp(-3, 3) * 1e38
    elif kind == "outlier":
        x = x * 2.0**-7
        x[5, 9] = 300.0
    elif kind == "ties":
        x = (x * 4).round() / 8
    elif kind == "mixed":
        x[::3] *= 1e-39
        x[1::3] *= 1e30
    return x.to(dtype)


def view(x: Tensor, transposed: bool) -> Tensor:
    """The same matrix, with its rows as the fast axis in memory if ``transposed``."""
    return x.T.contiguous().T if transposed else x


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, up to the sign of zero and the payload of NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(1.25), y.nan_to_num(1.25))


def gemm_of(a: str, b: str, rounding: str = "nearest", rotation: Rotation | None = None) -> Gemm:
    return Gemm(Operand(FORMATS[a], rounding), Operand(FORMATS[b], rounding), rotation)


def bound(qa: oracle.Prepared, qb: oracle.Prepared) -> tuple[Tensor, Tensor]:
    """The product of the quantised operands in fp64, and how far an fp32 sum of k products in any order may be from it.

    Every product of two element values is exact, passes through at most k additions, and is scaled in four operations;
    each rounds by at most 2**-24 of sums that |a||b| bounds. The last term is fp32's underflow.
    """
    a, b = (q.blockscaled().double() * q.tensor_scale.double() for q in (qa, qb))
    k = a.shape[1]
    return a @ b.T, (k + 8) * 2.0**-24 * (a.abs() @ b.abs().T) + k * 2.0**-149


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({name for pair in FP4_PAIRS + FP8_PAIRS for name in pair}))
def test_codes_and_scales_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    """Every format, kind of data, memory order, rounding and rotation gives the definition's values and scales."""
    assert load()[1] == ""
    for kind in KINDS:
        for rotation in (None, Rotation(16), Rotation(32, "step"), Rotation(128, "none")):
            for rounding in ("nearest", "stochastic"):
                for transposed in (False, True):
                    x = view(draw(kind, 128, 384, dtype), transposed)
                    gemm = gemm_of(name, name, rounding, rotation)
                    expected = oracle.prepare(x, gemm.b, rotation, STREAM, "wgrad", "x")
                    values, scales, tensor_scale = CPU.quantize(x, gemm, "b", STREAM, "wgrad")
                    case = (kind, rotation, rounding, transposed)
                    assert same(scales, expected.scales) and same(tensor_scale, expected.tensor_scale), case
                    counts = ~scales.isnan().any(1, keepdim=True)  # under a NaN scale the codes do not matter
                    assert torch.equal(values * counts, expected.values * counts), case


@pytest.mark.parametrize("pair", FP4_PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_fp4_products_equal_the_definition(kind: str, pair: tuple[str, str]) -> None:
    """FP4 products are bit-equal: roles with their memory orders, dtypes, sizes, roundings and rotations."""
    orders = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}
    for role, (a_transposed, b_transposed) in orders.items():
        for m, n, k in ((16, 16, 32), (112, 48, 224), (32, 208, 64)):
            for dtype, out_dtype in (
                (torch.bfloat16, torch.bfloat16),
                (torch.bfloat16, torch.float32),
                (torch.float32,) * 2,
            ):
                for rounding, rotation in (
                    ("nearest", None),
                    ("stochastic", Rotation(16)),
                    ("stochastic", Rotation(32, "step")),
                ):
                    a = view(draw(kind, m, k, dtype, 1), a_transposed)
                    b = view(draw(kind, n, k, dtype, 2), b_transposed)
                    gemm = gemm_of(*pair, rounding, rotation)
                    assert CPU.refuses(gemm, role, m, n, k, dtype, a.device) is None
                    got = CPU.gemm(a, b, gemm, STREAM, role, out_dtype)
                    assert got.dtype == out_dtype and same(got, oracle.gemm(a, b, gemm, STREAM, role, out_dtype))


@pytest.mark.parametrize("pair", FP8_PAIRS)
def test_fp8_products_are_within_the_rounding_of_an_fp32_sum(pair: tuple[str, str]) -> None:
    """FP8 and MX products differ from fp64 products of the same codes by no more than a derived bound everywhere."""
    for kind in ("normal", "heavy", "zeros", "zero blocks", "subnormal", "outlier", "mixed"):
        for a_transposed, b_transposed in ((False, False), (False, True), (True, True)):
            for rounding, rotation in (("nearest", None), ("stochastic", Rotation(16))):
                for dtype in (torch.float32, torch.bfloat16):
                    a = view(draw(kind, 144, 384, dtype, 1), a_transposed)
                    b = view(draw("heavy" if kind == "mixed" else kind, 128, 384, dtype, 2), b_transposed)
                    gemm = gemm_of(*pair, rounding, rotation)
                    qa, qb = oracle.prepare_both(a, b, gemm, STREAM, "dgrad")
                    exact, allowed = bound(qa, qb)
                    got = CPU.gemm(a, b, gemm, STREAM, "dgrad", torch.float32)
                    finite = exact.abs() < 3e38
                    assert ((got.double() - exact).abs() <= allowed)[finite].all(), (
                        kind,
                        a_transposed,
                        rounding,
                        dtype,
                    )
                    rounded = CPU.gemm(a, b, gemm, STREAM, "dgrad", torch.bfloat16)
                    assert torch.equal(rounded, got.bfloat16())


@pytest.mark.parametrize("spread", [20, 60, 110])
def test_mx_scales_far_apart_are_not_lost(spread: int) -> None:
    """MXFP8 blocks 2**spread apart keep their products, inside and outside of what folding scales into bf16 allows."""
    a, b = draw("normal", 32, 256, torch.float32, 1), draw("normal", 32, 256, torch.float32, 2)
    a[:, :128] *= 2.0**-spread  # rows mix both magnitudes,
    a[::2, 128:] = 0  # and every other row has only the small one
    b[:, 128:] *= 2.0 ** (spread / 2)
    gemm = gemm_of("mxfp8", "mxfp8_e5m2")
    exact, allowed = bound(*oracle.prepare_both(a, b, gemm, STREAM, "fprop"))
    got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    assert ((got.double() - exact).abs() <= allowed).all()
    assert got[0].abs().max() > 0


@pytest.mark.parametrize("exponent", [40, 45, 46, 52])
def test_the_smallest_products_are_not_flushed(exponent: int) -> None:
    """Where only the smallest codes of small blocks meet, sums survive (the bf16 unit flushes subnormals)."""
    a, b = torch.full((16, 32), 2.0 ** -(16 + exponent)), torch.full((16, 32), 3 * 2.0 ** -(16 + exponent))
    a[:, 0] = b[:, 1] = 57344 * 2.0**-exponent  # sets the block's scale, and meets a zero
    a[:, 1] = b[:, 0] = 0
    gemm = gemm_of("mxfp8_e5m2", "mxfp8_e5m2")
    exact, allowed = bound(*oracle.prepare_both(a, b, gemm, STREAM, "fprop"))
    got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    assert (got > 0).all() and ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2"])
def test_stochastic_thresholds_are_exact_to_the_last_bit(name: str) -> None:
    """Values at their own threshold, and one fp32 step above and below it, round as the definition says."""
    element, noise = FORMATS[name].element_type, STREAM.noise("dgrad.dy", (192, 64))
    low = torch.randint(len(element.values) - 1, noise.shape, generator=torch.Generator().manual_seed(0))
    low[:64] = 0  # below the smallest value
    grid = torch.tensor(element.values)
    x = grid[low] + noise * (grid[low + 1] - grid[low])  # up iff noise < fraction: exactly here, it stays
    x[1::3], x[2::3] = x[1::3].nextafter(torch.tensor(torch.inf)), x[2::3].nextafter(torch.tensor(0.0))
    x[:, ::32] = element.max  # every block's scale is 1
    gemm = gemm_of(name, name, "stochastic")
    expected = oracle.prepare(x, gemm.a, None, STREAM, "dgrad", "dy")
    values, scales, _ = CPU.quantize(x, gemm, "a", STREAM, "dgrad")
    assert (scales == 1).all() and torch.equal(values, expected.values)
    inner = (torch.arange(64) % 32 != 0)[None] & (x < element.max)
    assert torch.equal((values > grid[low])[inner], (torch.arange(192) % 3 == 1)[:, None].expand(192, 64)[inner])


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2", "fp8_1x128", "nvfp4"])
def test_scales_at_their_steps(name: str) -> None:
    """Block maxima at, just below and just above all kinds of steps give the definition's scale, over fp32's range."""
    top = FORMATS[name].element_type.max
    steps = [top * 2.0**e for e in (-127, -126, -125, -20, 0, 1, 100)] + [2.0**-149, 2.0**-127, 2.0**-126, 3.4028234e38]
    maxima = torch.tensor(steps + [1.0] * (-len(steps) % 16))
    maxima = torch.cat([maxima, maxima.nextafter(torch.tensor(0.0)), maxima.nextafter(torch.tensor(3.4028234e38))])
    x = torch.zeros(len(maxima), 128)
    x[:, 77] = maxima
    for source in (x, x[16:17].expand(16, 128).contiguous()):  # together, and one tiny tensor alone
        gemm = gemm_of(name, name)
        expected = oracle.prepare(source, gemm.a, None, STREAM, "fprop", "x")
        values, scales, tensor_scale = CPU.quantize(source, gemm, "a", STREAM, "fprop")
        assert same(scales, expected.scales) and same(tensor_scale, expected.tensor_scale)
        assert torch.equal(values, expected.values)


@pytest.mark.parametrize("pair", [*FP4_PAIRS, *FP8_PAIRS])
def test_results_do_not_depend_on_the_number_of_threads(pair: tuple[str, str]) -> None:
    """One, two and five threads give the same bits, noise included."""
    a, b = draw("normal", 336, 256, torch.bfloat16, 1), draw("normal", 384, 256, torch.bfloat16, 2)
    gemm, results = gemm_of(*pair, "stochastic", Rotation(16)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(CPU.gemm(a, b, gemm, STREAM, "wgrad", torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pair", [*FP4_PAIRS, *FP8_PAIRS])
def test_nan_and_infinity_are_loud(pair: tuple[str, str], bad: float) -> None:
    """One bad element makes everything under its scale NaN in the product, exactly where the definition has NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        for side in (0, 1):
            for rotation in (None, Rotation(16)):
                operands = [draw("normal", 128, 256, dtype, 1), draw("normal", 128, 256, dtype, 2)]
                operands[side][37, 129] = bad
                gemm = gemm_of(*pair, rotation=rotation)
                got = CPU.gemm(*operands, gemm, STREAM, "fprop", torch.float32)
                assert torch.equal(got.isnan(), oracle.gemm(*operands, gemm, STREAM, "fprop", torch.float32).isnan())
                row = got[37] if side == 0 else got[:, 37]
                assert row.isnan().all()


def test_random_bits_belong_to_step_micro_layer_role_and_position() -> None:
    """Each part of the key changes the codes; a transposed view takes the bits of the elements' places in memory."""
    x, gemm = draw("normal", 64, 64, torch.bfloat16), gemm_of("nvfp4", "nvfp4", "stochastic")
    streams = [
        STREAM,
        Stream(4, 7, 2, STREAM.layer),
        Stream(3, 8, 2, STREAM.layer),
        Stream(3, 7, 3, STREAM.layer),
        Stream(3, 7, 2, "x"),
    ]
    cases = [
        (stream, side, role) for stream in streams for side, role in (("a", "dgrad"), ("a", "wgrad"), ("b", "wgrad"))
    ]
    codes = [CPU.quantize(x, gemm, side, stream, role)[0] for stream, side, role in cases]
    assert all(not torch.equal(codes[i], codes[j]) for i in range(len(codes)) for j in range(i))
    square = Gemm(Operand(FORMATS["nvfp4_2d"], "stochastic"), Operand(FORMATS["nvfp4_2d"], "stochastic"))
    there, back = (CPU.quantize(t, square, "a", STREAM, "dgrad")[0] for t in (x, x.T))
    assert torch.equal(there, back.T)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_floor_scales_and_unusual_blocks(name: str) -> None:
    """The OCP floor rule, and formats nobody ships (FP4 with fp32 or tall blocks), follow the definition too."""
    floor = Format(f"{name}_floor", FORMATS[name].element, (1, 32), "e8m0", scale_rounding="floor")
    plain, wide = Format("e2m1_fp32", "e2m1", (1, 32)), Format("e2m1_fp32_64", "e2m1", (1, 64))
    tall = Format("e4m3_two_level", "e4m3", (32, 64), "e4m3", tensor_scale=True)
    for format in (floor, plain, wide, tall):
        for kind in KINDS:
            a, b = draw(kind, 64, 128, torch.bfloat16, 1), draw(kind, 64, 128, torch.bfloat16, 2)
            gemm = Gemm(Operand(format), Operand(format))
            assert CPU.refuses(gemm, "fprop", 64, 64, 128, a.dtype, a.device) is None
            expected = oracle.prepare(a, gemm.a, None, STREAM, "fprop", "x")
            values, scales, tensor_scale = CPU.quantize(a, gemm, "a", STREAM, "fprop")
            assert torch.equal(values, expected.values) and same(scales, expected.scales), (format.name, kind)
            assert same(tensor_scale, expected.tensor_scale)
            got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
            reference = oracle.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
            if format.element == "e2m1":
                assert same(got, reference), (format.name, kind)
            elif kind not in ("huge", "mixed"):  # where fp32 overflows, orders differ in which elements do
                exact, allowed = bound(*oracle.prepare_both(a, b, gemm, STREAM, "fprop"))
                assert ((got.double() - exact).abs() <= allowed).all(), (format.name, kind)
