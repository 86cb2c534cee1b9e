"""A weight that arrives as the codes its products will use.

A sharded weight is gathered before a layer runs. If the recipe will quantise it anyway, the ranks may quantise their
rows first and gather codes: 4.5 bits a value for NVFP4 where bf16 takes 16, and *the same numbers*, because a scale
either belongs to a block of rows that one rank holds, or comes from the maximum of the whole matrix, one number that
ranks agree on before. What a rank does with its rows is what the product would do with the matrix::

    fp32 rows -> the activations' dtype -> rotated along in_features (fprop.inner) -> codes and block scales

Rotating before gathering, and maxima of many layers in one all-reduce, are HQ-FSDP (arXiv:2501.02625 section 4); there
the gathered integers are copied into a bf16 weight, here they stay codes until the product takes them
(:class:`CodedWeight`).

What this is not: compression of the weight on the way. A recipe that needs the weight itself anywhere is refused by
name (:func:`codes_refusal`), and so are rows that blocks straddle. Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import quantized, rotator
from lowprec.linear.call import Policy, padded_sizes
from lowprec.linear.codes import transposes
from lowprec.linear.recipe import Gemm, LinearRecipe, Operand
from lowprec.linear.split import LowRankSplit, MeanSplit
from lowprec.numerics import Format, QTensor, Stream

# ---- who may


@lru_cache(maxsize=1024)
def codes_refusal(recipe: LinearRecipe, rows: int | None = None, in_features: int | None = None) -> str | None:
    """Why a layer cannot take codes instead of its weight, or None.

    Args:
        recipe: the layer's.
        rows: out_features that each rank holds; None leaves shapes out of the question.
        in_features: of the layer, whole.
    """
    why = _fprop_refusal(recipe.fprop) or _dgrad_refusal(recipe)
    if why or rows is None or in_features is None:
        return why
    free, along = _format(recipe).block
    if rows == 0 or (free > 1 and rows % free):
        return f"a rank holds {rows} rows, which blocks of {free}x{along} do not divide"
    if (along and in_features % along) or (_format(recipe).bits <= 4 and in_features % 2):
        return f"in_features {in_features} is no multiple of a block of {free}x{along} and of whole bytes"
    if recipe.fprop.inner and padded_sizes(recipe.fprop, 1, rows, in_features, "zero")[2] != in_features:
        return f"in_features {in_features} is padded before the rotation of fprop ({recipe.fprop.inner})"
    return None


def _fprop_refusal(fprop: Gemm) -> str | None:
    w, f = fprop.b, fprop.b.format
    if f is None:
        return "fprop takes the weight unquantised"
    if w.rounding != "nearest":
        return f"fprop rounds the weight by {w.rounding}, with random bits of the micro-batch"
    if w.amax != "current":
        return f"amax: {w.amax} of the weight is remembered by the layer"
    if w.split:
        return f"fprop splits the weight by {w.split}"
    if w.gradient != "ste":
        return f"the {w.gradient} gradient of the weight needs the weight itself"
    if fprop.outer_b:
        return f"fprop rotates out_features ({fprop.outer_b}), which ranks share"
    if fprop.inner and fprop.inner.signs == "step":
        return f"fprop rotates the weight anew in every micro-batch ({fprop.inner})"
    if f.block[0] == 0 and (f.block[1] or f.rule != "absmax"):
        return f"a scale of format {f.name} spans all rows and is no maximum that ranks could agree on ({f.rule})"
    if f.amax_of == "row":
        return f"format {f.name} has one scale a row, which ranks that share in_features would have to agree on"
    if f.amax_of == "tensor" and f.rule != "absmax":
        return f"the tensor scale of format {f.name} comes from the {f.rule} of blocks, not from a maximum"
    if f.bits > 8:
        return f"codes of {f.bits} bits are no smaller than the weight"
    return _exact_term(fprop, "fprop")


def _dgrad_refusal(recipe: LinearRecipe) -> str | None:
    dgrad, forward = recipe.dgrad, recipe.fprop.b
    if dgrad.b.source == "fprop":
        return None  # a function of the forward's codes
    if not dgrad.b.reuse:
        return "dgrad takes the weight unquantised" if dgrad.b.format is None else "dgrad quantises the weight anew"
    assert forward.format is not None
    if dgrad.b.format != forward.format or dgrad.b.split or not transposes(forward.format):
        return f"dgrad cannot use the codes of format {forward.format.name} along their other axis"
    if dgrad.inner or dgrad.outer_b:
        return f"dgrad rotates the weight ({dgrad.inner or dgrad.outer_b})"
    return _exact_term(dgrad, "dgrad")


def _exact_term(gemm: Gemm, role: str) -> str | None:
    split = gemm.a.split
    if isinstance(split, (MeanSplit, LowRankSplit)) and split.term == "exact":
        return f"the exact term of {role} (split by {split}) multiplies the weight itself"
    return None


def _format(recipe: LinearRecipe) -> Format:
    operand: Operand = recipe.fprop.b
    assert operand.format is not None, recipe.name
    return operand.format


# ---- what a rank does with its rows


def needs_amax(recipe: LinearRecipe) -> bool:
    """Whether :func:`encode_weight` needs the maximum of the whole matrix."""
    return _format(recipe).amax_of == "tensor"


def local_amax(
    w_nK: Tensor, recipe: LinearRecipe, policy: Policy | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """This rank's part of the maximum: the largest of all ranks' is the ``amax`` of :func:`encode_weight`.

    Args:
        w_nK: rows of the weight, any floating dtype.
        recipe: one that :func:`codes_refusal` lets pass. policy: of the layer. dtype: of the layer's activations.

    Returns:
        () fp32; infinity where a row holds NaN or infinity (a maximum over ranks may lose a NaN, not an infinity).
    """
    amax = _rotated(w_nK, recipe, policy or Policy(), dtype).abs().amax().float()
    return torch.where(amax.isfinite(), amax, torch.inf)


def encode_weight(
    w_nK: Tensor,
    recipe: LinearRecipe,
    amax: Tensor | None,
    policy: Policy | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> QTensor:
    """Codes of rows of a weight: rows of what the forward product would make of all of it, bit for bit.

    Args:
        w_nK: rows of the weight, a whole number of blocks; any floating dtype.
        recipe, policy, dtype: as for :func:`local_amax`.
        amax: () fp32, the maximum of the whole matrix; None unless :func:`needs_amax`.

    Raises:
        ValueError: for a recipe or rows that :func:`codes_refusal` refuses, or without the maximum it needs.
    """
    why = codes_refusal(recipe, *w_nK.shape)
    if why:
        raise ValueError(f"recipe {recipe.name} cannot have its weight as codes: {why}; gather the weight itself")
    if needs_amax(recipe) != (amax is not None):
        raise ValueError(
            f"recipe {recipe.name}: format {_format(recipe).name} {'has one scale' if amax is None else 'has no scale'}"
            f" of the whole matrix; {'give' if amax is None else 'leave out'} amax"
        )
    if amax is not None:
        amax = torch.where(amax.isfinite(), amax, torch.nan)
    policy = policy or Policy()
    return quantized(policy.backend, _rotated(w_nK, recipe, policy, dtype), _format(recipe), amax)


def _rotated(w_nK: Tensor, recipe: LinearRecipe, policy: Policy, dtype: torch.dtype) -> Tensor:
    w_nK, inner = w_nK.to(dtype), recipe.fprop.inner
    if inner is None:
        return w_nK
    return oracle.turned(w_nK, inner, Stream(), "fprop", rotate=rotator(policy.backend, w_nK.device))


# ---- as bytes

_STORED = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "ue5m3": torch.uint8}


def _layout(format: Format, rows: int, k: int) -> list[tuple[torch.dtype, int, int]]:
    """What the codes of (rows, k) are stored as: (dtype, rows, columns) of codes, block scales, scales of 1 x 128."""
    free, along = format.block
    parts = [
        (torch.uint8, rows, k // 2 if format.bits <= 4 else k),
        (_STORED.get(format.scale, torch.float32), rows // (free or rows), k // (along or k)),
    ]
    if not isinstance(format.tensor_scale, bool):
        parts.append((torch.float32, rows, -(-k // 128)))
    return parts


def payload_bytes(recipe: LinearRecipe, rows: int, in_features: int) -> int:
    """Bytes of :func:`payload` of so many rows."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, *shape in _layout(_format(recipe), rows, in_features))


