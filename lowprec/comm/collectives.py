"""Collectives of codes: what is sent is bytes, what is summed is fp32.

A library's reduce-scatter adds in the dtype it sends: bf16 would be rounded after every addition, and fp8 and fp4
cannot be added at all. So each sum here is an all-to-all and a local sum (ZeRO++, arXiv:2306.10209):

- ``reduce_scatter``: row d of x goes to rank d as codes; a rank decodes the rows it gets and adds them in rank order.
- ``all_gather``: every rank's codes to all.
- ``all_reduce``: reduce_scatter, then all_gather of the encoded sums; also a rank's own part is decoded from its
  codes, so all end with the same bits.

An all-to-all sends ``(W - 1) / W`` of the input, as the best reduce-scatter does, in one hop. Adding in rank order
makes a result independent of who arrives first, and of the library. fp32 and bf16 travel in the same way.

Two levels (:class:`Nodes`): the ranks of a node reduce among themselves first, so that 1/L of the bytes is sent between
nodes (L ranks a node), at the price of encoding twice. HSDP's mesh has the two levels already: ``reduce_scatter``
inside, ``all_reduce`` between.

Bytes are counted by the convention of :mod:`lowprec.comm.meter`. A group of one rank sends nothing, and its numbers
are not even rounded. What this is not: overlapped. A call returns when its result is there (on a GPU: enqueued).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowprec.comm.codec import CODECS, Codec
from lowprec.comm.feedback import Feedback
from lowprec.comm.meter import Meter
from lowprec.numerics import Stream

FP32 = CODECS["fp32"]


@torch.no_grad()
def reduce_scatter(
    x_WN: Tensor,
    group: dist.ProcessGroup,
    codec: Codec = FP32,
    meter: Meter | None = None,
    name: str = "gradient_reduce_scatter",
    stream: Stream | None = None,
    key: str = "",
    feedback: Feedback | None = None,
) -> Tensor:
    """Sum over ranks, of which each keeps a part.

    Args:
        x_WN: (ranks, n) fp32 or bf16, or flat (ranks * n,): row d is for rank d of the group.
        codec: how rows travel.
        meter, name: where the bytes are counted.
        stream, key: random bits of stochastic rounding; the rank is added to the key.
        feedback: memory of earlier errors, added before encoding.

    Returns:
        (n,) fp32: the sum over ranks of this rank's row.

    Raises:
        ValueError: if x cannot be split evenly among the ranks.
    """
    ranks = group.size()
    if x_WN.numel() % ranks:
        raise ValueError(f"{x_WN.numel()} values cannot be scattered over {ranks} ranks evenly; pad them")
    x_WN = x_WN.reshape(ranks, -1)
    if ranks == 1:
        return x_WN[0].float()
    n = x_WN.shape[1]
    h_WN = x_WN if feedback is None else feedback.compensate(x_WN)
    payload_WB = codec.encode(h_WN, stream, _own(key))
    if feedback is not None:
        feedback.update(h_WN, codec.decode(payload_WB, n))
    received_WB = torch.empty_like(payload_WB)
    dist.all_to_all_single(received_WB, payload_WB, group=group)
    _count(meter, name, payload_WB.numel())
    return codec.decode_sum(received_WB, n)


@torch.no_grad()
def all_gather(
    x_N: Tensor,
    group: dist.ProcessGroup,
    codec: Codec = FP32,
    meter: Meter | None = None,
    name: str = "weight_all_gather",
    stream: Stream | None = None,
    key: str = "",
) -> Tensor:
    """Every rank's x, on every rank, the same bits everywhere.

    Args:
        x_N: (n,) fp32 or bf16; all ranks bring as many.

    Returns:
        (ranks, n) in x's dtype.
    """
    ranks = group.size()
    if ranks == 1:
        return x_N[None]
    payload_1B = codec.encode(x_N[None], stream, _own(key))
    gathered_WB = payload_1B.new_empty(ranks, payload_1B.shape[1])
    dist.all_gather_single(gathered_WB.view(-1), payload_1B.view(-1), group=group)
    _count(meter, name, gathered_WB.numel())
    return codec.decode(gathered_WB, x_N.numel(), x_N.dtype)


@torch.no_grad()
def all_reduce(
    x: Tensor,
    group: dist.ProcessGroup,
    codec: Codec = FP32,
    meter: Meter | None = None,
    name: str = "gradient_all_reduce",
    stream: Stream | None = None,
    key: str = "",
) -> Tensor:
    """Sum over ranks: fp32 of x's shape, the same bits on every rank. x: fp32 or bf16."""
    ranks = group.size()
    if ranks == 1:
        return x.float()
    flat = x.reshape(-1)
    padded = F.pad(flat, (0, -flat.numel() % ranks))
    part = reduce_scatter(padded, group, codec, meter, name, stream, key)
    whole = all_gather(part, group, codec, meter, name, stream, f"{key}/sum")
    return whole.view(-1)[: x.numel()].view(x.shape)


