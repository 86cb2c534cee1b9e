"""How a block's scale is chosen from its data, and how it is stored.

Two steps. :func:`block_size` measures a block: its largest magnitude (``absmax``), or ``coef`` times its root mean
square, standard deviation, mean or median magnitude. The *size* is the number that should map to ``target``, normally
the element's maximum (times ``1 / guard``; 4-over-6 also tries 4). Then a storage rule turns sizes into ``(multiplier,
scale)``: elements are ``round(x * multiplier)`` and their values ``code * scale`` (times the tensor scale). The order
of the fp32 operations is part of each rule, because two orders differ at ties; constants are computed in fp64 and
rounded once to fp32:

``fp32``   ``m = target / size``; ``scale = 1 / m``: current and block FP8 scaling (DeepSeek-V3, arXiv:2412.19437).
``pow2``   the same with ``m`` floored to a power of two, stored as fp32.
``e8m0``   ``scale = 2**e`` stored in a byte (OCP MX v1.0), with ``e`` by ``rounding``:
           ``rceil`` ``ceil(log2(size / max))``, never saturates (NVIDIA's MXFP8, arXiv:2506.08027);
           ``floor`` ``floor(log2 size) - floor(log2 max)`` (OCP), the block's maximum may saturate;
           ``ceil``  ``ceil(log2 size) - floor(log2 max)``;
           ``even``  as floor, of the size first rounded half up to the element's mantissa bits;
           ``nearest`` the integer nearest to ``log2(size / max)``.
``e4m3``   two-level NVFP4 scaling (arXiv:2509.25149 appendix B, the order of TransformerEngine main since 2.15); with
           ``T = tensor_max`` and ``target`` the largest of the targets::

               S_enc = min(T * target / tensor_size, FLT_MAX)      S_enc = 1 for an all-zero tensor
               scale = e4m3_nearest(min(size * (S_enc * fl(1 / target)), 448))      may be 0 or subnormal
               m     = min(1 / (scale * fl(1 / S_enc)), FLT_MAX)
               tensor_scale = tensor_size / (T * target)

           ``te_2_14``: ``scale = e4m3_nearest(min((size / target) * S_enc, 448))``, the order up to version 2.14. A
           second target t multiplies that by ``target / t`` before rounding; under ``nearest`` t replaces ``target``
           in the scale.
``ue5m3``  the same with an unsigned byte of five exponent bits that reaches 61440 (arXiv:2609.02846).
``none``   multiplier and scale 1 (masked-mantissa elements need no scale).

Defined outcomes. An all-zero block stores scale 1 (``fp32``, ``pow2``; under an
element without a zero 0, and ``size / target`` below ``target * 2**-126``), 2**-127
(``e8m0``) or what ``zero`` says (``e4m3``, ``ue5m3``: ``keep`` 0, ``one``, or ``min``, the smallest subnormal), and
zero codes; an all-zero tensor has tensor scale 1. A NaN or an infinity makes every scale it contributes to NaN, so all
values under that scale decode to NaN: loud, and without a device synchronisation. Under ``keep``, a block far below
the tensor's maximum may get scale 0: its codes saturate (as on hardware) but its value is 0. Where ``T * target /
tensor_size`` overflows (tensor maxima below about 8e-36) the encode scale is FLT_MAX, the tensor scale its reciprocal,
and precision fades out to zero. Every divisor that may be zero or flushed to zero is guarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.element import ELEMENTS, Element

FLT_MAX = torch.finfo(torch.float32).max
SCALES = ("fp32", "pow2", "e4m3", "ue5m3", "e8m0", "none")
TWO_LEVEL = ("e4m3", "ue5m3")
ROUNDINGS = {
    "e8m0": ("rceil", "floor", "ceil", "even", "nearest"),
    "e4m3": ("nearest", "te_2_14"),
    "ue5m3": ("nearest", "te_2_14"),
}
RULES = ("absmax", "rms", "std", "mean", "median")
ZEROS = ("keep", "one", "min")
SCALE_BITS = {"fp32": 32, "pow2": 32, "e4m3": 8, "ue5m3": 8, "e8m0": 8, "none": 0}


def tree_sum(t: Tensor, dim: int) -> Tensor:
    """Sum along ``dim`` in a fixed order, ``t[:n/2] + t[n/2:]`` repeatedly (zeros up to a power of two); keeps dim."""
    n = t.shape[dim]
    while n > 1:
        half = 1 << (n - 1).bit_length() - 1
        head = t.narrow(dim, 0, n - half) + t.narrow(dim, half, n - half)
        t = head if n == 2 * half else torch.cat([head, t.narrow(dim, n - half, 2 * half - n)], dim)
        n = half
    return t


def block_sum(t: Tensor) -> Tensor:
    """(R, free, C, contracted) -> (R, C): :func:`tree_sum` over the contracted axis, then over the free one."""
    return tree_sum(tree_sum(t, 3), 1)[:, 0, :, 0]


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent exactly, for int32 exponents in -127 .. 127; fp32."""
    return torch.where(exponent < -126, 1 << 22, exponent + 127 << 23).view(torch.float32)


