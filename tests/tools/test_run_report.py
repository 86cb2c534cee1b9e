"""The report: what a run folder holds is on one page that needs nothing else; what it does not hold is said."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowprec.tools import run_figures, run_read, run_report
from lowprec.train import sinks_heat as heat

EVIL = "<script>alert(1)</script>"


def layer(x: float) -> dict[str, Any]:
    """A layer's entry of a probe, all measures x or near it."""
    operand = dict.fromkeys(("sqnr_db", "bias", "underflow_frac", "saturation_frac", "amax", "kurtosis"), x)
    operand |= {"max_over_mean": x, "scale_log2": {"zero": 0.25, "-3": 0.5, "2": 0.25}}
    out = {"sqnr_db": x, "bias": x, "cosine": x}
    gemms = {gemm: {a: operand, b: operand, "out": out} for gemm, (a, b) in
             {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}.items()}  # fmt: skip
    error = {"R": x, "A": 0.0, "B": x, "C": -x, "gain": None}
    weight = {"oscillation": x, "edq": x, "edq_bf16": 1.0, "lost_frac": x}
    return {"gemms": gemms, "gradient": {"cosine": x}, "error": error, "weight": weight}


def probe(step: int, blocks: int = 3) -> dict[str, Any]:
    names = [f"layers.{i}.{kind}" for i in range(blocks) for kind in ("attn.q_proj", "mlp.up_proj")]
    layers = {name: layer((i + 1) / 10 + step / 1000) for i, name in enumerate(names)}
    return {"step": step, "tokens": step * 8, "seconds": 0.5, "layers": layers, "attempt": 1}


def made(folder: Path, steps: int = 30, probes: int = 2, lr: float = 0.1) -> Path:
    """A run folder as the trainer writes it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\ntrain: {{steps: 40}}\noptim: {{lr: {lr}}}\n")
    (folder / "facts.json").write_text(json.dumps({"parameters": {"total": 1234567, "non_embedding": 1000000}}))
    (folder / "plan.txt").write_text("layer  shape\nlayers.0  (4, 4) & more\n")
    (folder / "exit_code").write_text("75\n")
    records: list[dict[str, Any]] = [
        {"step": i, "tokens": 8 * i, "loss": 5 - i / 10, "lr": lr, "grad_norm": 1.0, "tokens_per_s": 9.0,
         "step_s": 0.5, "data_s": 0.0, "mem_bytes": 2**30, "plan": "a" if i < 9 else "b", "attempt": 1}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    for record in records[9::10]:
        record |= {"val_loss": record["loss"] + 0.1, "val_loss_high_precision": record["loss"] + 0.05}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if probes:
        lines = [json.dumps(probe(10 * (i + 1))) + "\n" for i in range(probes)]
        (folder / "probes.jsonl").write_text("".join(lines))
    event = {"step": 9, "what": f"spike {EVIL}", "action": "rollback", "attempt": 1, "loss": "7"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section is there, text is escaped, and nothing is fetched from anywhere."""
    folder = made(tmp_path / "run")
    assert run_report.main([str(folder)]) == 0
    assert "running, stopped or killed" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    for part in ("overview", "curves", "probe", "events", "plan", "settings"):
        assert f'<section id="{part}">' in text
    for sheet in heat.SHEETS:
        assert html.escape(sheet.title) in text and f'id="{sheet.name}-time"' in text
    assert 'id="scales"' in text and text.count("<svg ") == 2 + 2 * len(heat.SHEETS) + 1
    assert "1.23M" in text and "step 30" in text and "(4, 4) &amp; more" in text and "rollback" in text
    assert EVIL not in text and html.escape(EVIL) in text
    linked = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert linked and all(re.match(r"#|data:image/|https://arxiv\.org/abs/", link) for link in linked)
    assert re.findall(r"<(?:link|script|img|iframe)\b[^>]*>", text) == ["<script>"]


