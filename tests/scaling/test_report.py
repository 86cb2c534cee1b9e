"""The report: one page that stands alone, says the verdict first, lists every run, and is the same bytes every time."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lowprec.scaling.advise import advise
from lowprec.scaling.compare import compare
from lowprec.scaling.design import break_even_at, design
from lowprec.scaling.diagnose import Verdict
from lowprec.scaling.draw import Drawing
from lowprec.scaling.fit import fit
from lowprec.scaling.gaps import gaps
from lowprec.scaling.law import load_law
from lowprec.scaling.report import numbered, report
from lowprec.scaling.surface import Surface
from lowprec.scaling.synth import draw as draw_runs
from lowprec.scaling.synth import grid_table
from lowprec.scaling.table import Dropped, RunTable
from lowprec.scaling.uncertainty import bootstrap

N, D = (5e7, 1e8, 2e8, 4e8), (1e9, 2e9, 4e9, 8e9)
SURFACE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.366}
WICKED = '<script>alert("run")</script>'
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: text by section, tags that do not match, addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.sections: dict[str, str] = {"top": ""}
        self.section, self.links, self.ids, self.tags = "top", list[str](), list[str](), set[str]()
        self.figures: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        if tag == "section":
            self.section = found["id"]
            self.sections[self.section] = ""
        if tag == "figure":
            self.figures.append(found["id"])
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.sections[self.section] += data

    @property
    def text(self) -> str:
        return "".join(self.sections.values())


@pytest.fixture(scope="module")
def table() -> RunTable:
    """Runs in two precisions; one has a wicked name, one was dropped."""
    grid = grid_table(N, D, ("bf16", "nvfp4"), bits_w={"bf16": 16, "nvfp4": 4.5}, optimizer="adamw")
    runs = draw_runs(load_law("efficiency"), SURFACE | {"eff_N[nvfp4]": 0.74}, grid, 0.002)
    frame = runs.frame.copy()
    frame.loc[3, "run"] = WICKED
    lost = Dropped("late", "it diverged: loss 9.1 <b>after</b> 7.0", "runs/late")
    return RunTable(frame, dropped=(lost,), notes=("C is 6 N D.",))


@pytest.fixture(scope="module")
def fitted(table):
    return fit(load_law("efficiency"), table)


@pytest.fixture(scope="module")
def full(table, fitted, tmp_path_factory) -> Page:
    boot = bootstrap(fitted, 40)
    surface = Surface(fitted, boot)
    law = load_law("chinchilla")
    weak, alone = Verdict("WEAK", ("N spans only a factor of 8",)), table.where(table.column("precision") == "bf16")
    return Page(report(
        "A ladder of <16> sizes", table, [(fitted, boot, weak), (fit(law, alone), None, Verdict("OK"))],
        [compare([load_law("efficiency"), law], table, way) for way in ("N", "D")], gaps(table),
        advise(surface, 1e20, speedup={"nvfp4": 1.6}), design(surface, break_even_at(surface, "nvfp4", 1e20), 3e18),
        "lowprec-scaling report --runs 'a & b'", out=tmp_path_factory.mktemp("full"),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def refused(table, fitted, tmp_path_factory) -> Page:
    surface = Surface(fitted)
    return Page(report(
        "Refused", table, [(fitted, None, Verdict("REFUSE", ("all runs are at 20 tokens a parameter",)))], None, None,
        advise(surface, 1e20), out=tmp_path_factory.mktemp("refused"),
    ))  # fmt: skip


def test_the_page_is_balanced_and_needs_nothing_from_elsewhere(full):
    assert not full.wrong and not full.open
    assert len(full.ids) == len(set(full.ids))
    outside = [link for link in full.links if re.match(r"(?i)[a-z+]*:?//", link) or link.startswith("data:text")]
    assert all(link.startswith("https://arxiv.org/abs/") for link in outside)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", full.source)
    assert len(full.source) < 2e6
    assert 'name="viewport"' in full.source and "prefers-color-scheme:dark" in full.source


def test_links_within_the_page_and_beside_it_lead_somewhere(full, tmp_path_factory):
    folder = next(p for p in tmp_path_factory.getbasetemp().glob("full*"))
    for link in full.links:
        if link.startswith("#"):
            assert link[1:] in full.ids
        elif not link.startswith(("http", "data:")):
            assert (folder / link).is_file()
    for name in full.figures:
        assert (folder / f"{name}.svg").is_file() and (folder / f"{name}.png").is_file()
    assert len(pd.read_csv(folder / "runs.csv")) == 32


def test_verdicts_and_their_reasons_stand_at_the_top(full):
    assert "WEAK efficiency" in full.sections["top"] and "N spans only a factor of 8" in full.sections["top"]
    assert "OK chinchilla" in full.sections["top"]


def test_every_run_is_listed_with_its_prediction(full, table, fitted):
    for name in table.column("run"):
        assert name in full.sections["runs"]
    assert "C is 6 N D." in full.sections["runs"] and "optimizer = adamw" in full.sections["runs"]
    assert f"{fitted.predict(table)[7]:.4f}" in full.sections["runs"]
    assert "it diverged: loss 9.1 <b>after</b> 7.0" in full.sections["dropped"]


def test_what_runs_are_called_cannot_become_markup(full):
    assert WICKED in full.sections["runs"]  # as text
    assert "<script>alert" not in full.source and "<b>after" not in full.source
    assert full.source.count("<script") == 1
    assert "A ladder of <16> sizes" in full.sections["top"]


def test_all_figures_of_a_full_report_are_there(full):
    assert full.figures == [
        "loss_compute", "loss_tokens", "isoflop", "extrapolation", "precision_frontier", "gaps", "residuals",
        "heldout_N", "heldout_D", "coefficients_efficiency", "bootstrap_pairs", "profile_E",
    ]  # fmt: skip
    left = full.sections["left"]
    assert "do not differ in bits_w" in left and "no column gmse_w" in left and "Coefficients of chinchilla" in left


def test_advice_has_intervals_and_the_break_even(full, fitted):
    train = full.sections["train"]
    assert "train nvfp4" in train and "95% intervals" in train
    assert f"{1 / fitted.params['eff_N[nvfp4]']:.3g} (" in train
    assert "seeds" in full.sections["next"]


def test_conclusions_say_what_is_known_and_what_is_not(full):
    assert "nvfp4 is worth 0.7" in full.sections["can"] and "nvfp4 − bf16 is +0" in full.sections["can"]
    assert "extrapolation" in full.sections["cannot"] and "Seed noise is unknown" in full.sections["cannot"]


def test_coefficients_are_natural_and_at_the_pivots(full, fitted):
    text = full.sections["coefficients"]
    for values in (fitted.params, fitted.pivoted):
        assert f"{values['A']:.4g}" in text
    assert "geometric means" in text


def test_how_to_repeat_it_is_complete(full, table):
    again = full.sections["again"]
    assert "lowprec-scaling report --runs 'a & b'" in again and table.fingerprint() in again
    assert "numpy" in again and "class: Efficiency" in again


def test_a_refusal_is_loud_and_gives_no_advice(refused):
    assert "verdict REFUSE loud" in refused.source
    assert "all runs are at 20 tokens a parameter" in refused.sections["top"]
    assert refused.source.index("may not be used") < refused.source.index("<nav>")
    assert refused.sections["train"].strip().endswith("No advice: the fit was refused, see above.")
    assert "1e+20" not in refused.text and "break-even speed-up" not in refused.sections["train"]
    assert "mean nothing" in refused.sections["cannot"] and "can" not in refused.sections


def test_a_refused_fit_draws_runs_but_no_curves(refused):
    assert refused.figures == ["loss_compute", "loss_tokens", "residuals", "profile_E"]
    assert "No line is drawn: the fit was refused" in refused.text


def test_one_fit_alone_is_enough_and_gives_the_same_bytes(tmp_path):
    table = draw_runs(load_law("chinchilla"), SURFACE, grid_table(N[:3], D[:3]), 0.002)
    bare = RunTable(table.frame[["run", "N", "D", "loss"]])
    pages = []
    for folder in ("a", "b"):
        fitted = fit(load_law("chinchilla"), bare)
        pages.append(report("Bare", bare, [(fitted, None, Verdict("OK"))], out=tmp_path / folder))
    page = Page(pages[0])
    assert not page.wrong and "there is no bootstrap" in page.text and "nothing was held out" in page.sections["cannot"]
    assert "train" not in page.sections and "next" not in page.sections and "again" in page.sections
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_figures_of_the_same_name_are_numbered():
    named = numbered({"one": [Drawing("a", "", ""), Drawing("b", "", "")], "two": [Drawing("a", "", "")]})
    assert [[drawing.name for drawing in group] for group in named.values()] == [["a", "b"], ["a_2"]]


def test_a_report_without_a_fit_is_an_error(table, tmp_path):
    with pytest.raises(ValueError, match="at least one fit"):
        report("Nothing", table, [], out=tmp_path)
