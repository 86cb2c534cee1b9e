"""Acceptance, from a file to a verdict or a decision at the command line: what users see is what the library finds.

Every case runs on made-up runs of published coefficients, and again on the published runs themselves where those are at
hand. T-numbers are those of the project's list; T5 to T8, T11 and T12 are tested beside the code they are about.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import table

from lowprec.scaling.law import load_law
from lowprec.scaling.read import read
from lowprec.scaling.synth import draw, grid_table, isoflop_table, ladder_table
from lowprec.scaling.table import RunTable
from lowprec.tools.fit_scaling import main

BESIROGLU = load_law("chinchilla").published["besiroglu"]["values"]
QUARTET = load_law("quartet").published["quartet"]["values"]
QUEST = load_law("efficiency").published["quest"]["values"]


def fit(out: Path, *command: str, code: int = 0) -> dict:
    """fit.json of a command line."""
    assert main(["fit", *command, "--out", str(out)]) == code
    return json.loads((out / "fit.json").read_text())


def written(path: Path, runs: RunTable) -> str:
    runs.to_csv(path)
    return str(path)


# ---- T1, T2: Chinchilla


def test_t1_chinchilla_surface_is_recovered(tmp_path):
    """Some 240 runs on iso-FLOP lines with the scatter of points read off a figure: within three standard errors."""
    runs = isoflop_table(np.geomspace(6e18, 3e21, 9), np.geomspace(5e7, 1.6e10, 60), ratios=(1, 300))
    source = written(tmp_path / "runs.csv", draw(load_law("chinchilla"), BESIROGLU, runs, noise=0.005, seed=7))
    found = fit(tmp_path, "--runs", source, "--law", "chinchilla", "--bootstrap", "200")
    assert found["verdict"] == "OK" and 200 < found["n"] < 320 and found["reached"] > 0.9
    for name, value in BESIROGLU.items():
        low, high = found["intervals"][name]  # 3.9 standard errors wide
        assert abs(found["params"][name] - value) < 3 / 3.9 * (high - low), name
        assert 0 < high - low < value, name


class TestPublishedChinchilla:
    """The 245 points of arXiv:2404.10102, of which its authors drop the five highest losses."""

    def test_t1_global_optimum(self, tmp_path):
        source = str(table("chinchilla_epoch.csv"))
        found = fit(tmp_path, "--runs", source, "--law", "chinchilla", "--drop-highest", "5", "--bootstrap", "200")
        assert found["n"] == 240 and len(found["dropped"]) == 5 and found["verdict"] == "OK"
        assert found["objective"] <= 1.01828e-3 * (1 + 1e-5)
        params = found["params"]
        assert params["alpha"] == pytest.approx(0.3473, rel=1e-3) and params["beta"] == pytest.approx(0.3672, rel=1e-3)
        assert params["E"] == pytest.approx(1.8172, rel=1e-4) and params["A"] == pytest.approx(477.8, rel=1e-3)
        assert params["B"] == pytest.approx(2143.4, rel=2e-3)
        for name, value in BESIROGLU.items():
            assert found["intervals"][name][0] < value < found["intervals"][name][1], name

    def test_t2_a_nearly_absolute_loss_gives_the_printed_coefficients(self, tmp_path):
        source = str(table("chinchilla_epoch.csv"))
        more = ["--drop-highest", "5", "--delta", "1e-5", "--bootstrap", "0"]
        found = fit(tmp_path, "--runs", source, "--law", "chinchilla", *more)
        for name, value in BESIROGLU.items():
            assert found["params"][name] == pytest.approx(value, rel=2e-3), name


# ---- T3: Quartet, T4: QuEST


def quartet_runs(noise: float) -> RunTable:
    """The ladder of arXiv:2505.14669 in shape: four recipes, 30M to 200M parameters (BF16 to 800M), D/N 25 to 800."""
    parts = []
    for fprop, dgrad, sizes in (("bf16", "bf16", 6), ("mxfp4_quest", "bf16", 4), ("bf16", "mxfp4_sr", 4),
                                ("mxfp4_quest", "mxfp4_sr", 4)):  # fmt: skip
        N = np.array([3.05e7, 4.96e7, 1.03e8, 2.03e8, 4.32e8, 8.22e8])[:sizes]
        rows = grid_table(N, [1.0], (f"{fprop}/{dgrad}",), **{"fprop.w": fprop, "dgrad.dy": dgrad}).frame
        for ratio in (25, 50, 100, 200, 400, 800):
            parts.append(rows.assign(D=rows["N"] * ratio, C=6 * rows["N"] ** 2 * ratio))
    frame = pd.concat(parts, ignore_index=True)
    runs = RunTable(frame.assign(run=[f"q{i}" for i in range(len(frame))]))
    return draw(load_law("quartet"), QUARTET, runs, noise=noise, seed=3)


def test_t3_quartet_surface_and_efficiencies(tmp_path):
    """Without noise to the printed digits; the surface from BF16 runs alone, then the efficiencies on it."""
    source = written(tmp_path / "runs.csv", quartet_runs(noise=0.0))
    base = fit(tmp_path / "a", "--runs", source, "--law", "quartet", "--precision", "bf16/bf16", "--bootstrap", "0")
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    for name in names:
        assert base["params"][name] == pytest.approx(QUARTET[name], rel=1e-3), name
    held = [f"{name}={base['params'][name]!r}" for name in names]
    found = fit(tmp_path / "b", "--runs", source, "--law", "quartet", "--fix", *held, "--bootstrap", "0")
    for name in ("eff_N[mxfp4_quest]", "eff_D[mxfp4_sr]"):
        assert found["params"][name] == pytest.approx(QUARTET[name], rel=1e-4), name


class TestPublishedQuartet:
    """T3 on the 174 runs of arXiv:2505.14669."""

    COLUMNS = ("--columns", "fprop.w=fwd", "dgrad.dy=bwd", "--law", "quartet", "--bootstrap", "0")

    def test_t3_surface_then_efficiencies(self, tmp_path):
        source = str(table("quartet_mxfp4_runs.csv"))
        base = fit(tmp_path / "a", "--runs", source, *self.COLUMNS, "--where", "fprop.w==BF16", "dgrad.dy==BF16")
        names = ("E", "A", "B", "alpha", "beta", "gamma")
        assert base["n"] == 24 and base["objective"] == pytest.approx(2.12922e-6, rel=1e-5)
        for name in names:
            assert base["params"][name] == pytest.approx(QUARTET[name], rel=1e-3), name
        held = ["--fix", *(f"{name}={base['params'][name]!r}" for name in names)]
        forward = ["--where", "dgrad.dy==BF16", "fprop.w!=QuESTNoQuantScale"]
        found = fit(tmp_path / "b", "--runs", source, *self.COLUMNS, *forward, *held)
        assert found["params"]["eff_N[QuEST]"] == pytest.approx(0.6452, rel=1e-3)
        backward = ["--where", "fprop.w==BF16", "dgrad.dy!=QuEST"]
        found = fit(tmp_path / "c", "--runs", source, *self.COLUMNS, *backward, *held)
        assert found["params"]["eff_D[AlbertTsengQuantizer]"] == pytest.approx(0.8935, rel=1e-3)


def test_t4_sixteen_efficiencies(tmp_path):
    """The shape of QuEST's ladder: 16 schemes at one ratio, three of them at four. Efficiencies within five percent."""
    labels = [name[6:-1] for name in QUEST if name.startswith("eff_N[")]
    sizes = [3.05e7, 4.96e7, 9.53e7, 2.03e8]
    rows = [(n, 100 * n, label) for n in sizes for label in ("bf16", *labels)]
    rows += [(n, ratio * n, label) for n in sizes for ratio in (25, 50, 75) for label in ("w2a2", "w3a3", "w4a4")]
    frame = pd.DataFrame(rows, columns=["N", "D", "precision"])
    frame["run"], frame["C"] = [f"q{i}" for i in range(len(frame))], 6 * frame["N"] * frame["D"]
    runs = draw(load_law("efficiency"), QUEST, RunTable(frame), noise=2e-4, seed=5)
    source = written(tmp_path / "runs.csv", runs)
    found = fit(tmp_path, "--runs", source, "--law", "efficiency", "--delta", "inf", "--bootstrap", "0")
    assert len(labels) == 16
    for label in labels:
        assert found["params"][f"eff_N[{label}]"] == pytest.approx(QUEST[f"eff_N[{label}]"], rel=0.05), label


