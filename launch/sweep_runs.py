"""The runs of a ladder: how far each is, and training those that are not done. `sweep.py` is the command line of it.

What is known of a run is in its folder: the tail of metrics.jsonl, exit_code, and config.yaml, so that a folder that
was made with other settings is not taken for a finished run. Nothing else is kept: a sweep may be killed at any time.

A run's log file carries its lock (flock). The process that trains holds it by its standard output, so it is free when
that process is gone, however it ended, and taken as long as it lives, though the sweep that started it may be dead.
"""

import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lowprec.config import changes, from_yaml
from lowprec.launch.ladder import Cell
from lowprec.train import DIVERGED, REQUEUE

TAIL_BYTES = 1 << 15
POLL_S = 0.2


# ---- how far a run is


@dataclass(frozen=True)
class State:
    """What is known of a run.

    Attributes:
        word: finished, diverged, running (here or elsewhere), failed, stopped, new, or other settings (the folder holds
            another run).
        why: of failed: the exit code; of other settings: which; of running and stopped: steps done / of all.
        steps: done.
        tokens_per_s: median of the last steps; None before the first.
    """

    word: str
    why: str = ""
    steps: int = 0
    tokens_per_s: float | None = None

    @property
    def done(self) -> bool:
        return self.word in ("finished", "diverged")

    def __str__(self) -> str:
        return f"{self.word} ({self.why})" if self.why else self.word


def state_of(cell: Cell, ours: bool = False) -> State:
    """How far a run is, by its folder and its lock (not if the lock is ours)."""
    records = _last_records(cell.folder / "metrics.jsonl")
    steps = records[-1]["step"] if records else 0
    speed = statistics.median(record["tokens_per_s"] for record in records) if records else None
    code, progress = _code(cell), f"{steps}/{cell.steps}"
    if others := other_settings(cell):
        return State("other settings", others)
    if not ours and _is_locked(cell):
        return State("running", progress, steps, speed)
    if code == str(DIVERGED):
        return State("diverged", "", steps, speed)
    if steps >= cell.steps and code in ("0", ""):
        return State("finished", "", steps, speed)
    if code not in ("0", "", str(REQUEUE)):
        return State("failed", code, steps, speed)
    return State("stopped", progress, steps, speed) if records or code else State("new")


def other_settings(cell: Cell) -> str:
    """Which settings of the folder's run would have given other numbers than this run's; "" if none, or if
    run.allow_change says that it does not matter. The vocabulary is not compared: a run takes it from its tokenizer.
    """
    path = cell.folder / "config.yaml"
    if not path.exists() or cell.run.run.allow_change:
        return ""
    text = path.read_text(encoding="utf-8")
    saved, wanted = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), _plain(cell.run)
    if isinstance(saved, dict) and isinstance(saved.get("model"), dict):  # nearly always equal, and this is fast
        saved["run"], saved["model"]["vocab_size"] = wanted["run"], wanted["model"]["vocab_size"]
    if saved == wanted:
        return ""
    try:
        differing = changes(from_yaml(text), cell.run)
    except ValueError as error:
        return str(error)
    return ", ".join(f"{k}: {old} -> {new}" for k, (old, new) in differing.items() if k != "model.vocab_size")


def _plain(node: Any) -> Any:
    """Dataclasses as mappings and enums by name, as config.yaml has them."""
    if is_dataclass(node):
        return {f.name: _plain(getattr(node, f.name)) for f in fields(node)}
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return node.name if isinstance(node, Enum) else node


def _code(cell: Cell) -> str:
    path = cell.folder / "exit_code"
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _tail(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace").splitlines()


def _last_records(path: Path) -> list[dict[str, Any]]:
    """The last complete records of a metrics.jsonl."""
    records = []
    for line in _tail(path):
        with suppress(json.JSONDecodeError):  # the first line may be cut, the last one torn
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "tokens_per_s" in record]


