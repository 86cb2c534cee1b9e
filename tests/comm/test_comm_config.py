"""comm= on the command line: every shipped file is valid, says what it costs, and contradictions are refused."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import lowprec
from lowprec.comm import CODECS, Codec, CommConfig

FILES = sorted((Path(lowprec.__file__).parent / "recipes" / "comm").glob("*.yaml"))


def read(path: Path) -> CommConfig:
    """As Hydra does: merged into the schema, so that an unknown key or a wrong type is an error."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CommConfig), yaml.safe_load(path.read_text())))
    assert isinstance(config, CommConfig)
    return config


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_files(path: Path) -> None:
    """Reads, checks, makes its codecs and feedback; the head says what it does, its bytes and its use."""
    config = read(path)
    config.check()
    assert isinstance(config.gradient_codec, Codec) and isinstance(config.between_codec, Codec)
    assert (config.new_feedback() is None) == (config.feedback.value == "none")
    head = path.read_text()
    for words in ("# What it does: ", "# Bytes per parameter and step", "# Use it: "):
        assert words in head, words


def test_the_default_is_exact() -> None:
    """Without comm= gradients travel in fp32 and weights in the dtype they are used in: fp32.yaml."""
    default = CommConfig()
    default.check()
    assert default == read(next(p for p in FILES if p.stem == "fp32"))
    assert default.gradient_codec == CODECS["fp32"] and default.weight_codec is None
    assert default.activation_codec == "none" and default.between_codec == CODECS["fp32"]


def test_codecs_of_a_config() -> None:
    """Rotation and rounding belong to gradients, on both levels, where they are quantised."""
    config = OmegaConf.to_object(
        OmegaConf.merge(
            OmegaConf.structured(CommConfig),
            {"gradients": "bf16", "gradients_between": "int4", "rotation": 32, "rounding": "stochastic",
             "weights": "int8", "activations": "fp8"},
        )
    )  # fmt: skip
    assert isinstance(config, CommConfig)
    config.check()
    assert config.gradient_codec == CODECS["bf16"] and config.between_codec == Codec("int4", 32, "stochastic")
    assert config.weight_codec == CODECS["int8"] and config.activation_codec == CODECS["fp8"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": "fp4"}, "comm.gradients=fp4 is no codec; choose one of fp32, bf16, fp8, int8, int4, nvfp4$"),
        ({"weights": ""}, "comm.weights= is no codec; choose one of .*, or compute"),
        ({"activations": "e4m3"}, "comm.activations=e4m3 is no codec; .*, or leave it empty"),
        ({"rotation": 64}, "comm.rotation=64: comm.gradients=fp32 is not quantised"),
        ({"rotation": 48, "gradients": "int4"}, "comm.rotation=48 is no power of two"),
        ({"rounding": "stochastic"}, "comm.rounding=stochastic: comm.gradients=fp32 is not quantised"),
        ({"feedback": "ef"}, "gradients of fp32 leave no error to feed back"),
        ({"feedback_reset": 9, "gradients": "fp8"}, "comm.feedback_reset=9: give steps"),
        ({"ranks_per_node": -1}, "comm.ranks_per_node=-1: give a number of ranks"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    """One sentence: what is wrong, and what to write instead."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CommConfig), settings))
    assert isinstance(config, CommConfig)
    with pytest.raises(ValueError, match=message):
        config.check()
