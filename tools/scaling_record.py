"""fit.json: what a fit found, for programs and for whoever reads it in a year.

Strict JSON: a number that is not finite is null (a condition number that is infinite, the Huber threshold of least
squares). Parameters are in natural units (N in parameters, D in tokens); ``pivoted`` are the same with N, D and C
divided by ``pivots``, which is what the runs determine well.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowprec.scaling.diagnose import Verdict
from lowprec.scaling.fit import Fit
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import Bootstrap

PACKAGES = ("lowprec", "numpy", "scipy", "pandas")
LEVEL = 0.95


def record(
    fit: Fit, boot: Bootstrap | None, verdict: Verdict, table: RunTable, command: str,
    heldout: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What goes into fit.json. `table`: one row a run, also where the fit is to the points of their curves."""
    sources = sorted(set(map(str, table.frame["source"]))) if "source" in table.frame else []
    return {
        "law": fit.law.name,
        "formula": fit.law.law.formula,
        "params": fit.params,
        "intervals": boot.intervals(LEVEL) if boot else {},
        "objective": fit.objective,
        "verdict": str(verdict),
        "heldout": heldout,
        "pivoted": fit.pivoted,
        "pivots": fit.pivots,
        "fixed": [name for name in fit.params if name not in fit.free],
        "delta": fit.delta,
        "n": len(fit.residuals),
        "n_kind": table.n_kind,
        "rmse": fit.rmse,
        "noise": boot.noise if boot else None,
        "condition": fit.condition,
        "correlation": {a: {b: fit.correlation.loc[a, b] for b in fit.free} for a in fit.free},
        "at_bound": fit.at_bound,
        "outliers": fit.outliers,
        "spans": fit.spans,
        "reached": fit.reached,
        "seconds": fit.seconds,
        "level": LEVEL,
        "bootstraps": len(boot.samples) if boot else 0,
        "dropped": [{"run": d.run, "reason": d.reason, "source": d.source} for d in table.dropped],
        "notes": table.notes,
        "data": {"fingerprint": table.fingerprint(), "runs": len(table), "sources": sources},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "command": command,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a checkout
        return None


def plain(value: Any) -> Any:
    """The same with JSON's own types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
