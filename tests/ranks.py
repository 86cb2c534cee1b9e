"""Several ranks in one test: processes that start in a tenth of a second, joined by gloo over a file.

    results = run(4, function, 1, 2)        # function(1, 2) on every rank; dist.get_rank() tells which it is

`function` lives at the top of a test module; its arguments are pickled. A collective that waits longer than 30 s fails,
and so does the test.

Ranks are forked, but not from the test's process, which has threads (OpenMP's, loaders', W&B's) that a fork would leave
without their locks: a server that has only imported things, one for each process of pytest, forks them.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what FSDP2 would import in every rank: seconds
import torch.distributed as dist
import torch.distributed.fsdp

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "lowprec.launch.train", "lowprec.parallel.zero"])


def _rank(
    rank: int, ranks: int, store: str, results: "Queue[Any]", function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
        )
        results.put((rank, True, function(*args)))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks to it
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # no teardown of the interpreter under gloo's threads


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """What `function(*args)` returned on every rank (numbers, strings, numpy arrays: anything but tensors that share
    memory; return `.tolist()` or clones). AssertionError with the traceback of the first rank that failed."""
    results: Queue[Any] = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, ranks, store, results, function, args)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            found: dict[int, Any] = {}
            for _ in range(ranks):
                rank, good, value = results.get(timeout=timeout_s)
                assert good, f"rank {rank} of {ranks} failed:\n{value}"
                found[rank] = value
        finally:
            for process in processes:
                process.join(timeout=5 if len(found) == ranks else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [found[rank] for rank in range(ranks)]
