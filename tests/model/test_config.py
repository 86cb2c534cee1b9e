"""The configuration refuses impossible sizes in one sentence, and every shipped YAML is a valid one."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lowprec
from lowprec.model import Activation, MambaConfig, ModelConfig, build, count_parameters

RECIPES = sorted((Path(lowprec.__file__).parent / "recipes" / "model").glob("*.yaml"))


SIZES = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "nemotron_h_12b": 12_310_001_152,
    "nemotron_h_8b": 8_084_075_520,
    "transformer_1b2": 1_291_929_600,
}
"""Of published models; of the released checkpoints for Llama and Qwen, and "12.31B" on the hybrid's model card."""


def load(path):
    """A YAML file as Hydra would read it: strict, no key that the dataclass lacks."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 3}, r"kv_heads 3 does not divide model.heads 4: use one of \[1, 2, 4\]"),
        ({"dim": 250}, "250 is no multiple of model.heads 4"),
        ({"dim": 12, "heads": 4}, "head_dim is 3: RoPE rotates pairs"),
        ({"layers": 0}, "model.layers is 0"),
        ({"head_dim": 0}, "model.head_dim is 0"),
        ({"activation": "swiglo"}, r"did you mean swiglu\?"),
        ({"rope_theta": -1.0}, "model.rope_theta is -1.0"),
        ({"init_std": 0.0}, "must both be positive"),
        ({"pattern": "M-x*"}, r"has \['x'\]"),
        ({"pattern": "-*-"}, "names 3 blocks but model.layers is 4"),
        ({"pattern": "M-*-"}, "model.mamba is null"),
        ({"pattern": "M-*-", "mamba": MambaConfig(heads=3)}, "is 240 but expand . dim is 512"),
        ({"pattern": "M-*-", "mamba": MambaConfig(heads=32, head_dim=16, groups=5)}, "groups 5 does not divide"),
        ({"pattern": "M-*-", "mamba": {"state": 0}}, "model.mamba.state is 0"),
        ({"pattern": "M-*-", "mamba": {"dt_low": 0.1, "dt_high": 0.1}}, "dt_low is 0.1 and dt_high 0.1"),
    ],
)
def test_impossible_sizes_are_named(change, words):
    """Each mistake raises one sentence with the field and what would be valid."""
    with pytest.raises(ValueError, match=words) as error:
        ModelConfig(
            **change | ({"mamba": MambaConfig(**mamba)} if isinstance(mamba := change.get("mamba"), dict) else {})
        )
    assert str(error.value).count(". ") == 0


def test_activation_may_be_given_by_name():
    """A plain string from YAML or Python becomes the enum."""
    assert ModelConfig(activation="relu2").activation is Activation.relu2  # type: ignore[arg-type]


def test_recipes_are_found():
    """The parametrised tests below are not empty."""
    assert {p.stem for p in RECIPES} >= SIZES.keys() | {"llama_tiny", "llama_4m", "llama_130m", "nemotron_h_tiny"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_complete_and_divisible(path):
    """Each YAML names every field, comments every key, and has block dimensions that 128-wide blocks divide."""
    config = load(path)
    assert set(OmegaConf.load(path)) == set(ModelConfig.__dataclass_fields__)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all("#" in line for line in lines if line != "mamba:")
    widths = [config.dim, config.ffn_dim, config.heads * config.dim_per_head, config.kv_heads * config.dim_per_head]
    assert all(width % 128 == 0 for width in widths)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_builds_on_meta(path):
    """The parameters of each model on the meta device are as many as its config counts, and as are published."""
    config = load(path)
    with torch.device("meta"):
        model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == count_parameters(config)["total"] == SIZES.get(path.stem, parameters)
    assert "".join(block.kinds for block in model.layers) == (config.pattern or "*-" * config.layers)
