"""The chunked scan is the recurrence, the convolution is torch's, documents do not touch, and states go on."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lowprec.model import ssm_kernels
from lowprec.model.ssd import Documents, causal_conv, recurrence, scan, time_steps

F64 = torch.float64


def inputs(batch=2, length=50, heads=4, width=6, groups=2, states=5, dtype=F64, seed=0):
    """x, dt, A, b, c, D that need gradients; decays between 1 and exp(-16 dt)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, heads, width, generator=g, dtype=F64)
    dt = F.softplus(torch.randn(batch, length, heads, generator=g, dtype=F64) - 2)
    a = -1 - 15 * torch.rand(heads, generator=g, dtype=F64)
    b, c = torch.randn(2, batch, length, groups, states, generator=g, dtype=F64)
    d = torch.randn(heads, generator=g, dtype=F64)
    return [t.to(dtype).requires_grad_() for t in (x, dt, a, b, c, d)]


def starts(ids_BT):
    """What the model makes of document numbers."""
    begins_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
    return torch.where(begins_BT, torch.arange(ids_BT.shape[1]), 0).cummax(dim=1).values


IDS = torch.stack([torch.arange(50) // 17, torch.tensor([0] + [1] * 3 + [2] + [3] * 45)])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_scan_equals_the_recurrence(chunk, packed, given):
    """To rounding in fp64: values, last state, all gradients, whatever the chunk, with documents and first states."""
    arguments = inputs()
    documents = Documents(starts(IDS)) if packed else None
    state = torch.randn(2, 4, 6, 5, dtype=F64, requires_grad=True) if given else None
    leaves = [*arguments, *([state] if given else [])]
    found = []
    for how in (recurrence, lambda *arguments: scan(*arguments, chunk=chunk)):
        y, last = how(*arguments, documents, state)
        loss = y.square().sum() + (last * torch.arange(1.0, 6.0)).sum()
        found.append([y, last, *torch.autograd.grad(loss, leaves)])
    for ours, defined in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-11, atol=1e-11)


def test_scan_is_accurate_in_fp32():
    """A decay is exp of a difference of two sums, each rounded to half a unit of 2^-23 of its size: so are results."""
    exact = recurrence(*inputs(length=300))[0]
    single = inputs(length=300, dtype=torch.float32)
    sums = (single[1] * single[2])[:, :256].unflatten(1, (-1, 64)).cumsum(2)
    error = (scan(*single)[0].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-9 < error < sums.abs().max() * 2**-23


def test_the_recurrence_is_its_equation():
    """One head written out as a sum over all earlier tokens."""
    x, dt, a, b, c, d = (t.detach() for t in inputs(batch=1, length=9))
    y = recurrence(x, dt, a, b, c, d)[0]
    t, head, group = 7, 3, 1
    expected = d[head] * x[0, t, head]
    for s in range(t + 1):
        decay = (dt[0, s + 1 : t + 1, head] * a[head]).sum().exp()
        expected = expected + (c[0, t, group] @ b[0, s, group]) * decay * dt[0, s, head] * x[0, s, head]
    torch.testing.assert_close(y[0, t, head], expected)


def test_a_sequence_may_be_run_in_parts():
    """Convolution and scan of 20, 1 and 29 tokens, each from where the last stopped, are those of 50."""
    x, dt, a, b, c, d = (t.detach() for t in inputs())
    whole, state, done = scan(x, dt, a, b, c, d), None, []
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        y, state = scan(x[:, part], dt[:, part], a, b[:, part], c[:, part], d, None, state)
        done.append(y)
    torch.testing.assert_close(torch.cat(done, 1), whole[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, whole[1], rtol=1e-11, atol=1e-11)
    flat, weight, bias = x.flatten(2), torch.randn(24, 1, 4, dtype=F64), torch.randn(24, dtype=F64)
    parts = [causal_conv(flat[:, :20], weight, bias), causal_conv(flat[:, 20:], weight, bias, None, flat[:, 17:20])]
    torch.testing.assert_close(torch.cat(parts, 1), causal_conv(flat, weight, bias))


def test_convolution_equals_torch_and_its_gradients_hold():
    """silu(conv1d) of torch, depthwise and causal; backward against finite differences, with documents and history."""
    x, weight, bias = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 12, 3), (3, 1, 4), (3,)))
    theirs = F.silu(F.conv1d(x.transpose(1, 2), weight, bias, padding=3, groups=3)[..., :12]).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, weight, bias), theirs)
    documents, before = Documents(starts(IDS[:, 10:22])), torch.randn(2, 3, 3, dtype=F64)
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, documents), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, None, before), (x[:, :2], weight, bias))