def payload(q: QTensor) -> Tensor:
    """The rows of a rank as they travel, uint8 (bytes,): packed codes, block scales, scales of 1 x 128.

    One scale of the whole matrix is not in it: whoever knows the maximum knows it.
    """
    parts = [q.pack(), q.scales]
    if not isinstance(q.format.tensor_scale, bool):
        assert q.tensor_scale is not None
        parts.append(q.tensor_scale)
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


def from_payload(bytes_WB: Tensor, format: Format, shape: tuple[int, int], tensor_scale: Tensor | None) -> QTensor:
    """The codes of the whole matrix.

    Args:
        bytes_WB: uint8, the payloads of W ranks in the order of their rows.
        format: the forward product's for the weight.
        shape: (N, K) of the whole matrix; W divides N.
        tensor_scale: fp32, as every rank's :func:`encode_weight` gave it; not looked at where scales are in the bytes.
    """
    ranks, at, parts = bytes_WB.shape[0], 0, []
    for dtype, rows, columns in _layout(format, shape[0] // ranks, shape[1]):
        size = rows * columns * dtype.itemsize
        part = bytes_WB[:, at : at + size].clone(memory_format=torch.contiguous_format)
        parts.append(part.view(dtype).view(ranks * rows, columns))
        at += size
    codes, scales, *rest = parts
    scales = scales if format.block[0] else scales[:1]  # one for all: every rank has found the same
    return QTensor(QTensor.unpack(codes, format), scales, rest[0] if rest else tensor_scale, format)


# ---- in place of the weight


@dataclass
class Held:
    """What a :class:`CodedWeight` and its views share."""

    bytes_WB: Tensor
    recipe: LinearRecipe
    tensor_scale: Tensor | None


class CodedWeight(torch.Tensor):
    """Codes of a weight where a parameter is expected: it shows shape (N, K) and a dtype, and has no numbers.

    :class:`~lowprec.linear.QuantizedLinear` takes it for its weight; the gradient is a plain (N, K) tensor of its
    dtype. Every other operation is refused. The bytes belong to the caller, who may overwrite, free and allocate them
    again (FSDP2 does); they must be there when the layer runs and when its gradient is computed.
    """

    held: Held
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Held, shape: torch.Size | tuple[int, int], dtype: torch.dtype) -> CodedWeight:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=held.bytes_WB.device)
        made.held = held
        return made

    @staticmethod
    def of(
        bytes_WB: Tensor,
        recipe: LinearRecipe,
        shape: tuple[int, int],
        tensor_scale: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> CodedWeight:
        """A weight of these codes.

        Args:
            bytes_WB: uint8, the payloads of W ranks in the order of their rows; held, not copied.
            recipe: that the codes were made for.
            shape: (N, K).
            tensor_scale: see :func:`from_payload`.
            dtype: of the layer's activations.

        Raises:
            ValueError: if the bytes are not those of this recipe and shape.
        """
        ranks, (rows, k) = bytes_WB.shape[0], shape
        expected = (ranks, payload_bytes(recipe, rows // max(ranks, 1), k))
        if bytes_WB.dtype != torch.uint8 or tuple(bytes_WB.shape) != expected or rows % ranks:
            raise ValueError(
                f"codes of a weight {tuple(shape)} under recipe {recipe.name} from {ranks} ranks are uint8 "
                f"{expected}, got {bytes_WB.dtype} {tuple(bytes_WB.shape)}"
            )
        return CodedWeight(Held(bytes_WB, recipe, tensor_scale), shape, dtype)

    def refill(self, recipe: LinearRecipe, tensor_scale: Tensor | None) -> None:
        """The bytes now hold other codes, of this recipe and under this tensor scale; views see it too."""
        self.held.recipe, self.held.tensor_scale = recipe, tensor_scale

    def codes(self) -> QTensor:
        """What it holds, unpacked: one byte a code. Made anew at every call; drop it after use."""
        held, shape = self.held, (self.shape[0], self.shape[1])
        return from_payload(held.bytes_WB, _format(held.recipe), shape, held.tensor_scale)

    def refusal(self, recipe: LinearRecipe, dtype: torch.dtype) -> str | None:
        """Why a layer under this recipe, with activations of this dtype, cannot use these codes, or None."""
        mine = self.held.recipe
        if mine == recipe and self.dtype == dtype:
            return None
        other = "another version of " if mine != recipe and mine.name == recipe.name else ""
        return (
            f"its weight arrived as codes for recipe {mine.name} and {self.dtype} activations, but it runs {other}"
            f"recipe {recipe.name} on {dtype}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CodedWeight({tuple(self.shape)}, {self.dtype}, codes of {_format(self.held.recipe).name})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        me = args[0] if args else None
        if isinstance(me, CodedWeight):
            geometry = (list(me.shape), list(me.stride()), 0)
            if func in _SAME or (func in _RESHAPES and all(new == old for new, old in zip(args[1:], geometry))):
                return CodedWeight(me.held, me.shape, me.dtype)
            if func is torch.ops.aten.zeros_like.default:  # a gradient for a layer that was not used
                return torch.zeros(me.shape, dtype=me.dtype, device=me.device)
        raise TypeError(
            f"{func} was asked of a CodedWeight, which holds codes and no numbers: only QuantizedLinear can use it; "
            "gather this weight unquantised if anything else needs it"
        )


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.as_strided.default)