class TestPublishedQuest:
    def test_t4_sixteen_efficiencies_of_the_paper(self, tmp_path):
        """104 runs of arXiv:2502.05003, least squares as its authors did in effect: all within one percent."""
        more = ["--law", "efficiency", "--delta", "inf", "--bootstrap", "0"]
        found = fit(tmp_path, "--runs", str(table("quest_runs.csv")), *more)
        theirs = {name.removeprefix("eff_N["): value for name, value in QUEST.items() if name.startswith("eff_N[")}
        ours = {name.removeprefix("eff_N["): value for name, value in found["params"].items() if "eff_N[" in name}
        assert len(ours) == len(theirs) == 16
        for mine, value in zip(sorted(ours.values()), sorted(theirs.values())):
            assert mine == pytest.approx(value, rel=0.01)
        assert ours["quest_w4a4]"] == pytest.approx(theirs["w4a4]"], rel=0.01)
        assert found["verdict"].startswith("WEAK: ") and "E" in found["at_bound"]


# ---- T9: fits that must not be used


def test_t9_one_ratio_is_refused_and_a_few_other_runs_mend_it(tmp_path):
    ladder = draw(load_law("chinchilla"), BESIROGLU, ladder_table(np.geomspace(3e7, 3e9, 25)), noise=0.003, seed=1)
    found = fit(
        tmp_path / "a", "--runs", written(tmp_path / "a.csv", ladder), "--law", "chinchilla", "--bootstrap", "50"
    )
    assert found["verdict"].startswith("REFUSE: all runs have about 20 tokens a parameter")
    assert found["condition"] is None or found["condition"] > 1e4
    spread = draw(
        load_law("chinchilla"), BESIROGLU, ladder_table(np.geomspace(3e7, 3e9, 5), (5, 10, 20, 80, 160)), seed=1
    )
    found = fit(
        tmp_path / "b", "--runs", written(tmp_path / "b.csv", spread), "--law", "chinchilla", "--bootstrap", "50"
    )
    assert not found["verdict"].startswith("REFUSE") and found["condition"] < 300


