"""Weights in bf16 alone train as fp32 masters do if updates are rounded stochastically, and stall if to nearest."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowprec.optim import AdamWBf16, OptimConfig, build_optimizer
from lowprec.optim.adamw_bf16 import _PIECE, _local


def regression(make, dtype, steps=300):
    """Final mean squared error of a linear map of 32 numbers, whose weights are about 1 and move by 1e-3 a step."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 32, generator=generator), 1 + 0.1 * torch.randn(8, 32, generator=generator)
    y = x @ target.T
    weight = nn.Parameter(torch.ones(8, 32).to(dtype))
    optimizer = make([("weight", weight)])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 2 * (1 - step / steps))
        loss = (x @ weight.float().T - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_bf16_weights_train():
    """To nearest nothing moves: half a step of bf16 at 1 is 2e-3 downwards, 4e-3 upwards. Stochastically it does.

    What the noise leaves: rounding adds a variance of up to rate x step of bf16 = 1e-3 2^-7 to a weight in every step,
    and the gradient pulls it back by 1e-3 a step.
    """
    betas = (0.9, 0.95)
    start = regression(lambda p: torch.optim.SGD(p, lr=0.0), torch.float32, 1)
    fp32 = regression(lambda p: torch.optim.AdamW(p, betas=betas, weight_decay=0.0), torch.float32)
    nearest = regression(lambda p: torch.optim.AdamW(p, betas=betas, weight_decay=0.0), torch.bfloat16)
    ours = functools.partial(AdamWBf16, betas=betas, weight_decay=0.0)
    rounded = [regression(functools.partial(ours, moments=m), torch.bfloat16) for m in ("fp32", "bf16")]
    assert fp32 < 0.01 * start and nearest > 0.9 * start
    assert max(rounded) < 0.02 * start


def model_and_grads(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 24), nn.RMSNorm(24)).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    grads = [[torch.randn(p.shape, generator=generator).to(dtype) for p in model.parameters()] for _ in range(6)]
    return model, grads


def train(model, optimizer, grads):
    for step in grads:
        for parameter, grad in zip(model.parameters(), step):
            parameter.grad = grad.clone()
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_resumed_run_rounds_alike(moments):
    """State and names are enough; moments keep their dtype on the way."""
    model, grads = model_and_grads()
    whole, other = copy.deepcopy(model), copy.deepcopy(model)
    train(whole, AdamWBf16(whole.named_parameters(), moments=moments), grads)
    first = AdamWBf16(model.named_parameters(), moments=moments)
    train(model, first, grads[:3])
    other.load_state_dict(model.state_dict())
    second = AdamWBf16(other.named_parameters(), moments=moments)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(other, second, grads[3:])
    assert same(other, whole)
    dtypes = {s[name].dtype for s in second.state.values() for name in ("exp_avg", "exp_avg_sq")}
    assert dtypes == {torch.float32 if moments == "fp32" else torch.bfloat16}


def test_a_distributed_checkpoint_resumes_it():
    """By names of parameters, as torch's distributed checkpoints hold optimizers."""
    model, grads = model_and_grads()
    whole, other = copy.deepcopy(model), copy.deepcopy(model)
    config = OptimConfig(_target_="lowprec.optim.AdamWBf16")
    train(whole, build_optimizer(whole, config), grads)
    first = build_optimizer(model, config)
    train(model, first, grads[:3])
    second = build_optimizer(other, config)
    set_optimizer_state_dict(other, second, copy.deepcopy(get_optimizer_state_dict(model, first)))
    other.load_state_dict(model.state_dict())
    train(other, second, grads[3:])
    assert same(other, whole)
    assert {s["exp_avg_sq"].dtype for s in second.state.values()} == {torch.float32}


def test_bits_are_keyed_by_name_and_seed():
    """Neither the order nor the groups of parameters matter; names and the seed do."""
    model, grads = model_and_grads()
    named = dict(model.named_parameters())
    results = []
    for keys, options in (
        (list(named), {}),
        (list(named)[::-1], {}),
        (list(named), {"seed": 1}),
    ):
        one = copy.deepcopy(model)
        parameters = dict(one.named_parameters())
        train(one, AdamWBf16([{"params": [(k, parameters[k])]} for k in keys], **options), grads)
        results.append(one)
    renamed = copy.deepcopy(model)
    train(renamed, AdamWBf16([("other." + k, p) for k, p in renamed.named_parameters()]), grads)
    assert same(results[0], results[1])
    assert not same(results[0], results[2]) and not same(results[0], renamed)


def test_pieces_and_shards_round_as_the_whole():
    """A long parameter, done in pieces, is its halves done by two ranks."""
    generator = torch.Generator().manual_seed(2)
    rows = _PIECE // 64 + 3
    weight, grad = (torch.randn(2, rows, 64, generator=generator)).bfloat16()
    whole = nn.Parameter(weight.clone())
    whole.grad = grad
    AdamWBf16([("w", whole)], moments="bf16").step()
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        half = -(-rows // 2)
        part = nn.Parameter(DTensor.from_local(weight[half:].clone(), mesh, [Shard(0)], shape=weight.shape,
                                               stride=weight.stride()))  # fmt: skip
        part.grad = DTensor.from_local(grad[half:], mesh, [Shard(0)], shape=weight.shape, stride=weight.stride())
        optimizer = AdamWBf16([("w", part)], moments="bf16")
        optimizer.step()
        assert torch.equal(part.to_local(), whole[half:])
        assert isinstance(optimizer.state[part]["exp_avg"], DTensor)
        replicated = DTensor.from_local(weight, mesh, [Replicate()])
        assert _local("w", replicated)[1] == 0
        with pytest.raises(ValueError, match="sharded once, along their first axis"):
            AdamWBf16([DTensor.from_local(weight, mesh, [Shard(1)])])
    finally:
        dist.destroy_process_group()


def test_built_by_name():
    """The optimizer of a config takes bf16 parameters and their names; any other class still wants fp32 masters."""
    model, _ = model_and_grads()
    config = OptimConfig(_target_="lowprec.optim.AdamWBf16", kwargs={"moments": "bf16", "seed": 3})
    optimizer = build_optimizer(model, config)
    assert [group["param_names"] for group in optimizer.param_groups] == [["0.weight"], ["0.bias", "1.weight"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    with pytest.raises(ValueError, match=r"fp32 master weights.*lowprec\.optim\.AdamWBf16"):
        build_optimizer(model, OptimConfig())
    model[0].half()
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float16"):
        build_optimizer(model, config)


def test_a_closure_and_parameters_without_gradient():
    model, _ = model_and_grads()
    before = copy.deepcopy(model)
    assert AdamWBf16(model.parameters()).step(lambda: 2.5) == 2.5 and same(model, before)


def test_refusals():
    with pytest.raises(ValueError, match="Moments in 'int8' are unknown"):
        AdamWBf16([nn.Parameter(torch.ones(2))], moments="int8")
    with pytest.raises(ValueError, match="out of range"):
        AdamWBf16([nn.Parameter(torch.ones(2))], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"torch\.float16: AdamWBf16 updates contiguous"):
        AdamWBf16([nn.Parameter(torch.ones(2).half())])
    with pytest.raises(ValueError, match="strided"):
        AdamWBf16([nn.Parameter(torch.ones(2, 3).T)])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="is sparse"):
        AdamWBf16(embedding.parameters()).step()
