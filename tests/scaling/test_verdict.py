"""judge: every reason to distrust a fit, provoked by a table that deserves it, and none on tables that do not."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from tables import table as published

from lowprec.scaling import synth
from lowprec.scaling.diagnose import judge
from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.laws.curves import curve_points
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import bootstrap

LAW = load_law("chinchilla")
TRUE = dict(LAW.published["besiroglu"]["values"])
SIZES = np.geomspace(44e6, 16e9, 5)
LADDER = synth.ladder_table(SIZES, (10, 20, 40, 80, 160))
ISOFLOP = synth.isoflop_table(np.geomspace(6e18, 3e21, 9), np.geomspace(44e6, 16e9, 20))


def verdict(table: RunTable, law=LAW, noise: float = 0.003, seed: int = 0, values=TRUE, **options):
    return judge(fit(law, synth.draw(law, values, table, noise, seed), restarts=4, **options))


def assert_because(found, grade: str, reason: str) -> None:
    assert found.grade == grade, found
    assert any(re.search(reason, why) for why in found.reasons), found
    assert str(found).startswith(f"{grade}: ")


def test_good_tables_are_ok():
    """14 tables of two designs. Fewer than one in ten is WEAK by chance, so four or more of 14 with probability 4 %."""
    grades = [verdict(table, seed=seed).grade for table in (LADDER, ISOFLOP) for seed in range(7)]
    assert "REFUSE" not in grades and grades.count("WEAK") <= 3, grades
    assert str(verdict(LADDER)) == "OK"


def test_one_ratio_of_tokens_to_parameters_is_refused():
    """Exactly 20 tokens a parameter, and 20 give or take 10 %."""
    line = synth.ladder_table(np.geomspace(44e6, 16e9, 25), (20,))
    assert_because(verdict(line), "REFUSE", "about 20 tokens a parameter, so N and D are one variable.* with 5 and 80")
    N = line.column("N")
    nearly = synth.pairs_table(N, N * 20 * np.random.default_rng(0).uniform(0.9, 1.1, 25))
    assert_because(verdict(nearly), "REFUSE", "one variable")
    assert verdict(line, fixed={"A": TRUE["A"], "alpha": TRUE["alpha"]}).grade != "REFUSE"  # the rest is known then


def test_too_few_settings_are_refused_and_repeats_do_not_help():
    six = synth.ladder_table([1e8, 1e9, 1e10], (10, 100))
    assert_because(verdict(six), "REFUSE", r"6 different settings \(6 runs\) cannot determine 5 .* at least 7")
    thrice = RunTable(pd.concat([six.frame] * 3, ignore_index=True))
    assert_because(verdict(thrice), "REFUSE", r"6 different settings \(18 runs\)")
    four = synth.pairs_table([1e8, 2e8, 4e8, 8e8], [1e9, 8e9, 2e9, 4e10])
    assert_because(
        verdict(four, fixed={"E": 1.8, "A": 482.0}), "REFUSE", "4 different settings .* determine 3 parameters"
    )


def test_losses_that_rise_with_size_are_refused():
    """At equal D; and on scattered D, where no two runs can be compared."""
    grid = synth.grid_table(SIZES, np.geomspace(1e9, 1e10, 4))
    frame = synth.draw(LAW, TRUE, grid).frame
    risen = RunTable(frame.assign(loss=frame["loss"] * (frame["N"] / 44e6) ** 0.05))
    assert_because(judge(fit(LAW, risen, restarts=0)), "REFUSE", "loss rises with N at equal D in .* of 40 pairs")
    rng = np.random.default_rng(1)
    N, D = rng.permutation(np.geomspace(1e7, 1e9, 20)), np.geomspace(1e9, 1e12, 20)
    scattered = synth.draw(LAW, TRUE, synth.pairs_table(N, D))
    assert "rises" not in str(judge(fit(LAW, scattered, restarts=0)))
    up = RunTable(scattered.frame.assign(loss=2 + 0.3 * (N / 1e8) ** 0.3 + 100 / D**0.3))
    assert_because(
        judge(fit(LAW, up, restarts=0)), "REFUSE", r"at given D the loss rises with N, by [\d.]+% a doubling"
    )


def test_a_few_rising_pairs_are_a_warning():
    grid = synth.grid_table(SIZES, np.geomspace(3e9, 3e11, 5))
    frame = synth.draw(LAW, TRUE, grid, noise=0).frame
    frame.loc[frame["N"] == frame["N"].max(), "loss"] *= np.repeat(
        [1.25, 1.0], [2, 3]
    )  # too short for the largest model
    found = judge(fit(LAW, RunTable(frame), restarts=0))
    assert_because(found, "WEAK", "the loss rises with N at equal D in 1[0-9]% of 50 pairs")


def test_precisions_that_the_law_does_not_know_are_refused_if_they_differ():
    """NVFP4 that costs a quarter of the parameters is seen; two names of one precision are only mentioned."""
    law = load_law("efficiency")
    both = synth.grid_table(SIZES, SIZES * 50, ("bf16", "nvfp4"))
    table = synth.draw(law, {**TRUE, "eff_N[nvfp4]": 0.5}, both, 0.001)
    found = judge(fit(LAW, table, restarts=0))
    assert_because(
        found,
        "REFUSE",
        "cannot tell the precision of these runs, and those with (bf16 lie .* below|nvfp4 lie .* above)",
    )
    assert any("or use a law that knows it such as efficiency" in why for why in found.reasons)
    some = table.frame.assign(precision=table.frame["precision"].where(table.frame["precision"] == "nvfp4"))
    alone = table.where(table.column("precision") == "nvfp4")
    assert_because(judge(fit(law, alone, restarts=0)), "REFUSE", "no run is in bf16")
    unlabelled = judge(fit(LAW, RunTable(some), restarts=0))
    assert_because(unlabelled, "REFUSE", "those with (no label lie .* below|nvfp4 lie .* above)")
    assert judge(fit(law, table, restarts=2)).grade == "OK"
    same = synth.draw(law, {**TRUE, "eff_N[nvfp4]": 1.0}, both, 0.001)
    assert_because(
        judge(fit(LAW, same, restarts=0)), "WEAK", r"cannot tell the precisions of these runs \(bf16, nvfp4\) apart"
    )


def test_what_bits_do_not_tell_is_noticed():
    """Two formats of four bits, one of them worse: a law of bits puts one curve through both."""
    bits = {"bf16": 16.0, "mxfp4": 4.0, "nvfp4": 4.0}
    table = synth.grid_table(SIZES, SIZES * 50, tuple(bits), bits_w=bits)
    effs = {**TRUE, "eff_N[nvfp4]": 0.8, "eff_N[mxfp4]": 0.5}
    drawn = synth.draw(load_law("efficiency"), effs, table, 0.001)
    found = judge(fit(load_law("kumar", operands=["w"]), drawn, restarts=0))
    assert_because(found, "WEAK", "cannot tell the precision of these runs, and those with (mx|nv)fp4")
    alike = synth.draw(load_law("efficiency"), {**effs, "eff_N[mxfp4]": 0.8}, table, 0.001)
    alike = judge(fit(load_law("kumar", operands=["w"]), alike, restarts=0))
    assert "cannot tell the precisions" in str(alike) and "those with" not in str(alike)
    told = synth.grid_table(SIZES, SIZES * 50, ("bf16", "nvfp4"), bits_w={"bf16": 16.0, "nvfp4": 4.0})
    told = synth.draw(load_law("efficiency"), {**TRUE, "eff_N[nvfp4]": 0.8}, told, 0.001)
    assert "cannot tell" not in str(judge(fit(load_law("kumar", operands=["w"]), told, restarts=0)))


@pytest.mark.parametrize("column", ["data", "optimizer", "schedule"])
def test_other_mixtures_are_a_warning_if_they_differ(column):
    frame = synth.draw(LAW, TRUE, LADDER, 0.001).frame
    labels = np.where(np.arange(25) % 2, "a", "b")
    apart = RunTable(frame.assign(**{column: labels, "loss": frame["loss"] * np.where(labels == "a", 1.02, 1.0)}))
    assert_because(judge(fit(LAW, apart, delta=np.inf)), "WEAK", f"cannot tell the {column} of these runs")
    assert judge(fit(LAW, RunTable(frame.assign(**{column: labels})), restarts=0)).grade == "OK"


def test_bounds_are_explained():
    """A pure power law: E ends at 0. An exponent beyond its bound."""
    power = {**TRUE, "E": 0.0, "A": 60.0, "alpha": 0.15}
    assert_because(verdict(LADDER, values=power, noise=0), "WEAK", "E ended on its bound 0: .* do not extrapolate far")
    low = dataclasses.replace(LAW, params={"alpha": {"low": 0.4, "start": [0.45]}})
    assert_because(verdict(LADDER, law=low), "WEAK", r"alpha ended on its bound \(0.4\)")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (
            synth.ladder_table(np.geomspace(1e8, 5e8, 5), (5, 20, 80, 320)),
            "^N spans a factor of 5 only; an exp.* wants 8",
        ),
        (synth.grid_table(SIZES, [1e10, 2e10, 3e10, 5e10]), "^D spans a factor of 5 only"),
        (synth.ladder_table(SIZES, (10, 15, 20, 30)), "^D/N spans a factor of 3 only; an exponent wants 4"),
        (synth.ladder_table(np.geomspace(1e8, 3e8, 5), (5, 20, 80, 320)), r"hard to tell apart .*\(condition \d{3}\)"),
    ],
)
def test_narrow_tables_are_a_warning(table, reason):
    found = judge(fit(LAW, synth.draw(LAW, TRUE, table, noise=1e-5), restarts=0))
    assert_because(found, "WEAK", reason)


def test_spans_do_not_matter_where_no_exponent_is_fitted():
    narrow = synth.grid_table(np.geomspace(1e8, 3e8, 4), np.geomspace(1e10, 3e10, 4), ("bf16", "nvfp4"))
    law = load_law("efficiency")
    values = {**TRUE, "eff_N[nvfp4]": 0.7}
    assert verdict(narrow, law=law, values=values, fixed=TRUE).grade == "OK"
    assert "spans" in str(verdict(narrow, law=law, values=values))


def test_parameters_that_cannot_be_told_apart_are_named():
    """Two sizes: A and alpha fit one difference. No tokens vary at all: B, beta and E are one number."""
    two = synth.grid_table([1e8, 1e10], np.geomspace(1e10, 1e12, 6))
    assert_because(verdict(two), "REFUSE", "(A|alpha).* cannot be told apart on these runs")
    one = synth.grid_table(np.geomspace(1e8, 1e10, 12), [1e11])
    found = verdict(one)
    assert_because(found, "REFUSE", "(beta|B|E).* cannot be told apart")
    assert any("D spans a factor of 1 only" in why for why in found.reasons)


def test_wide_intervals_are_a_warning():
    assert_because(verdict(LADDER, noise=0.05, seed=1), "WEAK", "95 % interval of .* is wider than its value")


def test_scatter_and_undertraining_are_a_warning():
    assert_because(
        verdict(ISOFLOP, noise=0.06), "WEAK", r"scatter by [56]\.\d% about the curve: the law does not describe them"
    )
    short = synth.ladder_table(SIZES, (0.05, 0.2, 0.6, 2, 8))
    assert_because(verdict(short), "WEAK", "60% of the runs saw fewer tokens than they have parameters")


def test_outliers_that_matter_are_listed():
    """Four of 25 runs are 5 % too high; and a single one, of little influence, is not worth a word."""
    frame = synth.draw(LAW, TRUE, LADDER, 0.001, seed=4).frame
    four = frame.copy()
    four.loc[[2, 8, 11, 19], "loss"] *= 1.05
    found = judge(fit(LAW, RunTable(four), restarts=0))
    assert_because(found, "WEAK", r"of 25 runs lie more than 5 MAD off the curve \(r0002, r0008, r0011, r0019")
    frame.loc[12, "loss"] *= 1.03
    fitted = fit(LAW, RunTable(frame), restarts=0)
    assert fitted.outliers == ("r0012",) and judge(fitted).grade == "OK"


def test_highest_losses_that_bend_the_curve_are_noticed():
    """The smallest runs were cut short: their losses are 4 % too high, and least squares follows them."""
    frame = synth.draw(LAW, TRUE, ISOFLOP, 0.002, seed=2).frame
    high = frame["loss"].nlargest(2).index
    frame.loc[high, "loss"] *= 1.05
    assert_because(judge(fit(LAW, RunTable(frame), restarts=0, delta=np.inf)), "WEAK", "without the 2 of highest loss")


def test_one_run_that_decides_is_named():
    """Two sizes on many tokens and one run of a third, without which A and alpha are one number (its repeat does not
    help). And a good ladder of which one corner run was read off wrongly, by least squares."""
    D = np.geomspace(1e10, 1e12, 8)
    three = synth.pairs_table([1e8] * 8 + [1e9] * 8 + [2e10] * 2, [*D, *D, 1e11, 1e11])
    assert_because(verdict(three), "REFUSE", "without r0016 .*could not be told apart on these runs: it alone decides")
    frame = synth.draw(LAW, TRUE, LADDER, 0.002, seed=3).frame
    frame.loc[24, "loss"] *= 1.04
    wrong = judge(fit(LAW, RunTable(frame), delta=np.inf, restarts=0))
    assert_because(wrong, "WEAK", "without the run r0024 (alpha|beta) moves by")


def test_restarts_that_disagree_are_a_warning():
    fitted = fit(LAW, synth.draw(LAW, TRUE, LADDER), restarts=0)
    assert_because(judge(dataclasses.replace(fitted, reached=0.25)), "WEAK", "only 25% of the restarts")


def test_an_optimum_that_is_no_number_is_refused():
    fitted = fit(LAW, synth.draw(LAW, TRUE, LADDER), restarts=0)
    assert_because(judge(dataclasses.replace(fitted, objective=np.nan)), "REFUSE", "the optimum is not finite")


def test_resamples_without_enough_cells_are_a_warning():
    few = synth.pairs_table([1e8, 1e8, 4e8, 4e8, 2e9, 2e9, 2e9, 1e8], [2e9, 2e10, 8e9, 6e10, 4e10, 4e11, 1e11, 1e11])
    fitted = fit(LAW, synth.draw(LAW, TRUE, few, noise=1e-4), restarts=0)
    boot = bootstrap(fitted, 40)
    many = dataclasses.replace(boot, redrawn=100)
    assert_because(judge(fitted, many), "WEAK", "of the resamples do not determine the parameters")


def test_points_of_whole_curves_are_judged_by_curve():
    """Five schedules of 30 points each with noise: nothing is wrong with them, and the curves are what is drawn."""
    steps = np.linspace(500, 3000, 30)
    rates = [1e-3 * np.clip((4000 - steps) / (4000 - begin), 0.1, 1) for begin in (500, 1000, 1800, 2500, 3900)]
    curves = {f"c{i}": pd.DataFrame({"step": steps, "lr": lr, "loss": np.ones(30)}) for i, lr in enumerate(rates)}
    names = list(curves)
    runs = RunTable(pd.DataFrame({"run": names, "curve": names, "schedule": names, "N": 1e8, "D": 1e10}))
    law = load_law("annealing")
    points = curve_points(runs, reader=curves.__getitem__)
    fitted = fit(law, synth.draw(law, {"L0": 2.5, "A": 0.5, "C": 0.3, "alpha": 0.4}, points, noise=0.002))
    assert len(fitted.residuals) > 100 and fitted.params["alpha"] == pytest.approx(0.4, abs=0.1)
    found = judge(fitted)
    assert found.grade != "REFUSE" and "without" not in str(found) and "schedule" not in str(found), found


# --- public run tables ------------------------------------------------------------------------------------------------


def public(name: str, **columns: str) -> RunTable:
    frame = pd.read_csv(published(name)).rename(columns=columns)
    return RunTable(frame.assign(run=[f"r{i}" for i in range(len(frame))]))


def test_undertrained_runs_of_a_user_are_refused():
    """Loss rises with N, 2 to 98M tokens for up to 2.3B parameters; and so with bf16 runs alone."""
    table = public("infatoshi_nvfp4_smallruns.csv", tokens="D", val_loss="loss", backend="precision")
    for runs in (table, table.where(table.column("precision") == "bf16")):
        found = judge(fit(LAW, runs))
        assert_because(found, "REFUSE", "the loss rises with N at equal D in 5.% of")
        assert any("ended on its bound" in why for why in found.reasons)


def test_chinchillas_table_is_ok_without_its_five_highest_losses_and_weak_with_them():
    table = public("chinchilla_epoch.csv")
    assert str(judge(fit(LAW, table.drop_highest(5)))) == "OK"
    assert_because(judge(fit(LAW, table)), "WEAK", r"without the 5 of highest loss beta moves by 1\.\d standard errors")
