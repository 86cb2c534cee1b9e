"""Laws of whole curves: against sums step by step, and against published curves if those are there."""

import numpy as np
import pandas as pd
import pytest
from tables import table as run_table

from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.laws.curves import History, curve_points
from lowprec.scaling.table import RunTable

STEPS = 3000
STEP = np.arange(1.0, STEPS + 1)
WARM = np.minimum(STEP / 200, 1)
SHAPES = {
    "constant": 1e-3 * WARM,
    "cosine": 1e-3 * WARM * (0.55 + 0.45 * np.cos(np.pi * STEP / STEPS)),
    "wsd": 1e-3 * WARM * np.where(STEP > 2400, 1 - 0.9 * (STEP - 2400) / 600, 1.0),
    "stepped": 1e-3 * WARM * np.where(STEP > 1500, 0.3, 1.0),
}
MPL = {"L0": 2.65, "A": 0.60, "B": 438.0, "C": 2.13, "alpha": 0.453, "beta": 0.598, "gamma": 0.655}


def table_of(curves: dict[str, pd.DataFrame], every: int = 0) -> RunTable:
    names = list(curves)
    table = RunTable(pd.DataFrame({"run": names, "curve": names, "N": 1e8, "D": 1e10}))
    return curve_points(table, every, reader=lambda name: curves[name])


def logged(shape: str, loss: "np.ndarray | float" = 3.0, every: int = 10) -> pd.DataFrame:
    frame = pd.DataFrame({"step": STEP, "lr": SHAPES[shape], "loss": loss})
    return frame[::every] if every > 1 else frame


def step_by_step(theta: dict[str, float], lr: np.ndarray, at: int) -> float:
    """The multi-power law at step `at`, one drop a step, warm-up left out."""
    S = np.cumsum(lr)
    peak = int(np.argmax(lr))
    k = np.arange(peak + 1, at)
    grown = theta["C"] * lr[k] ** -theta["gamma"] * (S[at - 1] - S[k - 1])
    undone = np.sum((lr[k - 1] - lr[k]) * (1 - (1 + grown) ** -theta["beta"]))
    return theta["L0"] + theta["A"] * S[at - 1] ** -theta["alpha"] - theta["B"] * undone


@pytest.mark.parametrize("shape", SHAPES)
def test_binned_drops_sum_to_the_multi_power_law_step_by_step(shape):
    law = load_law("multi_power").law
    table = table_of({shape: logged(shape)})
    predicted = law.loss(MPL, law.prepare(table.columns(law.needs)))
    for i in range(0, len(table), 40):
        at = int(table.frame["step"][i])
        assert predicted[i] == pytest.approx(step_by_step(MPL, SHAPES[shape], at), abs=2e-3), at
    assert predicted[-1] == pytest.approx(step_by_step(MPL, SHAPES[shape], int(table.frame["step"].iloc[-1])), abs=7e-4)


def test_with_a_bin_a_step_the_multi_power_law_is_exact():
    law = load_law("multi_power", bins=1400).law  # the decay has 600 steps of 2800, twice that of 1400
    table = table_of({"wsd": logged("wsd", every=1)})
    predicted = law.loss(MPL, law.prepare(table.columns(law.needs)))
    for i in (1000, 2400, 2600, len(table) - 1):
        at = int(table.frame["step"][i])
        assert predicted[i] == pytest.approx(step_by_step(MPL, SHAPES["wsd"], at), abs=2e-6)


