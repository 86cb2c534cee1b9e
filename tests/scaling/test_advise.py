"""Advice against brute force: optima, the break-even identity (T11), critical data sizes (T5), late switches."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from lowprec.scaling import advise as advising
from lowprec.scaling.advise import advise, break_even, critical_tokens, efficiency, iso_flop, iso_loss, more_tokens
from lowprec.scaling.fit import fit
from lowprec.scaling.late import late_switch, recovered
from lowprec.scaling.law import load_law
from lowprec.scaling.surface import Surface, closed_optimum, crossing
from lowprec.scaling.synth import draw, grid_table
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import bootstrap

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
SIZES, TOKENS = (3e7, 6e7, 1.2e8, 2.4e8), (1e9, 3e9, 1e10, 3e10)


def known(law, values, table, **options):
    """A surface of exactly these coefficients: nothing is free."""
    table = draw(law, values, table, noise=0.0)
    return Surface(fit(law, table, fixed=values, start=values, restarts=0), **options)


@pytest.fixture(scope="module")
def factors():
    """Efficiencies .74 and .95, known exactly."""
    values = HOFFMANN | {"eff_N[nvfp4]": 0.74, "eff_D[nvfp4]": 0.95}
    return known(load_law("efficiency", eff_D="precision"), values, grid_table(SIZES, TOKENS, ("bf16", "nvfp4")))


@pytest.fixture(scope="module")
def additive():
    """An additive gap k D^.11 / N^.25, known exactly."""
    values = HOFFMANN | {"k[nvfp4]": 0.408, "gamma_N[nvfp4]": 0.254, "gamma_D[nvfp4]": 0.112}
    return known(load_law("delta"), values, grid_table(SIZES, TOKENS, ("bf16", "nvfp4")))


@pytest.fixture(scope="module")
def sampled():
    """The same efficiencies, fitted to 32 noisy runs, with 200 bootstrap samples."""
    law = load_law("efficiency", eff_D="precision")
    values = HOFFMANN | {"eff_N[nvfp4]": 0.74, "eff_D[nvfp4]": 0.95}
    table = draw(law, values, grid_table(SIZES, TOKENS, ("bf16", "nvfp4")), noise=0.001, seed=1)
    fitted = fit(law, table)
    return Surface(fitted, bootstrap(fitted, 200))


def lowest(loss, C):
    """min over N of loss(N, C / 6 N), by brute force and polish."""
    x = np.linspace(0, math.log(1e20), 4001)
    best = x[np.argmin(loss(np.exp(x), C / 6 / np.exp(x)))]
    found = minimize_scalar(
        lambda v: loss(np.exp(v), C / 6 / np.exp(v)), bounds=(best - 0.1, best + 0.1), method="bounded",
        options={"xatol": 1e-12},
    )  # fmt: skip
    return float(found.fun), float(np.exp(found.x))


def chinchilla(N, D, eff_N=1.0, eff_D=1.0):
    return 1.69 + 406.4 / (N * eff_N) ** 0.34 + 410.7 / (D * eff_D) ** 0.28


def quartet(N, D, eff_N=1.0, eff_D=1.0, *, A, B, alpha, beta, gamma, E=1.34):
    return (A / (N * eff_N) ** alpha + B / (D * eff_D) ** beta) ** gamma + E


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.2, 1.1), st.floats(0.2, 1.1), st.floats(0.25, 0.6), st.floats(0.25, 0.6), st.sampled_from([0.3, 1.0]),
    st.floats(19, 24),
)  # fmt: skip
def test_break_even_identity_by_brute_force(eff_N, eff_D, alpha, beta, gamma, exponent):
    """T11: at s = 1 / (eff_N eff_D) the best losses of both precisions are equal, with and without gamma."""
    shape = {"A": 1e3, "B": 2e3, "alpha": alpha, "beta": beta, "gamma": gamma}
    C, s = 10.0**exponent, 1 / (eff_N * eff_D)
    reference, _ = lowest(lambda N, D: quartet(N, D, **shape), C)
    low, _ = lowest(lambda N, D: quartet(N, D, eff_N, eff_D, **shape), C * s)
    assert low - 1.34 == pytest.approx(reference - 1.34, rel=1e-9)
    slower, _ = lowest(lambda N, D: quartet(N, D, eff_N, eff_D, **shape), C * s * 0.99)
    assert slower > reference  # and not below it


@pytest.mark.parametrize("C", [1e19, 1e21, 1e24])
def test_the_optimum_equals_the_closed_form_and_brute_force(factors, C):
    for name, eff_N, eff_D, s in (("bf16", 1.0, 1.0, 1.0), ("nvfp4", 0.74, 0.95, 1.4)):
        N, D, loss = closed_optimum(HOFFMANN, C, eff_N=eff_N, eff_D=eff_D, speedup=s)
        found = factors.optimum(C, name, speedup=s)
        assert pytest.approx(C * s) == 6 * N * D and not found.edge
        assert found.N[0] == pytest.approx(N, rel=1e-4) and found.D[0] == pytest.approx(D, rel=1e-4)
        assert found.loss[0] == pytest.approx(loss, abs=1e-7)  # parabola: f''' h^3 / 16 < .02 * .046^3 / 16
        brute, size = lowest(functools.partial(chinchilla, eff_N=eff_N, eff_D=eff_D), C * s)
        assert loss == pytest.approx(brute, abs=1e-10) and size == pytest.approx(N, rel=1e-4)


def test_break_even_is_exact_for_efficiencies_and_the_search_agrees(factors, monkeypatch):
    assert break_even(factors, "nvfp4", 1e21) == pytest.approx(1 / (0.74 * 0.95), rel=1e-12)
    monkeypatch.setattr(advising, "efficiency", lambda *_: None)
    assert break_even(factors, "nvfp4", 1e21) == pytest.approx(1 / (0.74 * 0.95), rel=1e-3)


@pytest.mark.parametrize("C", [1e19, 1e22])
def test_break_even_of_an_additive_gap_by_brute_force(additive, C):
    """It depends on the budget, and there the two best losses are equal."""
    assert efficiency(additive, "nvfp4") is None

    def loss(N, D, gap):
        return chinchilla(N, D) + gap * 0.408 * D**0.112 / N**0.254

    target = lowest(lambda N, D: loss(N, D, 0.0), C)[0]
    true = brentq(lambda s: lowest(lambda N, D: loss(N, D, 1.0), C * s)[0] - target, 1, 50, rtol=1e-8)
    assert break_even(additive, "nvfp4", C)[0] == pytest.approx(true, rel=1e-3)


def test_the_best_precision_follows_the_speed_up(factors):
    even = 1 / (0.74 * 0.95)
    assert advise(factors, 1e21, speedup={"nvfp4": even * 1.01}).best == "nvfp4"
    slow = advise(factors, 1e21, speedup={"nvfp4": even * 0.99})
    assert slow.best == "bf16" and slow.table.loc["nvfp4", "time_frac"] == pytest.approx(1 / 0.99)
    none = advise(factors, 1e21)
    assert none.best == "bf16" and any("No speed-up was given for nvfp4" in note for note in none.notes)


def test_probabilities_are_shares_of_the_samples(sampled):
    """Well above break-even always, well below never, at the fitted break-even about half."""
    even = float(break_even(sampled, "nvfp4", 1e21)[0])
    found = {s: advise(sampled, 1e21, speedup={"nvfp4": s}).table.loc["nvfp4"] for s in (1.2, even, 1.7)}
    assert found[1.2].p_better == 0 and found[1.7].p_better == 1 and 0.2 < found[even].p_better < 0.8
    row = found[even]
    assert row.break_even_low < 1 / (0.74 * 0.95) < row.break_even_high
    share = np.mean(break_even(sampled, "nvfp4", 1e21)[1:] < even)  # the same decision, from the other side
    assert row.p_better == pytest.approx(share, abs=0.011)
    both = advise(sampled, 1e21, speedup={"nvfp4": even})
    assert both.table["p_best"].sum() == pytest.approx(1) and "better than bf16 in" in str(both)
    assert "times the tokens" in str(both)
    assert row.gap_high - row.gap_low < 0.5 * (row.loss_high - row.loss_low)  # what both share cancels


def test_memory_and_serving_change_the_optimum_as_brute_force_says(factors):
    free = factors.optimum(1e22, "bf16")
    capped = advise(factors, 1e22, max_N={"bf16": 1e9, "nvfp4": 3e9})
    assert capped.table.loc["bf16", "N"] == pytest.approx(1e9)
    assert capped.table.loc["bf16", "D"] == pytest.approx(1e22 / 6e9)
    assert any("bf16: N is the largest allowed" in note for note in capped.notes)
    served = 1e12
    found = factors.optimum(1e22, "bf16", served_tokens=served, serve_speedup=2.0)
    N = np.geomspace(1e8, 9e9, 200_001)
    D = (1e22 / N - 2 * served / 2.0) / 6
    losses = np.where(D > 0, chinchilla(N, np.where(D > 0, D, 1)), np.inf)
    assert found.N[0] == pytest.approx(N[np.argmin(losses)], rel=1e-3) and found.N[0] < free.N[0]
    assert 6 * found.N[0] * found.D[0] + found.N[0] * served == pytest.approx(1e22, rel=1e-9)
    assert found.loss[0] == pytest.approx(losses.min(), abs=1e-7)


@pytest.mark.parametrize("cap, served", [(1e9, 0.0), (math.inf, 1e12)])
def test_break_even_where_memory_or_serving_count(factors, cap, served):
    """The product rule is off there: at the speed-up that is found, the best losses are equal."""
    speed = break_even(factors, "nvfp4", 1e22, max_N=(cap, cap), served_tokens=served)[0]
    assert speed > 1.2 / (0.74 * 0.95)
    wanted = factors.optimum(1e22, "bf16", max_N=cap, served_tokens=served).loss[0]
    found = factors.optimum(1e22, "nvfp4", speedup=speed, max_N=cap, served_tokens=served).loss[0]
    assert found == pytest.approx(wanted, abs=5e-4)


def test_tokens_that_match_the_reference(factors):
    """Against the root of the formula; and never, where the size limits."""
    N, D = 1e9, 2e10
    true = brentq(lambda t: chinchilla(N, t * D, 0.74, 0.95) - chinchilla(N, D), 1, 10)
    assert more_tokens(factors, "nvfp4", N, D)[0] == pytest.approx(true, rel=1e-3)
    assert more_tokens(factors, "bf16", N, D)[0] == pytest.approx(1, rel=1e-6)
    assert more_tokens(factors, "nvfp4", 1e7, 1e13)[0] == math.inf


def test_critical_data_sizes_of_floating_point_training():
    """T5: 1.73e15, 2.73e13 and 3.93e11 tokens for 1e9 parameters and blocks of 128, and the closed form of the law."""
    law = load_law("floating_point")
    values = law.published["sun"]["values"]
    bits = {"e8m7": (8, 7), "e4m3": (4, 3), "e2m1": (2, 1), "bf16": (8, 7)}
    table = grid_table(
        SIZES, TOKENS, tuple(bits), exponent_bits={k: v[0] for k, v in bits.items()},
        mantissa_bits={k: v[1] for k, v in bits.items()}, block={**dict.fromkeys(bits, 128), "bf16": 1},
    )  # fmt: skip
    surface = known(law, values, table)
    for name, published in (("e8m7", 1.73e15), ("e4m3", 2.73e13), ("e2m1", 3.93e11)):
        found = critical_tokens(surface, name, 1e9)[0]
        assert found == pytest.approx(published, rel=0.01)
        assert found == pytest.approx(law.law.critical_tokens(values, 1e9, *bits[name], 128), rel=0.006)  # grid: 1.16 %
    assert critical_tokens(surface, "bf16", 1e9)[0] == math.inf


def test_the_share_of_quantisation_aware_training():
    """f* = exp(-a / ln S), S tokens a byte of parameters, in the table where the weights' bits are known."""
    values = HOFFMANN | {"eff_N[w4]": 0.8}
    table = grid_table(SIZES, TOKENS, ("bf16", "w4"), bits_w={"bf16": 16, "w4": 4})
    found = advise(known(load_law("efficiency"), values, table), 1e21).table
    row = found.loc["w4"]
    assert row.qat_frac == pytest.approx(math.exp(-6.7297 / math.log(row.D / (row.N / 2)))) and 0.1 < row.qat_frac < 0.5
    assert math.isnan(found.loc["bf16", "qat_frac"])


