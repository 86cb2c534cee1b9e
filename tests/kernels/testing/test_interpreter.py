"""The repaired interpreter: casts exact over many bit patterns, and nothing of it left behind."""

from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing import asm, floats
from lowprec.kernels.testing.compile import compile_for
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.testing.ptx import run_ptx
from tests.kernels.testing import device_functions
from tests.kernels.testing.device_functions import either

N = 1 << 16
TL = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.int32: tl.int32,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr, TO: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(TO))


def patterns(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (N,), generator=g, dtype=torch.int64).to(torch.int32)
    size = torch.empty(0, dtype=dtype).element_size()
    if size == 4 and dtype.is_floating_point:  # half of them where the small formats live
        bits[: N // 2] = (bits[: N // 2] & -0x7F800001) | ((bits[: N // 2] >> 23 & 31) + 111) << 23
    return (bits if size == 4 else bits.to({2: torch.int16, 1: torch.int8}[size])).view(dtype)


def interpreted_cast(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    y = torch.zeros(N, dtype=to)
    with interpreted(cast):
        cast[(1,)](x, y, N=N, TO=TL[to])
    return y


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, *FP8])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_narrowing_casts(source: torch.dtype, to: torch.dtype) -> None:
    """Bit patterns of every kind round as torch rounds; fp8 saturates, as the GPU's cvt.satfinite."""
    if source == to:
        return
    x = patterns(source)
    got = interpreted_cast(x, to)
    wide = x.float()
    limit = torch.finfo(to).max
    want = (wide.clamp(-limit, limit) if to in FP8 else wide).to(to)
    view = torch.int8 if to in FP8 else torch.int16
    real = ~wide.isnan()
    assert torch.equal(got.view(view)[real], want.view(view)[real])
    assert got.float()[~real].isnan().all()


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [*FP8, torch.bfloat16, torch.float16])
def test_widening_casts(source: torch.dtype, to: torch.dtype) -> None:
    x = patterns(source)
    if source == to or {source, to} == {torch.bfloat16, torch.float16}:
        return
    got, want = interpreted_cast(x, to).float(), x.to(to).float()
    if (source, to) == (torch.float8_e5m2, torch.bfloat16):  # the exponent is rebiased, of infinity and NaN too
        codes = x.view(torch.uint8).int()
        beyond = (4 + (codes & 3)) * 2.0**14 * torch.where(codes > 127, -1, 1)
        want = torch.where(codes & 0x7F >= 0x7C, beyond, want)
    assert torch.equal(got.nan_to_num(nan=-7e30), want.nan_to_num(nan=-7e30))
    assert torch.equal(got.isnan(), want.isnan())


def test_integers() -> None:
    """int -> bf16 takes values and rounds once; float -> int saturates and NaN becomes 0, as cvt.rzi does."""
    x = patterns(torch.int32)
    assert np.array_equal(
        interpreted_cast(x, torch.bfloat16).view(torch.int16).numpy().view(np.uint16),
        floats.encode(x.numpy().astype(np.float64), "bf16"),
    )
    f = patterns(torch.float32)
    want = f.double().trunc().clamp(-(2.0**31), 2.0**31 - 1).nan_to_num(nan=0.0).to(torch.int32)
    assert torch.equal(interpreted_cast(f, torch.int32), want)
    small = patterns(torch.bfloat16)
    want = small.double().trunc().clamp(0, 2**16 - 1).nan_to_num(nan=0.0).to(torch.int32).to(torch.uint8)
    assert torch.equal(interpreted_cast(small, torch.uint8), want)


@triton.jit
def bf16_arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, -x * y)
    tl.store(out_ptr + 2 * N + i, tl.maximum(x, tl.abs(y)))
    tl.store(out_ptr + 3 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 4 * N + i, tl.fma(x, y, x))
    tl.store(out_ptr + 5 * N, tl.max(x, 0).to(tl.bfloat16))
    tl.store(out_ptr + 5 * N + 1, tl.sum(x, 0).to(tl.bfloat16))


