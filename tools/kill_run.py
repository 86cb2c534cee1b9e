"""Runs to be broken: launch/train.py in forked processes, signals to them, and what they leave behind.

Part of tools/kill_table.py. The forking process has loaded everything, so a rank is there in a tenth of a second.
"""

import atexit
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what FSDP2 would import in every rank: seconds
import torch.distributed.fsdp

from lowprec.launch.train import command
from lowprec.train import reader
from lowprec.train.checkpoint import committed
from lowprec.train.metrics import read_metrics

STEPS, EVERY, BATCH, SEQ_LEN = 20, 5, 8, 64
PATIENCE_S = 150.0  # for anything that is waited for
VARIES = ("tokens_per_s", "step_s", "data_s", "mem_bytes", "attempt")

Row = dict[str, Any]
Patch = Callable[[], None] | None


class Failed(AssertionError):
    """A fault had not the effect that it must have."""


def words_of(folder: Path, name: str, *overrides: str) -> list[str]:
    """The command line of a run in folder/name."""
    wishes = (
        "recipe=nvfp4_tiny model.dim=64 model.layers=2 model.heads=4 model.kv_heads=2 model.ffn_dim=128 "
        "model.vocab_size=320 data=local_text data.tokenizer=byte data.validation_frac=0.2 data.validation_sequences=4 "
        f"data.validation_batch=2 data.seq_len={SEQ_LEN} train.global_batch={BATCH} train.micro_batch=2 "
        f"train.steps={STEPS} train.eval_every=10 train.checkpoint_every={EVERY} schedule.decay_frac=0.5 "
        f"data.sources.0.path={folder / 'text'} data.cache_dir={folder / 'cache'} run.dir={folder / name} "
        "parallel.timeout_s=120 parallel.hang_s=60"
    ).split()
    merged = dict(word.split("=", 1) for word in [*wishes, *overrides])
    return [f"{key}={value}" for key, value in merged.items()]


def make_text(folder: Path) -> None:
    """40 small files of made-up text."""
    (folder / "text").mkdir(parents=True)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for i in range(40):
        (folder / "text" / f"{i:02d}.txt").write_text(" ".join(words[(i * j * j + j) % 10] for j in range(150)))


def _rank(words: list[str], rank: int, ranks: int, port: int, output: str, patch: Patch) -> None:
    """A forked process becomes a rank of a run."""
    atexit._clear()  # what the tool wants done at its end is not the rank's to do
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["lowprec-train", *words]
    torch.set_num_threads(1)
    if patch:
        patch()
    command()


@dataclass
class Run:
    """A run folder, and the processes that are at work in it."""

    folder: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 2
    patch: Patch = None
    processes: list[Any] = field(default_factory=list)
    redone: int = 0  # steps done again so far
    starts: int = 0

    def start(self, *overrides: str, ranks: int = 0, patch: Patch = None) -> None:
        """Starts the command, or starts it again."""
        self.starts, done = self.starts + 1, self.done()
        words = words_of(self.folder.parent, self.folder.name, *self.overrides, *overrides)
        ranks = ranks or self.ranks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        outputs = [self.folder.with_name(f"{self.folder.name}.{self.starts}.{rank}.out") for rank in range(ranks)]
        self.outputs, self._done_before = outputs, done
        self.processes = [
            get_context("fork").Process(
                target=_rank, args=(words, rank, ranks, port, str(outputs[rank]), patch or self.patch)
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def said(self) -> str:
        """All that the ranks of the last start have printed."""
        return "\n".join(output.read_text(errors="replace") for output in self.outputs if output.exists())

    def line(self, pattern: str) -> str:
        """What the last start said that matches. Raises Failed if nothing does."""
        found = re.search(pattern, self.said())
        if not found:
            raise Failed(f"nobody said /{pattern}/ but: {self.said()[-1500:]}")
        return found[0]

    def done(self) -> int:
        """Steps in metrics.jsonl."""
        return max((record["step"] for record in read_metrics(self.folder / "metrics.jsonl")), default=0)

    def until(self, what: Callable[[], Any]) -> None:
        """Waits for something while the ranks work. Raises Failed if they end before it is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not what():
            if not any(process.is_alive() for process in self.processes):
                raise Failed(f"the run ended before its fault: {self.said()[-1500:]}")
            if time.monotonic() > end_s:
                raise Failed(f"waited {PATIENCE_S:.0f} s in vain: {self.said()[-1500:]}")
            time.sleep(0.001)

    def until_step(self, step: int) -> None:
        self.until(lambda: self.done() >= step)

    def until_saving(self) -> None:
        """The second save is under way: there are data, and no commit."""
        folder = self.folder / "checkpoints"
        self.until(lambda: committed(folder))
        self.until(lambda: any(f.stat().st_size for f in folder.glob("step_*/*.distcp")) and self.torn())

    def torn(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return sorted({p.name for p in folder.glob("step_*")} - {p.name for p in committed(folder).values()})

    def kill(self, number: int, *ranks: int) -> None:
        """A signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, *ranks: int) -> list[int]:
        """Exit codes of some ranks, or of all."""
        chosen = [self.processes[rank] for rank in ranks] or self.processes
        for process in chosen:
            process.join(PATIENCE_S)
            if process.is_alive():
                raise Failed(f"rank {self.processes.index(process)} does not end: {self.said()[-1500:]}")
        return [process.exitcode for process in chosen]

    def end(self) -> None:
        """Leaves no process behind."""
        self.kill(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def finish(self, *overrides: str, ranks: int = 0, expect: int = 0) -> str:
        """Starts the command again, to its end; returns from where it went on."""
        before = self.done()
        self.start(*overrides, ranks=ranks)
        codes = self.wait()
        if set(codes) != {expect}:
            raise Failed(f"exit codes {codes} instead of {expect}: {self.said()[-1500:]}")
        resumed = re.search(r"resumes after step (\d+)", self.said())
        if "starts, " in self.said() or resumed:
            self.redone += before - (int(resumed[1]) if resumed else 0)
        return f"resumed after step {resumed[1]}" if resumed else "started anew"


def numbers(run: Run) -> list[Row]:
    """What must be the same in two runs that are the same."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in VARIES} for record in records]


def lost_tokens(run: Run) -> int:
    """Tokens that were handed out and never trained on, from the last checkpoint's place in the data."""
    saved: dict[str, Any] = {"progress": ""}
    reader.read(saved, committed(run.folder / "checkpoints")[STEPS])
    progress = json.loads(saved["progress"])
    trained = progress["step"] - progress["guard"].get("skips", 0) - progress["guard"].get("raises", 0)
    return (progress["loader"]["samples"] - trained * BATCH) * SEQ_LEN


def difference(run: Run, reference: Run) -> float:
    """Largest relative difference of losses; 0 only if every number has the same bits, inf if other steps are there."""
    ours, theirs = numbers(run), numbers(reference)
    if ours == theirs:
        return 0.0
    if [r["step"] for r in ours] != [r["step"] for r in theirs] or [r["tokens"] for r in ours] != [
        r["tokens"] for r in theirs
    ]:
        return math.inf
    pairs = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs)]
    return max([abs(a - b) / abs(b) for a, b in pairs if a is not None and b is not None], default=math.inf) or 1e-30
