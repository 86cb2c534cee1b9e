"""lowprec-scaling: every command on made-up runs, what it writes, exit codes, sentences, and the tour of the docs."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lowprec.scaling.law import load_law
from lowprec.scaling.read import read
from lowprec.scaling.synth import draw, grid_table, ladder_table
from lowprec.tools import fit_scaling
from lowprec.tools.fit_scaling import main
from lowprec.tools.scaling_runs import passes, settings

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scaling-laws.md"
SURFACE = {"E": 1.69, "A": 406.0, "B": 2085.0, "alpha": 0.34, "beta": 0.37}
TRUTH = {**SURFACE, "eff_N[nvfp4]": 0.74, "eff_N[mxfp4]": 0.58}
SIZES, TOKENS = [3e7, 6e7, 1.2e8, 2.4e8, 4.8e8], [1e9, 2e9, 4e9, 8e9, 1.6e10]
CONTRACT = {
    "law", "params", "intervals", "objective", "verdict", "heldout", "pivoted", "pivots", "delta", "n", "rmse",
    "condition", "correlation", "at_bound", "spans", "reached", "level", "bootstraps", "dropped", "notes", "data",
    "versions", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> str:
    """75 runs in three precisions, two seeds of one cell; GMSE columns for laws that want to know what a format is."""
    more = {"gmse_w": {"bf16": 0.0, "nvfp4": 0.0087, "mxfp4": 0.0134}, "seed": 0}
    table = grid_table(SIZES, TOKENS, ("bf16", "nvfp4", "mxfp4"), **more, gmse_a=0.0)
    table = draw(load_law("efficiency"), TRUTH, table, noise=0.0005, seed=1)
    again = table.frame[(table.frame["N"] == SIZES[0]) & (table.frame["D"] == TOKENS[0])]
    again = again.assign(seed=1, run=again["run"] + "b", loss=again["loss"] + [0.001, -0.001, 0.0005])
    path = tmp_path_factory.mktemp("made") / "made.csv"
    pd.concat([table.frame, again]).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def trap(tmp_path_factory) -> str:
    """25 runs at 20 tokens a parameter."""
    path = tmp_path_factory.mktemp("trap") / "trap.csv"
    draw(load_law("chinchilla"), SURFACE, ladder_table(np.geomspace(2e7, 2e9, 25)), seed=2).to_csv(path)
    return str(path)


def strict(path: Path) -> dict:
    """JSON without NaN and Infinity."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- ingest


