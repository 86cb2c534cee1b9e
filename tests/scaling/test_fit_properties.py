"""Properties of a fit that hold for every table: units, order of the runs, equal inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.scaling import synth
from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.table import RunTable

LAW = load_law("chinchilla")
LADDER = synth.ladder_table(np.geomspace(44e6, 16e9, 5), (8, 20, 60, 150))
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
exponent, units = st.floats(0.15, 0.6), st.floats(-9, 3)


def coefficients(alpha: float, beta: float) -> dict[str, float]:
    """A and B such that size and data cost .5 and .4 nats in the middle of LADDER."""
    N, D = (np.exp(np.log(LADDER.column(name)).mean()) for name in ("N", "D"))
    return {"E": 1.8, "A": 0.5 * N**alpha, "B": 0.4 * D**beta, "alpha": alpha, "beta": beta}


@few
@given(exponent, exponent, units, units, seeds)
def test_units_of_parameters_and_tokens_do_not_matter(alpha, beta, n, d, seed):
    """Counting N in millions and D in billions changes A and B as it must, and nothing else."""
    table = synth.draw(LAW, coefficients(alpha, beta), LADDER, seed=seed)
    scaled = RunTable(table.frame.assign(N=table.frame["N"] * 10**n, D=table.frame["D"] * 10**d))
    one, two = fit(LAW, table, restarts=0), fit(LAW, scaled, restarts=0)
    assert two.predict(scaled) == pytest.approx(one.predict(table), rel=1e-8)
    for name in ("E", "alpha", "beta"):
        assert two.params[name] == pytest.approx(one.params[name], rel=1e-8, abs=1e-8)
    assert np.log(two.params["A"] / one.params["A"]) == pytest.approx(one.params["alpha"] * n * np.log(10), abs=1e-6)
    assert np.log(two.params["B"] / one.params["B"]) == pytest.approx(one.params["beta"] * d * np.log(10), abs=1e-6)
    assert two.objective == pytest.approx(one.objective, rel=1e-9)


@few
@given(exponent, exponent, seeds)
def test_the_order_of_the_runs_does_not_matter(alpha, beta, seed):
    table = synth.draw(LAW, coefficients(alpha, beta), LADDER, seed=seed)
    order = np.random.default_rng(seed).permutation(len(table))
    shuffled = RunTable(table.frame.iloc[order].reset_index(drop=True))
    one, two = fit(LAW, table, restarts=2), fit(LAW, shuffled, restarts=2)
    assert two.params == pytest.approx(one.params, rel=1e-7)
    assert two.residuals == pytest.approx(one.residuals[order], abs=1e-9)
    assert set(two.outliers) == set(one.outliers)


@few
@given(exponent, exponent, st.floats(0.0, 3.0))
def test_any_law_without_noise_is_recovered(alpha, beta, E):
    """E of 0 is on its bound, where a coefficient is right to 1e-6 nats."""
    values = {**coefficients(alpha, beta), "E": E}
    fitted = fit(LAW, synth.draw(LAW, values, LADDER, noise=0), restarts=0)
    assert fitted.params == pytest.approx(values, rel=1e-5, abs=1e-6)


@few
@given(exponent, exponent, seeds)
def test_equal_inputs_give_equal_numbers(alpha, beta, seed):
    """Of a fit repeated; and of a run that occurs twice."""
    table = synth.draw(LAW, coefficients(alpha, beta), LADDER, seed=seed)
    one, two = fit(LAW, table, seed=seed), fit(LAW, table, seed=seed)
    assert one.params == two.params and one.objective == two.objective and one.reached == two.reached
    N = np.repeat(table.column("N"), 2)
    predicted = one.predict({"N": N, "D": np.repeat(table.column("D"), 2)})
    assert (predicted[::2] == predicted[1::2]).all()


@few
@given(exponent, exponent, seeds, st.integers(1, 6))
def test_dropping_runs_before_or_together_is_the_same(alpha, beta, seed, count):
    table = synth.draw(LAW, coefficients(alpha, beta), LADDER, seed=seed)
    at_once, by_one = table.drop_highest(count), table
    for _ in range(count):
        by_one = by_one.drop_highest(1)
    assert at_once.fingerprint() == by_one.fingerprint() and len(by_one.dropped) == count
    assert fit(LAW, at_once, restarts=0).params == fit(LAW, by_one, restarts=0).params
