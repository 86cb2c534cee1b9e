"""Floor 3: a model and a set of processes in, a sharded model out."""

from lowprec.parallel.apply import accumulate, parallelize
from lowprec.parallel.config import ParallelConfig, Recompute
from lowprec.parallel.mesh import World, end_process, start_world, stop_world

__all__ = [
    "ParallelConfig",
    "Recompute",
    "World",
    "accumulate",
    "end_process",
    "parallelize",
    "start_world",
    "stop_world",
]
