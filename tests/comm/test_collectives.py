"""Collectives on real ranks against a simulation in plain torch that sees all ranks' inputs: bit for bit."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.comm import (
    CODECS,
    Codec,
    Feedback,
    Meter,
    Nodes,
    all_gather,
    all_reduce,
    max_all_reduce,
    reduce_scatter,
    two_level_reduce_scatter,
)
from lowprec.numerics import Stream
from tests.ranks import run

pytestmark = pytest.mark.distributed

STREAM = Stream(seed=2, step=5, layer="comm")
WIRES = [
    *CODECS.values(),
    Codec("int4", rotation=64, rounding="stochastic"),
    Codec("fp8", rounding="stochastic"),
    Codec("nvfp4", rotation=16),
]


def gradient(rank: int, shape: tuple[int, ...]) -> Tensor:
    """What a rank brings; every rank can draw that of all."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank)) * (1 + rank)


def scattered(inputs: list[Tensor], rank: int, codec: Codec, keys: list[str]) -> Tensor:
    """The reduce-scatter of inputs (W, n) by their ranks, on one rank, without a network."""
    rows = [codec.encode(x, STREAM, key)[rank] for x, key in zip(inputs, keys)]
    return codec.decode_sum(torch.stack(rows), inputs[0].shape[1])


def _reduce_scatter() -> None:
    group, rank, ranks, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 333
    inputs = [gradient(r, (ranks, n)) for r in range(ranks)]
    keys = [f"k/{r}" for r in range(ranks)]
    assert group is not None
    for codec in WIRES:
        meter = Meter()
        got = reduce_scatter(inputs[rank], group, codec, meter, "g", STREAM, "k")
        assert got.dtype == torch.float32 and torch.equal(got, scattered(inputs, rank, codec, keys)), codec
        assert torch.equal(got, reduce_scatter(inputs[rank].view(-1), group, codec, None, "g", STREAM, "k"))
        assert meter.take() == {"g": ranks * codec.payload_bytes(n)}
    exact = inputs[0][rank]
    for other in inputs[1:]:
        exact = exact + other[rank]
    assert torch.equal(reduce_scatter(inputs[rank], group), exact)
    halves = [x.bfloat16() for x in inputs]  # bf16 travels as it is and is summed in fp32
    total = halves[0][rank].float()
    for half in halves[1:]:
        total = total + half[rank].float()
    assert torch.equal(reduce_scatter(halves[rank], group, CODECS["bf16"]), total)


@pytest.mark.parametrize("ranks", [2, 4])
def test_reduce_scatter_is_the_sum_of_decoded_rows(ranks: int) -> None:
    """Every codec, also rotated and stochastic: the fp32 sum, in rank order, of what the codes say."""
    run(ranks, _reduce_scatter)


