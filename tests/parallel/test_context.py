"""Context parallelism: zigzag parts, attention over gathered keys, and the numbers of one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lowprec.model import ModelConfig, attention, generate
from lowprec.model.attention import Context, attend
from lowprec.parallel import Recompute
from lowprec.parallel.context import GatheringCore, OwnTokens, Zigzag, token_multiple
from lowprec.parallel.mesh import Axis
from tests.parallel.agreement import MODEL, Case, Outcome, assert_agree, assert_same, make, train, trained
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


CASES = [
    Case(),
    Case("nvfp4", torch.bfloat16),
    Case("fp8_delayed", documents=False, steps=2),
    Case("mxfp8", tokens=128, steps=2),
    Case("mxfp4_rht_sr", tokens=256, steps=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_agree_with_one_process(case):
    """Losses and gradients on two ranks, of documents across chunks, shared maxima and noise in its place."""
    one, *shaken = run(1, trained, case, 2)[0]
    two = run(2, train, case, {"cp": 2})
    assert_agree(one, two[0], shaken)
    assert_same(two[0], two[1])


@pytest.mark.parametrize("other", ["tp", "shard"])
def test_two_axes_agree_with_one_process(other):
    """Context parallel with tensor parallel, and with FSDP2 over more micro-batches."""
    case = Case("nvfp4", steps=1)
    one, *shaken = run(1, trained, case, 2)[0]
    assert_agree(one, run(4, train, case, {"cp": 2, other: 2})[0], shaken)


def recomputed() -> list[Outcome]:
    modes = (Recompute.none, Recompute.selective, Recompute.full)
    case = Case("nvfp4", torch.bfloat16, steps=1)
    return [train(replace(case, settings={"recompute": how}), {"cp": 2}) for how in modes]


def test_recomputation_changes_nothing():
    """Keys are gathered again in the backward pass, in the same order on all ranks."""
    kept, *others = run(2, recomputed)[0]
    for other in others:
        assert_same(kept, other)


def sampled(sizes: dict[str, int]) -> tuple[np.ndarray, list[int], dict[str, int]]:
    """Logits after 40 tokens, a text, and what a forward sends."""
    engine = make(replace(Case(), model=replace(MODEL, max_seq_len=128)), **sizes)
    logits = engine.next_logits(list(range(5, 45)))
    text = generate(engine.next_logits, [1, 2, 3], 3, temperature=0.8, seed=4)
    long = engine.next_logits(list(range(130)))  # more than max_seq_len: its end counts
    assert torch.equal(long, engine.next_logits(list(range(2, 130))))
    engine.transport.meter.take()
    engine.logits(Case().batch(0, 0))
    return logits.numpy(), text, engine.transport.meter.take()


def test_the_next_token_is_that_of_one_process():
    """Of a prompt that must be filled up; every rank gets the whole vocabulary, and draws the same text."""
    (one, text, sent), *_ = run(1, sampled, {})
    assert not sent
    parts = run(4, sampled, {"cp": 2, "tp": 2})
    for logits, drawn, sent in parts:
        assert np.array_equal(logits, parts[0][0])
        assert np.abs(logits - one).max() < 2**-16 * np.abs(one).max()  # 256 additions of fp32
        assert drawn == text
        heads = MODEL.kv_heads // 2 * MODEL.head_dim
        assert sent["kv_all_gather"] == MODEL.layers * 2 * (2 * 64 * heads) * 4


def refusals() -> list[str]:
    refused = []
    for recipe in ("fp8_attention", "hp_mean", "averis"):
        try:
            make(Case(recipe), cp=2)
        except ValueError as error:
            refused.append(str(error))
    try:
        train(Case("mxfp8"), {"cp": 2})
    except ValueError as error:
        refused.append(str(error))
    return refused


def test_recipes_that_need_whole_sequences_are_refused():
    """When the model is laid out; a sequence whose chunks cut blocks of tokens, when it comes."""
    for attention_, mean, averis, chunk in run(2, refusals):
        assert "quantised attention" in attention_ and "parallel.cp=2" in attention_
        for refused in (mean, averis):
            assert "cannot be cut" in refused and "'tokens' over 2" in refused
        assert "a sequence of 64 tokens" in chunk and "data.seq_len a multiple of 128" in chunk
