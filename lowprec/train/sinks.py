"""Sinks: other views of a run's record, beside the console. metrics.jsonl and probes.jsonl stay the record.

    wandb         monitor.wandb=online | offline    charts, alerts, probes as tables, a heat map (sinks_wandb.py)
    tensorboard   monitor.tensorboard=true          event files in the run folder (sinks_tensorboard.py)
    csv           monitor.csv=true                  metrics.csv beside metrics.jsonl (below)

A sink gets every line of metrics.jsonl and of probes.jsonl after it was written. In W&B and TensorBoard, which group
charts by what stands before a "/", each number has its name of metrics.jsonl behind a group::

    train  loss lr grad_norm      val    val_loss ...       speed   tokens_per_s step_s data_s utilisation mfu ...
    memory mem_bytes              wire   wire_bytes ...     guard   guard_spikes ...      probe   probe_sqnr_db ...

so what follows the last "/" is the name, and runs logged without groups by older versions are read alike.
"""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lowprec.train.metrics import Record, read_metrics

GROUPS = {
    "loss": "train", "lr": "train", "grad_norm": "train", "plan": "train", "attempt": "train",
    "val_loss": "val", "val_loss_high_precision": "val",
    "tokens_per_s": "speed", "step_s": "speed", "data_s": "speed", "ideal_s": "speed", "utilisation": "speed",
    "mfu": "speed",
    "mem_bytes": "memory",
}  # fmt: skip
FAMILIES = {"wire_bytes": "wire", "probe_": "probe", "guard_": "guard", "osc_": "deoscillation"}  # by their beginning
AXES = ("step", "tokens")  # in no group: what charts are drawn over
COLUMNS = (
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_s", "data_s", "mem_bytes", "plan", "attempt",
    "val_loss", "val_loss_high_precision", "wire_bytes_per_param", "utilisation", "mfu", "probe_sqnr_db",
    "probe_grad_cosine", "probe_sharpness", "probe_s", "guard_spikes", "guard_skips", "guard_rollbacks",
    "guard_raises", "osc_ratio", "osc_mean",
)  # fmt: skip


class Sink(Protocol):
    """What a view of a run can be told. Any of these may raise: the sink is then dropped and training goes on (of
    `probe` and `saved` that part alone)."""

    name: str

    def log(self, record: Record) -> None:
        """A line of metrics.jsonl."""

    def probe(self, line: Record) -> None:
        """A line of probes.jsonl, after the line of metrics.jsonl of the same step."""

    def alert(self, title: str, text: str) -> None:
        """Something happened that a person should see: a rollback, the loss diverged."""

    def rewind(self, step: int) -> None:
        """Steps after this one are done again."""

    def saved(self) -> None:
        """There may be a new checkpoint."""

    def cancelled(self) -> bool:
        """Whether a person has asked, there, for the run to stop."""

    def finish(self, exit_code: int) -> None:
        """The last call."""


def group_of(key: str) -> str:
    """The group of a key of metrics.jsonl: "" for an axis, "more" for a key that no table names."""
    if key in AXES:
        return ""
    return GROUPS.get(key) or next((group for start, group in FAMILIES.items() if key.startswith(start)), "more")


def grouped(record: Mapping[str, Any]) -> Record:
    """{"loss": 3.0} -> {"train/loss": 3.0}."""
    return {f"{group}/{key}" if (group := group_of(key)) else key: value for key, value in record.items()}


def flat(record: Mapping[str, Any]) -> Record:
    """{"wire_bytes": {"all_gather": 3}} -> {"wire_bytes.all_gather": 3}."""
    out: Record = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            out[key] = value
    return out


class Csv:
    """metrics.csv: a row a line of metrics.jsonl, empty where a line does not have the column.

    The first columns are always `COLUMNS`, in this order; others (bytes by collective) follow by name. The file is made
    from metrics.jsonl when a run starts, goes back, or logs a column for the first time, so it never holds more or
    other rows than that; otherwise a row is appended.
    """

    name = "metrics.csv"

    def __init__(self, folder: Path) -> None:
        self.record, self.path = folder / "metrics.jsonl", folder / "metrics.csv"
        self.columns: list[str] = []
        self._rewrite()

    def _rewrite(self) -> None:
        rows = [flat(record) for record in read_metrics(self.record)]
        self.columns = [*COLUMNS, *sorted({key for row in rows for key in row} - set(COLUMNS))]
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(map(self._line, [dict(zip(self.columns, self.columns)), *rows])), encoding="utf-8")
        os.replace(draft, self.path)

    def _line(self, row: Mapping[str, Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        return buffer.getvalue()

    def log(self, record: Record) -> None:
        row = flat(record)
        if not row.keys() <= set(self.columns):
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(row))

    def rewind(self, step: int) -> None:
        self._rewrite()

    def probe(self, line: Record) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def saved(self) -> None: ...

    def cancelled(self) -> bool:
        return False

    def finish(self, exit_code: int) -> None: ...
