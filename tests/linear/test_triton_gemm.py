"""The Triton products: interpreted they are the definition's, compiled they use the tensor cores that were meant."""

import pytest
import torch
from torch import Tensor

from lowprec.kernels.coded import Coded, form, swizzle, unswizzle
from lowprec.kernels.testing.chips import PRODUCT
from lowprec.kernels.testing.compile import Compiled, compile_for, signature_of
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton.gemm import INSTRUCTIONS, TILES, gemm_launch, multiply, variants
from lowprec.kernels.triton_backend import TritonBackend
from lowprec.linear import oracle
from lowprec.linear.backends import Oracle
from lowprec.linear.recipe import Gemm, Operand, Rotation
from lowprec.numerics import FORMATS, QTensor, Stream

STREAM = Stream(3, 1, 2, "layer")


def random(rows: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, rows)[:, None]
    if rows > 2:
        x[1] = 0
    return x.to(dtype)


def bound(a: oracle.Prepared, b: oracle.Prepared) -> Tensor:
    """``2 k 2^-24 sum|a||b|``: two orders of one fp32 sum."""
    a_MK, b_NK = (one.blockscaled().abs() * one.tensor_scale.reshape(-1, 1) for one in (a, b))
    return 2 * a_MK.shape[1] * 2.0**-24 * (a_MK @ b_NK.T)


PAIRS = [
    ("nvfp4", "nvfp4_2d", (150, 40, 320)),  # ragged m and n, more than one step and a part of one
    ("nvfp4_row", "nvfp4_46", (1, 17, 48)),
    ("mxfp4", "mxfp4_sr", (20, 136, 96)),
    ("mxfp8", "mxfp8_e5m2", (20, 40, 160)),
    ("fp8_tensor_e5m2", "fp8_tensor", (20, 40, 48)),
    ("fp8_row", "fp8_tensor", (20, 40, 144)),
    ("fp8_1x128", "fp8_128x128", (20, 140, 300)),
    ("fp8_128x128_pow2", "fp8_1x128_pow2", (140, 20, 256)),
]


@pytest.mark.parametrize(("name_a", "name_b", "sizes"), PAIRS)
def test_product_equals_the_definition(name_a: str, name_b: str, sizes: tuple[int, int, int]) -> None:
    """Operands bit for bit, from matrices and from codes; the product within the bound of its sums, rounded once."""
    m, n, k = sizes
    gemm, triton, definition = Gemm(Operand(FORMATS[name_a]), Operand(FORMATS[name_b])), TritonBackend(), Oracle()
    x, w = random(m, k, 1, torch.bfloat16), random(n, k, 2, torch.bfloat16)
    a, b = definition.prepare(x, gemm, "a", STREAM, "fprop"), definition.prepare(w, gemm, "b", STREAM, "fprop")
    with interpreted():
        assert triton.refuses(gemm, "fprop", m, n, k, x.dtype, x.device) is None
        packed = triton.prepare(x, gemm, "a", STREAM, "fprop"), triton.prepare(w, gemm, "b", STREAM, "fprop")
        out = triton.multiply(*packed, gemm, torch.float32)
        short = triton.multiply(*packed, gemm, torch.bfloat16)
    for one, wanted, loaded in zip(packed, (a, b), (x, w)):
        values, scale = triton.unpacked(one, torch.float32)
        assert torch.equal(values, wanted.blockscaled()) and torch.equal(scale, wanted.tensor_scale)
        again = Coded.of(one.format.quantize(loaded), one.swizzled)
        assert (
            torch.equal(again.codes, one.codes[:, : again.codes.shape[1]])
            and not one.codes[:, again.codes.shape[1] :].any()
        )
        assert torch.equal(again.scales, one.scales)
    assert out.abs().sum() > 0 and bool(((out - oracle.multiply(a, b)).abs() <= bound(a, b)).all())
    assert torch.equal(short, out.bfloat16())


@pytest.mark.parametrize("arch", PRODUCT)
def test_every_chip_has_the_same_product(arch: str) -> None:
    """The tiles and the instructions of each chip, interpreted: unit scales on sm_120, wide tiles on sm_100."""
    for name, partner in (("nvfp4", "nvfp4_2d"), ("fp8_row", "fp8_tensor_e5m2"), ("fp8_1x128", "fp8_128x128")):
        qa, qb = FORMATS[name].quantize(random(140, 300, 8)), FORMATS[partner].quantize(random(30, 300, 9))
        swizzled = form(qa.format, qb.format) == "scaled"
        launch, out = gemm_launch(Coded.of(qa, swizzled), Coded.of(qb, swizzled), torch.float32, arch)
        with interpreted():
            launch()
        a, b = oracle.prepared(qa), oracle.prepared(qb)
        assert bool(((out - oracle.multiply(a, b)).abs() <= bound(a, b)).all())