def test_a_jump_between_two_logged_points_is_at_the_later_one():
    """A log says the rate of a step with the loss before that step."""
    history = History.of([100, 200, 300, 400], [1e-3, 1e-3, 2e-4, 2e-4])
    # 1e-3 up to step 299, from a warm-up of 100 steps (whose sum is 50.5e-3)
    assert history.S1(np.array([299.0, 300.0, 350.0])) == pytest.approx([0.2495, 0.2497, 0.2597], rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_annealed_areas_are_the_sums_of_the_paper(shape):
    law = load_law("annealing", memory=0.99).law
    table = table_of({shape: logged(shape, every=1)})
    prepared = law.prepare(table.columns(law.needs))
    lr = SHAPES[shape]
    lr_after = np.where(np.arange(STEPS) < np.argmax(lr), lr.max(), lr)  # warm-up is no annealing
    momentum, S2, total = 0.0, [], 0.0
    for i in range(STEPS):
        momentum = 0.99 * momentum + (lr_after[i - 1] - lr_after[i] if i else 0.0)
        total += momentum
        S2.append(total)
    at = table.frame["step"].to_numpy().astype(int) - 1
    np.testing.assert_allclose(prepared["S1"], np.cumsum(lr)[at], rtol=2e-4)  # straight lines of a cosine
    # knots between logged steps move a corner by up to STEPS / 512 steps
    np.testing.assert_allclose(prepared["S2"], np.array(S2)[at], atol=2e-2 * max(S2[-1], 1e-3))


def test_the_counted_warm_up_adds_about_b_times_the_peak():
    """The quirk of the authors' code, after which their published L0 is to be read."""
    columns = table_of({"constant": logged("constant")}).columns(("curve", "step", "history"))
    plain, counted = (load_law("multi_power", warmup=w).law for w in (False, True))
    more = counted.loss(MPL, counted.prepare(columns)) - plain.loss(MPL, plain.prepare(columns))
    assert 0.8 * MPL["B"] * 1e-3 < more[-1] < MPL["B"] * 1e-3


def test_points_of_noisy_logs_are_means_of_windows():
    loss = 3 + np.where(STEP % 2, 0.5, -0.5)
    table = table_of({"wsd": logged("wsd", loss, every=1)}, every=100)
    assert set(table.frame["run"]) == {"wsd"} and np.allclose(table.column("step") % 100, 0)
    np.testing.assert_allclose(table.column("loss")[1:-1], 3.0, atol=0.011)  # at most one point of a hundred unpaired
    assert table.frame["step"].min() >= 200 and "not independent" in table.notes[-1]
    again = curve_points(table)
    assert again is table and load_law("annealing").law.expand(table) is table


def test_a_curve_that_goes_backwards_is_refused():
    with pytest.raises(ValueError, match="ascending steps"):
        History.of([1, 5, 3], [1e-3, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="no column 'curve'"):
        curve_points(RunTable(pd.DataFrame({"run": ["a"], "N": [1.0]})))


def test_a_fit_recovers_the_annealing_law_from_three_schedules():
    law = load_law("annealing", memory=0.99)
    truth = {"L0": 2.7, "A": 0.6, "C": 5.0, "alpha": 0.45}
    table = table_of({shape: logged(shape, every=20) for shape in ("constant", "cosine", "wsd")})
    clean = law.law.loss(truth, law.law.prepare(table.columns(law.law.needs)))
    noise = np.random.default_rng(0).normal(0, 1e-3, len(clean))
    fitted = fit(law, RunTable(table.frame.assign(loss=clean + noise)), restarts=2)
    for key, value in truth.items():
        assert fitted.params[key] == pytest.approx(value, rel=0.03), key
    unseen = table_of({"stepped": logged("stepped")})
    exact = law.law.loss(truth, law.law.prepare(unseen.columns(law.law.needs)))
    np.testing.assert_allclose(fitted.predict(unseen), exact, atol=1e-3)


# --- published curves ----------------------------------------------------------------------------------------------

TRAINED = ("cosine_24000", "constant_24000", "wsdcon_9")  # the schedules that the multi-power law was fitted to


def published(size: int) -> dict[str, pd.DataFrame]:
    frame = pd.read_csv(run_table("mpl_loss_curves.csv"))
    return dict(iter(frame[frame["size_M"] == size].groupby("schedule")))


def test_multi_power_law_reaches_its_published_error():
    """T10: RMSE .00592 on the six unseen schedules at 100M with the authors' parameters."""
    law = load_law("multi_power", warmup=True)
    table = table_of({k: v for k, v in published(100).items() if k not in TRAINED})
    predicted = law.law.loss(law.published["luo_100m"]["values"], law.law.prepare(table.columns(law.law.needs)))
    square = pd.Series((predicted - table.column("loss")) ** 2).groupby(table.frame["run"].to_numpy()).mean()
    assert np.sqrt(square).mean() == pytest.approx(0.0059, abs=0.0002)


def test_annealing_law_predicts_unseen_schedules():
    """T10: mean absolute error below .006 on six schedules, from three, at 100M."""
    curves = published(100)
    fitted = fit(load_law("annealing", memory=0.998), table_of({k: curves[k] for k in TRAINED}), restarts=2)
    unseen = table_of({k: v for k, v in curves.items() if k not in TRAINED})
    assert np.abs(fitted.predict(unseen) - unseen.column("loss")).mean() < 0.006