def test_t9_losses_that_rise_with_size_are_refused(tmp_path):
    """The shape of a study on one card: 5M to 600M parameters on 2M to 100M tokens, labelled by precision and width."""
    rng, rows = np.random.default_rng(0), []
    for N in (5e6, 1e7, 2.5e7, 7.5e7, 2.8e8, 6e8):
        for D in (2e6, 1e7, 1e8):
            for name in ("bf16", "fp8", "nvfp4"):
                loss = 6.9 - 0.35 * np.log(D / 2e6) + 0.08 * np.log(N / 5e6) + rng.normal(0, 0.01)
                rows.append((f"{name}_{N:.0f}_{D:.0f}", N, D, f"{name}_{N:.0f}", loss))
    pd.DataFrame(rows, columns=["name", "params", "tokens", "tag", "val_loss"]).to_csv(tmp_path / "r.csv", index=False)
    found = fit(tmp_path, "--runs", str(tmp_path / "r.csv"), "--law", "chinchilla", "--bootstrap", "50")
    assert found["verdict"].startswith("REFUSE: ") and "rises with N" in found["verdict"]


class TestPublishedSmallRuns:
    def test_t9_runs_of_two_minutes_are_refused(self, tmp_path):
        source = str(table("infatoshi_nvfp4_smallruns.csv"))
        found = fit(tmp_path, "--runs", source, "--law", "chinchilla")
        assert found["verdict"].startswith("REFUSE: ") and "rises with N" in found["verdict"]
        fit(tmp_path, "--runs", source, "--law", "chinchilla", "--strict", code=3)


# ---- T10: whole curves


def curves(path: Path) -> str:
    """Three schedules of the learning rate, their curves drawn from the annealing law."""
    step, rows = np.arange(1, 2001), []
    warm, done = np.minimum(step / 100, 1), step / 2000
    for name, lr in (("cosine", 0.55 + 0.45 * np.cos(np.pi * done)), ("constant", np.ones(2000)),
                     ("wsd", np.where(done > 0.8, 1 - 4.5 * (done - 0.8), 1.0))):  # fmt: skip
        frame = pd.DataFrame({"size_M": 100, "schedule": name, "step": step, "lr": 1e-3 * warm * lr, "loss": 3.0})
        rows.append(frame[99::10])
    pd.concat(rows).to_csv(path, index=False)
    law = load_law("annealing")
    expanded = law.law.expand(read([path]))
    points = draw(law, {"L0": 2.6, "A": 0.6, "C": 0.3, "alpha": 0.5}, expanded, noise=5e-4, seed=0).frame
    frame = points[["run", "step", "lr", "loss"]].assign(size_M=100)
    frame["schedule"] = frame["run"].str.partition("/")[2]
    frame.drop(columns="run").to_csv(path, index=False)
    return str(path)