def block_size(blocks: Tensor, rule: str, coef: float) -> Tensor:
    """Blocks (R, free, C, contracted) fp32 -> their sizes (R, C) fp32; NaN where a block holds NaN or infinity.

    Statistics are computed on data divided by the power of two of the block's maximum, so nothing over- or underflows.
    """
    magnitude = blocks.abs()
    absmax = magnitude.amax(dim=(1, 3))
    if rule == "absmax":
        return torch.where(absmax.isfinite(), absmax, torch.nan)
    power = power_of_two(((absmax.view(torch.int32) >> 23) - 126).clamp(-125, 126))  # (R, C), above absmax
    unit = blocks / power[:, None, :, None]
    count = torch.full((), float(blocks.shape[1] * blocks.shape[3]), device=blocks.device)
    if rule == "median":
        size = unit.abs().transpose(1, 2).flatten(2).median(dim=2).values
    elif rule == "mean":
        size = block_sum(unit.abs()) / count
    else:
        if rule == "std":
            unit = unit - (block_sum(unit) / count)[:, None, :, None]
        size = (block_sum(unit * unit) / count).sqrt()
    size = (size * torch.full_like(size, coef) * power).clamp(max=FLT_MAX)
    return torch.where(absmax.isfinite(), size, torch.nan)


def fp32_scale(size: Tensor, target: float, input_dtype: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    """Sizes (any shape, fp32) -> multiplier and fp32 scale of the same shape."""
    multiplier = torch.full_like(size, target) / size
    multiplier = torch.where(multiplier.isinf(), torch.finfo(input_dtype).max, multiplier)
    if pow2:
        power = (multiplier.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-126)
        multiplier = torch.where(multiplier.isnan(), multiplier, power)
    multiplier = torch.where(size == 0, 1.0, multiplier)
    return multiplier, 1.0 / multiplier


def e8m0_scale(size: Tensor, element: Element, rounding: str) -> tuple[Tensor, Tensor]:
    """Sizes -> multiplier and scale, powers of two in fp32."""
    ratio = size / torch.full_like(size, element.max)  # by a number, GPUs would multiply by its reciprocal
    if rounding == "nearest":
        exponent = ratio.view(torch.int32) + (0x800000 - 0x3504F4) >> 23  # mantissas above sqrt(2) go up
    elif rounding == "rceil":
        bits = ratio.view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        exponent = exponent + ((mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))).int()
    else:
        bits = size.view(torch.int32)
        if rounding == "even":
            bits = bits + (1 << 22 - element.mantissa_bits)
        exponent = (bits >> 23) - element.max_exponent
        if rounding == "ceil":
            exponent = exponent + ((bits & 0x7FFFFF) > 0).int()
    exponent = exponent.clamp(0, 254)
    nan = size.isnan()
    multiplier = torch.where(nan, torch.nan, power_of_two(127 - exponent))
    return multiplier, torch.where(nan, torch.nan, power_of_two(exponent - 127))


def encode_scale(tensor_size: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Tensor sizes (any shape, fp32) -> ``S_enc = unit / size`` and the tensor scale ``size / unit``; NaN stays NaN."""
    s_enc = torch.full_like(tensor_size, unit) / tensor_size
    overflow = s_enc > FLT_MAX
    s_enc = torch.where(tensor_size == 0, 1.0, s_enc.clamp(max=FLT_MAX))
    tensor_scale = tensor_size / torch.full_like(tensor_size, unit)
    return s_enc, torch.where(tensor_size == 0, 1.0, torch.where(overflow, 1.0 / s_enc, tensor_scale))


def two_level_scale(
    size: Tensor, s_enc: Tensor, target: float, largest_target: float, storage: str, rounding: str, zero: str
) -> tuple[Tensor, Tensor]:
    """Sizes and the encode scale (broadcastable) -> multiplier and stored block scale, both fp32 of size's shape."""
    if rounding == "te_2_14":
        wanted = (size / torch.full_like(size, largest_target)) * s_enc
        wanted = wanted if target == largest_target else wanted * (largest_target / target)
    else:
        wanted = size * (s_enc * torch.full_like(s_enc, 1.0 / target))
    grid = ELEMENTS[storage]
    scale = grid.round(wanted)
    if zero != "keep":
        scale = torch.where(scale == 0, 1.0 if zero == "one" else grid.values[1], scale)
    multiplier = (1.0 / (scale * (1.0 / s_enc))).clamp(max=FLT_MAX)
    return multiplier, scale


def store(scale: Tensor, storage: str) -> Tensor:
    """fp32 block scales -> their stored form: fp32, float8_e4m3fn, float8_e8m0fnu or, for ue5m3, uint8 codes."""
    if storage == "e4m3":
        return scale.to(torch.float8_e4m3fn)
    if storage == "e8m0":
        return (scale.view(torch.int32) >> 23 & 255).to(torch.uint8).view(torch.float8_e8m0fnu)
    if storage == "ue5m3":
        return torch.where(scale.isnan(), 255, ELEMENTS["ue5m3"].codes_of(scale))
    return scale


def load(stored: Tensor, storage: str) -> Tensor:
    """Inverse of :func:`store`; the sign bit of e4m3, which marks a block of the second element, is dropped."""
    return ELEMENTS["ue5m3"].decode(stored) if storage == "ue5m3" else stored.float().abs()
