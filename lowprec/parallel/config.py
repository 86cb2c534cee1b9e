"""How a run is laid out over processes."""

from dataclasses import dataclass
from enum import Enum


class Recompute(Enum):
    """Which activations are computed again in the backward pass instead of kept."""

    none = "none"
    full = "full"  # every transformer block keeps only its input


@dataclass
class ParallelConfig:
    """One data-parallel axis: every rank holds a shard of every parameter (FSDP2, ZeRO-3).

    The number of ranks is not a setting: it is what `torchrun --nproc-per-node N` starts.
    """

    recompute: Recompute = Recompute.none
    reshard_after_forward: bool = (
        True  # false keeps gathered weights until the backward pass: more memory, less traffic
    )
    timeout_s: int = 1800  # a collective that waits longer than this ends the run
