"""Activations between the ranks of a tensor- or context-parallel group, with their gradients.

================== ============================== ==============================
function           forward                        backward
================== ============================== ==============================
gather_sequence    all-gather along ``dim``       reduce-scatter along ``dim``
scatter_sequence   reduce-scatter along ``dim``   all-gather along ``dim``
copy_to            nothing                        all-reduce
================== ============================== ==============================

The first two are adjoints of each other (Megatron-LM, arXiv:1909.08053 and 2205.05198). Codec ``none`` sends
the tensor's own dtype: a gather is exact, and a sum is taken in fp32, in rank order, and rounded once. Another codec
quantises what crosses the wire in both directions, to nearest; blocks run along the flattened part of a rank.

Bytes are counted as ``activation_all_gather``, ``activation_reduce_scatter`` and ``activation_all_reduce``; ``kind``
replaces the first word (``kv`` for the keys and values of context parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.comm.codec import CODECS, PLAIN, Codec
from lowprec.comm.collectives import all_gather, all_reduce, reduce_scatter
from lowprec.comm.meter import Meter


@dataclass(frozen=True)
class _Wire:
    """Between whom, as what, and where it is counted."""

    group: dist.ProcessGroup
    codec: Codec | str
    meter: Meter | None
    kind: str

    def of(self, x: Tensor) -> Codec:
        if isinstance(self.codec, Codec):
            return self.codec
        for name, dtype in PLAIN.items():
            if self.codec == "none" and x.dtype == dtype:
                return CODECS[name]
        if self.codec not in CODECS:
            raise ValueError(f"activations of {x.dtype} have no codec '{self.codec}'; cast them to bf16 or fp32")
        return CODECS[self.codec]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """x (..., s, ...) of every rank -> (..., ranks * s, ...)."""
        first = x.movedim(dim, 0).contiguous()
        rows = all_gather(first.view(-1), self.group, self.of(x), self.meter, f"{self.kind}_all_gather")
        return rows.view(-1, *first.shape[1:]).movedim(0, dim).contiguous()

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """The sum over ranks of x (..., ranks * s, ...) -> this rank's (..., s, ...)."""
        ranks = self.group.size()
        if x.shape[dim] % ranks:
            raise ValueError(
                f"dimension {dim} of {tuple(x.shape)} cannot be scattered over {ranks} ranks evenly; pad it"
            )
        first = x.movedim(dim, 0).contiguous()
        part = reduce_scatter(first.view(-1), self.group, self.of(x), self.meter, f"{self.kind}_reduce_scatter")
        return part.to(x.dtype).view(-1, *first.shape[1:]).movedim(0, dim).contiguous()

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return all_reduce(x, self.group, self.of(x), self.meter, f"{self.kind}_all_reduce").to(x.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: _Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.scatter(dy, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: _Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.gather(dy, ctx.dim), None, None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: _Wire) -> Tensor:
        ctx.wire = wire
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.reduce(dy), None


def gather_sequence(
    x: Tensor,
    dim: int,
    group: dist.ProcessGroup,
    codec: Codec | str = "none",
    meter: Meter | None = None,
    kind: str = "activation",
) -> Tensor:
    """x (..., s, ...) of every rank, joined along ``dim`` in rank order: (..., ranks * s, ...), x's dtype.

    Its gradient is summed over ranks, and each keeps its part. ``codec``: ``none``, the name of a codec, or a codec.
    """
    return x if group.size() == 1 else _Gather.apply(x, _Wire(group, codec, meter, kind), dim)


def scatter_sequence(
    x: Tensor,
    dim: int,
    group: dist.ProcessGroup,
    codec: Codec | str = "none",
    meter: Meter | None = None,
    kind: str = "activation",
) -> Tensor:
    """The sum over ranks of x (..., ranks * s, ...), of which this rank keeps its part along ``dim``: (..., s, ...),
    x's dtype.

    Raises:
        ValueError: if the ranks do not divide the dimension.
    """
    return x if group.size() == 1 else _Scatter.apply(x, _Wire(group, codec, meter, kind), dim)


def copy_to(
    x: Tensor,
    group: dist.ProcessGroup,
    codec: Codec | str = "none",
    meter: Meter | None = None,
    kind: str = "activation",
) -> Tensor:
    """x, which all ranks have alike; its gradient is summed over ranks."""
    return x if group.size() == 1 else _CopyTo.apply(x, _Wire(group, codec, meter, kind))
