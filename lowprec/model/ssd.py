"""SSD: the state-space recurrence of Mamba-2 (arXiv:2405.21060), plainly and in chunks, and the convolution before it.

Each head carries a state S of P x N values along the tokens; its decay and its step size are scalars a token:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t b_tᵀ          y_t = S_t c_t + D x_t          A < 0, dt > 0

b (what is written) and c (what is read) are shared by the H / G heads of a group, as keys and values are in
grouped-query attention. `recurrence` is this definition, token by token. `scan` equals it up to rounding, with matrix
products instead of T steps (the paper's section 6). Inside a chunk of Q tokens, with l_t the sum of dt A up to t,

    y_t = sum_{s <= t} (c_t · b_s) exp(l_t - l_s) dt_s x_s  +  exp(l_t) S c_t            S: the state before the chunk
    S'  = exp(l_Q) S + sum_s exp(l_Q - l_s) dt_s x_s b_sᵀ                                 S': the state after it

which is attention with decays for weights inside a chunk, and the recurrence from chunk to chunk. A token costs
2 Q (G N + H P) + 4 H P N FLOPs forward against 5 H P N of the recurrence (`flops.py` counts the latter), but in
products of matrices. For backward, autograd would keep 2 H Q + G Q fp32 values a token, and some 8 H P; `mamba.py`
computes them again instead.

Packed rows: no state, and no tap of the convolution, crosses into another document (`Documents`). Everything here is
computed in fp32 (fp64 for fp64 inputs), whatever the dtype of the activations: decays near 1 are raised to the power
of hundreds of tokens. A chunk's decays are exponentials of differences of the sums l, so they err by some units in the
last place of l, where the recurrence errs by some of 1.

On one CPU core, forward and backward in chunks of 64 took 1/9 of the recurrence's time at 4 x 256 tokens, 8 heads of 32
and states of 16, and 1/48 at 1024 tokens, 16 heads of 80 and states of 128; chunks of 32 took 0.8 and 1.8 times as long
as chunks of 64, chunks of 256 4.1 and 1.8 times. There is no kernel here: `ssm_kernels.py` calls those of mamba_ssm and
causal_conv1d on a GPU.

Shapes: B batch, T tokens, H heads, P width of a head, G groups, N values of state a channel, Q tokens of a chunk,
n chunks, R = H / G heads of a group, C channels of the convolution, K its taps.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # tokens


class Documents:
    """Where the documents of packed rows begin, and what follows from it for every Mamba-2 block of a forward.

    starts_BT: int64, for every token the index of its document's first one. The row's first document may go on from a
    state that was given. Masks are made once, when first asked for.
    """

    def __init__(self, starts_BT: Tensor) -> None:
        self.starts_BT = starts_BT
        self._masks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def numbers_BT(self) -> Tensor:
        """int32: the number of every token's document in its row, from 0."""
        begins_BT = self.starts_BT == torch.arange(self.starts_BT.shape[1], device=self.starts_BT.device)
        return begins_BT.cumsum(1, dtype=torch.int32) - 1

    def reaches(self, back: int) -> Tensor:
        """(B, T, 1) bool: the token so many places back is of the same document."""
        index_T = torch.arange(self.starts_BT.shape[1], device=self.starts_BT.device)
        return (index_T - back >= self.starts_BT)[..., None]

    def masks(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """For chunks of so many tokens, the last one padded: three bool tensors.

        visible_BnQQ: token s <= t of the same document, [t, s]. carried_BnQ: t sees the state before its chunk.
        kept_BnQ: s is of the document of the chunk's last token, so it goes into the state after it.
        """
        if chunk not in self._masks:
            pad = -self.starts_BT.shape[1] % chunk
            starts_BnQ = torch.cat([self.starts_BT, self.starts_BT[:, -1:].expand(-1, pad)], 1).unflatten(
                1, (-1, chunk)
            )
            index_nQ = torch.arange(starts_BnQ[0].numel(), device=starts_BnQ.device).view(-1, chunk)
            visible = (index_nQ[:, None] <= index_nQ[..., None]) & (index_nQ[:, None] >= starts_BnQ[..., None])
            carried = starts_BnQ < index_nQ[:, :1].clamp(min=1)
            self._masks[chunk] = visible, carried, index_nQ >= starts_BnQ[..., -1:]
        return self._masks[chunk]


def time_steps(dt_BTH: Tensor, bias_H: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """softplus(dt + bias), then kept between low and high: positive steps in at least fp32."""
    dtype = _precise(dt_BTH.dtype)
    return F.softplus(dt_BTH.to(dtype) + bias_H.to(dtype)).clamp(low, high)


def recurrence(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor | None = None,
    documents: Documents | None = None,
    state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition -> (y_BTHP, the state_BHPN after the last token), in at least fp32; T steps, for tests.

    dt_BTH: positive, after the softplus. a_H: negative. state_BHPN: before the first token (None = zeros).
    """
    x, dt, a, b, c = (t.to(_precise(x_BTHP.dtype)) for t in (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN))
    group = x.shape[2] // b.shape[2]
    b_BTHN, c_BTHN = (t.repeat_interleave(group, dim=2) for t in (b, c))
    state = x.new_zeros(len(x), *x.shape[2:], b.shape[3]) if state_BHPN is None else state_BHPN.to(x.dtype)
    rows = []
    for t in range(x.shape[1]):
        decay_BH = (dt[:, t] * a).exp()
        if documents is not None and t > 0:
            decay_BH = decay_BH.where((documents.starts_BT[:, t] < t)[:, None], 0.0)
        written_BHP = dt[:, t, :, None] * x[:, t]
        state = decay_BH[..., None, None] * state + written_BHP[..., None] * b_BTHN[:, t, :, None]
        rows.append((state @ c_BTHN[:, t, ..., None])[..., 0])
    y_BTHP = torch.stack(rows, dim=1)
    return (y_BTHP if d_H is None else y_BTHP + d_H.to(x.dtype)[:, None] * x), state


def scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor | None = None,
    documents: Documents | None = None,
    state_BHPN: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`recurrence` in chunks of so many tokens; arguments and result are the same. One token is one step of it."""
    x, dt, a, b, c = (t.to(_precise(x_BTHP.dtype)) for t in (x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN))
    batch, length, heads, width = x.shape
    groups, states = b.shape[2:]
    size = min(chunk, length)
    visible_BnQQ, carried_BnQ, kept_BnQ = _masks(documents, size, x)

    def cut(t: Tensor) -> Tensor:
        """(B, T, G, ...) -> (B, n, G, Q, ...); tokens added at the end have dt = 0: they write and forget nothing."""
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, -length % size))
        return t.unflatten(1, (-1, size)).transpose(2, 3)

    l_BnGQR = cut((dt * a).unflatten(2, (groups, -1))).cumsum(3)
    x_BnGQRP = cut((dt[..., None] * x).unflatten(2, (groups, -1)))
    b_BnGQN, c_BnGQN = cut(b), cut(c)

    l_BnGRQ = l_BnGQR.transpose(-1, -2)
    far_BnGRQQ = l_BnGRQ[..., :, None] - l_BnGRQ[..., None, :]
    weights = far_BnGRQQ.masked_fill(~visible_BnQQ[:, :, None, None], -torch.inf).exp()
    weights = weights * (c_BnGQN @ b_BnGQN.transpose(-1, -2))[:, :, :, None]
    y_BnGQRP = (weights @ x_BnGQRP.transpose(3, 4)).transpose(3, 4)

    keep_BnGQR = (l_BnGQR[:, :, :, -1:] - l_BnGQR).exp() * kept_BnQ[:, :, None, :, None]
    written_BnGNX = b_BnGQN.transpose(-1, -2) @ (keep_BnGQR[..., None] * x_BnGQRP).flatten(4)  # X = R P
    decay_BnGQR = l_BnGQR.exp() * carried_BnQ[:, :, None, :, None]
    state_BGNX = x.new_zeros(batch, groups, states, heads // groups * width)
    if state_BHPN is not None:
        state_BGNX = state_BHPN.to(x.dtype).view(batch, groups, -1, states).transpose(-1, -2)
    before = []
    for i in range(written_BnGNX.shape[1]):
        before.append(state_BGNX)
        pass_BG1X = decay_BnGQR[:, i, :, -1:].repeat_interleave(width, dim=-1)
        state_BGNX = pass_BG1X * state_BGNX + written_BnGNX[:, i]
    read_BnGQX = c_BnGQN @ torch.stack(before, dim=1)
    y_BnGQRP = y_BnGQRP + decay_BnGQR[..., None] * read_BnGQX.unflatten(4, (-1, width))

    y_BTHP = y_BnGQRP.transpose(2, 3).reshape(batch, -1, heads, width)[:, :length]
    y_BTHP = y_BTHP if d_H is None else y_BTHP + d_H.to(x.dtype)[:, None] * x
    return y_BTHP, state_BGNX.transpose(-1, -2).reshape(batch, heads, width, states)


def _masks(documents: Documents | None, chunk: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `Documents.masks`, of rows that are one document, for all alike."""
    if documents is not None:
        return documents.masks(chunk)
    ones = torch.ones(1, 1, chunk, chunk, dtype=torch.bool, device=x.device)
    return ones.tril(), ones[:, :, 0], ones[:, :, 0]


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def causal_conv(
    x_BTC: Tensor,
    weight_C1K: Tensor,
    bias_C: Tensor,
    documents: Documents | None = None,
    before_BKC: Tensor | None = None,
) -> Tensor:
    """silu(bias + sum_k w[K-1-k] x[t-k]), channel by channel -> y_BTC in x's dtype, computed in at least fp32.

    before_BKC: the last K - 1 inputs before the first token (None = zeros). Only x is kept for backward.
    """
    y_BTC: Tensor = _Conv.apply(x_BTC, weight_C1K, bias_C, documents, before_BKC)
    return y_BTC


class _Conv(torch.autograd.Function):
    """y = silu(p), p = bias + sum_k m_k w_k x_{t-k}, with the masks m of documents; backward computes p again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_C1K: Tensor,
        bias_C: Tensor,
        documents: Documents | None,
        before_BKC: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_BTC, weight_C1K, bias_C, before_BKC)
        ctx.documents = documents
        return F.silu(_taps(x_BTC, weight_C1K, bias_C, documents, before_BKC)[0]).to(x_BTC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_BTC, weight_C1K, bias_C, before_BKC = ctx.saved_tensors
        p_BTC, longer = _taps(x_BTC, weight_C1K, bias_C, ctx.documents, before_BKC)
        taps, length = weight_C1K.shape[2], x_BTC.shape[1]
        dp_BTC = torch.ops.aten.silu_backward(dy_BTC.to(p_BTC.dtype), p_BTC)
        dx_BTC, dw_C1K = torch.zeros_like(p_BTC), torch.empty_like(weight_C1K)
        for k in range(taps):
            d = dp_BTC if ctx.documents is None or k == 0 else dp_BTC * ctx.documents.reaches(k)
            dw_C1K[:, 0, taps - 1 - k] = (d * longer[:, taps - 1 - k :][:, :length]).sum((0, 1))
            if k < length:
                dx_BTC[:, : length - k].addcmul_(d[:, k:], weight_C1K[:, 0, taps - 1 - k].to(d.dtype))
        return dx_BTC.to(x_BTC.dtype), dw_C1K, dp_BTC.sum((0, 1)).to(bias_C.dtype), None, None


def _taps(
    x_BTC: Tensor, weight_C1K: Tensor, bias_C: Tensor, documents: Documents | None, before_BKC: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(p_BTC before the silu, x with the K - 1 inputs before it), in at least fp32."""
    taps, length, dtype = weight_C1K.shape[2], x_BTC.shape[1], _precise(x_BTC.dtype)
    x = x_BTC.to(dtype)
    before = x.new_zeros(len(x), taps - 1, x.shape[2]) if before_BKC is None else before_BKC.to(dtype)
    longer = torch.cat([before, x], dim=1)
    w_CK, p_BTC = weight_C1K[:, 0].to(dtype), bias_C.to(dtype).expand_as(x).clone()
    for k in range(taps):
        part = longer[:, taps - 1 - k :][:, :length]
        p_BTC.addcmul_(part if documents is None or k == 0 else part * documents.reaches(k), w_CK[:, taps - 1 - k])
    return p_BTC, longer
