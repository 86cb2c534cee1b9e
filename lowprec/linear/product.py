"""One of a layer's three products, whole: from the layer's tensors to the output, as its recipe says.

Backends multiply two matrices that they have quantised (:mod:`lowprec.linear.backends`). What a recipe may want around
that happens here, in this order:

1. *source*: an operand is the tensor itself, or the value it had in the forward product;
2. *padding* to whole blocks, or a refusal by name;
3. *outer rotation* of a free axis;
4. *split* into parts (:mod:`lowprec.linear.split`);
5. *amax* from the layer's memory, where a recipe delays or holds it (:mod:`lowprec.linear.state`);
6. prepare and multiply, once for every pair of parts, and add the thin terms;
7. turn the output back: the outer rotation, and the forward's rotation if an operand came from the forward; apply the
   gradient mask of that operand; cut the padding off.

A forward value keeps its tensor scale outside, as a factor of the output: values * block scales of FP4 are exact in
bf16, so quantising them again starts from exactly what the forward multiplied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Backend, Packed, Side, choose, rotator, stored
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.linear.split import ChannelSplit, LowRankSplit, MeanSplit, ResidualSplit, factors, strongest
from lowprec.linear.state import LayerState
from lowprec.numerics import Stream
from lowprec.numerics.hadamard import hadamard_order_refusal

TILE = 16
"""Under ``pad: zero`` every size is padded to a multiple of this: kernels work in tiles; zeros change no number."""

TRANSPOSED = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}
"""Which operands of a product are transposes of the layer's x (T, K), w (N, K), dy (T, N)."""


class Shared:
    """The last things made from an activation: q, k and v (gate and up) multiply the same one, made once.

    An entry holds its tensor, so neither memory nor contents can change under it; a new activation takes its place.
    """

    def __init__(self) -> None:
        self._slots: dict[str, tuple[tuple[Any, ...], Tensor, Any]] = {}

    def get(self, slot: str, x: Tensor, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make()`` gives for this very x and ``what`` else it depends on; made once while the slot is theirs."""
        if x.is_inference():
            return make()
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, *what)
        found = self._slots.get(slot)
        if found is None or found[0] != key:
            self._slots[slot] = found = (key, x, make())
        return found[2]

    def clear(self) -> None:
        """Let go of everything."""
        self._slots.clear()


@dataclass(frozen=True)
class Policy:
    """How a model's products are served, whatever the recipe."""

    backend: str = "auto"
    pad: str = "zero"  # "zero" | "refuse"
    save: str = "inputs"  # what is kept for the backward: "inputs" | "codes"
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)


@dataclass(frozen=True)
class Call:
    """One use of a layer: what its products need besides matrices."""

    recipe: LinearRecipe
    stream: Stream
    policy: Policy = Policy()
    state: LayerState | None = None
    observe: bool = False  # whether the layer's memory takes notice (training, not evaluation)


@dataclass(frozen=True)
class Thin:
    """``u v^T`` next to the quantised parts: u (rows, r), v (k, r), fp32."""

    u: Tensor
    v: Tensor
    exact: bool


@dataclass(frozen=True)
class Terms:
    """An operand after its split: matrices to be quantised, and perhaps a thin term. ``of`` is their exact sum."""

    of: Tensor
    parts: tuple[tuple[Tensor, Operand], ...]
    thin: Thin | None = None
    disjoint: bool = False  # parts 0 and 1 have no contracted index in common

    @property
    def rest(self) -> Tensor:
        """``of`` without the thin term."""
        return self.of if self.thin is None else self.parts[0][0]


