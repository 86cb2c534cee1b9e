"""parallel=auto: what is proposed, why, and what is said when nothing fits."""

import json
from dataclasses import replace

import pytest

from lowprec.model import ModelConfig
from lowprec.parallel import ParallelConfig, Recompute
from lowprec.parallel.auto import TOLERANCE, meshes, propose, this_machine
from lowprec.parallel.config import AXES
from lowprec.parallel.estimate import HARDWARE
from lowprec.parallel.layout import Job, Layout

H100 = HARDWARE["h100_sxm"]
SMALL = ModelConfig(vocab_size=32768, dim=768, layers=12, heads=12, kv_heads=4, ffn_dim=2048)  # 126 M
LARGE = ModelConfig(
    vocab_size=128256, dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672, max_seq_len=8192
)  # Llama 3 70B


def test_a_small_model_is_only_sharded() -> None:
    """On one node and on eight, a model that fits anywhere is plain FSDP; on one rank it is left alone."""
    for ranks in (8, 64):
        layout = propose(Job(SMALL, 8, 1024, 512), ranks, H100).layout
        assert replace(layout, reshard_after_forward=True) == Layout(shard=ranks)
    alone = propose(Job(SMALL, 8, 1024, 512), 1, H100)
    assert alone.layout.ranks == 1 and alone.layout.recompute is Recompute.none


def test_a_large_model_is_cut_inside_the_node() -> None:
    """70 billion parameters on 64 x 80 GB: FSDP alone does not fit; tensor parallelism stays inside a node."""
    found = propose(Job(LARGE, 1, 8192, 512), 64, H100)
    assert found.chosen is not None and found.chosen.account is not None
    assert 1 < found.layout.tp <= 8 and found.layout.ranks == 64
    assert found.chosen.account.fullest.memory_bytes <= H100.usable_bytes
    assert "plain shard 64 is out: needs" in found.why
    wide = [c for c in found.candidates if c.layout.tp > 8]
    assert wide and all(c.rejected for c in wide)


def test_every_layout_is_there_once_and_has_its_reason() -> None:
    """All factorisations, each accounted or rejected in words; rejected ones come last; the order never changes."""
    job = Job(SMALL, 8, 1024, 64)
    found = propose(job, 16, replace(H100, per_node=2))
    sizes = {tuple(getattr(c.layout, axis) for axis in AXES) for c in found.candidates}
    assert sizes == {tuple(getattr(m, axis) for axis in AXES) for m in meshes(16, ParallelConfig())}
    assert len(sizes) == 70  # C(4 + 4, 4): 16 = 2^4 over five axes
    assert len({c.layout for c in found.candidates}) == len(found.candidates)
    assert all(c.rejected or (c.account and c.times) for c in found.candidates)
    flags = [bool(c.rejected) for c in found.candidates]
    assert flags == sorted(flags)
    assert {c.layout.tp for c in found.candidates if "would leave the nodes of 2" in str(c.rejected)} == {4}
    assert propose(job, 16, replace(H100, per_node=2)) == found
    fitting = [c.times.step for c in found.candidates if c.times and not c.rejected]
    assert fitting == sorted(fitting) and found.chosen.times.step <= fitting[0] * (1 + TOLERANCE)


def test_less_memory_costs_more_work() -> None:
    """As memory shrinks the choice needs less, and its step takes no less time, until nothing fits."""
    job, before = Job(SMALL, 16, 1024, 128), None
    for memory in (80e9, 8e9, 4e9, 2e9):
        found = propose(job, 8, replace(H100, memory_bytes=memory))
        assert found.chosen.account.fullest.memory_bytes <= 0.9 * memory
        if before:
            assert found.chosen.times.step >= before.times.step * (1 - TOLERANCE)
            assert found.chosen.account.fullest.memory_bytes < before.account.fullest.memory_bytes
        before = found.chosen
    none = propose(job, 8, replace(H100, memory_bytes=1e9))
    assert none.chosen is None
    with pytest.raises(ValueError, match=r"no layout of 8 ranks fits .* the smallest, .* needs .*; .* would fit"):
        _ = none.layout


