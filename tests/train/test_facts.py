"""facts.json: its numbers are right for every precision; it is in the run folder and in W&B, whatever happens."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lowprec.config import Run, load
from lowprec.launch.train import SHIPPED, compose_run, main
from lowprec.linear import Plan, load_precision
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.model import count_parameters, flops_per_token
from lowprec.train import REQUEUE, Stop, plan_model
from lowprec.train.facts import facts_of
from lowprec.train.folder import Folder
from tests.layouts import settings as settings_in
from tests.ranks import run as on_ranks
from tests.train.test_tracker import offline_file

DATA = {"tokenizer": {"name": "byte"}, "sources": [{"hash": "a"}, {"hash": "b"}]}
PRECISIONS = sorted(path.stem for path in (SHIPPED / "precision").glob("*.yaml"))
OPERANDS = [f"{role}.{name}" for role, names in GEMM_OPERANDS.items() for name in names]
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def tiny() -> Run:
    return load(compose_run(["recipe=nvfp4_tiny", "train.steps=1000", "seed=7", "name=mine"], []))


def facts_with(run: Run, precision: str, **changes: Any) -> tuple[Facts, Plan]:
    """Facts of a run under a shipped precision file, some of whose keys are others."""
    node = yaml.safe_load((SHIPPED / "precision" / f"{precision}.yaml").read_text()) | changes
    run = replace(run, precision=node)
    _, plan = plan_model(run)
    return facts_of(run, plan, DATA), plan


def test_what_does_not_depend_on_the_precision(tiny: Run) -> None:
    """Sizes, tokens, FLOPs, learning rate and data, against the functions that count them."""
    facts, plan = facts_with(tiny, "bf16")
    counts = count_parameters(tiny.model)
    assert facts["parameters"] == {"total": counts["total"], "non_embedding": counts["non_embedding"]}
    assert counts["non_embedding"] == counts["total"] - 4096 * 128, "tied: one matrix is embedding and head"
    assert facts["flops_per_token"] == flops_per_token(tiny.model, 256)["total"]
    assert (facts["steps"], facts["tokens_per_step"], facts["tokens"]) == (1000, 8 * 256, 1000 * 8 * 256)
    assert facts["schedule"] == {"shape": "wsd", "warmup_steps": 50, "decay_steps": 500, "final_frac": 0.01}
    assert (facts["name"], facts["seed"], facts["optimizer"], facts["lr"]) == ("mine", 7, "AdamW", tiny.optim.lr)
    assert facts["data"] == {"seq_len": 256, "tokenizer": "byte", "vocab_size": 4096, "hash": "a+b"}
    assert (facts["version"], facts["loss_unit"], facts["plan"]) == (1, "nats per token", plan.fingerprint())


def test_nothing_is_quantised_in_bf16(tiny: Run) -> None:
    facts, _ = facts_with(tiny, "bf16")
    assert (facts["precision"], facts["quantized_frac"], facts["attention"]) == ("bf16", 0.0, None)
    assert facts["operands"] == dict.fromkeys(OPERANDS) and facts["precision_schedule"] == []


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_shipped_precision_has_facts(tiny: Run, name: str) -> None:
    """Plain finite JSON that says what the recipe's six operands are, and what share of the layers is quantised."""
    facts, plan = facts_with(tiny, name)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    recipe = plan.precision.linear[facts["precision"]]
    assert list(facts["operands"]) == OPERANDS and recipe.quantized == any(facts["operands"].values())
    for operand, told in facts["operands"].items():
        role, _, side = operand.partition(".")
        gemm = getattr(recipe, role)
        spec = gemm.a if GEMM_OPERANDS[role][0] == side else gemm.b
        assert (told is None) == (spec.format is None)
        if told is not None and spec.format is not None:
            assert (told["format"], told["rounding"]) == (spec.format.name, spec.rounding)
            assert (
                told["bits"] == spec.format.bits
                and told["bits"] <= told["bits_per_value"] <= told["bits"] + 2
                and 0 < told["gaussian_mse"] < 0.5
            )
            assert told["rotation"] == (gemm.inner.size if gemm.inner else None)
            assert (told["split"] == "") == (spec.split is None)
    inside = [layer for name, layer in plan.layers.items() if "." in name]
    quantised = sum(layer.weight.numel() for layer in inside if layer.recipe.quantized)
    assert facts["quantized_frac"] == quantised / sum(layer.weight.numel() for layer in inside)
    assert (facts["attention"] is None) == ("attention" not in name)