def _all_reduce() -> list[bytes]:
    group, rank, ranks, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 1001
    assert group is not None
    inputs, results = [gradient(r, (7, 143)) for r in range(ranks)], []
    part = -(-n // ranks)
    for codec in WIRES:
        meter = Meter()
        got = all_reduce(inputs[rank], group, codec, meter, "g", STREAM, "k")
        padded = [torch.cat([x.view(-1), torch.zeros(part * ranks - n)]).view(ranks, part) for x in inputs]
        keys = [f"k/{r}" for r in range(ranks)]
        sums = [scattered(padded, r, codec, keys) for r in range(ranks)]
        gathered = [codec.decode(codec.encode(s[None], STREAM, f"k/sum/{r}"), part)[0] for r, s in enumerate(sums)]
        assert got.dtype == torch.float32 and torch.equal(got, torch.cat(gathered)[:n].view(7, 143)), codec
        assert meter.take() == {"g": 2 * ranks * codec.payload_bytes(part)}
        results.append(got.numpy().tobytes())
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_reduce_ends_with_the_same_bits_everywhere(ranks: int) -> None:
    """Sums are encoded once, by their owner, and decoded from the same codes by all, the owner too; ragged sizes."""
    results = run(ranks, _all_reduce)
    assert all(result == results[0] for result in results)


def _all_gather() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [gradient(r, (77,)).to(dtype) for r in range(ranks)]
        for codec in WIRES:
            meter = Meter()
            got = all_gather(inputs[rank], group, codec, meter, "w", STREAM, "k")
            rows = [codec.decode(codec.encode(x[None], STREAM, f"k/{r}"), 77, dtype) for r, x in enumerate(inputs)]
            assert got.dtype == dtype and torch.equal(got, torch.cat(rows)), codec
            assert meter.take() == {"w": ranks * codec.payload_bytes(77)}


def test_all_gather_decodes_everyones_codes() -> None:
    """In the dtype that went in; a rank's own row too comes from its codes."""
    run(3, _all_gather)


def _delayed() -> list[bytes]:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    results = []
    for late in range(ranks):  # every rank is the last to arrive once
        time.sleep(0.1 * (rank == late))
        results.append(reduce_scatter(gradient(rank, (ranks, 5000)), group, CODECS["fp8"]).numpy().tobytes())
    return results


def test_the_order_of_arrival_does_not_matter() -> None:
    """Sums of four numbers that round differently in another order are the same whoever comes last."""
    for results in run(4, _delayed):
        assert len(set(results)) == 1


def _two_level(inside: str, between: str) -> dict[str, int]:
    world, rank, ranks, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 130
    assert world is not None
    nodes = Nodes.split(world, 2)
    assert (nodes.inside.size(), nodes.between.size()) == (2, ranks // 2)
    first, second = Codec(inside, rounding="stochastic"), CODECS[between]
    inputs, meter = [gradient(r, (ranks, n)) for r in range(ranks)], Meter()
    got = two_level_reduce_scatter(inputs[rank], nodes, first, second, meter, "g", STREAM, "k")
    place, sums = rank % 2, []
    for node in range(
        ranks // 2
    ):  # what the neighbour of every node adds up for my place: chunks place, place + 2, ...
        members = [2 * node, 2 * node + 1]
        rows = [torch.stack([inputs[r][p::2].reshape(-1) for p in range(2)]) for r in members]
        sums.append(scattered(rows, place, first, [f"k/{r}" for r in members]).view(-1, n))
    senders = [f"k/between/{2 * node + place}" for node in range(ranks // 2)]
    assert torch.equal(got, scattered(sums, rank // 2, second, senders))
    exact = two_level_reduce_scatter(inputs[rank], nodes)
    torch.testing.assert_close(exact, torch.stack(inputs).sum(0)[rank])
    return meter.take()


def test_two_levels() -> None:
    """Reduced inside nodes, encoded again, reduced between them; between nodes half of the bytes go."""
    for taken in run(4, _two_level, "int4", "fp8"):
        assert taken == {
            "g": 2 * CODECS["fp8"].payload_bytes(130),
            "g_in_node": 2 * Codec("int4", rounding="stochastic").payload_bytes(260),
        }


def _max_all_reduce() -> tuple[list[float], dict[str, int]]:
    rank, meter = dist.get_rank(), Meter()
    x = torch.tensor([1.0 + rank, -7.0 if rank == 0 else 2.0, 0.0, math.inf if rank == 1 else 1.0, 3.0, 3.0])
    x[4 + rank % 2] = math.nan if rank < 2 else 1.0
    assert dist.group.WORLD is not None
    return max_all_reduce(x, dist.group.WORLD, meter).tolist(), meter.take()


def test_maxima_keep_nan() -> None:
    """Largest magnitudes; a NaN of the first or of the second rank is not lost; twice the buffer is counted."""
    for maxima, taken in run(3, _max_all_reduce):
        assert maxima[:4] == [3.0, 7.0, 0.0, math.inf] and math.isnan(maxima[4]) and math.isnan(maxima[5])
        assert taken == {"amax_all_reduce": 2 * 6 * 4}


def _broken_rank() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    for codec in WIRES:
        x = gradient(rank, (ranks, 300))
        x[1, 17] = math.nan if rank == 1 else x[1, 17]
        got = reduce_scatter(x, group, codec, None, "g", STREAM, "k")
        assert got[17].isfinite() == (rank != 1) and (rank == 1 or got.isfinite().all())
        assert not all_reduce(x, group, codec, None, "g", STREAM, "k")[1, 17].isfinite()


def test_a_nan_reaches_whoever_sums_it() -> None:
    """One bad number of one rank is visible in the shard it belongs to, and after an all-reduce everywhere."""
    run(2, _broken_rank)


def _alone() -> None:
    me = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x, meter, codec = torch.randn(1, 50), Meter(), CODECS["nvfp4"]
    assert torch.equal(reduce_scatter(x, me, codec, meter), x[0])
    assert torch.equal(all_gather(x[0], me, codec, meter), x)
    assert torch.equal(all_reduce(x, me, codec, meter), x)
    assert torch.equal(max_all_reduce(x, me, meter), x.abs())
    assert meter.take() == {}
    with pytest.raises(ValueError, match="3 values cannot be scattered over 2 ranks evenly"):
        reduce_scatter(torch.zeros(3), dist.group.WORLD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 ranks are no whole number of nodes of 3"):
        Nodes.split(dist.group.WORLD, 3)  # type: ignore[arg-type]


def test_a_group_of_one_sends_nothing() -> None:
    """No bytes, no rounding; and what cannot be cut evenly is refused before anything is sent."""
    run(2, _alone)


def _feedback() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    codec, memory = CODECS["int4"], Feedback("ef")
    memories = [torch.zeros(ranks, 96) for _ in range(ranks)]
    for step in range(4):
        inputs = [gradient(10 * step + r, (ranks, 96)) for r in range(ranks)]
        got = reduce_scatter(inputs[rank], group, codec, feedback=memory)
        memory.end_step(True)
        sent = [x + e for x, e in zip(inputs, memories)]
        assert torch.equal(got, scattered(sent, rank, codec, [""] * ranks))
        memories = [h - codec.decode(codec.encode(h), 96) for h in sent]


def test_feedback_changes_what_is_sent() -> None:
    """Every rank adds its own error of the step before."""
    run(2, _feedback)


def test_meter() -> None:
    """Counts by name, sorted, and starts anew."""
    meter = Meter()
    for name, count in (("b", 3), ("a", 1), ("b", 4)):
        meter.add(name, count)
    assert list(meter.take().items()) == [("a", 1), ("b", 7)] and meter.take() == {}


def test_replace_keeps_a_codec_usable() -> None:
    """A codec changed by replace counts its own bytes."""
    assert replace(CODECS["int4"], rotation=64).payload_bytes(65) == CODECS["int4"].payload_bytes(128)
