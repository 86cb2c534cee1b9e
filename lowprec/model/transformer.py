"""The decoder: embedding, `layers` pre-norm blocks, final norm, head (Llama, arXiv:2302.13971).

    x = embed(tokens)      x = x + attn(attn_norm(x))      x = x + mlp(mlp_norm(x))      logits = lm_head(norm(x))

A block of a hybrid (Nemotron-H, arXiv:2504.03624) is one of the two, or x = x + mamba(mamba_norm(x)), as the character
of `ModelConfig.pattern` says; parts of a block keep their names, so a rule `layers.*.mlp.*` means the same in both.

Parameters are fp32 (they are the optimizer's master weights); activations flow in `dtype`, which the embedding's
output sets. Every matrix product with a weight is a plain `nn.Linear` without bias: the model knows nothing of
precision, and a plan gives each linear its recipe (and the cast of its weight) afterwards. Without a plan the model
runs in fp32 only.

Build it on the meta device, lay the plan and the sharding over it, then give it memory and values:

    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
"""

import torch
from torch import Tensor, nn

from .attention import Attention, Context, Part, whole
from .config import ModelConfig
from .init import assign, initial, plain_name
from .mamba import Mamba
from .mlp import MLP
from .norm import RMSNorm


class Block(nn.Module):
    """One pre-norm layer: x_BTC -> x_BTC."""

    def __init__(self, config: ModelConfig, kinds: str = "*-") -> None:
        """kinds: its parts in order, each M (Mamba-2), * (attention) or - (MLP)."""
        super().__init__()
        self.kinds = kinds
        for kind in kinds:
            if kind == "M":
                self.mamba_norm = RMSNorm(config.dim, config.norm_eps)
                self.mamba = Mamba(config)
            elif kind == "*":
                self.attn_norm = RMSNorm(config.dim, config.norm_eps)
                self.attn = Attention(config)
            else:
                self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
                self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        for kind in self.kinds:
            if kind == "M":
                x_BTC = x_BTC + self.mamba(self.mamba_norm(x_BTC), context)
            elif kind == "*":
                x_BTC = x_BTC + self.attn(self.attn_norm(x_BTC), context)
            else:
                x_BTC = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return x_BTC


class Transformer(nn.Module):
    """A decoder, Llama-style or hybrid; see the module's docstring for its parts and how it is built."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.vocab_size, config.dim, dtype=torch.float32)
        self.layers = nn.ModuleList(Block(config, kinds) for kinds in config.pattern or ["*-"] * config.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False, dtype=torch.float32)
        self._tie()
        self.part: Part = whole  # context parallel puts its own here,
        self.multiple = 1  # and what lengths of sequences must then be multiples of

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> "Transformer":
        """As nn.Module.to_empty, but a tied head stays tied (torch gives the two modules separate memory)."""
        super().to_empty(device=device, recurse=recurse)
        self._tie()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Give every parameter its value at step 0 (`init.py`): the same on any number of ranks."""
        for name, parameter in self.named_parameters():
            assign(parameter, initial(plain_name(name), parameter.shape, self.config, seed))

    def forward(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Next-token logits.

        tokens_BT: int64 in [0, vocab_size). document_ids_BT: int64 or None; where it changes along a row a new
        document begins, attention does not look back across it, states and positions restart. Returns logits_BTV in the
        compute dtype. Raises ValueError if T exceeds max_seq_len.
        """
        context = self.context(tokens_BT, document_ids_BT)
        x_BTC = self.begin(tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, context)
        return self.end(x_BTC)

    def context(self, tokens_BT: Tensor, document_ids_BT: Tensor | None) -> Context:
        """What every block of one forward shares, from whole rows and no parameters. Errors as `forward`."""
        if tokens_BT.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"The sequence has {tokens_BT.shape[1]} tokens but model.max_seq_len is {self.config.max_seq_len}: "
                "shorten data.seq_len or raise model.max_seq_len."
            )
        return Context.of(self.config, tokens_BT, document_ids_BT, self.dtype, self.part)

    def begin(self, tokens_BT: Tensor) -> Tensor:
        """What the first block gets: tokens_BT (int64, whole rows) -> x_BTC of this rank's tokens, in `dtype`."""
        return self.embed(self.part(tokens_BT, 1)).to(self.dtype)

    def end(self, x_BTC: Tensor) -> Tensor:
        """The last block's output -> logits_BTV."""
        return self.lm_head(self.norm(x_BTC))


def build(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """The model of `config` on torch's current device (use the meta device), with fp32 parameters not yet initialised.

    dtype is that of the activations.
    """
    return Transformer(config, dtype)
