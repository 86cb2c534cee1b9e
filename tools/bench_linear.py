"""bench_linear: what a precision recipe costs, and whether it computes what it says.

    python tools/bench_linear.py
    python tools/bench_linear.py --shape 2048 256 704 --recipes nvfp4,quartet2 --reps 9 --threads 1
    python -m lowprec.tools.bench_linear --quick --recipes all --json
    python tools/bench_linear.py --device cuda --recipes nvfp4,mxfp8,fp8_blockwise --shape 16384 4096 14336

One linear layer, forward and backward, in bf16 activations with fp32 master weights. Every measurement of a recipe
stands between one of an unquantised bf16 ``nn.Linear`` and one of an fp32 ``nn.Linear``; a row shows the median of the
ratios of such neighbours, which a busy machine disturbs far less than the times themselves. Below 1 is faster than
unquantised. Every step quantises everything anew: what layers share between them (q, k and v one x) is forgotten before
each. Without ``--recipes``, those that have a target are measured: what they may cost, forward and backward of 4096
tokens 1024 -> 4096 on two cores with AVX512-VNNI and AVX512-BF16.

A row cannot be quick by being wrong: the signal-to-noise ratio of y, dx and dw against fp64 products of the unquantised
tensors must be, within a tenth of a decibel, that of the same layer with operands quantised by their plain-torch
definition (``backend: torch``). Too low is an error, and too high means that something was not quantised. Exit code 1
if a row fails.

``--device cuda`` measures every backend for GPUs that serves a recipe, by CUDA events, and beside it the nearest layer
of TransformerEngine and of torchao where they are installed; what a backend refuses is listed below the table with its
reason. It has not run on a GPU of ours.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in launch/train.py: waiting threads sleep after a short spin

import torch
from torch import Tensor, nn

from lowprec.linear import Policy, QuantizedLinear, load_recipe
from lowprec.linear.backends import CHOICES, choose
from lowprec.linear.call import padded_sizes
from lowprec.linear.precision import RECIPES_FOLDER, load_precision
from lowprec.numerics import sqnr_db
from lowprec.tools.bench_peers import PEERS, peer

TOLERANCE_DB = 0.1  # only orders of fp32 sums, and codes at ties after a rounding of such sums, may differ
TARGETS = {
    "nvfp4": 0.95, "mxfp4": 0.80, "mxfp8": 1.2, "fp8_blockwise": 1.2, "quartet2": 1.2, "halo2_fp8": 1.5,
    "halo1_int8": 0.9, "halo2_int8": 0.9, "int8_pow2": 0.9,
}  # fmt: skip
"""Time of forward and backward over that of a bf16 ``nn.Linear``, at most."""
QUICK_SHAPE, QUICK_REPS = (512, 256, 512), 3
GPU_BACKENDS = tuple(name for name in ("scaled_mm", "triton", "te", "torch") if name in CHOICES)
WARM_UP = 3  # runs before the first measurement


@dataclass(frozen=True)
class Row:
    """One recipe: ratios of forward + backward time to the unquantised layers, and signal-to-noise ratios in dB."""

    recipe: str
    backend: str
    ratio_bf16: float
    ratio_fp32: float
    snr_y: float
    snr_dx: float
    snr_dw: float
    expected_y: float
    expected_dx: float
    expected_dw: float
    te: float | str | None = None  # on a GPU: time of TransformerEngine's layer over that of bf16, or why there is none
    torchao: float | str | None = None

    @property
    def right(self) -> bool:
        """Whether the layer is as precise as the recipe's definition, neither less nor more."""
        pairs = ((self.snr_y, self.expected_y), (self.snr_dx, self.expected_dx), (self.snr_dw, self.expected_dw))
        return all(abs(measured - expected) <= TOLERANCE_DB for measured, expected in pairs)


