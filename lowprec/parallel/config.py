"""How a run is laid out over processes: the sizes of five mesh axes, outermost first.

    pp         pipeline stages            each rank holds some of the blocks
    replicate  copies of the parameters   gradients are all-reduced (HSDP, with shard)
    shard      shards of the parameters   FSDP2, ZeRO-3
    cp         parts of every sequence    context parallel: keys and values are gathered
    tp         parts of every matrix      tensor parallel with sequence parallel

Their product is the number of ranks, which is not a setting: it is what `torchrun` starts. A size of 0 stands for all
ranks that are left, so one file serves any number. Neighbours, which share a node, differ in the innermost axis.
"""

from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any


class EngineKind(Enum):
    """Who shards parameters and optimizer."""

    fsdp = "fsdp"  # torch's FSDP2
    deepspeed = "deepspeed"  # DeepSpeed's ZeRO (extra `deepspeed`)


class Recompute(Enum):
    """Which activations are computed again in the backward pass instead of kept."""

    none = "none"
    selective = "selective"  # attention's core and the MLP's activation, which are cheap for their size
    full = "full"  # every transformer block keeps only its input


@dataclass
class ParallelConfig:
    """The axes (see above), and how each is used."""

    engine: EngineKind = EngineKind.fsdp
    auto: bool = False  # choose the sizes from model, sequence, device memory and links (tools/plan.py --parallel)
    pp: int = 1
    replicate: int = 1
    shard: int = 0
    cp: int = 1
    tp: int = 1
    virtual_stages: int = 1  # pipeline stages a rank: 1 = 1F1B, more = interleaved 1F1B
    recompute: Recompute = Recompute.none
    compile: bool = False  # torch.compile of every block; quantised products stay outside the graphs
    compile_with: str = "inductor"  # the backend of torch.compile
    reshard_after_forward: bool = (
        True  # false keeps gathered weights until the backward pass: more memory, less traffic
    )
    timeout_s: int = 1800  # a collective that waits longer than this ends the run
    hang_s: float = 600.0  # without progress for so long, the rank that hangs is named and the run ends; 0 = off
    zero_stage: int = 2  # of the deepspeed engine: 1, 2 or 3
    deepspeed: dict[str, Any] = field(default_factory=dict)  # its own settings, passed through

    def sizes(self, ranks: int) -> dict[str, int]:
        """{axis: size} for so many ranks, outermost first. Raises ValueError if they cannot be laid out like this."""
        if self.timeout_s < 1:
            raise ValueError(f"parallel.timeout_s={self.timeout_s} must be at least 1 second")
        if self.hang_s < 0:
            raise ValueError(f"parallel.hang_s={self.hang_s} must not be negative (0 switches the watchdog off)")
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 0:
                raise ValueError(f"parallel.{axis}={size}: give a size of at least 1, or 0 for all ranks that are left")
        free = [axis for axis, size in sizes.items() if size == 0]
        if len(free) > 1:
            raise ValueError(f"parallel.{' and parallel.'.join(free)} are both 0 (all that are left): give one a size")
        fixed = prod(size for size in sizes.values() if size)
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        if free:
            if ranks % fixed:
                raise ValueError(
                    f"parallel: {ranks} ranks are no multiple of {text}; start a multiple of {fixed}, or change a size"
                )
            sizes[free[0]] = ranks // fixed
        elif fixed == 1 and ranks > 1:
            raise ValueError(f"parallel: this layout is of one process, but {ranks} were started; choose parallel=fsdp")
        elif fixed != ranks:
            raise ValueError(
                f"parallel: {text} needs {fixed} ranks, but {ranks} were started; start {fixed} "
                "(torchrun --nproc-per-node), or set one of the sizes to 0 to take all that are left"
            )
        return sizes


AXES = ("pp", "replicate", "shard", "cp", "tp")
