"""The probe measures without touching the run; the controller raises and lowers precision by it, also when resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowprec.config import ProbeRule
from lowprec.linear import Plan, Rule, load_precision
from lowprec.train import DIVERGED
from lowprec.train.controller import Controller
from lowprec.train.motion import quality
from tests.layouts import train_on

PARTS = [f"attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
LAYERS = [f"layers.{i}.{part}" for i in (0, 1) for part in PARTS]


def probes(folder: Path) -> list[dict[str, Any]]:
    """The lines without what may differ between equal runs."""
    lines = [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 and line.pop("attempt") for line in lines)
    return lines


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_run_with_probes_is_the_same_run(train, read, compare, tmp_path: Path) -> None:
    """Every number equal; each probe has every quantised layer, every product and operand, and the weights' motion."""
    assert train(tmp_path / "plain") == 0
    assert train(tmp_path / "probed", "probe.every=4", "train.log_every=3") == 0
    logged = [number for number in compare(tmp_path / "plain") if number[0] in (3, 4, 6, 8)]
    assert compare(tmp_path / "probed") == logged
    found = probes(tmp_path / "probed")
    assert [line["step"] for line in found] == [4, 8] and [line["tokens"] for line in found] == [1024, 2048]
    for line in found:
        assert list(line["layers"]) == LAYERS
        for measures in line["layers"].values():
            assert {role: set(m) for role, m in measures["gemms"].items()} == {
                "fprop": {"x", "w", "out"}, "dgrad": {"dy", "w", "out"}, "wgrad": {"dy", "x", "out"}}  # fmt: skip
            assert all(8 < m["out"]["sqnr_db"] < 30 for m in measures["gemms"].values())
            assert 0.8 < measures["gradient"]["cosine"] < 1
            e = measures["error"]
            assert e["R"] == pytest.approx(e["A"] + e["B"] + e["C"]) and e["B"] > 0
            w = measures["weight"]
            assert w["oscillation"] > 0.5 and 0 < w["edq"] < 1.5 and 0 <= w["lost_frac"] < 1
            assert w["edq_bf16"] == pytest.approx(1, abs=0.3)
    first = found[0]["layers"]["layers.0.attn.q_proj"]
    assert first["error"]["A"] == 0, "nothing before it is quantised"
    assert found[0]["layers"]["layers.1.mlp.down_proj"]["error"]["A"] > 0
    record = read(tmp_path / "probed")[1]
    assert record["step"] == 4 and record["probe_s"] > 0 and 0.8 < record["probe_grad_cosine"] < 1
    ratios = [m["gemms"][role]["out"]["sqnr_db"] for m in found[0]["layers"].values() for role in m["gemms"]]
    assert record["probe_sqnr_db"] == pytest.approx(sum(ratios) / len(ratios))


@pytest.mark.distributed
def test_two_ranks_measure_what_one_does(compare, tmp_path: Path) -> None:
    """FSDP2 on two ranks, blocks recomputed: the same measures; with weights gathered as codes, those of wgrad."""
    more = ("probe.every=4", "parallel=fsdp_recompute", "train.global_batch=4")
    for ranks, name in ((1, "one"), (2, "two")):
        train_on(ranks, tmp_path, *more, f"run.dir={name}")
    assert compare(tmp_path / "two") == compare(tmp_path / "one")
    for a, b in zip(probes(tmp_path / "one"), probes(tmp_path / "two"), strict=True):
        for name in LAYERS:
            left, right = a["layers"][name], b["layers"][name]
            left.pop("weight"), right.pop("weight")  # of the first 64 rows that the first rank holds: others on two
            assert left == right
    train_on(2, tmp_path, *more, "comm=nvfp4_fp8", "run.dir=codes")
    for line in probes(tmp_path / "codes"):
        assert all(set(line["layers"][name]["gemms"]) == {"wgrad"} for name in LAYERS)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp", "cp"])
def test_parts_of_matrices_are_measured_too(compare, tmp_path: Path, layout: str) -> None:
    """Tensor and context parallelism on two ranks: the run's numbers are those without probes, and all is measured."""
    words = (f"parallel={layout}", f"parallel.{layout}=2", "model.vocab_multiple=64", "train.eval_every=0")
    train_on(2, tmp_path, *words, "run.dir=plain")
    train_on(2, tmp_path, *words, "probe.every=2", "run.dir=probed")
    assert compare(tmp_path / "probed") == compare(tmp_path / "plain")
    for line in probes(tmp_path / "probed"):
        assert list(line["layers"]) == LAYERS
        assert all(set(measures["gemms"]) == {"fprop", "dgrad", "wgrad"} for measures in line["layers"].values())


def test_a_run_that_diverges_says_so(train, capsys, tmp_path: Path) -> None:
    """The guard stops it, not a number that JSON does not know."""
    hot = ("optim.lr=1e30", "train.clip_norm=0", "schedule.warmup_frac=0", "probe.every=1")
    assert train(tmp_path / "run", *hot) == DIVERGED
    assert train(tmp_path / "kept", *hot, "guard=skip", "guard.on_nonfinite=keep") == 0
    assert all(line["layers"] for line in probes(tmp_path / "kept"))


