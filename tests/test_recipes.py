"""Every YAML file that is shipped composes, loads and is planned on the meta device."""

from pathlib import Path

import pytest

from lowprec.config import Run, from_yaml, load, to_yaml
from lowprec.launch.train import GROUPS, SHIPPED, compose_run
from lowprec.model import count_parameters
from lowprec.model.flops import linear_shapes
from lowprec.train import check, plan_model

RECIPES = sorted(p.stem for p in (SHIPPED / "recipe").glob("*.yaml"))
OPTIONS = sorted(f"{p.parent.name}={p.stem}" for g in GROUPS if g != "recipe" for p in (SHIPPED / g).glob("*.yaml"))


def composed(*overrides: str) -> Run:
    return load(compose_run(list(overrides), []))


def planned(run: Run) -> None:
    """The plan covers every linear layer of a Transformer or a hybrid."""
    model, plan = plan_model(run)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count_parameters(run.model)["total"]
    assert len(plan.entries) == sum(count for count, _, _ in linear_shapes(run.model).values())
    assert plan.fingerprint() in plan.table(run.train.micro_batch * run.data.seq_len)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_is_planned(recipe: str) -> None:
    """A whole run: composed, checked, planned, and the same after it was written as config.yaml and read again."""
    run = composed(f"recipe={recipe}")
    assert run.name == recipe and run.run.dir == f"runs/{recipe}"
    assert from_yaml(to_yaml(run)) == run
    planned(run)
    if all(source.path or source.kind.name == "stdlib" for source in run.data.sources):
        check(run)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_composes_and_is_planned(option: str) -> None:
    """Each option of each group in place of that of a plain run."""
    planned(composed("recipe=bf16_tiny", option))


def test_every_file_is_covered() -> None:
    """No YAML lies where no test and no user would find it (laws and ladders are no parts of a run)."""
    known = {SHIPPED / "recipe" / f"{name}.yaml" for name in RECIPES} | {SHIPPED / "train.yaml"}
    known |= {SHIPPED / Path(*option.split("=")).with_suffix(".yaml") for option in OPTIONS}
    others = {path for folder in ("law", "sweep") for path in (SHIPPED / folder).glob("*.yaml")}
    assert set(SHIPPED.rglob("*.yaml")) == known | others


def test_twins_differ_in_precision_only() -> None:
    """bf16_tiny is the control of the others: all but the precision is equal."""
    control = composed("recipe=bf16_tiny", "name=x")
    for recipe in ("nvfp4_tiny", "fp8_tiny", "mxfp8_tiny"):
        twin = composed(f"recipe={recipe}", "name=x")
        twin.precision = control.precision
        assert twin == control


def test_the_published_12b_is_as_published() -> None:
    """arXiv:2509.25149, appendix A.1: 12.3 B parameters, 10 T tokens, 4.5e-4 to 4.5e-6 over the last 20 %."""
    run = composed("recipe=nvfp4_12b")
    assert round(count_parameters(run.model)["total"] / 1e9, 1) == 12.3
    assert run.train.steps * run.train.global_batch * run.data.seq_len == pytest.approx(10e12, rel=1e-6)
    assert (run.optim.lr, run.optim.lr * run.schedule.final_frac, run.schedule.decay_frac) == (4.5e-4, 4.5e-6, 0.2)
    assert run.precision["schedule"] == [{"from": 0.82, "set": {"nvfp4.fprop": "bf16"}}]
