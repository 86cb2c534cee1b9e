"""Processes and the mesh they form: the same calls under torchrun, without it, on CPUs and on GPUs.

A run always has a process group. Started by torchrun it is the one torchrun describes; started as a plain process it
is a group of one, kept in memory (no port, no file). So there is one code path, and a single process is not a special
case: FSDP2 on one rank was measured at 1-4 % of a step of a 5M-parameter bf16 model, with bit-identical losses.

The mesh always has the five axes of :mod:`lowprec.parallel.config`, most of them of size 1.
"""

import atexit
import os
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lowprec.parallel.config import AXES, ParallelConfig


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as this rank sees it: its place among the ranks that differ from it in this axis alone."""

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class World:
    """What a process knows of the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # axes pp, replicate, shard, cp, tp
    timeout: timedelta  # of a collective
    control: dist.ProcessGroup  # gloo: small host-side agreements (stop flags, counts)
    storage: (
        dist.ProcessGroup
    )  # gloo: checkpoints written in the background need a group of their own, or they deadlock

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def axis(self, name: str) -> Axis:
        """One of the five axes."""
        mesh = self.mesh[name]
        return Axis(name, mesh.get_local_rank(), mesh.size(), mesh.get_group())

    @cached_property
    def data(self) -> tuple[int, int]:
        """(rank, size) among those that train on different micro-batches: replicate x shard."""
        replicate, shard = self.axis("replicate"), self.axis("shard")
        return replicate.rank * shard.size + shard.rank, replicate.size * shard.size

    @cached_property
    def fsdp(self) -> DeviceMesh:
        """The 1-D mesh over which FSDP2 shards parameters: shard x cp."""
        return self._flat("fsdp", "shard", "cp")

    @cached_property
    def stage(self) -> dist.ProcessGroup:
        """The ranks that hold the same blocks: all but those of other pipeline stages."""
        return self._flat("stage", "replicate", "shard", "cp", "tp").get_group()

    def _flat(self, name: str, *axes: str) -> DeviceMesh:
        mesh = self.mesh[axes]._flatten(name)
        _set_pg_timeout(self.timeout, mesh.get_group())
        return mesh

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's part of the loss is its own: of the ranks of a tensor-parallel group, the first's is."""
        return self.axis("tp").rank == 0


def start_world(config: ParallelConfig) -> World:
    """Joins (or forms) the process group and builds the mesh. One GPU per process where there are GPUs.

    Raises ValueError if the ranks cannot be laid out as `config` says.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sizes = config.sizes(size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES)
    for axis in AXES:
        _set_pg_timeout(timeout, mesh[axis].get_group())  # torch gives groups of a mesh half an hour
    return World(
        rank=rank,
        size=size,
        device=device,
        mesh=mesh,
        timeout=timeout,
        control=dist.new_group(backend="gloo", timeout=timeout),
        storage=dist.new_group(backend="gloo", timeout=timeout),
    )


def stop_world() -> None:
    """Leaves the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends the process with `code`: exit handlers run, threads are joined, output is flushed; no interpreter teardown.

    A gloo thread lets go of a collective's tensors a moment after the caller has gone on. If it then asks for the GIL
    while the interpreter is being torn down, the process aborts ("terminate called without an active exception") and a
    good run ends with SIGABRT. multiprocessing ends its processes in the same way.
    """
    atexit._run_exitfuncs()
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
