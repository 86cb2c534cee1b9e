"""Published fits are reproduced from the tables they were made from (skipped where the tables are not there)."""

import numpy as np
import pandas as pd
import pytest
from tables import table as published

from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import bootstrap

LAW = load_law("chinchilla")


def runs(name: str, **columns: str) -> RunTable:
    frame = pd.read_csv(published(name), dtype={"law_key": str}).rename(columns=columns)
    return RunTable(frame.assign(run=[f"r{i}" for i in range(len(frame))]))


def test_chinchilla_replication_reaches_the_global_optimum():
    """T1: 240 points of arXiv:2404.10102, Huber 1e-3."""
    fitted = fit(LAW, runs("chinchilla_epoch.csv").drop_highest(5))
    assert len(fitted.residuals) == 240
    assert fitted.objective <= 1.01828e-3 * (1 + 1e-5)
    p = fitted.params
    assert (p["alpha"], p["beta"], p["E"]) == pytest.approx((0.34731, 0.36717, 1.81722), abs=1e-5)
    assert (p["A"], p["B"]) == pytest.approx((477.8, 2143.4), abs=0.1)
    assert fitted.reached == 1 and not fitted.at_bound


def test_chinchilla_replication_with_its_own_scale_gives_the_published_numbers():
    """T2: they fit the scale too, which amounts to least absolute errors; delta 1e-5 is close to that."""
    fitted = fit(LAW, runs("chinchilla_epoch.csv").drop_highest(5), delta=1e-5)
    for name, value in LAW.published["besiroglu"]["values"].items():
        assert fitted.params[name] == pytest.approx(value, rel=2e-3), name


def test_bootstrap_standard_errors_are_those_that_were_published():
    """E .0257, alpha .0154, beta .0206 from 4,000 pairs. A sd of 400 samples is itself known to 1/sqrt(800): four of
    those, and 5 % for the other optimum."""
    boot = bootstrap(fit(LAW, runs("chinchilla_epoch.csv").drop_highest(5), restarts=0), 400)
    for name, error in {"E": 0.02566, "alpha": 0.0154, "beta": 0.0206}.items():
        assert boot.samples[name].std() == pytest.approx(error, rel=4 / np.sqrt(800) + 0.05), name


def test_quest_efficiencies_of_sixteen_schemes():
    """T4: 22 parameters by least squares; arXiv:2502.05003's own program gives these."""
    law = load_law("efficiency")
    fitted = fit(law, runs("quest_runs.csv", law_key="precision", precision="kind"), delta=np.inf, restarts=4)
    assert len(fitted.params) == 21
    expected = {
        "1": 0.0205046859, "2": 0.151870911, "3": 0.433126203, "4": 0.691831718, "8": 1.01619263, "fp4": 0.629639028,
        "2.5": 0.381222089, "1WO": 0.138419575, "2WO": 0.413717453, "3WO": 0.653058816, "4WO": 0.840434222,
        "1NOH": 0.0155770373, "2NOH": 0.0784119072, "3NOH": 0.322107861, "4NOH": 0.603270679, "8NOH": 0.937628722,
    }  # fmt: skip
    assert {name: fitted.params[f"eff_N[{name}]"] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert fitted.at_bound == ("E",)


def test_quartet_surface_and_efficiencies():
    """T3: 24 bf16 runs, then eff_D of a stochastic MXFP4 backward and eff_N of the QuEST MXFP4 forward."""
    table = runs("quartet_mxfp4_runs.csv")
    law = load_law("quartet", eff_N="fwd", eff_D="bwd")
    forward, backward = table.column("fwd"), table.column("bwd")
    base = fit(law, table.where((forward == "BF16") & (backward == "BF16")), delta=1e-4)
    expected = {"E": 1.34085, "A": 127444.685, "B": 465834.312, "alpha": 0.57852, "beta": 0.53888, "gamma": 0.27642}
    assert base.params == pytest.approx(expected, rel=1e-3)
    assert base.objective == pytest.approx(2.1292178e-6, rel=1e-6)
    stochastic = table.where((forward == "BF16") & np.isin(backward, ["BF16", "AlbertTsengQuantizer"]))
    quest = table.where((backward == "BF16") & np.isin(forward, ["BF16", "QuEST"]))
    eff_D = fit(law, stochastic, delta=1e-4, fixed=base.params).params["eff_D[AlbertTsengQuantizer]"]
    eff_N = fit(law, quest, delta=1e-4, fixed=base.params).params["eff_N[QuEST]"]
    assert (eff_D, eff_N) == pytest.approx((0.89347, 0.64516), rel=1e-3)