def test_a_killed_run_with_torn_lines_and_holes(tmp_path: Path) -> None:
    """What is torn or not there is said, and the rest is shown."""
    folder = made(tmp_path / "torn", probes=1)
    for name in ("metrics.jsonl", "probes.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 31, "layers": {"la')
    for name in ("facts.json", "exit_code"):
        (folder / name).unlink()
    (folder / "config.yaml").write_text("a: [b")
    run = run_read.read_run(folder)
    assert len(run.records) == 30 and len(run.probes) == 1 and len(run.events) == 1
    said = " ".join(run.notes)
    for name in ("metrics.jsonl", "probes.jsonl", "events.jsonl"):
        assert f"The last line of {name} is torn" in said
    assert "facts.json is not there" in said and "config.yaml is damaged" in said
    page = run_report.overview([run]) + run_report.events(run)
    assert "none was written" in page and "torn" in page


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """Only its settings are there: a page all the same."""
    (tmp_path / "config.yaml").write_text("name: new\n")
    assert run_report.main([str(tmp_path), "--out", str(tmp_path / "new.html")]) == 0
    text = (tmp_path / "new.html").read_text()
    assert "no step was logged yet" in text and "metrics.jsonl is not there" in text and "No probe was made" in text


def test_states(tmp_path: Path) -> None:
    """By exit code and steps done."""
    folder = made(tmp_path / "run", probes=0)
    for code, state in (("0", "cancelled"), ("70", "diverged"), ("74", "ended"), ("1", "failed"), ("75", "running")):
        (folder / "exit_code").write_text(f"{code}\n")
        assert run_read.read_run(folder).state.startswith(state)
    (folder / "config.yaml").write_text("train: {steps: 30}\n")
    (folder / "exit_code").write_text("0\n")
    assert run_read.read_run(folder).state == "finished"


def test_several_runs(tmp_path: Path) -> None:
    """Curves are overlaid, settings that differ are listed, runs of one name are told apart."""
    paths = [made(tmp_path / "a" / "run", probes=0), made(tmp_path / "b" / "run", probes=0, lr=0.2)]
    runs = run_report.named(run_read.read_run(path) for path in paths)
    assert [run.name for run in runs] == [str(path) for path in paths]
    assert run_read.differences(runs) == [("optim.lr", [0.1, 0.2])]
    out = tmp_path / "both.html"
    assert run_report.main([*map(str, paths), "--out", str(out)]) == 0
    text = out.read_text()
    assert 'id="differences"' in text and "optim.lr" in text and 'id="r1-events"' in text
    (axes,) = run_figures.loss(runs).figure.axes  # type: ignore[union-attr]
    assert len({line.get_color() for line in axes.lines}) >= 2


def test_what_is_no_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "runs" / "one", probes=0)
    for path, why in ((tmp_path / "gone", "is not a folder"), (tmp_path / "runs", "did you mean")):
        assert run_report.main([str(path)]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1
    assert run_report.main([str(tmp_path / "runs" / "one"), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_many_probes_and_long_curves_are_thinned(tmp_path: Path) -> None:
    """The first and the newest probe stay; so does every spike of a curve."""
    folder = made(tmp_path / "run", probes=0)
    lines = [{"step": i, "layers": {"layers.0.x": {}}} for i in range(1, 1001)]
    (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_read.read_run(folder)
    steps = [line["step"] for line in run.probes]
    assert len(steps) <= run_read.MOST_PROBES + 1 and (steps[0], steps[-1], run.probe_count) == (1, 1000, 1000)
    y = np.zeros(100_000)
    y[[777, 50_000]] = 5.0, -5.0
    x, thin = run_figures.thinned(np.arange(100_000.0), y)
    assert len(thin) <= 2 * run_figures.BUCKETS + 2 and (np.diff(x) > 0).all()
    assert thin.max() == 5.0 and thin.min() == -5.0 and x[-1] == 99_999


def test_heat_maps_show_layer_by_role() -> None:
    """Rows are kinds of layers, columns blocks; a layer outside the blocks stands last; missing is NaN."""
    layers = probe(10)["layers"] | {"lm_head": layer(9.0)}
    del layers["layers.1.mlp.up_proj"]["gradient"]
    values, kinds, blocks = heat.grid(layers, ("gradient", "cosine"))
    assert kinds == ["attn.q_proj", "mlp.up_proj", "lm_head"] and blocks == [0, 1, 2]
    expected = [[0.11, 0.31, 0.51, np.nan], [0.21, np.nan, 0.61, np.nan], [np.nan, np.nan, np.nan, 9.0]]
    np.testing.assert_allclose(values, expected)
    assert heat.by_kind(layers)[:3] == [f"layers.{i}.attn.q_proj" for i in range(3)]
    figure = heat.now(heat.SHEETS[0], layers)
    assert figure is not None
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert {"fprop x", "dgrad dy", "wgrad out"} <= set(titles)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[0, 0], 0.11)
    assert heat.now(heat.SHEETS[0], {"layers.0.x": {}}) is None


def test_the_page_of_a_copy_is_the_same(tmp_path: Path) -> None:
    """The page depends on the folder's contents, not on where the run was."""
    first = made(tmp_path / "one" / "run", probes=0)
    second = tmp_path / "two" / "run"
    shutil.copytree(first, second)
    texts = []
    for folder in (first, second):
        run = run_read.read_run(folder)
        run.path, run.age_s = Path("run"), 1.0
        texts.append(re.sub(r"Written by[^<]*", "", run_report.report([run])))
    assert texts[0] == texts[1]