def seconds_left(states: Mapping[Cell, State]) -> float | None:
    """Seconds of training steps still to be done, one run after the other; None before any run has a step.

    An estimate by measured speeds: of the runs of the same precision and the nearest size, else of any precision.
    """
    speeds: dict[tuple[str, float], list[float]] = {}  # (precision, FLOP per token): FLOP/s
    for cell, state in states.items():
        if state.tokens_per_s:
            key = cell.precision, cell.flops_per_token
            speeds.setdefault(key, []).append(state.tokens_per_s * cell.flops_per_token)
    if not speeds:
        return None
    total_s = 0.0
    for cell, state in states.items():
        if not state.done:
            flops = cell.flops * (1 - state.steps / cell.steps)
            near = min(speeds, key=lambda k: (k[0] != cell.precision, abs(math.log(k[1] / cell.flops_per_token))))
            total_s += flops / statistics.median(speeds[near])
    return total_s


# ---- log and lock


def log_of(cell: Cell) -> Path:
    return cell.folder.parent / "logs" / f"{cell.name}.log"


def last_line(cell: Cell) -> str:
    """What the last start said before it ended: lowprec's own sentence if there is one, else the last line."""
    lines: list[str] = []
    for line in _tail(log_of(cell)):
        lines = [] if line.startswith("$ ") else [*lines, line.strip()]
    ours = [line for line in lines if line.startswith("lowprec-")]
    return (ours or [line for line in lines if line] or ["it printed nothing"])[-1]


def failure(cell: Cell, state: State) -> str:
    """The sentence on a run that has failed, or cannot be trained."""
    if state.word == "other settings":
        return f"{cell.folder} holds a run with {state}: choose another --dir, or set run.allow_change=true"
    return f"{cell.name} {state}: {last_line(cell)} (the end of {log_of(cell)})"


def claim(cell: Cell) -> BinaryIO | None:
    """The open and locked log of a run, or None if another process has it."""
    log_of(cell).parent.mkdir(parents=True, exist_ok=True)
    file = log_of(cell).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_locked(cell: Cell) -> bool:
    if not log_of(cell).exists():
        return False
    with log_of(cell).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ---- training


@dataclass(frozen=True)
class How:
    """How runs are trained.

    Attributes:
        launcher: command to which a run's overrides are added.
        jobs: runs at a time.
        threads: OMP_NUM_THREADS of a run; None leaves it to the environment.
        gpus: where there are several, each job has one of them; () leaves that to the launcher.
        retries: how often a run that ends with code 75 unasked (a rank was lost, a time limit) is started again.
        again: also start runs that diverged.
    """

    launcher: list[str]
    jobs: int = 1
    threads: int | None = None
    gpus: tuple[str, ...] = ()
    retries: int = 3
    again: bool = False


@dataclass
class Job:
    process: "subprocess.Popen[bytes]"
    slot: int
    since_s: float
    told: bool = False  # to stop


def train_all(runs: list[Cell], how: How) -> int:
    """Trains every run that is not done; the exit code (see sweep.py). What another sweep trains is waited for."""
    training = Training(runs, how)
    with _signals() as received:
        try:
            while training.running or (training.waiting and not received):
                if received:
                    training.stop(at_once=received.count(signal.SIGINT) > 1)
                else:
                    training.start()
                time.sleep(POLL_S)
                training.collect(stopping=bool(received))
        finally:  # if this fails, nothing is left running
            for job in training.running.values():
                kill(job.process)
    for cell in training.failed:
        print(f"lowprec-sweep: {failure(cell, training.states[cell])}", file=sys.stderr)
    if received and not all(state.done for state in training.states.values()):
        return REQUEUE
    return 1 if training.failed else 0


