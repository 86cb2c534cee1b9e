"""Hugging Face checkpoints of Llama, Qwen3 and Nemotron-H: names of weights, config.json and safetensors, both ways.

    save(folder, config, model.state_dict())          # config.json, model*.safetensors: what from_pretrained reads
    config = read_config(folder)
    model = build(config) ...                         # on meta, planned, sharded, given memory
    load(model, folder)                               # every rank reads what it needs

Three families hold what a `ModelConfig` can say; another architecture is refused by name:

    llama       attention + SwiGLU, RoPE                        arXiv:2407.21783
    qwen3       the same with QK-norm                           arXiv:2505.09388
    nemotron_h  a pattern of Mamba-2, attention, squared ReLU   arXiv:2504.03624

Tensors have the same layout here and there, so names are all that changes and a round trip is exact. A tied head is in
the file once, as the embedding. What config.json has no word for comes back as the default: vocab_multiple, and but for
Nemotron-H init_scale_residual, neither of which changes what a trained model computes.

Facts that one would otherwise look up, read in transformers 5.23:

- Nemotron-H's weights begin with `backbone.` in published files and `model.` inside transformers 5; both are read.
- transformers 5 keeps step sizes of Mamba-2 at or above config.time_step_min, which otherwise is a number of the
  initialisation. Megatron-LM and the code in NVIDIA's checkpoints limit them by time_step_limit, [0, inf]. So dt_low is
  read from time_step_limit, and written as both: as a time_step_min of 1e-30 where it is 0.
- Llama 3.1 and later stretch RoPE (`rope_type: llama3`), which is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import Activation, MambaConfig, ModelConfig
from .init import assign, plain_name
from .transformer import Transformer, build

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "nemotron_h": "NemotronHForCausalLM"}
"""Families, and the class of each in transformers."""

_TRANSFORMER = [
    (r"embed\.", "model.embed_tokens."),
    (r"norm\.", "model.norm."),
    (r"layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.mlp_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"layers\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
    (r"layers\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
]
_NEMOTRON_H = [
    (r"embed\.", "backbone.embeddings."),
    (r"norm\.", "backbone.norm_f."),
    (r"layers\.(\d+)\.(?:attn|mlp|mamba)_norm\.", r"backbone.layers.\1.norm."),
    (r"layers\.(\d+)\.(?:attn|mlp|mamba)\.", r"backbone.layers.\1.mixer."),
]

_LEAST_STEP = 1.0e-30  # a step size that limits nothing, for those who take its logarithm


# ---- names


def family(config: ModelConfig) -> str:
    """Which of the families a config is of. Raises ValueError if none can hold it, and says why."""
    if config.pattern is None:
        if config.activation is not Activation.swiglu or config.rope_theta is None:
            raise ValueError(
                "no Hugging Face family here holds this Transformer: Llama and Qwen3 have model.activation=swiglu and "
                "model.rope_theta; keep its weights under their own names"
            )
        return "qwen3" if config.qk_norm else "llama"
    wanted = {"activation": Activation.relu2, "rope_theta": None, "qk_norm": False, "tie_embeddings": False}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"Nemotron-H has model.{key}={getattr(value, 'name', value)}, and this hybrid "
                f"{getattr(getattr(config, key), 'name', getattr(config, key))}: no Hugging Face family here holds it"
            )
    if config.mamba is None:
        raise ValueError("Nemotron-H has Mamba-2 blocks, and model.mamba is null: no Hugging Face family here holds it")
    if config.mamba.dt_high is not None:
        raise ValueError(
            "transformers puts no upper limit on Nemotron-H's step sizes: model.mamba.dt_high must be null"
        )
    return "nemotron_h"


def names(config: ModelConfig) -> dict[str, str]:
    """Our name of each weight in a file -> Hugging Face's, in the model's order."""
    rules = _NEMOTRON_H if family(config) == "nemotron_h" else _TRANSFORMER
    return {name: _renamed(name, rules) for name in _shapes(config)}


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name  # lm_head


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in build(config).named_parameters()}  # a tied head once


# ---- config.json


def to_hf_config(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, Any]:
    """config.json of a model whose weights are stored as `dtype`; more: entries to add, such as eos_token_id."""
    kind = family(config)
    found: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if config.pattern is None:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        found |= {"hidden_act": "silu", "rms_norm_eps": config.norm_eps}
        found |= {"rope_theta": config.rope_theta, "rope_parameters": rope}  # before and since transformers 5
        return found | more
    m = config.mamba
    assert m is not None
    found |= {
        "hybrid_override_pattern": config.pattern,
        "layer_norm_epsilon": config.norm_eps,
        "mlp_hidden_act": "relu2",
        "rescale_prenorm_residual": config.init_scale_residual,
        "mamba_num_heads": m.heads,
        "mamba_head_dim": m.head_dim,
        "n_groups": m.groups,
        "ssm_state_size": m.state,
        "conv_kernel": m.conv,
        "expand": m.expand or 2,  # heads and head_dim are what counts
        "time_step_min": m.dt_low or _LEAST_STEP,
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": False,
    }
    return found | ({"time_step_limit": [m.dt_low, float("inf")]} if m.dt_low else {}) | more


def from_hf_config(found: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes. Raises ValueError if this model is not able to be it."""
    kind = found.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"config.json is of model_type {kind!r}: it must be one of {list(CLASSES)}")
    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "use_sliding_window"):
        if found.get(key):
            raise ValueError(f"config.json has {key}: true, which this model has not")
    common = {
        "vocab_size": found["vocab_size"],
        "dim": found["hidden_size"],
        "ffn_dim": found["intermediate_size"],
        "heads": found["num_attention_heads"],
        "kv_heads": found.get("num_key_value_heads") or found["num_attention_heads"],
        "head_dim": found.get("head_dim"),
        "tie_embeddings": found.get("tie_word_embeddings", False),
        "init_std": found.get("initializer_range", 0.02),
        "max_seq_len": found.get("max_position_embeddings", 2048),
    }
    if kind == "nemotron_h":
        return ModelConfig(**common | _hybrid(found))
    _demand(found, "hidden_act", "silu")
    return ModelConfig(
        **common,
        layers=found["num_hidden_layers"],
        norm_eps=found.get("rms_norm_eps", 1.0e-6),
        rope_theta=_rope_theta(found),
        qk_norm=kind == "qwen3",
    )


