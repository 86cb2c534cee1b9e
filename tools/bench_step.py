"""bench_step: what a precision recipe costs in a whole model, forward and backward.

    python tools/bench_step.py
    python tools/bench_step.py --recipes nvfp4,quartet2 --reps 11 --threads 1 --json

A Llama of 4 layers, 256 wide (8 x 256 tokens; every block linear in the recipe, head and attention core in bf16) next
to the same model in bf16, one step of each in turn; a row shows the median of the ratios of neighbours. Unlike a layer
by itself (``bench_linear``), a model has layers that share an input (q, k and v; gate and up) and small ones, where
fixed costs show. The loss of both is printed: they must be near each other, or a row would be quick by being wrong.

``--memory`` adds what three steps needed at their peak beyond what was there before, each recipe in a fresh process
(Linux).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in launch/train.py: waiting threads sleep after a short spin

import torch
from torch import Tensor

from lowprec.linear import Plan, Rule, load_precision
from lowprec.model import ModelConfig, Transformer, build, cross_entropy

TARGETS = {"nvfp4": 1.10, "mxfp4": 1.0}
"""Time of a step over that of the bf16 model, at most, on two cores with AVX512-VNNI and AVX512-BF16."""
CONFIG = ModelConfig(vocab_size=2048, dim=256, layers=4, heads=4, kv_heads=4, ffn_dim=704)
LOSS_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """One recipe: the ratio of a step's time to bf16's, the loss of both, and the peak memory over bf16's."""

    recipe: str
    ratio_bf16: float
    loss: float
    loss_bf16: float
    peak_mb: float | None = None
    peak_bf16_mb: float | None = None

    @property
    def right(self) -> bool:
        return abs(self.loss - self.loss_bf16) < LOSS_TOLERANCE


def make(recipe: str, save: str = "inputs") -> tuple[Transformer, Plan]:
    """The model with every block linear in the recipe of that name."""
    model = build(CONFIG)
    model.init_weights(0)
    precision = load_precision(recipe)
    name = recipe if recipe in precision.linear else next((n for n in precision.linear if n != "bf16"), "bf16")
    rules = (Rule("lm_head", "bf16"), Rule("*", name))
    plan = Plan.of(model, dataclasses.replace(precision, rules=rules, save=save))
    plan.apply(model)
    return model, plan


def step(model: Transformer, plan: Plan, tokens_BT: Tensor) -> float:
    """Forward and backward; returns the mean loss."""
    model.zero_grad(set_to_none=True)
    loss, _ = cross_entropy(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
    loss = loss / tokens_BT[:, 1:].numel()
    loss.backward()
    plan.end_step(0)
    return float(loss.detach())


def batch(sequences: int, tokens: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (sequences, tokens + 1), generator=torch.Generator().manual_seed(0))


def measure(recipe: str, tokens_BT: Tensor, reps: int) -> Row:
    """Interleaved steps of both models, after one warm-up each."""
    models = {name: make(name) for name in ("bf16", recipe)}
    losses = {name: step(*pair, tokens_BT) for name, pair in models.items()}
    ratios = []
    for _ in range(reps):
        seconds = {}
        for name, pair in models.items():
            start = time.perf_counter()
            step(*pair, tokens_BT)
            seconds[name] = time.perf_counter() - start
        ratios.append(seconds[recipe] / seconds["bf16"])
    return Row(recipe, statistics.median(ratios), losses[recipe], losses["bf16"])


def peak_mb(recipe: str, save: str, shape: tuple[int, int]) -> float:
    """Peak resident memory of three steps in a fresh process, less what was there before the first, in MB."""
    command = [sys.executable, "-m", "lowprec.tools.bench_step", "--one", recipe, save, *map(str, shape)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"measuring {recipe} failed: {result.stderr[-500:]}")
    return float(result.stdout)


def one(recipe: str, save: str, shape: tuple[int, int]) -> None:
    """What the fresh process does."""
    model, plan = make(recipe, save)
    step(model, plan, batch(1, 32))  # libraries are loaded, kernels built
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_mb("VmRSS")
    for _ in range(3):
        step(model, plan, batch(*shape))
    print(resident_mb("VmHWM") - before)


def resident_mb(field: str) -> float:
    """A line of /proc/self/status: VmRSS now, VmHWM at its peak (getrusage would report the parent's peak too)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a model's loss is not near that of bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(TARGETS), help="comma-separated names in recipes/precision")
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 256), metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="peak memory of fresh processes too")
    parser.add_argument("--save", choices=["inputs", "codes"], default="inputs", help="for --memory: what is kept of x")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="2 x 64 tokens, 2 repetitions")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        one(options.one[0], options.one[1], (int(options.one[2]), int(options.one[3])))
        return 0
    torch.set_num_threads(options.threads)
    shape, reps = ((2, 64), 2) if options.quick else (tuple(options.shape), options.reps)
    rows = []
    for recipe in options.recipes.split(","):
        row = measure(recipe, batch(*shape), reps)
        if options.memory:
            peaks = peak_mb(recipe, options.save, shape), peak_mb("bf16", "inputs", shape)
            row = Row(row.recipe, row.ratio_bf16, row.loss, row.loss_bf16, *peaks)
        rows.append(row)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(table(rows, shape, options.threads))
    wrong = [row.recipe for row in rows if not row.right]
    if wrong:
        print(f"bench_step: the loss of {', '.join(wrong)} is not near bf16's: its time means nothing", file=sys.stderr)
    return 1 if wrong else 0


def table(rows: list[Row], shape: tuple[int, ...], threads: int) -> str:
    lines = [f"Llama, 4 x 256, {shape[0]} x {shape[1]} tokens, forward + backward, {threads} thread(s)", ""]
    lines.append(f"{'recipe':<22}{'/bf16':>6}  {'target':>6}  {'loss':>7}  {'loss bf16':>9}  peak MB (bf16)")
    for row in rows:
        target = f"{TARGETS[row.recipe]:.2f}" if row.recipe in TARGETS else ""
        peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f} ({row.peak_bf16_mb:.0f})"
        lines.append(
            f"{row.recipe:<22}{row.ratio_bf16:>6.2f}  {target:>6}  {row.loss:>7.4f}  {row.loss_bf16:>9.4f}  {peak}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
