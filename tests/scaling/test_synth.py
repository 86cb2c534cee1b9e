"""Synthetic tables: the law's own numbers, the noise that was asked for, and the grids that people train."""

import numpy as np
import pytest

from lowprec.scaling import synth
from lowprec.scaling.law import load_law
from lowprec.scaling.table import RunTable

LAW = load_law("chinchilla")
TRUE = dict(LAW.published["hoffmann"]["values"])


def test_without_noise_runs_are_the_law():
    table = synth.draw(LAW, TRUE, synth.grid_table([1e8, 1e9], [1e10, 1e11]), noise=0)
    N, D = np.array([1e8, 1e8, 1e9, 1e9]), np.array([1e10, 1e11, 1e10, 1e11])
    assert table.column("N").tolist() == N.tolist() and table.column("D").tolist() == D.tolist()
    np.testing.assert_allclose(table.column("loss"), 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28, rtol=1e-14)
    assert table.column("C").tolist() == (6 * N * D).tolist()


def test_noise_multiplies_and_is_reproducible():
    """4,000 runs: the sd of log loss is .01 to 3/sqrt(8000) of itself."""
    grid = synth.grid_table([1e8] * 4000, [1e10])
    exact = synth.draw(LAW, TRUE, grid, noise=0).column("loss")
    one, again, other = (synth.draw(LAW, TRUE, grid, 0.01, seed).column("loss") for seed in (1, 1, 2))
    z = np.log(one / exact)
    assert z.std() == pytest.approx(0.01, rel=3 / np.sqrt(8000)) and abs(z.mean()) < 3 * 0.01 / np.sqrt(4000)
    assert (one == again).all() and not (one == other).any()
    assert "loss" not in grid.frame  # the table that was given is left alone


def test_laws_of_differences_get_noise_added():
    law = load_law("kumar_ptq")
    values = {"C_T": 0.06, "gamma_D": 0.5, "gamma_N": 0.34, "gamma_post": 0.6}
    grid = synth.grid_table([1e8], [1e10] * 500, bits_post=4.0)
    table = synth.draw(law, values, grid, noise=0.1, seed=3)
    assert (table.column("delta") < 0).any()
    exact = synth.draw(law, values, grid, noise=0).column("delta")
    assert (table.column("delta") - exact).std() == pytest.approx(0.1, rel=3 / np.sqrt(1000))


def test_precisions_have_their_columns():
    law = load_law("efficiency")
    table = synth.grid_table([1e8, 1e9], [1e10], ("bf16", "nvfp4"), bits_w={"bf16": 16, "nvfp4": 4}, data="c4")
    assert table.column("precision").tolist() == ["bf16", "bf16", "nvfp4", "nvfp4"]
    assert table.column("bits_w").tolist() == [16, 16, 4, 4] and set(table.column("data")) == {"c4"}
    drawn = synth.draw(law, {**TRUE, "eff_N[nvfp4]": 0.5}, table, noise=0).column("loss")
    half = synth.draw(LAW, TRUE, synth.grid_table([0.5e8, 0.5e9], [1e10]), noise=0).column("loss")
    np.testing.assert_allclose(drawn[2:], half, rtol=1e-14)


def test_grids_are_what_their_names_say():
    iso = synth.isoflop_table([1e19, 1e20], np.geomspace(1e8, 1e10, 9), (2, 200))
    assert set(iso.column("C").round(-9)) == {1e19, 1e20} and len(iso) == len(set(iso.column("run")))
    ratio = iso.column("D") / iso.column("N")
    assert ratio.min() >= 2 and ratio.max() <= 200
    ladder = synth.ladder_table([1e8, 1e9], (5, 50))
    assert (ladder.column("D") / ladder.column("N")).tolist() == [5, 50, 5, 50]
    pairs = synth.pairs_table([1e8, 2e8], [3e9, 4e9], "nvfp4", seed=7)
    assert pairs.column("D").tolist() == [3e9, 4e9] and pairs.column("seed").tolist() == [7, 7]
    assert isinstance(pairs, RunTable) and len(set(pairs.column("run"))) == 2


def test_a_missing_coefficient_is_named():
    with pytest.raises(ValueError, match="needs a value of 'beta' to draw runs; it has E, A, B, alpha, beta"):
        synth.draw(LAW, {k: v for k, v in TRUE.items() if k != "beta"}, synth.grid_table([1e8], [1e10]))
    with pytest.raises(ValueError, match="no column 'bits_w'"):
        synth.draw(load_law("kumar"), TRUE, synth.grid_table([1e8], [1e10]))
