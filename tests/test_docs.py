"""The documentation keeps its word: its YAML works, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lowprec.linear import Plan, load_precision
from lowprec.model import ModelConfig, build, cross_entropy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def yaml_blocks(page: Path) -> dict[str, str]:
    """File name in the first comment line -> text, of each fenced yaml block."""
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return dict(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link and image of a page names something that exists."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not broken, f"{page.name} links to {broken}"


def test_the_precision_example_trains() -> None:
    """The worked recipe of docs/adding.md decides layers as described, and one step of it has finite gradients."""
    node = yaml.safe_load(yaml_blocks(ROOT / "docs" / "adding.md")["recipes/precision/fp4_forward.yaml"])
    model = build(ModelConfig(vocab_size=64, dim=64, layers=3, heads=2, kv_heads=2, ffn_dim=128), dtype=torch.bfloat16)
    plan = Plan.of(model, load_precision(node), seed=1)
    assert {e.layer for e in plan.entries if e.recipe == "bf16"} == {
        e.layer for e in plan.entries if e.layer == "lm_head" or e.layer.startswith("layers.0.")
    }
    plan.apply(model)
    model.init_weights(1)
    tokens_BT = torch.arange(128).reshape(2, 64) % 64
    loss, _ = cross_entropy(model(tokens_BT, None), tokens_BT.roll(-1, 1))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    fprop = "layers.1.attn.q_proj"
    assert plan.layers[fprop].recipe.fprop.quantized
    plan.at(0.95)
    assert not plan.layers[fprop].recipe.fprop.quantized and plan.layers[fprop].recipe.dgrad.quantized


def test_the_precision_example_is_planned_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    """DIR/precision/fp4_forward.yaml is chosen by `--config-dir DIR precision=fp4_forward` and printed in the plan."""
    (tmp_path / "precision").mkdir()
    text = yaml_blocks(ROOT / "docs" / "adding.md")["recipes/precision/fp4_forward.yaml"]
    (tmp_path / "precision" / "fp4_forward.yaml").write_text(text)
    words = ["--config-dir", str(tmp_path), "--plan", "recipe=bf16_tiny", "precision=fp4_forward"]
    done = subprocess.run(
        [sys.executable, "launch/train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "e5m2_1x64~" in done.stdout and "from 90% of training" in done.stdout


def test_the_run_example_composes(tmp_path: Path) -> None:
    """The run of docs/adding.md, in a folder of the user's own, is found by --config-dir and changes what it says."""
    text = yaml_blocks(ROOT / "docs" / "adding.md")["my_recipes/recipe/mine.yaml"]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    command = [sys.executable, "launch/train.py", "--config-dir", str(tmp_path), "--cfg", "job", "recipe=mine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    composed, wanted = yaml.safe_load(done.stdout), yaml.safe_load(text)
    assert composed["name"] == "mine"
    assert composed["train"]["steps"] == wanted["train"]["steps"] and composed["optim"]["lr"] == wanted["optim"]["lr"]