@dataclass(frozen=True)
class Problem:
    """x (tokens, in), dy (tokens, out) in bf16, w (out, in) in fp32, and the exact products of their bf16 values."""

    x_TK: Tensor
    dy_TN: Tensor
    w_NK: Tensor
    exact: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def draw(tokens: int, in_features: int, out_features: int, device: str = "cpu") -> "Problem":
        """Gaussian tensors, the same on every call and every device."""
        generator = torch.Generator().manual_seed(0)
        x, dy, w = (
            torch.randn(shape, generator=generator)
            for shape in ((tokens, in_features), (tokens, out_features), (out_features, in_features))
        )
        x, dy, w = x.bfloat16().to(device), dy.bfloat16().to(device), (w * in_features**-0.5).to(device)
        x64, dy64, w64 = x.double(), dy.double(), w.bfloat16().double()
        return Problem(x, dy, w, (x64 @ w64.T, dy64 @ w64, dy64.T @ x64))

    def layer(self, recipe: str, backend: str) -> QuantizedLinear:
        """A quantised layer with these weights."""
        out_features, in_features = self.w_NK.shape
        layer = QuantizedLinear(
            in_features, out_features, bias=False, device=self.w_NK.device, recipe=load_recipe(recipe),
            policy=Policy(backend),
        )  # fmt: skip
        layer.weight.data.copy_(self.w_NK)
        return layer

    def step(self, layer: nn.Linear, dtype: torch.dtype) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """A function that runs forward and backward and returns y, dx, dw."""
        x, dy = self.x_TK.to(dtype, copy=True).requires_grad_(), self.dy_TN.to(dtype)

        def run() -> tuple[Tensor, Tensor, Tensor]:
            x.grad = layer.weight.grad = None
            if isinstance(layer, QuantizedLinear):
                layer.policy.shared.clear()
            y = layer(x)
            y.backward(dy)
            assert x.grad is not None and layer.weight.grad is not None
            return y, x.grad, layer.weight.grad

        return run

    def snr(self, layer: nn.Linear) -> tuple[float, float, float]:
        """Signal-to-noise ratios of y, dx and dw in dB."""
        y, dx, dw = (
            sqnr_db(e, o.detach()) for e, o in zip(self.exact, self.step(layer, torch.bfloat16)(), strict=True)
        )
        return y, dx, dw


def backend_names(layer: QuantizedLinear, tokens: int) -> str:
    """The backends that serve the three products, as one word where they agree."""
    t, n, k = tokens, layer.out_features, layer.in_features
    names = []
    wanted, device = layer.policy, layer.weight.device
    for role, sizes in {"fprop": (t, n, k), "dgrad": (t, k, n), "wgrad": (n, k, t)}.items():
        gemm = getattr(layer.recipe, role)
        padded = padded_sizes(gemm, *sizes, wanted.pad)
        names.append(choose(wanted.backend, gemm, role, *padded, torch.bfloat16, device)[0].name)
    return names[0] if len(set(names)) == 1 else "/".join(names)


def _seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Time of one run; on a GPU between two events of its stream, gaps between launches included."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def missing_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.cuda.is_available():
        return None
    built = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU or driver"
    return f"no CUDA device: {built} (torch {torch.__version__})"


def measure(recipes: list[str], shape: tuple[int, int, int], reps: int, backend: str, device: str = "cpu") -> list[Row]:
    """Benchmark recipes on one shape (tokens, in, out).

    Raises:
        ValueError: if a recipe or the backend is unknown, or the backend refuses a product.
    """
    problem = Problem.draw(*shape, device)
    plain = nn.Linear(shape[1], shape[2], bias=False, device=device)
    low = nn.Linear(shape[1], shape[2], bias=False, device=device, dtype=torch.bfloat16)
    bf16, fp32 = problem.step(low, torch.bfloat16), problem.step(plain, torch.float32)
    layers = {recipe: problem.layer(recipe, backend) for recipe in recipes}
    steps = {recipe: problem.step(layer, torch.bfloat16) for recipe, layer in layers.items()}
    ratios: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in recipes}
    for run in (bf16, fp32, *steps.values()):
        for _ in range(1 if device == "cpu" else WARM_UP):
            run()  # builds, caches, first touches
    for _ in range(reps):
        for recipe, run in steps.items():
            before, own, after = _seconds(bf16, device), _seconds(run, device), _seconds(fp32, device)
            ratios[recipe].append((own / before, own / after))
    rows = []
    for recipe, layer in layers.items():
        to_bf16, to_fp32 = (statistics.median(column) for column in zip(*ratios[recipe], strict=True))
        measured, expected = problem.snr(layer), problem.snr(problem.layer(recipe, "torch"))
        rows.append(Row(recipe, backend_names(layer, shape[0]), to_bf16, to_fp32, *measured, *expected))
    return rows


def measure_backends(
    recipes: list[str], shape: tuple[int, int, int], reps: int, backends: Iterable[str], device: str
) -> tuple[list[Row], list[str]]:
    """(rows of all backends that serve a recipe, with the peers' ratios; why the others do not)."""
    rows: list[Row] = []
    refused = []
    peers = {recipe: _peers(recipe, shape, reps, device) for recipe in recipes}
    for recipe in recipes:
        for backend in backends:
            try:
                found = measure([recipe], shape, reps, backend, device)
            except ValueError as error:
                refused.append(f"{recipe}: {error}")
                continue
            rows += [replace(row, **peers[recipe]) for row in found]
    return rows, refused


