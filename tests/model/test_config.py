"""The configuration refuses impossible sizes in one sentence, and every shipped YAML is a valid one."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lowprec
from lowprec.model import Activation, MambaConfig, ModelConfig, build, count_parameters

RECIPES = sorted((Path(lowprec.__file__).parent / "recipes" / "model").glob("*.yaml"))


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
    ],
)
def test_impossible_sizes_are_named(change, words):
    """Each mistake raises one sentence with the field and what would be valid."""
    with pytest.raises(ValueError, match=words) as error:
        ModelConfig(**change)
    assert str(error.value).count(". ") == 0


def test_activation_may_be_given_by_name():
    """A plain string from YAML or Python becomes the enum."""
    assert ModelConfig(activation="relu2").activation is Activation.relu2  # type: ignore[arg-type]


def test_recipes_are_found():
    """The parametrised tests below are not empty."""
    assert {"llama_tiny", "llama_4m", "llama_130m", "llama3_8b", "transformer_1b2"} <= {p.stem for p in RECIPES}


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
def test_every_recipe_builds_on_meta_or_says_why_not(path):
    """A Transformer's parameters on the meta device equal the paper count; a hybrid is refused in one sentence."""
    config = load(path)
    with torch.device("meta"):
        if config.pattern is None:
            assert sum(p.numel() for p in build(config).parameters()) == count_parameters(config)["total"]
        else:
            with pytest.raises(ValueError, match="Mamba-2 blocks are not implemented yet"):
                build(config)
