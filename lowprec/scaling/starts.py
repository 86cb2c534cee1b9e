"""Where a fit begins: variable projection on a grid (Golub and Pereyra 1973).

Given exponents and efficiencies (the *shape*) the loss of most laws is linear in the rest, E, A' and B', none of which
is negative. So at every point of a grid over the shape the best linear coefficients solve a small non-negative
least-squares problem on relative errors, and the best points of the grid lie in the valley of the global optimum: on
published tables one such start ended where the best of forty random ones did.

The problems are solved together. The solution of a non-negative problem in k columns is that of an ordinary one in some
subset of them, so all 2^k subsets are solved for all points at once and the best feasible one is taken.

Parameters of groups (``eff_N[nvfp4]``, ``eff_N[mxfp4]``) share one axis of the grid. The descent finds its way from
equal values: with efficiencies a hundredfold apart, moving them one by one first led to the same optimum, later.
"""

import itertools

import numpy as np
from scipy.optimize import nnls

from lowprec.scaling.law import Array, Param
from lowprec.scaling.problem import ELEMENTS, Problem

GRID_POINTS = 6000  # at most; longer axes are thinned
SUBSETS = 6  # linear coefficients up to which all subsets are tried
APART = 0.25  # starts differ by this share of the range of some axis of the grid


def grid_starts(problem: Problem, count: int) -> Array:
    """x (<= count, p) of the best points of the start grid that are not neighbours, the best one first."""
    free = problem.free
    axes = _axes(free)
    points = np.array(list(itertools.product(*axes.values())), dtype=np.float64)  # (g, axes)
    x = np.zeros((len(points), len(free)))
    for axis, name in enumerate(axes):
        x[:, [not p.linear and _group(p) == name for p in free]] = points[:, [axis]]
    x, cost = _solve(problem, x)
    width = np.ptp(points, axis=0) if len(axes) else np.zeros(0)
    chosen: list[int] = []
    for i in np.argsort(cost, kind="stable"):
        if not chosen or (np.abs(points[i] - points[chosen]) > APART * width).any(axis=1).all():
            chosen.append(int(i))
        if len(chosen) == count:
            break
    return np.clip(x[chosen], *problem.bounds)


def _group(param: Param) -> str:
    return param.name.partition("[")[0]


def _starts(param: Param) -> tuple[float, ...]:
    return param.start or ((param.low + (1.0 if param.high is None else param.high)) / 2,)


def _axes(free: tuple[Param, ...]) -> dict[str, list[float]]:
    """Values of every shape parameter or group of them; every second one is left out of the longest until it fits."""
    axes = {_group(p): list(_starts(p)) for p in free if not p.linear}
    while np.prod([float(len(v)) for v in axes.values()]) > GRID_POINTS:
        longest = max(axes, key=lambda name: len(axes[name]))
        axes[longest] = axes[longest][len(axes[longest]) % 2 == 0 :: 2]
    return axes


def _solve(problem: Problem, x: Array) -> tuple[Array, Array]:
    """x (g, p) with the linear entries replaced by their best values, and the squared (relative) errors (g,)."""
    width = max(1, ELEMENTS // len(problem.response))
    parts = [_solve_some(problem, x[i : i + width].copy()) for i in range(0, len(x), width)]
    return np.concatenate([part for part, _ in parts]), np.concatenate([cost for _, cost in parts])


def _solve_some(problem: Problem, x: Array) -> tuple[Array, Array]:
    linear = [i for i, p in enumerate(problem.free) if p.linear]
    weight = 1 / problem.response if problem.law.law.log_residuals else np.ones_like(problem.response)
    low, high = problem.bounds
    x[:, linear] = np.where(problem.logs, -np.inf, 0.0)[linear]  # coefficients of 0
    offset = problem.predict(x)
    target = (problem.response - offset) * weight  # (g, n)
    if not linear:
        return x, _squares(target)
    columns = []
    for i in linear:
        one = x.copy()
        one[:, i] = 0.0 if problem.logs[i] else 1.0  # a coefficient of 1
        columns.append((problem.predict(one) - offset) * weight)
    design = np.stack(columns, axis=2)  # (g, n, k)
    values = _nonnegative(design, target)  # (g, k)
    logs = np.log(np.maximum(values, 1e-300))
    x[:, linear] = np.clip(np.where(problem.logs[linear], logs, values), low[linear], high[linear])
    return x, _squares(target - np.einsum("gnk,gk->gn", design, values))


def _squares(error: Array) -> Array:
    cost = np.sum(error**2, axis=1)
    return np.where(np.isfinite(cost), cost, np.inf)


def _nonnegative(design: Array, target: Array) -> Array:
    """argmin_v |design_g v - target_g|, v >= 0, for every g: (g, n, k), (g, n) -> (g, k)."""
    count = design.shape[2]
    good = np.isfinite(design).all(axis=(1, 2)) & np.isfinite(target).all(axis=1)
    design, target = np.where(good[:, None, None], design, 0.0), np.where(good[:, None], target, 0.0)
    if count > SUBSETS:
        return np.stack([nnls(a, b)[0] for a, b in zip(design, target)])
    norm = np.linalg.norm(design, axis=1) + 1e-300  # (g, k)
    design = design / norm[:, None, :]
    gram = np.einsum("gnk,gnl->gkl", design, design) + 1e-13 * np.eye(count)
    right = np.einsum("gnk,gn->gk", design, target)
    best, gain = np.zeros_like(right), np.zeros(len(right))
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            index = list(subset)
            inner, side = gram[:, index][:, :, index], right[:, index]
            values = np.linalg.solve(inner, side[:, :, None])[:, :, 0]
            gained = 2 * np.sum(values * side, axis=1) - np.einsum("gi,gij,gj->g", values, inner, values)
            better = (values >= 0).all(axis=1) & (gained > gain)
            best[better] = 0.0
            best[np.ix_(better, index)] = values[better]
            gain[better] = gained[better]
    return best / norm
