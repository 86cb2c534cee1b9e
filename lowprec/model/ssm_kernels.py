"""The kernels of mamba_ssm (Triton) and causal_conv1d (CUDA), for `mamba.py`, where both are installed and on a GPU.

    pip install causal-conv1d mamba-ssm --no-build-isolation          # compiles against CUDA

`refusal` says in a sentence why they are not used. They compute what `ssd.py` does, in chunks of 256 tokens, with sums
in fp32, but operands and the states between chunks in the activations' dtype, so results agree to the rounding of that
dtype, not to fp32. Gradients are their own.

Which functions are called, with which arguments, was read in the sources of mamba_ssm 2.3.2 and causal_conv1d 1.6.1;
another version whose functions lack one of these arguments is refused by name. Nobody has run this file on a GPU yet:
tests check the calls against stand-ins with the published signatures.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .ssd import Documents

_CHUNK = 256  # mamba_ssm's own default
_WANTED = {
    ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"): (
        *("x", "dt", "A", "B", "C", "chunk_size", "D", "dt_bias", "seq_idx", "dt_softplus", "dt_limit"),
    ),
    ("causal_conv1d", "causal_conv1d_fn"): ("x", "weight", "bias", "seq_idx", "activation"),
}


def refusal(device: torch.device, channels: int, taps: int) -> str | None:
    """Why the kernels cannot be used on this device, for so many channels of the convolution and taps; or None.

    Looks for the packages on a GPU only.
    """
    if device.type != "cuda":
        return f"mamba_ssm's kernels run on a GPU, and the tensors are on {device.type}"
    if channels % 8 or not 2 <= taps <= 4:
        return f"causal_conv1d takes channels in eights and 2 to 4 taps, and there are {channels} and {taps}"
    return _load()[1]


@cache
def _load() -> tuple[list[Callable[..., Any]], str | None]:
    """The functions in the order of _WANTED, and what is wrong with them."""
    found: list[Callable[..., Any]] = []
    for (module, name), wanted in _WANTED.items():
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return found, f"{module.partition('.')[0]} is not installed, or has no {name} ({error})"
        missing = [argument for argument in wanted if argument not in inspect.signature(function).parameters]
        if missing:
            return found, f"{module}.{name} of the installed version does not take {', '.join(missing)}"
        found.append(function)
    return found, None


def scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    bias_H: Tensor,
    limits: tuple[float, float | None],
    documents: Documents | None,
) -> Tensor:
    """y_BTHP of `ssd.scan`; here dt_BTH is before its softplus."""
    low, high = limits
    function = _load()[0][0]
    y_BTHP: Tensor = function(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTGN,
        c_BTGN,
        chunk_size=_CHUNK,
        D=d_H.float(),
        dt_bias=bias_H.float(),
        seq_idx=_numbers(documents),
        dt_softplus=True,
        dt_limit=(low, float("inf") if high is None else high),
    )
    return y_BTHP


def causal_conv(x_BTC: Tensor, weight_C1K: Tensor, bias_C: Tensor, documents: Documents | None) -> Tensor:
    """y_BTC of `ssd.causal_conv`. The kernel wants (B, C, T) with channels side by side, and tokens by eights apart."""
    function = _load()[0][1]
    x_BCT = (x_BTC.contiguous() if x_BTC.stride(1) % 8 else x_BTC).transpose(1, 2)
    seq_idx = _numbers(documents)
    weight_CK, bias_C = weight_C1K[:, 0].to(x_BTC.dtype), bias_C.to(x_BTC.dtype)
    y_BCT: Tensor = function(x_BCT, weight_CK, bias_C, seq_idx=seq_idx, activation="silu")
    return y_BCT.transpose(1, 2)


def _numbers(documents: Documents | None) -> Tensor | None:
    """seq_idx: int32, the number of every token's document in its row."""
    return None if documents is None else documents.numbers_BT
