"""Paired gaps and seed noise: known gaps are found, intervals cover, and what is not known is said."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.scaling.gaps import cells, gaps, levels, pooled, repeats_needed, seed_noise
from lowprec.scaling.table import RunTable

SIZES, RATIOS = (30e6, 50e6, 100e6, 200e6), (25, 50, 100, 200)


def ladder(gap=0.03, noise=0.0, shared=0.0, seeds=1, rng=None, per_doubling=(0.0, 0.0), **columns):
    """bf16 and nvfp4 at every size, ratio and seed; `shared` is the part of the noise that both precisions have."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for N in SIZES:
        for ratio in RATIOS:
            for seed in range(seeds):
                both = shared * rng.standard_normal()
                extra = per_doubling[0] * np.log2(N / 100e6) + per_doubling[1] * np.log2(ratio / 50)
                for name, cost in (("bf16", 0.0), ("nvfp4", gap + extra)):
                    loss = (
                        1.7 + 400 / N**0.34 + 2000 / (N * ratio) ** 0.36 + cost + both + noise * rng.standard_normal()
                    )
                    rows.append({"N": N, "D": N * ratio, "loss": loss, "precision": name, "seed": seed})
    frame = pd.DataFrame(rows).assign(**columns)
    frame.insert(0, "run", [f"r{i}" for i in range(len(frame))])
    return RunTable(frame)


def test_a_constant_gap_is_found_exactly_without_noise():
    found = gaps(ladder(gap=0.03))
    row = found.summary.loc["nvfp4"]
    assert row["mean"] == pytest.approx(0.03, abs=1e-12) and row["median"] == pytest.approx(0.03, abs=1e-12)
    assert (row.pairs, row.cells) == (16, 16) and row.per_doubling_N == pytest.approx(0, abs=1e-12)
    assert "no repeats" in str(found)  # one seed: the noise is unknown and the text says so


def test_trends_with_size_and_with_tokens_per_parameter_are_separated():
    row = gaps(ladder(per_doubling=(-0.004, 0.002))).summary.loc["nvfp4"]
    assert row.per_doubling_N == pytest.approx(-0.004, abs=1e-9)
    assert row.per_doubling_ratio == pytest.approx(0.002, abs=1e-9)


def test_no_trend_is_claimed_along_an_axis_that_does_not_vary():
    table = ladder()
    row = gaps(table.where(table.column("D") / table.column("N") == 50)).summary.loc["nvfp4"]
    assert np.isnan(row.per_doubling_ratio) and np.isfinite(row.per_doubling_N)


@pytest.mark.parametrize("shared", [0.0, 0.005])
def test_the_interval_of_the_mean_gap_covers(shared):
    """95% t interval over 16 cells, 40 draws: within 3 standard errors of 95%, whatever the two runs share."""
    rng = np.random.default_rng(1)
    rows = [gaps(ladder(gap=0.01, noise=0.002, shared=shared, rng=rng)).summary.loc["nvfp4"] for _ in range(40)]
    inside = np.mean([row.low <= 0.01 <= row.high for row in rows])
    assert abs(inside - 0.95) <= 3 * np.sqrt(0.95 * 0.05 / 40)
    assert (
        np.mean([row.high - row.low for row in rows]) < 0.0035
    )  # 2 t sqrt(2) .002 / 4 = .0030: pairing removed the rest


def test_seed_noise_is_pooled_with_its_degrees_of_freedom_and_interval():
    """32 cells of 3 seeds: 64 degrees of freedom; the chi-square interval covers the truth in 95% of 50 draws."""
    rng = np.random.default_rng(2)
    found = [seed_noise(ladder(noise=0.0005, seeds=3, rng=rng)) for _ in range(50)]
    assert found[0].df == 64 and len(found[0].cells) == 32
    assert np.sqrt(np.mean([n.sd**2 for n in found])) == pytest.approx(0.0005, rel=3 / np.sqrt(2 * 3200))
    inside = np.mean([n.low <= 0.0005 <= n.high for n in found])
    assert abs(inside - 0.95) <= 3 * np.sqrt(0.95 * 0.05 / 50)


def test_pairing_by_seed_removes_what_the_seed_does_to_both():
    found = gaps(ladder(noise=0.0002, shared=0.005, seeds=3))
    row = found.summary.loc["nvfp4"]
    assert set(found.pairs["matched"]) == {"seed"}
    assert row.pair_df == 32 and row.pair_sd == pytest.approx(0.0002 * np.sqrt(2), rel=3 / np.sqrt(64))
    assert found.noise.sd > 10 * row.pair_sd


