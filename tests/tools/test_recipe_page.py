"""docs/recipes.md: it is what the generator writes, its numbers are measured, and heads say what they must."""

from pathlib import Path

import pytest
import yaml

from lowprec.linear import load_recipe
from lowprec.linear.parse import parse_format
from lowprec.tools import recipe_page
from lowprec.tools.numerics import SHAPE, collect, shipped, synthetic
from lowprec.tools.numerics_cost import operands
from lowprec.tools.numerics_data import KINDS
from lowprec.tools.numerics_measure import recipes_of

WRITE = f"run {recipe_page.COMMAND} and look at what changed"


@pytest.fixture(scope="module")
def table() -> dict:
    return recipe_page.read_table()


def test_the_page_is_what_the_generator_writes(table: dict) -> None:
    """Equations, words, costs and figures of docs/recipes.md are those of the YAML files and docs/recipes.json."""
    assert recipe_page.page(table) == (recipe_page.DOCS / "recipes.md").read_text(encoding="utf-8"), WRITE


def test_every_recipe_has_all_its_figures(table: dict) -> None:
    """Each shipped recipe, kind of data and product was measured; only what is not quantised is exact."""
    assert set(table) == {name for stem in shipped() for name in recipes_of(stem)}, WRITE
    for name, entry in table.items():
        assert set(entry["figures"]) == set(KINDS), name
        for kind, gemms in entry["figures"].items():
            assert set(gemms) == set(recipe_page.GEMMS), (name, kind)
            for figures in gemms.values():
                assert figures["sqnr_db"] > -1 and abs(figures["bias"]) < 1, (name, kind)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8_blockwise"])
def test_figures_are_reproduced(name: str, table: dict) -> None:
    """Measured again, the numbers of the page come out the same but for the order in which a library sums."""
    rows = collect({name: load_recipe(name)}, synthetic(["gaussian", "outlier_tokens"], SHAPE), backend="torch")
    for kind, gemms in recipe_page.figures(rows).items():
        for gemm, figures in gemms.items():
            on_page = table[name]["figures"][kind][gemm]
            assert figures["sqnr_db"] == pytest.approx(on_page["sqnr_db"], abs=0.05), WRITE
            assert figures["underflow_frac"] == pytest.approx(on_page["underflow_frac"], abs=1e-4), WRITE


def test_numbers_of_another_recipe_are_refused(table: dict) -> None:
    """Figures that were measured before a recipe changed cannot stand on the page."""
    other = {**table, "nvfp4": {**table["nvfp4"], "fingerprint": "0" * 12}}
    with pytest.raises(ValueError, match=r"no figures of nvfp4 as it is now; run python -m"):
        recipe_page.page(other)


def test_only_what_changed_is_measured(monkeypatch: pytest.MonkeyPatch, table: dict) -> None:
    """Known figures are kept by fingerprint, whatever the recipe is called."""
    recipes = {"nvfp4": load_recipe("nvfp4"), "mxfp8": load_recipe("mxfp8")}
    monkeypatch.setattr(recipe_page, "collect", lambda *_, **__: pytest.fail("measured again"))
    assert recipe_page.measured(recipes, table) == {name: table[name] for name in recipes}


HEAD = """# A recipe (arXiv:2509.25149).
# What it does: this,
#   and *that*.
# What it costs: 8 bits.
# Known to fail: never.
# Use it: always.
#
# One-line ablations: append to the command.
#   precision.backend=oracle    slower
linear: {}
"""


def test_a_head_is_read(tmp_path: Path) -> None:
    """First words, the four labelled texts over several lines, and the variants."""
    path = tmp_path / "r.yaml"
    path.write_text(HEAD)
    head = recipe_page.read_head(path)
    assert head.title == "A recipe (arXiv:2509.25149)."
    assert head.said["What it does"] == "this, and *that*." and head.said["Use it"] == "always."
    assert head.ablations == ("precision.backend=oracle    slower",)


@pytest.mark.parametrize("label", recipe_page.LABELS)
def test_a_head_without_a_label_is_refused(label: str, tmp_path: Path) -> None:
    """The sentence names the file and what is missing."""
    path = tmp_path / "r.yaml"
    path.write_text(HEAD.replace(f"# {label}:", "#"))
    with pytest.raises(ValueError, match=rf"r\.yaml: its head comment needs one line that begins '# {label}: "):
        recipe_page.read_head(path)


def test_words_become_markdown() -> None:
    """Stars and angle brackets stay characters, papers become links."""
    assert recipe_page._md("a*b <c> (arXiv:2509.25149)") == (
        r"a\*b \<c\> ([arXiv:2509.25149](https://arxiv.org/abs/2509.25149))"
    )


def test_times_are_shown_where_they_were_measured(monkeypatch: pytest.MonkeyPatch, table: dict) -> None:
    """Without times the page has no column for them; with some, the others have a dash."""
    monkeypatch.setattr(recipe_page, "shipped", lambda: ["mxfp8", "nvfp4"])
    without = {name: {key: entry[key] for key in ("fingerprint", "figures")} for name, entry in table.items()}
    assert "bf16 = 1" not in recipe_page.page(without)
    some = {**without, "nvfp4": {**without["nvfp4"], "time": {"over_bf16": 0.93, "backend": "cpu"}}}
    page = recipe_page.page(some)
    assert "bf16 = 1 |" in page and "| 0.93 (cpu) |" in page and f"{recipe_page.TIMED_SHAPE[0]} tokens" in page
    assert any(line.startswith("| mxfp8 |") and line.endswith("| - |") for line in page.splitlines())


def test_times_come_from_the_benchmark(monkeypatch: pytest.MonkeyPatch, table: dict) -> None:
    """One recipe timed for real, on a small layer."""
    monkeypatch.setattr(recipe_page, "TIMED_SHAPE", (64, 128, 128))
    monkeypatch.setattr(recipe_page, "shipped", lambda: ["bf16", "mxfp8"])
    timed = recipe_page.timed({name: table[name] for name in ("bf16", "mxfp8")}, reps=1)
    assert timed["mxfp8"]["time"]["over_bf16"] > 0 and "time" not in timed["bf16"]


@pytest.mark.parametrize("stem", shipped())
def test_formats_are_written_as_a_precision_file_would(stem: str) -> None:
    """Each format line of the page, read as YAML, is the format that the recipe uses."""
    recipes = recipes_of(stem).values()
    used = {o.format.name: o.format for recipe in recipes for *_, o in operands(recipe) if o.format is not None}
    written = yaml.safe_load("\n".join(recipe_page._format_lines(recipes))) or {}
    assert {name: parse_format(name, written[name]) for name in used} == used
