"""fit: the global optimum, in natural units, against scipy as an independent judge and on tables with known truth."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from lowprec.scaling import synth
from lowprec.scaling.descend import descend
from lowprec.scaling.fit import fit
from lowprec.scaling.law import LawFile, Param, load_law
from lowprec.scaling.laws.chinchilla import Chinchilla
from lowprec.scaling.laws.efficiency import Efficiency
from lowprec.scaling.problem import huber, pose
from lowprec.scaling.table import RunTable

LAW = load_law("chinchilla")
TRUE = dict(LAW.published["besiroglu"]["values"])
LADDER = synth.ladder_table(np.geomspace(44e6, 16e9, 5), (10, 20, 40, 80, 160))
ISOFLOP = synth.isoflop_table(np.geomspace(6e18, 3e21, 9), np.geomspace(44e6, 16e9, 20))


def by_scipy(table: RunTable, delta: float, start: dict[str, float]) -> tuple[float, np.ndarray]:
    """Objective and (a, b, e, alpha, beta) of the log-sum-exp form of arXiv:2203.15556 by scipy, finite differences."""
    N, D = np.log(table.column("N")), np.log(table.column("D"))
    n, d = N.mean(), D.mean()

    def residuals(p):
        terms = np.stack([p[0] - p[3] * (N - n), p[1] - p[4] * (D - d), np.full_like(N, p[2])])
        return np.log(np.exp(terms).sum(axis=0)) - np.log(table.column("loss"))

    x = [np.log(start["A"]) - start["alpha"] * n, np.log(start["B"]) - start["beta"] * d, np.log(start["E"])]
    x = np.array([*x, start["alpha"], start["beta"]])
    for threshold in sorted({delta, max(delta, 1e-2)}, reverse=True):
        loss = {"loss": "linear"} if np.isinf(threshold) else {"loss": "huber", "f_scale": threshold}
        x = least_squares(residuals, x, x_scale="jac", jac="3-point", max_nfev=3000, xtol=1e-14, ftol=1e-14, **loss).x
    return float(np.sum(huber(residuals(x), delta))), x


def test_noiseless_runs_give_the_coefficients_back():
    fitted = fit(LAW, synth.draw(LAW, TRUE, LADDER, noise=0))
    for name, value in TRUE.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-9)
    assert fitted.reached == 1 and not fitted.at_bound and not fitted.outliers
    assert fitted.free == ("E", "A", "B", "alpha", "beta")


@pytest.mark.parametrize("seed", range(5))
def test_noisy_runs_give_them_back_within_their_errors(seed):
    """Least squares, .3 % noise: to first order x is normal with covariance noise^2 (J'J)^-1. 4 sd for 25 numbers."""
    fitted = fit(LAW, synth.draw(LAW, TRUE, LADDER, noise=0.003, seed=seed), delta=np.inf)
    truth = fitted.problem.encode(TRUE)
    jacobian = fitted.problem.linearize(truth[None])[1][0]
    sd = 0.003 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    assert (np.abs(fitted.x - truth) < 4 * sd).all()


@pytest.mark.parametrize("delta", [np.inf, 1e-2, 1e-3, 1e-5])
def test_the_optimum_is_that_of_scipy(delta):
    table = synth.draw(LAW, TRUE, ISOFLOP, seed=3)
    fitted = fit(LAW, table, delta=delta, restarts=0)
    objective, x = by_scipy(table, delta, fitted.params)
    assert fitted.objective <= objective * (1 + 1e-9)
    if delta >= 1e-3:  # for a smaller one scipy stops early
        assert fitted.objective == pytest.approx(objective, rel=1e-7)
        assert [fitted.params["alpha"], fitted.params["beta"]] == pytest.approx(list(x[3:]), rel=1e-3)


def test_no_random_start_ends_lower():
    """Hoffmann-like random starts, ten of them, polished by scipy."""
    table = synth.draw(LAW, TRUE, LADDER, seed=7)
    best, rng = fit(LAW, table).objective, np.random.default_rng(0)
    for _ in range(10):
        alpha, beta = rng.uniform(0.1, 0.8, 2)
        start = {"A": 2e8**alpha, "B": 1e10**beta, "E": rng.uniform(0.5, 2), "alpha": alpha, "beta": beta}
        assert best <= by_scipy(table, 1e-3, start)[0] * (1 + 1e-9)


def test_the_objective_is_the_sum_of_huber_and_residuals_are_logs():
    table = synth.draw(LAW, TRUE, LADDER, seed=2)
    fitted = fit(LAW, table)
    residuals = np.log(fitted.predict(table)) - np.log(table.column("loss"))
    np.testing.assert_allclose(fitted.residuals, residuals, atol=1e-14)
    size = np.abs(residuals)
    each = [0.5 * r * r if r <= 1e-3 else 1e-3 * (r - 0.5e-3) for r in size]
    assert fitted.objective == pytest.approx(sum(each), rel=1e-12)
    assert fitted.rmse == pytest.approx(np.sqrt(np.mean(size**2)), rel=1e-12)
    assert huber(np.array([0.3, -2.0]), np.inf) == pytest.approx([0.045, 2.0])


def test_natural_parameters_predict_what_the_fit_predicts():
    fitted = fit(LAW, synth.draw(LAW, TRUE, LADDER, seed=1))
    p, N, D = fitted.params, np.array([1e8, 5e10]), np.array([1e10, 1e12])
    formula = p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]
    np.testing.assert_allclose(fitted.predict({"N": N, "D": D}), formula, rtol=1e-12)
    assert fitted.predict({"N": 1e8, "D": D}).shape == (2,)
    q, pivots = fitted.pivoted, fitted.pivots
    assert p["A"] == pytest.approx(q["A"] * pivots["N"] ** q["alpha"])
    assert pivots["D"] == pytest.approx(np.exp(np.log(LADDER.column("D")).mean()))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kumar_ptq", {"C_T": 0.06, "gamma_D": 0.5, "gamma_N": 0.34, "gamma_post": 0.6}),
        ("qid", {"k": 0.017, "beta": 0.53, "alpha": 0.23, "gamma": 5.5}),
    ],
)
def test_laws_of_differences_come_back_in_natural_units(name, values):
    """Coefficients that grow with D and fall with N, residuals in nats: D0^-gamma N0^gamma leads back."""
    law, grid = load_law(name), synth.grid_table([1e8, 5e8, 2e9], [1e10, 1e11]).frame
    frame = pd.concat([grid.assign(bits_post=bits) for bits in (3.0, 4.0, 5.0)], ignore_index=True)
    table = synth.draw(law, values, RunTable(frame.assign(run=frame.index.astype(str))), noise=0)
    assert fit(law, table).params == pytest.approx(values, rel=1e-6)


