"""compare_runs: put runs side by side, by their metrics.jsonl.

    python tools/compare_runs.py runs/nvfp4 runs/bf16
    python tools/compare_runs.py before after --assert-equal        # a change that should not change numbers
    python tools/compare_runs.py runs/nvfp4 runs/bf16 --plot docs/curves.png

The table gives each run's mean training loss over its last steps and its last validation losses. ``--assert-equal``
compares loss, learning rate and gradient norm of every step that all runs logged, to the last bit, and exits with 1
if any differs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.train.metrics import read_metrics

EXACT = ("loss", "lr", "grad_norm")
LAST_STEPS = 20

Records = list[dict[str, Any]]


def read(folder: Path) -> Records:
    """The records of a run folder. Raises ValueError if it has none."""
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise ValueError(f"{folder} holds no metrics.jsonl with a complete line; give the folder of a run")
    return records


def last(records: Records, key: str) -> str:
    """The last value of a key that not every record has, or a dash."""
    values = [record[key] for record in records if key in record]
    return f"{values[-1]:.4f}" if values else "-"


def table(runs: dict[str, Records]) -> str:
    """One row a run."""
    rows = [("run", "steps", "tokens", f"loss, last {LAST_STEPS}", "val_loss", "val_loss_high_precision", "plan")]
    for name, records in runs.items():
        recent = [record["loss"] for record in records[-LAST_STEPS:]]
        end = records[-1]
        losses = (
            f"{sum(recent) / len(recent):.4f}",
            last(records, "val_loss"),
            last(records, "val_loss_high_precision"),
        )
        rows.append((name, str(end["step"]), str(end["tokens"]), *losses, str(end.get("plan", "-"))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def first_difference(runs: dict[str, Records]) -> str | None:
    """A sentence on the first step in which two runs differ, or None. Raises ValueError if they share no step."""
    (name, base), *others = runs.items()
    for other_name, other in others:
        by_step = {record["step"]: record for record in other}
        shared = [record for record in base if record["step"] in by_step]
        if not shared:
            raise ValueError(f"{name} and {other_name} have no logged step in common; there is nothing to compare")
        for record in shared:
            for key in EXACT:
                there = by_step[record["step"]][key]
                if record[key] != there:
                    return f"step {record['step']}: {key} is {record[key]!r} in {name} and {there!r} in {other_name}"
    return None


def plot(runs: dict[str, Records], path: Path) -> None:
    """Loss over tokens, one faint line and its running mean a run, validation losses as dots."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib (it is in the extra 'dev')") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, records in runs.items():
        tokens, losses = [r["tokens"] for r in records], [r["loss"] for r in records]
        means = [sum(losses[max(0, i - LAST_STEPS + 1) : i + 1]) / min(i + 1, LAST_STEPS) for i in range(len(losses))]
        (line,) = axes.plot(tokens, means, label=name, linewidth=1.5)
        axes.plot(tokens, losses, color=line.get_color(), alpha=0.2, linewidth=0.7)
        dots = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=line.get_color(), markersize=5)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"mean of {LAST_STEPS} steps; dots: validation", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if --assert-equal found a difference; 2 for bad arguments."""
    p = argparse.ArgumentParser("compare_runs", description="Put runs side by side.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    p.add_argument("--assert-equal", action="store_true", help="exit with 1 unless all shared steps are equal")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the loss curves")
    options = p.parse_args(argv)
    try:
        runs = {str(folder): read(folder) for folder in options.runs}
        if options.assert_equal and len(runs) < 2:
            raise ValueError("--assert-equal needs two different run folders")
        print(table(runs))
        if options.plot:
            plot({Path(name).name: records for name, records in runs.items()}, options.plot)
        difference = first_difference(runs) if options.assert_equal else None
    except ValueError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    if difference:
        print(f"compare_runs: {difference}", file=sys.stderr)
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