@pytest.mark.parametrize(
    ("name", "rounding", "rotation"),
    [
        ("nvfp4", "stochastic", Rotation(16, "fixed")),
        ("nvfp4_46", "nearest", Rotation(32, "step", 2)),  # two rounds: rotated before the kernel
        ("nvfp4_eden", "ms_eden", Rotation(128, "step")),
    ],
)
def test_a_transposed_rotated_operand(name: str, rounding: str, rotation: Rotation) -> None:
    """As wgrad has it: transposed views, the stream's noise, a rotation of the contracted axis."""
    spec = Gemm(Operand(FORMATS[name], rounding), Operand(FORMATS["nvfp4"]), rotation)
    dy, x = random(128, 48, 3, torch.bfloat16), random(128, 32, 4, torch.bfloat16)
    a, b = oracle.prepare_both(dy.T, x.T, spec, STREAM, "wgrad")
    triton = TritonBackend()
    with interpreted():
        packed = triton.prepare(dy.T, spec, "a", STREAM, "wgrad"), triton.prepare(x.T, spec, "b", STREAM, "wgrad")
        out = triton.multiply(*packed, spec, torch.float32)
    for one, wanted in zip(packed, (a, b)):
        assert torch.equal(triton.unpacked(one, torch.float32)[0], wanted.blockscaled())
    assert bool(((out - oracle.multiply(a, b)).abs() <= bound(a, b)).all())


@pytest.mark.parametrize(("name", "k"), [("nvfp4", 80), ("nvfp4_2d", 80), ("mxfp8", 96)])
def test_plain_and_swizzled_scales_give_the_same(name: str, k: int) -> None:
    """The two layouts are two ways to store one matrix; `swizzle` is the kernels' layout and has an inverse."""
    q = FORMATS[name].quantize(random(140, k, 5))
    rows, blocks = q.row_scales().shape
    stored = torch.arange(rows * blocks, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(rows, blocks)
    assert torch.equal(unswizzle(swizzle(stored), rows, blocks), stored)
    with interpreted():
        outs = [
            multiply(Coded.of(q, mine), Coded.of(q, other), torch.float32) for mine, other in ((0, 0), (1, 0), (1, 1))
        ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert torch.equal(Coded.of(q, True).qtensor().codes, q.codes)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8_row"])
def test_nan_stays_where_the_definition_has_it(name: str) -> None:
    """A NaN poisons what its scale spans, in the product too."""
    x = random(16, 64, 6)
    x[3, 5] = torch.nan
    q, w = FORMATS[name].quantize(x), FORMATS[name].quantize(random(16, 64, 7))
    with interpreted():
        out = multiply(Coded.of(q, name != "fp8_row"), Coded.of(w, name != "fp8_row"), torch.float32)
    wanted = oracle.multiply(oracle.prepared(q), oracle.prepared(w))
    assert torch.equal(out.isnan(), wanted.isnan()) and bool(out.isnan().any())


# ---- compiled


def compiled(name: str, arch: str, k: int = 512, out: torch.dtype = torch.bfloat16, partner: str = "") -> Compiled:
    """The product of a format with itself (or a partner), 256 x 256, as a launch on the chip would compile it."""
    f, g = FORMATS[name], FORMATS[partner or name]
    a, b = (Coded.of(x.quantize(torch.zeros(256, k)), form(f, f) == "scaled") for x in (f, g))
    launch, _ = gemm_launch(a, b, out, arch)
    sizes = ("m", "n", "bytes_k", "pitch_a", "pitch_b", "scales_k")
    whole = [size for size in sizes if launch.args[size] % 16 == 0]
    return compile_for(
        launch.kernel, signature_of(launch.args), launch.constants, arch, align=whole, num_warps=launch.warps
    )


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "fp8_tensor", "fp8_1x128"])
def test_compiled_for(name: str, arch: str) -> None:
    """The tensor cores that were meant, no spills, within shared and tensor memory, 16-byte loads of codes."""
    c = compiled(name, arch)
    assert c.count_ptx(INSTRUCTIONS[name.split("_")[0], arch]) and not c.over_limits() and c.stack_bytes == 0
    assert c.global_accesses()["load"][16] and c.registers <= c.chip.registers_per_thread
    if arch == "sm_100":
        assert 0 < c.tensor_memory_columns <= 512
    if arch == "sm_90" and form(FORMATS[name], FORMATS[name]) != "scaled":  # fp8 sums leave the tensor core every 128
        assert c.count(r"FADD|FFMA|FADD2|FFMA2") >= 64


@pytest.mark.parametrize("arch", PRODUCT)
def test_compiled_for_ragged_sizes_and_fp32(arch: str) -> None:
    """The masked loop, unequal formats and the wide output spill nowhere either."""
    for name, partner in (("nvfp4", "nvfp4_2d"), ("fp8_1x128", "fp8_128x128")):
        c = compiled(name, arch, k=416, out=torch.float32, partner=partner)
        assert not c.over_limits() and c.stack_bytes == 0


def test_every_form_has_a_tile_for_every_chip() -> None:
    assert list(TILES) == list(PRODUCT) and all(
        set(t) == {"scaled4", "scaled8", "fp8", "blocks"} for t in TILES.values()
    )
    assert all(tiles["blocks"].bk == 128 for tiles in TILES.values())  # one block of the format a step
    assert QTensor.unpack(torch.tensor([[0x21]], dtype=torch.uint8), FORMATS["nvfp4"]).tolist() == [[1, 2]]


def test_variants_for_the_report() -> None:
    """Each form is there, with the bytes of two operands and a bf16 output as the least."""
    made = variants()
    assert len(made) == 5 and all(v.tensor_cores and not v.executes and set(v.wanted) == set(PRODUCT) for v in made)
    assert made[0].min_bytes == 2 + (256 + 256) * 1024 * (1 / 2 + 1 / 16) / 256**2
    started: list[object] = []
    made[0].run("sm_100", started.append)
    assert len(started) == 1
