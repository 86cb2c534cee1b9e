"""Plan: strict matching, tables, schedule, evaluation in high precision."""

import copy

import pytest
import torch
from torch import nn

from lowprec.linear import Plan, QuantizedLinear, load_precision
from lowprec.linear.plan import compile_pattern


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q_proj, self.norm, self.down_proj = (
            nn.Linear(dim, dim, bias=False),
            nn.LayerNorm(dim),
            nn.Linear(dim, dim, bias=False),
        )

    def forward(self, x):
        return self.down_proj(self.norm(self.q_proj(x)).relu())


class Model(nn.Module):
    def __init__(self, blocks=8, dim=64):
        super().__init__()
        self.layers = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.lm_head = nn.Linear(dim, 32, bias=False)

    def forward(self, x):
        for block in self.layers:
            x = x + block(x)
        return self.lm_head(x)


NAMES = [f"layers.{i}.{p}" for i in range(20) for p in ("q_proj", "down_proj")] + ["lm_head"]
BASE = {"linear": {"nvfp4": {"fprop": {"x": "nvfp4", "w": "nvfp4_2d"}}}, "rules": [{"match": "*", "recipe": "nvfp4"}]}


def precision(rules=None, **fields):
    return load_precision({**copy.deepcopy(BASE), **({"rules": rules} if rules else {}), **fields})


def chosen(pattern):
    """Block numbers that a pattern matches in a model of 20 blocks."""
    return sorted({int(name.split(".")[1]) for name in NAMES[:-1] if compile_pattern(pattern, NAMES).fullmatch(name)})


def test_patterns():
    assert chosen("layers.*") == list(range(20))
    assert chosen("layers.{first:2}.*") == [0, 1]
    assert chosen("layers.{last:8}.*") == list(range(12, 20))
    assert chosen("layers.{last:15%}.*") == [17, 18, 19]
    assert chosen("layers.{last:1%}.q_proj") == [19]  # a share is rounded up to whole blocks
    assert chosen("layers.{first:0}.*") == [] and chosen("layers.{last:0}.*") == []
    assert chosen("layers.1.*") == [1]  # and not 10..19
    assert chosen("*.q_proj") == list(range(20))
    assert compile_pattern("lm_?ead", NAMES).fullmatch("lm_head")


def test_first_match_wins_and_the_table_says_why():
    rules = [
        {"match": "lm_head", "recipe": "bf16"},
        {"match": "layers.{first:2}.*", "recipe": "bf16"},
        {"match": "layers.*", "recipe": "nvfp4"},
    ]
    with torch.device("meta"):
        model = Model()
    plan = Plan.of(model, precision(rules), seed=1)
    recipes = {entry.layer: entry.recipe for entry in plan.entries}
    assert recipes["lm_head"] == recipes["layers.1.q_proj"] == "bf16" and recipes["layers.2.q_proj"] == "nvfp4"
    table = plan.table(tokens=40)
    row = next(line for line in table.splitlines() if line.startswith("layers.2-7.q_proj"))
    assert "(64, 64)" in row and "nvfp4" in row and row.endswith("layers.*")
    assert "fprop  y = x w^T  with  x: nvfp4, w^T: nvfp4_2d" in table
    assert plan.fingerprint() in table and f"{len(plan.entries)} linear layers" in table


def test_rules_are_strict():
    model = Model()
    with pytest.raises(
        ValueError, match=r'rule \{match: "attn.\*", recipe: nvfp4\} decides no layer: it matches none of layers.0'
    ):
        Plan.of(model, precision([{"match": "attn.*", "recipe": "nvfp4"}, {"match": "*", "recipe": "bf16"}]))
    with pytest.raises(ValueError, match="decides no layer: all it matches was decided by earlier rules"):
        Plan.of(model, precision([{"match": "*", "recipe": "bf16"}, {"match": "layers.*", "recipe": "nvfp4"}]))
    with pytest.raises(
        ValueError, match=r"no rule matches the layer 'lm_head'; add one, such as \{match: \"lm_head\", recipe: bf16\}"
    ):
        Plan.of(model, precision([{"match": "layers.*", "recipe": "nvfp4"}]))
    with pytest.raises(ValueError, match=r"cannot read the braces; write \{first:2\}"):
        Plan.of(model, precision([{"match": "layers.{middle:2}.*", "recipe": "nvfp4"}]))
    with pytest.raises(ValueError, match="no layer has a number where"):
        Plan.of(model, precision([{"match": "blocks.{first:2}.*", "recipe": "nvfp4"}]))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        Plan.of(model, precision(), backend="gpu")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        Plan.of(nn.ReLU(), precision())


