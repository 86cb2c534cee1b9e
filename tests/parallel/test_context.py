"""Context parallelism: zigzag parts, attention over gathered keys, and the numbers of one process."""

import pytest
import torch
import torch.distributed as dist

from lowprec.model import ModelConfig, attention
from lowprec.model.attention import Context, attend
from lowprec.parallel.context import GatheringCore, OwnTokens, Zigzag, token_multiple
from lowprec.parallel.mesh import Axis
from tests.ranks import run

pytestmark = pytest.mark.distributed


def axis_of_all() -> Axis:
    return Axis("cp", dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zigzag_gives_every_token_once_and_as_many_visible_keys_to_every_rank(ranks):
    """The parts are a partition, begin at chunks, and a causal mask costs all ranks the same."""
    length = 2 * ranks * 16
    parts = [Zigzag(r, ranks, length).cut(torch.arange(length), 0) for r in range(ranks)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(length))
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_rows_say_where_tokens_are_in_the_micro_batch():
    """Row i of a rank's (B T / cp, C) matrix is row zigzag(B T / cp)[i] of the whole (B T, C) one."""
    x_BTC = torch.arange(3 * 64 * 2).view(3, 64, 2)
    for rank in range(2):
        zigzag = Zigzag(rank, 2, 64)
        own = zigzag.cut(x_BTC, 1).flatten(0, 1)
        assert torch.equal(x_BTC.flatten(0, 1)[zigzag(len(own))], own)


def case(kv_heads: int, length: int, dtype: torch.dtype, documents: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v, and the bias of whole rows or None."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, length, 16, generator=generator).to(dtype) for heads in (4, kv_heads, kv_heads))
    ids = (torch.arange(length).expand(2, -1) + torch.tensor([[0], [5]])) // 23
    return q, k, v, ids if documents else None


def gathered(kv_heads, length, dtype, documents, block_tokens, blocked_max):
    """y and the gradients of q, k, v of this rank's tokens, from attention over gathered keys."""
    attention._BLOCK_TOKENS, attention._BLOCKED_MAX_TOKENS = block_tokens, blocked_max
    axis = axis_of_all()
    own = OwnTokens(axis, 1, 2 * axis.size * 16)
    q, k, v, ids = case(kv_heads, length, dtype, documents)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    bias = Context.of(ModelConfig(dim=64), tokens, ids, dtype, own).bias_B1TU
    inputs = [own(x, 2).requires_grad_() for x in (q, k, v)]
    y = GatheringCore(attend, axis)(*inputs, bias)
    y.square().sum().backward()
    return [x.detach().float().numpy() for x in (y, *(x.grad for x in inputs))]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("blocked_max", [2048, 0])
def test_attention_over_gathered_keys_is_attention(blocked_max, documents, monkeypatch):
    """Forward bit for bit where the blocks of one process begin at chunks; gradients to the order of an fp32 sum.

    torch's own kernels (blocked_max 0) take other paths for a chunk than for a row, so there the forward agrees to
    2 * 96 additions of weights that sum to one, of values below 4.
    """
    length, ranks = 96, 3
    parts = run(ranks, gathered, 2, length, torch.float32, documents, 16, blocked_max)
    monkeypatch.setattr(attention, "_BLOCK_TOKENS", 16)
    monkeypatch.setattr(attention, "_BLOCKED_MAX_TOKENS", blocked_max)
    q, k, v, ids = case(2, length, torch.float32, documents)
    bias = Context.of(ModelConfig(dim=64), torch.zeros(2, length, dtype=torch.int64), ids, torch.float32).bias_B1TU
    assert (bias is None) == (not documents and not blocked_max)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    y = attend(*inputs, bias)
    y.square().sum().backward()
    for rank, part in enumerate(parts):
        whole = [Zigzag(rank, ranks, length).cut(x, 2) for x in (y, *(x.grad for x in inputs))]
        for i, (ours, theirs) in enumerate(zip(part, whole, strict=True)):
            ours = torch.from_numpy(ours)
            if blocked_max and i == 0:
                assert torch.equal(ours, theirs)
            bound = 2 * length * 2**-24 * 4 * max(1.0, theirs.abs().max().item())
            assert (ours - theirs).abs().max() <= bound, i


def test_lengths_that_cannot_be_cut_are_refused():
    """By name, with the multiple that fits; all is well with one rank."""
    assert [token_multiple(*sizes) for sizes in ((1, 1), (1, 4), (2, 1), (2, 3), (3, 2))] == [1, 4, 64, 192, 96]
    own = OwnTokens(Axis("cp", 0, 2, None), 1, 64)
    with pytest.raises(ValueError, match=r"sequence of 80 tokens .*parallel.cp=2.* multiple of 64"):
        own(torch.zeros(1, 80), 1)
    alone = OwnTokens(Axis("cp", 0, 1, None), 3, 3)
    assert alone(torch.arange(9), 0).tolist() == list(range(9))
    with pytest.raises(ValueError, match=r"parallel.tp=3 .* make data.seq_len a multiple of 3"):
        alone(torch.zeros(10), 0)