def test_what_a_dropped_rule_had_raised_is_lowered(train, capsys, read, tmp_path: Path) -> None:
    """A run that goes on without its rules is told so, and is as planned again."""
    every = ("probe.every=2", "train.checkpoint_every=5", "train.keep_last=5")
    assert train(tmp_path / "run", *every, RULE % "") == 0
    raised = read(tmp_path / "run")[-1]["plan"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    assert train(tmp_path / "run", *every, "run.allow_change=true") == 0
    assert "down_proj wgrad as in bf16: raised by a rule that is no more" in capsys.readouterr().out
    records = read(tmp_path / "run")
    assert records[-1]["plan"] == records[0]["plan"] != raised


def test_a_run_that_stops_probes_each_step_once(train, compare, tmp_path: Path) -> None:
    """Killed after step 6 and resumed from step 5: the same lines as the run that went through."""
    more = ("probe.every=2", "train.checkpoint_every=5", "train.keep_last=5")
    assert train(tmp_path / "whole", *more) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000008")
    assert train(tmp_path / "again", *more, f"run.dir={tmp_path / 'again'}") == 0
    assert compare(tmp_path / "again") == compare(tmp_path / "whole")
    for a, b in zip(probes(tmp_path / "again"), probes(tmp_path / "whole"), strict=True):
        if a["step"] == 6:  # its window began before the checkpoint
            for line in (a, b):
                for measures in line["layers"].values():
                    measures.pop("weight", None)
        assert a == b


RULE = "probe.rules=[{match: '*.down_proj', gemm: wgrad, measure: sqnr_db, below: 50%s}]"


def test_a_rule_raises_a_product_and_a_resumed_run_remembers(train, read, compare, tmp_path: Path) -> None:
    """From the probe after step 2 on, two layers' wgrad runs in bf16; the probes go on measuring the plan's recipe."""
    more = ("probe.every=2", "train.checkpoint_every=5", "train.keep_last=5", RULE % "")
    assert train(tmp_path / "plain", "probe.every=2") == 0
    assert train(tmp_path / "raised", *more) == 0
    assert [(e["step"], e["layer"], e["action"]) for e in events(tmp_path / "raised")] == [
        (2, f"layers.{i}.mlp.down_proj", "wgrad as in bf16") for i in (0, 1)]  # fmt: skip
    plain, raised = read(tmp_path / "plain"), read(tmp_path / "raised")
    assert [r["loss"] for r in plain[:3]] == [r["loss"] for r in raised[:3]]
    assert plain[3]["loss"] != raised[3]["loss"] and plain[1]["plan"] != raised[2]["plan"]
    assert "wgrad" in probes(tmp_path / "raised")[3]["layers"]["layers.0.mlp.down_proj"]["gemms"]
    shutil.copytree(tmp_path / "raised", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000008")
    assert train(tmp_path / "again", *more, f"run.dir={tmp_path / 'again'}") == 0
    assert compare(tmp_path / "again") == compare(tmp_path / "raised")


def test_patience_and_the_way_back() -> None:
    """Two probes in a row raise, two beyond `back` lower; a measure between the bounds changes nothing either way."""
    precision = replace(load_precision("nvfp4"), rules=(Rule("*", "nvfp4"),))
    plan = Plan.of(torch.nn.Sequential(torch.nn.Linear(64, 64)), precision)
    rule = ProbeRule("*", "fprop", "saturation_frac", operand="x", above=0.1, back=0.05, patience=2)
    controller = Controller([rule], plan, ["0"])

    def judge(value: float | None) -> list[str]:
        found = {"0": {"gemms": {"fprop": {"x": {"saturation_frac": value}}}}}
        return [event["action"] for event in controller.judge(1, found)]

    assert [judge(v) for v in (0.2, 0.0, 0.2)] == [[]] * 3 and judge(0.11) == ["fprop as in bf16"]
    assert plan.raised == {("0", "fprop"): ("bf16", 0)}
    assert [judge(v) for v in (0.01, 0.07, None, 0.04)] == [[]] * 4
    again = Controller([rule], plan, ["0"])
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.streaks == controller.streaks and plan.raised == {("0", "fprop"): ("bf16", 0)}
    assert judge(0.04) == ["fprop as planned"] and plan.raised == {}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("probe.every=2", "data.validation_sequences=0"), "probe.every measures on validation data"),
        (("probe.every=2", "probe.layers=nothing.*"), "probe.layers='nothing.*' matches no layer"),
        (("probe.every=-1",), "probe.every=-1 must not be negative"),
        ((RULE % "",), "probe.rules are judged by probes: set probe.every"),
        (("probe.every=2", RULE % ", back: 40"), "back=40 must lie on the good side of the bound 50"),
        (("probe.every=2", RULE % ", above: 3"), "give one bound, below or above"),
        (("probe.every=2", RULE % ", operand: w"), "operand='w': wgrad has out, dy, x"),
        (("probe.every=2", RULE % ", to: fp7"), "to='fp7': choose one of"),
    ],
)
def test_what_cannot_be_probed_is_refused(train, capsys, tmp_path: Path, overrides: tuple[str, ...], sentence) -> None:
    assert train(tmp_path / "run", *overrides) == 2
    assert sentence in capsys.readouterr().err


def test_quality_of_an_update() -> None:
    """1 for what arrives, 0 for what is lost or goes astray."""
    wanted = torch.tensor([1.0, 2.0])
    assert quality(wanted, wanted) == 1 and quality(wanted / 2, wanted) == 0.5 and quality(0 * wanted, wanted) == 0
    assert quality(torch.tensor([-2.0, 1.0]), wanted) == 0 and quality(wanted, 0 * wanted) is None