@triton.jit
def cast_e5m2(x_ptr, out_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


def test_e5m2_to_bf16_is_as_compiled() -> None:
    x = torch.arange(256).to(torch.uint8).view(torch.float8_e5m2)
    a, b = torch.zeros(256, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.bfloat16)
    with interpreted(cast_e5m2):
        cast_e5m2[(1,)](x, a)
    run_ptx(compile_for(cast_e5m2, {"x_ptr": "*fp8e5", "out_ptr": "*bf16"}, {}, "sm_90", num_warps=1), (1, 1),
            {"x_ptr": x, "out_ptr": b})  # fmt: skip
    assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@triton.jit
def compared_numbers(x_ptr, number_ptr, out_ptr):
    x, number = tl.load(x_ptr + tl.arange(0, 16)), tl.load(number_ptr)
    tl.store(out_ptr + tl.arange(0, 16), ((x != x) | (number != number) | (number > x)).to(tl.int32))


def test_comparisons_of_one_number_are_booleans() -> None:
    x, out = torch.arange(16.0), torch.zeros(16, dtype=torch.int32)
    x[3] = torch.nan
    with interpreted(compared_numbers):
        compared_numbers[(1,)](x, torch.tensor([2.5]), out)
    assert out.tolist() == [1, 1, 1, 1] + [0] * 12


def test_bf16_arithmetic_is_by_value() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(512, generator=g).bfloat16() for _ in range(2))
    out = torch.zeros(5 * 512 + 2, dtype=torch.bfloat16)
    with interpreted(bf16_arithmetic):
        bf16_arithmetic[(1,)](x, y, out, N=512)
    fma = (x.double() * y.double() + x.double()).float().bfloat16()
    want = [x + y, -x * y, torch.maximum(x, y.abs()), torch.where(x < y, x, y), fma]
    for i, w in enumerate(want):
        assert torch.equal(out[512 * i : 512 * i + 512], w), i
    assert out[-2] == x.max()
    exact, size = float(x.double().sum()), float(x.double().abs().sum())
    assert abs(float(out[-1]) - exact) <= abs(exact) * 2**-8 + size * 512 * 2**-24  # one rounding to bf16, 511 in fp32


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M: tl.constexpr):
    m = tl.arange(0, M)
    at = m[:, None] * M + m[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(32, 32, generator=g).to(dtype) for _ in range(2))
    c = torch.zeros(32, 32)
    with interpreted(product):
        product[(1,)](a, b, c, M=32)
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((c - want).abs() <= size * 32 * 2**-24).all()


