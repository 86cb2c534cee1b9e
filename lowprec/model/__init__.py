"""Models: plain decoders that know nothing about precision.

    config = ModelConfig(dim=256, layers=4, heads=4, kv_heads=2, ffn_dim=768)
    with torch.device("meta"):
        model = build(config)                       # fp32 parameters, bf16 activations, no memory yet
    ...                                             # a precision plan and the sharding are applied here
    model.to_empty(device="cpu")
    model.init_weights(seed=0)                      # the same weights on any number of ranks
    logits_BTV = model(tokens_BT, document_ids_BT)
    loss_sum, z_sum = cross_entropy(logits_BTV, targets_BT, z_loss=1e-4)

`count_parameters` and `flops_per_token` need the config only; `generate` samples a continuation of a prompt. `hf` reads
and writes the names, configs and files of Hugging Face checkpoints.
"""

from .config import Activation, MambaConfig, ModelConfig
from .flops import count_parameters, flops_per_token
from .generate import Cached, generate
from .loss import IGNORE, cross_entropy
from .transformer import Transformer, build

__all__ = [
    "IGNORE",
    "Activation",
    "Cached",
    "MambaConfig",
    "ModelConfig",
    "Transformer",
    "build",
    "count_parameters",
    "cross_entropy",
    "flops_per_token",
    "generate",
]
