"""Call: one use of a layer, and what all steps of a product share: sizes, padding, rotation, and things made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Side, rotator
from lowprec.linear.codes import padded
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.linear.state import LayerState
from lowprec.numerics import QTensor, Stream
from lowprec.numerics.hadamard import hadamard_order_refusal

TILE = 16
"""Under ``pad: zero`` every size is padded to a multiple of this: kernels work in tiles; zeros change no number."""

TRANSPOSED = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}
"""Which operands of a product are transposes of the layer's x (T, K), w (N, K), dy (T, N)."""


class Shared:
    """The last things made from an activation: q, k and v (gate and up) multiply the same one, made once.

    An entry holds its tensor, so neither memory nor contents can change under it; a new activation takes its place.
    """

    def __init__(self) -> None:
        self._slots: dict[str, tuple[tuple[Any, ...], Tensor, Any]] = {}

    def get(self, slot: str, x: Tensor, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make()`` gives for this very x and ``what`` else it depends on; made once while the slot is theirs."""
        if x.is_inference():
            return make()
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, *what)
        found = self._slots.get(slot)
        if found is None or found[0] != key:
            self._slots[slot] = found = (key, x.detach(), make())  # without its graph, which would live on with it
        return found[2]

    def clear(self) -> None:
        """Let go of everything."""
        self._slots.clear()


@dataclass(frozen=True)
class Policy:
    """How a model's products are served, whatever the recipe."""

    backend: str = "auto"
    pad: str = "zero"  # "zero" | "refuse"
    save: str = "inputs"  # what is kept for the backward: "inputs" | "codes"
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)


@dataclass(frozen=True)
class Cut:
    """One axis of a layer's matrices (``tokens``, ``in``, ``out``) of which this rank holds a part.

    Attributes:
        group: the ranks that share the axis.
        ranks: how many.
        rank: which part is here.
        index: tokens only: number of this rank's rows -> int64 place of each in the whole micro-batch. None: parts are
            contiguous and in the order of ranks, as they always are for ``in`` and ``out``.
        count: called with the logical bytes of every maximum that is all-reduced over the group.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int
    index: Callable[[int], Tensor] | None = None
    count: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Call:
    """One use of a layer: what its products need besides matrices."""

    recipe: LinearRecipe
    stream: Stream
    policy: Policy = Policy()
    state: LayerState | None = None
    observe: bool = False  # whether the layer's memory takes notice (training, not evaluation)
    cuts: Mapping[str, Cut] = field(default_factory=dict)  # the axes of which this rank holds a part
    sizes: Mapping[str, int] | None = None  # if any are cut: this rank's tokens, in, out (lowprec.linear.cut.bound)


def operand_of(role: str, side: Side, call: Call) -> tuple[str, Operand]:
    """Name (x, w or dy) and spec of one side of a product."""
    return GEMM_OPERANDS[role][side == "b"], getattr(getattr(call.recipe, role), side)


def pad_to(x: Any, rows: int, cols: int) -> Any:
    """Zero-pad a matrix (possibly a transposed view, or codes) to (rows, cols), keeping its memory order."""
    if x.shape == (rows, cols):
        return x
    if isinstance(x, QTensor):
        return padded(x, rows, cols)
    if x.stride(0) < x.stride(1):
        return pad_to(x.T, cols, rows).T
    return F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))


def padded_sizes(gemm: Gemm, m: int, n: int, k: int, pad: str) -> tuple[int, int, int]:
    """(m, n, k) rounded up to whole blocks, tiles and, where a whole axis is rotated, to an order that exists."""
    tile = TILE if pad == "zero" and not gemm.counts_zeros else 1
    sizes = []
    for size, multiple, rotation in zip((m, n, k), gemm.multiples, (gemm.outer_a, gemm.outer_b, gemm.inner)):
        step = math.lcm(multiple, tile)
        size += -size % step
        while rotation is not None and rotation.size == 0 and pad == "zero" and hadamard_order_refusal(size):
            size += step
        sizes.append(size)
    return sizes[0], sizes[1], sizes[2]


def turned(x: Tensor, rotation: Rotation, call: Call, role: str, inverse: bool = False) -> Tensor:
    """x (rows, cols), its last axis rotated or turned back."""
    return oracle.turned(x, rotation, call.stream, role, inverse, rotator(call.policy.backend, x.device))
