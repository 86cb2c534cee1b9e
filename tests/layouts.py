"""Whole runs on several ranks of this machine, in seconds: `launch/train.py` in forked processes."""

import json
import sys
from pathlib import Path
from typing import Any

from lowprec.launch.train import main
from tests.ranks import run

TINY = [
    *(
        "model.dim=64",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
        "model.ffn_dim=128",
        "model.vocab_size=320",
    ),
    *("data=local_text", "data.tokenizer=byte", "data.seq_len=64", "data.validation_frac=0.2"),
    *("data.validation_sequences=4", "data.validation_batch=2", "train.global_batch=8", "train.micro_batch=2"),
    *("train.steps=4", "schedule.decay_frac=0.5"),
]


def settings(folder: Path) -> list[str]:
    """Overrides for a tiny run on made-up text, which is written to `folder`."""
    (folder / "text").mkdir(exist_ok=True)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for i in range(40):
        (folder / "text" / f"{i:02d}.txt").write_text(" ".join(words[(i * j * j + j) % 10] for j in range(150)))
    return [*TINY, f"data.sources.0.path={folder / 'text'}", f"data.cache_dir={folder / 'cache'}"]


def _train(overrides: list[str], output: str) -> int:
    sys.stdout = sys.stderr = Path(output).open("a")  # noqa: SIM115 (the process ends with it)
    code = main(overrides)
    sys.stdout.flush()
    return code


def train_on(ranks: int, folder: Path, *overrides: str, expect: int = 0) -> list[dict[str, Any]]:
    """Trains in `folder`/<name of the run> on so many ranks; returns the lines of metrics.jsonl.

    `run.dir=` among the overrides names the run; recipe nvfp4_tiny unless another is given.
    """
    wishes = dict(o.split("=", 1) for o in [*settings(folder), "recipe=nvfp4_tiny", *overrides])
    run_dir = folder / wishes.pop("run.dir", "run")
    words = [f"{key}={value}" for key, value in wishes.items()] + [f"run.dir={run_dir}"]
    output = folder / f"{run_dir.name}.out"
    codes = run(ranks, _train, words, str(output), timeout_s=180)
    assert codes == [expect] * ranks, f"exit codes {codes}:\n{output.read_text()[-4000:]}"
    metrics = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
