"""kernels/cpu/qdq_backend: operands are the oracle's bit for bit, products within the bound of an fp32 sum."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lowprec.kernels.cpu import qdq_backend
from lowprec.kernels.cpu.qdq_backend import PortableBackend
from lowprec.linear import Gemm, Operand, Rotation, load_recipe
from lowprec.linear.backends import Oracle
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.numerics import ELEMENTS, FORMATS, Format, Stream

STREAM = Stream(seed=1, step=2, micro=3, layer="layer")
ROLES = ("fprop", "dgrad", "wgrad")
RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
CPU = torch.device("cpu")


def operands(role: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(96, 128) and (64, 128) in the memory order in which a layer has them."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 128, generator=generator).to(dtype) for rows in (128, 256))
    a = a.T.contiguous().T if role == "wgrad" else a
    return a, b if role == "fprop" else b.T.contiguous().T


def check(gemm: Gemm, role: str, dtype: torch.dtype, march: str = "native") -> None:
    """Operands equal the oracle's; the product is within the bound in fp32, and one rounding from it in bf16."""
    own, oracle = PortableBackend(march), Oracle()
    a, b = operands(role, dtype)
    assert own.refuses(gemm, role, a.shape[0], b.shape[0], a.shape[1], dtype, CPU) is None
    pa, pb = (own.prepare(x, gemm, side, STREAM, role) for x, side in ((a, "a"), (b, "b")))
    qa, qb = oracle.prepare(a, gemm, "a", STREAM, role), oracle.prepare(b, gemm, "b", STREAM, role)
    for p, q in ((pa, qa), (pb, qb)):
        for to in (torch.float32, torch.bfloat16):
            for ours, theirs in zip(own.unpacked(p, to), oracle.unpacked(q, to), strict=True):
                assert torch.equal(ours, theirs)
        assert p.nbytes > 0
    exact = oracle.multiply(qa, qb, gemm, torch.float32)
    size = (
        qa.blockscaled().abs()
        @ qb.blockscaled().abs().T
        * qa.tensor_scale.reshape(-1, 1)
        * qb.tensor_scale.reshape(1, -1)
    )
    bound = 2 * (a.shape[1] + 4) * 2**-24 * size
    assert ((own.multiply(pa, pb, gemm, torch.float32) - exact).abs() <= bound).all()
    assert ((own.multiply(pa, pb, gemm, torch.bfloat16).float() - exact).abs() <= bound + exact.abs() * 2**-8).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe(recipe: str) -> None:
    """All quantised products of a recipe, without their splits, in both dtypes."""
    for role in ROLES:
        gemm = getattr(load_recipe(recipe), role)
        if gemm.a.format is None and gemm.b.format is None:
            continue
        plain = (dataclasses.replace(operand, split=None) for operand in (gemm.a, gemm.b))
        gemm = dataclasses.replace(gemm, **dict(zip("ab", plain, strict=True)))
        for dtype in (torch.bfloat16, torch.float32):
            check(gemm, role, dtype)


@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_without_avx512(march: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of a lesser CPU, where nothing multiplies bf16, serves the whole NVFP4 recipe."""
    if qdq_backend.qdq.load(march)[0] is None:
        pytest.skip(qdq_backend.qdq.load(march)[1])
    monkeypatch.setattr(qdq_backend, "_bf16_products", lambda: False)
    qdq_backend._dtype.cache_clear()
    try:
        for role in ROLES:
            check(getattr(load_recipe("nvfp4"), role), role, torch.bfloat16, march)
    finally:
        qdq_backend._dtype.cache_clear()


@pytest.mark.parametrize("size", [2, 32, 128, 0])
@pytest.mark.parametrize("rounds", [1, 2])
def test_rotations_of_any_size(size: int, rounds: int) -> None:
    """Small ones in the kernel, the whole axis and two rounds before it; also where one side is unquantised."""
    rotation = Rotation(size, "step", rounds)
    check(Gemm(Operand(FORMATS["nvfp4"], "stochastic"), Operand(FORMATS["mxfp8"]), rotation), "wgrad", torch.bfloat16)
    check(Gemm(Operand(FORMATS["int8_row"]), Operand(), rotation), "dgrad", torch.float32)


def test_what_bf16_holds_exactly() -> None:
    """Significant bits are those of the values; an operand is bf16 only where element times scale fits into eight."""
    bits = {
        name: qdq_backend.significant_bits(ELEMENTS[name]) for name in ("e2m1", "e4m3", "int8", "midrise8", "ternary")
    }
    assert bits == {"e2m1": 2, "e4m3": 4, "int8": 7, "midrise8": 8, "ternary": 1}
    for format in FORMATS.values():
        x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
        p = PortableBackend().prepare(x, Gemm(Operand(format), Operand(format)), "a", STREAM, "fprop")
        assert torch.equal(p.values, format_values(x, format, p.row_scale is not None).to(p.values.dtype)), format.name
        assert torch.equal(p.values.float(), format_values(x, format, p.row_scale is not None)), format.name


def format_values(x: Tensor, format: Format, without_scales: bool) -> Tensor:
    """values * block scales in fp32, or the values alone."""
    p = Oracle().prepare(x, Gemm(Operand(format), Operand(format)), "a", STREAM, "fprop")
    return p.values if without_scales else p.blockscaled()


def test_refuses_in_words() -> None:
    """Other devices and dtypes, and empty products."""
    gemm, own = Gemm(Operand(FORMATS["nvfp4"]), Operand(FORMATS["nvfp4"])), PortableBackend()
    assert "not on meta" in str(own.refuses(gemm, "fprop", 16, 16, 16, torch.bfloat16, torch.device("meta")))
    assert "torch.float16" in str(own.refuses(gemm, "fprop", 16, 16, 16, torch.float16, CPU))
    assert "empty" in str(own.refuses(gemm, "fprop", 0, 16, 16, torch.bfloat16, CPU))
    assert own.refuses(gemm, "fprop", None, 16, 16, torch.bfloat16, CPU) is None


def test_broken_tensors_stay_loud() -> None:
    """A NaN or an infinity in one row of blocks reaches the output, in bf16 and fp32."""
    gemm = Gemm(Operand(FORMATS["mxfp8"]), Operand(FORMATS["mxfp8"]))
    for bad in (torch.nan, torch.inf):
        a, b = operands("fprop", torch.bfloat16)
        a[3, 5] = bad
        p = [PortableBackend().prepare(x, gemm, side, STREAM, "fprop") for x, side in ((a, "a"), (b, "b"))]
        for dtype in (torch.bfloat16, torch.float32):
            out = PortableBackend().multiply(*p, gemm, dtype)
            assert out[3].isnan().all() and out[4:].isfinite().all()
