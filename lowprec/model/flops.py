"""Parameters and FLOPs from a `ModelConfig` alone: no tensors, so a 12B hybrid costs nothing.

A product of (M, K) by (K, N) is 2 M N K FLOPs, so a weight matrix costs 2 FLOPs per value and token forward. Training
costs three times that: fprop, dgrad and wgrad are the same size. Causal attention at sequence length T looks at (T +
1) / 2 keys on average, so QK and PV cost 2 H D (T + 1) / 2 each per token and block (documents shorter than T cost
less; kernels that compute the masked half cost more). Norms, activations, softmax and the embedding's lookup are not
matrix products and are left out.

A Mamba-2 block (arXiv:2405.21060) with inner width I, groups g, state s, heads h has in_proj dim x (2 I + 2 g s + h),
a convolution over I + 2 g s channels, three vectors of h, a gated norm of I, and out_proj I x dim. Its scan is
counted as the recurrence: decay, input product, sum, and read-out, 5 I s per token forward; chunked kernels do more.
"""

from .config import Activation, ModelConfig


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Weight matrices by name -> (how many, inputs, outputs), in the order of the forward pass."""
    q_dim, kv_dim = config.heads * config.dim_per_head, config.kv_heads * config.dim_per_head
    dim, ffn = config.dim, config.ffn_dim
    attention, mlp, mamba = (config.count_blocks(kind) for kind in "*-M")
    shapes = {}
    if mamba and config.mamba is not None:
        m = config.mamba
        inner = m.heads * m.head_dim
        shapes["in_proj"] = (mamba, dim, 2 * inner + 2 * m.groups * m.state + m.heads)
        shapes["out_proj"] = (mamba, inner, dim)
    if attention:
        shapes |= {
            "q_proj": (attention, dim, q_dim),
            "k_proj": (attention, dim, kv_dim),
            "v_proj": (attention, dim, kv_dim),
            "o_proj": (attention, q_dim, dim),
        }
    if mlp:
        gate = {"gate_proj": (mlp, dim, ffn)} if config.activation is Activation.swiglu else {}
        shapes |= gate | {"up_proj": (mlp, dim, ffn), "down_proj": (mlp, ffn, dim)}
    return shapes | {"lm_head": (1, dim, config.vocab_size)}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: embed, attention, mlp, mamba, norm, lm_head (0 when tied), total, and non_embedding.

    non_embedding = total - embed - lm_head, the count that scaling laws usually call N.
    """
    sizes = {name: count * n_in * n_out for name, (count, n_in, n_out) in linear_shapes(config).items()}
    attention, mlp, mamba = (config.count_blocks(kind) for kind in "*-M")
    parts = {
        "embed": config.vocab_size * config.dim,
        "attention": sum(sizes.get(f"{p}_proj", 0) for p in "qkvo"),
        "mlp": sum(sizes.get(f"{p}_proj", 0) for p in ("gate", "up", "down")),
        "mamba": sizes.get("in_proj", 0) + sizes.get("out_proj", 0),
        "norm": (attention + mlp + mamba + 1) * config.dim + config.qk_norm * 2 * attention * config.dim_per_head,
        "lm_head": 0 if config.tie_embeddings else sizes["lm_head"],
    }
    if mamba and config.mamba is not None:
        m = config.mamba
        inner = m.heads * m.head_dim
        conv = (inner + 2 * m.groups * m.state) * (m.conv + 1)  # taps and bias
        parts["mamba"] += mamba * (conv + 3 * m.heads)  # A, D and the bias of dt
        parts["norm"] += mamba * inner
    total = sum(parts.values())
    return parts | {"total": total, "non_embedding": total - parts["embed"] - parts["lm_head"]}


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> dict[str, float]:
    """FLOPs per token by matrix product, summed over the blocks, with "total" last.

    Keys: the linears' names (q_proj ... lm_head), attention_qk, attention_pv, and for a hybrid mamba_conv,
    mamba_scan. training: forward + backward (three times the forward); False: the forward alone.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be at least 1.")
    flops = {name: 2.0 * count * n_in * n_out for name, (count, n_in, n_out) in linear_shapes(config).items()}
    core = config.count_blocks("*") * config.heads * config.dim_per_head * (seq_len + 1.0)
    flops |= {"attention_qk": core, "attention_pv": core}
    if (mamba := config.count_blocks("M")) and config.mamba is not None:
        m = config.mamba
        inner = m.heads * m.head_dim
        flops["mamba_conv"] = 2.0 * mamba * m.conv * (inner + 2 * m.groups * m.state)
        flops["mamba_scan"] = 5.0 * mamba * inner * m.state
    flops = {name: value * (3 if training else 1) for name, value in flops.items()}
    return flops | {"total": sum(flops.values())}