def test_derivatives_are_exact():
    """Complex steps against Richardson-extrapolated differences at a random point."""
    problem = pose(LAW, synth.draw(LAW, TRUE, LADDER))
    x = problem.encode(TRUE) + 0.1
    _, jacobian = problem.linearize(x[None])
    for i, row in enumerate(np.eye(len(x))):
        difference = [(problem.residuals(x + h * row) - problem.residuals(x - h * row)) / (2 * h) for h in (1e-3, 5e-4)]
        np.testing.assert_allclose(jacobian[0, :, i], (4 * difference[1] - difference[0]) / 3, rtol=1e-8, atol=1e-10)


def test_a_law_that_does_not_broadcast_is_fitted_all_the_same():
    class Single(Chinchilla):
        def loss(self, theta, columns):
            if np.ndim(theta["E"]):
                raise TypeError("one at a time")
            return super().loss(theta, columns)

    table = synth.draw(LAW, TRUE, LADDER, seed=4)
    single = dataclasses.replace(LAW, law=Single())
    assert pose(LAW, table)._broadcasts and not pose(single, table)._broadcasts
    one, many = fit(single, table, start=TRUE, restarts=1), fit(LAW, table, start=TRUE, restarts=1)
    assert one.params == pytest.approx(many.params, rel=1e-9)


def test_weights_of_zero_are_runs_left_out():
    table = synth.draw(LAW, TRUE, LADDER, seed=5)
    kept = np.arange(len(table)) % 5 != 2
    problem = pose(LAW, table)
    x, cost = descend(problem, np.repeat(problem.encode(TRUE)[None], 2, axis=0), 1e-3, np.stack([kept, 2.0 * kept]))
    few = fit(LAW, table.where(kept), start=TRUE)
    assert cost == pytest.approx([few.objective, 2 * few.objective], rel=1e-9)
    assert problem.natural(x[0])["alpha"] == pytest.approx(few.params["alpha"], rel=1e-7)


