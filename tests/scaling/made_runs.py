"""Run folders as the trainer writes them, made in a millisecond: what it left behind of a run that never ran."""

import json
from pathlib import Path
from typing import Any

from lowprec.scaling.table import OPERANDS

NVFP4 = {"format": "nvfp4", "element": "e2m1", "exponent_bits": 2, "mantissa_bits": 1, "bits": 4, "bits_per_value": 4.5,
         "block": [1, 16], "scale": "e4m3", "rounding": "nearest", "rotation": None, "gaussian_mse": 0.009}  # fmt: skip
STEPS, PER_STEP, PEAK = 40, 1024, 0.002


def facts(precision: str = "bf16", **changes: Any) -> dict[str, Any]:
    """facts.json of a run of 100,000 parameters, in bf16 or with every operand in NVFP4."""
    steps = changes.get("steps", STEPS)
    quantized = precision != "bf16"
    return {
        "version": 1, "name": "ladder_tiny", "seed": 0, "steps": steps, "tokens": steps * PER_STEP,
        "tokens_per_step": PER_STEP, "parameters": {"total": 150_000, "non_embedding": 100_000},
        "flops_per_token": 660_000.0, "loss_unit": "nats per token", "optimizer": "AdamW", "lr": PEAK,
        "schedule": {"shape": "wsd", "warmup_steps": 2, "decay_steps": steps // 2, "final_frac": 0.01},
        "data": {"seq_len": 256, "tokenizer": "bpe:1024", "vocab_size": 1024, "hash": "7585c6b6946120de"},
        "precision": precision, "quantized_frac": float(quantized),
        "operands": dict.fromkeys(OPERANDS, NVFP4 if quantized else None),
        "precision_schedule": [], "plan": "58ed10e8d6b1",
    } | changes  # fmt: skip


def log(steps: int = STEPS, level: float = 3.0, eval_every: int = 10) -> list[dict[str, Any]]:
    """Records of a finished run whose validation loss ends at `level` + 0.01 nats."""
    records = []
    for step in range(1, steps + 1):
        lr = PEAK * max(min(1.0, 2 * (steps - step) / steps), 0.01)
        record = {"step": step, "tokens": step * PER_STEP, "loss": level + 4 / step - 4 / steps, "lr": lr}
        record |= {"grad_norm": 1.0, "plan": "58ed10e8d6b1"}
        if step % eval_every == 0 or step == steps:
            record |= {"val_loss": record["loss"] + 0.01, "val_loss_high_precision": record["loss"]}
        records.append(record | {"attempt": 1})
    return records


def text(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def make_run(
    folder: Path,
    about: dict[str, Any] | None = None,
    records: list[dict[str, Any]] | str | None = None,
    exit_code: int = 0,
) -> Path:
    """A run folder; by default a finished run in bf16 whose loss depends on its name. `records` may be text."""
    folder.mkdir(parents=True)
    if records is None:
        records = log(level=3 + sum(map(ord, folder.name)) / 12345)
    (folder / "facts.json").write_text(json.dumps(about or facts(), indent=1), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(records if isinstance(records, str) else text(records), encoding="utf-8")
    (folder / "exit_code").write_text(f"{exit_code}\n", encoding="utf-8")
    (folder / "run_id").write_text(f"id-{folder.name}", encoding="utf-8")
    return folder