def pad_to(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zero-pad a matrix (possibly a transposed view) to (rows, cols), keeping its memory order."""
    if x.shape == (rows, cols):
        return x
    if x.stride(0) < x.stride(1):
        return pad_to(x.T, cols, rows).T
    return F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))


def padded_sizes(gemm: Gemm, m: int, n: int, k: int, pad: str) -> tuple[int, int, int]:
    """(m, n, k) rounded up to whole blocks, tiles and, where a whole axis is rotated, to an order that exists."""
    tile = TILE if pad == "zero" and not gemm.counts_zeros else 1
    sizes = []
    for size, multiple, rotation in zip((m, n, k), gemm.multiples(), (gemm.outer_a, gemm.outer_b, gemm.inner)):
        step = math.lcm(multiple, tile)
        size += -size % step
        while rotation is not None and rotation.size == 0 and pad == "zero" and hadamard_order_refusal(size):
            size += step
        sizes.append(size)
    return sizes[0], sizes[1], sizes[2]


def product(
    role: str, tensors: Mapping[str, Tensor], call: Call, out_dtype: torch.dtype, kept: Kept | None = None
) -> Tensor:
    """One product of the layer.

    Args:
        role: ``fprop``, ``dgrad`` or ``wgrad``.
        tensors: the layer's matrices by name: x (T, K), w (N, K) in x's dtype, dy (T, N); the two that the role needs.
        call: recipe, random bits and memory of the layer.
        out_dtype: dtype of the result.
        kept: the operand b, prepared earlier by :func:`keep` (``tensors`` then need not hold it).

    Returns:
        y (T, N), dx (T, K) or dw (N, K).

    Raises:
        ValueError: under ``pad: refuse``, for sizes that no block divides.
    """
    gemm: Gemm = getattr(call.recipe, role)
    a, factor_a = _source(role, "a", tensors, call)
    if kept is None:
        b, factor_b = _source(role, "b", tensors, call)
        rows_b = b.shape[0]
        sizes = _sizes(role, a, rows_b, gemm, call)
    else:
        b, factor_b, rows_b, sizes = None, kept.factor, kept.rows, kept.sizes
    rows_a = a.shape[0]
    a = _outer(role, pad_to(a, sizes[0], sizes[2]), gemm.outer_a, "a", call)
    left = _terms(role, "a", a, tensors, call)
    if b is not None:
        b = _outer(role, pad_to(b, sizes[1], sizes[2]), gemm.outer_b, "b", call)
        right: Terms | Kept = _terms(role, "b", b, tensors, call)
    else:
        assert kept is not None
        right = kept
    out = _multiply(role, left, right, sizes, call, out_dtype, _both(factor_a, factor_b))
    if gemm.outer_a:
        out = _turned(out.T, gemm.outer_a, call, f"{role}.a", inverse=True).T
    if gemm.outer_b:
        out = _turned(out, gemm.outer_b, call, f"{role}.b", inverse=True)
    out = _back_to_inputs(role, out, tensors, call)
    return out[:rows_a, :rows_b]


@dataclass(frozen=True)
class Kept:
    """Operand b of a product, prepared ahead: what ``save: codes`` keeps instead of x."""

    prepared: Packed
    backend: Backend
    factor: Tensor | None
    rows: int
    sizes: tuple[int, int, int]


def keep(x_TK: Tensor, out_features: int, call: Call) -> Kept | None:
    """Operand x of wgrad, prepared in the forward: its codes are kept for the backward, x need not be.

    None where the recipe or the backend gains nothing: codes that need x beside them, or take as much memory as x.
    """
    if keep_refusal(call.recipe):
        return None
    gemm = call.recipe.wgrad
    b, factor = _source("wgrad", "b", {"x": x_TK}, call)
    sizes = padded_sizes(gemm, out_features, b.shape[0], x_TK.shape[0], call.policy.pad)
    b = _outer("wgrad", pad_to(b, sizes[1], sizes[2]), gemm.outer_b, "b", call)
    chosen = _choose("wgrad", gemm, sizes, b, call)
    prepared = stored(_prepare("wgrad", "b", b, gemm, chosen, call), gemm.b.format)
    small = prepared.nbytes < x_TK.numel() * x_TK.element_size()
    return Kept(prepared, chosen, factor, x_TK.shape[1], sizes) if small else None


def keep_refusal(recipe: LinearRecipe) -> str | None:
    """Why the codes of x cannot stand in for x in the backward, or None."""
    if recipe.wgrad.b.format is None:
        return "wgrad takes x unquantised"
    if recipe.wgrad.a.split or recipe.wgrad.b.split:
        return "a split of wgrad needs x itself"
    if isinstance(recipe.dgrad.b.split or (recipe.dgrad.b.source == "fprop" and recipe.fprop.b.split), ChannelSplit):
        return "the weight's channels follow x in dgrad"
    if recipe.fprop.a.gradient != "ste":
        return f"the {recipe.fprop.a.gradient} gradient of x needs x itself"
    if recipe.wgrad.b.amax != "current":
        return f"amax: {recipe.wgrad.b.amax} of x in wgrad is read in the backward"
    return None


def kept_bytes_per_token(
    recipe: LinearRecipe, out_features: int, in_features: int, dtype: torch.dtype, policy: Policy
) -> float:
    """What a layer keeps of x for the backward, as the chosen backend stores it; found by preparing 128 tokens."""
    inputs = in_features * dtype.itemsize
    if policy.save == "inputs" or not recipe.quantized:
        return inputs
    call = Call(recipe, Stream(), dataclasses.replace(policy, shared=Shared()))
    kept = keep(torch.zeros(128, in_features, dtype=dtype), out_features, call)
    return inputs if kept is None else kept.prepared.nbytes / 128


# ---- step 1: which matrix


def _source(role: str, side: Side, tensors: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """The operand's matrix (rows, k), unpadded, and a factor () of the output."""
    name, operand = _operand(role, side, call)
    x, factor = tensors[name], None
    if operand.source == "fprop":
        x, factor = _forward_value(name, tensors, call)
    elif operand.reuse and call.recipe.fprop.inner:
        x = _turned(_pad_forward(name, x, call), call.recipe.fprop.inner, call, "fprop")[: x.shape[0]]
    return (x.T if TRANSPOSED[role][side == "b"] else x), factor


def _operand(role: str, side: Side, call: Call) -> tuple[str, Operand]:
    return GEMM_OPERANDS[role][side == "b"], getattr(getattr(call.recipe, role), side)


def _pad_forward(name: str, x: Tensor, call: Call) -> Tensor:
    """x or w as the forward product pads it."""
    rows, cols = x.shape
    m, n, k = padded_sizes(call.recipe.fprop, rows, rows, cols, call.policy.pad)
    return pad_to(x, m if name == "x" else n, k)


def _forward_value(name: str, tensors: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """What x or w was in the forward product: values * block scales in its dtype, (rows, padded K), and a factor ()."""
    side: Side = "a" if name == "x" else "b"
    gemm, x = call.recipe.fprop, tensors[name]
    rows = x.shape[0]
    padded = _pad_forward(name, x, call)

    def make() -> tuple[Tensor, Tensor | None]:
        terms = _terms("fprop", side, padded, tensors, dataclasses.replace(call, observe=False))
        sizes = padded_sizes(gemm, rows, rows, x.shape[1], call.policy.pad)
        chosen = _choose("fprop", gemm, sizes, padded, call)
        if len(terms.parts) == 1 and terms.thin is None:
            values, scale = chosen.unpacked(_prepare("fprop", side, padded, gemm, chosen, call), x.dtype)
            if scale.numel() == 1:
                return values[:rows], scale.reshape(())
        total = torch.zeros(padded.shape, device=x.device)
        for part, operand in terms.parts:
            total += _dequantized("fprop", side, part, operand, gemm, call)
        if terms.thin is not None:
            v = terms.thin.v.T
            total += terms.thin.u @ (_turned(v, gemm.inner, call, "fprop") if gemm.inner else v)
        return total.to(x.dtype)[:rows], None

    if name == "x" and _deterministic(getattr(gemm, side), gemm):
        return call.policy.shared.get("value", x, (getattr(gemm, side), gemm.inner), make)
    return make()


# ---- steps 2 and 3: padding, outer rotation


def _sizes(role: str, a: Tensor, rows_b: int, gemm: Gemm, call: Call) -> tuple[int, int, int]:
    (m, k), n = a.shape, rows_b
    sizes = padded_sizes(gemm, m, n, k, call.policy.pad)
    if sizes != (m, n, k) and call.policy.pad == "refuse":
        raise ValueError(
            f"layer '{call.stream.layer}': {role} multiplies ({m}, {k}) by ({k}, {n}), but its blocks need "
            f"multiples of {', '.join(map(str, gemm.multiples()))} (rows, columns, contracted); set pad: zero"
        )
    if k != sizes[2] and gemm.counts_zeros and gemm.inner is None:
        raise ValueError(
            f"layer '{call.stream.layer}': {role} contracts {k} values, which its blocks would pad to {sizes[2]}, but "
            "its format counts zeros (a mean, or a grid without zero); choose sizes that blocks divide"
        )
    return sizes


def _outer(role: str, x: Tensor, rotation: Rotation | None, side: Side, call: Call) -> Tensor:
    if rotation is None:
        return x
    return _turned(x.T, rotation, call, f"{role}.{side}").T


def _turned(x: Tensor, rotation: Rotation, call: Call, role: str, inverse: bool = False) -> Tensor:
    """x (rows, cols), its last axis rotated or turned back."""
    return oracle.turned(x, rotation, call.stream, role, inverse, rotator(call.policy.backend, x.device))


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


# ---- step 4: split


def _terms(role: str, side: Side, x: Tensor, tensors: Mapping[str, Tensor], call: Call) -> Terms:
    """Operand x (rows, k), padded, as a sum."""
    name, operand = _operand(role, side, call)
    split, whole = operand.split, dataclasses.replace(operand, split=None)
    if split is None:
        return Terms(x, ((x, operand),))
    features_last = not TRANSPOSED[role][side == "b"]  # x (T, K), w (N, K), dy (T, N), or the transpose of one
    if isinstance(split, MeanSplit):
        count = (tensors["x"] if "x" in tensors else tensors["dy"]).shape[0]
        return _mean_terms(name, x, split, whole, 0 if features_last else 1, count, call)
    if isinstance(split, LowRankSplit):
        u, v = factors(x, split.rank, call.stream, f"{role}.{name}.probe")
        if split.term == "quantized":
            u, v = _thin_codes(u, whole), _thin_codes(v, whole)
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
        error = x.float() - _rounded(role, side, Terms(x, ((x, whole),)), gemm, call, whole=False)
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
        centre = _thin_codes(centre[:, None], operand)[:, 0]
    u, v = (real, centre) if tokens == 0 else (centre, real)
    return Terms(x, ((rest, operand),), Thin(u[:, None], v[:, None], split.term == "exact"))


def _thin_codes(u: Tensor, operand: Operand) -> Tensor:
    """A thin factor (rows, r), each column rounded to the operand's format along its length; fp32."""
    assert operand.format is not None
    format = (
        operand.format
        if operand.format.block[0] == 1
        else dataclasses.replace(operand.format, block=(1, operand.format.block[1]))
    )
    return format.quantize(u.T.contiguous()).dequantize().T


def _energy(x_TF: Tensor, split: ChannelSplit | ResidualSplit, call: Call) -> Tensor | None:
    """Sum of squares of every feature, (F,) fp32; None while the features are still to be chosen. A weight follows the
    activation it meets."""
    now = x_TF.float().square().sum(dim=0)
    if not isinstance(split, ChannelSplit) or split.collect is None or call.state is None:
        return now
    if call.observe:
        call.state.observe("x.energy", now, call.stream.micro)
    return call.state.total("x.energy", call.stream.step)


# ---- steps 5 and 6: amax, prepare, multiply


def _choose(role: str, gemm: Gemm, sizes: tuple[int, int, int], x: Tensor, call: Call) -> Backend:
    return choose(call.policy.backend, gemm, role, *sizes, x.dtype, x.device)[0]


def _deterministic(operand: Operand, gemm: Gemm) -> bool:
    return (
        operand.rounding == "nearest"
        and operand.amax == "current"
        and (gemm.inner is None or gemm.inner.signs != "step")
    )


def _prepare(role: str, side: Side, x: Tensor, gemm: Gemm, chosen: Backend, call: Call) -> Packed:
    """x prepared by the backend; an activation that several layers prepare alike is prepared once."""
    name, operand = GEMM_OPERANDS[role][side == "b"], getattr(gemm, side)
    if name == "x" and _deterministic(operand, gemm):
        what = (chosen.name, operand.format, gemm.inner)
        return call.policy.shared.get(role, x, what, lambda: chosen.prepare(x, gemm, side, call.stream, role))
    return chosen.prepare(x, gemm, side, call.stream, role, _amax(role, name, x, operand, gemm, call))


def _amax(role: str, name: str, x: Tensor, operand: Operand, gemm: Gemm, call: Call) -> Tensor | None:
    """The maximum that the layer's memory prescribes, () fp32, or None; what is seen now is noted for later steps."""
    if operand.amax == "current" or call.state is None:
        return None
    key = f"fprop.{name}.amax" if operand.reuse else f"{role}.{name}.amax"
    held = call.state.held(key, call.stream.step) if operand.amax == "hold" else None
    if held is not None:
        return held
    seen = _turned(x, gemm.inner, call, role) if gemm.inner else x
    current = seen.abs().amax().float()
    if call.observe and not operand.reuse:
        call.state.observe(key, current, call.stream.micro)
    return call.state.amax(key, current) if operand.amax == "delayed" else None


def _multiply(
    role: str,
    a: Terms,
    b: Terms | Kept,
    sizes: tuple[int, int, int],
    call: Call,
    out_dtype: torch.dtype,
    factor: Tensor | None,
) -> Tensor:
    """The product of two sums, every pair of parts by the best backend for it."""
    gemm: Gemm = getattr(call.recipe, role)
    if isinstance(b, Kept):
        pa = _prepare(role, "a", a.of, gemm, b.backend, call)
        return _scaled(b.backend, pa, b.prepared, gemm, out_dtype, factor)
    if len(a.parts) == len(b.parts) == 1 and a.thin is None and b.thin is None:
        chosen = _choose(role, gemm, sizes, a.of, call)
        pa, pb = _prepare(role, "a", a.of, gemm, chosen, call), _prepare(role, "b", b.of, gemm, chosen, call)
        return _scaled(chosen, pa, pb, gemm, out_dtype, factor)
    out = torch.zeros(sizes[0], sizes[1], device=a.of.device)
    for i, (part_a, operand_a) in enumerate(a.parts):
        for j, (part_b, operand_b) in enumerate(b.parts):
            if a.disjoint and b.disjoint and i != j:
                continue  # they have no contracted index in common
            pair = dataclasses.replace(gemm, a=operand_a, b=operand_b)
            chosen = _choose(role, pair, sizes, part_a, call)
            pa = chosen.prepare(part_a, pair, "a", call.stream, role)
            out += chosen.multiply(pa, chosen.prepare(part_b, pair, "b", call.stream, role), pair, torch.float32)
    if a.thin is not None:
        other = b.of.float() if a.thin.exact else _rounded(role, "b", b, gemm, call, whole=True)
        out += a.thin.u @ (other @ a.thin.v).T
    if b.thin is not None:
        other = a.rest.float() if b.thin.exact else _rounded(role, "a", a, gemm, call, whole=False)
        out += (other @ b.thin.v) @ b.thin.u.T
    return (out if factor is None else out * factor).to(out_dtype)


def _scaled(chosen: Backend, a: Packed, b: Packed, gemm: Gemm, out_dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    if factor is None:
        return chosen.multiply(a, b, gemm, out_dtype)
    return (chosen.multiply(a, b, gemm, torch.float32) * factor).to(out_dtype)


def _dequantized(role: str, side: Side, x: Tensor, operand: Operand, gemm: Gemm, call: Call) -> Tensor:
    """What x (rows, k) becomes as an operand, in the rotated space of the product; fp32."""
    q = oracle.prepare(x, operand, gemm.inner, call.stream, role, GEMM_OPERANDS[role][side == "b"])
    return q.blockscaled() * q.tensor_scale.reshape(-1, 1)


def _rounded(role: str, side: Side, terms: Terms, gemm: Gemm, call: Call, whole: bool) -> Tensor:
    """The quantised parts of a sum, turned back, with the thin term if ``whole``; fp32 (rows, k)."""
    total = torch.zeros(terms.of.shape, device=terms.of.device)
    for part, operand in terms.parts:
        total += _dequantized(role, side, part, operand, gemm, call)
    if gemm.inner:
        total = _turned(total, gemm.inner, call, role, inverse=True)
    return total + terms.thin.u @ terms.thin.v.T if whole and terms.thin is not None else total


# ---- step 7: back to the space of the inputs


def _back_to_inputs(role: str, out: Tensor, tensors: Mapping[str, Tensor], call: Call) -> Tensor:
    """dx or dw (rows, K) out of the forward's rotated space, masked by the gradient rule of the forward operand."""
    fprop = call.recipe.fprop
    if role == "fprop":
        return out
    wanted = "x" if role == "dgrad" else "w"  # whose gradient this is
    operand = fprop.a if wanted == "x" else fprop.b
    _, other = _operand(role, "b", call)
    is_turned = fprop.inner is not None and (other.reuse or other.source == "fprop")
    if operand.gradient != "ste":
        if fprop.inner and not is_turned:
            out = _turned(_pad_forward(wanted, out, call), fprop.inner, call, "fprop")
            is_turned = True
        mask = _gradient_mask(wanted, tensors[wanted], operand, call)
        out = pad_to(out[: mask.shape[0]], mask.shape[0], mask.shape[1]) * mask.to(out.dtype)
    if is_turned:
        assert fprop.inner is not None
        out = _turned(out, fprop.inner, call, "fprop", inverse=True)
    return out[:, : tensors["w"].shape[1]]


def _gradient_mask(name: str, x: Tensor, operand: Operand, call: Call) -> Tensor:
    """Where the gradient of a quantised forward operand passes, (rows, padded K) bool in the rotated space."""
    assert operand.format is not None
    fprop = call.recipe.fprop
    padded = _pad_forward(name, x, call)
    q = oracle.prepare(padded, operand, fprop.inner, call.stream, "fprop", name)
    scale = (q.scales * q.tensor_scale.reshape(-1, 1)).repeat_interleave(q.block, dim=1)[:, : padded.shape[1]]
    now = _turned(padded, fprop.inner, call, "fprop").float() if fprop.inner else padded.float()
    element = operand.format.element_type
    reach = operand.clip * element.max
    if operand.gradient == "trust":  # an error above half the last (widest) gap means: beyond the grid by that much
        values = element.values
        reach = element.max + (values[-1] - values[-2] if len(values) > 1 else 2 * values[0]) / 2
    return (now.abs() <= reach * scale)[: x.shape[0]]
