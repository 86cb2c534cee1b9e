"""Context parallelism: each rank has a part of every sequence, and attention gathers keys and values.

All but attention treats tokens one by one, so a rank can run it on its own. For attention it gathers k and v of the
whole sequence, attends with its own queries, and the gradients of k and v are summed and scattered back. That is what
Llama 3 does (arXiv:2407.21783, section 3.3.2; also arXiv:2411.01783): simpler than passing keys round a ring, any mask
works, and with grouped heads k and v are small.

A causal mask makes late tokens expensive. So a sequence is cut in 2 cp chunks, and rank r has chunk r and chunk
2 cp - 1 - r: together as many visible keys on every rank (*zigzag*)::

    cp = 2       chunk 0 1 2 3        rank 0: chunks 0, 3        rank 1: chunks 1, 2

A chunk's queries see the keys up to the chunk's end, and no others are multiplied: rows of attention are computed over
the same keys as in one process wherever its blocks of 128 queries begin at a chunk.

All ranks of a group load the same rows; positions and documents come from the whole row, and each rank keeps what
belongs to its tokens (``model.part``). Parameters are sharded over ``cp`` like over ``shard``, and FSDP2 sums their
gradients over both. A quantised layer knows from its ``cuts`` that its tokens are a part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import lcm

import torch
from torch import Tensor

from lowprec.comm.activations import gather_sequence
from lowprec.comm.codec import Codec
from lowprec.comm.meter import Meter
from lowprec.linear import Plan
from lowprec.linear.call import Cut
from lowprec.model import Transformer
from lowprec.model.attention import Attention
from lowprec.parallel.mesh import Axis, World

CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
"""Tokens of which a chunk is a multiple, the first that suits the recipes: blocks of tokens must not straddle ranks."""


def token_multiple(cp: int, tp: int, chunk: int = CHUNKS[0]) -> int:
    """What the length of every sequence must be a multiple of."""
    return lcm(2 * cp * chunk if cp > 1 else 1, cp * tp)


def context_parallel(
    model: Transformer, plan: Plan, world: World, codec: Codec | str = "none", meter: Meter | None = None
) -> None:
    """Has a model run on this rank's tokens, of the ``cp`` axis of the mesh; where ``cp`` and ``tp`` are 1, on all.

    Args:
        model: with ``plan`` applied; its ``multiple`` is set too.
        codec: what keys and values travel as; ``none`` is exact.
        meter: where their bytes are counted, as ``kv_...``.

    Raises:
        ValueError: if a recipe cannot do with a part of the tokens, or attention itself is quantised.
    """
    axis, tp = world.axis("cp"), world.axis("tp").size
    if axis.size == tp == 1:
        return
    chunk = _chunk(plan, axis.size) if axis.size > 1 else 1
    model.multiple = token_multiple(axis.size, tp, chunk)
    model.part = OwnTokens(axis, tp, model.multiple, plan, meter)
    if axis.size == 1:
        return
    if any(core.recipe for core in plan.cores.values()):
        raise ValueError(
            f"parallel.cp={axis.size}: quantised attention is computed over whole sequences only; leave out "
            "precision.attention, or set parallel.cp=1"
        )
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = GatheringCore(module.core, axis, codec, meter)


def _chunk(plan: Plan, cp: int) -> int:
    """The shortest chunks that no recipe of the plan refuses. Raises the refusal of the longest if there are none."""
    cuts = {
        name: {**{axis: cut.ranks for axis, cut in layer.cuts.items()}, "tokens": cp}
        for name, layer in plan.layers.items()
    }
    for chunk in CHUNKS[:-1]:
        with suppress(ValueError):
            plan.refuse_cuts(cuts, tokens=chunk)
            return chunk
    plan.refuse_cuts(cuts, tokens=CHUNKS[-1])
    return CHUNKS[-1]


@dataclass(frozen=True)
class Zigzag:
    """Which tokens of a sequence a rank has: chunks r and 2 cp - 1 - r of 2 cp."""

    rank: int
    ranks: int
    length: int

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """x with the rank's tokens on ``dim``."""
        chunks = x.chunk(2 * self.ranks, dim)
        return torch.cat([chunks[self.rank], chunks[2 * self.ranks - 1 - self.rank]], dim)

    def __call__(self, rows: int) -> Tensor:
        """(rows,) int64: where the rows of a matrix of B sequences' own tokens are among all B * length."""
        positions_T = self.cut(torch.arange(self.length), 0)
        starts_B = torch.arange(rows // len(positions_T)) * self.length
        return (starts_B[:, None] + positions_T).flatten()


class OwnTokens:
    """What a model's ``part`` becomes: it cuts sequences, refuses those that cannot be, and tells quantised layers."""

    def __init__(
        self, axis: Axis, tp: int, multiple: int, plan: Plan | None = None, meter: Meter | None = None
    ) -> None:
        self.axis, self.tp, self.multiple, self.plan = axis, tp, multiple, plan
        self.count = partial(meter.add, "amax_all_reduce") if meter else None
        self._zigzag = Zigzag(axis.rank, axis.size, 0)

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """x with the tokens of this rank on ``dim``. Raises ValueError if its length cannot be cut evenly."""
        length, cp = x.shape[dim], self.axis.size
        if length != self._zigzag.length:
            if length % self.multiple:
                raise ValueError(
                    f"a sequence of {length} tokens cannot be cut for parallel.cp={cp} and parallel.tp={self.tp} "
                    f"with these recipes: make data.seq_len a multiple of {self.multiple}"
                )
            self._zigzag = Zigzag(self.axis.rank, cp, length)
            cut = Cut(self.axis.group, cp, self.axis.rank, self._zigzag, self.count)
            for layer in self.plan.layers.values() if self.plan and cp > 1 else ():
                layer.cuts = {**layer.cuts, "tokens": cut}
        return x if cp == 1 else self._zigzag.cut(x, dim)


class GatheringCore:
    """The core of an attention whose queries are this rank's and whose keys are everyone's."""

    def __init__(
        self, plain: Callable[..., Tensor], axis: Axis, codec: Codec | str = "none", meter: Meter | None = None
    ) -> None:
        self.plain, self.axis, self.codec, self.meter = plain, axis, codec, meter

    def __call__(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_B1TU: Tensor | None) -> Tensor:
        """Causal attention -> y_BHTD in q's dtype; bias: rows of own queries, all U keys in their true order."""
        k_BKUD, v_BKUD = self._gather(torch.stack([k_BKTD, v_BKTD])).unbind()
        size = q_BHTD.shape[2] // 2
        done = []
        for half, chunk in enumerate((self.axis.rank, 2 * self.axis.size - 1 - self.axis.rank)):
            own, seen = slice(half * size, (half + 1) * size), (chunk + 1) * size
            bias = None if bias_B1TU is None else bias_B1TU[..., own, :seen]
            done.append(self.plain(q_BHTD[:, :, own], k_BKUD[:, :, :seen], v_BKUD[:, :, :seen], bias))
        return torch.cat(done, dim=2)

    @torch.compiler.disable
    def _gather(self, kv_2BKTD: Tensor) -> Tensor:
        """kv_2BKUD, in the order of the sequence."""
        kv = gather_sequence(kv_2BKTD, 3, self.axis.group, self.codec, self.meter, "kv")
        chunks = kv.chunk(2 * self.axis.size, 3)  # 0, 2c-1, 1, 2c-2, ...
        return torch.cat([*chunks[::2], *chunks[::-2]], 3)
