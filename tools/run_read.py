"""A run folder as it is at this moment: running, finished, killed, torn. Nothing is locked and nothing is written.

Another process may be writing: the last line of a file may be torn, and a file may not be there yet. What is missing or
damaged becomes a sentence in `notes`, and the rest is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
MOST_PROBES = 120  # evenly spaced, the newest among them: a heat map has no room for more
ENDINGS = {
    "2": "refused: the command, a setting or a file was wrong",
    "70": "diverged",
    "74": "ended: a disk could not be written",
}
EXPECTED = {
    "config.yaml": "the settings of the run",
    "facts.json": "its sizes and formats",
    "plan.txt": "its precision plan",
    "metrics.jsonl": "its record",
}


@dataclass
class RunView:
    """What a folder holds.

    Attributes:
        records: lines of metrics.jsonl. probes: of probes.jsonl, at most MOST_PROBES. events: of events.jsonl.
        probe_count: how many lines probes.jsonl has.
        exit_code: as written, "" if there is none.
        notes: what is missing or damaged, a sentence each.
    """

    name: str
    path: Path
    config: Record = field(default_factory=dict)
    config_text: str = ""
    facts: Record = field(default_factory=dict)
    plan: str = ""
    records: list[Record] = field(default_factory=list)
    probes: list[Record] = field(default_factory=list)
    probe_count: int = 0
    events: list[Record] = field(default_factory=list)
    exit_code: str = ""
    run_id: str = ""
    checkpoints: list[int] = field(default_factory=list)
    age_s: float | None = None  # since metrics.jsonl was written
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        """Of the whole run, as configured."""
        steps = self.config.get("train", {}).get("steps") if isinstance(self.config.get("train"), dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def step(self) -> int:
        """Of the last record; 0 without one."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def state(self) -> str:
        """In words, from the exit code and the steps done. A running process and a killed one leave the same code."""
        if self.exit_code == "0":
            if self.steps is not None and self.step < self.steps:
                return "cancelled"
            return "finished"
        if self.exit_code in ("", "75"):
            written = "" if self.age_s is None else f"; its last line was written {ago(self.age_s)} ago"
            return ("running, stopped or killed" if self.records else "no step was logged yet") + written
        return ENDINGS.get(self.exit_code, "failed")


def ago(seconds: float) -> str:
    """90 -> "2 min"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def read_run(path: Path) -> RunView:
    """Raises ValueError if this is no run folder."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give the run.dir of a run")
    if not (path / "metrics.jsonl").exists() and not (path / "config.yaml").exists():
        below = sorted(p.parent.relative_to(path) for p in path.glob("*/metrics.jsonl"))[:3]
        hint = f"; did you mean {path / below[0]}?" if below else ""
        raise ValueError(
            f"{path} is no run folder, it has neither config.yaml nor metrics.jsonl: give the run.dir of a run{hint}"
        )
    run = RunView(path.resolve().name, path)
    for name, what in EXPECTED.items():
        if not (path / name).exists():
            run.notes.append(f"{name} is not there: {what} cannot be shown.")
    run.config_text = _text(path / "config.yaml", run)
    run.config = _parsed(run, "config.yaml", run.config_text, yaml.safe_load)
    run.facts = _parsed(run, "facts.json", _text(path / "facts.json", run), json.loads)
    run.plan = _text(path / "plan.txt", run)
    run.exit_code = _text(path / "exit_code", run).strip()
    run.run_id = _text(path / "run_id", run).strip()
    run.records = [r for r in _lines(path / "metrics.jsonl", run, None) if _is_number(r.get("step"))]
    run.events = _lines(path / "events.jsonl", run, None)
    run.probes = [
        p for p in _lines(path / "probes.jsonl", run, MOST_PROBES)
        if _is_number(p.get("step")) and isinstance(p.get("layers"), dict)
    ]  # fmt: skip
    if (path / "metrics.jsonl").exists():
        run.age_s = max(0.0, time.time() - (path / "metrics.jsonl").stat().st_mtime)
        if not run.records:
            run.notes.append("metrics.jsonl holds no whole line: there are no curves.")
    steps = (p.parent.name.removeprefix("step_") for p in path.glob("checkpoints/step_*/.metadata"))
    run.checkpoints = sorted(int(step) for step in steps if step.isdigit())
    if damaged := sorted(p.name for p in path.glob("checkpoints/damaged_*")):
        run.notes.append(f"Checkpoints were found damaged and set aside: {', '.join(damaged)}.")
    return run


def _text(path: Path, run: RunView) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return ""


def _parsed(run: RunView, name: str, text: str, parse: Callable[[str], Any]) -> Record:
    if not text:
        return {}
    try:
        node = parse(text)
    except (ValueError, yaml.YAMLError):
        node = None
    if not isinstance(node, dict):
        run.notes.append(f"{name} is damaged and is left out.")
        return {}
    return node


def _lines(path: Path, run: RunView, most: int | None) -> list[Record]:
    """The whole lines of a JSON Lines file, or about `most` of them, evenly spaced and with the last."""
    try:
        with path.open("rb") as file:
            starts = [0]
            for line in file:
                starts.append(starts[-1] + len(line))
            wanted = list(range(len(starts) - 1))
            if path.name == "probes.jsonl":
                run.probe_count = len(wanted)
            if most and len(wanted) > most:
                wanted = sorted({round(i * (len(wanted) - 1) / (most - 1)) for i in range(most)} | {len(wanted) - 2})
            found, bad = list[Record](), list[int]()
            for i in wanted:
                file.seek(starts[i])
                record = _object(file.read(starts[i + 1] - starts[i]))
                if record is None:
                    bad.append(i)
                else:
                    found.append(record)
    except FileNotFoundError:
        return []
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return []
    if bad == [len(starts) - 2]:
        run.notes.append(f"The last line of {path.name} is torn and is left out.")
    elif bad:
        run.notes.append(f"{path.name} has {len(bad)} damaged lines, which are left out.")
    return found


def _object(line: bytes) -> Record | None:
    try:
        node = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    return node if isinstance(node, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def leaves(node: Any, prefix: str = "", depth: int = 9) -> Record:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists, and what lies below `depth` names, count as one value."""
    if not isinstance(node, dict) or not node or not depth:
        return {prefix: node}
    found: Record = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key), depth - 1)
    return found


def differences(runs: list[RunView]) -> list[tuple[str, list[Any]]]:
    """Settings in which runs differ, with the value of each; those of folders and names aside."""
    flat = [leaves(run.config, depth=3) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    missing = object()
    found = []
    for key in keys:
        values = [settings.get(key, missing) for settings in flat]
        if key not in ("name", "run.dir") and any(value != values[0] for value in values[1:]):
            found.append((key, ["not set" if value is missing else value for value in values]))
    return found