def test_fixed_parameters_are_held_in_natural_units():
    table = synth.draw(LAW, TRUE, LADDER, seed=6)
    held = fit(LAW, table, fixed={"A": 500.0, "E": 1.8})
    assert (held.params["A"], held.params["E"]) == pytest.approx((500.0, 1.8), rel=1e-12)
    assert held.free == ("B", "alpha", "beta") and held.correlation.shape == (3, 3)
    assert held.objective >= fit(LAW, table).objective
    all_held = fit(LAW, table, fixed=TRUE)
    assert all_held.free == () and all_held.params == pytest.approx(TRUE)
    own = dataclasses.replace(LAW, params={"E": {"fixed": 1.8}})
    assert fit(own, table, fixed={"A": 500.0}).objective == pytest.approx(held.objective, rel=1e-9)


def test_a_given_start_replaces_the_grid():
    table = synth.draw(LAW, TRUE, LADDER, seed=6)
    assert fit(LAW, table, start=TRUE).objective == pytest.approx(fit(LAW, table).objective, rel=1e-9)
    with pytest.raises(ValueError, match="needs a value of 'beta'"):
        fit(LAW, table, start={k: v for k, v in TRUE.items() if k != "beta"})


def test_what_the_fit_says_about_itself():
    """One run is off by 8 %: it is listed and kept."""
    table = synth.draw(LAW, TRUE, LADDER, noise=0.001, seed=3)
    table.frame.loc[7, "loss"] *= 1.08
    fitted = fit(LAW, table)
    assert "r0007" in fitted.outliers and len(fitted.outliers) < 4 and len(fitted.residuals) == len(table)
    assert fitted.spans == pytest.approx({"N": 16e9 / 44e6, "D": 16 * 16e9 / 44e6, "D/N": 16})
    assert 10 < fitted.condition < 100 and not fitted.at_bound
    assert np.diag(fitted.correlation) == pytest.approx(np.ones(5)) and list(fitted.correlation) == list(fitted.free)
    assert fit(LAW, synth.draw(LAW, {**TRUE, "E": 0.0}, LADDER, noise=0)).at_bound == ("E",)


def test_on_a_bound_the_others_are_at_their_optimum():
    """E would rather be negative. On its bound of 0 the rest must be what it is with E held there."""
    table = synth.draw(LAW, {**TRUE, "E": 0.0}, LADDER, noise=0, seed=1)
    steep = RunTable(table.frame.assign(loss=table.frame["loss"] - 0.05))
    for delta in (np.inf, 1e-3):
        bounded, held = fit(LAW, steep, delta=delta), fit(LAW, steep, delta=delta, fixed={"E": 0.0})
        assert bounded.at_bound == ("E",) and bounded.params["E"] == 0
        assert bounded.objective == pytest.approx(held.objective, rel=1e-9)
        assert bounded.params == pytest.approx(held.params, rel=1e-6)


def test_restarts_find_what_a_start_misses():
    """A law with a valley every 0.16: from 1.0 the nearest is kept without restarts, and left with them."""

    class Wavy(Chinchilla):
        def params(self, columns):
            return (Param("a", -3.0, 3.0, (1.0,)),)

        def loss(self, theta, columns):
            a = theta["a"]
            return 2 + 0.1 * (1 - np.cos(40 * a)) + 0.02 * a**2 + 0 * columns["N"]

    law, flat = dataclasses.replace(LAW, law=Wavy()), RunTable(LADDER.frame.assign(loss=2.0))
    stuck, free = fit(law, flat, restarts=0), fit(law, flat)
    assert stuck.params["a"] == pytest.approx(0.94, abs=0.01)
    assert free.objective < stuck.objective and 0 < free.reached < 1


def test_runs_on_one_line_have_no_condition():
    fitted = fit(LAW, synth.draw(LAW, TRUE, synth.ladder_table(np.geomspace(44e6, 16e9, 25), (20,))))
    assert fitted.condition > 1e8
    twice = synth.draw(LAW, TRUE, synth.ladder_table([1e8, 1e9], (20, 40)))
    assert fit(LAW, twice).condition == np.inf  # four runs, five parameters


