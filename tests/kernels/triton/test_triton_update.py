"""The fused AdamW step equals its definition: in the interpreter, as compiled, and as the optimizer runs it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowprec.kernels.testing.chips import PRODUCT
from lowprec.kernels.testing.compile import Compiled, compile_for, signature_of
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.testing.ptx import Run, run_ptx
from lowprec.kernels.triton.memory import Launch
from lowprec.kernels.triton.update import ROLES, adamw_
from lowprec.numerics.stream import Stream, Window
from lowprec.numerics.update import AdamW, adamw, stochastic_bf16
from lowprec.optim import AdamWBf16

STREAM = Stream(3, 9, 0, "layers.0.weight")
UPDATE = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.1, 9)
BF16, FP32 = torch.bfloat16, torch.float32


def tensors(n: int, weight: torch.dtype, moments: torch.dtype) -> list[Tensor]:
    """Weight, gradient, mean, square: with infinities, NaN, zeros, and what may round to infinity."""
    generator = torch.Generator().manual_seed(n)
    w, g, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    g, m, v = g * 1e-3, m * 1e-3, v.square() * 1e-6
    if n > 8:
        w[0], w[3], g[1], g[4] = float("inf"), -3.38e38, float("nan"), float("inf")
        g[2] = m[2] = v[2] = 0.0
        w[5], g[5], m[5], v[5] = 1e-39, 1e-39, 1e-39, 1e-39
    return [w.to(weight), g.to(weight), m.to(moments), v.to(moments)]


def defined(w: Tensor, g: Tensor, m: Tensor, v: Tensor, first: int = 0) -> list[Tensor]:
    out = []
    for role, old, new in zip(ROLES, (w, m, v), adamw(w.float(), g.float(), m.float(), v.float(), UPDATE)):
        bits = STREAM.bits(role, (1, old.numel()), window=Window((1, 1 << 40), first))[0]
        out.append(stochastic_bf16(new, bits) if old.dtype == BF16 else new)
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, one NaN being as good as another."""
    bits = [[torch.where(t.isnan(), torch.nan, t.float()).view(torch.int32) for t in side] for side in (a, b)]
    return all(map(torch.equal, *bits)) and [t.dtype for t in a] == [t.dtype for t in b]


@pytest.mark.parametrize(("weight", "moments"), [(BF16, FP32), (BF16, BF16), (FP32, FP32), (FP32, BF16)])
def test_equals_the_definition(weight: torch.dtype, moments: torch.dtype) -> None:
    """One weight, groups of noise that straddle threads, parts that begin anywhere, more than a program."""
    for n, first in ((1, 0), (1000, 3), (4160, 8), (64, (1 << 33) + 16)):
        before = tensors(n, weight, moments)
        w, g, m, v = copy.deepcopy(before)
        with interpreted():
            adamw_(w, g, m, v, UPDATE, STREAM, first)
        assert same([w, m, v], defined(*before, first)), (n, first)
        assert same([g], [before[1]])


def prove(arch: str, weight: torch.dtype, moments: torch.dtype, n: int, first: int) -> tuple[Compiled, Run]:
    before, proofs = tensors(n, weight, moments), []
    w, g, m, v = copy.deepcopy(before)

    def start(launch: Launch) -> None:
        free = {p.name for p in launch.kernel.params if p.do_not_specialize}
        whole = [k for k, x in launch.args.items() if type(x) is int and x % 16 == 0 and k not in free]
        c = compile_for(launch.kernel, signature_of(launch.args), launch.constants, arch, align=whole,
                        num_warps=launch.warps)  # fmt: skip
        proofs.append((c, run_ptx(c, launch.grid, launch.args)))

    adamw_(w, g, m, v, UPDATE, STREAM, first, start=start)
    assert same([w, m, v], defined(*before, first))
    c, run = proofs[0]
    assert not c.over_limits() and c.stack_bytes == 0 and not run.approximate
    return c, run


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize("moments", [FP32, BF16])
def test_compiled(moments: torch.dtype, arch: str) -> None:
    """Everything moves by 16 bytes, once: 22 or 14 bytes a weight."""
    c, run = prove(arch, BF16, moments, 8192, 0)
    widths = c.global_accesses()
    assert set(widths["load"]) == set(widths["store"]) == {16}
    assert run.moved_bytes() == 8192 * (22 if moments == FP32 else 14)


def test_compiled_ragged() -> None:
    prove("sm_90", BF16, BF16, 1003, 5)


def test_the_optimizer_runs_it() -> None:
    """With the kernel or plain torch: the same weights and moments over some steps."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 9), nn.LayerNorm(9)).to(BF16)
    plain[1].float()
    fused = copy.deepcopy(plain)
    makers: list[tuple[nn.Module, dict[str, Any]]] = [(plain, {"kernels": False}), (fused, {"kernels": True})]
    optimizers = [AdamWBf16(model.named_parameters(), moments="bf16", **kwargs) for model, kwargs in makers]
    for _ in range(3):
        for p, q in zip(plain.parameters(), fused.parameters()):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        with interpreted():
            for optimizer in optimizers:
                optimizer.step()
    assert same(list(plain.parameters()), list(fused.parameters()))
    for a, b in zip(*(optimizer.state.values() for optimizer in optimizers)):
        assert same([a["exp_avg"], a["exp_avg_sq"]], [b["exp_avg"], b["exp_avg_sq"]])


def test_refusals() -> None:
    w, g, m, v = tensors(16, BF16, FP32)
    with pytest.raises(ValueError, match="contiguous tensors of one size"):
        adamw_(w, g[::2], m, v, UPDATE, STREAM)
    adamw_(w[:0], g[:0], m[:0], v[:0], UPDATE, STREAM)  # a rank without rows has nothing to do
