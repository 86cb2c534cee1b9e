"""Run folders of lowprec: `metrics.jsonl`, the log, and `facts.json`, what the run is (docs/runs.md).

Ten thousand folders are read in seconds because a log is not parsed: steps and some training losses are picked out of
its bytes, and only the last line and the last one with a validation loss become objects. A log that looks otherwise, or
whose steps do not rise (a trainer that resumed without dropping the lines of the steps that it did again), is parsed
whole, and the last attempt counts. A torn last line, what a killed process leaves, is ignored.
"""

import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from lowprec.scaling.sources import Found
from lowprec.scaling.sources.facts import Ending, Row, ending, ending_of, last_attempt, row_of, sampled
from lowprec.scaling.table import Dropped

LOG = "metrics.jsonl"
SKIPPED = ("checkpoints", "wandb")  # folders within a run that hold no runs
LATEST = "latest-run"  # the W&B client's link to a folder beside it
Progress = Callable[[int, int], None]  # (runs done, runs in all)

_FIRST = b'{"step": '
_LOSS = re.compile(rb'"loss": ?(-?[0-9][0-9.eE+-]*)')


def find(folder: str) -> tuple[list[str], list[str]]:
    """(run folders, .wandb files) at and under `folder`, sorted; links to folders are followed, each once.

    What the W&B client left within a run folder is that run once more, and is passed over.
    """
    runs: list[str] = []
    offline: list[str] = []
    for path, names in sorted(_walk(folder, set())):
        if LOG in names:
            runs.append(path)
        offline += [os.path.join(path, name) for name in sorted(names) if name.endswith(".wandb")]
    return runs, offline


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), for `folder` and all under it."""
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    inner, names = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                inner.append(entry)
            else:
                names.append(entry.name)
    yield folder, names
    for entry in inner:
        inside = LOG in names and entry.name in SKIPPED
        if not (inside or entry.name.startswith(".") or entry.name == LATEST):
            yield from _walk(entry.path, seen)


def read_folders(folders: list[str], progress: Progress | None = None) -> Found:
    """One row a run folder."""
    rows: list[Row] = []
    dropped: list[Dropped] = []
    notes: list[str] = []
    for count, folder in enumerate(folders):
        if progress and count % 100 == 0:
            progress(count, len(folders))
        try:
            row, repeated = read_folder(folder)
        except ValueError as error:
            dropped.append(Dropped(_name(folder), str(error), folder))
            continue
        rows.append(row)
        if repeated:
            notes.append(f"{folder}: {repeated} lines of steps that were done again after a resume are left out")
    if progress:
        progress(len(folders), len(folders))
    return Found(pd.DataFrame(rows), tuple(dropped), tuple(notes))


def read_folder(folder: str) -> tuple[Row, int]:
    """(the row of a run folder, lines of its log that a later attempt made void). Raises ValueError with the reason why
    there is none."""
    text = _bytes(folder, "facts.json")
    if text is None:
        raise ValueError(
            "it has no facts.json, which says its size and its operands: start it once more with this version of "
            "lowprec, which writes it, or give a table"
        )
    try:
        facts = json.loads(text)
        end = read_ending(_bytes(folder, LOG) or b"")
        row = row_of(facts, end)
    except json.JSONDecodeError:
        raise ValueError("its facts.json is damaged") from None
    run_id, code = _bytes(folder, "run_id"), _bytes(folder, "exit_code")
    name = _name(folder)
    row |= {
        "run": name,
        "_origin": "folder",
        "_label": name,  # not that in the facts, which is the recipe's unless somebody wrote another
        "_run_id": run_id.decode().strip() if run_id else None,
        "_exit_code": int(code) if code and code.strip().isdigit() else math.nan,
        "unique_tokens": unique_tokens(_bytes(folder, "data.json"), row["D"]),
        "curve": os.path.join(folder, LOG),
        "source": folder,
    }
    return row, end.repeated


def read_ending(log: bytes) -> Ending:
    """The end of a metrics.jsonl given as its bytes. Raises ValueError if it holds no record."""
    lines = log.split(b"\n")
    try:
        if not _is_record(lines[-1]):
            lines.pop()
        steps = [int(line[len(_FIRST) : line.index(b",")]) for line in lines]  # as the trainer writes it, `step` first
        if not all(map(operator.lt, steps, steps[1:])):
            raise ValueError("steps that were done again")
        judged = next((line for line in reversed(lines) if b'"val_loss":' in line), b"{}")
        losses = [float(found[1]) for line in sampled(lines) if (found := _LOSS.search(line))]
        return ending(json.loads(lines[-1]), json.loads(judged), losses)
    except (ValueError, IndexError):
        return ending_of(*last_attempt(parse(log)))


def _is_record(line: bytes) -> bool:
    """Whether the last line is whole although its line end is missing."""
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def parse(log: bytes) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; lines that are not whole are left out. Raises ValueError if there is none."""
    records = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    if not records:
        raise ValueError("its metrics.jsonl holds no step")
    return records


def unique_tokens(text: bytes | None, D: float) -> float | None:
    """How many of D tokens are distinct, from a data.json; None if it does not say.

    A source that has `tokens` and is drawn with a share w of D gives min(w D, its tokens outside validation).
    """
    try:
        about = json.loads(text or b"")
        total = sum(source["weight"] for source in about["sources"])
        kept = 1.0 - about["validation"]["frac"]
        return sum(min(D * s["weight"] / total, float(math.floor(s["tokens"] * kept))) for s in about["sources"])
    except (ValueError, KeyError, TypeError):
        return None


def _bytes(folder: str, name: str) -> bytes | None:
    try:
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _name(folder: str) -> str:
    return os.path.basename(os.path.abspath(folder))
