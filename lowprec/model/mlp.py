"""The feed-forward half of a block: SwiGLU (arXiv:2002.05202) or squared ReLU (arXiv:2109.08668).

    swiglu: y = down(silu(gate(x)) * up(x))          relu2: y = down(relu(up(x))^2)

Both in the dtype of x; no biases.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Activation, ModelConfig


class MLP(nn.Module):
    """x_BTC -> y_BTC; the parameters are gate_proj (SwiGLU only), up_proj, down_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation is Activation.swiglu
        if self.gated:
            self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=torch.float32)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=torch.float32)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False, dtype=torch.float32)

        self.activate: Callable[..., Tensor] = _swiglu if self.gated else _relu2

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.activate(self.gate_proj(x_BTC), self.up_proj(x_BTC)))
        return self.down_proj(self.activate(self.up_proj(x_BTC)))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _relu2(up: Tensor) -> Tensor:
    return F.relu(up).square()
