"""metrics.jsonl: the record of a run, one JSON object per logged step. Everything else (console, W&B) is a view of it.

    key                      when         meaning
    step                     always       optimizer steps done, from 1
    tokens                   always       tokens consumed up to and including this step
    loss                     always       mean cross-entropy per target of the step's batch, in nats, without z-loss
    lr                       always       learning rate used by this step
    grad_norm                always       L2 norm of the whole gradient before clipping
    tokens_per_s             always       over all ranks, for this step
    step_s, data_s           always       seconds for the step; of these, seconds waiting for data (first rank)
    mem_bytes                always       peak memory of the first rank: resident on a CPU, allocated on a GPU
    ideal_s                  known GPU    {precision: seconds} the step's matrix products take at the published peak
    utilisation              known GPU    the sum of ideal_s / step_s: the share of the arithmetic put to use, below 1
    mfu                      known GPU    model FLOPs / (step_s x the bf16 peak), arXiv:2204.02311; above 1 is possible
    plan                     always       fingerprint of the precision plan in force
    attempt                  always       1 for the first start of this run folder, 2 after the first restart, ...
    val_loss                 evaluation   validation loss with the recipe on
    val_loss_high_precision  evaluation   validation loss of the same weights with every layer unquantised
    wire_bytes               several ranks  {collective: logical bytes of this step for the first rank} (comm/meter.py)
    wire_bytes_per_param     several ranks  their sum, by the number of parameters of the whole model
    probe_sqnr_db            probe        mean over all quantised products of their signal to noise, dB (train/probe.py)
    probe_grad_cosine        probe        cosine of the weight gradients with those of the unquantised model
    probe_sharpness          probe        sharpness of the loss at the logits, per cent (train/stability.py)
    probe_s                  probe        seconds the probe took, not part of step_s
    guard_<what>             acted        spikes, skips, rollbacks, raises so far (train/guard.py)
    osc_ratio                reset        share of the tracked weights that de-oscillation has set to their value
    osc_mean                 reset        their mean d_Q / d_w over the window, weighted by d_w

Utilisation is of a device in the table of published peaks (parallel/devices.py). A CPU, or a GPU that is not in it, has
none, and these three keys are left out: a peak that somebody guessed would make any figure. What counts as ideal is in
parallel/ideal.py; FLOPs are those of the model, and a step that the guard runs unquantised counts as its plan says, so
no accounting can lift the share above 1. Where several steps share a record, all figures are of their mean.

A step that ends a window of de-oscillation ("reset") or is followed by a probe is always recorded.

A line is written in one call and flushed, so a killed process leaves at most one torn last line, which readers
ignore. A resumed run first drops the lines of steps it will do again: there is one line per step, whatever happened
in between.
"""

import contextlib
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from lowprec.linear import Plan
from lowprec.model import ModelConfig
from lowprec.parallel.devices import Hardware, recognised
from lowprec.parallel.ideal import flops_by_precision, ideal_s, products

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """All complete records of a metrics.jsonl; [] if there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # torn
    return records


def finite(node: Any) -> Any:
    """The record with None for every number that is not finite, of which JSON knows none."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


class MetricsLog:
    """Appends to `path` what comes after `resumed_step`; `attempt` counts the starts that logged a step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.attempt = 1 + max((record["attempt"] for record in read_metrics(path)), default=0)
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._unwritten: list[str] = []
        self.rewind(resumed_step)

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`, which are done again."""
        self._file.close()
        old, path = read_metrics(self._path), self._path
        kept = "".join(json.dumps(record) + "\n" for record in old if record["step"] <= step)
        draft = path.with_suffix(".tmp")
        draft.write_text(kept, encoding="utf-8")
        os.replace(draft, path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: Record) -> None:
        """Adds `attempt` to `record` and appends it. Lines that a full disk refuses are kept and written later."""
        record["attempt"] = self.attempt
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")
        self._write()

    def _write(self) -> None:
        whole_bytes = self._path.stat().st_size
        try:
            self._file.write("".join(self._unwritten))
            self._file.flush()
        except OSError:  # other ranks go on, so this one must; `save` says that the disk is full
            os.truncate(self._path, whole_bytes)
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._unwritten.clear()

    def sync(self) -> None:
        """Puts the lines on the disk: a checkpoint must never be newer than the record."""
        if self._unwritten:
            self._write()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since the start: allocated by torch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware_of(device: torch.device) -> Hardware | None:
    """The published values of this rank's device, or None."""
    return recognised(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Utilisation:
    """Adds up what steps would take at the peak of so many devices of a kind; `record` compares and starts anew.

    hardware: None = there is no published peak, and nothing is recorded.
    """

    def __init__(
        self, plan: Plan, model: ModelConfig, seq_len: int, tokens: int, devices: int, hardware: Hardware | None
    ) -> None:
        """tokens: of a step, over all devices."""
        self._plan, self._model, self._seq_len, self._tokens = plan, model, seq_len, tokens
        self._devices, self._hardware = devices, hardware
        self._known: dict[tuple[float, ...], dict[str, float]] = {}  # FLOPs a token, by the changes in force
        self._start()

    def _start(self) -> None:
        self._ideal_s: dict[str, float] = {}
        self._flops, self._steps = 0.0, 0

    def lap(self, progress_frac: float) -> None:
        """One step is done, with the recipes of this progress."""
        if self._hardware is None:
            return
        key = tuple(change.start for change in self._plan.precision.schedule if progress_frac >= change.start)
        if key not in self._known:
            found = products(self._plan, self._model, self._seq_len, progress_frac)
            self._known[key] = flops_by_precision(found, self._hardware)
        flops = self._known[key]
        for name, seconds in ideal_s(flops, self._tokens, self._hardware, self._devices).items():
            self._ideal_s[name] = self._ideal_s.get(name, 0.0) + seconds
        self._flops += sum(flops.values()) * self._tokens
        self._steps += 1

    def record(self, step_s: float) -> Record:
        """The keys of a record whose steps took `step_s` each; {} where no peak is known."""
        if self._hardware is None or not self._steps:
            return {}
        ideal = {name: seconds / self._steps for name, seconds in self._ideal_s.items()}
        peak = self._hardware.flops["bf16"] * self._devices
        mfu = self._flops / self._steps / (step_s * peak)
        self._start()
        return {"ideal_s": ideal, "utilisation": sum(ideal.values()) / step_s, "mfu": mfu}