def test_ingest_says_what_it_left_out_and_the_table_reads_back(tmp_path, capsys):
    rows = [
        {"name": f"r{i}", "params": 1e7 * (i + 1), "tokens": 1e9, "val_loss": 3 - 0.1 * i, "recipe": "bf16"}
        for i in range(4)
    ]
    rows[1]["val_loss"] = float("nan")
    rows.append({**rows[0], "name": "r0 again"})
    pd.DataFrame(rows).to_csv(tmp_path / "theirs.csv", index=False)
    out = tmp_path / "new" / "runs.csv"
    assert main(["ingest", "--runs", str(tmp_path / "theirs.csv"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 runs; N counts parameters without embeddings" in said and f"written: {out}" in said
    assert re.search(r"1 left out, .*: r1$", said, re.M) and re.search(r"1 left out, .*: r0 again$", said, re.M)
    assert "note: C = 6 N D for all runs" in said
    assert list(read([out]).frame["run"]) == ["r0", "r2", "r3"]


def test_ingest_with_a_column_map(tmp_path, capsys):
    pd.DataFrame({"size": [1e8, 2e8], "toks": [1e9, 1e9], "final": [3.0, 2.9]}).to_csv(tmp_path / "a.csv", index=False)
    names = ["--columns", "N=size", "D=toks", "--columns", "loss=final"]
    out = tmp_path / "o.csv"
    assert main(["ingest", "--runs", str(tmp_path / "a.csv"), *names, "--n-kind", "total", "--out", str(out)]) == 0
    assert "with embeddings" in capsys.readouterr().out and read([out]).n_kind == "total"


# ---- fit


def test_fit_writes_what_it_prints(runs, tmp_path, capsys):
    command = ["fit", "--runs", runs, "--law", "efficiency", "--bootstrap", "60", "--holdout", "N", "D", "--out"]
    assert main([*command, str(tmp_path / "f")]) == 0
    said, found = capsys.readouterr().out, strict(tmp_path / "f" / "fit.json")
    assert set(found) >= CONTRACT and found["law"] == "efficiency" and found["verdict"] == "OK"
    for name, value in TRUTH.items():
        low, high = found["intervals"][name]
        wide = high - low  # 60 refits: the ends of the interval are rough
        assert low - wide < value < high + wide and f"{found['params'][name]:.6g}" in said, name
    assert found["n"] == 78 and found["bootstraps"] == 60 and found["data"]["runs"] == 78 and found["dropped"] == []
    assert {"N", "D"} == set(found["heldout"]) and 0 < found["heldout"]["N"]["mae"] < 0.005
    assert found["command"] == shlex.join(["lowprec-scaling", *command, str(tmp_path / "f")])
    assert found["data"]["fingerprint"] == read([tmp_path / "f" / "runs.csv"]).fingerprint()
    assert (
        "verdict: OK" in said and "60 refits of resampled cells" in said and "Best in direction N: efficiency" in said
    )


def test_the_same_command_gives_the_same_file(runs, tmp_path):
    for name in ("a", "b"):
        workers = ["--workers", "2"] if name == "b" else []
        assert main(["fit", "--runs", runs, "--law", "efficiency", "--bootstrap", "20", "--seed", "3", *workers,
                     "--out", str(tmp_path / name)]) == 0  # fmt: skip
    a, b = (strict(tmp_path / name / "fit.json") for name in ("a", "b"))
    for key in ("seconds", "command"):
        del a[key], b[key]
    assert a == b


def test_runs_are_chosen_in_the_order_of_the_docs_and_listed(runs, tmp_path, capsys):
    choice = ["--precision", "bf16", "nvfp4", "--where", "D/N>=10", "N<4e8", "--drop-highest", "2"]
    assert (
        main(["fit", "--runs", runs, *choice, "--law", "efficiency", "--bootstrap", "0", "--out", str(tmp_path)]) == 0
    )
    said, found = capsys.readouterr().out, strict(tmp_path / "fit.json")
    table = read([tmp_path / "runs.csv"])
    assert set(table.column("precision")) == {"bf16", "nvfp4"} and (table.column("D") >= 10 * table.column("N")).all()
    assert table.column("N").max() < 4e8 and len(table) + len(found["dropped"]) == 78
    reasons = [gone["reason"] for gone in found["dropped"]]
    assert reasons.count("not in bf16, nvfp4 (--precision)") == 26 and reasons.count("not D/N>=10 (--where)") > 0
    assert sum("2 highest losses" in reason for reason in reasons) == 2
    assert "26 left out, not in bf16, nvfp4 (--precision): " in said
    assert found["intervals"] == {} and found["heldout"] is None and "no intervals" in said


def test_options_of_a_law_and_held_parameters(runs, tmp_path, capsys):
    fixed = [
        "--option",
        "gamma=free",
        "eff_D=precision",
        "--fix",
        "gamma=1",
        "E=1.69",
        "eff_D[nvfp4]=1",
        "eff_D[mxfp4]=1",
    ]
    command = ["fit", "--runs", runs, "--law", "efficiency", *fixed, "--delta", "inf", "--bootstrap", "0"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    found = strict(tmp_path / "fit.json")
    assert found["params"]["E"] == 1.69 and found["params"]["gamma"] == 1 and found["delta"] is None  # inf is not JSON
    assert set(found["fixed"]) == {"gamma", "E", "eff_D[nvfp4]", "eff_D[mxfp4]"}
    assert found["params"]["eff_N[nvfp4]"] == pytest.approx(0.74, abs=0.01)
    assert re.search(r"^gamma +1 +held", capsys.readouterr().out, re.M)


def test_held_out_runs_are_predicted_by_the_same_law(runs, tmp_path):
    """--fix and --delta hold in the held-out test too: with a wrong E, larger models are predicted worse."""
    command = [
        "fit",
        "--runs",
        runs,
        "--precision",
        "bf16",
        "--law",
        "chinchilla",
        "--bootstrap",
        "0",
        "--holdout",
        "N",
    ]
    for name, more in (("free", []), ("wrong", ["--fix", "E=0.5"]), ("robust", ["--delta", "1e-5"])):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
    free, wrong, robust = (
        strict(tmp_path / name / "fit.json")["heldout"]["N"]["mae"] for name in ("free", "wrong", "robust")
    )
    assert wrong > 3 * free and robust != free


def test_a_refusal_is_a_result_unless_strict(runs, trap, tmp_path, capsys):
    """T9 at the command line: all runs at one ratio; and one curve through several precisions."""
    for source, why in ((trap, "one variable"), (runs, "precision")):
        command = ["fit", "--runs", source, "--law", "chinchilla", "--bootstrap", "20", "--out", str(tmp_path / "f")]
        assert main(command) == 0
        verdict = strict(tmp_path / "f" / "fit.json")["verdict"]
        assert verdict.startswith("REFUSE: ") and why in verdict
        assert "verdict: REFUSE" in capsys.readouterr().out
        assert main([*command, "--strict"]) == 3


def test_progress_goes_to_stderr_and_only_if_wanted(runs, capsys):
    command = ["fit", "--runs", runs, "--precision", "bf16", "--law", "chinchilla", "--bootstrap", "60"]
    assert main(command) == 0 and capsys.readouterr().err == ""
    assert main([*command, "--progress"]) == 0
    assert "chinchilla: bootstrap 60/60\n" in capsys.readouterr().err


# ---- compare


def test_compare_ranks_and_prints_gaps_and_noise(runs, tmp_path, capsys):
    command = ["compare", "--runs", runs, "--laws", "chinchilla,efficiency", "capacity", "--holdout", "N", "precision"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    said, found = capsys.readouterr().out, strict(tmp_path / "compare.json")["directions"]
    assert found["N"]["winner"] == "efficiency" and [s["law"] for s in found["N"]["scores"]][-1] == "chinchilla"
    assert found["precision"]["winner"] == "capacity" and "efficiency: cannot predict this" in said
    held = pd.read_csv(tmp_path / "heldout_N.csv")
    mine = held[held["law"] == "efficiency"]
    assert np.abs(mine["predicted"] - mine["measured"]).mean() == pytest.approx(found["N"]["scores"][0]["mae"])
    assert "nvfp4 - bf16: +" in said and "seed noise 0.0" in said and "degrees of freedom" in said


def test_compare_says_by_its_code_that_no_law_could_be_scored(runs, capsys):
    assert main(["compare", "--runs", runs, "--laws", "chinchilla", "--holdout", "precision"]) == 1
    assert "No law could be scored" in capsys.readouterr().out


# ---- advise


def test_advice_recovers_the_break_even_speed_up(runs, tmp_path, capsys):
    command = ["advise", "--runs", runs, "--law", "efficiency", "--budget", "1e20", "1e21", "--bootstrap", "60"]
    more = ["--speedup", "nvfp4=1.5", "mxfp4=1.5", "--iso-loss", "2.4", "--iso-flop", "--late-switch", "mxfp4"]
    assert main([*command, *more, "--out", str(tmp_path)]) == 0
    said, found = capsys.readouterr().out, strict(tmp_path / "advice.json")
    assert found["verdict"] == "OK" and [a["best"] for a in found["advice"]] == ["nvfp4", "nvfp4"]
    for answer in found["advice"]:
        rows = {row["precision"]: row for row in answer["precisions"]}
        for name, eff in (("nvfp4", 0.74), ("mxfp4", 0.58)):
            wide = rows[name]["break_even_high"] - rows[name]["break_even_low"]
            assert rows[name]["break_even_low"] - wide < 1 / eff < rows[name]["break_even_high"] + wide
        assert rows["bf16"]["loss"] < rows["mxfp4"]["loss"] and rows["nvfp4"]["p_better"] == 1
    assert said.count("the smallest loss is that of nvfp4, in 100% of the refits") == 2
    assert "Loss along each budget" in said and "The smallest budget that reaches a loss" in said
    assert "the last share of them in bf16" in said and "No run of the table switched" in said


def test_advice_for_a_format_without_runs_and_a_small_memory(runs, capsys):
    command = ["advise", "--runs", runs, "--law", "capacity", "--budget", "1e21", "--bootstrap", "0", "--speedup"]
    more = ["better=2", "--format", "better", "gmse_w=0.002", "gmse_a=0", "--max-params", "bf16=1e9", "better=5e8"]
    assert main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^better +2 +500M ", said, re.M) and "better: N is the largest allowed" in said


def test_no_advice_from_a_refused_fit(trap, capsys):
    command = ["advise", "--runs", trap, "--law", "chinchilla", "--budget", "1e21", "--bootstrap", "20"]
    assert main(command) == 3
    said = capsys.readouterr()
    assert said.err.startswith("lowprec-scaling: no advice from this fit (REFUSE: ") and said.err.count("\n") == 1
    assert main([*command, "--force"]) == 0
    said = capsys.readouterr().out
    assert "verdict: REFUSE" in said and "With 1e+21 FLOP" in said


# ---- design


def test_a_first_ladder(tmp_path, capsys):
    out = tmp_path / "ladder.csv"
    assert main(["design", "--budget", "1e19", "--precision", "bf16", "nvfp4", "--out", str(out)]) == 0
    ladder = pd.read_csv(out)
    assert set(ladder["precision"]) == {"bf16", "nvfp4"} and ladder["C"].sum() <= 1e19 * 1.001
    assert (ladder["D"] / ladder["N"]).max() > 4 * (ladder["D"] / ladder["N"]).min()
    assert "each in bf16, nvfp4" in capsys.readouterr().out


def test_design_leaves_the_trap_and_sharpens_what_was_asked(runs, trap, tmp_path, capsys):
    out = tmp_path / "next.csv"
    command = ["design", "--runs", trap, "--law", "chinchilla", "--budget", "1e20", "--target", "N=1e9,D=1e12"]
    assert main([*command, "--ratios", "5", "20", "80", "--out", str(out)]) == 0
    assert set((pd.read_csv(out)["ratio"]).round()) & {5, 80}
    assert "loss of bf16 at N = 1e+09, D = 1e+12" in capsys.readouterr().out
    command = ["design", "--runs", runs, "--law", "efficiency", "--budget", "1e20", "--for"]
    assert main([*command, "break-even", "--target", "precision=nvfp4", "C=1e21"]) == 0
    low, high, then_low, then_high = map(float, re.search(
        r"break-even speed-up of nvfp4: [\d.]+, 95% interval ([\d.]+) to ([\d.]+) now, about ([\d.]+) to ([\d.]+)",
        capsys.readouterr().out,
    ).groups())  # fmt: skip
    assert then_high - then_low < high - low
    assert main([*command, "gap", "--target", "precision=mxfp4"]) == 0
    assert "gap of mxfp4 to bf16 at N = " in capsys.readouterr().out


# ---- report


def test_report_has_everything_and_fit_json_of_every_law(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lowprec.scaling.draw.save", lambda figure, stem: "<svg></svg>")  # drawing has tests of its own
    command = ["report", "--runs", runs, "--where", "D<1e10", "--laws", "chinchilla,efficiency", "--bootstrap", "30"]
    more = ["--budget", "1e21", "--speedup", "nvfp4=1.5", "--next", "1e19", "--title", "Made up", "--holdout", "N"]
    assert main([*command, *more, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    for text in ("Made up", "REFUSE", "nvfp4", "With 1e+21 FLOP", "break-even speed-up of nvfp4", "Direction N"):
        assert text in page, text
    assert shlex.join(["lowprec-scaling", *command[:3]]) in page
    assert strict(tmp_path / "chinchilla" / "fit.json")["verdict"].startswith("REFUSE")
    assert strict(tmp_path / "efficiency" / "fit.json")["verdict"] == "OK"
    assert f"written: {tmp_path / 'index.html'}" in capsys.readouterr().out


def test_report_of_a_law_that_predicts_no_loss(tmp_path, capsys, monkeypatch):
    """Tables of post-training gaps have no losses: nothing to hold out by, and a page all the same."""
    monkeypatch.setattr("lowprec.scaling.draw.save", lambda figure, stem: "<svg></svg>")
    law = load_law("qid")
    table = grid_table([1e8, 4e8, 1e9, 4e9], [1e10, 5e10, 2e11], ("3", "4", "5"), bits_post={"3": 3, "4": 4, "5": 5})
    draw(law, law.published["ouyang"]["values"], table, noise=0.001).to_csv(tmp_path / "q.csv")
    command = ["--runs", str(tmp_path / "q.csv"), "--laws", "qid", "--bootstrap", "20", "--out", str(tmp_path / "page")]
    assert main(["report", *command]) == 0
    assert "qid" in (tmp_path / "page" / "index.html").read_text() and "Direction" not in capsys.readouterr().out


# ---- sentences


@pytest.mark.parametrize("test, kept", [
    ("N<6e7", [0]), ("N <= 6e7", [0, 1]), ("D/N>=20", [0, 2]), ("data==c4", [0, 1]), ("data!='c4'", [2]),
    ("seed=1", [1, 2]),
])  # fmt: skip
def test_tests_of_where(test, kept):
    table = grid_table([3e7, 6e7, 1.2e8], [1e9])
    table.frame["D"] = [1e9, 1e9, 4e9]
    table.frame["data"], table.frame["seed"] = ["c4", "c4", "pile"], [0, 1, 1]
    assert list(np.flatnonzero(passes(table, test))) == kept


@pytest.mark.parametrize("command, sentence", [
    ("fit --runs {no}.csv --law chinchilla", "{no}.csv is not there"),
    ("fit --runs {runs} --law chinchila", "there is no law 'chinchila'"),
    ("fit --runs {runs} --law kumar", "has no column 'bits_w'"),
    ("{fit} --precision fp8", "--precision fp8: no run has it; there are bf16, mxfp4, nvfp4"),
    ("{fit} --where N~3", "--where 'N~3': give COLUMN"),
    ("{fit} --where N<big", "'big' is not a number"),
    ("{fit} --where precision<3", "precision is a label"),
    ("{fit} --where depth<3", "no column 'depth'"),
    ("{fit} --where N<1", "no run is left: 78 left out, not N<1 (--where)"),
    ("{fit} --drop-highest 99", "--drop-highest 99: the table has 78 runs"),
    ("{fit} --fix E", "--fix E: give NAME=VALUE"),
    ("{fit} --fix E=low", "--fix E=low: 'low' is not a number"),
    ("{fit} --fix F=1", "has no parameter 'F'"),
    ("{fit} --option colour=red", "has no option 'colour'"),
    ("{fit} --columns weight=N", "weight"),
    ("{fit} --where N/precision>3", "precision is a label, not a number"),
    ("{fit} --fix E=-1", "E is held at -1"),
    ("fit --runs {runs} --law efficiency --option eff_N=[1,2]", "law efficiency cannot take that"),
    ("{advise} --reference frog", "no run is in frog"),
    ("{advise} --max-params nan", "the largest size must be positive"),
    ("advise --runs {runs} --law capacity --bootstrap 0 --budget 1e21 --force --format mx6 gmse_w=4e-4",
     "--format mx6 needs gmse_a=VALUE too"),
    ("design --runs {runs} --law efficiency --budget 1e20 --target N=-1,D=1e9", "--target N=-1: give a positive"),
    ("fit --runs {runs} --law efficiency --bootstrap 0 --holdout size", "--holdout size: a direction is one of"),
    ("compare --runs {runs} --laws chinchilla,chinchilla --holdout N", "--laws chinchilla is given twice"),
    ("compare --runs {runs} --laws , --holdout N", "--laws: give at least one law"),
    ("{advise} --speedup fp8=2", "--speedup fp8: there is no such"),
    ("{advise} --late-switch nvfp4", "needs its --speedup"),
    ("{advise} --late-switch bf16", "other than the reference"),
    ("{advise} --max-params many", "--max-params many: give a number"),
    ("{advise} --max-params fp8=1e9", "fp8"),
    ("design --runs {runs} --budget 1e20", "design from --runs needs --law"),
    ("design --runs {runs} --law efficiency --budget 1e20 --target N=1e9", "--target needs both N and D"),
    ("design --runs {runs} --law efficiency --budget 1e20 --for gap", "needs --target precision=LABEL"),
    ("design --runs {runs} --law efficiency --budget 1e20 --target tokens=3", "--target tokens: for loss it can have"),
    ("report --runs {runs} --laws nope --out {no}", "there is no law 'nope'"),
])  # fmt: skip
def test_mistakes_get_one_sentence(runs, tmp_path, capsys, command, sentence):
    paths = {"runs": runs, "no": str(tmp_path / "no")}
    short = {"{fit}": "fit --runs {runs} --law chinchilla",
             "{advise}": "advise --runs {runs} --law efficiency --bootstrap 0 --budget 1e21"}  # fmt: skip
    for name, text in short.items():
        command = command.replace(name, text)
    assert main([part.format(**paths) for part in command.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowprec-scaling: ") and said.count("\n") == 1
    assert sentence.format(**paths) in said


@pytest.mark.parametrize("command", ["", "fit", "fit --runs a.csv", "fit --runs a --law b --delta -1",
                                     "advise --runs a --law b --budget x", "design --budget 1 --most 1.5"])  # fmt: skip
def test_wrong_options_are_explained(capsys, command):
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_settings():
    assert settings(["N=a=b"], "--columns") == {"N": "a=b"} and settings(["x=1e3"], "--fix", number=True) == {
        "x": 1000.0
    }
    with pytest.raises(ValueError, match="--fix x is given twice"):
        settings(["x=1", "x=2"], "--fix", number=True)


# ---- help and docs


def test_every_example_of_the_help_parses():
    for name, text in fit_scaling.EXAMPLES.items():
        lines = [line for line in text.replace("\\\n", " ").splitlines() if "lowprec-scaling" in line]
        assert lines
        for line in lines:
            words = shlex.split(line, comments=True)
            assert words[:2] == ["lowprec-scaling", name]
            fit_scaling.parser().parse_args(words[1:])


def test_the_tour_of_the_docs(tmp_path, monkeypatch, capsys):
    """Its Python makes the runs, its commands run (with fewer refits, and without the page), and say what it says."""
    monkeypatch.chdir(tmp_path)
    tour = DOCS.read_text().partition("## Five minutes")[2].partition("\n## ")[0]
    exec(re.search(r"```python\n(.*?)```", tour, re.S)[1], {})
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", tour, re.S) for line in block.splitlines()
    ]
    assert [words[1] for words in commands] == ["fit", "fit", "compare", "advise", "design", "report"]
    said = []
    for words in commands[:-1]:
        fewer = ["--bootstrap", "40"] if words[1] in ("fit", "advise") else []
        assert main([*words[1:], *fewer]) == 0
        said.append(capsys.readouterr().out)
    fit_scaling.parser().parse_args(commands[-1][1:])
    assert "verdict: REFUSE" in said[0] and "verdict: OK" in said[1]
    shown = re.findall(r"^((?:E|A|B|alpha|beta|eff_N\[\w+\]) +[\d.]+)", tour, re.M)
    assert len(shown) == 7 and all(line in said[1] for line in shown)
    assert "the smallest loss is that of nvfp4" in said[3] and "1.35" in said[3] and "1.72" in said[3]


def test_the_docs_name_every_law():
    table = DOCS.read_text().partition("## Choosing a law")[2].partition("\n## ")[0]
    shipped = {path.stem for path in (DOCS.parents[1] / "recipes" / "law").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == shipped
