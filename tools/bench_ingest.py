"""How fast run folders become a table: writes N synthetic run folders into a temporary folder and reads them.

    python tools/bench_ingest.py                    # 1,000 runs of 400 lines
    python tools/bench_ingest.py 10000 --lines 400

Prints seconds and runs per second of reading alone; the folders (about 90 kB each) are removed.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.scaling.read import read
from lowprec.scaling.table import OPERANDS

OPERAND = {"format": "nvfp4", "element": "e2m1", "exponent_bits": 2, "mantissa_bits": 1, "bits": 4,
           "bits_per_value": 4.5, "block": [1, 16], "scale": "e4m3", "rounding": "nearest", "rotation": None,
           "gaussian_mse": 0.009}  # fmt: skip


def write_run(folder: Path, lines: int, rng: random.Random) -> None:
    """A finished run folder with a log of `lines` steps, as the trainer writes it."""
    n, per_step = rng.choice((1, 2, 4, 8)) * 100_000, rng.choice((1024, 2048, 4096))
    quantized = rng.random() < 0.5
    precision = "nvfp4" if quantized else "bf16"
    facts = {
        "version": 1, "name": "ladder_tiny", "seed": rng.randrange(10**6), "steps": lines, "tokens": lines * per_step,
        "tokens_per_step": per_step, "parameters": {"total": 2 * n, "non_embedding": n}, "flops_per_token": 6.6 * n,
        "loss_unit": "nats per token", "optimizer": "AdamW", "lr": 0.002,
        "schedule": {"shape": "wsd", "warmup_steps": 0, "decay_steps": lines // 2, "final_frac": 0.01},
        "data": {"seq_len": 256, "tokenizer": "bpe:1024", "vocab_size": 1024, "hash": "7585c6b6946120de"},
        "precision": precision, "quantized_frac": float(quantized),
        "operands": dict.fromkeys(OPERANDS, OPERAND if quantized else None),
        "precision_schedule": [], "plan": "58ed10e8d6b1",
    }  # fmt: skip
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (folder / "exit_code").write_text("0\n", encoding="utf-8")
    (folder / "run_id").write_text(f"{rng.getrandbits(32):08x}", encoding="utf-8")
    (folder / "checkpoints").mkdir()
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, lines + 1):
            loss = 2 + 5 * (n * step) ** -0.1 + rng.gauss(0, 0.02)
            lr = 0.002 * min(1.0, 2 * (lines - step) / lines + 0.01)
            record = {"step": step, "tokens": step * per_step, "loss": loss, "lr": lr, "grad_norm": rng.random()}
            record |= {"tokens_per_s": 1e4 * rng.random(), "step_s": rng.random(), "data_s": rng.random() * 1e-4}
            record |= {"mem_bytes": 437497856, "plan": "58ed10e8d6b1"}
            if step % 100 == 0 or step == lines:
                record |= {"val_loss": loss + 0.01, "val_loss_high_precision": loss}
            log.write(json.dumps(record | {"attempt": 1}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=int, nargs="?", default=1000)
    parser.add_argument("--lines", type=int, default=400, help="logged steps of a run")
    args = parser.parse_args()
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="ingest-"))
    try:
        for i in range(args.runs):
            write_run(folder / f"run{i:05d}", args.lines, rng)
        start, cpu = time.perf_counter(), time.process_time()
        table = read([str(folder)])
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        assert len(table) == args.runs, table.dropped[:3]
        print(f"{args.runs} runs of {args.lines} lines: {seconds:.2f} s ({cpu_s:.2f} s of CPU), "
              f"{args.runs / seconds:.0f} runs/s")  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