@pytest.mark.parametrize(
    ("name", "operand", "told"),
    [
        ("nvfp4", "fprop.x", {"element": "e2m1", "exponent_bits": 2, "mantissa_bits": 1, "bits": 4, "block": [1, 16],
                              "bits_per_value": 4.5, "scale": "e4m3", "rounding": "nearest", "rotation": None}),
        ("nvfp4", "dgrad.dy", {"bits": 4, "rounding": "stochastic", "rotation": None}),
        ("nvfp4", "wgrad.dy", {"bits": 4, "rounding": "stochastic", "rotation": 16}),
        ("nvfp4", "dgrad.w", {"format": "nvfp4_2d", "block": [16, 16], "bits_per_value": 4 + 8 / 256}),
        ("mxfp4", "wgrad.dy", {"element": "e2m1", "bits_per_value": 4.25, "block": [1, 32], "scale": "e8m0"}),
        ("fp8_blockwise", "fprop.w", {"element": "e4m3", "exponent_bits": 4, "mantissa_bits": 3, "bits": 8,
                                      "block": [128, 128], "bits_per_value": 8 + 32 / 128**2}),
        ("fp8_blockwise", "wgrad.x", {"block": [1, 128], "bits_per_value": 8.25}),
        ("quest_w4a4", "fprop.w", {"element": "midrise4", "exponent_bits": None, "mantissa_bits": None, "bits": 4,
                                   "block": [1, 0], "bits_per_value": 4 + 32 / 1024, "rotation": 128}),
        ("quest_w4a4", "dgrad.w", None),
        ("quest_w4a4", "dgrad.dy", None),
        ("halo2_fp8", "fprop.x", {"bits": 8, "block": [0, 0], "rotation": 0}),
        ("halo2_fp8", "dgrad.dy", {"bits": 8, "rotation": None}),
        ("fp8_delayed", "wgrad.dy", {"element": "e5m2", "exponent_bits": 5, "mantissa_bits": 2, "bits": 8}),
        ("masked_e8m3", "fprop.x", {"exponent_bits": 8, "mantissa_bits": 3, "bits": 12, "scale": "none"}),
        ("averis", "fprop.x", {"bits": 4, "split": "mean, quantized"}),
        ("metis_lowrank", "fprop.w", {"bits": 4, "split": "rank 8, quantized"}),
        ("bitnet_158", "fprop.w", {"element": "ternary", "bits": 2}),
    ],
)  # fmt: skip
def test_operands_as_the_papers_have_them(tiny: Run, name: str, operand: str, told: Facts | None) -> None:
    """Elements, bits with scales, blocks, rotations and splits, against numbers written down by hand."""
    found = facts_with(tiny, name)[0]["operands"][operand]
    assert (found is None) == (told is None) and (told is None or {key: found[key] for key in told} == told)


# ---- gaussian_mse against other code


def grid(levels: list[float]) -> Callable[[Tensor], Tensor]:
    """Rounds to the nearest of the levels and their negatives."""
    values = torch.tensor(sorted({sign * level for level in levels for sign in (1, -1)}), dtype=torch.float64)
    return lambda x: values[torch.searchsorted((values[1:] + values[:-1]) / 2, x)]


