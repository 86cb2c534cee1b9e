"""Every format, rounding and rotation that the C++ kernels serve: the definition's values and scales, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.kernels.cpu import CpuBackend, rotate
from lowprec.kernels.cpu.build import Unavailable, cpu_description
from lowprec.kernels.cpu.operand import element_args
from lowprec.linear import Gemm, Operand, Rotation, oracle
from lowprec.numerics import ELEMENTS, FORMATS, Format, Stream
from lowprec.numerics import rotate as rotate_definition

try:
    cpu_description()
    MISSING = ""
except Unavailable as error:
    MISSING = str(error)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

STREAM = Stream(seed=5, step=3, micro=1, layer="layers.1.attn.o_proj")
CPU = CpuBackend()
NV = {"scale": "e4m3", "tensor_scale": True}
EXTRA = (
    *(Format(f"{name}_fp32", name, (1, 32)) for name in ("e1m2", "int2", "int3", "int5", "int7")),
    *(Format(f"{name}_fp32", name, (1, 32)) for name in ("midrise8", "e3m2", "e2m3")),
    *(Format(f"midrise{bits}_rms", f"midrise{bits}", (1, 0), rule="rms", coef=1.5) for bits in (1, 2, 3, 5, 7)),
    *(Format(f"e8m{m}", f"e8m{m}", (1, 0), "none") for m in (1, 2, 3, 5, 6, 7)),
    Format("e8m0", "e8m0_signed", (0, 0), "none"),
    Format("int8_128", "int8", (1, 128), "pow2"),
    Format("int8_256_pow2", "int8", (1, 256), "pow2"),
    Format("int8_64", "int8", (1, 64)),
    Format("int8_e4m3", "int8", (1, 16), **NV),
    Format("nvfp4_te214", "e2m1", (1, 16), **NV, scale_rounding="te_2_14"),
    Format("nvfp4_46_2d", "e2m1", (16, 16), **NV, targets=(6.0, 4.0), tensor_max=256.0),
    Format("nvfp4_46_mae", "e2m1", (1, 16), **NV, targets=(6.0, 4.0), tensor_max=448.0, select="mae", zero="min"),
    Format("nvfp4_46_32", "e2m1", (1, 32), **NV, targets=(4.0, 6.0), tensor_max=256.0),
    Format("e2m1_46_fp32", "e2m1", (1, 16), targets=(6.0, 4.0)),
    Format("ue5m3_row", "e2m1", (1, 16), "ue5m3", tensor_scale="row", zero="min"),
    Format("e4m3_double_64", "e4m3", (1, 64), "e4m3", tensor_scale=128),
    Format("e4m3_rms_2d", "e4m3", (16, 32), rule="rms", coef=20.0),
    Format("std_tensor", "int4", (0, 0), rule="std", coef=3.0),
    Format("nv_mean", "e2m1", (1, 16), **NV, rule="mean", coef=2.5),
    Format("mxfp4_ceil", "e2m1", (1, 32), "e8m0", scale_rounding="ceil"),
    Format("mx_e3m2_even", "e3m2", (1, 32), "e8m0", scale_rounding="even"),
    Format("mx_2d", "e4m3", (32, 64), "e8m0"),
    Format("guarded", "e4m3", (1, 32), guard=1.1),
)  # fmt: skip
SERVED = {format.name: format for format in (*FORMATS.values(), *EXTRA) if format.second is None}
KINDS = ("normal", "outlier", "zeros", "zero blocks", "tiny", "huge", "ties", "mixed")


def draw(kind: str, rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(rows, k) of a kind that exercises one corner of the formats."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        x = x * 2.0**-7
        x[5, 9] = 300.0
    elif kind == "zeros":
        x = x * 0
    elif kind == "zero blocks":
        x[:17], x[:, :32] = 0, 0
    elif kind == "tiny":
        x = x * 1e-38
    elif kind == "huge":
        x = x.clamp(-3, 3) * 1e38
    elif kind == "ties":
        x = (x * 4).round() / 8
    elif kind == "mixed":
        x[::3] *= 1e-30
        x[1::3] *= 1e20
    return x.to(dtype)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, up to the sign of zero and the payload of NaN."""
    return (
        x.shape == y.shape and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(1.25), y.nan_to_num(1.25))
    )