@triton.jit
def scaled_product(a_ptr, sa_ptr, b_ptr, sb_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, G: tl.constexpr):
    m, k, s = tl.arange(0, M), tl.arange(0, K // 2), tl.arange(0, K // G)
    a = tl.load(a_ptr + m[:, None] * (K // 2) + k[None, :])
    b = tl.load(b_ptr + m[None, :] * (K // 2) + k[:, None])
    sa = tl.load(sa_ptr + m[:, None] * (K // G) + s[None, :])
    sb = tl.load(sb_ptr + m[:, None] * (K // G) + s[None, :])
    c = tl.dot_scaled(a, sa, "e2m1", b, sb, "e2m1")
    tl.store(c_ptr + m[:, None] * M + m[None, :], c)


@pytest.mark.parametrize("group,scale", [(16, torch.float8_e4m3fn), (32, torch.uint8)])
def test_dot_scaled(group: int, scale: torch.dtype) -> None:
    """NVFP4 (E4M3 scales) and MXFP4 (E8M0 scales) products against the dequantised product in float64."""
    g = torch.Generator().manual_seed(2)
    m, k = 32, 128
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    operands, wide = [], []
    for _ in range(2):
        codes = torch.randint(0, 256, (m, k // 2), generator=g, dtype=torch.uint8)
        both = torch.stack([values[(codes & 15).long()], values[(codes >> 4).long()]], -1).view(m, k)
        if scale == torch.uint8:
            scales = torch.randint(120, 134, (m, k // group), generator=g, dtype=torch.uint8)
            factor = torch.exp2(scales.double() - 127)
        else:
            scales = (torch.rand(m, k // group, generator=g) * 400).to(scale)
            factor = scales.double()
        operands += [codes, scales]
        wide.append((both.double().view(m, k // group, group) * factor[..., None]).view(m, k))
    c = torch.zeros(m, m)
    with interpreted(scaled_product):
        scaled_product[(1,)](*operands, c, M=m, K=k, G=group)
    want = wide[0] @ wide[1].T
    size = wide[0].abs() @ wide[1].abs().T
    assert ((c - want).abs() <= size * k * 2**-24).all()  # k additions of fp32


@triton.jit
def other_modules(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr, device_functions.largest(x))
    tl.store(y_ptr + 1, tl.reduce(x, 0, either))
    tl.store(y_ptr + 2, x.to(tl.float32).sum(0))


def test_device_functions_of_other_modules_and_members() -> None:
    x, y = torch.arange(-40.0, 24.0), torch.zeros(3)
    with interpreted(other_modules):
        other_modules[(1,)](x, y, N=64)
    assert y.tolist() == [80.0, 23.0, float(x.sum())]


SWAP = tl.constexpr("prmt.b32 $0, $1, $2, 0x1032;")  # the halves of $1, exchanged
PAIR = tl.constexpr("""{
.reg .b16 half;
cvt.rn.satfinite.e4m3x2.f32 half, $2, $1;
cvt.u32.u16 $0, half;
}""")


@triton.jit
def assembly(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    swapped = tl.inline_asm_elementwise(SWAP, "=r,r,r", [x, x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(y_ptr + i, swapped)
    f = i.to(tl.float32) - 7.3
    packed = tl.inline_asm_elementwise(PAIR, "=r,r,r", [f, -f], dtype=tl.uint32, is_pure=True, pack=1)
    tl.store(z_ptr + i, packed.to(tl.uint16))


def test_inline_asm_is_executed_or_replaced_by_its_registered_meaning() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    y, z = torch.zeros_like(x), torch.zeros(64, dtype=torch.int16)
    with interpreted():
        assembly[(1,)](x, y, z, N=64)
    halves = x.view(torch.int16).view(64, 2)
    assert torch.equal(y.view(torch.int16).view(64, 2), halves.flip(1))
    f = torch.arange(64.0) - 7.3
    assert torch.equal(
        z.view(torch.float8_e4m3fn).view(64, 2).float(), torch.stack([f, -f], 1).to(torch.float8_e4m3fn).float()
    )
    with asm.registered({SWAP.value: lambda a, b: a + b}), interpreted():
        assembly[(1,)](x, y, z, N=64)
    assert torch.equal(y, x + x)


@triton.jit
def halves(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    b = tl.inline_asm_elementwise(
        "mul.bf16x2 $0, $1, $1;", "=r,r", [tl.load(x_ptr + i)], dtype=tl.bfloat16, is_pure=True, pack=2
    )
    tl.store(y_ptr + i, b)


def test_packed_asm_gets_neighbours() -> None:
    x, y = torch.randn(64).bfloat16(), torch.zeros(64, dtype=torch.bfloat16)
    with interpreted():
        halves[(1,)](x, y, N=64)
    assert torch.equal(y, x * x)


@triton.jit
def shifted(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n))


def test_leaving_a_tensor_is_an_error() -> None:
    """On a load, a store, and not where the mask is false; the sentence names argument and program."""
    x, y = torch.zeros(100), torch.zeros(128)
    with interpreted():
        shifted[(2,)](x, y, 100, N=64)
        with pytest.raises(Exception, match=r"load of 4 bytes in program \(1, 0, 0\).*x_ptr \+400, which has 400"):
            shifted[(2,)](x, y, 101, N=64)
        with pytest.raises(Exception, match=r"store of 4 bytes in program \(1, 0, 0\).*y_ptr \+400"):
            shifted[(2,)](x, y[:100], 100, N=64)


def snapshot() -> list[dict[str, object]]:
    from triton.runtime import interpreter as stock
    from triton.runtime.jit import JITFunction

    spaces: list[object] = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, stock, stock.InterpreterBuilder]
    spaces += [JITFunction, device_functions, tl.core.tensor_descriptor_base, tl.condition]
    here = {k: v for k, v in globals().items() if not k.startswith("__")}
    return [{k: v for k, v in vars(s).items() if not k.startswith("__doc")} for s in spaces] + [here]


def test_everything_is_restored_also_after_an_error() -> None:
    before = snapshot()
    x = torch.zeros(64)
    with interpreted():
        other_modules[(1,)](x, torch.zeros(3), N=64)
    with pytest.raises(Exception, match="unknown_name"), interpreted():
        broken[(1,)](x)
    after = snapshot()
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] is b[k] for k in a)


@triton.jit
def broken(x_ptr):
    tl.store(x_ptr, unknown_name)  # noqa: F821


def test_compiling_inside_and_outside_of_the_context(tmp_path, monkeypatch) -> None:
    """The same function object is interpreted, compiled while the context is open, interpreted, compiled after it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing from an earlier run hides a broken compiler
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    x, y = torch.arange(-40.0, 24.0), torch.zeros(3)
    with interpreted():
        other_modules[(1,)](x, y, N=64)
        inside = compile_for(other_modules, signature, {"N": 64}, "sm_90")
        other_modules[(1,)](x, y, N=64)
    outside = compile_for(other_modules, signature, {"N": 64}, "sm_90", num_warps=2)
    assert inside.threads == 128 and outside.threads == 64
    assert y.tolist() == [80.0, 23.0, float(x.sum())]


def test_an_unchecked_triton_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"3\.9\.0.*9\.9\.9"), interpreted():
        pass


def test_arguments_must_be_kernels() -> None:
    assert isinstance(device_functions, ModuleType)
    with interpreted(device_functions, cast):
        pass
    with pytest.raises(ValueError, match="takes @triton"), interpreted(np.zeros):
        pass
