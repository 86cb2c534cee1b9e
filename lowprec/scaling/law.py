"""ScalingLaw: what every law is to the fitting code, and how one is chosen by its YAML file.

A law predicts the final loss of a run (nats per token) from columns of the run table: N parameters, D tokens, and what
its precision was. Its parameters fall into two kinds. Most laws are *linear* in some non-negative coefficients (E, A,
B, k) once the *shape* parameters (exponents, efficiencies) are given: so a grid over the shapes with a non-negative
least-squares solution at every point finds the neighbourhood of the global optimum without a random start (variable
projection, Golub and Pereyra 1973). :mod:`lowprec.scaling.fit` does that, and then polishes all parameters together.

Two conventions make that work for every law:

- **Pivots.** Columns with a unit (N, D, C) reach a law divided by their geometric mean over the fitted runs, so
  A N^-alpha and alpha are nearly uncorrelated and A is "the loss that size costs at the middle of the data". A
  coefficient says in ``unit`` how its natural value follows: ``A = A' N0^alpha`` is ``{"N": "alpha"}``;
  ``{"D": "-gamma"}`` divides by ``D0^gamma``.
- **Complex-safe formulas.** ``loss`` uses only numpy functions that are analytic (+, *, **, exp, log, tanh; no abs, max
  or comparison of parameters), so the Jacobian comes exact to the last bit from a complex step (Squire and Trapp 1998)
  and no law carries derivatives.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowprec.scaling.table import RunTable

Array = np.ndarray
Columns = Mapping[str, Any]  # name -> array of one value a run (float64, or object for labels)
Theta = Mapping[str, Any]  # parameter -> float or complex

LAWS_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "law"
PIVOTED = ("N", "D", "C")  # columns that are divided by their geometric mean, unless a law has other `pivots`


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter of a law, as the fit sees it (pivoted).

    Attributes:
        name: also its key in fit.json. A parameter of one group bears it: ``eff_N[nvfp4]``.
        low, high: bounds; a fit that ends on one says so. None as `high` of E means: below the smallest loss.
        start: values tried in the start grid; () for a linear coefficient, which is solved for.
        linear: the loss is linear in it and it is not negative, given all others that are not linear.
        unit: {column: exponent's name}: the natural value is the pivoted one times pivot ** exponent ("-x": divided).
        fixed: not fitted, held at this value (from the YAML file or the command line).
    """

    name: str
    low: float
    high: float | None
    start: tuple[float, ...] = ()
    linear: bool = False
    unit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: float | None = None


class ScalingLaw:
    """Base of all laws. A subclass sets the class attributes, and implements `params` and `loss`.

    Attributes:
        needs: columns of the run table without which it cannot be fitted.
        formula: for people, one line.
        response: the column that is predicted (``loss``; a law of post-training degradation predicts ``delta``).
        log_residuals: residuals are differences of log(response) (relative errors); False: of the response itself.
        certainty: "" or what is uncertain about the published coefficients or the form itself.
        pivots: {column: the column whose geometric mean divides it}. Columns of one unit that a law compares (tokens
            and distinct tokens) share one; a formula that is no product of powers (of a user) has {}.
    """

    needs: tuple[str, ...] = ("N", "D")
    formula: str = ""
    response: str = "loss"
    log_residuals: bool = True
    certainty: str = ""
    pivots: Mapping[str, str] = dict(zip(PIVOTED, PIVOTED))

    def __init__(self, **options: Any) -> None:
        """`options` are the keys under ``options:`` of the YAML file; a law without any takes none."""
        if options:
            raise ValueError(f"{type(self).__name__} has no option {next(iter(options))!r}")

    def prepare(self, columns: Columns) -> Columns:
        """Columns as `loss` wants them, computed once a fit (codes of groups, areas under a schedule). Default: as they
        are. Called on pivoted columns; must work on any subset of rows in any order."""
        return columns

    def expand(self, table: RunTable) -> RunTable:
        """The table to fit. Default: as it is; laws of whole curves make one row of every logged point."""
        return table

    def params(self, columns: Columns) -> tuple[Param, ...]:
        """The parameters for this data (one efficiency per precision that occurs, for example). Columns may be natural
        or pivoted, prepared or not."""
        raise NotImplementedError

    def loss(self, theta: Theta, columns: Columns) -> Array:
        """Predicted response of every run, from all parameters by name; complex-safe.

        A formula that broadcasts is given many parameter vectors at once, as (g, 1) arrays, and returns (g, n): starts
        and bootstraps are some ten times faster then. One that does not is called for each.
        """
        raise NotImplementedError


def pivots_of(law: ScalingLaw, columns: Columns) -> dict[str, float]:
    """What each column of this data is divided by before `law` sees it: {column: geometric mean}."""
    known = {name: source for name, source in law.pivots.items() if name in columns and source in columns}
    return {name: float(np.exp(np.log(columns[source]).mean())) for name, source in known.items()}


@dataclasses.dataclass(frozen=True)
class LawFile:
    """A parsed `recipes/law/*.yaml`.

    Keys of the file: ``class`` (a key of lowprec.scaling.laws.LAWS), ``options`` (of the class), ``huber`` (threshold
    of the last polish, on residuals), ``params`` ({name: {low, high, start, fixed}} over those of the class),
    ``published`` ({name: {values, source, note}}: coefficients of the literature, natural units).
    """

    name: str
    law: ScalingLaw
    huber: float = 1e-3
    params: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    path: Path | None = None

    def parameters(self, columns: Columns) -> tuple[Param, ...]:
        """The law's parameters with the file's changes. ``eff_N`` in the file stands for every ``eff_N[...]``.

        Raises ValueError for a name that the law does not have.
        """
        found, used = [], set()
        for param in self.law.params(columns):
            for key in (param.name.partition("[")[0], param.name):
                if key in self.params:
                    used.add(key)
                    change = dict(self.params[key])
                    if "start" in change:
                        change["start"] = tuple(change["start"])
                    param = dataclasses.replace(param, **change)
            found.append(param)
        if unknown := [key for key in self.params if key not in used]:
            raise ValueError(
                f"law {self.name} has no parameter {unknown[0]!r}; it has {', '.join(p.name for p in found)}"
            )
        return tuple(found)


_KEYS = ("class", "options", "huber", "params", "published")


def load_law(source: str | Path, **options: Any) -> LawFile:
    """A law by name from `recipes/law/` or by path; `options` replace those of the file. ValueError in one sentence."""
    from lowprec.scaling.laws import LAWS  # the laws import this module

    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = LAWS_FOLDER / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in LAWS_FOLDER.glob("*.yaml")))
        raise ValueError(f"there is no law {str(source)!r}: give the path of a YAML file, or one of {known}")
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(node, dict) or "class" not in node:
        raise ValueError(f"{path}: a law is a mapping with the key `class`")
    for key in node:
        if key not in _KEYS:
            raise ValueError(f"{path}: there is no key {key!r}; a law has {', '.join(_KEYS)}")
    if node["class"] not in LAWS:
        raise ValueError(f"{path}: there is no class {node['class']!r}; class can be {', '.join(LAWS)}")
    law = LAWS[node["class"]](**{**node.get("options", {}), **options})
    return LawFile(
        path.stem, law, float(node.get("huber", 1e-3)), node.get("params", {}), node.get("published", {}), path
    )