def test_iso_tables_agree_with_the_optima(factors):
    losses = iso_loss(factors, [2.6, 2.3, 1.6], speedup={"nvfp4": 1.6})
    for row in losses.itertuples():
        if row.loss == 1.6:  # below E
            assert row.budget == math.inf and math.isnan(row.N)
            continue
        eff = (0.74, 0.95, 1.6) if row.precision == "nvfp4" else (1.0, 1.0, 1.0)
        N, _, loss = closed_optimum(HOFFMANN, row.budget, eff_N=eff[0], eff_D=eff[1], speedup=eff[2])
        assert loss == pytest.approx(row.loss, abs=1e-3) and pytest.approx(N, rel=1e-3) == row.N
    assert list(losses["precision"][:2]) == ["nvfp4", "bf16"]  # the cheaper first
    flops = iso_flop(factors, [1e20, 1e21], points=9)
    assert len(flops) == 2 * 2 * 9
    for (budget, name), slice_ in flops.groupby(["budget", "precision"]):
        assert np.allclose(6 * slice_["N"] * slice_["D"], budget)
        assert slice_["loss"].min() == pytest.approx(factors.optimum(budget, name).loss[0], abs=1e-7)
        assert slice_["loss"].idxmin() == slice_.index[4]  # the middle


def test_a_format_that_was_never_trained_is_predicted_from_its_error():
    """The capacity law gives an efficiency to a format known by its Gaussian errors; a law of labels says it cannot."""
    law = load_law("capacity")
    values = HOFFMANN | {"F": 0.4, "C": 1.6, "L_c": 1.0}
    errors = {"bf16": 0.0, "nvfp4": 0.01, "int2": 0.12}
    table = grid_table(SIZES, TOKENS, tuple(errors), gmse_w=errors, gmse_a=errors)
    surface = known(law, values, table, formats={"mxfp6": {"gmse_w": 1e-3, "gmse_a": 1e-3}})
    share = np.tanh(0.4 * math.log(1e3, 4)) ** 1.6
    assert break_even(surface, "mxfp6", 1e21)[0] == pytest.approx(share**-2, rel=1e-9)
    assert set(advise(surface, 1e21).table.index) == {"bf16", "nvfp4", "int2", "mxfp6"}
    labels = load_law("efficiency")
    surface = known(labels, HOFFMANN | {"eff_N[nvfp4]": 0.7, "eff_N[int2]": 0.2}, table, formats={"mxfp6": {}})
    with pytest.raises(ValueError, match=r"eff_N\[mxfp6\]"):
        surface.loss(1e9, 1e10, "mxfp6")