def test_apply_keeps_parameters_and_schedule_changes_recipes():
    model = Model(2)
    keys, weight = list(model.state_dict()), model.lm_head.weight
    plan = Plan.of(model, precision(schedule=[{"from": 0.5, "set": {"nvfp4.fprop": "bf16"}}]), seed=4)
    plan.apply(model)
    assert list(model.state_dict()) == keys and model.lm_head.weight is weight
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.clock is plan.clock and plan.clock.seed == 4
    x = torch.randn(32, 64)
    quantised = model(x)
    with plan.high_precision():
        exact = model(x)
    assert not torch.equal(quantised, exact) and torch.equal(model(x), quantised)
    plan.at(0.5)
    assert torch.equal(model(x), exact)
    plan.at(0.1)
    assert torch.equal(model(x), quantised)


def test_high_precision_is_left_even_when_it_fails():
    model = Model(1)
    plan = Plan.of(model, precision())
    plan.apply(model)
    with pytest.raises(RuntimeError), plan.high_precision():
        raise RuntimeError
    assert model.lm_head.recipe.quantized


def test_fingerprint_follows_the_numbers_and_not_the_backend():
    model = Model(2)
    base = Plan.of(model, precision()).fingerprint()
    assert (
        base
        == Plan.of(model, precision(), backend="oracle").fingerprint()
        == Plan.of(model, precision(), seed=9).fingerprint()
    )
    assert (
        base
        != Plan.of(
            model, precision([{"match": "lm_head", "recipe": "bf16"}, {"match": "*", "recipe": "nvfp4"}])
        ).fingerprint()
    )
    assert base != Plan.of(model, precision(schedule=[{"from": 0.5, "set": {"nvfp4.fprop": "bf16"}}])).fingerprint()
    assert base != Plan.of(Model(3), precision()).fingerprint()


def test_padding_is_said_in_the_table():
    model = Model(1, dim=40)
    said = "lm_head fprop: whole blocks need 48 instead of 40: it is padded to 48"
    assert said in Plan.of(model, precision()).table()
    assert "is refused when it runs" in Plan.of(model, precision(pad="refuse")).table()


def test_layers_draw_different_bits():
    """Same weights, same input, stochastic forward: two layers of a model round differently, two runs equally."""
    node = copy.deepcopy(BASE)
    node["linear"]["nvfp4"]["fprop"]["x"] = {"format": "nvfp4", "rounding": "stochastic"}
    model = Model(2)
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    plan = Plan.of(model, load_precision(node), seed=1)
    plan.apply(model)
    x = torch.randn(32, 64)
    first, second = model.layers[0].q_proj(x), model.layers[1].q_proj(x)
    assert not torch.equal(first, second) and torch.equal(first, model.layers[0].q_proj(x))


def test_a_refusal_is_said_once_in_words():
    """The C++ kernels do not know IF4: the plan says so in one line, however many layers and products it concerns."""
    node = {"linear": {"if4": {"fprop": {"x": "if4", "w": "if4"}, "dgrad": {"dy": "if4", "w": "if4"}}}}
    plan = Plan.of(Model(3), load_precision({**node, "rules": [{"match": "*", "recipe": "if4"}]}))
    notes = [line for line in plan.table(tokens=64).splitlines() if "computes instead of cpu: " in line]
    assert len(notes) == 1 and notes[0].startswith("note: ") and "if4" in notes[0]
