"""Precision files: every shipped one loads, every mistake is one sentence that names it."""

import copy

import pytest
import yaml

from lowprec.linear import load_precision, load_recipe
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.numerics import FORMATS

# ruff: noqa: E501

SHIPPED = sorted(RECIPES_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_load_and_teach(path):
    """Each defines the recipe of its name and begins with a comment that says what it costs and where it fails."""
    assert load_recipe(path.stem).name in (path.stem, *load_precision(path).linear)
    assert load_precision(path) == load_precision(path.stem)
    head = path.read_text().partition("linear:")[0]
    assert head.startswith("#") and "osts:" in head and "Known to fail:" in head


def test_nvfp4_is_the_published_recipe():
    """arXiv:2509.25149 section 4 and figure 5, operand by operand."""
    recipe = load_recipe("nvfp4")
    row, square = FORMATS["nvfp4"], FORMATS["nvfp4_2d"]
    assert (recipe.fprop.a.format, recipe.fprop.b.format) == (row, square)
    assert (recipe.dgrad.a.format, recipe.dgrad.b.format) == (row, square)
    assert (recipe.wgrad.a.format, recipe.wgrad.b.format) == (row, row)
    stochastic = [
        op for g in (recipe.fprop, recipe.dgrad, recipe.wgrad) for op in (g.a, g.b) if op.rounding == "stochastic"
    ]
    assert stochastic == [recipe.dgrad.a, recipe.wgrad.a]
    assert recipe.fprop.inner is None and recipe.dgrad.inner is None
    assert recipe.wgrad.inner is not None and (recipe.wgrad.inner.size, recipe.wgrad.inner.signs) == (16, "fixed")


def test_a_file_may_define_formats_and_several_recipes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "formats: {tiny: {element: e2m3, block: [1, 8], scale: e8m0}}\n"
        "linear:\n  mine: {fprop: {x: tiny, w: tiny}}\n  other: {dgrad: {dy: mxfp8, w: mxfp8}}\n"
        "rules: [{match: '*', recipe: mine}]\n"
    )
    recipe = load_recipe(path)
    assert recipe.name == "mine" and recipe.fprop.a.format.block == (1, 8) and not recipe.dgrad.quantized


def test_the_schedule_changes_products_and_recipes():
    node = yaml.safe_load((RECIPES_FOLDER / "nvfp4.yaml").read_text())
    node["linear"]["fp8"] = {"fprop": {"x": "fp8_tensor", "w": "fp8_tensor"}}
    node["schedule"] = [{"from": 0.9, "set": {"nvfp4": "fp8"}}, {"from": 0.5, "set": {"nvfp4.fprop": "bf16"}}]
    precision = load_precision(node)
    assert precision.at(0.49)["nvfp4"].fprop.quantized
    half = precision.at(0.5)["nvfp4"]
    assert not half.fprop.quantized and half.dgrad.quantized and half.wgrad.quantized
    last = precision.at(0.95)["nvfp4"]
    assert last.fprop == precision.linear["fp8"].fprop and not last.dgrad.quantized and last.name == "nvfp4"


@pytest.mark.parametrize("name, expected", [("nvfp4", "nvfp4"), ("fp8_tensorwise", "fp8_tensorwise"), ("bf16", "bf16")])
def test_default_is_the_files_own_recipe(name, expected):
    """A run's rules may say `default` and meet any precision file."""
    node = yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text())
    node["rules"] = [{"match": "*", "recipe": "default"}]
    node["schedule"] = [{"from": 0.5, "set": {"default.fprop": "bf16"}}]
    precision = load_precision(node)
    assert precision.rules[0].recipe == expected
    assert not precision.at(0.5)[expected].fprop.quantized


def test_reuse_needs_codes_that_survive_the_transpose():
    row = {"linear": {"a": {"fprop": {"x": "nvfp4", "w": "nvfp4"}, "dgrad": {"dy": "nvfp4", "w": {"reuse": "fprop"}}}},
           "rules": [{"match": "*", "recipe": "a"}]}  # fmt: skip
    with pytest.raises(ValueError, match=r"linear.a.dgrad.w: the forward codes of w cannot be reused.*these are 1x16"):
        load_precision(row)
    row["linear"]["a"]["fprop"]["w"] = {"format": "nvfp4_2d", "rounding": "stochastic"}
    with pytest.raises(ValueError, match="stochastic rounding"):
        load_precision(row)


MISTAKES = {
    "nvfp4.fprop.x=nvpf4": ("unknown format 'nvpf4'; did you mean 'nvfp4'", lambda n: n["linear"]["nvfp4"]["fprop"].update(x="nvpf4")),
    "operand": ("unknown key 'dx'; did you mean 'x'", lambda n: n["linear"]["nvfp4"]["fprop"].update(dx="nvfp4")),
    "product": ("unknown key 'bprop'", lambda n: n["linear"]["nvfp4"].update(bprop="bf16")),
    "rounding": ("unknown rounding 'sr'", lambda n: n["linear"]["nvfp4"]["dgrad"].update(dy={"format": "nvfp4", "rounding": "sr"})),
    "signs": ("unknown rotation signs 'random'", lambda n: n["linear"]["nvfp4"]["wgrad"].update(inner={"size": 16, "signs": "random"})),
    "size": ("Hadamard size 24 is not a power", lambda n: n["linear"]["nvfp4"]["wgrad"].update(inner={"size": 24})),
    "rule": ("unknown recipe 'nvfp'; did you mean 'nvfp4'", lambda n: n["rules"].append({"match": "*", "recipe": "nvfp"})),
    "rule key": ("unknown key 'layers'", lambda n: n["rules"].append({"layers": "*", "recipe": "bf16"})),
    "no rules": ("the key 'rules' is missing", lambda n: n.pop("rules")),
    "schedule": ("'from' is training progress between 0 and 1, got 82", lambda n: n.update(schedule=[{"from": 82, "set": {}}])),
    "target": ("unknown product 'forward'", lambda n: n.update(schedule=[{"from": 0.8, "set": {"nvfp4.forward": "bf16"}}])),
    "backend": ("unknown backend 'cuda'", lambda n: n.update(backend="cuda")),
    "pad": ("unknown key 'padding'; did you mean 'pad'", lambda n: n.update(padding="zero")),
    "builtin": ("formats.nvfp4: this name is taken", lambda n: n.update(formats={"nvfp4": {"element": "e2m1", "block": [1, 8]}})),
    "block": ("block must be two whole numbers", lambda n: n.update(formats={"f": {"element": "e2m1", "block": "1x16"}})),
    "bf16": ("cannot be redefined", lambda n: n["linear"].update(bf16={})),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence(mistake):
    sentence, spoil = MISTAKES[mistake]
    node = copy.deepcopy(yaml.safe_load((RECIPES_FOLDER / "nvfp4.yaml").read_text()))
    spoil(node)
    with pytest.raises(ValueError) as error:
        load_precision(node)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unknown_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown precision recipe 'nvfp5'; did you mean 'nvfp4'"):
        load_recipe("nvfp5")
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_precision(tmp_path / "none.yaml")
    two = tmp_path / "two.yaml"
    two.write_text("linear: {a: {}, b: {}}\nrules: [{match: '*', recipe: a}]\n")
    with pytest.raises(ValueError, match="defines a, b; name one of them like the file"):
        load_recipe(two)
