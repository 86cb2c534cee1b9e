"""stability: the same model on a grid of learning rates and seeds: how many runs fail, and how much the rate matters.

    lowprec-stability grid runs/stable recipe=nvfp4_tiny --lr 1e-3,4e-3,16e-3 --seeds 5 --precision bf16,nvfp4
    lowprec-sweep runs/stable/ladder.yaml --dir runs/stable --run --jobs 2       # trains it; goes on when started again
    lowprec-stability report runs/stable

One curve says little about stability ("To FP8 and Back Again", arXiv:2405.18710): take five to ten times the tuned
learning rate at the top, and five to ten seeds. `grid` writes a ladder for `lowprec-sweep`, a size of which is a
learning rate. `report` reads the runs that are there: for each precision and rate the share that diverged, the share
with a spike (loss 7 standard deviations above the mean of the 1,000 steps before), the spike score (share of steps),
the median of the final loss; for each precision the sensitivity to the rate (arXiv:2309.14322, in nats). `--json`
prints the same.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import yaml

from lowprec.launch.ladder import cells, read_ladder
from lowprec.launch.sweep_runs import state_of
from lowprec.launch.train import explain
from lowprec.train.metrics import read_metrics
from lowprec.train.stability import lr_sensitivity, spike_score, spikes


def grid(folder: Path, recipe: str, overrides: list[str], rates: list[float], seeds: int, precisions: list[str],
         tokens: float) -> Path:  # fmt: skip
    """Writes the ladder and returns its path. Raises ValueError."""
    if len(set(rates)) != len(rates) or min(rates) <= 0:
        raise ValueError(f"--lr {','.join(f'{r:g}' for r in rates)}: give different learning rates above 0")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    ladder = {
        "recipe": recipe,
        "overrides": overrides,
        "sizes": {f"lr{rate:g}".replace("+", ""): [f"optim.lr={rate:g}"] for rate in rates},
        "tokens": [tokens],
        "precision": precisions,
        "seeds": list(range(seeds)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(ladder, sort_keys=False), encoding="utf-8")
    read_ladder(str(path))
    return path


def report(folder: Path, window: int, sigmas: float) -> dict[str, Any]:
    """What the runs of a grid say. Raises ValueError if none has ended."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells(read_ladder(str(folder / "ladder.yaml")), folder, [], [])[0]:
        records, word = read_metrics(cell.folder / "metrics.jsonl"), state_of(cell).word
        if word not in ("finished", "diverged") or (word == "finished" and not records):
            continue
        diverged, losses = word == "diverged", [record["loss"] for record in records]
        found.setdefault((cell.precision, cell.run.optim.lr), []).append({
            "final": None if diverged else records[-1].get("val_loss") or losses[-1],
            "first": next((loss for loss in losses if loss is not None), None),
            "diverged": diverged,
            "spiked": diverged or bool(spikes(losses, window, sigmas)),
            "score": spike_score(losses, window, sigmas),
        })  # fmt: skip
    if not found:
        raise ValueError(f"{folder} holds no run that has ended: train the grid with lowprec-sweep first")
    rows = []
    for (precision, rate), runs in sorted(found.items()):
        finals = [run["final"] for run in runs if run["final"] is not None]
        rows.append({
            "precision": precision, "lr": rate, "runs": len(runs),
            "diverged_frac": sum(run["diverged"] for run in runs) / len(runs),
            "spiked_frac": sum(run["spiked"] for run in runs) / len(runs),
            "spike_score": sum(run["score"] for run in runs) / len(runs),
            "final_loss": median(finals) if finals else None,
        })  # fmt: skip
    firsts = [run["first"] for runs in found.values() for run in runs if run["first"] is not None]
    if not firsts:
        raise ValueError(f"every run of {folder} diverged before its first record: lower the learning rates")
    first = median(firsts)
    sensitivity = {
        name: lr_sensitivity({row["lr"]: row["final_loss"] for row in rows if row["precision"] == name}, first)
        for name in dict.fromkeys(row["precision"] for row in rows)
    }
    return {"rows": rows, "lr_sensitivity": sensitivity, "initial_loss": first}


def text(found: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"{'precision':<16}{'lr':>10}{'runs':>6}{'diverged':>10}{'spiked':>8}{'spike score':>13}{'final loss':>12}"
    ]
    for row in found["rows"]:
        final = "-" if row["final_loss"] is None else f"{row['final_loss']:.4f}"
        lines.append(
            f"{row['precision']:<16}{row['lr']:>10.3g}{row['runs']:>6}{row['diverged_frac']:>10.0%}"
            f"{row['spiked_frac']:>8.0%}{row['spike_score']:>13.2%}{final:>12}"
        )
    for name, value in found["lr_sensitivity"].items():
        lines.append(f"{name}: sensitivity to the learning rate {value:.4f} nats")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 · 2 the command is wrong or there is nothing to report."""
    p = argparse.ArgumentParser("lowprec-stability", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("grid", help="write the ladder")
    g.add_argument("folder", type=Path)
    g.add_argument("overrides", nargs="+", help="recipe=NAME and key=value for all runs")
    g.add_argument("--lr", required=True, help="learning rates, as in 1e-3,4e-3")
    g.add_argument("--seeds", type=int, default=5)
    g.add_argument("--precision", default="bf16,nvfp4", help="files of recipes/precision (default: %(default)s)")
    g.add_argument("--tokens", type=float, default=1e6, help="of each run (default: 1e6)")
    r = commands.add_parser("report", help="read the runs")
    r.add_argument("folder", type=Path)
    r.add_argument("--window", type=int, default=1000, help="steps a spike is judged by (default: %(default)s)")
    r.add_argument("--sigmas", type=float, default=7.0, help="(default: %(default)s)")
    r.add_argument("--json", action="store_true")
    a = p.parse_args(argv)
    try:
        if a.command == "report":
            found = report(a.folder, a.window, a.sigmas)
            print(json.dumps(found, indent=1) if a.json else text(found))
            return 0
        recipes = [o.partition("=")[2] for o in a.overrides if o.startswith("recipe=")]
        if len(recipes) != 1:
            raise ValueError("name one recipe: recipe=NAME")
        others = [o for o in a.overrides if not o.startswith("recipe=")]
        try:
            rates = [float(word) for word in a.lr.split(",")]
        except ValueError:
            raise ValueError(f"--lr {a.lr!r}: give numbers with commas between, as in 1e-3,4e-3") from None
        path = grid(a.folder, recipes[0], others, rates, a.seeds, a.precision.split(","), a.tokens)
        print(f"train it with  lowprec-sweep {path} --dir {a.folder} --run")
    except (ValueError, OSError) as error:
        print(f"lowprec-stability: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
