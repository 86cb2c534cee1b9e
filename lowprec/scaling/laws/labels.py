"""Parameters of groups: one efficiency, gap or constant for every label that occurs in a column of the run table.

A parameter ``eff_N`` of the label ``nvfp4`` is called ``eff_N[nvfp4]``. `masks` turns a column of labels into one bool
column a parameter, once a fit, and `pick` chooses with them: exactly 1 stays exactly 1 for the reference, and complex
parameters pass through.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Theta

REFERENCES = ("bf16", "fp16", "fp32", "none", "NoQuantizer", "16")  # labels that mean "not quantised"; case is ignored


def references(labels: "str | Iterable[Any]") -> tuple[str, ...]:
    """An option that lists reference labels, or names one."""
    return (labels,) if isinstance(labels, str) else tuple(map(str, labels))


def names(column: Any) -> Array:
    """(n,) labels as strings; a number such as 4.0 is "4"."""
    values = np.atleast_1d(np.asarray(column, dtype=object))
    return np.array([v if isinstance(v, str) else f"{v:g}" if np.isreal(v) else str(v) for v in values], dtype=object)


def occurring(column: Any, reference: Iterable[str] = ()) -> tuple[str, ...]:
    """The labels of a column in order of the alphabet, without the references."""
    out = {label.lower() for label in reference}
    return tuple(sorted({name for name in names(column) if name.lower() not in out}))


def masks(prefix: str, column: Any, reference: Iterable[str] = ()) -> dict[str, Array]:
    """{"prefix[label]": (n,) bool} for every label that is no reference."""
    labels = names(column)
    return {f"{prefix}[{label}]": labels == label for label in occurring(labels, reference)}


def pick(theta: Theta, columns: Mapping[str, Any], prefix: str, rest: Any) -> Any:
    """(n,) the parameter of every run's label, `rest` for a reference. ValueError for a label that was not fitted."""
    for key in [key for key in columns if key.startswith(f"{prefix}[")]:
        rest = np.where(columns[key], value(theta, key), rest)
    return rest


def value(theta: Theta, key: str) -> Any:
    """One parameter. ValueError if the fit has none of that label."""
    if key not in theta:
        known = ", ".join(k for k in theta if k.startswith(key.partition("[")[0] + "["))
        raise ValueError(f"there is no {key}: no such run was fitted" + (f"; there are {known}" if known else ""))
    return theta[key]