def test_what_is_not_said_is_asked_for():
    law = load_law("qat")
    table = grid_table(SIZES, TOKENS, ("bf16", "w4a4"), bits_w={"bf16": 16, "w4a4": 4}, bits_a={"bf16": 16, "w4a4": 4})
    table = RunTable(table.frame.assign(block=np.where(np.arange(len(table)) % 2, 32, 128)))
    values = {"E": 1.7, "A": 200.0, "B": 400.0, "alpha": 0.3, "beta": 0.3, "k[wa]": 0.158, "gamma_N[wa]": 0.219,
              "gamma_D[wa]": 0.0745, "gamma_G[wa]": 0.778}  # fmt: skip
    surface = known(law, values, table)
    with pytest.raises(ValueError, match=r"block differs among the runs in w4a4 \(32, 128\)"):
        surface.loss(1e9, 1e10, "w4a4")
    small, large = (known(law, values, table, columns={"block": g}).loss(1e9, 1e10, "w4a4")[0, 0] for g in (32, 128))
    assert small < large


def test_wrong_questions_get_a_sentence(factors):
    for call, text in (
        (
            lambda: advise(factors, 1e21, speedup={"fp8": 1.2}),
            "--speedup fp8: there is no such precision; there are bf16, nvfp4",
        ),
        (lambda: advise(factors, 1e21, speedup={"nvfp4": 0}), "a speed-up is a positive number"),
        (lambda: advise(factors, 1e21, speedup={"bf16": 2}), "speed-ups are over bf16, whose own is 1"),
        (lambda: advise(factors, -1), "a budget is a positive number of FLOP"),
        (lambda: advise(factors, 1e21, max_N={"fp8": 1e9}), "max_N has 'fp8'"),
        (lambda: factors.loss(1e9, 1e10, "fp8"), "there is no precision 'fp8'; the runs have bf16, nvfp4"),
        (lambda: late_switch(factors, "nvfp4", 1e9, 1e10, shares=[1.5]), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_far_extrapolation_and_missing_intervals_are_said(factors):
    notes = " ".join(advise(factors, 1e25).notes)
    assert "beyond the largest that was trained; that far a law is a guess" in notes and "no bootstrap" in notes


def test_crossing():
    x = np.array([0.0, 1.0, 2.0])
    y = np.array([[1.0, 0.5, -0.5], [1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [2.0, -2.0, 3.0]])
    assert crossing(x, y).tolist() == [1.5, math.inf, -math.inf, 0.5]


def test_a_late_switch_is_bounded_and_its_speed_is_a_harmonic_mean(factors):
    found = late_switch(factors, "nvfp4", 1e9, 2e10, speedup={"nvfp4": 1.5}, shares=(0.0, 0.1, 1.0)).set_index("share")
    assert found["speedup"].tolist() == pytest.approx([1.5, 1 / (0.9 / 1.5 + 0.1), 1.0])
    assert (found["loss_best"] < found["loss_worst"]).all() and found.loc[0.0, "needed"] == pytest.approx(0)
    row = found.loc[0.1]
    recovered_loss = row.loss_worst - row.needed * (row.loss_worst - row.loss_best)
    assert recovered_loss == pytest.approx(row.loss_stay)  # recovering exactly that ties with staying
    longer = 2e10 * (0.9 + 0.1 * 1.5)  # tokens of the same time
    assert row.loss_stay == pytest.approx(chinchilla(1e9, longer, 0.74, 0.95))
    assert found["loss"].isna().all()  # no run switched, so nothing more is claimed


def test_what_a_switch_recovered_is_measured_where_runs_switched():
    names = ("bf16", "nvfp4", "nvfp4, bf16 from 0.9", "nvfp4, fprop bf16 from 0.82", "nvfp4, mxfp8 from 0.5")
    gap = dict(zip(names, (0.0, 0.04, 0.01, 0.02, 0.03)))
    table = grid_table((3e7, 6e7), (1e9, 3e9), names)
    loss = chinchilla(table.column("N"), table.column("D"))
    table = RunTable(table.frame.assign(loss=loss + table.frame["precision"].map(gap)))
    found = recovered(table)
    assert len(found) == 8 and set(found["base"]) == {"nvfp4"}  # not the switch to another format
    whole, part = found[found["gemm"] == ""], found[found["gemm"] == "fprop"]
    assert np.allclose(whole["recovered"], 0.75) and np.allclose(whole["share"], 0.1)
    assert np.allclose(part["recovered"], 0.5) and np.allclose(part["share"], 0.18) and part["sd"].isna().all()
    assert recovered(RunTable(table.frame.iloc[:4])).empty
    again = pd.concat([table.frame.assign(seed=0), table.frame.assign(seed=1, loss=table.frame["loss"] + 1e-3)])
    assert (recovered(RunTable(again.reset_index(drop=True)))["sd"] > 0).all()  # with repeats there is an error bar