class Training:
    """What waits, what runs and what has failed, in `train_all`."""

    def __init__(self, runs: list[Cell], how: How) -> None:
        self.how, self.states = how, {cell: state_of(cell) for cell in runs}
        self.waiting = [cell for cell in runs if self._is_wanted(cell)]
        self.running: dict[Cell, Job] = {}
        self.failed = [cell for cell in runs if self.states[cell].word == "other settings"]
        self._starts: Counter[Cell] = Counter()
        self._elsewhere: set[Cell] = set()
        print(f"{self._so_far()}; {len(self.waiting)} to go, {how.jobs} at a time", flush=True)

    def start(self) -> None:
        """Starts what waits, while jobs are free and but for what another sweep trains."""
        for cell in list(self.waiting):
            if len(self.running) >= self.how.jobs:
                return
            log = claim(cell)
            if log is None:
                if cell not in self._elsewhere:
                    print(f"{cell.name}: another sweep is training it; its end is waited for", flush=True)
                self._elsewhere.add(cell)
                continue
            with log:  # a child keeps it open, and the lock
                self.waiting.remove(cell)
                self.states[cell] = state_of(cell, ours=True)
                if self._is_wanted(cell):
                    self.running[cell] = self._start(cell, log)
                else:
                    print(f"{cell.name}: {self.states[cell]} meanwhile; {self._so_far()}", flush=True)

    def stop(self, at_once: bool) -> None:
        """Tells every run to save and end, once; or kills it."""
        if any(not job.told for job in self.running.values()):
            print(f"stopping: {len(self.running)} runs save and end; Ctrl-C twice kills them", flush=True)
        for job in self.running.values():
            if at_once:
                kill(job.process)
            elif not job.told:
                job.process.terminate()
            job.told = True

    def collect(self, stopping: bool) -> None:
        """Says how the runs have ended that have, and puts back in line those that ask for it."""
        for cell, job in [(cell, job) for cell, job in self.running.items() if job.process.poll() is not None]:
            del self.running[cell]
            if not stopping and not _code(cell):  # it ended before it could say how, as a killed process does
                _keep_code(cell, job.process.returncode)
            state = self.states[cell] = state_of(cell, ours=True)  # who still has the log does not train
            again = _code(cell) == str(REQUEUE) and not stopping and self._starts[cell] <= self.how.retries
            how_long = f"{time.monotonic() - job.since_s:.0f} s"
            if again:
                print(f"{cell.name}: {state} after {how_long}, unasked; it is started again", flush=True)
                self.waiting.insert(0, cell)
                continue
            print(f"{cell.name}: {state}, {how_long}; {self._so_far()}", flush=True)
            if not state.done and not stopping:
                self.failed.append(cell)

    def _is_wanted(self, cell: Cell) -> bool:
        word = self.states[cell].word
        return word not in ("finished", "other settings") and (word != "diverged" or self.how.again)

    def _so_far(self) -> str:
        left_s = seconds_left(self.states)
        estimate = f", about {duration(left_s / self.how.jobs)} left" if left_s and left_s >= 1 else ""
        return f"{sum(state.done for state in self.states.values())} of {len(self.states)} done{estimate}"

    def _start(self, cell: Cell, log: BinaryIO) -> Job:
        """A process that trains a run, in a session of its own, so that Ctrl-C comes to it from here alone."""
        slot = next(i for i in range(self.how.jobs) if all(job.slot != i for job in self.running.values()))
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.how.threads:
            environment["OMP_NUM_THREADS"] = str(self.how.threads)
        if self.how.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.how.gpus[slot % len(self.how.gpus)]
        words = [*self.how.launcher, *cell.words]
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        (cell.folder / "exit_code").unlink(missing_ok=True)
        self._starts[cell] += 1
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        return Job(process, slot, time.monotonic())


def _keep_code(cell: Cell, code: int) -> None:
    """Writes `exit_code` as a shell would give it, for a process that could not."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "exit_code").write_text(f"{code if code >= 0 else 128 - code}\n", encoding="utf-8")


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process and all that it has started (torchrun gives its workers sessions of their own)."""
    family = [process.pid] if process.poll() is None else []
    for pid in family:  # which grows
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                family += map(int, path.read_text().split())
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that ask for a stop, as they come."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