@torch.no_grad()
def max_all_reduce(
    x: Tensor, group: dist.ProcessGroup, meter: Meter | None = None, name: str = "amax_all_reduce"
) -> Tensor:
    """The largest magnitude over ranks, element by element: fp32 of x's shape; NaN where any rank has NaN.

    Stack the maxima of many tensors and call it once. Compared as integers: the bits of magnitudes are in the order
    of their values, NaN above all, whereas a library's floating-point maximum may lose a NaN.
    """
    if group.size() == 1:
        return x.float().abs()
    bits = x.float().abs().contiguous().view(torch.int32)
    dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
    _count(meter, name, 2 * bits.numel() * bits.itemsize)
    return bits.view(torch.float32)


@dataclass(frozen=True)
class Nodes:
    """A group of J * L ranks as J nodes of L neighbours: rank ``j * L + l`` of the group is the l-th of node j.

    Attributes:
        inside: the L ranks of this rank's node.
        between: the J ranks, one a node, that have this rank's place in their nodes.
    """

    inside: dist.ProcessGroup
    between: dist.ProcessGroup

    @staticmethod
    def split(group: dist.ProcessGroup, ranks_per_node: int, timeout: timedelta | None = None) -> Nodes:
        """Cut a group into nodes. Collective: all ranks of the group must call it. timeout: of the new groups.

        Raises:
            ValueError: if nodes of that size do not fill the group.
        """
        ranks = group.size()
        if ranks_per_node < 1 or ranks % ranks_per_node:
            raise ValueError(
                f"{ranks} ranks are no whole number of nodes of {ranks_per_node}; choose a size that divides them"
            )
        members = dist.get_process_group_ranks(group)
        own = members.index(dist.get_rank())
        node, place = divmod(own, ranks_per_node)
        inside = members[node * ranks_per_node : (node + 1) * ranks_per_node]
        between = members[place::ranks_per_node]
        return Nodes(*(dist.new_group(part, timeout, use_local_synchronization=True) for part in (inside, between)))


@torch.no_grad()
def two_level_reduce_scatter(
    x_WN: Tensor,
    nodes: Nodes,
    codec: Codec = FP32,
    codec_between: Codec | None = None,
    meter: Meter | None = None,
    name: str = "gradient_reduce_scatter",
    stream: Stream | None = None,
    key: str = "",
    feedback: Feedback | None = None,
) -> Tensor:
    """:func:`reduce_scatter` over the nodes' group, first inside each node, then between nodes (ZeRO++'s qgZ).

    ``codec_between`` (default: the same) re-encodes the sums of a node. Bytes inside a node are counted as
    ``name + "_in_node"``, those between nodes as ``name``.
    """
    inside, between = nodes.inside.size(), nodes.between.size()
    chunks_JLn = x_WN.reshape(between, inside, -1)
    rows_LN = chunks_JLn.transpose(0, 1).reshape(inside, -1)  # what place l of any node will keep, together
    sums_N = reduce_scatter(rows_LN, nodes.inside, codec, meter, f"{name}_in_node", stream, key, feedback)
    return reduce_scatter(sums_N, nodes.between, codec_between or codec, meter, name, stream, f"{key}/between")


def _own(key: str) -> str:
    """A key of random bits that no other rank has: equal noise on all ranks would not average out."""
    return f"{key}/{dist.get_rank()}"


def _count(meter: Meter | None, name: str, count_bytes: int) -> None:
    if meter is not None:
        meter.add(name, count_bytes)
