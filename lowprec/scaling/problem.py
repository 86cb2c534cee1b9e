"""A law and its data in the coordinates that an optimiser likes: what fits, bootstraps and profiles minimise.

Three kinds of coordinates lead from the numbers of a paper to the vector x that is optimised:

    natural    A = 482, alpha = 0.35, E = 1.82         what people publish; A and alpha are almost one parameter
    pivoted    A' = A N0^-alpha, alpha, E              N and D divided by their geometric means N0 and D0
    x          log A', alpha, E                        a positive linear coefficient as its logarithm

The residual of a run is log(predicted) - log(measured), or the plain difference if the law says so, and the objective
is the **sum** over runs. (A mean lets stopping rules act early: that of arXiv:2203.15556 did, see arXiv:2404.10102.)

    S(x) = sum_i w_i h(r_i),    h(r) = r^2/2 where |r| <= delta, else delta (|r| - delta/2)    (Huber)

Derivatives come from a complex step, Im r(x + ih) / h with h = 1e-20: there is no difference of close numbers in it, so
they are exact. A law whose formula broadcasts is evaluated for many parameter vectors at once, as arrays of shape
(g, 1); for any other it is called once for each.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowprec.scaling.law import Array, Columns, LawFile, Param, Theta, pivots_of
from lowprec.scaling.table import LABELS, NUMBERS, RunTable

STEP = 1e-20  # of the complex derivative
TINY = 1e-9  # lowest pivoted value of a coefficient that is optimised as a logarithm: in nats, nothing
BELOW_MINIMUM = 1 - 1e-6  # E stays below the smallest loss by this factor, or its run has no loss left to explain
ELEMENTS = 1_000_000  # predictions evaluated at once


def huber(residuals: Array, delta: float) -> Array:
    """Huber's function of every residual; `delta` = inf is half the square."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * min(delta, 1e300)))


def raw_columns(law: LawFile, data: RunTable | Mapping[str, Any]) -> dict[str, Array]:
    """The columns a law may look at, (n,) each in natural units: what it needs, and any other that is complete.

    `data` is a run table (of whole curves: one row a point), or values by column name, which are broadcast. Raises
    ValueError for a missing column, naming it.
    """
    if isinstance(data, RunTable):
        data = law.law.expand(data)
        columns = {name: data.column(name) for name in law.law.needs}
        extra = [name for name in (*NUMBERS, *LABELS) if name not in columns and name in data]
        return columns | {name: data.column(name) for name in extra}
    if missing := [name for name in law.law.needs if name not in data]:
        raise ValueError(f"law {law.name} needs the column {missing[0]!r}, which is not among {', '.join(data)}")
    values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value)) for value in data.values()))
    labels = [name in LABELS or value.dtype.kind in "OUS" for name, value in zip(data, values)]
    return {n: v.astype(object if label else np.float64) for n, v, label in zip(data, values, labels)}


