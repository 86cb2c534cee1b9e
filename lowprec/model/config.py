"""What a decoder is made of: sizes, activation, position encoding, and the block pattern of a hybrid.

A `ModelConfig` holds shapes and choices of architecture only. How a matrix product is rounded is not here: precision
is a plan laid over the finished model, so one config serves every recipe.

Two families are described:

- a **Transformer** (`pattern: null`): `layers` blocks of attention + MLP (Llama, arXiv:2302.13971; with squared
  ReLU instead of SwiGLU, the Transformers of arXiv:2509.25149);
- a **hybrid** (`pattern: "M-M*-"`): one character a block, `M` Mamba-2 (arXiv:2405.21060), `-` MLP, `*` attention,
  as in Nemotron-H (arXiv:2504.03624).
"""

import difflib
from dataclasses import dataclass
from enum import Enum


class Activation(Enum):
    """The MLP's non-linearity: swiglu (gated, arXiv:2002.05202) or relu2 (squared ReLU, arXiv:2109.08668)."""

    swiglu = "swiglu"
    relu2 = "relu2"


@dataclass
class MambaConfig:
    """Sizes of a Mamba-2 block, arXiv:2405.21060. Its inner width is heads * head_dim, which `expand` may check."""

    heads: int = 128
    head_dim: int = 80
    groups: int = 8  # B and C are shared by heads / groups heads
    state: int = 128  # state values per channel
    conv: int = 4  # taps of the causal convolution
    expand: int | None = 2  # inner width / dim; None = any (pruned models, such as Nemotron-Nano-9B-v2)
    dt_low: float = 0.0  # step sizes are at least this after their softplus
    dt_high: float | None = None  # and at most this; None = no limit
    kernels: bool = True  # use those of mamba_ssm and causal_conv1d where installed, on a GPU

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "groups", "state", "conv", "expand"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.mamba.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.dt_low < 0 or (self.dt_high is not None and self.dt_high <= self.dt_low):
            raise ValueError(
                f"model.mamba.dt_low is {self.dt_low} and dt_high {self.dt_high}: step sizes need "
                "0 <= dt_low < dt_high (null = no limit)."
            )


@dataclass
class ModelConfig:
    """Architecture of one decoder; each field is a key of `recipes/model/*.yaml`. Impossible sizes raise ValueError."""

    vocab_size: int = 4096  # replaced by the tokenizer's
    vocab_multiple: int = 1  # ... rounded up to a multiple of this, with rows that no token uses (tensor parallelism)
    dim: int = 256  # width of the residual stream
    layers: int = 4  # number of blocks
    heads: int = 4  # query heads
    kv_heads: int = 4  # key/value heads; fewer than heads = grouped-query attention, arXiv:2305.13245
    head_dim: int | None = None  # None = dim / heads
    ffn_dim: int = 768  # hidden width of the MLP
    activation: Activation = Activation.swiglu
    rope_theta: float | None = 10000.0  # base of the rotary frequencies; None = no positional embedding
    qk_norm: bool = False  # RMSNorm on each head's q and k, arXiv:2302.05442
    tie_embeddings: bool = False  # the head's weight is the embedding's
    norm_eps: float = 1.0e-5
    init_std: float = 0.02  # standard deviation of every matrix at step 0
    init_scale_residual: bool = True  # o, down and out_proj start at init_std / sqrt(additions to the residual stream)
    pattern: str | None = None  # hybrid: one of M - * per block
    mamba: MambaConfig | None = None  # needed by a pattern with M
    max_seq_len: int = 2048  # longest sequence a forward accepts

    def __post_init__(self) -> None:
        self.activation = _activation(self.activation)
        for name in ("vocab_size", "vocab_multiple", "dim", "layers", "heads", "kv_heads", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"model.dim {self.dim} is no multiple of model.heads {self.heads}: change one, or set model.head_dim."
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"model.head_dim is {self.head_dim}: it must be at least 1, or null for dim / heads.")
        if self.heads % self.kv_heads:
            valid = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}: use one of {valid}."
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise ValueError(f"model.rope_theta is {self.rope_theta}: it must be positive, or null for no positions.")
        if self.rope_theta is not None and self.dim_per_head % 2:
            raise ValueError(f"model.head_dim is {self.dim_per_head}: RoPE rotates pairs, so it must be even.")
        if self.init_std <= 0 or self.norm_eps <= 0:
            raise ValueError(
                f"model.init_std ({self.init_std}) and model.norm_eps ({self.norm_eps}) must both be positive."
            )
        if self.pattern is not None:
            self._check_pattern(self.pattern)

    def _check_pattern(self, pattern: str) -> None:
        unknown = sorted(set(pattern) - set("M-*"))
        if unknown:
            raise ValueError(f"model.pattern has {unknown}: a block is M (Mamba-2), - (MLP) or * (attention).")
        if len(pattern) != self.layers:
            raise ValueError(
                f"model.pattern names {len(pattern)} blocks but model.layers is {self.layers}: make them equal."
            )
        if "M" not in pattern:
            return
        if self.mamba is None:
            raise ValueError(
                "model.pattern has M blocks but model.mamba is null: give heads, head_dim, groups, state, conv, expand."
            )
        inner, wanted = self.mamba.heads * self.mamba.head_dim, (self.mamba.expand or 0) * self.dim
        if self.mamba.expand is not None and inner != wanted:
            raise ValueError(
                f"model.mamba.heads * head_dim is {inner} but expand * dim is {wanted}: make them equal, or set "
                "expand to null."
            )
        if self.mamba.heads % self.mamba.groups:
            raise ValueError(
                f"model.mamba.groups {self.mamba.groups} does not divide model.mamba.heads {self.mamba.heads}."
            )

    @property
    def dim_per_head(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def count_blocks(self, kind: str) -> int:
        """How many blocks are "*" (attention), "-" (MLP) or "M" (Mamba-2); a Transformer's layer is a "*" and a "-"."""
        if self.pattern is None:
            return 0 if kind == "M" else self.layers
        return self.pattern.count(kind)


def _activation(value: object) -> Activation:
    """The enum member for a member or its name."""
    try:
        return Activation(value)
    except ValueError:
        valid = [a.value for a in Activation]
        near = difflib.get_close_matches(str(value), valid, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"model.activation is {value!r}{hint}: it must be one of {valid}.") from None
