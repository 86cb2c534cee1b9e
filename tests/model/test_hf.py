"""Hugging Face checkpoints: names as recorded from transformers, configs and weights back and forth, equal logits."""

import json

import pytest
import torch

from lowprec.model import Activation, MambaConfig, ModelConfig, build, hf

SIZES = {"vocab_size": 96, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 48}
HYBRID = {"layers": 3, "pattern": "M-*", "activation": Activation.relu2, "rope_theta": None}
MAMBA = {"heads": 8, "head_dim": 8, "groups": 2, "state": 6}
FAMILIES = {
    "llama": ModelConfig(**SIZES, rope_theta=5e5),
    "llama_tied": ModelConfig(**SIZES, tie_embeddings=True),
    "qwen3": ModelConfig(**SIZES, qk_norm=True, norm_eps=1e-6, rope_theta=1e6),
    "nemotron_h": ModelConfig(**SIZES | HYBRID, mamba=MambaConfig(**MAMBA)),
    "nemotron_h_limited": ModelConfig(**SIZES | HYBRID, mamba=MambaConfig(**MAMBA, dt_low=0.02)),
}
# parameters of one layer of each in transformers 5.23, without "model.layers.N." / "backbone.layers.N." and ".weight"
RECORDED = {
    "llama": "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    "qwen3": "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj self_attn.q_norm self_attn.k_norm mlp.gate_proj mlp.up_proj mlp.down_proj",
}
RECORDED_HYBRID = [
    "norm mixer.A_log mixer.D mixer.dt_bias mixer.conv1d mixer.conv1d.bias mixer.in_proj mixer.norm mixer.out_proj",
    "norm mixer.up_proj mixer.down_proj",
    "norm mixer.q_proj mixer.k_proj mixer.v_proj mixer.o_proj",
]


def make(config, seed=0):
    """fp32, with weights large enough that every part matters, and norms that are not 1."""
    model = build(config, torch.float32)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_names_of_transformers(kind):
    """Every name is the one that transformers has, and every name of transformers has one of ours."""
    names = hf.names(FAMILIES[kind])
    layers = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in RECORDED[kind].split()]
    assert sorted(names.values()) == sorted(
        [*layers, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    )
    assert list(names) == [name for name, _ in make(FAMILIES[kind]).named_parameters()]


def test_names_of_nemotron_h():
    """The names in NVIDIA's published files: backbone.*, one norm and one mixer a layer."""
    wanted = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    for i, line in enumerate(RECORDED_HYBRID):
        for name in line.split():
            bare = name.rpartition(".")[2] in ("A_log", "D", "dt_bias", "bias")
            wanted.add(f"backbone.layers.{i}.{name}" + ".weight" * (not bare))
    assert set(hf.names(FAMILIES["nemotron_h"]).values()) == wanted


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [5e9, 20e3])
def test_round_trip_is_exact(kind, shard_bytes, tmp_path):
    """Config and fp32 weights come back as they were, from one file or several with an index."""
    config, model = FAMILIES[kind], make(FAMILIES[kind])
    files = hf.save(tmp_path, config, model.state_dict(), torch.float32, shard_bytes, eos_token_id=7)
    assert json.loads(files[0].read_text())["eos_token_id"] == 7
    if shard_bytes < 5e9:
        index = json.loads(files[-1].read_text())
        assert len(files) > 4 and all((tmp_path / name).is_file() for name in index["weight_map"].values())
        assert sorted(index["weight_map"]) == sorted(hf.names(config).values())
        assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert hf.read_config(tmp_path) == config
    again = build(hf.read_config(tmp_path), torch.float32)
    hf.load(again, tmp_path)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_weights_are_stored_in_the_wished_dtype(tmp_path):
    """bf16 by default, and read into fp32 parameters; transformers' own prefix is read too."""
    config, model = FAMILIES["nemotron_h"], make(FAMILIES["nemotron_h"])
    file = hf.save(tmp_path, config, model.state_dict())[1]
    from safetensors.torch import load_file, save_file

    stored = load_file(file)
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    save_file({name.replace("backbone.", "model."): w for name, w in stored.items()}, file)
    again = build(config, torch.float32)
    hf.load(again, tmp_path)
    assert all(torch.equal(p.bfloat16().float(), q) for p, q in zip(model.parameters(), again.parameters()))