def test_t10_a_law_of_curves_is_fitted_from_a_table_of_curves(tmp_path, capsys):
    source = curves(tmp_path / "curves.csv")
    found = fit(tmp_path, "--runs", source, "--law", "annealing", "--bootstrap", "20")
    assert found["params"]["L0"] == pytest.approx(2.6, abs=0.03) and found["params"]["C"] == pytest.approx(0.3, rel=0.1)
    assert found["data"]["runs"] == 3 and found["n"] > 300
    assert len(read([tmp_path / "runs.csv"])) == 3
    assert "3 runs" in capsys.readouterr().out


class TestPublishedCurves:
    def test_t10_unseen_schedules(self, tmp_path):
        """Three schedules of arXiv:2503.12811 at 100M parameters: residuals of the fit below .006 of the loss."""
        choice = ["--where", "N==1e8", "--law", "annealing", "--option", "memory=0.998", "--bootstrap", "0"]
        found = fit(tmp_path, "--runs", str(table("mpl_loss_curves.csv")), *choice)
        assert found["data"]["runs"] == 9 and found["rmse"] < 0.006


# ---- from drawn runs to a decision


def test_from_runs_to_a_decision(tmp_path, capsys):
    """ingest, fit, compare, advise, report: the speed-ups at which two formats pay are found within their intervals.

    Percentile intervals are of 95 %: with several numbers compared, one outside would be no surprise, so they are
    widened to three standard errors.
    """
    truth = {**BESIROGLU, "eff_N[nvfp4]": 0.74, "eff_N[mxfp4]": 0.62}
    runs = grid_table(np.geomspace(3e7, 5e8, 5), np.geomspace(1e9, 3e10, 5), ("bf16", "nvfp4", "mxfp4"), seed=0)
    runs = draw(load_law("efficiency"), truth, runs, noise=0.001, seed=11)
    spoilt = runs.frame.tail(1).assign(run="burst", loss=np.nan)  # one that diverged
    pd.concat([runs.frame, spoilt]).to_csv(tmp_path / "theirs.csv", index=False)
    source = str(tmp_path / "runs.csv")
    assert main(["ingest", "--runs", str(tmp_path / "theirs.csv"), "--out", source]) == 0
    assert "75 runs" in (said := capsys.readouterr().out) and "1 left out" in said and "burst" in said

    law = ["--law", "efficiency", "--bootstrap", "200"]
    found = fit(tmp_path / "fit", "--runs", source, *law)
    assert found["verdict"] == "OK"
    low, high = found["intervals"]["eff_N[nvfp4]"]
    assert abs(found["params"]["eff_N[nvfp4]"] - 0.74) < 3 / 3.9 * (high - low)

    laws = ["--laws", "efficiency,delta,chinchilla", "--holdout", "N", "--out", str(tmp_path / "compare")]
    assert main(["compare", "--runs", source, *laws]) == 0
    scores = json.loads((tmp_path / "compare" / "compare.json").read_text())["directions"]["N"]["scores"]
    error = {score["law"]: score["mae"] for score in scores}
    assert error["efficiency"] < 0.008 < error["chinchilla"]

    speed = ["--budget", "1e21", "--speedup", "nvfp4=1.5", "mxfp4=1.5"]
    assert main(["advise", "--runs", source, *law, *speed, "--out", str(tmp_path)]) == 0
    advice = json.loads((tmp_path / "advice.json").read_text())["advice"][0]
    assert advice["best"] == "nvfp4"  # 1.5 is above 1 / 0.74 = 1.35 and below 1 / 0.62 = 1.61
    rows = {row["precision"]: row for row in advice["precisions"]}
    for name, even in (("nvfp4", 1 / 0.74), ("mxfp4", 1 / 0.62)):
        row = rows[name]
        assert abs(row["break_even"] - even) < 3 / 3.9 * (row["break_even_high"] - row["break_even_low"]), name
        assert row["break_even_high"] - row["break_even_low"] < 0.1
    assert rows["nvfp4"]["loss"] < rows["bf16"]["loss"] < rows["mxfp4"]["loss"]

    page = ["--laws", "efficiency", "--bootstrap", "40", *speed, "--holdout", "N", "--out", str(tmp_path / "report")]
    assert main(["report", "--runs", source, *page]) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert "train nvfp4" in text and "burst" not in text  # it was left out by ingest, and runs.csv does not have it
    assert (tmp_path / "report" / "loss_compute.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report" / "efficiency" / "fit.json").read_text())["verdict"] == "OK"