def scale_of(param: Param, pivots: Mapping[str, float], theta: Theta) -> Any:
    """Natural over pivoted value of one parameter: the product of the pivots to the exponents that its `unit` names."""
    scale: Any = 1.0
    for column, exponent in param.unit.items():
        if column in pivots:
            name = exponent.removeprefix("-")
            power = theta[name] if name in theta else float(name)
            scale = scale * np.exp((-1.0 if exponent.startswith("-") else 1.0) * power * np.log(pivots[column]))
    return scale


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law on the runs of one table. Parameter vectors x are (p,), many of them (g, p).

    Attributes:
        law: the law.
        columns: pivoted and prepared.
        response: (n,) what is predicted, natural units.
        params: all parameters of the law on this data; `fixed` is in natural units.
        pivots: geometric mean of every pivoted column.
    """

    law: LawFile
    columns: Columns
    response: Array
    params: tuple[Param, ...]
    pivots: Mapping[str, float]

    @functools.cached_property
    def free(self) -> tuple[Param, ...]:
        return tuple(p for p in self.params if p.fixed is None)

    @functools.cached_property
    def logs(self) -> Array:
        """(p,) bool: the entries of x that are logarithms: positive linear coefficients, but not E (`high` is None)."""
        return np.array([p.linear and p.high is not None and p.low >= 0 for p in self.free], dtype=bool)

    @functools.cached_property
    def bounds(self) -> tuple[Array, Array]:
        """(p,) lowest and highest x."""
        ceiling = float(self.response.min()) * BELOW_MINIMUM
        low = np.array([max(p.low, TINY) if log else p.low for p, log in zip(self.free, self.logs)], dtype=np.float64)
        high = np.array([ceiling if p.high is None else p.high for p in self.free], dtype=np.float64)
        low[self.logs], high[self.logs] = np.log(low[self.logs]), np.log(high[self.logs])
        return low, high

    @functools.cached_property
    def target(self) -> Array:
        return np.log(self.response) if self.law.law.log_residuals else self.response

    def hold(self, fixed: Mapping[str, float]) -> "Problem":
        """The same with parameters held at natural values. ``eff_N`` stands for every ``eff_N[...]``.

        Raises ValueError for a name that the law does not have.
        """
        names = [(p.name, p.name.partition("[")[0]) for p in self.params]
        if unknown := [name for name in fixed if not any(name in both for both in names)]:
            have = ", ".join(p.name for p in self.params)
            raise ValueError(f"law {self.law.name} has no parameter {unknown[0]!r}; it has {have}")
        held = [fixed.get(name, fixed.get(group, param.fixed)) for (name, group), param in zip(names, self.params)]
        params = [dataclasses.replace(p, fixed=None if v is None else float(v)) for p, v in zip(self.params, held)]
        return dataclasses.replace(self, params=tuple(params))

    def theta(self, x: Array) -> dict[str, Any]:
        """Pivoted parameters by name, from x (p, ...): numbers, complex numbers, or one array each."""
        theta = {p.name: np.exp(v) if log else v for p, log, v in zip(self.free, self.logs, x)}
        held = {p.name: p for p in self.params if p.fixed is not None}
        theta |= {name: p.fixed for name, p in held.items()}
        return theta | {name: p.fixed / scale_of(p, self.pivots, theta) for name, p in held.items() if p.unit}

    def natural(self, x: Array) -> dict[str, Any]:
        """Natural parameters by name, from x (p, ...)."""
        theta = self.theta(x)
        return {p.name: theta[p.name] * scale_of(p, self.pivots, theta) for p in self.params}

    def encode(self, values: Mapping[str, float]) -> Array:
        """x (p,) of natural parameters by name, moved inside the bounds. Raises ValueError for one that is missing."""
        if missing := [p.name for p in self.free if p.name not in values]:
            raise ValueError(f"a start for law {self.law.name} needs a value of {missing[0]!r}")
        known = {p.name: float(values[p.name]) if p.fixed is None else p.fixed for p in self.params}
        x = np.array([known[p.name] / scale_of(p, self.pivots, known) for p in self.free], dtype=np.float64)
        x[self.logs] = np.log(np.maximum(x[self.logs], TINY))
        return np.clip(x, *self.bounds)

    def predict(self, x: Array, columns: Columns | None = None, count: int | None = None) -> Array:
        """(g, n) predictions of x (g, p), real or complex, for the problem's runs or `count` others."""
        columns = self.columns if columns is None else columns
        count = len(self.response) if count is None else count
        width = max(1, ELEMENTS // max(count, 1))
        law, parts = self.law.law, [x[i : i + width] for i in range(0, len(x), width)]
        with np.errstate(all="ignore"):
            if self._broadcasts:
                found = [
                    np.broadcast_to(law.loss(self.theta(p.T[:, :, None]), columns), (len(p), count)) for p in parts
                ]
            else:
                found = [np.broadcast_to(law.loss(self.theta(v), columns), (1, count)) for v in x]
        return np.concatenate(found) if found else np.zeros((0, count))

    @functools.cached_property
    def _broadcasts(self) -> bool:
        """Whether the law takes parameters of shape (g, 1), and agrees with itself on them."""
        low, high = self.bounds
        x = low + np.array([[0.4], [0.35], [0.3]]) * (high - low)
        try:
            with np.errstate(all="ignore"):
                many = np.asarray(self.law.law.loss(self.theta(x.T[:, :, None]), self.columns))
                each = np.stack([self.law.law.loss(self.theta(v), self.columns) for v in x])
        except (ValueError, TypeError, IndexError):
            return False
        return many.shape == each.shape and np.allclose(many, each, rtol=1e-12, atol=0, equal_nan=True)

    def _residuals(self, predicted: Array) -> Array:
        with np.errstate(all="ignore"):
            if self.law.law.log_residuals:
                predicted = np.log(np.where(predicted.real > 0, predicted, np.nan))
            return predicted - self.target

    def residuals(self, x: Array) -> Array:
        """(n,) at one x (p,); NaN where a law of log residuals predicts nothing positive."""
        return self._residuals(self.predict(x[None]))[0]

    def linearize(self, x: Array) -> tuple[Array, Array]:
        """Residuals (g, n) and their exact Jacobians (g, n, p) at x (g, p), from one evaluation."""
        many, count = x.shape
        if not count:
            return self._residuals(self.predict(x)), np.zeros((many, len(self.response), 0))
        tilted = x[:, None, :] + 1j * STEP * np.eye(count)  # (g, p, p)
        value = self._residuals(self.predict(tilted.reshape(many * count, count))).reshape(many, count, -1)
        return value[:, 0].real.copy(), np.moveaxis(value.imag, 1, 2) / STEP

    def objective(self, x: Array, delta: float) -> float:
        return float(np.sum(huber(self.residuals(x), delta)))


def pose(law: LawFile, table: RunTable) -> Problem:
    """The problem of fitting `law` to a table. ValueError for a column that is missing, not finite or not positive."""
    if not len(table):
        why = (
            f"{len(table.dropped)} were dropped, the first because: {table.dropped[0].reason}" if table.dropped else ""
        )
        raise ValueError(f"there are no runs to fit{': ' * bool(why)}{why}")
    raw, response = raw_columns(law, table), table.column(law.law.response)
    positive = {*law.law.pivots.values()} & {*raw}
    checked = {name: raw[name] for name in (*law.law.needs, *sorted(positive - {*law.law.needs}))}
    for name, values in {**checked, law.law.response: response}.items():
        wrong = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(len(table), dtype=bool)
        if name in positive or (name == law.law.response and law.law.log_residuals):
            wrong |= ~(values > 0)
        if wrong.any():
            run = table.frame["run"].iloc[int(np.argmax(wrong))] if "run" in table.frame else int(np.argmax(wrong))
            value = values[np.argmax(wrong)]
            raise ValueError(
                f"{name} of run {run!r} is {value}, and law {law.name} needs a positive one: drop that run"
            )
    pivots = pivots_of(law.law, raw)
    columns = pivoted_columns(raw, pivots)
    params = law.parameters(columns)
    for p in params:
        if p.fixed is None:
            continue
        low, high = -np.inf if p.unit else p.low, float(response.min()) if p.high is None else np.inf
        if not (np.isfinite(p.fixed) and low <= p.fixed < high):
            raise ValueError(f"{p.name} is held at {p.fixed:g}; law {law.name} takes it from {low:g} to below {high:g}")
    return Problem(law, law.law.prepare(columns), response, params, pivots)


def pivoted_columns(columns: Mapping[str, Array], pivots: Mapping[str, float]) -> dict[str, Array]:
    return {name: value / pivots[name] if name in pivots else value for name, value in columns.items()}
