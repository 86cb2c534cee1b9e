"""What only the executor of compiled code can catch, and where it and the interpreter must agree."""

import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing import asm
from lowprec.kernels.testing.compile import compile_for, signature_of
from lowprec.kernels.testing.floats import encode
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.testing.ptx import Run, run_ptx


def execute(kernel, grid, args, constants, arch="sm_90", **options) -> Run:
    return run_ptx(compile_for(kernel, signature_of(args), constants, arch, **options), grid, args)


RIGHT = tl.constexpr("{ .reg .b8 q; cvt.rn.satfinite.e2m1x2.f32 q, $2, $1; mov.b32 $0, {q, q, q, q}; }")
WRONG = tl.constexpr("{ .reg .b8 q; cvt.rn.satfinite.e2m1x2.f32 q, $1, $2; mov.b32 $0, {q, q, q, q}; }")


@triton.jit
def packed(x_ptr, y_ptr, N: tl.constexpr, TEXT: tl.constexpr):
    i = tl.arange(0, N)
    low, high = tl.split(tl.load(x_ptr + 2 * i[:, None] + tl.arange(0, 2)[None, :]))
    q = tl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(y_ptr + i, q.to(tl.uint8))


def meant(low, high):
    """What both texts are supposed to do: low nibble first."""
    return encode(low, "e2m1").astype("int32") | encode(high, "e2m1").astype("int32") << 4


def test_swapped_operands_are_seen_by_the_executor_and_not_by_the_interpreter() -> None:
    """The interpreter runs what an asm text is registered to mean, the executor the text itself.  Interpreting,
    compiling, executing and interpreting again happen in one process."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(3)) * 3
    want = torch.from_numpy(meant(x[0::2].numpy(), x[1::2].numpy()).astype("uint8"))
    got: dict[tuple[str, str], bool] = {}
    texts = {"right": RIGHT, "wrong": WRONG}
    with asm.registered({text.value: meant for text in texts.values()}):
        for witness in ("interpreter", "executor", "interpreter again"):
            for name, text in texts.items():
                y = torch.zeros(256, dtype=torch.uint8)
                if witness == "executor":
                    execute(packed, (1,), {"x_ptr": x, "y_ptr": y}, {"N": 256, "TEXT": text.value}, "sm_100")
                else:
                    with interpreted(packed):
                        packed[(1,)](x, y, N=256, TEXT=text.value)
                got[witness, name] = torch.equal(y, want)
    assert [k for k, equal in got.items() if not equal] == [("executor", "wrong")]
    y = torch.zeros(256, dtype=torch.uint8)
    with interpreted(packed):  # nothing registered: the interpreter executes the text, and sees it too
        packed[(1,)](x, y, N=256, TEXT=WRONG.value)
    assert not torch.equal(y, want)


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr, TO: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(TO))


CASTS = [
    (torch.float32, torch.bfloat16, tl.bfloat16), (torch.float32, torch.float16, tl.float16),
    (torch.float32, torch.float8_e4m3fn, tl.float8e4nv), (torch.float32, torch.float8_e5m2, tl.float8e5),
    (torch.bfloat16, torch.float8_e4m3fn, tl.float8e4nv), (torch.float16, torch.float8_e4m3fn, tl.float8e4nv),
    (torch.float8_e4m3fn, torch.float32, tl.float32), (torch.float8_e5m2, torch.float16, tl.float16),
    (torch.float32, torch.int32, tl.int32), (torch.float32, torch.uint8, tl.uint8),
    (torch.bfloat16, torch.int8, tl.int8),
    (torch.int32, torch.bfloat16, tl.bfloat16), (torch.int32, torch.float16, tl.float16),
    (torch.float16, torch.bfloat16, tl.bfloat16), (torch.bfloat16, torch.float16, tl.float16),
]  # fmt: skip


@pytest.mark.parametrize("source,target,to", CASTS, ids=lambda v: str(v).removeprefix("torch."))
def test_compiled_casts_equal_the_interpreters(source: torch.dtype, target: torch.dtype, to: tl.dtype) -> None:
    """Two witnesses of different descent: the executor reads the compiler's conversions, the interpreter its own."""
    n = 4096
    size = torch.empty(0, dtype=source).element_size()
    bits = torch.randint(-(2**31), 2**31, (n * size // 4,), generator=torch.Generator().manual_seed(5))
    x = bits.to(torch.int32).view(source)
    if source == torch.float32:
        x = torch.cat([x[: n // 2], torch.randn(n // 2, generator=torch.Generator().manual_seed(6)) * 50])
    compiled, simulated = torch.zeros(n, dtype=target), torch.zeros(n, dtype=target)
    execute(cast, (1,), {"x_ptr": x, "y_ptr": compiled}, {"N": n, "TO": to}, "sm_90")
    with interpreted(cast):
        cast[(1,)](x, simulated, N=n, TO=to)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[simulated.element_size()]
    real = ~x.float().isnan() if source.is_floating_point else torch.ones(n, dtype=torch.bool)
    assert torch.equal(compiled.view(integer)[real], simulated.view(integer)[real])
    if target.is_floating_point:
        assert compiled.float()[~real].isnan().all() and simulated.float()[~real].isnan().all()


def test_a_conversion_of_triton_that_loses_infinity() -> None:
    """Found by the executor: Triton 3.9 shifts bits for e5m2 -> bf16, and infinity has just the next exponent.
    Go through fp16 or fp32, or keep infinities out."""
    x = torch.tensor([0x7C, 0xFC, 0x7B, 0x01] * 32, dtype=torch.uint8).view(torch.float8_e5m2)
    y = torch.zeros(128, dtype=torch.bfloat16)
    execute(cast, (1,), {"x_ptr": x, "y_ptr": y}, {"N": 128, "TO": tl.bfloat16})
    assert y[:4].tolist() == [65536.0, -65536.0, 57344.0, 2.0**-16]


@triton.jit
def divided(x_ptr, y_ptr, N: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.math.div_rn(x, x + 3.0) if EXACT else x / (x + 3.0))


def test_approximate_operations_are_listed() -> None:
    """A kernel that must equal its definition may not use them, and a test can now say so."""
    x, y = torch.randn(256), torch.zeros(256)
    assert execute(divided, (1,), {"x_ptr": x, "y_ptr": y}, {"N": 256, "EXACT": True}).approximate == set()
    assert torch.equal(y, x / (x + 3.0))
    assert execute(divided, (1,), {"x_ptr": x, "y_ptr": y}, {"N": 256, "EXACT": False}).approximate == {"div.full.f32"}
