"""How `lowprec-scaling` talks: tables in columns, runs and fits in a few lines, progress on a terminal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.diagnose import Verdict
from lowprec.scaling.fit import Fit
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import Bootstrap
from lowprec.tools.scaling_record import LEVEL
from lowprec.tools.scaling_runs import left_out


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def count(value: float) -> str:
    """1.3e9 as 1.3B: parameters and tokens for people."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 1000 * size else f"{value:.3g}"
    return f"{value:.3g}"


def span(values: np.ndarray, form: Callable[[float], str] = count) -> str:
    low, high = form(float(values.min())), form(float(values.max()))
    return low if low == high else f"{low} to {high}"


def between(low: float, high: float, form: str = ".4g") -> str:
    return "-" if math.isnan(low) or math.isnan(high) else f"{low:{form}} to {high:{form}}"


def runs(table: RunTable) -> str:
    """One row a precision: how many runs, and what they span."""
    frame = table.frame
    names = frame["precision"].fillna("-").astype(str) if "precision" in frame else pd.Series(["-"] * len(frame))
    rows = [("precision", "runs", "N", "D", "D/N", "loss")]
    for name in sorted(set(names)):
        part = frame[(names == name).to_numpy()]
        cells = [span(part[key].to_numpy(float)) if key in part else "-" for key in ("N", "D")]
        ratio = span((part["D"] / part["N"]).to_numpy(float), "{:.3g}".format) if {"N", "D"} <= {*part} else "-"
        loss = span(part["loss"].to_numpy(float), "{:.4g}".format) if "loss" in part else "-"
        rows.append((name, str(len(part)), *cells, ratio, loss))
    return aligned(rows)


def about(table: RunTable) -> str:
    """The runs, what was left out and why, and what was derived or assumed."""
    kind = "without embeddings and head" if table.n_kind == "non_embedding" else "with embeddings"
    lines = [f"{len(table)} runs; N counts parameters {kind}", runs(table), *left_out(table)]
    return "\n".join([*lines, *(f"note: {note}" for note in table.notes)])


def fitted(fit: Fit, boot: Bootstrap | None, verdict: Verdict) -> str:
    """A fit: formula, parameters with intervals, how good it is, and the verdict."""
    certain = boot.intervals(LEVEL) if boot else {}
    middle = boot.intervals(LEVEL, pivoted=True) if boot else {}
    units = {p.name for p in fit.problem.params if p.unit}
    used = {column for p in fit.problem.params for column in p.unit}
    pivot = ", ".join(f"{name} = {count(value)}" for name, value in fit.pivots.items() if name in used)
    head = ["parameter", "value", f"{LEVEL:.0%} interval"]
    rows = [[*head, f"at {pivot}", f"{LEVEL:.0%} interval"] if units else head]
    for name, value in fit.params.items():
        held = name not in fit.free
        row = [name, f"{value:.6g}", "held" if held else between(*certain.get(name, (math.nan, math.nan)))]
        if units:
            row += (
                [f"{fit.pivoted[name]:.5g}", between(*middle.get(name, (math.nan, math.nan)))]
                if name in units
                else [""] * 2
            )
        rows.append(row)
    quality = (
        f"objective {fit.objective:.6g} (sum of Huber, delta {fit.delta:g}), rmse {fit.rmse:.3g}, condition "
        f"{fit.condition:.3g}, {fit.reached:.0%} of restarts reached this optimum, {fit.seconds:.2g} s"
    )
    lines = [f"{fit.law.name}: {fit.law.law.formula}", aligned(rows), quality]
    if boot:
        odd = (
            f"; {boot.redrawn} resamples did not determine the parameters and were drawn again" if boot.redrawn else ""
        )
        odd += f"; {boot.failed} were given up" if boot.failed else ""
        lines.append(f"intervals: {len(boot.samples)} refits of resampled {boot.cluster}s{odd}")
    else:
        lines.append("no intervals: there is no bootstrap, or no resample of these runs determines the parameters")
    if fit.law.law.certainty:
        lines.append(f"about this law: {fit.law.law.certainty}")
    if fit.outliers:
        lines.append(f"far off the curve, but kept: {some(fit.outliers)}")
    return "\n".join([*lines, *judged(verdict)])


def judged(verdict: Verdict) -> list[str]:
    """The verdict, one reason a line."""
    return [f"verdict: {verdict.grade}", *(f"  - {reason}" for reason in verdict.reasons)]


def frame(table: pd.DataFrame, forms: "Mapping[str, str | Callable[[float], str]] | None" = None) -> str:
    """A data frame in columns; columns of nothing are left out. N and D are counts, other numbers have four digits,
    unless `forms` says otherwise by a format or a function."""
    chosen: dict[str, Any] = {"N": count, "D": count, **(forms or {})}
    kept = [str(name) for name in table.columns if not table[name].isna().all() and not (table[name] == "").all()]
    rows = [kept]
    for _, row in table.iterrows():
        rows.append([_cell(row[name], chosen.get(name, ".4g")) for name in kept])
    return aligned(rows)


def _cell(value: Any, form: "str | Callable[[float], str]") -> str:
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return "-"
    if callable(form):
        return form(float(value))
    return str(value) if isinstance(value, (int, np.integer)) else f"{value:{form}}"


def some(names: Sequence[str], most: int = 6) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