def _hybrid(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of Nemotron-H has and the others have not."""
    for key, value in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu"), ("use_conv_bias", True)):
        _demand(found, key, value)
    letters = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-"}
    kinds = found.get("layers_block_type") or found.get("layer_types") or []
    pattern = found.get("hybrid_override_pattern") or "".join(letters.get(kind, "?") for kind in kinds)
    if unknown := sorted({*pattern} - {*"M*-"}):
        raise ValueError(f"config.json has blocks other than Mamba-2, attention and MLP ({unknown} in {pattern!r})")
    inner, dim = found["mamba_num_heads"] * found["mamba_head_dim"], found["hidden_size"]
    low, high = (_number(limit) for limit in found.get("time_step_limit") or (0.0, float("inf")))
    return {
        "layers": len(pattern),
        "pattern": pattern,
        "head_dim": found.get("head_dim") or found.get("attention_head_dim"),
        "activation": Activation.relu2,
        "rope_theta": None,
        "norm_eps": found.get("layer_norm_epsilon", 1.0e-5),
        "init_scale_residual": found.get("rescale_prenorm_residual", True),
        "mamba": MambaConfig(
            heads=found["mamba_num_heads"],
            head_dim=found["mamba_head_dim"],
            groups=found["n_groups"],
            state=found["ssm_state_size"],
            conv=found["conv_kernel"],
            expand=None if inner % dim else inner // dim,
            dt_low=low,
            dt_high=None if high == float("inf") else high,
        ),
    }


def _number(value: Any) -> float:
    """A float of a config.json; transformers 5 writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _demand(found: Mapping[str, Any], key: str, value: object) -> None:
    if found.get(key, value) != value:
        raise ValueError(f"config.json has {key}: {found[key]!r}, and this model has {value!r} only")


def _rope_theta(found: Mapping[str, Any]) -> float:
    """The base of plain RoPE, where versions before and since transformers 5 keep it."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json stretches RoPE (rope_type {kind!r}), which this model does not")
    return float(rope.get("rope_theta") or found.get("rope_theta") or 10000.0)


# ---- files


def save(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: float = 5e9,
    **more: Any,
) -> list[Path]:
    """Writes config.json and the weights as `dtype`, in files of at most so many bytes (a larger tensor has its own).

    weights: by our names; what belongs to no weight is refused, a tied head is left out. more: for config.json.
    """
    table = names(config)
    given = {name: w for name, w in weights.items() if not (config.tie_embeddings and name == "lm_head.weight")}
    if given.keys() != table.keys():
        odd = sorted(given.keys() ^ table.keys())
        raise ValueError(f"the weights are not those of the config: {', '.join(odd[:3])}{' ...' * (len(odd) > 3)}")
    shards: list[list[str]] = [[]]
    size_bytes = total_bytes = 0
    for name, shape in _shapes(config).items():
        own_bytes = shape.numel() * dtype.itemsize
        if shards[-1] and size_bytes + own_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes, total_bytes = size_bytes + own_bytes, total_bytes + own_bytes
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "config.json"]
    files[0].write_text(json.dumps(to_hf_config(config, dtype, **more), indent=2) + "\n", encoding="utf-8")
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        many = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files.append(folder / f"model{many}.safetensors")
        save_file({table[name]: given[name].to(dtype).contiguous() for name in shard}, files[-1], {"format": "pt"})
        places |= {table[name]: files[-1].name for name in shard}
    if len(shards) > 1:
        files.append(folder / "model.safetensors.index.json")
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        files[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def read_config(folder: Path) -> ModelConfig:
    """The architecture of a checkpoint's folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    return from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def read_weights(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor as stored) of every weight, one at a time.

    Raises ValueError, before anything is read, if a weight is missing or has another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                name = re.sub(r"^model\.", "backbone.", key) if config.pattern is not None else key
                places[name], shapes[name] = (file, key), opened.get_slice(key).get_shape()
    table, wanted = names(config), _shapes(config)
    for ours, theirs in table.items():
        if theirs not in places:
            raise ValueError(f"{folder} has no weight {theirs}, which {ours} is to be read from")
        if shapes[theirs] != list(wanted[ours]):
            raise ValueError(f"{folder}: {theirs} has shape {shapes[theirs]}, and the model {list(wanted[ours])}")
    for file in files:
        with safe_open(file, "pt") as opened:
            for ours, theirs in table.items():
                if places[theirs][0] == file:
                    yield ours, opened.get_tensor(places[theirs][1])


@torch.no_grad()
def load(model: Transformer, folder: Path) -> None:
    """Fills what is there of a materialised model, sharded or not, from a folder; fp32 from whatever is stored."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, weight in read_weights(folder, model.config):
        if name in parameters:  # a pipeline stage has some
            assign(parameters[name], weight.float())
