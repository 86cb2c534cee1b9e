"""How a block's scale is chosen from its largest magnitude, and how it is stored.

Each rule maps block maxima to a pair ``(multiplier, scale)``: elements are ``round(x * multiplier)`` and their values
``code * scale`` (times the tensor scale, if the format has one). The order of the fp32 operations is part of each rule,
because two orders differ at ties:

``fp32``   ``m = max / amax``; ``scale = 1 / m``. As TransformerEngine's current and block FP8 scaling (DeepSeek-V3,
arXiv:2412.19437). ``e8m0``   ``scale = 2**e`` with ``e = ceil(log2(amax / max))`` (``rceil``, never saturates:
NVIDIA's MXFP8, arXiv:2506.08027) or
           ``e = floor(log2(amax)) - floor(log2(max))`` (``floor``, OCP MX v1.0, which lets a block's maximum saturate).
``e4m3``   the two-level NVFP4 scaling (arXiv:2509.25149 appendix B; order of TransformerEngine main since 2.15)::

               S_enc = min(448 * max / tensor_amax, FLT_MAX)      S_enc = 1 for an all-zero tensor
               scale = e4m3_nearest(min(amax * (S_enc * fl(1 / max)), 448))      may be 0 or subnormal
               m     = min(1 / (scale * fl(1 / S_enc)), FLT_MAX)
               tensor_scale = tensor_amax / (448 * max)

Defined outcomes. An all-zero block stores scale 1 (``fp32``), 0 (``e4m3``) or 2**-127 (``e8m0``) and zero codes; an
all-zero tensor has tensor scale 1. A NaN or an infinity makes every scale it contributes to NaN, so all values under
that scale decode to NaN: loud, and without a device synchronisation. Under ``e4m3``, a block far below the tensor's
maximum may get scale 0: its codes saturate (as on hardware) but its value is 0. Where ``448 * max / tensor_amax``
overflows (tensor maxima below about 8e-36) the encode scale is FLT_MAX, the tensor scale its reciprocal, and
precision fades out to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLT_MAX = torch.finfo(torch.float32).max
E4M3_MAX = 448.0


def fp32_scale(amax: Tensor, element_max: float, input_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Block maxima (any shape, fp32) -> multiplier and fp32 scale of the same shape."""
    multiplier = torch.full_like(amax, element_max) / amax
    multiplier = torch.where(multiplier.isinf(), torch.finfo(input_dtype).max, multiplier)
    multiplier = torch.where(amax == 0, 1.0, multiplier)
    multiplier = torch.where(amax.isfinite(), multiplier, torch.nan)
    return multiplier, 1.0 / multiplier


def e8m0_scale(amax: Tensor, element_max: float, rounding: str) -> tuple[Tensor, Tensor]:
    """Block maxima -> multiplier and float8_e8m0fnu scale. ``rounding``: ``rceil`` or ``floor``."""
    if rounding == "rceil":
        bits = (amax / element_max).view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        exponent = exponent + ((mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))).int()
    else:
        largest = torch.frexp(torch.tensor(element_max)).exponent - 1  # floor(log2(max))
        exponent = (amax.view(torch.int32) >> 23) - largest.to(amax.device)
    exponent = exponent.clamp(0, 254)
    nan = ~amax.isfinite()
    code = torch.where(nan, 255, exponent).to(torch.uint8)
    multiplier = torch.where(nan, torch.nan, torch.exp2((127 - exponent).float()))
    return multiplier, code.view(torch.float8_e8m0fnu)


def e4m3_scale(amax: Tensor, tensor_amax: Tensor, element_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Block maxima and the tensor's maximum () -> multiplier, float8_e4m3fn scale, tensor scale () fp32."""
    s_enc = torch.full_like(tensor_amax, E4M3_MAX * element_max) / tensor_amax
    overflow = s_enc > FLT_MAX
    s_enc = torch.where(tensor_amax == 0, 1.0, s_enc.clamp(max=FLT_MAX))
    s_dec = 1.0 / s_enc
    bad = ~tensor_amax.isfinite()
    inverse_max = torch.tensor(1.0, device=amax.device) / torch.tensor(element_max, device=amax.device)
    wanted = (amax * (s_enc * inverse_max)).clamp(max=E4M3_MAX)
    scale = torch.where(bad, torch.nan, wanted).to(torch.float8_e4m3fn)
    multiplier = (1.0 / (scale.float() * s_dec)).clamp(max=FLT_MAX)
    tensor_scale = tensor_amax / torch.full_like(tensor_amax, E4M3_MAX * element_max)
    tensor_scale = torch.where(tensor_amax == 0, 1.0, torch.where(overflow, s_dec, tensor_scale))
    return multiplier, scale, torch.where(bad, torch.nan, tensor_scale)
