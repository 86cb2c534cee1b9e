"""Start grid: the vectorised non-negative solver against scipy's, and starts in the valley of the optimum."""

import numpy as np
import pytest
from scipy.optimize import nnls

from lowprec.scaling import synth
from lowprec.scaling.law import Param, load_law
from lowprec.scaling.problem import pose
from lowprec.scaling.starts import GRID_POINTS, _axes, _nonnegative, grid_starts

LAW = load_law("chinchilla")
TRUE = LAW.published["besiroglu"]["values"]


@pytest.mark.parametrize("columns", [1, 3, 5, 8])
def test_all_subsets_at_once_solve_the_nonnegative_problem(columns):
    """60 problems of 20 rows, in most of which some coefficients are 0. Beyond six columns scipy's own is used."""
    rng = np.random.default_rng(columns)
    design = rng.normal(size=(60, 20, columns)) + 0.5
    target = np.einsum("gnk,gk->gn", design, rng.normal(size=(60, columns))) + rng.normal(size=(60, 20))
    found = _nonnegative(design, target)
    expected = np.stack([nnls(a, b)[0] for a, b in zip(design, target)])
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert columns == 1 or (expected == 0).any()


def test_points_where_the_law_has_no_value_do_not_spoil_the_others():
    design = np.ones((3, 4, 2)) + np.arange(2)
    design[1, 0, 0] = np.inf
    found = _nonnegative(design + np.arange(4)[:, None] * [1.0, 0.0], np.full((3, 4), 3.0))
    assert np.isfinite(found).all() and found[0] == pytest.approx(found[2])


def test_the_best_point_of_the_grid_is_close_and_the_others_are_not_its_neighbours():
    problem = pose(LAW, synth.draw(LAW, TRUE, synth.ladder_table(np.geomspace(44e6, 16e9, 5), (10, 40, 160))))
    starts = grid_starts(problem, 4)
    alpha, beta = starts[:, 3], starts[:, 4]
    assert abs(alpha[0] - TRUE["alpha"]) < 0.1 and abs(beta[0] - TRUE["beta"]) < 0.1
    for i in range(1, 4):
        assert (np.maximum(abs(alpha[i] - alpha[:i]), abs(beta[i] - beta[:i])) > 0.2).all()
    assert (starts >= problem.bounds[0]).all() and (starts <= problem.bounds[1]).all()


def test_a_large_grid_is_thinned_evenly():
    wide = tuple(np.linspace(0.1, 1, 30))
    axes = _axes(tuple(Param(name, 0.0, 2.0, wide) for name in ("alpha", "beta", "gamma[a]", "gamma[b]")))
    assert list(axes) == ["alpha", "beta", "gamma"]  # a group is one axis
    sizes = [len(values) for values in axes.values()]
    assert GRID_POINTS / 8 < np.prod(sizes) <= GRID_POINTS and min(sizes) >= 7
