"""lowprec-sweep: plan and train a ladder of runs, sizes x durations x precisions x seeds, to fit scaling laws to.

    lowprec-sweep cpu_ladder                                  # what it would train, what is done, what it costs
    lowprec-sweep cpu_ladder --run --jobs 2                   # here, so many runs at once
    lowprec-sweep my/ladder.yaml --run --launcher 'torchrun --standalone --nproc-per-node 8 --no-python lowprec-train'
    lowprec-sweep my/ladder.yaml --slurm                      # writes an array job, and says how to submit it
    lowprec-sweep cpu_ladder --run optim.weight_decay=0.05    # more overrides, for all runs

A ladder is a YAML file, by name from recipes/sweep/ or by path; --help tells what it may hold.

Every run has a folder of its own, <dir>/<size>_<duration>_<precision>_s<seed>. Started again, a sweep skips what is
finished and goes on with what is not; a run that diverged is a result and is left as it is, unless --again. Cheap runs
go first. What a run prints is in <dir>/logs/<run>.log. That file is locked while the run is trained, so two sweeps may
share a ladder, and a run that outlives a killed sweep is waited for.

TERM, USR1 or Ctrl-C: all runs save and end, and the same command goes on from there. A second Ctrl-C kills them.

Exit codes: 0 all finished (or diverged) · 1 some failed, each named with the last line of its log · 2 the command or
the ladder is wrong · 75 stopped.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of launch/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch

import lowprec.launch.ladder
import lowprec.launch.train
from lowprec.launch.ladder import Cell, cells, path_of, read_ladder
from lowprec.launch.sweep_runs import How, State, duration, failure, seconds_left, state_of, train_all
from lowprec.launch.train import explain
from lowprec.parallel import end_process
from lowprec.train import REQUEUE

HERE = [sys.executable, str(lowprec.launch.train.__file__)]


# ---- the plan


def table(states: dict[Cell, State], notes: list[str], jobs: int) -> str:
    """What the ladder is, what is done, what has failed, and what is left of the cost."""
    rows = [("run", "N", "tokens", "steps", "tokens/N", "FLOP", "state")]
    for run, state in states.items():
        numbers = f"{run.parameters:,}", f"{run.tokens:,}", f"{run.steps:,}", f"{run.tokens / run.parameters:.3g}"
        text = state.word if state.word == "other settings" else str(state)  # they are told below
        rows.append((run.name, *numbers, f"{run.flops:.2e}", text))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for name, *middle, text in rows:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, middle, widths[1:]), text]))
    for run, state in states.items():
        if state.word in ("failed", "other settings"):
            lines.append(failure(run, state))
    return "\n".join([*lines, *notes, summary(states, jobs)])


def summary(states: dict[Cell, State], jobs: int) -> str:
    """One line: the number of runs, their cost, and what is left of it."""
    undone = [run for run, state in states.items() if not state.done]
    total = sum(run.flops for run in states)
    text = f"{len(states)} runs, {total:.2e} FLOP (N without embeddings and head)"
    if not undone:
        return f"{text}; all are done"
    text += f"; {len(undone)} are to be done, {flops_left(states):.2e} FLOP"
    seconds = seconds_left(states)
    if seconds is None:
        return text
    at_once = f" with {jobs} at a time" if jobs > 1 else ""
    return f"{text}, about {duration(seconds / jobs)}{at_once} (estimated from measured steps; start-up not counted)"


def flops_left(states: dict[Cell, State]) -> float:
    return sum(run.flops * (1 - state.steps / run.steps) for run, state in states.items() if not state.done)


def as_json(states: dict[Cell, State], notes: list[str]) -> dict[str, Any]:
    """The plan for programs."""
    keys = ("name", "size", "precision", "parameters", "steps", "tokens", "flops_per_token", "flops")
    runs = [
        {key: getattr(run, key) for key in keys}
        | {"seed": run.run.seed, "folder": str(run.folder), "state": state.word, "why": state.why}
        | {"steps_done": state.steps, "tokens_per_s": state.tokens_per_s, "words": list(run.words)}
        for run, state in states.items()
    ]
    total = {"flops": sum(run.flops for run in states), "flops_left": flops_left(states)}
    return {"runs": runs, **total, "seconds_left": seconds_left(states), "notes": notes}


# ---- Slurm

ARRAY = """#!/bin/bash
# {count} runs of a ladder, one task each; written by lowprec-sweep. What a task needs is said when it is submitted:
#
#   sbatch --gpus-per-task=1 --time=4:00:00 {path}
#
# A task whose run is finished ends at once. One that is told to leave (preemption, the end of its time) lets its run
# save and is requeued, to go on from there. It is not requeued when its run has failed or diverged.
#
#SBATCH --job-name=lowprec-sweep
#SBATCH --array=0-{last}{limit}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output="{folder}/logs/task_%A_%a.out"
# B: = to this script, which passes it on; 120 s = for the step under way, and a save

