"""descend: many robust fits at once, from many starts or on many resamples of the same runs.

Every problem g minimises S_g(x) = sum_i w_gi h(r_i(x)) with Huber's h, within bounds, by damped Newton steps. With
a_i = w_i min(1, delta/|r_i|), the weight of a robust mean, and b_i = w_i where |r_i| <= delta, else 0, the curvature,

    (J' diag(b + damping a) J + damping diag(J' diag(a) J) / 1000) step = -J' diag(a) r

No damping is Newton's step, exact once it is settled which runs lie within delta of the curve. A damping of one
majorises the curvature: iteratively reweighted least squares, which descends from anywhere and slowly. A parameter
that S pushes over its bound stays there. All problems share one evaluation of the law an iteration, so that a thousand
bootstraps of 240 runs are a matter of seconds. scipy's `least_squares(method="trf", loss="huber")` ends at the same
optimum (a test compares them); for 16 starts it takes four to seven times as long (`tools/bench_scaling.py`).
"""

import numpy as np

from lowprec.scaling.law import Array
from lowprec.scaling.problem import Problem, huber

ITERATIONS = 200
SETTLED = 1e-11, 4  # done after this many steps that lower S by less than this share: x is exact to ten digits
ROUGH = 1e-7, 2  # ... to 1e-4 standard errors, for resamples
DAMPING = 1e-2, 1e-9, 1e9  # at first, least, most
ROUNDING = 1e-14  # relative rise of a sum over runs that is no rise: the last Newton steps settle x beyond it
FLOOR = 1e-14  # of the diagonal, for parameters that these runs do not determine


def descend(
    problem: Problem, x: Array, delta: float, weights: Array | None = None, until: tuple[float, int] = SETTLED
) -> tuple[Array, Array]:
    """Minimises from every row of x (g, p), with `weights` (g, n) of the runs or 1.

    Returns the optima (g, p) and their objectives (g,), which are inf where the law is not finite at the start.
    """
    (low, high), (tolerance, patience) = problem.bounds, until
    x = np.clip(x, low, high)
    weights = np.ones((len(x), len(problem.response))) if weights is None else weights
    residuals, jacobian = problem.linearize(x)
    cost = _cost(residuals, delta, weights)
    damping, idle = np.full(len(x), DAMPING[0]), np.where(np.isfinite(cost), 0, patience)
    for _ in range(ITERATIONS if x.shape[1] else 0):
        on = np.flatnonzero((idle < patience) & (damping < DAMPING[2]))
        if not len(on):
            break
        step = _step(x[on], residuals[on], jacobian[on], weights[on], delta, damping[on], low, high)
        trial = np.clip(x[on] + step, low, high)
        new_residuals, new_jacobian = problem.linearize(trial)
        new = _cost(new_residuals, delta, weights[on])
        better, much = new <= cost[on] * (1 + ROUNDING), new < cost[on] * (1 - tolerance)
        idle[on] = np.where(much, 0, idle[on] + better)
        damping[on] = np.clip(damping[on] * np.where(better, 0.1, 10.0), *DAMPING[1:])
        good = on[better]
        x[good], cost[good] = trial[better], new[better]
        residuals[good], jacobian[good] = new_residuals[better], new_jacobian[better]
    return x, cost


def _cost(residuals: Array, delta: float, weights: Array) -> Array:
    cost = np.sum(weights * huber(residuals, delta), axis=1)
    return np.where(np.isfinite(cost), cost, np.inf)


def _step(
    x: Array, residuals: Array, jacobian: Array, weights: Array, delta: float, damping: Array, low: Array, high: Array
) -> Array:
    size = np.maximum(np.abs(residuals), 1e-300)
    robust = weights * np.minimum(1.0, delta / size)
    curvature = np.where(size <= delta, weights, 0.0) + damping[:, None] * robust
    gradient = np.einsum("gnp,gn->gp", jacobian, robust * residuals)
    hessian = np.matmul(np.swapaxes(jacobian * curvature[:, :, None], 1, 2), jacobian)
    diagonal = np.einsum("gnp,gnp,gn->gp", jacobian, jacobian, robust)
    held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)) | (diagonal == 0)
    gradient[held] = 0.0
    hessian[held[:, :, None] | held[:, None, :]] = 0.0
    index = np.arange(x.shape[1])
    hessian[:, index, index] += np.where(held, 1.0, (1e-3 * damping[:, None] + FLOOR) * diagonal)
    try:
        return -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # one of them is singular to the last bit
        return -np.einsum("gpq,gq->gp", np.linalg.pinv(hessian, hermitian=True), gradient)
