"""bench_scaling: what a fit, a thousand bootstraps and a verdict cost, and whether the fit is at the optimum.

    python tools/bench_scaling.py
    python -m lowprec.tools.bench_scaling --quick --json
    python tools/bench_scaling.py --runs 120 --count 2000 --workers 4

Tables are drawn from published coefficients: about 240 runs of an iso-FLOP grid for Chinchilla, 153 runs in 17
precisions for the efficiency law (21 parameters). The descent of 16 starts at once is compared with scipy's
`least_squares` (trust region, Huber, the same Jacobian) from the same starts one by one, interleaved; a ratio of
neighbours suffers less from a busy machine than seconds. Targets: a fit of 240 runs in a second, 1,000 bootstraps of it
in a minute with two workers.

A row cannot be quick by being wrong: the objective must not be above scipy's best, and parallel bootstraps must be the
serial ones. Exit code 1 if a row fails.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices are tiny: threads only get in each other's way

import numpy as np
from scipy.optimize import least_squares

from lowprec.scaling import synth
from lowprec.scaling.descend import descend
from lowprec.scaling.diagnose import judge
from lowprec.scaling.fit import fit
from lowprec.scaling.law import LawFile, load_law
from lowprec.scaling.problem import Problem, pose
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import bootstrap

FIT_S, BOOTSTRAPS_S = 1.0, 60.0  # targets, for 240 runs and for 1,000 refits of them
STARTS, QUICK_STARTS = 16, 4
SLACK = 1e-6  # relative, by which an objective may lie above scipy's


@dataclass(frozen=True)
class Row:
    """One law on one table. Seconds are medians; `descend_ratio` is the time of all descents over that of scipy's."""

    law: str
    runs: int
    parameters: int
    fit_s: float
    descend_ratio: float
    above_scipy: float
    reached: float
    bootstraps: int
    bootstraps_s: float
    workers_ratio: float
    same_samples: bool
    judge_s: float
    verdict: str

    @property
    def right(self) -> bool:
        return self.above_scipy <= SLACK and self.same_samples


def tables(runs: int, precisions: int) -> list[tuple[LawFile, RunTable]]:
    """The laws and the tables they are fitted to, drawn with .3 % noise."""
    chinchilla, efficiency = load_law("chinchilla"), load_law("efficiency")
    values = dict(chinchilla.published["besiroglu"]["values"])
    iso = synth.isoflop_table(np.geomspace(6e18, 3e21, 9), np.geomspace(44e6, 16e9, round(runs / 4.4)))
    schemes = [f"scheme{i:02d}" for i in range(precisions - 1)]
    effs = {f"eff_N[{name}]": float(eff) for name, eff in zip(schemes, np.geomspace(0.02, 1.0, len(schemes)))}
    grid = synth.grid_table([3e7, 1e8, 8e8], [3e9, 1e10, 4e10], ["bf16", *schemes])
    return [
        (chinchilla, synth.draw(chinchilla, values, iso)),
        (efficiency, synth.draw(efficiency, {**values, **effs}, grid)),
    ]


def by_scipy(problem: Problem, starts: np.ndarray, delta: float) -> float:
    """The lowest objective from starts (g, p) by scipy."""
    low, high = problem.bounds
    found = [
        least_squares(
            problem.residuals, np.clip(x, low + 1e-9, high - 1e-9), jac=lambda v: problem.linearize(v[None])[1][0],
            bounds=(low, high), x_scale="jac", loss="huber", f_scale=delta, xtol=1e-13, ftol=1e-13, gtol=1e-15,
            max_nfev=2000,
        ).x
        for x in starts
    ]  # fmt: skip
    return min(problem.objective(x, delta) for x in found)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(law: LawFile, table: RunTable, count: int, workers: int, reps: int, many: int = STARTS) -> Row:
    problem, fitted = pose(law, table), fit(law, table)
    noise = np.random.default_rng(0).normal(0, 0.05, (many, len(fitted.x)))
    starts = np.clip(fitted.x + noise, *problem.bounds)
    ratios, fits, best = [], [], np.inf
    for _ in range(reps):
        own = _seconds(lambda: descend(problem, starts, law.huber))
        begin = time.perf_counter()
        best = by_scipy(problem, starts, law.huber)
        ratios.append(own / (time.perf_counter() - begin))
        fits.append(_seconds(lambda: fit(law, table)))
    begin = time.perf_counter()
    several = bootstrap(fitted, count, workers=workers)
    took = time.perf_counter() - begin
    begin = time.perf_counter()
    one = bootstrap(fitted, count)
    alone = time.perf_counter() - begin
    begin = time.perf_counter()
    verdict = judge(fitted, one)
    return Row(
        law=law.name, runs=len(table), parameters=len(fitted.free), fit_s=statistics.median(fits),
        descend_ratio=statistics.median(ratios), above_scipy=fitted.objective / best - 1, reached=fitted.reached,
        bootstraps=count, bootstraps_s=took, workers_ratio=took / alone,
        same_samples=several.x.shape == one.x.shape and bool(np.allclose(several.x, one.x, rtol=1e-9, atol=1e-9)),
        judge_s=time.perf_counter() - begin, verdict=verdict.grade,
    )  # fmt: skip


def shown(rows: list[Row], workers: int) -> str:
    lines = [
        f"{'law':12} {'runs':>5} {'params':>6} {'fit s':>7} {'vs scipy':>8} {'above it':>9} {'reached':>7} "
        f"{'refits':>6} {f's, {workers} wk.':>8} {'vs 1':>5} {'judge s':>7}  verdict"
    ]
    for row in rows:
        lines.append(
            f"{row.law:12} {row.runs:5} {row.parameters:6} {row.fit_s:7.2f} {row.descend_ratio:8.2f} "
            f"{row.above_scipy:9.1e} {row.reached:7.2f} {row.bootstraps:6} {row.bootstraps_s:8.1f} "
            f"{row.workers_ratio:5.2f} {row.judge_s:7.2f}  {row.verdict}{'' if row.right else '  WRONG'}"
        )
    first = rows[0]
    for what, took, target in (
        ("fit", first.fit_s, FIT_S),
        ("1,000 bootstraps", first.bootstraps_s * 1000 / first.bootstraps, BOOTSTRAPS_S),
    ):
        lines.append(
            f"{what} of {first.runs} runs: {took:.2f} s, target {target:g} s, {'met' if took <= target else 'missed'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=240, help="runs of the iso-FLOP table, about (default 240)")
    parser.add_argument("--count", type=int, default=1000, help="bootstraps (default 1000)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the bootstrap (default 2)")
    parser.add_argument("--reps", type=int, default=5, help="repetitions of the fits (default 5)")
    parser.add_argument("--quick", action="store_true", help="40 runs, 4 precisions, 4 starts, 60 bootstraps, once")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args(argv)
    runs, precisions, count, reps = (40, 4, 60, 1) if args.quick else (args.runs, 17, args.count, args.reps)
    rows = [
        measure(law, table, count, args.workers, reps, QUICK_STARTS if args.quick else STARTS)
        for law, table in tables(runs, precisions)
    ]
    print("\n".join(json.dumps(asdict(row)) for row in rows) if args.json else shown(rows, args.workers))
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