def check(x: Tensor, operand: Operand, rotation: Rotation | None, case: Any, amax: Tensor | None = None) -> None:
    """Values, scales and tensor scale of x as operand b of wgrad are the definition's."""
    gemm = Gemm(operand, operand, rotation)
    reason = CPU.refuses(gemm, "wgrad", x.shape[0], x.shape[0], x.shape[1], x.dtype, x.device)
    assert reason is None, (reason, case)
    expected = oracle.prepare(x, operand, rotation, STREAM, "wgrad", "x", amax)
    values, scales, tensor_scale = CPU.quantize(x, gemm, "b", STREAM, "wgrad", amax)
    assert same(scales, expected.scales), case
    assert same(tensor_scale, expected.tensor_scale), case
    counts = (~scales.isnan()).repeat_interleave(x.shape[1] // scales.shape[1], dim=1)
    assert torch.equal(values * counts, expected.values * counts), case  # under a NaN scale codes do not matter
    packed = CPU.prepare(x, gemm, "b", STREAM, "wgrad", amax)
    folded, outside = CPU.unpacked(packed, torch.float32)
    assert same(folded, expected.blockscaled()) and same(outside, expected.tensor_scale), case
    restored, outside = CPU.unpacked(CPU.stored(packed, gemm, "b"), torch.float32)
    assert same(restored, folded) and same(outside, expected.tensor_scale), case


@pytest.mark.parametrize("name", sorted(SERVED))
def test_codes_and_scales(name: str) -> None:
    """All formats, nearest: kinds of data, memory orders, dtypes, with and without rotation."""
    format = SERVED[name]
    for i, kind in enumerate(KINDS):
        for rotation in (None, Rotation(16)):
            dtype, transposed = ((torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True))[i % 3]
            x = draw(kind, 128, 256, dtype)
            check(x.T.contiguous().T if transposed else x, Operand(format), rotation, (kind, rotation, dtype))


@pytest.mark.parametrize(
    "name", ["int8_row", "int8_1x32_pow2", "ternary_mean", "nvfp4_sr", "mxfp4_sr", "ufp4", "nvfp4_double"]
)
def test_stochastic_rounding(name: str) -> None:
    """The same random bits and thresholds as the definition, for elements that have a sign and a zero."""
    for kind in KINDS:
        check(draw(kind, 64, 256, torch.bfloat16).T.contiguous().T, Operand(SERVED[name], "stochastic"), None, kind)


@pytest.mark.parametrize("name", ["nvfp4_eden", "nvfp4_eden_46", "nvfp4_double", "nvfp4_row", "nvfp4_ue5m3", "nvfp4"])
@pytest.mark.parametrize("group", [16, 64, 128])
def test_ms_eden(name: str, group: int) -> None:
    """Corrections by groups and stochastic scales, on rotations of one and two rounds."""
    for kind in KINDS:
        for rotation in (Rotation(128, "step"), Rotation(32, "step", 2)):
            for transposed in (False, True):
                x = draw(kind, 48, 256, torch.bfloat16)
                operand = Operand(SERVED[name], "ms_eden", group)
                check(x.T.contiguous().T if transposed else x, operand, rotation, (kind, rotation, transposed))


@pytest.mark.parametrize("size", [2, 4, 8, 64, 128, 256, 0])
def test_rotations(size: int) -> None:
    """Every size, the whole axis (a power of two or not), one and two rounds, before formats of each kind."""
    for name in ("nvfp4", "mxfp8", "int8_row", "quest_int4", "fp8_tensor"):
        for signs, rounds in (("none", 1), ("fixed", 1), ("step", 2)):
            for k in (256, 768):
                x = draw("normal", 32, k, torch.bfloat16)
                check(x.T.contiguous().T, Operand(SERVED[name]), Rotation(size, signs, rounds), (name, signs, k))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor", "nvfp4_46", "fp8_tensor_pow2", "int8_tensor", "nvfp4_ue5m3"])
def test_a_given_maximum(name: str) -> None:
    """Delayed maxima: smaller ones saturate, zero and NaN follow the definition, bad elements stay loud."""
    for amax in (0.5, 4.0, 100.0, 0.0, float("nan")):
        for bad in (None, float("inf"), float("nan")):
            x = draw("normal", 64, 128, torch.bfloat16)
            if bad is not None:
                x[7, 70] = bad
            check(x, Operand(SERVED[name]), None, (amax, bad), torch.tensor(amax))


@pytest.mark.parametrize("name", sorted(name for name in ELEMENTS if name not in ("ue5m3", "e8m0", "if4_int")))
def test_elements_are_rounded_everywhere(name: str) -> None:
    """Each value of an element, the middle between neighbours, and the fp32 numbers next to all of them."""
    element = ELEMENTS[name]
    grid = torch.tensor(element.values[:: max(1, len(element.values) // 4000)])
    points = torch.cat([grid, (grid[:-1] + grid[1:]) / 2, torch.tensor([0.0, 1e-40, 1e-20, element.max * 1.5])])
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(3.0e38))])
    x = torch.zeros(16 * (len(points) // 256 + 1) * 16)
    x[: len(points)] = points
    x = torch.cat([x, -x]).reshape(-1, 16).T.contiguous()
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 16))
    check(x, Operand(Format("plain", name, (1, 16), "none")), None, element_args(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotate_equals_the_definition(dtype: torch.dtype) -> None:
    """The fast rotation of a matrix: sizes, whole axes, signs, inverse, memory orders; odd shapes fall back."""
    for rows, k in ((16, 256), (48, 2048), (3, 64), (32, 96), (16, 48)):
        x = draw("mixed", rows, k, dtype)
        for n in (2, 8, 16, 32, 128, 256, k):
            if k % n or (n & (n - 1) and n != k):
                continue
            for signs in (None, STREAM.signs("s", n)):
                for inverse in (False, True):
                    for source in (x, x.T.contiguous().T):
                        got = rotate(source, n, signs, inverse)
                        expected = rotate_definition(source, n, signs, inverse)
                        assert same(got, expected) and got.dtype == dtype, (rows, k, n, inverse)


def products() -> list[tuple[str | None, str | None]]:
    integers = [("int8_row", "int8_tensor"), ("int8_row", "ternary_mean"), ("int8_1x32_pow2", "int4_1x32_pow2")]
    integers += [("int8_128", "int8_128"), ("int8_64", "int8_64"), ("int8_e4m3", "nvfp4"), ("mxfp6_e2m3", "mxfp4")]
    integers += [
        ("quest_int4", "quest_int4"),
        ("ufp4", "nvfp4_2d"),
        ("nvfp4_46", "nvfp4_46_2d"),
        ("nvfp4_row", "nvfp4"),
    ]
    integers += [("nvfp4_double", "nvfp4_double"), ("mxfp4_sr", "mxfp4"), ("nvfp4_ue5m3", "nvfp4_ue5m3_2d")]
    others = [(None, "nvfp4"), ("mxfp8", None), ("e8m3", "e8m3"), ("mxfp8", "fp8_1x128"), ("nvfp4", "mxfp8")]
    others += [
        ("fp8_1x128_pow2", "fp8_128x128_pow2"),
        ("mxfp6_e3m2", "mxfp8_e5m2"),
        ("fp8_row", "fp8_128x128"),
        ("mx_2d", "int8_row"),
    ]
    return [*integers, *others]


@pytest.mark.parametrize("pair", products(), ids=str)
def test_products(pair: tuple[str | None, str | None]) -> None:
    """Products of all kinds of operands, also unquantised ones, against fp64 sums of the definition's operands.

    Every product of two element values is exact, passes through at most k additions, and is scaled in four operations;
    each rounds by at most 2**-24 of sums that |a||b| bounds.
    """
    gemm = Gemm(*(Operand(SERVED[name] if name else None) for name in pair))
    for kind in ("normal", "outlier", "zero blocks"):
        a, b = draw(kind, 144, 384, torch.bfloat16, 1), draw(kind, 128, 384, torch.bfloat16, 2).T.contiguous().T
        a = torch.nn.functional.pad(a, (0, 0, 0, 16)) if pair[0] == "mx_2d" else a
        assert CPU.refuses(gemm, "dgrad", *a.shape[:1], *b.shape, a.dtype, a.device) is None
        qa, qb = oracle.prepare_both(a, b, gemm, STREAM, "dgrad")
        da, db = (q.blockscaled().double() * q.tensor_scale.double() for q in (qa, qb))
        got = CPU.gemm(a, b, gemm, STREAM, "dgrad", torch.float32)
        allowed = (a.shape[1] + 8) * 2.0**-24 * (da.abs() @ db.abs().T) + 2.0**-149
        assert ((got.double() - da @ db.T).abs() <= allowed).all(), kind
        assert torch.equal(CPU.gemm(a, b, gemm, STREAM, "dgrad", torch.bfloat16), got.bfloat16())
        packed = [CPU.prepare(x, gemm, side, STREAM, "dgrad") for x, side in ((a, "a"), (b, "b"))]
        stored = [CPU.stored(one, gemm, side) for one, side in zip(packed, "ab", strict=True)]
        assert torch.equal(CPU.multiply(stored[0], stored[1], gemm, torch.float32), got), "stored"
        for one, before, name in zip(stored, packed, pair, strict=True):
            bits = SERVED[name].bits if name else 16
            bits = 16 if bits > 8 else 4 if bits <= 4 and before.args.int8 else 8
            blocks = 384 // ((SERVED[name].block[1] if name else 0) or 384)
            assert one.nbytes <= before.nbytes and one.nbytes * 8 <= before.rows * (384 * bits + blocks * 32 + 64)
            for value, original in zip(
                CPU.unpacked(one, torch.bfloat16), CPU.unpacked(before, torch.bfloat16), strict=True
            ):
                assert torch.equal(value, original)


EXACT = (
    ("int8_1x32_pow2", "int4_1x32_pow2"), ("int8_128", "int8_128"), ("int8_64", "int8_64"), ("ufp4", "nvfp4_2d"),
    ("int8_e4m3", "int8_e4m3"), ("nvfp4_46", "nvfp4_46_2d"), ("nvfp4_double", "nvfp4"), ("nvfp4_row", "nvfp4_2d"),
    ("mxfp4_sr", "mxfp6_e2m3"), ("nvfp4_ue5m3", "nvfp4_ue5m3_2d"),
)  # fmt: skip


@pytest.mark.parametrize("pair", EXACT, ids=str)
def test_products_of_integers_in_blocks_are_bit_equal(pair: tuple[str, str]) -> None:
    """Where a block's sum of products is exact in fp32, the product is the definition's, bit for bit."""
    gemm = Gemm(*(Operand(SERVED[name]) for name in pair))
    for kind in ("normal", "outlier", "zero blocks", "mixed"):
        a, b = draw(kind, 48, 256, torch.bfloat16, 1), draw(kind, 32, 256, torch.bfloat16, 2)
        got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
        assert same(got, oracle.gemm(a, b, gemm, STREAM, "fprop", torch.float32)), kind


def test_sums_of_more_than_24_bits_are_rounded_as_written() -> None:
    """INT8 under E4M3 scales: a block's product needs 26 bits, so it is rounded before it is added, as defined."""
    draws = [torch.rand(256, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    a, b = ((100 + 27 * x) * (1 + y[:, ::16].repeat_interleave(16, 1)) for x, y in (draws[:2], draws[2:]))
    gemm = Gemm(Operand(SERVED["int8_e4m3"]), Operand(SERVED["int8_e4m3"]))
    got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    assert torch.equal(got, oracle.gemm(a, b, gemm, STREAM, "fprop", torch.float32))


@pytest.mark.parametrize("exponent", [-73, -69, -67, -50, 60, 62])
@pytest.mark.parametrize("name", ["mxfp4", "int8_1x32_pow2"])
def test_products_at_the_ends_of_fp32(name: str, exponent: int) -> None:
    """Scales whose products leave fp32's normal range: each block is rounded, or overflows, as in the definition."""
    a, b = (draw("normal", 64, 128, torch.float32, i) * 2.0**exponent for i in (1, 2))
    gemm = Gemm(Operand(SERVED[name]), Operand(SERVED[name]))
    got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    expected = oracle.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    assert same(got, expected) and ((expected != 0).any() or (name, exponent) == ("int8_1x32_pow2", -73))


def test_a_whole_axis_of_int8_is_exact() -> None:
    """The largest int8 codes over a long axis: the int32 sum is the exact one, rounded once."""
    k = 65536
    a, b = torch.full((16, k), 127.0), torch.full((16, k), 127.0)
    b[0, ::2] = -127.0
    gemm = Gemm(Operand(FORMATS["int8_tensor"]), Operand(FORMATS["int8_row"]))
    got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
    assert (got[:, 1:] == 127.0 * 127.0 * k).all() and (got[:, 0] == 0).all()


def test_a_prepared_operand_serves_many_partners_and_threads() -> None:
    """One prepared x multiplies several w, also one prepared for another kind of product; threads change no bit."""
    x, w = draw("normal", 64, 256, torch.bfloat16, 1), draw("normal", 128, 256, torch.bfloat16, 2)
    fp4 = Gemm(Operand(FORMATS["nvfp4"]), Operand(FORMATS["nvfp4_2d"]))
    mixed = dataclasses.replace(fp4, b=Operand(FORMATS["fp8_128x128"]))
    packed = CPU.prepare(x, fp4, "a", STREAM, "fprop")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for gemm in (fp4, mixed, fp4):
                expected = CPU.gemm(x, w, gemm, STREAM, "fprop", torch.float32)
                got = CPU.multiply(packed, CPU.prepare(w, gemm, "b", STREAM, "fprop"), gemm, torch.float32)
                assert torch.equal(got, expected)
                results.append(got)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(results[:3], results[3:], strict=True))


@pytest.mark.parametrize(
    "name", ["nvfp4_46", "nvfp4_row", "int8_row", "int8_128", "nvfp4_double", "e8m3", "quest_int4", "fp8_row"]
)
def test_bad_elements_are_loud(name: str) -> None:
    """NaN and infinity make the same outputs NaN as in the definition."""
    for bad in (float("nan"), float("inf")):
        a, b = draw("normal", 32, 256, torch.bfloat16, 1), draw("normal", 32, 256, torch.bfloat16, 2)
        a[3, 100] = bad
        gemm = Gemm(Operand(SERVED[name]), Operand(SERVED[name]))
        got = CPU.gemm(a, b, gemm, STREAM, "fprop", torch.float32)
        assert torch.equal(got.isnan(), oracle.gemm(a, b, gemm, STREAM, "fprop", torch.float32).isnan())
        assert got[3].isnan().all()
