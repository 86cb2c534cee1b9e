"""Synthetic runs: a law's own predictions with noise, on grids that people train.

Every claim of this package about a fit is tested on tables whose true coefficients are known. Noise multiplies the loss
by exp(sigma z): 0.003 is generous for the last loss of a run (repeats of a run differ by about 0.0005 nats), and of the
order of what reading points off a figure adds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.law import LawFile
from lowprec.scaling.problem import raw_columns
from lowprec.scaling.table import REFERENCE, RunTable

Numbers = Sequence[float] | np.ndarray


def grid_table(N: Numbers, D: Numbers, precisions: Sequence[str] = (REFERENCE,), **columns: Any) -> RunTable:
    """Every N with every D in every precision, in that order, without a loss.

    `columns`: more columns, one value for all runs, one per precision as a mapping, or one value a row.
    """
    rows = [(n, d, p) for p in precisions for n in N for d in D]
    frame = pd.DataFrame(rows, columns=["N", "D", "precision"]).astype({"N": float, "D": float})
    return _finish(frame, columns)


def pairs_table(N: Numbers, D: Numbers, precision: str = REFERENCE, **columns: Any) -> RunTable:
    """One run for every pair (N[i], D[i])."""
    frame = pd.DataFrame({"N": np.asarray(N, float), "D": np.asarray(D, float), "precision": precision})
    return _finish(frame, columns)


def isoflop_table(budgets: Numbers, N: Numbers, ratios: tuple[float, float] = (1, 400)) -> RunTable:
    """Every size at every budget C = 6 N D whose tokens per parameter lie within `ratios`: a Chinchilla-like table."""
    pairs = [(n, c / (6 * n)) for c in budgets for n in N if ratios[0] <= c / (6 * n * n) <= ratios[1]]
    return pairs_table([n for n, _ in pairs], [d for _, d in pairs])


def ladder_table(N: Numbers, ratios: Numbers = (20,)) -> RunTable:
    """Every size at every number of tokens per parameter. One ratio is the trap: N and D are then one variable."""
    return pairs_table([n for n in N for _ in ratios], [n * r for n in N for r in ratios])


def _finish(frame: pd.DataFrame, columns: Mapping[str, Any]) -> RunTable:
    for name, value in columns.items():
        frame[name] = frame["precision"].map(value) if isinstance(value, Mapping) else value
    frame["C"] = 6 * frame["N"] * frame["D"]
    frame.insert(0, "run", [f"r{i:04d}" for i in range(len(frame))])
    return RunTable(frame)


def draw(law: LawFile, values: Mapping[str, float], table: RunTable, noise: float = 0.003, seed: int = 0) -> RunTable:
    """`table` with the law's response drawn from natural coefficients `values`, times exp(noise z), z standard normal.

    For laws of plain residuals the noise is added, noise z. Raises ValueError for a coefficient that is missing.
    """
    table = law.law.expand(table)
    columns = raw_columns(law, table)
    names = [p.name for p in law.parameters(columns)]
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"law {law.name} needs a value of {missing[0]!r} to draw runs; it has {', '.join(names)}")
    response = np.asarray(law.law.loss(dict(values), law.law.prepare(columns)), dtype=np.float64)
    z = np.random.default_rng(seed).normal(0, noise, len(table)) if noise else np.zeros(len(table))
    response = response * np.exp(z) if law.law.log_residuals else response + z
    return RunTable(table.frame.assign(**{law.law.response: response}), table.n_kind, table.dropped, table.notes)
