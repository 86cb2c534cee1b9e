"""Format = element x block x scale x tensor scale; ``Format.quantize`` turns a matrix into a :class:`QTensor`.

A format quantises a matrix whose last axis is the one a matrix product contracts. ``block = (free, contracted)``
elements share one scale; ``0`` stands for the whole axis, so ``(0, 0)`` is one scale for the tensor and ``(1, 0)``
one a row. With ``tensor_scale`` a second fp32 scale spans the tensor, a row or 128 elements of one, and the block
scales are stored relative to it (NVFP4).

Some formats choose *per block* between candidates, by the smaller error: 4-over-6 (arXiv:2512.02010) maps the block's
maximum to 6 or to 4 (``targets``), IF4 (arXiv:2603.28765) picks one of two elements (``second``). The error of a
candidate is ``sum (value - x)^2`` (``mse``) or ``sum |value - x|`` (``mae``) with ``value = ((code * scale) *
tensor_size) / (tensor_max * target)``, summed in the order of :func:`lowprec.numerics.scale.block_sum`; a tie goes to
the candidate named first.

The plain-torch code here is the definition of every format: fp32, one rounding an operation, no fused steps. A ragged
edge is quantised as if padded with zeros.

What this is not: fake quantisation by casting. Codes and scales are real, storable, and packed by ``QTensor.pack``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.numerics import scale as rules
from lowprec.numerics.eden import corrected_scales, correction
from lowprec.numerics.element import ELEMENTS, Element
from lowprec.numerics.qtensor import QTensor, spread


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised. Frozen and hashable: it is data.

    Attributes:
        name: what recipes call it.
        element: a key of ``ELEMENTS``.
        block: (free, contracted) elements under one scale; 0 = the whole axis.
        scale: how block scales are stored: ``fp32``, ``pow2`` (fp32 power of two), ``e4m3`` or ``ue5m3`` (both need
            ``tensor_scale``), ``e8m0``, or ``none``.
        tensor_scale: False; True, one fp32 scale for the tensor; "row", one a row; 128, one per 1 x 128.
        scale_rounding: ``e8m0``: ``rceil`` (default), ``floor``, ``ceil``, ``even``, ``nearest``; ``e4m3`` and
            ``ue5m3``: ``nearest`` (default) or ``te_2_14``. See :mod:`lowprec.numerics.scale`.
        rule: what is measured of a block: ``absmax``, ``rms``, ``std``, ``mean`` or ``median`` of magnitudes.
        coef: ``coef * statistic`` maps to the target (rules other than ``absmax``).
        guard: ``absmax * guard`` maps to the element's maximum: 17/16 keeps stochastic rounding from clipping when the
            scale rounds down. Under ``e8m0`` the scale stays a power of two, the elements are divided by the guard, and
            the guard becomes a constant tensor scale (arXiv:2502.20586).
        targets: grid values that a block's maximum may map to, the best one per block; () = the element's maximum.
        select: ``mse`` or ``mae``.
        tensor_max: what the largest block scale is aimed at under a tensor scale.
        second: another element that a block may choose; the choice is the sign bit of the stored scale (``e4m3``).
        zero: stored scale of a block whose scale is or underflows to 0: ``keep``, ``one`` or ``min``.
    """

    name: str
    element: str
    block: tuple[int, int]
    scale: str = "fp32"
    tensor_scale: bool | str | int = False
    scale_rounding: str | None = None
    rule: str = "absmax"
    coef: float = 1.0
    guard: float = 1.0
    targets: tuple[float, ...] = ()
    select: str = "mse"
    tensor_max: float = 448.0
    second: str | None = None
    zero: str = "keep"

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"format {self.name}: {problem}")

    @property
    def element_type(self) -> Element:
        """The element as an object."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return max(ELEMENTS[e].bits for e in (self.element, self.second or self.element))

    @property
    def amax_of(self) -> str | None:
        """What one maximum is taken of: the ``tensor``, every ``row``, or None where scales span blocks only."""
        if self.tensor_scale is True or (self.block == (0, 0) and not self.tensor_scale):
            return "tensor"
        return "row" if self.tensor_scale == "row" or (self.block == (1, 0) and not self.tensor_scale) else None

    def quantize(self, x: Tensor, noise: Tensor | None = None, amax: Tensor | None = None) -> QTensor:
        """Quantise a matrix.

        Args:
            x: (rows, k), bf16, fp16 or fp32.
            noise: uniform (0, 1) numbers of x's shape for stochastic rounding of the elements, or None for nearest.
            amax: fp32, the maximum to use instead of the tensor's own (delayed scaling, other ranks); elements beyond
                it saturate. () for formats with one scale for the tensor, (rows, 1) for those with one a row.

        Returns:
            QTensor of x's shape. NaN or infinity in x makes all values under the same scale (with ``tensor_scale``: all
            values under the tensor scale) decode to NaN.

        Raises:
            ValueError: if x is not a floating matrix, noise or amax have another shape, or noise meets a format that
                chooses per block (the choice would bias it).
        """
        if noise is not None and noise.shape != x.shape:
            raise ValueError(
                f"{self.name}: noise has shape {tuple(noise.shape)}, x has {tuple(x.shape)}; they must agree"
            )
        if noise is not None and self._chooses:
            raise ValueError(
                f"{self.name}: stochastic rounding is biased where each block picks the better of several"
                " candidates; round to nearest or use eden"
            )
        return self._quantize(x, noise, amax)[0]

    def eden(self, x: Tensor, noise_blocks: Tensor, group: int = 128, amax: Tensor | None = None) -> QTensor:
        """Quantise a (rotated) matrix by MS-EDEN: see :mod:`lowprec.numerics.eden`.

        Args:
            x: (rows, k), bf16, fp16 or fp32.
            noise_blocks: uniform (0, 1) numbers, one a block: (rows, ceil(k / contracted)).
            group: elements that share one correction, a multiple of the block.
            amax: as for :meth:`quantize`.

        Raises:
            ValueError: for formats without 1 x n blocks, scales that cannot carry a correction, or wrong shapes.
        """
        free, contracted = self.block
        if free != 1 or not contracted or group % contracted or self.scale not in ("e4m3", "ue5m3", "fp32"):
            raise ValueError(
                f"{self.name}: MS-EDEN corrects e4m3, ue5m3 or fp32 scales of 1 x n blocks whose size divides the"
                f" group; got {self.scale} scales, block {list(self.block)}, group {group}"
            )
        q, u = self._quantize(x, None, amax)
        if noise_blocks.shape != q.scales.shape:
            raise ValueError(
                f"{self.name}: noise_blocks has shape {tuple(noise_blocks.shape)}, one number a block is"
                f" {tuple(q.scales.shape)}; they must agree"
            )
        s = correction(u, q.values(), group)
        scales = corrected_scales(q.block_scales(), s, group // contracted, self.scale, noise_blocks)
        if self.second:
            scales = scales.copysign(q.scales.float())
        return replace(q, scales=rules.store(scales, self.scale))

    @property
    def _chooses(self) -> bool:
        return len(self.targets) > 1 or self.second is not None

    def _blocks(self, x: Tensor) -> Tensor:
        """x (rows, k) -> (R, free, C, contracted) fp32, padded with zeros."""
        rows, k = x.shape
        free, contracted = self.block[0] or max(rows, 1), self.block[1] or max(k, 1)
        pad = (0, -k % contracted, 0, -rows % free)
        padded = F.pad(x.float(), pad) if any(pad) else x.float()
        return padded.unflatten(1, (-1, contracted)).unflatten(0, (-1, free))

    def _quantize(self, x: Tensor, noise: Tensor | None, amax: Tensor | None) -> tuple[QTensor, Tensor]:
        """The quantised matrix and ``u = x * multiplier`` (rows, k)."""
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(
                f"{self.name}: expected a floating matrix (rows, k), got {x.dtype} of shape {tuple(x.shape)}"
            )
        blocks = self._blocks(x)
        size = rules.block_size(blocks, self.rule, self.coef)
        size, level, tensor_scale = self._tensor_level(size, amax)
        second = None
        if self._chooses:
            multiplier, scale, second = self._choose(blocks, size, level, x.dtype)
        else:
            multiplier, scale = self._scale_rule(size, level, self._targets[0], self.element_type, x.dtype)
        u = (blocks * multiplier[:, None, :, None]).flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]
        # A NaN multiplier marks a poisoned block; its scale is NaN, so the codes do not matter and are zero.
        codes = self.element_type.codes_of(u, noise)
        if second is not None and self.second is not None:
            mask = spread(second, blocks.shape[1], blocks.shape[3], *x.shape)
            codes = torch.where(mask, ELEMENTS[self.second].codes_of(u, noise), codes)
            scale = torch.where(second, -scale, scale)
        return QTensor(codes, rules.store(scale, self.scale), tensor_scale, self), u

    @property
    def _targets(self) -> tuple[float, ...]:
        """Grid values that sizes map to, the guard included."""
        guard = 1.0 if self.scale == "e8m0" else self.guard
        return tuple(target / guard for target in self.targets or (self.element_type.max,))

    def _tensor_level(self, size: Tensor, amax: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Sizes (R, C) -> sizes, (tensor sizes, encode scales) that broadcast over (R, C), and the tensor scale."""
        spans = self.amax_of
        if amax is not None and (not spans or amax.numel() != (size.shape[0] if spans == "row" else 1)):
            raise ValueError(
                f"{self.name}: amax must be one number for a format with one scale for the tensor (tensor_scale: true"
                f" or block [0, 0]), or one a row (tensor_scale: row or block [1, 0]), got shape {tuple(amax.shape)}"
            )
        one = size.new_ones(())
        if not self.tensor_scale:
            if amax is not None:
                given = amax.float().reshape(-1, 1)
                size = torch.where(size.isfinite() & given.isfinite(), given, torch.nan)
            constant = size.new_full((), self.guard) if self.scale == "e8m0" and self.guard != 1 else None
            return size, (one, one), constant
        if amax is not None:
            whole = amax.float().reshape((-1, 1) if spans == "row" else ())
        elif self.tensor_scale is True:
            whole = size.amax() if size.numel() else size.new_zeros(())
        else:
            per = size.shape[1] if self.tensor_scale == "row" else 128 // self.block[1]
            whole = F.pad(size, (0, -size.shape[1] % max(per, 1))).unflatten(1, (-1, max(per, 1))).amax(2)
        whole = torch.where(whole.isfinite(), whole, torch.nan)
        s_enc, tensor_scale = rules.encode_scale(whole, self.tensor_max * max(self._targets))
        if self.tensor_scale == 128:
            whole, s_enc = (spread(t, 1, per, *size.shape) for t in (whole, s_enc))
        return size, (whole, s_enc), tensor_scale

    def _scale_rule(
        self, size: Tensor, level: tuple[Tensor, Tensor], target: float, element: Element, input_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Sizes (R, C) -> multiplier and block scale, fp32 (R, C)."""
        if self.scale in rules.TWO_LEVEL:
            rounding = self.scale_rounding or "nearest"
            return rules.two_level_scale(size, level[1], target, max(self._targets), self.scale, rounding, self.zero)
        if self.scale == "e8m0":
            multiplier, scale = rules.e8m0_scale(size, element, self.scale_rounding or "rceil")
            return multiplier * torch.full_like(size, 1.0 / self.guard) if self.guard != 1 else multiplier, scale
        if self.scale == "none":
            one = torch.where(size.isnan(), size, 1.0)
            return one, one
        multiplier, scale = rules.fp32_scale(size, target, input_dtype, self.scale == "pow2")
        if element.values[0] > 0:  # no code stands for zero, so the scale itself must vanish with the block
            scale = torch.where(size < target * 2.0**-126, size / torch.full_like(size, target), scale)
        return multiplier, scale

    def _choose(
        self, blocks: Tensor, size: Tensor, level: tuple[Tensor, Tensor], input_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidate of every block: multiplier, scale (R, C) fp32, and whether it is the second element."""
        best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        elements = (self.element, self.second) if self.second else (self.element,)
        for name in elements:
            for target in self._targets:
                element = ELEMENTS[name]
                multiplier, scale = self._scale_rule(size, level, target, element, input_dtype)
                values = element.round(blocks * multiplier[:, None, :, None]).mul_(scale[:, None, :, None])
                if self.tensor_scale:
                    values.mul_(level[0].expand_as(size)[:, None, :, None])
                    values.div_(values.new_full((), self.tensor_max * max(self._targets)))
                difference = values.sub_(blocks)
                error = rules.block_sum(difference.square_() if self.select == "mse" else difference.abs_())
                mark = torch.full_like(size, name == self.second, dtype=torch.bool)
                if best is None:
                    best = error, multiplier, scale, mark
                else:
                    better = error < best[0]
                    new = (error, multiplier, scale, mark)
                    best = tuple(torch.where(better, n, b) for n, b in zip(new, best))  # type: ignore[assignment]
        assert best is not None
        return best[1:]


def _problem(f: Format) -> str | None:
    """Why a combination of fields is refused, in one sentence, or None."""
    for kind, value, options in (
        ("element", f.element, ELEMENTS),
        ("second element", f.second or f.element, ELEMENTS),
        ("scale", f.scale, rules.SCALES),
        ("rule", f.rule, rules.RULES),
        ("select", f.select, ("mse", "mae")),
        ("zero", f.zero, rules.ZEROS),
    ):
        if value not in options:
            return f"unknown {kind} '{value}'; choose one of {', '.join(options)}"
    roundings = rules.ROUNDINGS.get(f.scale, ())
    if f.scale_rounding is not None and f.scale_rounding not in roundings:
        return (
            f"unknown scale_rounding '{f.scale_rounding}' for {f.scale} scales; choose one of {', '.join(roundings)}"
            if roundings
            else f"{f.scale} scales have no scale_rounding; leave it out"
        )
    if len(f.block) != 2 or min(f.block) < 0:
        return f"block must be [free, contracted], sizes >= 0 (0 = whole axis), got {list(f.block)}"
    two_level = f.scale in rules.TWO_LEVEL
    if not any(f.tensor_scale is v for v in (False, True)) and f.tensor_scale not in ("row", 128):
        return f"unknown tensor_scale {f.tensor_scale!r}; choose one of false, true, row, 128"
    if two_level != bool(f.tensor_scale):
        return f"{f.scale} block scales and a tensor_scale {'' if two_level else 'do not '}belong together" + (
            "; set tensor_scale to true, row or 128" if two_level else "; use scale e4m3 or ue5m3, or no tensor_scale"
        )
    if f.tensor_scale in ("row", 128) and f.tensor_scale is not True and f.block[0] != 1:
        return f"tensor_scale {f.tensor_scale} needs blocks within one row; set block to [1, n], got {list(f.block)}"
    if f.tensor_scale == 128 and f.tensor_scale is not True and (not f.block[1] or 128 % f.block[1]):
        return f"tensor_scale 128 needs a block that divides 128, got {list(f.block)}"
    return _problem_of_numbers(f)


def _problem_of_numbers(f: Format) -> str | None:
    two_level = f.scale in rules.TWO_LEVEL
    if min(f.coef, f.guard, f.tensor_max, *f.targets, 1.0) <= 0:
        return "coef, guard, tensor_max and targets must be above 0"
    if f.rule == "absmax" and f.coef != 1:
        return "coef scales a statistic; under rule absmax use guard (absmax * guard maps to the maximum)"
    if f.rule != "absmax" and (f.guard != 1 or f.targets):
        return f"guard and targets speak of the block's maximum and need rule absmax, got {f.rule}"
    if f.targets and max(f.targets) > ELEMENTS[f.element].max:
        return f"targets must lie on the element's grid, at most {ELEMENTS[f.element].max:g}, got {list(f.targets)}"
    if f.targets and f.scale in ("e8m0", "none"):
        return f"targets need scales that can move by less than a factor of two, not {f.scale}"
    if f.scale == "none" and (f.rule != "absmax" or f.guard != 1):
        return "scale none measures nothing; leave out rule, coef and guard"
    if f.second is not None and f.scale != "e4m3":
        return "a second element is marked by the sign bit of e4m3 block scales; set scale to e4m3"
    if f.second is not None and ELEMENTS[f.second].max != ELEMENTS[f.element].max:
        return f"both elements must reach the same maximum, {f.element} and {f.second} do not"
    if f.zero != "keep" and not two_level:
        return f"zero is about e4m3 and ue5m3 block scales, not {f.scale}; leave it out"
    if f.tensor_max != 448 and not two_level:
        return "tensor_max is about block scales under a tensor_scale; leave it out"
    if two_level and f.tensor_max > ELEMENTS[f.scale].max:
        return f"tensor_max {f.tensor_max:g} is beyond the largest {f.scale} scale {ELEMENTS[f.scale].max:g}"
    return None