def _peers(recipe: str, shape: tuple[int, int, int], reps: int, device: str) -> dict[str, Any]:
    """{"te": ratio to bf16 or a reason, "torchao": ...}"""
    problem = Problem.draw(*shape, device)
    bf16 = problem.step(nn.Linear(shape[1], shape[2], bias=False, device=device, dtype=torch.bfloat16), torch.bfloat16)
    out: dict[str, Any] = {}
    for library in PEERS:
        step = peer(library, recipe, problem.x_TK, problem.dy_TN, problem.w_NK.bfloat16())
        if isinstance(step, str):
            out[library] = step
            continue
        for run in (bf16, step) * WARM_UP:
            run()
        pairs = [(_seconds(bf16, device), _seconds(step, device)) for _ in range(reps)]
        out[library] = statistics.median(own / base for base, own in pairs)
    return out


def table(rows: list[Row]) -> str:
    """The rows as aligned text; SNR in dB, that of the definition in brackets."""
    peers = list(PEERS) if any(r.te is not None for r in rows) else []
    head = ("recipe", "backend", "/bf16", "target", "/fp32", "SNR y", "SNR dx", "SNR dw", *peers, "")
    cells: list[tuple[str, ...]] = [head]
    for r in rows:
        snr = ((r.snr_y, r.expected_y), (r.snr_dx, r.expected_dx), (r.snr_dw, r.expected_dw))
        verdict = "" if r.right else "WRONG: not as precise as its definition"
        target = f"{TARGETS[r.recipe]:.2f}" if r.recipe in TARGETS and not peers else ""
        theirs = [v if isinstance(v, str) else f"{v:.2f}" for v in (getattr(r, name) for name in peers)]
        numbers = (f"{r.ratio_bf16:.2f}", target, f"{r.ratio_fp32:.2f}", *(f"{m:.1f} ({e:.1f})" for m, e in snr))
        cells.append((r.recipe, r.backend, *numbers, *theirs, verdict))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def shipped() -> list[str]:
    """Names of all shipped precision files that quantise linear layers, and bf16."""
    names = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
    return [name for name in names if name == "bf16" or any(r.quantized for r in load_precision(name).linear.values())]


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser("bench_linear", description="Time and check one linear layer under precision recipes.")
    p.add_argument("--shape", type=int, nargs=3, metavar=("TOKENS", "IN", "OUT"), help="default: 4096 1024 4096")
    p.add_argument(
        "--recipes", nargs="+", default=list(TARGETS), help="names of shipped recipes, or YAML files, with spaces or"
        " commas between; 'all' for every shipped one (default: those with a target)"
    )  # fmt: skip
    p.add_argument("--reps", type=int, help="measurements of each recipe (default: 7)")
    p.add_argument("--quick", action="store_true", help=f"shape {QUICK_SHAPE} and {QUICK_REPS} measurements")
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's own number)")
    p.add_argument(
        "--backend", choices=CHOICES, default="auto", help="who computes the products (default: %(default)s)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: all backends for GPUs, and peers")
    p.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    a = p.parse_args(argv)
    a.shape = a.shape or (QUICK_SHAPE if a.quick else (4096, 1024, 4096))
    a.reps = (QUICK_REPS if a.quick else 7) if a.reps is None else a.reps
    recipes = [name for names in a.recipes for name in names.split(",") if name]
    recipes = shipped() if recipes == ["all"] else recipes
    if min(a.reps, *a.shape) < 1:
        p.error("--reps and the sizes of --shape must be at least 1")
    if a.threads:
        torch.set_num_threads(a.threads)
    refused: list[str] = []
    try:
        if a.device == "cpu":
            rows = measure(recipes, tuple(a.shape), a.reps, a.backend)
        elif reason := missing_gpu():
            raise ValueError(reason)
        else:
            wanted = GPU_BACKENDS if a.backend == "auto" else (a.backend,)
            rows, refused = measure_backends(recipes, tuple(a.shape), a.reps, wanted, a.device)
    except ValueError as error:
        print(f"bench_linear: {error}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps([{**asdict(row), "right": row.right} for row in rows], indent=2))
    else:
        t, k, n = a.shape
        where = f"{torch.get_num_threads()} thread(s)" if a.device == "cpu" else torch.cuda.get_device_name()
        print(f"linear {k} -> {n}, {t} tokens, forward + backward, {where}; time ratios\n")
        print(table(rows))
        for line in refused:
            print(f"not measured: {line}")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
