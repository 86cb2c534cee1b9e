"""The Mamba-2 block (arXiv:2405.21060) as Nemotron-H has it (arXiv:2504.03624), between two plain linear layers.

    z, xbc, dt = in_proj(u)                     widths I, I + 2 G N, H, in this order; I = H P
    x, b, c    = silu(conv(xbc))                causal, one filter of K taps a channel, with bias
    y          = SSD(x, softplus(dt + dt_bias), A = -exp(A_log), b, c) + D x            (ssd.py)
    out        = out_proj(norm(y silu(z)))      RMSNorm of each of the G parts of I by itself, after the gate

Names and layouts of the parameters are those of Hugging Face's Nemotron-H and of mamba_ssm: in_proj.weight,
conv1d.weight (I + 2 G N, 1, K), conv1d.bias, A_log (H), D (H), dt_bias (H), norm.weight (I), out_proj.weight. A
precision plan quantises in_proj and out_proj like any other linear layer; what is between them stays in the compute
dtype, with the convolution, decays, states and norm computed in fp32.

What is between the two linear layers is computed again in the backward pass: of U + I values a token and block, in the
compute dtype, in_proj's output and out_proj's input are kept, where autograd alone keeps some 70 I bytes more. Steps of
a tiny hybrid (28 such blocks of 62, 64 wide) take a third longer for it on a CPU. mamba_ssm's fused path does the same.

At step 0, as in mamba_ssm: A uniform in [1, 16], the step size softplus(dt_bias) log-uniform in [0.001, 0.1], D = 1,
and the convolution's filters and biases uniform in +- 1 / sqrt(K), as torch's Conv1d has them (`init.py`).

Under FSDP2 with a bf16 `param_dtype` the vectors A_log, D, dt_bias are gathered in bf16, as all of a block's parameters
are, and used in fp32: at step 0 that moves a head's decay rate by 0.8 % and its step size by 1.6 % at most. The
masters stay fp32.

Shapes: as in `ssd.py`; I the inner width, U the width of in_proj's output.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ssm_kernels
from .attention import Context
from .config import ModelConfig
from .ssd import Documents, causal_conv, scan, time_steps


class CausalConv1d(nn.Module):
    """A filter of K taps a channel, and silu: weight (C, 1, K), whose last tap meets the token itself, and bias (C)."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))

    def forward(self, x_BTC: Tensor, documents: Documents | None, before_BKC: Tensor | None, kernels: bool) -> Tensor:
        """y_BTC in x's dtype; before_BKC: the inputs before these, as in `ssd.causal_conv`."""
        if kernels:
            return ssm_kernels.causal_conv(x_BTC, self.weight, self.bias, documents)
        return causal_conv(x_BTC, self.weight, self.bias, documents, before_BKC)


class GatedRMSNorm(nn.Module):
    """y silu(z) normalised in `groups` equal parts, each with its own mean square; computed and returned in fp32."""

    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        gated_BTI = y_BTI.float() * F.silu(z_BTI.float())
        parts = gated_BTI.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight.float()


def _again(mix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, of which autograd keeps the arguments and computes the rest again."""
    return partial(checkpoint, mix, use_reentrant=False, preserve_rng_state=False)


class Mamba(nn.Module):
    """u_BTC -> y_BTC in u's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mamba is not None
        m = self.config = config.mamba
        inner, shared = m.heads * m.head_dim, m.groups * m.state
        self.widths = (inner, inner + 2 * shared, m.heads)
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=False, dtype=torch.float32)
        self.conv1d = CausalConv1d(inner + 2 * shared, m.conv)
        self.A_log = nn.Parameter(torch.empty(m.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(m.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(m.heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(inner, m.groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False, dtype=torch.float32)
        self.between = _again(self.mix)  # whoever recomputes the block anyway puts `mix` itself here

    def forward(self, u_BTC: Tensor, context: Context) -> Tensor:
        return self.out_proj(self.between(self.in_proj(u_BTC), context, self.A_log, self.D, self.dt_bias))

    def mix(self, zxbcdt_BTU: Tensor, context: Context, a_log_H: Tensor, d_H: Tensor, bias_H: Tensor) -> Tensor:
        """All that is not a matrix: in_proj's output -> out_proj's input, (B, T, I) in the same dtype.

        The vectors are arguments, so that a recomputation has those of its forward pass, in whatever dtype.
        """
        m, documents = self.config, context.documents
        kernels = context.memory is None and self.kernels_refuse(zxbcdt_BTU.device) is None
        before_BKX, state_BHPN = context.recall(self) or (None, None)
        z, xbc, dt = zxbcdt_BTU.split(self.widths, dim=-1)
        shared = m.groups * m.state
        parts = self.conv1d(xbc, documents, before_BKX, kernels).split((self.widths[0], shared, shared), dim=-1)
        x, b, c = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, (m.head_dim, m.state, m.state)))
        a_H, limits = -a_log_H.float().exp(), (m.dt_low, m.dt_high)
        if kernels:
            y = ssm_kernels.scan(x, dt, a_H, b, c, d_H, bias_H, limits, documents)
        else:
            y, state_BHPN = scan(x, time_steps(dt, bias_H, *limits), a_H, b, c, d_H, documents, state_BHPN)
            if context.memory is not None:
                seen = F.pad(xbc, (0, 0, m.conv - 1, 0)) if before_BKX is None else torch.cat([before_BKX, xbc], 1)
                context.memory[self] = seen[:, seen.shape[1] - m.conv + 1 :], state_BHPN
        return self.norm(y.flatten(2), z).to(zxbcdt_BTU.dtype)

    def kernels_refuse(self, device: torch.device) -> str | None:
        """Why the kernels of mamba_ssm and causal_conv1d are not used on this device, in a sentence, or None."""
        if not self.config.kernels:
            return "model.mamba.kernels is false"
        return ssm_kernels.refusal(device, self.widths[1], self.config.conv)
