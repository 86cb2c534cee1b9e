"""Wire: how many bytes each thing that travels is, so that any `comm=` is counted to the byte.

FSDP2 moves one flat buffer a unit (a block, or the root). To its all-gather every rank brings its rows of each
parameter: codes, a codec's payload, or the rows themselves, as :mod:`lowprec.parallel.transport` decides. Its
reduce-scatter takes one row of gradients for every rank, all parameters in a line, in one codec. Everything is counted
as :mod:`lowprec.comm.meter` counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowprec.comm import CODECS, CommConfig, FeedbackKind
from lowprec.linear import Plan
from lowprec.linear.weight import codes_refusal, needs_amax, payload_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter, of one tensor-parallel rank."""

    sent: int  # bytes that a gather yields
    held: int  # bytes of it in memory
    maxima: int = 0  # fp32 maxima that ranks agree on before they encode it
    encoded: int = 0  # bytes of a rank's rows as they travel, kept for all gathers of a step


@dataclass(frozen=True)
class Wire:
    """Bytes by what they are of.

    Attributes:
        weight: (name of a parameter, its shape on one tensor-parallel rank, ranks that share it) -> `Weight`.
        gradient: (values of a rank's row, rows) -> what a reduce-scatter of a unit takes in, all rows.
        between: the same for a second level, between nodes, and for either half of an all-reduce between copies (HSDP).
        activation: (values of one rank's part, ranks) -> what a gather of activations yields, or a scatter takes in.
        hpz: weights are gathered inside the node after the first time in a step (ZeRO++, arXiv:2306.10209).
        two_level: gradients are summed inside the node first, where there are no copies.
        node: ranks of a node, for both.
        feedback: bytes of error feedback for every value whose gradient a rank sends.
    """

    weight: Callable[[str, Shape, int], Weight]
    gradient: Callable[[int, int], int]
    between: Callable[[int, int], int]
    activation: Callable[[int, int], int]
    hpz: bool = False
    two_level: bool = False
    node: int = 1
    feedback: float = 0.0

    @staticmethod
    def plain(weight_bytes: int = 2, gradient_bytes: int = 4, root_bytes: int = 4) -> "Wire":
        """So many bytes a value: of blocks' weights (and activations), of all gradients, of the root's weights."""

        def weight(name: str, shape: Shape, ranks: int) -> Weight:
            size = padded(shape, ranks) * (weight_bytes if name.startswith("layers.") else root_bytes)
            return Weight(size, size)

        def gradient(values: int, rows: int) -> int:
            return values * rows * gradient_bytes

        return Wire(weight, gradient, gradient, lambda values, ranks: values * ranks * weight_bytes)

    @staticmethod
    def of(comm: CommConfig, plan: Plan, dtype: torch.dtype, ranks_per_node: int = 1) -> "Wire":
        """What `comm` makes of the layers of `plan` as their recipes are at the start.

        dtype: of activations, and of the weights that blocks compute with.
        """
        recipes = {f"{entry.layer}.weight": plan.precision.linear[entry.recipe] for entry in plan.entries}
        activation = CODECS[comm.activations or ("fp32" if dtype == torch.float32 else "bf16")]
        feedback = {
            FeedbackKind.none: 0.0,
            FeedbackKind.ef: 4.0,
            FeedbackKind.loco: CODECS["fp8"].bits_per_value(128) / 8,
        }

        def weight(name: str, shape: Shape, ranks: int) -> Weight:
            values = padded(shape, ranks)
            plain = values * (dtype.itemsize if name.startswith("layers.") else 4)
            if len(shape) != 2 or shape[0] % ranks or ranks == 1:  # vectors, filters of convolutions
                return Weight(plain, plain)
            rows, recipe = shape[0] // ranks, recipes.get(name)
            in_place = name.startswith("layers.") or dtype == torch.float32  # the root's gradients are fp32
            may = comm.codes and in_place and recipe is not None and recipe.quantized
            if may and recipe and codes_refusal(recipe, rows, shape[1]) is None:
                size = ranks * payload_bytes(recipe, rows, shape[1])
                return Weight(size, size, int(needs_amax(recipe)), size // ranks)
            codec = comm.weight_codec
            part = codec.payload_bytes(values // ranks) if codec else 0
            return Weight(ranks * part if codec else plain, plain, 0, part)

        return Wire(
            weight,
            lambda values, rows: rows * comm.gradient_codec.payload_bytes(values),
            lambda values, rows: rows * comm.between_codec.payload_bytes(values),
            lambda values, ranks: ranks * activation.payload_bytes(values),
            comm.hpz,
            bool(comm.gradients_between),
            comm.ranks_per_node or ranks_per_node,
            feedback[comm.feedback],
        )


def padded(shape: Shape, ranks: int) -> int:
    """Values of a parameter in FSDP2's buffers: all ranks get as many rows, so the last ones may get zeros."""
    return -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
