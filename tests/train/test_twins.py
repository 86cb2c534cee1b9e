"""The published runs in miniature: a twin differs in size only, and the 12B's trains through every phase."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.config import Run, load
from lowprec.launch.train import compose_run, main
from lowprec.train import check, plan_model

FULL = ["nvfp4_12b", "fp8_12b", "nvfp4_8b", "bf16_8b", "nvfp4_1b2", "bf16_1b2"]


def composed(name: str) -> Run:
    return load(compose_run([f"recipe={name}"], []))


@pytest.mark.parametrize("name", FULL)
def test_a_twin_differs_in_size_only(name: str) -> None:
    """Same precision, decay, data phases and blocks; the rules leave the same blocks in high precision."""
    full, twin = composed(name), composed(f"{name}_tiny")
    assert twin.precision == full.precision and twin.data.phases == full.data.phases
    assert len(twin.data.sources) == len(full.data.sources)
    assert [s.weight for s in twin.data.sources] == [s.weight for s in full.data.sources]
    for key in ("shape", "decay_frac", "final_frac", "decay_shape"):
        assert getattr(twin.schedule, key) == getattr(full.schedule, key)
    for key in ("pattern", "layers", "activation", "rope_theta", "qk_norm", "tie_embeddings", "init_scale_residual"):
        assert getattr(twin.model, key) == getattr(full.model, key)
    assert (twin.optim.betas, twin.optim.weight_decay) == (full.optim.betas, full.optim.weight_decay)
    check(twin)
    recipes = [[(entry.layer, entry.recipe) for entry in plan_model(run)[1].entries] for run in (full, twin)]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize(
    ("name", "first", "last", "blocks"), [("nvfp4_12b", 2, 8, 62), ("fp8_12b", 1, 2, 62), ("nvfp4_8b", 0, 8, 52),
                                          ("nvfp4_1b2", 0, 4, 20)])  # fmt: skip
def test_blocks_in_high_precision(name: str, first: int, last: int, blocks: int) -> None:
    """As published (arXiv:2509.25149, appendix A): the first and the last blocks, and nothing else but the head."""
    _, plan = plan_model(composed(name))
    kept = {int(e.layer.split(".")[1]) for e in plan.entries if e.recipe == "bf16" and e.layer != "lm_head"}
    assert kept == {*range(first), *range(blocks - last, blocks)}


@pytest.mark.parametrize(("name", "tokens", "batch"), [("nvfp4_8b", 1e12, 768), ("nvfp4_1b2", 1e12, 768)])
def test_tokens_and_batch(name: str, tokens: float, batch: int) -> None:
    run = composed(name)
    assert run.train.steps * batch * 8192 == pytest.approx(tokens, rel=1e-5) and run.train.global_batch == batch
    assert run.schedule.warmup_steps == pytest.approx(8e9 / (batch * 8192), abs=1)


SHORT = "recipe=nvfp4_12b_tiny data.seq_len=64 train.global_batch=4 train.micro_batch=2 data.validation_sequences=4"
MORE = "train.steps=10 train.checkpoint_every=8 train.keep_last=5"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of ten steps: the decay begins with step 9, the last data phase and the switch come with step 10."""
    short = "recipe=nvfp4_12b_tiny data.seq_len=32 train.global_batch=2 train.micro_batch=1 train.steps=10"
    more = "data.validation_sequences=2 train.eval_high_precision=false train.checkpoint_every=8 train.keep_last=5"
    return [*short.split(), *more.split(), f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]


def test_the_12b_twin_through_every_phase(words: list[str], compare, tmp_path: Path) -> None:
    """On one rank, on two, and resumed between the begin of the decay and the switch: the same numbers. Resumed there
    without the schedule, step 9, which begins at 80 %, is the same, and step 10 is another."""
    assert main([*words, f"run.dir={tmp_path / 'one'}"]) == 0
    numbers = compare(tmp_path / "one")
    rates = [number[3] for number in numbers]
    assert len(numbers) == 10 and rates[1:8] == [2e-3] * 7 and rates[-1] == pytest.approx(2e-5)
    assert numbers[-1][2] < numbers[0][2]

    script = Path(__file__).parents[2] / "launch" / "train.py"
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run([*two, *words, f"run.dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert compare(tmp_path / "two") == numbers
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000010")
    assert main([*words, f"run.dir={tmp_path / 'two'}"]) == 0
    assert compare(tmp_path / "two") == numbers

    shutil.copytree(tmp_path / "one", tmp_path / "off")
    shutil.rmtree(tmp_path / "off" / "checkpoints" / "step_00000010")
    off = [f"run.dir={tmp_path / 'off'}", "precision.schedule=[]", "run.allow_change=true"]
    assert main([*words, *off]) == 0
    losses = [number[2] for number in compare(tmp_path / "off")]
    assert losses[:9] == [number[2] for number in numbers[:9]] and losses[9] != numbers[9][2]
