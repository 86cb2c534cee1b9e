"""FSDP2's extension points: what its all-gather, reduce-scatter and all-reduce become.

FSDP2 moves one flat buffer for each module that was wrapped: the parameters it gathers, one after the other, or their
gradients, ``(ranks, n)`` rows of padded shards. A module takes an object for each direction::

    module.set_custom_all_gather(MeteredAllGather(meter, nodes=nodes))              # hpZ with nodes
    module.set_custom_reduce_scatter(GradientReduceScatter(codec, meter, stream))
    module.set_all_reduce_hook(all_reduce_hook(codec, between, meter))              # HSDP: sharded inside a node

One object a module, never shared: they keep state of that module's buffer. Gradients must be summed and not averaged,
and in fp32 (``set_gradient_divide_factor(1.0)``, ``set_force_sum_reduction_for_comms(True)``,
``reduce_dtype=torch.float32``). For HSDP with a hook, shard over the inner mesh alone: the all-reduce of FSDP2's own
HSDP cannot be replaced. The hook runs with every reduce-scatter, so accumulate micro-batches with
``set_requires_gradient_sync(False)``, which holds both back.

hpZ (ZeRO++, arXiv:2306.10209): weights are gathered twice a step, for the forward and for the backward pass, and do
not change in between. From the first gather each of the L ranks of a node keeps 1/L of the whole; later gathers are
served inside the node, bit for bit the same. Price: 1/L of all parameters in memory, in the form in which they travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lowprec.comm.codec import CODECS, Codec
from lowprec.comm.collectives import Nodes, all_reduce, reduce_scatter, two_level_reduce_scatter
from lowprec.comm.feedback import Feedback
from lowprec.comm.meter import Meter
from lowprec.numerics import Stream

Streams = Callable[[], Stream]
"""The stream of the step under way, e.g. ``lambda: clock.stream("comm.layers.0")``."""


class _Allocate:
    """Memory for a collective: plain."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GradientReduceScatter(_Allocate, ReduceScatter):
    """Gradients as codes, summed in fp32.

    Args:
        codec: how they travel; with ``nodes``: inside a node.
        meter: counts ``gradient_reduce_scatter``.
        stream: random bits, for a stochastic codec. key: of this module.
        feedback: error memory of this module; whoever judges the step calls its ``end_step``.
        nodes: reduce inside nodes first, then between them with ``between`` (default: the same codec).
    """

    def __init__(
        self,
        codec: Codec = CODECS["fp32"],
        meter: Meter | None = None,
        stream: Streams | None = None,
        key: str = "gradient",
        feedback: Feedback | None = None,
        nodes: Nodes | None = None,
        between: Codec | None = None,
    ) -> None:
        self.codec, self.meter, self.stream, self.key = codec, meter, stream, key
        self.feedback, self.nodes, self.between = feedback, nodes, between

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """(ranks * n,) -> this rank's (n,), summed.

        Raises:
            ValueError: if asked for anything but a sum.
        """
        if op != dist.ReduceOp.SUM:
            raise ValueError(
                f"gradients are summed here, FSDP2 asks for {op}: call set_gradient_divide_factor(1.0) and"
                " set_force_sum_reduction_for_comms(True) on the module"
            )
        random = (self.stream() if self.stream else None, self.key, self.feedback)
        if self.nodes is None:
            total = reduce_scatter(input_tensor, group, self.codec, self.meter, "gradient_reduce_scatter", *random)
        else:
            total = two_level_reduce_scatter(
                input_tensor, self.nodes, self.codec, self.between, self.meter, "gradient_reduce_scatter", *random
            )
        output_tensor.copy_(total)


class MeteredAllGather(_Allocate, AllGather):
    """FSDP2's own all-gather, counted; with ``nodes``, repeated gathers stay inside the node (hpZ).

    Args:
        meter: counts ``weight_all_gather``, and ``weight_all_gather_in_node`` for what hpZ serves.
        nodes: how the group that shards is cut into nodes; None = no hpZ.
    """

    def __init__(self, meter: Meter | None = None, nodes: Nodes | None = None) -> None:
        self.meter, self.nodes = meter, nodes
        self._secondary: Tensor | None = None  # (bytes / L,) uint8

    def new_weights(self) -> None:
        """The parameters have changed: the next gather is a full one. Call it after every optimizer step and load."""
        self._secondary = None

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Every rank's (n,) -> (ranks * n,), any dtype that the library carries.

        Raises:
            ValueError: if the nodes are not a division of the group.
        """
        if self.nodes is None:
            self._count("weight_all_gather", output_tensor)
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        inside = self.nodes.inside
        if inside.size() * self.nodes.between.size() != group.size():
            raise ValueError(
                f"hpZ: nodes of {inside.size()} ranks x {self.nodes.between.size()} are not the group of"
                f" {group.size()} that shards the parameters; make them with Nodes.split(group, ranks_per_node)"
            )
        whole_B = output_tensor.view(-1).view(torch.uint8)
        part = whole_B.numel() // inside.size()
        if self._secondary is not None and self._secondary.numel() == part:
            if inside.size() > 1:
                dist.all_gather_single(whole_B, self._secondary, group=inside)
                self._count("weight_all_gather_in_node", output_tensor)
            else:
                whole_B.copy_(self._secondary)
        else:
            dist.all_gather_single(output_tensor, input_tensor, group=group)
            self._count("weight_all_gather", output_tensor)
            self._secondary = whole_B[inside.rank() * part :][:part].clone()
        return None

    def _count(self, name: str, gathered: Tensor) -> None:
        if self.meter is not None:
            self.meter.add(name, gathered.numel() * gathered.itemsize)


def all_reduce_hook(
    codec: Codec,
    group: dist.ProcessGroup,
    meter: Meter | None = None,
    stream: Streams | None = None,
    key: str = "gradient",
) -> Callable[[Tensor], None]:
    """For ``FSDPModule.set_all_reduce_hook``: sums the reduced shard over ``group`` (HSDP between nodes), in place."""

    def hook(reduced: Tensor) -> None:
        random = (stream() if stream else None, f"{key}/all_reduce")
        reduced.copy_(all_reduce(reduced, group, codec, meter, "gradient_all_reduce", *random))

    return hook