def test_documents_number_and_reach():
    """Numbers count from 0 in every row; a tap reaches back only inside its document."""
    documents = Documents(starts(torch.tensor([[7, 7, 3, 3, 3, 7]])))
    assert documents.numbers_BT.tolist() == [[0, 0, 1, 1, 1, 2]] and documents.numbers_BT.dtype == torch.int32
    assert documents.reaches(1)[0, :, 0].tolist() == [False, True, False, True, True, False]
    assert documents.reaches(2)[0, :, 0].tolist() == [False, False, False, False, True, False]


def test_time_steps_are_softplus_within_limits():
    """fp32 from bf16 input, limited from both sides."""
    dt, bias = torch.tensor([[[-20.0, 0.0, 3.0]]]).bfloat16(), torch.tensor([0.0, 1.0, 0.0])
    steps = time_steps(dt, bias, 0.001, 2.0)
    assert steps.dtype == torch.float32
    torch.testing.assert_close(steps[0, 0], torch.tensor([0.001, F.softplus(torch.tensor(1.0)), 2.0]))


def _chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
                return_varlen_states=False, state_dtype=None):  # fmt: skip
    """A stand-in with the signature of mamba_ssm 2.3.2."""
    assert chunk_size == 256 and dt_softplus and D.dtype == dt_bias.dtype == torch.float32
    high = None if dt_limit[1] == float("inf") else dt_limit[1]
    return scan(x, time_steps(dt, dt_bias, dt_limit[0], high), A, B, C, D, Documents(starts(seq_idx)))[0]


def _conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
               final_states_out=None, activation=None):  # fmt: skip
    """A stand-in with the signature of causal_conv1d 1.6.1."""
    assert activation == "silu" and x.stride(1) == 1 and x.stride(2) % 8 == x.stride(0) % 8 == 0
    assert seq_idx.dtype == torch.int32 and 2 <= weight.shape[1] <= 4
    return causal_conv(x.transpose(1, 2), weight[:, None], bias, Documents(starts(seq_idx))).transpose(1, 2)


@pytest.fixture
def kernels(monkeypatch):
    """Modules of these names that hold the stand-ins; `install(scan)` puts in another scan."""

    def install(chunk_scan=_chunk_scan):
        for path in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        held = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
        held.mamba_chunk_scan_combined = chunk_scan
        monkeypatch.setitem(sys.modules, held.__name__, held)
        held = types.ModuleType("causal_conv1d")
        held.causal_conv1d_fn = _conv1d_fn
        monkeypatch.setitem(sys.modules, held.__name__, held)
        ssm_kernels._load.cache_clear()

    yield install
    ssm_kernels._load.cache_clear()


def test_kernels_are_called_as_published(kernels):
    """Arguments of the calls fit the published signatures and mean what `ssd.py` means."""
    kernels()
    assert ssm_kernels.refusal(torch.device("cuda"), 24, 4) is None
    x, _, a, b, c, d = (t.detach().float() for t in inputs())
    raw, bias, documents = torch.randn(2, 50, 4), torch.randn(4), Documents(starts(IDS))
    y = ssm_kernels.scan(x, raw, a, b, c, d, bias, (0.01, None), documents)
    torch.testing.assert_close(y, scan(x, time_steps(raw, bias, 0.01), a, b, c, d, documents)[0])
    weight, offset = torch.randn(24, 1, 4), torch.randn(24)
    wider = torch.cat([torch.ones(2, 50, 3), x.flatten(2)], dim=2)  # as the part of in_proj's output that it is
    y = ssm_kernels.causal_conv(wider[..., 3:], weight, offset, documents)
    torch.testing.assert_close(y, causal_conv(x.flatten(2), weight, offset, documents))


def test_kernels_say_why_they_are_not_used(kernels):
    """On a CPU, not installed, or another version: a sentence each."""
    assert "the tensors are on cpu" in ssm_kernels.refusal(torch.device("cpu"), 24, 4)
    assert "there are 20 and 4" in ssm_kernels.refusal(torch.device("cuda"), 20, 4)
    ssm_kernels._load.cache_clear()
    sys.modules.pop("mamba_ssm", None)
    assert ssm_kernels.refusal(torch.device("cuda"), 24, 4).startswith("mamba_ssm is not installed")
    kernels(lambda x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_softplus=False: x)
    assert ssm_kernels.refusal(torch.device("cuda"), 24, 4).endswith("does not take seq_idx, dt_limit")
