"""Figures: what is drawn is what the table and the law say, colours and names are fixed, and bytes do not change."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from lowprec.scaling import curves, draw, plots, plots_precision, plots_trust
from lowprec.scaling import gaps as gaps_of
from lowprec.scaling.compare import compare
from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.synth import draw as draw_runs
from lowprec.scaling.synth import grid_table, pairs_table
from lowprec.scaling.table import RunTable
from lowprec.scaling.uncertainty import bootstrap

N, D = (5e7, 1e8, 2e8, 4e8), (1e9, 2e9, 4e9, 8e9)
SURFACE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.366}
BITS = {"bf16": 16, "nvfp4": 4.5, "fp8": 8}


@pytest.fixture(scope="module")
def table() -> RunTable:
    """Four sizes by four durations in three precisions and two seeds."""
    law, values = load_law("efficiency"), SURFACE | {"eff_N[nvfp4]": 0.74, "eff_N[fp8]": 0.97}
    grid = grid_table(N, D, ("bf16", "nvfp4", "fp8"), bits_w=BITS, seed=0.0)
    again = RunTable(grid.frame.assign(seed=1.0, run=grid.frame["run"] + "b"))
    return draw_runs(law, values, RunTable(pd.concat([grid.frame, again.frame], ignore_index=True)), 0.002)


@pytest.fixture(scope="module")
def fitted(table):
    return fit(load_law("efficiency"), table)


@pytest.fixture(scope="module")
def boot(fitted):
    return bootstrap(fitted, 40)


@pytest.fixture(scope="module")
def lines(fitted, boot):
    return curves.lines(fitted, boot)


@pytest.fixture(autouse=True)
def style():
    with draw.styled():
        yield


def dots(axes) -> int:
    """Markers without a line: the runs."""
    return sum(len(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None")


def test_counts_read_like_sizes():
    assert [draw.count(v) for v in (30482560, 999.7e6, 1.25e9, 3e12, 2.4e18, 512, 0.05)] == [
        "30.5M", "1B", "1.25B", "3T", "2.4e18", "512", "0.05"
    ]  # fmt: skip


@pytest.mark.parametrize("low, high", [(1e6, 3e6), (2.6e7, 4.6e8), (1e17, 1e23), (95, 104), (1, 1e12)])
def test_log_ticks_are_few_and_inside(low, high):
    ticks = draw.log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_bf16_is_black_and_every_precision_has_its_own_colour(table):
    colours = draw.colours(table)
    assert colours["bf16"] == draw.INK
    assert next(iter(colours)) == "bf16"
    assert len(set(colours.values())) == 3


def test_many_sizes_become_groups_and_keep_their_order():
    sizes = np.geomspace(1e7, 1e9, 40)
    table = grid_table(sizes, (1e9,))
    group, texts = draw.size_groups(table)
    assert len(texts) == 8 and (np.diff(group) >= 0).all() and set(group) == set(range(8))
    part = table.where(sizes > 3e8)
    assert (draw.groups_of(part, table) == group[sizes > 3e8]).all()


def test_sizes_that_differ_by_rounding_are_one():
    group, texts = draw.size_groups(grid_table((1e8, 1.01e8, 2e8), (1e9,)))
    assert list(group) == [0, 0, 1] and len(texts) == 2


def test_every_run_is_a_dot(lines, table):
    drawing = plots.loss_compute(lines)
    assert dots(drawing.figure.axes[0]) == len(table)
    panels = [axes for axes in plots.loss_tokens(lines).figure.axes if axes.get_visible()]
    assert [dots(axes) for axes in panels] == [len(table) // 3] * 3
    assert sum(dots(axes) for axes in plots_trust.residuals(lines.fit).figure.axes) == 4 * len(table)


def test_the_frontier_is_the_lowest_loss_of_a_budget(lines):
    axes = plots.loss_compute(lines).figure.axes[0]
    line = next(
        a for a in axes.lines if a.get_linestyle() == "-" and a.get_color() == draw.colours(lines.table)["nvfp4"]
    )
    sizes = np.geomspace(1e7, 1e10, 4001)
    for C, loss in list(zip(*line.get_data()))[::20]:
        assert loss == pytest.approx(lines.surface.loss(sizes, C / 6 / sizes, "nvfp4").min(), abs=2e-5)


def test_isoflop_levels_are_found_in_the_runs_and_minima_are_marked(lines):
    levels = curves.flop_levels(lines.table, draw.of_precision(lines.table) == "bf16")
    assert [round(C / 6e17) for C, _ in levels] == [2, 4, 8]  # of 16 cells: 3, 4 and 3 sizes
    assert [len(set(lines.table.column("N")[members])) for _, members in levels] == [3, 4, 3]
    axes = plots.isoflop(lines).figure.axes[0]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert stars
    for star in stars:
        curve = next(a for a in axes.lines if a.get_color() == star.get_color() and a.get_linestyle() == ":")
        assert star.get_ydata()[0] == pytest.approx(curve.get_ydata().min(), abs=1e-4)


def test_budgets_that_differ_by_rounding_are_one_level():
    sizes = np.array([5e7, 1e8, 2e8, 4e8] * 2)
    C = np.repeat([1e18, 3e18], 4) * ([1, 1.03, 0.98, 1.01] * 2)
    table = pairs_table(sizes, C / (6 * sizes))
    levels = curves.flop_levels(table, np.ones(8, dtype=bool))
    assert [sorted(members) for _, members in levels] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not curves.flop_levels(grid_table((1e8, 2e8), (1e9, 2e9)), np.ones(4, dtype=bool))  # two sizes are no curve


def test_dots_and_lines_mean_the_same_compute(table):
    """Small models take more FLOP a parameter: dots are at k N D with the median k, which the axis then says."""
    assert curves.flop_label(table) == "training compute C (FLOP)"
    own = table.frame["C"] * np.where(table.frame["N"] < 1e8, 2.0, 1.0)
    odd = RunTable(table.frame.assign(C=own))
    assert np.allclose(curves.compute(odd), table.column("C"))
    assert curves.flop_label(odd) == "training compute C = 6 N D (FLOP)"


def test_without_levels_of_compute_the_curves_stand_alone(fitted, table):
    ladder = table.where((table.column("D") / table.column("N") == 20) | (table.column("N") < 1e8))
    drawing = plots.isoflop(curves.lines(fit(load_law("efficiency"), ladder)))
    assert "stand alone" in drawing.caption and dots(drawing.figure.axes[0]) <= 4


def test_break_even_is_the_inverse_of_the_efficiency(lines):
    """Of the search, which laws without efficiencies need, on a law whose answer is known."""
    C = np.geomspace(1e17, 1e23, 60)
    low, base = (lines.sampled.optimum(C, name, points=161).loss for name in ("nvfp4", "bf16"))
    found = plots_precision.break_even(C, low, base)
    eff = np.concatenate([[lines.fit.params["eff_N[nvfp4]"]], lines.sampled.boot.samples["eff_N[nvfp4]"]])
    inside = np.isfinite(found)
    assert inside[:, :50].all() and not inside[:, -1].any()
    assert np.allclose(found[:, :50], 1 / eff[:, None], rtol=2e-3)


def test_price_shows_one_line_a_precision_and_its_speed(lines):
    drawing = plots_precision.price(lines, {"nvfp4": 1.6})
    right = drawing.figure.axes[1]
    tint = draw.colours(lines.table)["nvfp4"]
    ours = [line for line in right.lines if to_hex(line.get_color()) == tint]
    assert sorted(line.get_linestyle() for line in ours) == ["-", "--"]
    solid = next(line for line in ours if line.get_linestyle() == "-")
    assert np.allclose(solid.get_ydata(), 1 / lines.fit.params["eff_N[nvfp4]"])


def test_what_cannot_be_drawn_says_why(table):
    chinchilla = curves.lines(fit(load_law("chinchilla"), table))
    assert "no term for precision" in plots_precision.price(chinchilla).caption
    assert [d.caption for d in plots_precision.efficiency(chinchilla, {})] == ["the law chinchilla fits none"]
    assert "no bootstrap" in plots_trust.extrapolation(chinchilla, None).caption
    assert "no bootstrap" in plots_trust.pairs(chinchilla.fit, None).caption
    refused = curves.lines(chinchilla.fit, doubt="the fit was refused")
    assert plots.isoflop(refused).figure is None
    left = plots.loss_compute(refused)
    assert "No line is drawn: the fit was refused" in left.caption
    assert all(line.get_linestyle() == "None" for line in left.figure.axes[0].lines)


def test_a_law_that_predicts_no_loss_still_has_residuals(table):
    law = load_law("chinchilla")
    odd = dataclasses.replace(law, law=type("Odd", (type(law.law),), {"response": "delta"})())
    fitted = fit(odd, RunTable(table.frame.assign(delta=table.column("loss"))))
    lines = curves.lines(fitted)
    assert "delta" in lines.doubt and plots.loss_compute(lines).figure is not None
    assert plots_trust.residuals(fitted).figure is not None


def test_gaps_are_drawn_with_their_noise(table):
    found = gaps_of.gaps(table)
    figure = plots_precision.paired_gaps(found, table).figure
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["fp8 − bf16", "nvfp4 − bf16"]
    for axes, name in zip(panels, ("fp8", "nvfp4")):
        heights = [y for box in axes.containers for y in box[0].get_ydata()]
        assert np.mean(heights) == pytest.approx(found.summary.loc[name, "mean"])
        assert len(heights) == 16 and all(box.has_yerr for box in axes.containers)


def test_held_out_runs_are_hollow(table):
    found = compare([load_law("efficiency"), load_law("chinchilla")], table, "N")
    left, right = plots_trust.held_out(found, table).figure.axes
    markers = [line for line in left.lines if line.get_marker() in draw.MARKERS]
    assert sum(len(line.get_xdata()) for line in markers) == found.scores[0].n
    assert all(line.get_markerfacecolor() == "none" for line in markers)
    assert [text.get_text() for text in right.get_yticklabels()] == ["efficiency", "chinchilla"]


def test_coefficients_say_values_and_intervals(fitted, boot):
    axes = plots_trust.coefficients(fitted, boot).figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["E", "A′", "B′", "alpha", "beta", "eff_N[fp8]", "eff_N[nvfp4]"]
    low, high = boot.intervals(pivoted=True)["alpha"]
    assert any(text.get_text().endswith(f"[{low:.3g}, {high:.3g}]") for text in axes.texts)


def test_the_profile_of_E_touches_one_at_the_fit(fitted, boot):
    axes = plots_trust.profile_E(fitted, boot, points=7).figure.axes[0]
    grid, worse = axes.lines[0].get_data()
    assert grid[0] < fitted.params["E"] < grid[-1]
    assert worse.min() >= 1 - 1e-6
    assert worse[0] > 1.2 and worse[-1] > 1.2


def test_files_are_the_same_bytes_every_time(lines, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw.save(plots.loss_compute(lines).figure, tmp_path / folder / "x")
    for name in ("x.svg", "x.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "x.svg").read_text()
    ET.fromstring(text)
    assert "<dc:date>" not in text


def test_the_svg_of_a_page_has_ids_of_its_own_and_colours_of_the_page(lines, tmp_path):
    svg = draw.save(plots.loss_compute(lines).figure, tmp_path / "x")
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids and len(ids) == len(set(ids)) and all(name.startswith("x-") for name in ids)
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
    assert {a or b for a, b in used} <= set(ids)
    assert "var(--ink)" in svg and draw.INK not in svg
    assert "<svg viewBox=" in svg and "<text" in svg


def test_names_with_markup_or_mathematics_are_text(tmp_path):
    names = ("bf16", "<script>alert(1)</script>", r"$\frac{1}{0$", "two\nlines", "x" * 200)
    table = grid_table(N[:3], D[:3], names)
    table = draw_runs(load_law("chinchilla"), SURFACE, table)
    svg = draw.save(plots.loss_tokens(curves.lines(fit(load_law("chinchilla"), table))).figure, tmp_path / "x")
    assert "<script" not in svg and "&lt;script" in svg and "x" * 40 not in svg
    ET.fromstring((tmp_path / "x.svg").read_bytes())