def test_groups_that_share_a_start_are_found_apart():
    """Seven efficiencies from .02 to 1.1, gamma 1: the grid has one axis for all of them."""
    effs = {"w1": 0.02, "w2": 0.14, "w3": 0.42, "fp4": 0.63, "w4": 0.7, "w8": 1.1, "w5": 0.9}
    law = LawFile("efficiency", Efficiency())
    table = synth.grid_table([3e7, 1e8, 2e8, 8e8], [3e9, 1e10, 4e10], ["bf16", *effs])
    values = {**TRUE, **{f"eff_N[{label}]": value for label, value in effs.items()}}
    exact = fit(law, synth.draw(law, values, table, noise=0))
    assert exact.params == pytest.approx(values, rel=1e-8) and exact.reached > 0.9
    noisy = fit(law, synth.draw(law, values, table, noise=0.001, seed=1))
    assert [noisy.params[f"eff_N[{n}]"] / v for n, v in effs.items()] == pytest.approx(np.ones(7), abs=0.05)
    with pytest.raises(ValueError, match=r"fitted without eff_N\[int3\]"):
        noisy.predict(synth.grid_table([1e8], [1e10], ["int3"]))


def test_efficiencies_on_a_backbone_that_was_fitted_before():
    """The way of arXiv:2505.14669: surface and gamma from bf16 runs, then one efficiency a pass with those held."""
    law = load_law("quartet", eff_N="fwd", eff_D="bwd")
    truth = {**law.published["quartet"]["values"], "eff_N[mx]": 0.645, "eff_D[sr]": 0.894}
    parts = [synth.grid_table([3e7, 5e7, 1e8, 2e8, 4e8], np.geomspace(1e9, 4e10, 6), fwd=f, bwd=b) for f, b in
             (("bf16", "bf16"), ("mx", "bf16"), ("bf16", "sr"))]  # fmt: skip
    frame = pd.concat([part.frame for part in parts], ignore_index=True).assign(run=lambda f: f.index.astype(str))
    truth = {name: float(value) for name, value in truth.items() if not name.startswith("eff_") or "[" in name}
    table = synth.draw(law, truth, RunTable(frame), noise=0)
    base = fit(law, table.where((table.column("fwd") == "bf16") & (table.column("bwd") == "bf16")))
    assert base.free == ("E", "A", "B", "alpha", "beta", "gamma")
    assert base.params["gamma"] == pytest.approx(truth["gamma"], rel=1e-4)
    assert base.params["E"] == pytest.approx(truth["E"], rel=1e-4)
    both = fit(law, table, fixed=base.params)
    assert both.free == ("eff_N[mx]", "eff_D[sr]")
    assert [both.params[name] for name in both.free] == pytest.approx([0.645, 0.894], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": np.nan}, "column 'loss' is empty for 1 of 25 runs, such as 'r0003'"),
        ({"loss": np.inf}, "loss of run 'r0003' is inf"),
        ({"loss": -1.0}, "loss of run 'r0003' is -1.0"),
        ({"N": 0.0}, "N of run 'r0003' is 0.0, and law chinchilla needs a positive one: drop that run"),
    ],
)
def test_runs_that_cannot_be_fitted_are_named(change, message):
    table = synth.draw(LAW, TRUE, LADDER)
    for name, value in change.items():
        table.frame.loc[3, name] = value
    with pytest.raises(ValueError, match=message):
        fit(LAW, table)


def test_other_errors_are_sentences():
    table = synth.draw(LAW, TRUE, LADDER)
    with pytest.raises(ValueError, match="no column 'D'"):
        fit(LAW, RunTable(table.frame.drop(columns="D")))
    with pytest.raises(ValueError, match="no parameter 'gamma'; it has E, A, B, alpha, beta"):
        fit(LAW, table, fixed={"gamma": 1})
    with pytest.raises(ValueError, match="must be positive"):
        fit(LAW, table, delta=0)
    with pytest.raises(ValueError, match="no runs to fit: 25 were dropped, the first because: they diverged"):
        fit(LAW, table.where(np.zeros(25), "they diverged"))
    with pytest.raises(ValueError, match="needs the column 'D', which is not among N"):
        fit(LAW, table, restarts=0).predict({"N": 1e9})
