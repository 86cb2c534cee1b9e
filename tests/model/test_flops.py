"""Counts on paper equal what torch counts while the model runs, and the sizes published for known models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowprec.model import Activation, MambaConfig, ModelConfig, build, count_parameters, cross_entropy, flops_per_token
from lowprec.model.flops import linear_shapes

NEMOTRON_H_12B = ModelConfig(
    vocab_size=131072,
    dim=5120,
    layers=62,
    heads=40,
    kv_heads=8,
    head_dim=128,
    ffn_dim=20480,
    activation=Activation.relu2,
    rope_theta=None,
    pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    mamba=MambaConfig(heads=128, head_dim=80, groups=8, state=128, conv=4, expand=2),
)
LLAMA3_8B = ModelConfig(vocab_size=128256, dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, rope_theta=5e5)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(vocab_size=96, dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=80),
        ModelConfig(
            vocab_size=96, dim=32, layers=2, heads=4, kv_heads=1, head_dim=16, ffn_dim=80, activation=Activation.relu2
        ),
        ModelConfig(
            vocab_size=96, dim=32, layers=1, heads=2, kv_heads=2, ffn_dim=64, tie_embeddings=True, qk_norm=True
        ),
    ],
)
def test_flops_equal_those_torch_counts(config, monkeypatch):
    """Linears exactly, forward and training; attention after removing the masked half that torch's formula includes."""
    monkeypatch.setattr("lowprec.model.attention._BLOCK_TOKENS", 64)  # one block: full T x T products
    batch, length = 2, 64
    model = build(config, torch.float32)
    model.init_weights(0)
    x_BT = torch.zeros(batch, length, dtype=torch.int64)

    def full(training):
        ours = flops_per_token(config, length, training)
        core = ours["attention_qk"] + ours["attention_pv"]
        return batch * length * (ours["total"] - core + core * 2 * length / (length + 1))

    with FlopCounterMode(display=False) as forward:
        logits = model(x_BT)
    with FlopCounterMode(display=False) as backward:
        cross_entropy(logits, x_BT)[0].backward()
    assert forward.get_total_flops() == pytest.approx(full(False), rel=1e-12)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(full(True), rel=1e-12)


def test_names_are_those_of_the_linears():
    """Every nn.Linear of the model is counted under its own name, with its own shape."""
    config = ModelConfig()
    with torch.device("meta"):
        model = build(config)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = name.rpartition(".")[2]
            seen[key] = (seen.get(key, (0,))[0] + 1, module.in_features, module.out_features)
    assert linear_shapes(config) == seen
    assert set(flops_per_token(config, 8)) == set(seen) | {"attention_qk", "attention_pv", "total"}


def test_llama3_8b_has_the_published_size():
    """8.03 B parameters, and 6 FLOPs per parameter and token in its linears."""
    assert count_parameters(LLAMA3_8B)["total"] == 8_030_261_248
    flops = flops_per_token(LLAMA3_8B, 8192)
    linears = flops["total"] - flops["attention_qk"] - flops["attention_pv"]
    parts = count_parameters(LLAMA3_8B)
    assert linears == 6 * (parts["attention"] + parts["mlp"] + parts["lm_head"])


def test_hybrid_12b_has_the_published_size():
    """12.31 B: 5.87 MLP, 4.72 Mamba-2, 1.34 embedding and head, 0.38 attention."""
    parts = count_parameters(NEMOTRON_H_12B)
    billions = {name: round(n / 1e9, 2) for name, n in parts.items()}
    assert billions["total"] == 12.31
    assert (billions["mlp"], billions["mamba"], billions["attention"]) == (5.87, 4.72, 0.38)
    assert round((parts["embed"] + parts["lm_head"]) / 1e9, 2) == 1.34
    assert parts["non_embedding"] == parts["total"] - 2 * 131072 * 5120


def test_hybrid_flops_count_the_blocks_of_the_pattern():
    """Linears of a hybrid cost 6 FLOPs per value and token, and attention only its 6 blocks."""
    flops = flops_per_token(NEMOTRON_H_12B, 8192)
    assert flops["in_proj"] == 6 * 28 * 5120 * (2 * 10240 + 2 * 8 * 128 + 128)
    assert flops["up_proj"] == 6 * 28 * 5120 * 20480
    assert flops["attention_qk"] == 3 * 6 * 5120 * 8193
    assert flops["total"] == sum(value for name, value in flops.items() if name != "total")
    assert flops["mamba_scan"] < 0.02 * flops["total"]


def test_a_sequence_needs_a_token():
    """Length 0 is named."""
    with pytest.raises(ValueError, match="seq_len is 0"):
        flops_per_token(ModelConfig(), 0)