def test_the_smallest_change_is_named() -> None:
    """A smaller micro-batch before more ranks; what it names does fit."""
    tight = replace(H100, memory_bytes=0.7e9)
    why = propose(Job(SMALL, 16, 1024, 128), 8, tight).why
    assert "train.micro_batch=" in why and "it changes the numbers" in why
    micro = int(why.partition("train.micro_batch=")[2].split()[0])
    assert propose(Job(SMALL, micro, 1024, 128), 8, tight).chosen
    assert not propose(Job(SMALL, 2 * micro, 1024, 128), 8, tight).chosen
    why = propose(Job(LARGE, 1, 8192, 512), 8, H100).why
    ranks = int(why.split()[-4])
    assert why.endswith(f"{ranks} ranks would fit") and propose(Job(LARGE, 1, 8192, 512), ranks, H100).chosen
    why = propose(Job(SMALL, 8, 1024, 8), 7, H100).why
    assert why.startswith("no layout of 7 ranks suits the model and the batch")


def test_wishes_are_kept() -> None:
    """What the user has set stays: a size, recomputation; and what recipes refuse is refused."""
    job = Job(SMALL, 8, 1024, 512)
    wishes = ParallelConfig(auto=True, tp=2, recompute=Recompute.full)
    found = propose(job, 8, H100, wishes)
    assert all(c.layout.tp == 2 and (c.rejected or c.layout.recompute is Recompute.full) for c in found.candidates)
    config = found.layout.config(wishes)
    assert (config.auto, config.tp, config.shard, config.recompute) == (False, 2, 4, Recompute.full)
    assert Layout.of(config, 8) == found.layout
    refused = propose(job, 8, H100, refuse=lambda layout: "no blocks" if layout.shard == 8 else None)
    assert refused.layout.shard != 8 and any(c.rejected == "no blocks" for c in refused.candidates)


def test_links_count_by_the_node() -> None:
    """Groups inside a node use its links; a group of k neighbours a node drives k cards, up to the inner links."""
    h = replace(H100, per_node=4)
    assert [h.neighbours(*group, 16) for group in [(4, 1), (2, 2), (4, 4), (8, 1), (8, 2), (16, 1), (3, 1)]] == [
        4, 2, 1, 4, 2, 4, 1,
    ]  # fmt: skip
    assert h.neighbours(3, 1, 3) == 3  # all on one node
    slow, fast = (replace(h, between_bytes_per_s=speed) for speed in (1e9, 50e9))
    job = Job(SMALL, 1, 256, 16)
    steps = [propose(job, 16, hardware).chosen.times.step for hardware in (slow, fast)]
    assert steps[0] > steps[1]


def test_it_can_be_read_and_stored() -> None:
    """The table marks the choice and ends with the reason; JSON carries every candidate."""
    found = propose(Job(SMALL, 8, 1024, 64), 16, H100)
    text = found.table(rows=3)
    assert text.endswith(found.why) and "\n->" in text and "more that fit" in text and "nothing is measured" in text
    stored = json.loads(json.dumps(found.to_dict()))
    assert len(stored["candidates"]) == len(found.candidates)
    chosen = stored["candidates"][stored["chosen"]]
    assert chosen["layout"]["shard"] == found.layout.shard and chosen["rejected"] is None
    assert chosen["stages"][0]["wire_bytes"] and chosen["seconds"]["step"] > 0


def test_this_machine() -> None:
    """Its memory is shared by the ranks of a node."""
    one, four = this_machine(1), this_machine(4)
    assert one.memory_bytes > 0 and four.per_node == 4
    if one.name == "cpu":
        assert one.memory_bytes == 4 * four.memory_bytes
    with pytest.raises(ValueError, match="lists no FLOP/s in fp4"):
        _ = replace(H100, precision="fp4").flops_per_s