def test_a_gap_is_called_larger_or_smaller_than_the_noise():
    assert "larger than the noise" in gaps(ladder(gap=0.03, noise=0.0005, seeds=2)).sentences()[0]
    assert "smaller than the noise" in gaps(ladder(gap=0.0, noise=0.0005, seeds=2)).sentences()[0]


def test_without_repeats_the_noise_is_not_made_up():
    noise = seed_noise(ladder(noise=0.01))
    assert noise.df == 0 and np.isnan(noise.sd) and "no repeats" in str(noise)
    assert "N = 3e+07, D = 7.5e+08" in str(noise) and "bf16 and nvfp4" in str(noise)  # the cheapest cell


def test_one_seed_twice_is_not_a_repeat_and_a_different_learning_rate_neither():
    table = ladder()
    twice = RunTable(pd.concat([table.frame, table.frame.assign(run="again")], ignore_index=True))
    assert seed_noise(twice).df == 0
    frame = pd.concat([table.frame.assign(lr=1e-3), table.frame.assign(lr=2e-3, seed=1)], ignore_index=True)
    assert seed_noise(RunTable(frame)).df == 0


def test_a_run_without_its_seed_is_paired_with_the_mean_of_its_cell():
    table = ladder(noise=0.001, seeds=2)
    frame = table.frame
    frame.loc[frame["precision"] == "nvfp4", "seed"] += 7
    found = gaps(RunTable(frame))
    assert set(found.pairs["references"]) == {2} and set(found.pairs["matched"]) == {""}


def test_runs_of_other_data_or_without_reference_are_not_paired():
    frame = ladder().frame
    frame["data"] = np.where((frame["precision"] == "nvfp4") & (frame["N"] == 30e6), "other", "c4")
    found = gaps(RunTable(frame))
    assert found.unpaired == {"nvfp4": 4} and len(found.pairs) == 12 and "4 runs have no bf16 run" in str(found)


def test_errors_are_sentences():
    table = ladder()
    with pytest.raises(ValueError, match="no runs in the reference precision 'fp32'; the table has bf16, nvfp4"):
        gaps(table, reference="fp32")
    with pytest.raises(ValueError, match="no run has a bf16 run of the same N, D"):
        gaps(table.where((table.column("precision") == "bf16") == (table.column("N") == 30e6)))
    with pytest.raises(ValueError, match="gap other than 0"):
        repeats_needed(0, 0.001)


def test_one_cell_uses_its_seeds():
    """With one cell the interval comes from its repeats, with one pair there is none."""
    table = ladder(noise=0.001, seeds=4)
    one = table.where((table.column("N") == 30e6) & (table.column("D") == 30e6 * 25))
    row = gaps(one).summary.loc["nvfp4"]
    assert row.cells == 1 and row.pairs == 4 and row.low < row["mean"] < row.high
    pair = gaps(one.where(one.column("seed") == 0))
    assert np.isnan(pair.summary.loc["nvfp4"].low) and "one pair: no interval" in str(pair)


def test_repeats_needed_has_the_promised_power():
    """The z test with that many pairs finds the gap in at least 80% of draws (3 standard errors at 4000)."""
    rng, gap, sd = np.random.default_rng(3), 0.001, 0.0013
    n = repeats_needed(gap, sd)
    found = np.mean(rng.normal(gap, sd, (4000, n)).mean(axis=1) > 1.96 * sd / np.sqrt(n))
    assert found >= 0.8 - 3 * np.sqrt(0.16 / 4000)
    assert np.mean(rng.normal(gap, sd, (4000, n - 1)).mean(axis=1) > 1.96 * sd / np.sqrt(n - 1)) < 0.82


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=20), st.floats(0.001, 0.2))
def test_levels_are_ascending_and_within_tolerance(values, tolerance):
    values = np.array(values)
    index = levels(values, tolerance)
    for level in range(index.max() + 1):
        inside = values[index == level]
        assert len(inside) and inside.max() <= inside.min() * (1 + tolerance) * (1 + 1e-12)
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(index[order]) >= 0)


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(random):
    table = ladder(noise=0.001, seeds=2)
    order = list(range(len(table)))
    random.shuffle(order)
    shuffled = RunTable(table.frame.iloc[order].reset_index(drop=True))
    assert gaps(shuffled).summary.loc["nvfp4", "mean"] == pytest.approx(gaps(table).summary.loc["nvfp4", "mean"])
    assert seed_noise(shuffled).sd == pytest.approx(seed_noise(table).sd)


def test_pooled_equals_its_definition():
    values, groups = np.array([1.0, 3.0, 10.0, 5.0, 5.0, 8.0]), np.array([0, 0, 1, 2, 2, 2])
    assert pooled(values, groups) == (pytest.approx(np.sqrt((2 + 6) / 3)), 3)
    assert len(np.unique(cells(ladder(seeds=2)))) == 16
