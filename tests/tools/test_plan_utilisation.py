"""Utilisation while a run goes on: ideal time by precision over the step's, the switch included, never above 1."""

from pathlib import Path

import pytest
import torch

from lowprec.launch.train import main
from lowprec.linear import Plan, load_precision
from lowprec.model import ModelConfig, build, flops_per_token
from lowprec.parallel.devices import HARDWARE
from lowprec.train import loop
from lowprec.train.metrics import Utilisation, hardware_of, read_metrics
from tests.ranks import run

CONFIG = ModelConfig(vocab_size=96, dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=128)
B200 = HARDWARE["b200"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.device("meta"):
        model = build(CONFIG)
    made = Plan.of(model, load_precision("nvfp4_late_bf16"))
    made.apply(model)
    return made


def test_ideal_over_measured(plan: Plan) -> None:
    """A step as fast as the peak has utilisation 1; MFU counts the same FLOPs at the bf16 peak, so FP4 exceeds 1."""
    use = Utilisation(plan, CONFIG, 32, 1024, 4, B200)
    use.lap(0.0)
    ideal = use.record(1.0)["ideal_s"]
    assert set(ideal) == {"fp4", "bf16"}
    use.lap(0.0)
    found = use.record(sum(ideal.values()))
    assert found["utilisation"] == pytest.approx(1.0) and found["mfu"] > 1
    flops = flops_per_token(CONFIG, 32)["total"] * 1024
    assert found["mfu"] == pytest.approx(flops / (4 * 2.25e15) / sum(ideal.values()))
    with torch.device("meta"):
        plain = Plan.of(build(CONFIG), load_precision("bf16"))
    bf16 = Utilisation(plain, CONFIG, 32, 1024, 4, B200)
    bf16.lap(0.0)
    same = bf16.record(1.0)
    assert same["utilisation"] == pytest.approx(same["mfu"])  # nothing is quantised


def test_a_record_across_the_switch(plan: Plan) -> None:
    """Each step counts with its own recipes: steps at the peak give 1 and not more, whatever a record spans."""
    use = Utilisation(plan, CONFIG, 32, 1024, 4, B200)
    seconds = []
    for progress in (0.5, 0.9):
        use.lap(progress)
        seconds.append(sum(use.record(1.0)["ideal_s"].values()))
    assert seconds[1] > seconds[0]
    for progress in (0.5, 0.9):
        use.lap(progress)
    assert use.record(sum(seconds) / 2)["utilisation"] == pytest.approx(1.0)


def test_no_peak_no_figure(plan: Plan) -> None:
    """A CPU has no published peak: the keys are left out."""
    assert hardware_of(torch.device("cpu")) is None
    use = Utilisation(plan, CONFIG, 32, 1024, 1, None)
    use.lap(0.0)
    assert use.record(1.0) == {}


def train_as_on_b200(words: list[str]) -> int:
    """A run that takes this machine for a B200."""
    loop.hardware_of = lambda device: B200
    return main(words)


def test_a_run_logs_it(settings: list[str], tmp_path: Path) -> None:
    """metrics.jsonl of a real run: ideal seconds by precision, their share of the step, and MFU beside it."""
    kept = [word for word in settings if not word.startswith(("train.steps", "train.checkpoint_every"))]
    words = ["recipe=nvfp4_tiny", *kept, "train.steps=3", "train.sample_tokens=0", f"run.dir={tmp_path / 'run'}"]
    assert run(1, train_as_on_b200, words) == [0]
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert set(record["ideal_s"]) == {"fp4", "bf16"}
        assert record["utilisation"] == pytest.approx(sum(record["ideal_s"].values()) / record["step_s"])
        assert 0 < record["utilisation"] < record["mfu"] < 1  # a CPU is no B200
