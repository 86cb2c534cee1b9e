"""lowprec-eval: the validation loss and perplexity of a checkpoint, in any precision, and tasks of lm-eval-harness.

    lowprec-eval runs/nvfp4                                       # in the run's recipe, and unquantised
    lowprec-eval runs/bf16 --precision nvfp4 mxfp4 my/recipe.yaml # post-training quantisation: what a recipe would cost
    lowprec-eval runs/nvfp4 --step 500 --json
    lowprec-eval runs/nvfp4 --tasks lambada_openai hellaswag --limit 100      # needs the extra `eval`
    lowprec-eval runs/nvfp4 --tasks mine --include-path my/tasks              # a task of your own, no network

One process, whatever layout wrote the checkpoint. The batches are the run's own validation data, so the first two rows
equal `val_loss` and `val_loss_high_precision` of metrics.jsonl (unless the probe after that very step raised a layer).
A `--precision` is a file of recipes/precision or a path, with that file's own rules: layers that it quantises have
their weights and activations quantised to it in the forward pass, nothing is trained or calibrated; a schedule in it is
not followed. Tasks run one sequence at a time, since scales that span a batch would make a score depend on what else is
in it.

Exit codes: 0 · 2 the command, the run or a task is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of launch/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch

from lowprec.data import IGNORED
from lowprec.linear.precision import read_file
from lowprec.model import cross_entropy
from lowprec.train.loaded import Loaded, open_run

TRAINED, UNQUANTISED = "as trained", "high precision"


@dataclass(frozen=True)
class Score:
    """A checkpoint in one precision."""

    precision: str
    loss: float | None  # nats a target; None without validation data
    perplexity: float | None
    tasks: dict[str, dict[str, float]]  # {task: {metric: value}}


@torch.no_grad()
def validation_loss(loaded: Loaded) -> float | None:
    """Mean cross-entropy per target over the run's validation batches, nats; None if it has none."""
    total, targets = 0.0, 0
    loaded.plan.clock.step = max(loaded.step - 1, 0)  # as the step before, after which training validates
    for number, batch in enumerate(loaded.data.validation):
        loaded.plan.clock.micro = number
        ids_BT = None if batch.document_ids is None else batch.document_ids.to(loaded.device)
        logits_BTV = loaded.model(batch.tokens.to(loaded.device), ids_BT)
        targets_BT = batch.targets.to(loaded.device)
        total += cross_entropy(logits_BTV, targets_BT)[0].double().item()
        targets += int((targets_BT != IGNORED).sum())
    return total / targets if targets else None


def score(loaded: Loaded, name: str, tasks: Tasks | None) -> Score:
    """The model as it stands."""
    loaded.model.eval()
    loss = validation_loss(loaded)
    perplexity = None if loss is None else math.exp(min(loss, 700.0))
    return Score(name, loss, perplexity, tasks.run(loaded) if tasks else {})


def evaluate(run_dir: Path, step: int | None, precisions: list[str], tasks: Tasks | None) -> tuple[int, list[Score]]:
    """The step of the checkpoint, and its scores: as trained, unquantised, and in each of `precisions`.

    Raises ValueError for what is not there.
    """
    nodes = {name: read_file(name) for name in precisions}  # before the work: a name may be wrong
    loaded = open_run(run_dir, step)
    loaded.plan.at(max(loaded.step - 1, 0) / loaded.run.train.steps)  # the precision of the step that was done last
    scores = []
    for name, context in ((TRAINED, nullcontext()), (UNQUANTISED, loaded.plan.high_precision())):
        with context:
            scores.append(score(loaded, name, tasks))
    for name, node in nodes.items():
        scores.append(score(open_run(run_dir, step, precision=node), name, tasks))
    return loaded.step, scores


# ---- lm-eval-harness


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval-harness, by name."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    fewshot: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if the harness is not installed, or does not know a task."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be at least 1 document of each task")
        self._manager()

    def _manager(self) -> Any:
        """Who knows the tasks: those of the folder alone if that is enough, since reading all of them takes seconds."""
        unknown = set(self.names)
        for defaults in (False, True) if self.include_path else (True,):
            manager = _tasks(self.include_path, defaults)
            unknown = set(self.names) - set(manager.match_tasks(list(self.names)))
            if not unknown:
                return manager
        raise ValueError(f"lm-eval-harness knows no task {', '.join(sorted(unknown))}; add --include-path for your own")

    def run(self, loaded: Loaded) -> dict[str, dict[str, float]]:
        """{task: {metric: value}} of the model as it stands."""
        import lm_eval

        from lowprec.launch.harness import Harness

        with _quiet():
            found = lm_eval.simple_evaluate(
                model=Harness(loaded), tasks=list(self.names), num_fewshot=self.fewshot, limit=self.limit,
                task_manager=self._manager(), log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
        assert found is not None
        return {
            task: {key.removesuffix(",none"): float(value) for key, value in values.items() if _is_number(value)}
            for task, values in found["results"].items()
        }


@lru_cache(maxsize=4)
def _tasks(include_path: Path | None, defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval-harness ({error}): pip install 'lowprec[eval]'") from None
    return TaskManager(include_path=None if include_path is None else str(include_path), include_defaults=defaults)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's progress bars and logs go to stderr only when something is wrong."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---- the command


def table(step: int, scores: list[Score]) -> str:
    """The scores for people; differences are to the unquantised weights."""
    base = next(s.loss for s in scores if s.precision == UNQUANTISED)
    width = max(len(s.precision) for s in scores)
    head = f"{'precision':<{width}}  {'loss':>9}  {'perplexity':>11}  {'to high precision':>17}"
    lines = [f"checkpoint of step {step}", head]
    for s in scores:
        if s.loss is None:
            lines.append(f"{s.precision:<{width}}  {'-':>9}  {'-':>11}  {'-':>17}")
            continue
        delta = "" if base is None else f"{s.loss - base:+.5f}"
        lines.append(f"{s.precision:<{width}}  {s.loss:>9.5f}  {s.perplexity:>11.4f}  {delta:>17}")
    for s in scores:
        for task, metrics in s.tasks.items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            lines.append(f"{s.precision:<{width}}  {task}: {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (see above)."""
    p = argparse.ArgumentParser("lowprec-eval", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("run_dir", type=Path, help="folder of a run (its run.dir)")
    p.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    p.add_argument("--precision", nargs="+", default=[], metavar="NAME", help="quantise to these after training")
    p.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-eval-harness")
    p.add_argument("--include-path", type=Path, metavar="DIR", help="folder of your own tasks")
    p.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    p.add_argument("--fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    p.add_argument("--json", action="store_true")
    a = p.parse_args(argv)
    try:
        tasks = Tasks(tuple(a.tasks), a.include_path, a.limit, a.fewshot) if a.tasks else None
        step, scores = evaluate(a.run_dir, a.step, a.precision, tasks)
    except (ValueError, OSError) as error:
        print(f"lowprec-eval: {error}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps({"run": str(a.run_dir), "step": step, "scores": [asdict(s) for s in scores]}, indent=1))
    else:
        print(table(step, scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