E2M1 = grid([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(x: Tensor) -> Tensor:
    blocks = x.view(-1, 16)
    tensor = x.abs().max() / (6 * 448)
    scale = (blocks.abs().amax(1, keepdim=True) / 6 / tensor).to(torch.float8_e4m3fn).double() * tensor
    return (E2M1(blocks / scale) * scale).view(x.shape)


def mxfp4(x: Tensor) -> Tensor:
    blocks = x.view(-1, 32)
    scale = 2 ** torch.ceil(torch.log2(blocks.abs().amax(1, keepdim=True) / 6))
    return (E2M1(blocks / scale) * scale).view(x.shape)


def fp8_1x128(x: Tensor) -> Tensor:
    blocks = x.view(-1, 128)
    scale = blocks.abs().amax(1, keepdim=True) / 448
    return ((blocks / scale).float().to(torch.float8_e4m3fn).double() * scale).view(x.shape)


def quest(x: Tensor) -> Tensor:
    scale = 2.51393058 * x.square().mean(1, keepdim=True).sqrt() / 7.5
    return grid([i + 0.5 for i in range(8)])(x / scale) * scale


@pytest.mark.parametrize(
    ("name", "rounded"), [("nvfp4", nvfp4), ("mxfp4", mxfp4), ("fp8_blockwise", fp8_1x128), ("quest_w4a4", quest)]
)
def test_the_error_on_gaussian_numbers(tiny: Run, name: str, rounded: Callable[[Tensor], Tensor]) -> None:
    """Another implementation on other numbers gives the same within the noise of both samples (256 rows of 1,024)."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_row = (rounded(x) - x).square().sum(1) / x.square().sum(1)
    expected, standard_error = by_row.mean().item(), by_row.std().item() / 16
    found = facts_with(tiny, name)[0]["operands"]["fprop.x"]["gaussian_mse"]
    assert abs(found - expected) < 3 * math.sqrt(2) * standard_error, (found, expected, standard_error)


def test_stochastic_rounding_doubles_the_error(tiny: Run) -> None:
    """Values spread evenly over a gap d have error d^2 / 12 rounded to nearest and d^2 / 6 rounded stochastically."""
    operands = facts_with(tiny, "nvfp4")[0]["operands"]
    ratio = operands["dgrad.dy"]["gaussian_mse"] / operands["fprop.x"]["gaussian_mse"]
    assert ratio == pytest.approx(2, rel=0.1), "a Gaussian is not quite even over the gaps"


# ---- which recipe, and how much


def test_a_part_in_bf16_changes_the_share_and_not_the_name(tiny: Run) -> None:
    """First and last blocks in bf16: one of four blocks follows nvfp4, and still that is what the run is."""
    facts, plan = facts_with(tiny, "nvfp4")
    assert {name for name, layer in plan.layers.items() if layer.recipe.quantized and ".2." not in name} == set()
    assert (facts["precision"], facts["quantized_frac"]) == ("nvfp4", 0.25) and all(facts["operands"].values())
    deep, _ = facts_with(replace(tiny, model=replace(tiny.model, layers=20)), "nvfp4")
    assert (deep["precision"], deep["quantized_frac"]) == ("nvfp4", 15 / 20)
    attention = 4 * 128 * 128 / (4 * 128 * 128 + 3 * 128 * 384)
    mixed, _ = facts_with(tiny, "exploring_fp4")
    assert (mixed["precision"], mixed["quantized_frac"]) == ("exploring_fp4", 1.0), "most parameters are in the MLPs"
    rules = [{"match": "*.mlp.*", "recipe": "bf16"}, {"match": "layers.*", "recipe": "nvfp4"}]
    part, _ = facts_with(tiny, "nvfp4", rules=[*rules, {"match": "lm_head", "recipe": "nvfp4"}])
    assert part["quantized_frac"] == pytest.approx(attention), "by parameters inside the blocks, without the head"


def test_changes_during_training_are_told(tiny: Run) -> None:
    """The switch of nvfp4_late_bf16; a change at the very start is the run's beginning; unused ones are not told."""
    late, _ = facts_with(tiny, "nvfp4_late_bf16")
    change = {"from": 0.82, "of": "nvfp4_late_bf16", "recipe": "bf16", "gemm": "fprop"}
    assert late["precision_schedule"] == [change] and all(late["operands"].values())
    early, _ = facts_with(tiny, "nvfp4", schedule=[{"from": 0, "set": {"nvfp4.wgrad": "bf16"}}])
    assert [name for name, told in early["operands"].items() if told is None] == ["wgrad.dy", "wgrad.x"]
    other, _ = facts_with(tiny, "nvfp4", schedule=[{"from": 0.5, "set": {"nvfp4_te_2_14": "bf16"}}])
    assert other["precision_schedule"] == []


def test_quantised_attention_is_told(tiny: Run) -> None:
    """Linear layers in bf16 do not make a bf16 run of one whose attention is quantised."""
    facts, _ = facts_with(tiny, "int8_attention")
    assert facts["precision"] == "bf16" and any("int8_row" in line for line in facts["attention"])


def test_a_hybrid_has_facts() -> None:
    """Mamba-2 blocks are counted with the others; their two projections are linear layers inside blocks."""
    run = load(compose_run(["recipe=nvfp4_tiny", "model=nemotron_h_8b"], []))

    class Block(nn.Module):
        def __init__(self, **sizes: tuple[int, int]) -> None:
            super().__init__()
            for name, (inputs, outputs) in sizes.items():
                self.add_module(name, nn.Linear(inputs, outputs, bias=False, device="meta"))

    model = nn.Module()
    model.layers = nn.ModuleList([Block(in_proj=(128, 512), out_proj=(256, 128)), Block(up_proj=(128, 384))])
    model.lm_head = nn.Linear(128, 1024, bias=False, device="meta")
    rules = [{"match": "lm_head", "recipe": "bf16"}, {"match": "*.up_proj", "recipe": "bf16"}]
    node = yaml.safe_load((SHIPPED / "precision" / "nvfp4.yaml").read_text())
    plan = Plan.of(model, load_precision(node | {"rules": [*rules, {"match": "*", "recipe": "nvfp4"}]}))
    facts = facts_of(run, plan, DATA)
    assert facts["parameters"]["non_embedding"] == count_parameters(run.model)["non_embedding"] > 6e9
    mamba = 128 * 512 + 256 * 128
    assert (facts["precision"], facts["quantized_frac"]) == ("nvfp4", mamba / (mamba + 128 * 384))


# ---- in the run folder


def test_a_run_keeps_its_facts(train, read, tmp_path: Path, monkeypatch) -> None:
    """Written once a start; those of a run that was stopped and resumed are the same to the byte; and W&B has them."""
    kept: list[str] = []
    keep, poll = Folder.keep, Stop.poll
    monkeypatch.setattr(Folder, "keep", lambda self, name, text: kept.append(name) or keep(self, name, text))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "poll", lambda self, world: "asked" if read_or_none(tmp_path) else poll(self, world))
        assert train(tmp_path, "monitor.wandb=offline") == REQUEUE
    before = (tmp_path / "facts.json").read_bytes()
    facts = json.loads(before)
    assert train(tmp_path, "monitor.wandb=offline") == 0
    assert (tmp_path / "facts.json").read_bytes() == before and kept.count("facts.json") == 2

    last = read(tmp_path)[-1]
    assert (facts["steps"], facts["tokens"], facts["plan"]) == (last["step"], last["tokens"], last["plan"])
    assert facts["data"]["vocab_size"] == 320 and facts["data"]["hash"] in (tmp_path / "data.json").read_text()
    runs = [offline_file(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert [run["config"]["facts"] for run in runs] == [facts] * 2


def read_or_none(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def _train_and_tell(words: list[str], output: str) -> tuple[int, list[str]]:
    """(exit code, the small files that this rank has written)."""
    sys.stdout = sys.stderr = Path(output).open("a")  # noqa: SIM115 (the process ends with it)
    kept: list[str] = []
    keep = Folder.keep
    Folder.keep = lambda self, name, text: kept.append(name) or keep(self, name, text)  # type: ignore[method-assign]
    return main(words), kept


@pytest.mark.distributed
def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    """Two ranks: one file, with the numbers of the whole run."""
    words = [*settings_in(tmp_path), "recipe=nvfp4_tiny", f"run.dir={tmp_path / 'run'}", "train.eval_every=0"]
    results = on_ranks(2, _train_and_tell, words, str(tmp_path / "out"), timeout_s=120)
    assert [code for code, _ in results] == [0, 0], (tmp_path / "out").read_text()
    assert results[0][1].count("facts.json") == 1 and results[1][1] == []
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert (facts["tokens"], facts["tokens_per_step"]) == (4 * 8 * 64, 8 * 64)
    assert os.listdir(tmp_path / "run").count("facts.json") == 1
