"""Operands: from a layer's tensors to what a backend has prepared.

The first five steps of a product (:mod:`lowprec.linear.product`), one function each: :func:`source`, :func:`outer`,
:func:`terms_of`, :func:`amax_of`, :func:`prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Backend, Packed, Side, choose
from lowprec.linear.call import TILE, TRANSPOSED, Call, Cut, operand_of, pad_to, padded_sizes, turned
from lowprec.linear.codes import transposed
from lowprec.linear.cut import cuts_of, maxima, sharing, window_of
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand, Rotation
from lowprec.linear.split import ChannelSplit, LowRankSplit, MeanSplit, ResidualSplit, factors, strongest
from lowprec.linear.weight import CodedWeight
from lowprec.numerics import QTensor

# ---- which matrix


Matrix = Any
"""(rows, k): a Tensor, or a QTensor of a weight that arrived as codes."""


def source(role: str, side: Side, tensors: Mapping[str, Tensor], call: Call) -> tuple[Matrix, Tensor | None]:
    """The operand's matrix (rows, k), unpadded, and a factor () of the output."""
    name, operand = operand_of(role, side, call)
    x, factor = tensors[name], None
    if operand.source == "fprop":
        x, factor = forward_value(name, tensors, call)
    elif isinstance(x, CodedWeight):
        return (transposed(x.codes()) if TRANSPOSED[role][side == "b"] else x.codes()), None
    elif operand.reuse and call.recipe.fprop.inner:
        x = turned(pad_forward(name, x, call), call.recipe.fprop.inner, call, "fprop")[: x.shape[0]]
    return (x.T if TRANSPOSED[role][side == "b"] else x), factor


def pad_forward(name: str, x: Matrix, call: Call) -> Matrix:
    """x or w as the forward product pads it."""
    rows, cols = x.shape
    m, n, k = padded_sizes(call.recipe.fprop, rows, rows, cols, call.policy.pad)
    return pad_to(x, m if name == "x" else n, k)


