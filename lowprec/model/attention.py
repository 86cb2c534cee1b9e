"""Causal grouped-query attention with rotary positions, inside the documents of a packed sequence.

    scores = q kᵀ / sqrt(D)      y = softmax(scores + bias) v        bias = 0 where a key may be seen, -inf elsewhere

A row of T tokens may hold several documents one after the other. `starts_BT` is, for every token, the index at which
its document begins; that one tensor gives the position inside the document (t - start) and the keys it may see, those
from start to t. Both are the same for every layer, so the model computes them once per forward (`Context.of`).

RoPE (arXiv:2104.09864) rotates the pairs (x[i], x[i + D/2]) of every q and k head by position * theta^(-2i/D): the
layout of Hugging Face checkpoints, in fp32. GQA: arXiv:2305.13245. QK-norm: arXiv:2302.05442.

On a CPU, `_blocked` takes sequences of up to 2048 tokens: in bf16 its forward and backward took 0.35 to 0.5 of the
time of torch's CPU flash kernel at 256 and 512 tokens, and 0.75 at 2048 (one AVX-512 core; in fp32 0.65 to 1). It is
ordinary attention cut into blocks of queries, so that a block skips the keys after it, with all the query heads of one
key head folded into the rows of a single product. Its scores are rounded to the compute dtype, as eager attention does
everywhere: about 49 dB in bf16 against 54 for flash. Elsewhere this is torch's `scaled_dot_product_attention`.

`attend` takes queries that are the last of the keys: with T queries and U keys, query i sees the keys up to U - T + i.
With T = U that is causal attention; with U > T it is one chunk of it, from which context parallelism is built.

This is the attention core in the compute dtype. A precision recipe quantises the four projections around it and, if
it says so, puts another function in the place of `Attention.core`.

Shapes: B batch, T tokens, U >= T keys, H query heads, K key/value heads, G = H / K, D width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .norm import RMSNorm
from .ssd import Documents

_BLOCK_TOKENS = 128  # queries per block of the CPU path
_BLOCKED_MAX_TOKENS = 2048  # longer sequences would keep too many probabilities for backward


Part = Callable[[Tensor, int], Tensor]
"""This rank's part of the tokens of a tensor: (tensor, its axis of tokens) -> the same with fewer tokens."""


def whole(x: Tensor, axis: int) -> Tensor:
    """x: every rank has all the tokens."""
    return x


Memory = dict[nn.Module, tuple[Tensor, Tensor]]
"""By layer: keys and values seen (B, U, K, D), or a Mamba-2 block's last inputs of its convolution and its state."""


class Context:
    """What every layer of one forward shares: the tables of RoPE and the mask.

    A plain class on purpose: FSDP2 looks into lists, tuples, dicts and dataclasses among a layer's arguments and would
    cast the fp32 tables to the compute dtype.

    cos_BT1D, sin_BT1D: fp32, D/2 wide, or None without RoPE. bias_B1TU: additive mask in the compute dtype, or None
    when the plain causal kernel serves. The batch axis is 1 when no documents are given. T are the tokens of this rank,
    U those of the whole row. documents: of the row, for Mamba-2 blocks; None when it is one.
    memory: what layers have seen of the tokens before these, by layer (`generate.py`); None in training.
    """

    def __init__(
        self,
        cos_BT1D: Tensor | None,
        sin_BT1D: Tensor | None,
        bias_B1TU: Tensor | None,
        documents: Documents | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.cos_BT1D, self.sin_BT1D, self.bias_B1TU = cos_BT1D, sin_BT1D, bias_B1TU
        self.documents, self.memory = documents, memory

    def recall(self, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
        """What a layer has put into the memory, if there is one and it has."""
        return None if self.memory is None else self.memory.get(layer)

    @staticmethod
    def of(
        config: ModelConfig, tokens_BU: Tensor, document_ids_BU: Tensor | None, dtype: torch.dtype, part: Part = whole
    ) -> "Context":
        """Positions and mask of a batch, for the tokens that `part` leaves to this rank.

        document_ids_BU (any integers) changes value where a document begins.
        """
        device, length = tokens_BU.device, tokens_BU.shape[1]
        index_U = torch.arange(length, device=device)
        starts_BU = torch.zeros_like(index_U)[None]
        if document_ids_BU is not None:
            begins_BU = F.pad(document_ids_BU[:, 1:] != document_ids_BU[:, :-1], (1, 0), value=True)
            starts_BU = torch.where(begins_BU, index_U, 0).cummax(dim=1).values
        index_1T, starts_BT = part(index_U[None], 1), part(starts_BU, 1)
        cos = sin = bias = None
        if config.rope_theta is not None:
            cos, sin = tables(index_1T - starts_BT, config.rope_theta, config.dim_per_head)
        if document_ids_BU is not None or _takes_blocked(device, length):
            visible_BTU = (index_U <= index_1T[..., None]) & (index_U >= starts_BT[..., None])
            zeros_BTU = torch.zeros(visible_BTU.shape, dtype=dtype, device=device)
            bias = zeros_BTU.masked_fill_(~visible_BTU, -torch.inf)[:, None]
        return Context(cos, sin, bias, Documents(starts_BU) if document_ids_BU is not None else None)

    @staticmethod
    def after(config: ModelConfig, past: int, tokens_BT: Tensor, memory: Memory) -> "Context":
        """Of tokens that follow `past` others, at least one, which the layers hold in the memory."""
        if config.rope_theta is None:
            return Context(None, None, None, memory=memory)
        positions_1T = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)[None]
        return Context(*tables(positions_1T, config.rope_theta, config.dim_per_head), None, memory=memory)

    def rotate(self, x_BTHD: Tensor) -> Tensor:
        """Apply RoPE in fp32; returns x's dtype, and x itself when the model has no positions."""
        if self.cos_BT1D is None or self.sin_BT1D is None:
            return x_BTHD
        a, b = x_BTHD.float().chunk(2, dim=-1)
        cos, sin = self.cos_BT1D, self.sin_BT1D
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BTHD.dtype)


