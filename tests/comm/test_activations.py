"""Activations between ranks: forward and backward equal one process's, and what is counted."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.comm import CODECS, Meter, copy_to, gather_sequence, scatter_sequence
from tests.ranks import run

pytestmark = pytest.mark.distributed


def whole(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """In fp32, in rank order, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def _exact(dtype: torch.dtype) -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    size = torch.empty(0, dtype=dtype).itemsize
    for dim, shape in ((1, (2, 3 * ranks, 5)), (0, (4 * ranks, 6)), (-1, (2, 3, ranks))):
        meter, count = Meter(), torch.Size(shape).numel() * size
        x = whole(1, shape, dtype).chunk(ranks, dim)[rank].clone().requires_grad_()
        y = gather_sequence(x, dim, group, meter=meter)
        assert torch.equal(y, whole(1, shape, dtype))
        dy = [whole(10 + r, shape, dtype) for r in range(ranks)]
        y.backward(dy[rank])
        assert torch.equal(x.grad, summed(dy).chunk(ranks, dim)[rank])  # type: ignore[arg-type]
        assert meter.take() == {"activation_all_gather": count, "activation_reduce_scatter": count}

        xs = [whole(20 + r, shape, dtype) for r in range(ranks)]
        x = xs[rank].clone().requires_grad_()
        y = scatter_sequence(x, dim, group, meter=meter, kind="kv")
        assert torch.equal(y, summed(xs).chunk(ranks, dim)[rank])
        y.backward(whole(2, shape, dtype).chunk(ranks, dim)[rank])
        assert torch.equal(x.grad, whole(2, shape, dtype))  # type: ignore[arg-type]
        assert meter.take() == {"kv_all_gather": count, "kv_reduce_scatter": count}

        padded = -(-torch.Size(shape).numel() // ranks) * ranks * size
        x = xs[0].clone().requires_grad_()
        y = copy_to(x, group, meter=meter)
        assert torch.equal(y, x) and meter.take() == {}
        y.backward(dy[rank])
        assert torch.equal(x.grad, summed(dy)) and meter.take() == {"activation_all_reduce": 2 * padded}  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_forward_and_backward(dtype: torch.dtype) -> None:
    """`none`: gathers copy; sums are fp32 in rank order and rounded once; each is the gradient of its counterpart."""
    run(3, _exact, dtype)


def _coded() -> list[bytes]:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    codec, meter, shape = CODECS["int8"], Meter(), (2, 4 * ranks, 64)
    x = whole(1, shape, torch.bfloat16).chunk(ranks, 1)[rank].clone().requires_grad_()
    y = gather_sequence(x, 1, group, "int8", meter)
    assert y.dtype == torch.bfloat16 and y.shape == shape
    parts = [part.movedim(1, 0).reshape(1, -1) for part in whole(1, shape, torch.bfloat16).chunk(ranks, 1)]
    n = parts[0].shape[1]
    sent = [codec.decode(codec.encode(part), n, torch.bfloat16).view(4, 2, 64).movedim(0, 1) for part in parts]
    assert torch.equal(y, torch.cat(sent, 1))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, ranks))
    bytes_ = ranks * codec.payload_bytes(n)
    assert meter.take() == {"activation_all_gather": bytes_, "activation_reduce_scatter": bytes_}
    alike = whole(0, (5, 7), torch.bfloat16).requires_grad_()
    copy_to(alike, group, codec).backward(whole(rank, (5, 7), torch.bfloat16))
    reduced = alike.grad
    assert reduced is not None
    torch.testing.assert_close(
        reduced, summed([whole(r, (5, 7), torch.bfloat16) for r in range(ranks)]), atol=0.05, rtol=0.02
    )
    with pytest.raises(ValueError, match=r"dimension 0 of \(3,\) cannot be scattered over 2 ranks evenly; pad it"):
        scatter_sequence(torch.zeros(3), 0, group)
    with pytest.raises(ValueError, match=r"activations of torch.float64 have no codec 'none'"):
        gather_sequence(torch.zeros(2, dtype=torch.float64), 0, group)
    return [y.detach().float().numpy().tobytes(), reduced.float().numpy().tobytes()]


def test_coded_activations() -> None:
    """A codec works in both directions, and all ranks see the same bits."""
    first, second = run(2, _coded)
    assert first == second


def _alone() -> None:
    me = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x, meter = torch.randn(2, 3), Meter()
    for result in (
        gather_sequence(x, 0, me, "nvfp4", meter),
        scatter_sequence(x, 0, me, "nvfp4", meter),
        copy_to(x, me, "nvfp4", meter),
    ):
        assert result is x
    assert meter.take() == {}


def test_a_group_of_one_does_nothing() -> None:
    """The very tensor comes back."""
    run(2, _alone)