def forward_value(name: str, tensors: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """What x or w was in the forward product: values * block scales in its dtype, (rows, padded K), and a factor ()."""
    side: Side = "a" if name == "x" else "b"
    gemm, x = call.recipe.fprop, tensors[name]
    rows = x.shape[0]
    padded: Matrix = pad_forward(name, x.codes() if isinstance(x, CodedWeight) else x, call)

    def make() -> tuple[Tensor, Tensor | None]:
        terms = terms_of("fprop", side, padded, tensors, dataclasses.replace(call, observe=False))
        sizes = padded_sizes(gemm, rows, rows, x.shape[1], call.policy.pad)
        chosen = chosen_backend("fprop", gemm, sizes, x, call)
        if len(terms.parts) == 1 and terms.thin is None:
            values, scale = chosen.unpacked(prepare("fprop", side, padded, gemm, chosen, call), x.dtype)
            if scale.numel() == 1:
                return values[:rows], scale.reshape(())
        total = torch.zeros(padded.shape, device=x.device)
        for part, operand in terms.parts:
            total += dequantized("fprop", side, part, operand, gemm, call)
        if terms.thin is not None:
            v = terms.thin.v.T
            total += terms.thin.u @ (turned(v, gemm.inner, call, "fprop") if gemm.inner else v)
        return total.to(x.dtype)[:rows], None

    if name == "x" and _deterministic(getattr(gemm, side), gemm):
        return call.policy.shared.get("value", x, (getattr(gemm, side), gemm.inner, *cuts_of(name, call)), make)
    return make()


def outer(role: str, x: Matrix, rotation: Rotation | None, side: Side, call: Call) -> Matrix:
    """x (rows, k) with its free axis rotated."""
    if rotation is None:
        return x
    return turned(x.T, rotation, call, f"{role}.{side}").T


# ---- as a sum


@dataclass(frozen=True)
class Thin:
    """``u v^T`` next to the quantised parts: u (rows, r), v (k, r), fp32."""

    u: Tensor
    v: Tensor
    exact: bool


@dataclass(frozen=True)
class Terms:
    """An operand after its split: matrices to be quantised, and perhaps a thin term. ``of`` is their exact sum."""

    of: Matrix
    parts: tuple[tuple[Matrix, Operand], ...]
    thin: Thin | None = None
    disjoint: bool = False  # parts 0 and 1 have no contracted index in common

    @property
    def rest(self) -> Matrix:
        """``of`` without the thin term."""
        return self.of if self.thin is None else self.parts[0][0]


def terms_of(role: str, side: Side, x: Matrix, tensors: Mapping[str, Tensor], call: Call) -> Terms:
    """Operand x (rows, k), padded, as a sum."""
    name, operand = operand_of(role, side, call)
    split = operand.split
    if split is None:
        return Terms(x, ((x, operand),))
    whole = dataclasses.replace(operand, split=None)
    features_last = not TRANSPOSED[role][side == "b"]  # x (T, K), w (N, K), dy (T, N), or the transpose of one
    if isinstance(split, MeanSplit):
        count = (tensors["x"] if "x" in tensors else tensors["dy"]).shape[0]
        return _mean_terms(name, x, split, whole, 0 if features_last else 1, count, call)
    if isinstance(split, LowRankSplit):
        u, v = factors(x, split.rank, call.stream, f"{role}.{name}.probe")
        if split.term == "quantized":
            u, v = _thin_codes(u, whole, ()), _thin_codes(v, whole, ())
        rest = (x.float() - u @ v.T).to(x.dtype)
        return Terms(x, ((rest, whole),), Thin(u, v, split.term == "exact"))
    keeps_mean = isinstance(split, ChannelSplit) and operand.rounding == "stochastic"
    other = Operand(split.format, "stochastic" if keeps_mean else "nearest")
    energy = _energy(x if name == "dy" else tensors["x"], split, call)
    if energy is None:
        return Terms(x, ((x, whole),))
    chosen = F.pad(strongest(energy, split.top), (0, x.shape[1 if features_last else 0] - energy.numel()))
    mask = chosen.to(x.dtype) if features_last else chosen.to(x.dtype)[:, None]
    if isinstance(split, ResidualSplit):
        gemm: Gemm = getattr(call.recipe, role)
        error = x.float() - rounded(role, side, Terms(x, ((x, whole),)), gemm, call, whole=False)
        error = (error * mask).to(x.dtype)
        return Terms(x, ((x, whole), (error, other)))
    return Terms(x, ((x * (1 - mask), whole), (x * mask, other)), disjoint=features_last)


def _mean_terms(name: str, x: Tensor, split: MeanSplit, operand: Operand, tokens: int, count: int, call: Call) -> Terms:
    """x less its centre, and the centre; ``tokens`` is the axis of tokens, ``count`` of which are not padding."""
    centre = x.float().sum(dim=tokens) / count
    if split.stat == "ema":
        if call.state is None:
            return Terms(x, ((x, operand),))
        key = f"{name}.mean"
        features = call.state.memories[key].length
        if call.observe:
            call.state.observe(key, centre[:features], call.stream.micro)
        centre = F.pad(call.state.mean(key), (0, centre.numel() - features))
    centre = centre.to(x.dtype).float()
    real = (torch.arange(x.shape[tokens], device=x.device) < count).float()  # padding stays zero
    rest = x - torch.outer(*((real, centre) if tokens == 0 else (centre, real))).to(x.dtype)
    if split.term == "quantized":  # as published: what rounding the centre loses is lost
        centre = _thin_codes(centre[:, None], operand, cuts_of(name, call))[:, 0]
    u, v = (real, centre) if tokens == 0 else (centre, real)
    return Terms(x, ((rest, operand),), Thin(u[:, None], v[:, None], split.term == "exact"))


def _thin_codes(u: Tensor, operand: Operand, cuts: tuple[Cut, ...]) -> Tensor:
    """A thin factor (rows, r), each column rounded to the operand's format along its length, which may be cut; fp32."""
    assert operand.format is not None
    format = (
        operand.format
        if operand.format.block[0] == 1
        else dataclasses.replace(operand.format, block=(1, operand.format.block[1]))
    )
    u = u.T.contiguous()
    return format.quantize(u, amax=maxima(u, format, cuts) if cuts and format.amax_of else None).dequantize().T


def _energy(x_TF: Tensor, split: ChannelSplit | ResidualSplit, call: Call) -> Tensor | None:
    """Sum of squares of every feature, (F,) fp32; None while the features are still to be chosen. A weight follows the
    activation it meets."""
    now = x_TF.float().square().sum(dim=0)
    if not isinstance(split, ChannelSplit) or split.collect is None or call.state is None:
        return now
    if call.observe and all(cut.rank == 0 for cut in call.cuts.values()):  # sums: once for all ranks that see the same
        call.state.observe("x.energy", now, call.stream.micro)
    return call.state.total("x.energy", call.stream.step)


def dequantized(role: str, side: Side, x: Matrix, operand: Operand, gemm: Gemm, call: Call) -> Tensor:
    """What x (rows, k) becomes as an operand, in the rotated space of the product; fp32."""
    if isinstance(x, QTensor):
        operand_x = oracle.prepared(x)
        return operand_x.blockscaled() * operand_x.tensor_scale.reshape(-1, 1)
    alone = Gemm(operand, Operand(), gemm.inner) if side == "a" else Gemm(Operand(), operand, gemm.inner)
    rows, k = x.shape
    chosen = chosen_backend(role, alone, (rows, TILE, k) if side == "a" else (TILE, rows, k), x, call)
    values, scale = chosen.unpacked(prepare_part(role, side, x, alone, chosen, call), torch.float32)
    return values * scale.reshape(-1, 1)


def rounded(role: str, side: Side, terms: Terms, gemm: Gemm, call: Call, whole: bool) -> Tensor:
    """The quantised parts of a sum, turned back, with the thin term if ``whole``; fp32 (rows, k)."""
    total = torch.zeros(terms.of.shape, device=terms.of.device)
    for part, operand in terms.parts:
        total += dequantized(role, side, part, operand, gemm, call)
    if gemm.inner:
        total = turned(total, gemm.inner, call, role, inverse=True)
    return total + terms.thin.u @ terms.thin.v.T if whole and terms.thin is not None else total


# ---- quantised


def chosen_backend(role: str, gemm: Gemm, sizes: tuple[int, int, int], x: Tensor, call: Call) -> Backend:
    """Who multiplies (m, n, k) = ``sizes`` of x's dtype on x's device."""
    return choose(call.policy.backend, gemm, role, *sizes, x.dtype, x.device)[0]


def _deterministic(operand: Operand, gemm: Gemm) -> bool:
    return (
        operand.rounding == "nearest"
        and operand.amax == "current"
        and (gemm.inner is None or gemm.inner.signs != "step")
    )


def prepare(role: str, side: Side, x: Matrix, gemm: Gemm, chosen: Backend, call: Call) -> Packed:
    """x prepared by the backend; an activation that several layers prepare alike is prepared once."""
    if isinstance(x, QTensor):
        return chosen.load(x, gemm, side)
    name, operand = GEMM_OPERANDS[role][side == "b"], getattr(gemm, side)
    if name == "x" and _deterministic(operand, gemm):
        what = (chosen.name, operand.format, gemm.inner, *cuts_of(name, call))
        return call.policy.shared.get(role, x, what, lambda: prepare_part(role, side, x, gemm, chosen, call))
    amax, window = amax_of(role, name, x, operand, gemm, call), window_of(role, side, x, operand, call)
    return chosen.prepare(x, gemm, side, call.stream, role, amax, window)


def prepare_part(role: str, side: Side, x: Matrix, gemm: Gemm, chosen: Backend, call: Call) -> Packed:
    """x prepared by its own maximum, whatever the layer remembers: a part of a split, or a value on the side."""
    if isinstance(x, QTensor):
        return chosen.load(x, gemm, side)
    name, operand = GEMM_OPERANDS[role][side == "b"], getattr(gemm, side)
    amax = shared_amax(role, name, x, operand, gemm.inner, call)
    return chosen.prepare(x, gemm, side, call.stream, role, amax, window_of(role, side, x, operand, call))


def shared_amax(role: str, name: str, x: Tensor, operand: Operand, inner: Rotation | None, call: Call) -> Tensor | None:
    """The maximum of all ranks' parts of an operand that is cut, () or (rows, 1) fp32; None where x's own will do."""
    cuts = sharing(role, name, operand.format, call)
    if not cuts:
        return None
    assert operand.format is not None
    return maxima(turned(x, inner, call, role) if inner else x, operand.format, cuts)


def amax_of(role: str, name: str, x: Tensor, operand: Operand, gemm: Gemm, call: Call) -> Tensor | None:
    """The maximum to quantise by, fp32 (), for rows (rows, 1), or None = x's own: what the layer's memory prescribes,
    or that of all ranks' parts. What is seen now is noted for later steps."""
    if operand.amax == "current" or call.state is None:
        return shared_amax(role, name, x, operand, gemm.inner, call)
    assert operand.format is not None
    key = f"fprop.{name}.amax" if operand.reuse else f"{role}.{name}.amax"
    held = call.state.held(key, call.stream.step) if operand.amax == "hold" else None
    cuts = sharing(role, name, operand.format, call)
    one_block = bool(cuts) and operand.format.block == (0, 0)  # a NaN anywhere is a NaN everywhere, whatever the scale
    if held is not None and not one_block:
        return held
    seen = turned(x, gemm.inner, call, role) if gemm.inner else x
    current = maxima(seen, operand.format, cuts)
    if held is None and call.observe and not operand.reuse:
        call.state.observe(key, current, call.stream.micro)
    amax = call.state.amax(key, current) if operand.amax == "delayed" else current if held is None else held
    if one_block:
        return torch.where(current.isfinite(), amax, torch.nan)
    return amax if cuts or operand.amax == "delayed" else None
