"""What every parameter is at step 0: a function of the seed, its name and its shape, and of nothing else.

Each parameter has a generator of its own, keyed by (seed, name), and is drawn whole on the CPU in fp32; a rank keeps
its shard. So the weights depend neither on order nor on device nor on the number of ranks.

    matrices            normal(0, init_std)
    o, down, out_proj   the same divided by sqrt(n) if the config says so, n the number of additions to the residual
                        stream: 2 a layer of a Transformer (GPT-2), 1 a block of a hybrid (Megatron-LM does the same)
    norms               1
    Mamba-2             A_log, dt_bias, D, conv1d: as mamba_ssm, see `mamba.py`
"""

import hashlib
from math import log

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import ModelConfig

RESIDUAL = ("o_proj.weight", "down_proj.weight", "out_proj.weight")
"""Matrices whose output is added to the residual stream."""

_A = (1.0, 16.0)  # of -A, uniform
_DT = (1.0e-3, 0.1)  # of the step size, log-uniform; its inverse softplus is the bias

# what torch.compile and activation recomputation put into the names of parameters
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers have added to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def assign(parameter: nn.Parameter, full: Tensor) -> None:
    """Gives a parameter the values of the whole tensor, of which it holds all or this rank's shard."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(full)


def initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The whole parameter: fp32, on the CPU. name: a `plain_name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    full = torch.empty(shape, dtype=torch.float32, device="cpu")
    kind = name.rpartition(".")[2]
    if "conv1d." in name:
        assert config.mamba is not None
        bound = config.mamba.conv**-0.5
        return full.uniform_(-bound, bound, generator=generator)
    if kind == "A_log":
        return full.uniform_(*_A, generator=generator).log_()
    if kind == "dt_bias":
        dt = full.uniform_(log(_DT[0]), log(_DT[1]), generator=generator).exp_()
        return dt + (-torch.expm1(-dt)).log()  # softplus of this is dt
    if full.ndim == 1:
        return full.fill_(1.0)
    std = config.init_std
    if config.init_scale_residual and name.endswith(RESIDUAL):
        std /= (config.layers * (2 if config.pattern is None else 1)) ** 0.5
    return full.normal_(0.0, std, generator=generator)
