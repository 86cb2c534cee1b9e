"""The run folder: what is in it, and whether a command may continue what it holds.

    config.yaml     every setting of the run, resolved
    run_id          the W&B run id, made once, used whether W&B is on or not
    plan.txt        the precision plan as printed
    facts.json      sizes, tokens and formats in plain numbers (train/facts.py)
    data.json       fingerprint of tokenizer and text
    metrics.jsonl   the record (train/metrics.py)
    probes.jsonl    what was measured inside the run, one line a probe (train/probe.py)
    events.jsonl    what the guard and the precision controller decided, one line a decision
    checkpoints/    one folder per step (train/checkpoint.py)

A folder belongs to one run. Started again with settings that would have given other numbers, the command is refused.
One change is decided by its effect: `train.steps` may grow or shrink as long as every step already done would have
been done with the same learning rate and the same point of the precision schedule (a constant schedule, or WSD before
its decay).
"""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lowprec.config import Run, changes, from_yaml, to_yaml
from lowprec.linear import load_precision
from lowprec.optim import learning_rate
from lowprec.parallel import World


@dataclass(frozen=True)
class Folder:
    path: Path
    run_id: str

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def probes(self) -> Path:
        return self.path / "probes.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def keep(self, name: str, text: str) -> None:
        """Writes a small file whole or not at all."""
        draft = self.path / f".{name}.tmp"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path / name)


def open_folder(run: Run, world: World, steps_done: int) -> Folder:
    """Creates or re-enters `run.run.dir`; a collective. Raises ValueError (on all ranks) if it holds another run."""
    path = Path(run.run.dir)
    if (path / "config.yaml").exists() and not run.run.allow_change:
        refuse_changes(from_yaml((path / "config.yaml").read_text(encoding="utf-8")), run, path, steps_done)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir={path} cannot be made: {error.strerror}") from error
    dist.barrier(world.control)  # all have read before one writes
    folder = Folder(path, "")
    if world.is_first:
        folder.keep("config.yaml", to_yaml(run))
        if not (path / "run_id").exists():
            folder.keep("run_id", uuid.uuid4().hex[:8] + "\n")
    dist.barrier(world.control)
    return Folder(path, (path / "run_id").read_text(encoding="utf-8").strip())


def refuse_changes(before: Run, now: Run, path: Path, steps_done: int) -> None:
    """Raises ValueError naming the settings in which `now` could not have made what `before` made in `path`."""
    differing = changes(before, now)
    if "train.steps" in differing and _same_past(before, now, steps_done):
        del differing["train.steps"]
    if not differing:
        return
    listed = ", ".join(f"{key} ({_short(old)} -> {_short(new)})" for key, (old, new) in list(differing.items())[:6])
    if len(differing) > 6:
        listed += f" and {len(differing) - 6} more"
    why = ""
    if "train.steps" in differing:
        why = f"; with another train.steps the {steps_done} steps done would have had other learning rates or precision"
    raise ValueError(
        f"{path} holds a run with other settings: {listed}{why}: "
        "choose another run.dir, or set run.allow_change=true to go on anyway"
    )


def refuse_other_data(folder: Folder, world: World, fingerprint: dict[str, Any], allow_change: bool) -> None:
    """Keeps the fingerprint of the text; raises ValueError if the folder's run was trained on another; a collective."""
    text, file = json.dumps(fingerprint, indent=1, sort_keys=True) + "\n", folder.path / "data.json"
    if file.exists() and file.read_text(encoding="utf-8") != text and not allow_change:
        raise ValueError(
            f"the text or tokenizer is not the one {folder.path} was trained on (compare its data.json): "
            "choose another run.dir, or set run.allow_change=true to go on anyway"
        )
    dist.barrier(world.control)
    if world.is_first:
        folder.keep("data.json", text)


def _same_past(before: Run, now: Run, steps_done: int) -> bool:
    a, b = before.train.steps, now.train.steps
    precision = load_precision(now.precision)
    switches = [change.start for change in precision.schedule] + [phase.start for phase in now.data.phases]
    rest = precision.deoscillation
    return steps_done <= min(a, b) and all(
        learning_rate(step, a, now.schedule, now.optim.lr) == learning_rate(step, b, now.schedule, now.optim.lr)
        and all((step / a >= switch) == (step / b >= switch) for switch in switches)
        and (rest is None or rest.window_of(step, a) == rest.window_of(step, b))
        for step in range(steps_done)
    )


def _short(value: Any) -> str:
    text = str(getattr(value, "name", value))
    return text if len(text) <= 40 else text[:37] + "..."
