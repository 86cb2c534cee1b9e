"""Floor 3: a model and a set of processes in, a sharded model out."""

from lowprec.parallel.apply import parallelize
from lowprec.parallel.config import EngineKind, ParallelConfig, Recompute
from lowprec.parallel.engine import Engine
from lowprec.parallel.mesh import World, end_process, start_world, stop_world

__all__ = [
    "Engine",
    "EngineKind",
    "ParallelConfig",
    "Recompute",
    "World",
    "end_process",
    "parallelize",
    "start_world",
    "stop_world",
]
