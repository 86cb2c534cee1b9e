"""Intervals: they contain the truth as often as they say, whatever the number of processes, and know their limits."""

import numpy as np
import pytest

from lowprec.scaling import synth
from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import _determines, bootstrap, clusters, profile

LAW = load_law("chinchilla")
TRUE = dict(LAW.published["besiroglu"]["values"])
LADDER = synth.ladder_table(np.geomspace(44e6, 4e9, 5), (10, 30, 90, 270))


@pytest.fixture(scope="module")
def fitted():
    return fit(LAW, synth.draw(LAW, TRUE, LADDER, seed=1), restarts=0)


@pytest.fixture(scope="module")
def boot(fitted):
    return bootstrap(fitted, 200, seed=5)


def test_intervals_of_predictions_contain_the_truth_as_often_as_they_say():
    """60 ladders of 20 runs; the loss at ten times the size, of the curve and of one more run. 95 % nominal: at least
    53 of 60 (a binomial of .95 lies below with probability .01; a robust fit's percentiles err to the wide side)."""
    at = {"N": 4e10, "D": 8e11}
    true = TRUE["E"] + TRUE["A"] / at["N"] ** TRUE["alpha"] + TRUE["B"] / at["D"] ** TRUE["beta"]
    hits = np.zeros(2)
    for seed in range(60):
        one = bootstrap(fit(LAW, synth.draw(LAW, TRUE, LADDER, seed=seed), start=TRUE, restarts=0), 80, seed=seed)
        another = true * np.exp(np.random.default_rng(seed).normal(0, 0.003))
        for i, (noise, value) in enumerate(((False, true), (True, another))):
            low, high = np.quantile(one.predict(at, noise=noise)[:, 0], (0.025, 0.975))
            hits[i] += low <= value <= high
    assert (hits >= 53).all(), hits