def test_a_published_config_is_read():
    """Entries of Nemotron-H-8B's config.json, as older versions write them, and of a Llama 3."""
    config = hf.from_hf_config(NEMOTRON_H_8B)
    assert (config.layers, config.count_blocks("M"), config.count_blocks("*")) == (52, 24, 4)
    assert config.mamba == MambaConfig(heads=128, head_dim=64, groups=8, state=128, conv=4, expand=2)
    assert (config.dim_per_head, config.kv_heads, config.rope_theta) == (128, 8, None)
    assert hf.from_hf_config(NEMOTRON_H_8B | {"hidden_size": 4480}).mamba.expand is None  # as the pruned 9B has it
    limits = [0.0, {"__float__": "Infinity"}]  # as transformers 5 writes it
    assert hf.from_hf_config(NEMOTRON_H_8B | {"time_step_limit": limits}) == config
    blocks = {"hybrid_override_pattern": None, "layers_block_type": ["linear_attention", "mlp", "full_attention"]}
    assert hf.from_hf_config(NEMOTRON_H_8B | blocks).pattern == "M-*"
    assert hf.from_hf_config(hf.to_hf_config(FAMILIES["llama"]) | {"rope_parameters": None}) == FAMILIES["llama"]


NEMOTRON_H_8B = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    **{"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "max_position_embeddings": 8192},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128, "expand": 2},
    **{"mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4},
    **{"time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "mlp_hidden_act": "relu2"},
}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llama", {"model_type": "mistral"}, r"'mistral': it must be one of \['llama', 'qwen3', 'nemotron_h'\]"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "stretches RoPE .rope_type 'llama3'",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias: true"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*"}, r"\['E'\] in 'ME\*'"),
    ],
)
def test_other_architectures_are_refused(kind, change, words):
    """A config.json that this model cannot be is named with what is wrong."""
    with pytest.raises(ValueError, match=words):
        hf.from_hf_config(hf.to_hf_config(FAMILIES[kind]) | change)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(**SIZES, activation=Activation.relu2), "Llama and Qwen3 have model.activation=swiglu"),
        (
            ModelConfig(**SIZES | HYBRID | {"rope_theta": 1e4}, mamba=MambaConfig(**MAMBA)),
            "rope_theta=None, .* 10000.0",
        ),
        (ModelConfig(**SIZES | HYBRID, mamba=MambaConfig(**MAMBA, dt_high=1.0)), "dt_high must be null"),
    ],
)
def test_models_that_no_family_holds_are_refused(config, words):
    """Export says why, instead of writing a file that means something else."""
    with pytest.raises(ValueError, match=words):
        hf.names(config)


def test_wrong_weights_are_refused(tmp_path):
    """Missing, unknown and misshapen weights, and a folder without a config, by name."""
    config, model = FAMILIES["llama"], make(FAMILIES["llama"])
    weights = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"not those of the config: lm_head\.weight"):
        hf.save(tmp_path, config, {name: w for name, w in weights.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hf.read_config(tmp_path)
    hf.save(tmp_path, config, weights)
    with pytest.raises(ValueError, match=r"shape \[96, 32\], and the model \[97, 32\]"):
        hf.load(build(ModelConfig(**SIZES | {"vocab_size": 97}), torch.float32), tmp_path)
    with pytest.raises(ValueError, match=r"no weight model\.layers\.0\.self_attn\.q_norm\.weight, which layers"):
        hf.load(build(FAMILIES["qwen3"], torch.float32), tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_gives_the_same_logits(kind, tmp_path):
    """from_pretrained finds every weight, computes our logits, and what it saves is read back as it was."""
    transformers = pytest.importorskip("transformers")
    config, model = FAMILIES[kind], make(FAMILIES[kind])
    hf.save(tmp_path / "ours", config, model.state_dict(), torch.float32)
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    x_BT = torch.randint(96, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x_BT).logits, model(x_BT), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert hf.read_config(tmp_path / "theirs") == config
    again = build(config, torch.float32)
    hf.load(again, tmp_path / "theirs")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
