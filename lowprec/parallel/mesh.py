"""Processes and the mesh they form: the same calls under torchrun, without it, on CPUs and on GPUs.

A run always has a process group. Started by torchrun it is the one torchrun describes; started as a plain process it
is a group of one, kept in memory (no port, no file). So there is one code path, and a single process is not a special
case: FSDP2 on one rank was measured at 1-4 % of a step of a 5M-parameter bf16 model, with bit-identical losses.
"""

import atexit
import os
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """What a process knows of the others. `axis` names of the mesh: "dp" (data parallel)."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup  # gloo: small host-side agreements (stop flags, counts)
    storage: (
        dist.ProcessGroup
    )  # gloo: checkpoints written in the background need a group of their own, or they deadlock

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_world(timeout_s: int) -> World:
    """Joins (or forms) the process group and builds the 1-D mesh. One GPU per process where there are GPUs."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=size, timeout=timeout)
    return World(
        rank=rank,
        size=size,
        device=device,
        mesh=init_device_mesh(device.type, (size,), mesh_dim_names=("dp",)),
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
