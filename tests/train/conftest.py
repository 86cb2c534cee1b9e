"""A tiny run that takes a second: 2 blocks of width 64 on a few kilobytes of made-up text, one token a byte."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowprec.launch.train import main

Records = list[dict[str, Any]]
Train = Callable[..., int]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make any *_tiny recipe tiny indeed."""
    folder = tmp_path_factory.mktemp("text")
    words, r = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], random.Random(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(r.choices(words, k=150)))
    model = "model.dim=64 model.layers=2 model.heads=2 model.kv_heads=2 model.ffn_dim=128"
    data = "data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.validation_sequences=6"
    more = "data.validation_batch=2 train.global_batch=4 train.micro_batch=2 train.steps=8 train.eval_every=4"
    paths = [f"data.sources.0.path={folder}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    return [*model.split(), *data.split(), *more.split(), *paths, "schedule.decay_frac=0.5"]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run in this process installs signal handlers: put back what was there."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def merged(settings: list[str], overrides: tuple[str, ...]) -> list[str]:
    """Later overrides of a key replace earlier ones."""
    return [f"{key}={value}" for key, value in dict(o.split("=", 1) for o in [*settings, *overrides]).items()]


@pytest.fixture
def train(settings: list[str]) -> Train:
    """train(folder, "key=value", ...) -> exit code; in this process, recipe nvfp4_tiny unless one is given."""

    def start(folder: Path, *overrides: str) -> int:
        return main(merged([*settings, "recipe=nvfp4_tiny", f"run.dir={folder}"], overrides))

    return start


@pytest.fixture
def spawn(settings: list[str]) -> Callable[..., subprocess.Popen[str]]:
    """The same as a process of its own; `ranks` of them under torchrun if more than one."""

    def start(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
        runner = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
        words = merged([*settings, "recipe=nvfp4_tiny", f"run.dir={folder}"], overrides)
        script = Path(__file__).parents[2] / "launch" / "train.py"
        return subprocess.Popen(
            [sys.executable, *runner, str(script), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


def records(folder: Path) -> Records:
    """The lines of metrics.jsonl, every one of which must be JSON."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """What must be the same in two runs that are the same: all but times, memory and the count of attempts."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "plan", "val_loss", "val_loss_high_precision")
    keys += ("osc_ratio", "osc_mean")
    return [tuple(record.get(key) for key in keys) for record in records(folder)]


@pytest.fixture
def read() -> Callable[[Path], Records]:
    return records


@pytest.fixture
def compare() -> Callable[[Path], list[tuple[Any, ...]]]:
    return numbers
