"""`.wandb` files: what the W&B client writes while a run goes on, `wandb/offline-run-<date>-<id>/run-<id>.wandb`.

The file is a LevelDB log: after seven bytes that name it, blocks of 32 KiB; in these, chunks of a header (checksum 4
bytes, length 2, kind 1) and a body. A record is one chunk (kind 1), or a first (2), middle (3) and last (4) one, and
is a protobuf message of W&B's. A killed run leaves a torn chunk at the end, where reading stops.

A run that was resumed has a file for every start, all with its id: they are read as one, in the order of their dates.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lowprec.scaling.sources import Found
from lowprec.scaling.sources.facts import Row, ending_of, last_attempt, row_of, ungrouped
from lowprec.scaling.table import Dropped

_BLOCK, _HEADER, _MAGIC = 32768, 7, b":W&B"
Record = dict[str, Any]


def read_files(paths: list[Path]) -> Found:
    """One row a run out of .wandb files, several of which may belong to one run."""
    runs: dict[str, tuple[Record, list[Record], Path]] = {}
    dropped: list[Dropped] = []
    notes: list[str] = []
    for path in sorted(paths, key=lambda path: (path.parent.name, str(path))):  # the folder's name has the date
        about, history = read_file(path)
        run_id = str(about.get("id") or path)
        old, records, first = runs.get(run_id, ({}, [], path))
        runs[run_id] = (_merged(old, about), records + history, first)
    rows = []
    for run_id, (about, records, path) in runs.items():
        name = str(about.get("name") or run_id)
        try:
            row, repeated = _row(about, records)
        except ValueError as error:
            dropped.append(Dropped(name, str(error), str(path)))
            continue
        row |= {"run": name, "source": str(path), "curve": str(path), "_origin": "wandb"}
        rows.append(row | {"_run_id": about.get("id"), "_exit_code": about.get("exit", math.nan)})
        if repeated:
            notes.append(f"{path}: {repeated} records of steps that were done again after a resume are left out")
    return Found(pd.DataFrame(rows), tuple(dropped), tuple(notes))


def _merged(old: Record, new: Record) -> Record:
    """Of two starts of a run: what the later one says, with the exit code of the last start."""
    return {**old, **{key: value for key, value in new.items() if value}, "exit": new.get("exit", math.nan)}


def _row(about: Record, records: list[Record]) -> tuple[Row, int]:
    facts = about["config"].get("facts") if about.get("config") else None
    if not isinstance(facts, dict):
        raise ValueError(
            "its config holds no facts of lowprec, and of a .wandb file nothing else is read: upload it with "
            "`wandb sync` and read wandb://entity/project, where columns can be named"
        )
    if not records:
        raise ValueError("it logged no step")
    kept, repeated = last_attempt(records)
    return row_of(facts, ending_of(kept, repeated)), repeated


def read_history(path: Path) -> list[Record]:
    """What was logged with a `step`, of all starts of the run that this file belongs to."""
    about, _ = read_file(path)
    parts = sorted(path.parent.parent.glob(f"*run-*/run-{about.get('id')}.wandb")) or [path]
    return [record for part in parts for record in read_file(part)[1]]


def read_file(path: Path) -> tuple[Record, list[Record]]:
    """({id, name, config, exit} as far as they are there, the logged records that have a step).

    Raises ValueError if it is no .wandb file, or if wandb is not installed.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise ValueError(f"{path} needs the W&B client: pip install wandb") from None
    messages: Any = wandb_internal_pb2
    about: Record = {"config": {}}
    history: list[Record] = []
    for body in chunks(path):
        record: Any = messages.Record()
        record.ParseFromString(body)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {ungrouped(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            if "step" in items:
                history.append({key: json.loads(value) for key, value in items.items()})
        elif kind == "run":
            about |= {"id": record.run.run_id, "name": record.run.display_name}
            about["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update if u.key}
        elif kind == "config":
            about["config"] |= {u.key: json.loads(u.value_json) for u in record.config.update if u.key}
        elif kind == "exit":
            about["exit"] = record.exit.exit_code
    return about, history


def chunks(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, up to a torn one. Raises ValueError if it is no such file."""
    data = path.read_bytes()
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is no .wandb file of the W&B client: it does not begin with {_MAGIC.decode()}")
    offset, partial = _HEADER, b""
    while offset + _HEADER <= len(data):
        left = _BLOCK - offset % _BLOCK
        if left < _HEADER:  # too little for a header: the rest of a block is padding
            offset += left
            continue
        _, size, kind = struct.unpack("<IHB", data[offset : offset + _HEADER])
        if kind == 0 and size == 0:
            offset += left
            continue
        body = data[offset + _HEADER : offset + _HEADER + size]
        if len(body) < size:
            return
        offset += _HEADER + size
        partial = body if kind in (1, 2) else partial + body
        if kind in (1, 4):
            yield partial