def test_samples_intervals_and_predictions_have_their_shapes(boot, fitted):
    assert boot.samples.shape == (200, 5) and boot.names == ("E", "A", "B", "alpha", "beta")
    assert boot.failed == 0 and boot.fit is fitted
    for name, (low, high) in boot.intervals().items():
        assert low < fitted.params[name] < high
    wide, narrow = boot.intervals(0.99)["E"], boot.intervals(0.5)["E"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    predicted = boot.predict({"N": [1e8, 1e9, 1e9], "D": 1e10})
    assert predicted.shape == (200, 3) and (predicted[:, 1] == predicted[:, 2]).all()
    p = boot.samples.iloc[17]
    assert predicted[17, 0] == pytest.approx(p.E + p.A / 1e8**p.alpha + p.B / 1e10**p.beta, rel=1e-12)


def test_pivoted_samples_are_the_natural_ones_at_the_middle_of_the_data(boot, fitted):
    natural, pivoted = boot.samples, boot.pivoted
    np.testing.assert_allclose(pivoted["A"], natural["A"] / fitted.pivots["N"] ** natural["alpha"], rtol=1e-9)
    np.testing.assert_allclose(pivoted["beta"], natural["beta"], rtol=0)
    low, high = boot.intervals(pivoted=True)["B"]
    assert (high - low) / fitted.pivoted["B"] < 0.5 * np.diff(boot.intervals()["B"])[0] / fitted.params["B"]


def test_every_refit_is_the_optimum_of_its_resample(boot, fitted):
    """One resample, fitted afresh from the grid on a table in which its runs are repeated."""
    groups = clusters(fitted.table, "cell")
    drawn = np.random.default_rng([5, 3]).integers(len(LADDER), size=len(LADDER))
    rows = np.concatenate([np.flatnonzero(groups == g) for g in drawn])
    fresh = fit(LAW, RunTable(fitted.table.frame.iloc[rows].reset_index(drop=True)), restarts=4)
    assert boot.samples.iloc[3][["alpha", "beta", "E"]].tolist() == pytest.approx(
        [fresh.params[name] for name in ("alpha", "beta", "E")], rel=1e-3
    )


def test_the_number_of_processes_and_of_samples_changes_nothing(boot, fitted):
    reports = []
    two = bootstrap(fitted, 120, seed=5, workers=2, progress=lambda done, count: reports.append((done, count)))
    np.testing.assert_allclose(two.x, boot.x[:120], rtol=1e-9, atol=1e-9)
    assert reports[-1] == (120, 120) and reports == sorted(reports) and len(reports) > 1
    assert not np.allclose(bootstrap(fitted, 10, seed=6).x, boot.x[:10])


def test_noise_is_that_of_one_run(fitted, boot):
    """.3 % was drawn; the estimate from 20 runs less 5 parameters has a standard error of 1/sqrt(30)."""
    least = bootstrap(fit(LAW, fitted.table, delta=np.inf), 2)
    assert least.noise == pytest.approx(0.003, rel=3 / np.sqrt(30))
    at = {"N": 1e9, "D": 2e10}
    curve, runs = boot.predict(at)[:, 0], boot.predict(at, noise=True, seed=1)[:, 0]
    assert np.var(np.log(runs)) == pytest.approx(np.var(np.log(curve)) + boot.noise**2, rel=3 * np.sqrt(2 / 200))


def test_clusters_keep_what_belongs_together():
    """Two precisions of one cell share an error of .5 %. Drawn as runs, the exponents look better known than they are;
    drawn as cells, their errors are those of tables with new cells."""
    law = load_law("delta")
    cells = synth.grid_table(np.geomspace(44e6, 4e9, 4), np.geomspace(1e9, 1e11, 4), ("bf16", "nvfp4"))
    assert clusters(cells, "cell").max() == 15 and clusters(cells, "run").max() == 31
    assert (clusters(cells, "cell")[:16] == clusters(cells, "cell")[16:]).all()
    assert law.law.needs[:2] == ("N", "D")
    frame = synth.draw(LAW, TRUE, cells, noise=0).frame
    shared = np.random.default_rng(0).normal(0, 0.005, 16)
    one = fit(LAW, RunTable(frame.assign(loss=frame["loss"] * np.exp(np.tile(shared, 2)))), delta=np.inf)
    sd = {kind: bootstrap(one, 150, cluster=kind).samples["alpha"].std() for kind in ("cell", "run")}
    assert sd["cell"] > 1.2 * sd["run"]  # sqrt(2) if both determined the same
    with pytest.raises(ValueError, match="'cell'"):
        bootstrap(one, 2, cluster="seed")


def test_resamples_that_determine_nothing_are_drawn_again_and_counted():
    """Of 6 cells, most draws have fewer than the 5 that 5 parameters need."""
    table = synth.draw(LAW, TRUE, synth.pairs_table([1e8, 1e8, 4e8, 4e8, 2e9, 2e9], [2e9, 2e10, 8e9, 6e10, 4e10, 4e11]))
    boot = bootstrap(fit(LAW, table, restarts=0), 50)
    assert boot.redrawn > 25 and len(boot.x) + boot.failed == 50
    assert np.isfinite(boot.samples.to_numpy()).all()
    one = np.eye(3)[:, :2]
    assert _determines(one, np.array([1.0, 2, 0]), 1.0) and not _determines(one, np.array([0.0, 2, 3]), 1.0)


def test_without_refits_there_are_no_intervals(fitted):
    with pytest.raises(ValueError, match="no resample of these runs determines"):
        bootstrap(fitted, 0).intervals()
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap(fitted, 3).intervals(95)


def test_fixed_parameters_stay_fixed():
    table = synth.draw(LAW, TRUE, LADDER, seed=2)
    boot = bootstrap(fit(LAW, table, fixed={"E": 1.8, "A": 500.0}, restarts=0), 20)
    assert boot.samples["E"].unique().tolist() == [1.8] and boot.samples["A"].to_numpy() == pytest.approx(500.0)
    assert boot.samples["alpha"].std() > 0 and list(boot.intervals()) == ["B", "alpha", "beta"]
    assert len(bootstrap(fit(LAW, table, fixed=TRUE), 5).samples) == 5


def test_the_profile_is_least_at_the_estimate_and_refits_the_rest(fitted):
    E = fitted.params["E"]
    grid = [E - 0.2, E - 0.05, E, E + 0.05, E + 0.2]
    found = profile(fitted, "E", grid)
    assert found[2] == pytest.approx(fitted.objective, rel=1e-9) and np.argmin(found) == 2
    assert found[0] > found[1] > found[2] < found[3] < found[4]
    for value, objective in zip(grid, found):
        afresh = fit(LAW, fitted.table, fixed={"E": value}, restarts=4)
        assert objective == pytest.approx(afresh.objective, rel=1e-6)
    assert profile(fitted, "A", [fitted.params["A"]])[0] == pytest.approx(fitted.objective, rel=1e-9)
    with pytest.raises(ValueError, match="'gamma' was not fitted; fitted were E, A"):
        profile(fitted, "gamma", [1.0])