leaving= child=
leave() {{
    leaving=1
    [ -z "$child" ] || kill -TERM "$child"
}}
trap leave TERM USR1
cd {cwd} || exit 2
{command} --task "${{SLURM_ARRAY_TASK_ID:?submit this with sbatch}}" &
child=$!
[ -z "$leaving" ] || leave # it came before there was a child
wait "$child"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a trap ends `wait` early
wait "$child"
code=$?
[ -n "$leaving" ] && [ "$code" -gt 128 ] && code={requeue} # told to leave before it could listen
echo "lowprec-sweep ended with code $code"
[ "$code" = {requeue} ] || exit "$code"
scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
"""


def write_array(a: argparse.Namespace, folder: Path, count: int) -> Path:
    """Writes the batch script of an array job over the runs, beside a copy of the ladder, whose runs it counts."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path, ladder = folder / "array.sbatch", folder / "ladder.yaml"
    source = path_of(a.ladder)
    if source.resolve() != ladder:
        shutil.copyfile(source, ladder)
    words = [sys.executable, str(Path(__file__)), str(ladder), "--dir", str(folder), "--retries", str(a.retries)]
    words += ["--again"] if a.again else []
    words += ["--threads", str(a.threads)] if a.threads else []
    words += ["--launcher", a.launcher] if a.launcher else []
    words += [word for own in a.config_dir for word in ("--config-dir", str(own))]
    script = ARRAY.format(
        count=count, path=shlex.quote(str(path)), last=count - 1, limit=f"%{a.jobs}" if a.jobs else "", folder=folder,
        cwd=shlex.quote(os.getcwd()), command=shlex.join([*words, *a.overrides]), requeue=REQUEUE,
    )  # fmt: skip
    path.write_text(script, encoding="utf-8")
    return path


# ---- the command


def parser() -> argparse.ArgumentParser:
    text = f"{__doc__}\n{lowprec.launch.ladder.__doc__}"
    p = argparse.ArgumentParser("lowprec-sweep", description=text, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("ladder", help="name of a file in recipes/sweep, or the path of one")
    p.add_argument("overrides", nargs="*", help="key=value for all runs")
    p.add_argument("--dir", type=Path, help="where the runs' folders are made (default: runs/<name of the ladder>)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--run", action="store_true", help="train what is not done")
    what.add_argument("--slurm", action="store_true", help="write an array job")
    what.add_argument("--task", type=int, metavar="I", help="train the run of this number, from 0 (an array job does)")
    what.add_argument("--json", action="store_true", help="print the plan as JSON")
    p.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1; of an array job: no limit)")
    p.add_argument("--threads", type=int, metavar="N", help="threads of a run (default: cores / jobs)")
    p.add_argument("--launcher", metavar="COMMAND", help="what trains a run (default: this Python, one process)")
    p.add_argument("--retries", type=int, default=3, metavar="N", help="new starts of a run that ends with code 75 "
                   "unasked, such as after the loss of a rank (default: %(default)s)")  # fmt: skip
    p.add_argument("--again", action="store_true", help="also start runs that diverged")
    p.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="recipes of your own")
    return p


def how_to_train(a: argparse.Namespace) -> How:
    """The checked options. Raises ValueError."""
    for option, value, least in (("jobs", a.jobs, 1), ("threads", a.threads, 1), ("retries", a.retries, 0)):
        if value is not None and value < least:
            raise ValueError(f"--{option} {value} must be at least {least}")
    how = How(HERE, 1 if a.task is not None else a.jobs or 1, a.threads, retries=a.retries, again=a.again)
    if a.launcher is not None:  # it knows how many processes there are, and what threads and GPUs they have
        launcher = shlex.split(a.launcher)
        if not launcher or (not a.slurm and shutil.which(launcher[0]) is None):
            raise ValueError(f"--launcher {a.launcher!r}: there is no such command")
        return replace(how, launcher=launcher)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cores // how.jobs)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return replace(how, threads=a.threads or threads, gpus=tuple(gpus) if len(gpus) > 1 else ())


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (see above)."""
    a = parser().parse_intermixed_args(argv)
    folder: Path = a.dir or Path("runs") / Path(a.ladder).stem
    try:
        how = how_to_train(a)
        runs, notes = cells(read_ladder(a.ladder), folder, a.overrides, a.config_dir)
        if a.task is not None and not 0 <= a.task < len(runs):
            raise ValueError(f"--task {a.task}: the ladder has the runs 0 to {len(runs) - 1}")
    except (ValueError, OSError) as error:
        print(f"lowprec-sweep: {explain(error)}", file=sys.stderr)
        return 2
    try:
        if a.run or a.task is not None:
            print(*notes, sep="\n", end="\n" if notes else "", flush=True)
            return train_all(runs if a.run else [runs[a.task]], how)
        if a.slurm:
            path = write_array(a, folder.resolve(), len(runs))
            print(*notes, f"{len(runs)} runs: submit them with  sbatch {shlex.quote(str(path))}", sep="\n")
            return 0
    except OSError as error:
        print(f"lowprec-sweep: {explain(error)}", file=sys.stderr)
        return 2
    states = {run: state_of(run) for run in runs}
    print(json.dumps(as_json(states, notes), indent=1) if a.json else table(states, notes, how.jobs))
    return 0


def command() -> None:
    """The console script: `main`, and an end that does not wait for torch's threads."""
    end_process(main())


if __name__ == "__main__":
    command()
