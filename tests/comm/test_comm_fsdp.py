"""FSDP2 with our collectives, on real ranks: the gradients it computes, the weights it gathers, and what is counted."""

import pytest
import torch
import torch._dynamo  # FSDP2 imports it at the first use: here it is imported once for all ranks, before they fork
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lowprec.comm import (
    CODECS,
    Codec,
    Feedback,
    GradientReduceScatter,
    Meter,
    MeteredAllGather,
    Nodes,
    all_reduce_hook,
)
from lowprec.numerics import Clock
from tests.ranks import run

pytestmark = pytest.mark.distributed

WIDTH, HIDDEN = 20, 37  # rows that no number of ranks divides: FSDP2 pads them


def model(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two blocks and a head, sharded, the same on every rank; gradients are summed in fp32."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)]
    root = nn.Sequential(*blocks, nn.Linear(WIDTH, 8))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


def sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def backward(root: nn.Module, seed: int = 0) -> list[Tensor]:
    """Gradients of one batch, different on every rank: this rank's shards, which are taken off the parameters."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    x, y = torch.randn(16, WIDTH, generator=generator), torch.randn(16, 8, generator=generator)
    (root(x).float() - y).square().mean().backward()
    gradients = [p.grad.to_local().clone() for p in root.parameters()]  # type: ignore[union-attr]
    root.zero_grad()
    return gradients


def padded_sizes(root: nn.Module, ranks: int) -> list[int]:
    """Values that FSDP2 moves for each sharded module: rows padded to a multiple of the ranks."""
    sizes = []
    for module in (root[0], root[1], root[2]):  # type: ignore[index]
        sizes.append(sum(-(-p.shape[0] // ranks) * ranks * p[0].numel() for p in module.parameters()))
    return sizes


def _gradients() -> None:
    ranks, mesh = dist.get_world_size(), init_device_mesh("cpu", (dist.get_world_size(),))
    native = backward(model(mesh))
    clock, size = Clock(seed=3), padded_sizes(model(mesh), ranks)
    for codec, tolerance in (
        (CODECS["fp32"], 0.0 if ranks == 2 else 1e-6),  # two summands have one order
        (CODECS["bf16"], 2**-8),
        (CODECS["fp8"], 2**-4),
        (Codec("int8", rotation=16), 0.05),
        (Codec("int4", rotation=16, rounding="stochastic"), 0.4),
    ):
        root, meter = model(mesh), Meter()
        for i, module in enumerate(sharded(root)):
            module.set_custom_reduce_scatter(
                GradientReduceScatter(codec, meter, lambda: clock.stream("comm"), f"gradient/{i}")
            )
        got = backward(root)
        off = sum((a - b).square().sum() for a, b in zip(got, native)) / sum(b.square().sum() for b in native)
        assert off**0.5 <= tolerance, (codec, off**0.5)
        assert meter.take() == {"gradient_reduce_scatter": sum(ranks * codec.payload_bytes(s // ranks) for s in size)}
        again = backward(root)
        assert all(torch.equal(a, b) for a, b in zip(got, again))  # the same step draws the same bits


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_each_codec(ranks: int) -> None:
    """fp32 is FSDP2's own sum, bit for bit on two ranks, to the order of addition on four; others are near it."""
    run(ranks, _gradients)


def _feedback() -> None:
    mesh, codec, steps = init_device_mesh("cpu", (dist.get_world_size(),)), CODECS["int4"], 12
    exact, lossy, fed = model(mesh), model(mesh), model(mesh)
    memories = [Feedback("ef") for _ in sharded(fed)]
    for module, memory in zip(sharded(fed), memories):
        module.set_custom_reduce_scatter(GradientReduceScatter(codec, feedback=memory))
    for module in sharded(lossy):
        module.set_custom_reduce_scatter(GradientReduceScatter(codec))
    one = backward(exact)
    lost = [torch.zeros_like(g) for g in one]
    lost_without = [torch.zeros_like(g) for g in one]
    for _ in range(steps):  # one batch again and again: rounding always errs to the same side
        for a, b, g in zip(lost, backward(fed), one):
            a += g - b
        for a, b, g in zip(lost_without, backward(lossy), one):
            a += g - b
        for memory in memories:
            memory.end_step(True)
    # What is lost is what all ranks still remember: less than half a step of each, of its largest value and memory.
    largest = max(m.compensate(torch.zeros(m.state_dict()["shape"].tolist())).abs().max() for m in memories)
    bound = dist.get_world_size() * torch.tensor([largest])
    dist.all_reduce(bound, dist.ReduceOp.MAX)
    worst = max(a.abs().max() for a in lost)
    assert worst <= bound * (1 + 1e-3), (worst, bound)
    assert max(a.abs().max() for a in lost_without) > 4 * worst


def test_error_feedback_keeps_the_sum() -> None:
    """After twelve steps the gradients' sum is off by what the memories hold, not by twelve rounding errors."""
    run(2, _feedback)


def _secondary_shards() -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    nodes = Nodes.split(mesh.get_group(), 2)
    plain, hpz = model(mesh, torch.bfloat16), model(mesh, torch.bfloat16)
    meters, gathers = (Meter(), Meter()), []
    for a, b in zip(sharded(plain), sharded(hpz)):
        gathers.append(MeteredAllGather(meters[1], nodes))
        a.set_custom_all_gather(MeteredAllGather(meters[0]))
        b.set_custom_all_gather(gathers[-1])
    sizes = padded_sizes(plain, ranks)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, hpz)]
    for step in range(3):
        for gather in gathers:
            gather.new_weights()
        for root, optimizer in zip((plain, hpz), optimizers):
            root(torch.ones(2, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(plain.parameters(), hpz.parameters()):
            assert torch.equal(p.to_local(), q.to_local()), step  # type: ignore[attr-defined]
        twice, once = 2 * sum(sizes[:2]), sizes[2]  # blocks are gathered for each pass, the root only for the first
        assert meters[0].take() == {"weight_all_gather": 2 * (twice + once)}
        served = 2 * sum(sizes[:2])
        assert meters[1].take() == {"weight_all_gather": 2 * sum(sizes), "weight_all_gather_in_node": served}


def test_secondary_shards_serve_the_same_weights() -> None:
    """hpZ on two nodes of two: updates are those of plain gathers, and the second gather stays in the node."""
    run(4, _secondary_shards)


def _two_levels() -> None:
    mesh = init_device_mesh("cpu", (4,))
    native, root, meter = backward(model(mesh)), model(mesh), Meter()
    nodes = Nodes.split(mesh.get_group(), 2)
    for module in sharded(root):
        module.set_custom_reduce_scatter(GradientReduceScatter(meter=meter, nodes=nodes))
    for a, b in zip(backward(root), native):
        torch.testing.assert_close(a, b)
    taken, whole = meter.take(), 4 * sum(padded_sizes(root, 4))
    assert taken == {"gradient_reduce_scatter_in_node": whole, "gradient_reduce_scatter": whole // 2}


def test_two_level_gradients() -> None:
    """Chunks arrive where one level puts them."""
    run(4, _two_levels)


def _replicated() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    native = backward(model(mesh))  # FSDP2's own HSDP
    for codec, tolerance in ((CODECS["fp32"], 1e-6), (CODECS["fp8"], 0.05)):
        root, meter = model(mesh["shard"]), Meter()
        for module in sharded(root):
            module.set_custom_reduce_scatter(GradientReduceScatter(meter=meter))
            module.set_all_reduce_hook(all_reduce_hook(codec, mesh["replicate"].get_group(), meter))
        got = backward(root)
        off = sum((a - b).square().sum() for a, b in zip(got, native)) / sum(b.square().sum() for b in native)
        assert off**0.5 <= tolerance
        copies = [torch.empty_like(got[0]) for _ in range(2)]
        dist.all_gather(copies, got[0], group=mesh["replicate"].get_group())
        assert torch.equal(*copies)
        sizes = padded_sizes(root, 2)
        between = sum(2 * 2 * codec.payload_bytes(-(-size // 4)) for size in sizes)
        assert meter.take() == {"gradient_all_reduce": between, "gradient_reduce_scatter": 4 * sum(sizes)}
        root.set_requires_gradient_sync(False)  # type: ignore[operator]
        root(torch.ones(2, WIDTH)).sum().backward()
        assert meter.take() == {}  # micro-batches that are only accumulated send no gradients


def test_hybrid_sharding_sums_between_nodes() -> None:
    """Sharded inside, replicated between: FSDP2's own gradients to the order of addition, the same on both copies."""
    run(4, _replicated)


def test_averages_are_refused() -> None:
    """FSDP2 averages unless it is told to sum; that is said, not ignored."""
    scatter = GradientReduceScatter()
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"gradients are summed here.*set_gradient_divide_factor"):
        scatter(x, x, None, dist.ReduceOp.AVG)  # type: ignore[arg-type]


def _wrong_nodes() -> None:
    world = dist.group.WORLD
    assert world is not None
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        gather = MeteredAllGather(nodes=Nodes.split(pair, 1))
        with pytest.raises(ValueError, match="nodes of 1 ranks x 2 are not the group of 3"):
            gather(torch.zeros(3), torch.zeros(1), world)


def test_nodes_of_another_group_are_refused() -> None:
    """hpZ must divide the group that shards."""
    run(3, _wrong_nodes)