def tables(positions_BT: Tensor, theta: float, width: int) -> tuple[Tensor, Tensor]:
    """cos_BT1D and sin_BT1D of RoPE, fp32, width / 2 wide."""
    exponent_D = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32) / width
    angle_BTD = positions_BT.float()[..., None] * theta**-exponent_D
    return angle_BTD.cos()[:, :, None], angle_BTD.sin()[:, :, None]


def _takes_blocked(device: torch.device, length: int) -> bool:
    return device.type == "cpu" and length <= _BLOCKED_MAX_TOKENS


def attend(q_BHTD: Tensor, k_BKUD: Tensor, v_BKUD: Tensor, bias_B1TU: Tensor | None) -> Tensor:
    """Causal attention of the last T of U tokens -> y_BHTD in q's dtype. A bias must hold the causal mask too."""
    queries, keys = q_BHTD.shape[2], k_BKUD.shape[2]
    if bias_B1TU is not None and _takes_blocked(q_BHTD.device, keys):
        return _blocked(q_BHTD, k_BKUD, v_BKUD, bias_B1TU)
    if bias_B1TU is None and queries == keys:
        return F.scaled_dot_product_attention(q_BHTD, k_BKUD, v_BKUD, is_causal=True, enable_gqa=True)
    group = q_BHTD.shape[1] // k_BKUD.shape[1]  # torch's masked GPU kernels know no grouped heads
    k_BHUD, v_BHUD = (x.repeat_interleave(group, dim=1) for x in (k_BKUD, v_BKUD))
    if bias_B1TU is None:
        from torch.nn.attention.bias import causal_lower_right  # imports Triton where there is one

        bias_B1TU = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(q_BHTD, k_BHUD, v_BHUD, attn_mask=bias_B1TU)


def _blocked(q_BHTD: Tensor, k_BKUD: Tensor, v_BKUD: Tensor, bias_B1TU: Tensor) -> Tensor:
    batch, heads, length, width = q_BHTD.shape
    kv_heads, keys = k_BKUD.shape[1:3]
    q_NGTD = (q_BHTD * width**-0.5).reshape(batch * kv_heads, heads // kv_heads, length, width)  # N = B K
    k_NDU = k_BKUD.transpose(-1, -2).reshape(batch * kv_heads, width, keys)
    v_NUD = v_BKUD.reshape(batch * kv_heads, keys, width)
    blocks = []
    for start in range(0, length, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, length)
        seen = keys - length + stop
        q_NSD = q_NGTD[:, :, start:stop].flatten(1, 2)  # S = G x queries of this block
        scores = (q_NSD @ k_NDU[..., :seen]).view(batch, heads, stop - start, seen)
        scores += bias_B1TU[..., start:stop, :seen]
        p_NSU = scores.softmax(dim=-1).view(len(q_NSD), -1, seen)
        blocks.append((p_NSU @ v_NUD[:, :seen]).view(batch, heads, stop - start, width))
    return torch.cat(blocks, dim=2)


class Attention(nn.Module):
    """q, k, v, o projections around `core`; x_BTC -> y_BTC in x's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.dim_per_head
        self.width = width
        self.core: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = attend  # a plan may replace it

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=False, dtype=torch.float32)

        self.q_proj = linear(config.dim, config.heads * width)
        self.k_proj = linear(config.dim, config.kv_heads * width)
        self.v_proj = linear(config.dim, config.kv_heads * width)
        self.o_proj = linear(config.heads * width, config.dim)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        # head counts come from the projections' outputs, so a tensor-parallel shard holds a part of the heads
        q, k, v = (proj(x_BTC).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = context.rotate(self.q_norm(q)), context.rotate(self.k_norm(k))
        if context.memory is not None:
            if (seen := context.recall(self)) is not None:
                k, v = torch.cat([seen[0], k], dim=1), torch.cat([seen[1], v], dim=1)
            context.memory[self] = k, v
        y_BHTD = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context.bias_B1TU)
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(2))
