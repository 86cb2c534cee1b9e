"""Cuts: a layer of which this rank holds a part gives the numbers that one process would give.

A linear layer has three axes, and its matrices two each::

    x (tokens, in)      w (out, in)      dy (tokens, out)

Tensor parallelism cuts ``out`` (column-parallel) or ``in`` (row-parallel), context parallelism cuts ``tokens``. Each
rank then quantises its part of a matrix, and the codes are to be those of the whole. Three things tie a part to it:

* *maxima*: where one scale serves the tensor or a row, its maximum is all-reduced over the ranks that share the axis
  (:func:`shared`): 4 bytes a tensor or row instead of the matrix. Naive tensor parallelism takes the part's own
  maximum, so scales, and with them the run, depend on the number of ranks;
* *noise* of stochastic rounding is drawn for an element's place in the whole matrix (:func:`window_of`);
* *blocks, groups, rotations* must lie inside one part. What would straddle, and statistics that need a whole axis, is
  refused by name (:func:`cut_refusal`).

A product whose contracted axis is cut gives a partial sum (fprop of ``in``, dgrad of ``out``, wgrad of ``tokens``);
whoever cut the axis adds the parts.

What this is not: communication of matrices, which is the business of ``lowprec.parallel``; nor sums over ranks inside a
layer: the mean over tokens of a split, for one, is refused where tokens are cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowprec.linear.backends import Side
from lowprec.linear.call import TRANSPOSED, Call, Cut, padded_sizes
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.linear.split import ChannelSplit, LowRankSplit, MeanSplit, ResidualSplit, Split
from lowprec.numerics import Format, Window

AXES = ("tokens", "in", "out")
MATRICES = {"x": ("tokens", "in"), "w": ("out", "in"), "dy": ("tokens", "out")}
"""Axes of the matrices as they lie in memory: (rows, columns)."""
PRODUCTS = {"fprop": ("tokens", "out", "in"), "dgrad": ("tokens", "in", "out"), "wgrad": ("out", "in", "tokens")}
"""Axes of (m, n, k): free of a, free of b, contracted."""
PANEL = 16
"""Rows whose scales MS-EDEN draws noise for at a time."""

# ---- what cannot be cut


def cut_refusal(
    recipe: LinearRecipe, out_features: int, in_features: int, cuts: Mapping[str, int], tokens: int | None = None
) -> str | None:
    """Why a layer cannot be cut under this recipe, in one sentence with the fix, or None.

    Args:
        recipe: of the layer.
        out_features, in_features: of the whole layer.
        cuts: ranks that share an axis (``out``, ``in``, ``tokens``); axes that are left out are whole.
        tokens: if tokens are cut: how many that follow one another, and begin at a multiple of this number, a rank
            holds at a time. Contiguous parts: the tokens of a rank. None: not known yet, so not judged.

    Raises:
        ValueError: for an unknown axis.
    """
    runs: dict[str, int] = {}  # of the axes that are cut; 0 divides everything
    for axis, ranks in cuts.items():
        if axis not in AXES:
            raise ValueError(f"unknown axis '{axis}'; choose among {', '.join(AXES)}")
        size = {"out": out_features, "in": in_features}.get(axis, 0)
        if size % ranks:
            return f"{size} features ({axis}) do not divide by {ranks} ranks; choose ranks that do"
        if ranks > 1:
            runs[axis] = (tokens or 0) if axis == "tokens" else size // ranks
    for role, (m, n, k) in PRODUCTS.items() if runs else ():
        gemm: Gemm = getattr(recipe, role)
        for rotation, axis in ((gemm.inner, k), (gemm.outer_a, m), (gemm.outer_b, n)):
            reason = _rotation(f"the rotation of {role} ({rotation})", rotation, axis, runs)
            if reason:
                return reason
        for operand, name, free in zip((gemm.a, gemm.b), GEMM_OPERANDS[role], (m, n), strict=True):
            reason = _operand(f"({name} of {role})", operand, name, free, k, runs)
            if reason:
                return reason
    return None


def _straddles(what: str, multiple: int, axis: str, runs: Mapping[str, int]) -> str | None:
    if runs.get(axis, 0) % max(multiple, 1) == 0:
        return None
    unit = "tokens" if axis == "tokens" else "features"
    return f"{what} would straddle ranks that hold {runs[axis]} {unit} each; it needs multiples of {multiple}"


def _whole(what: str, axes: Iterable[str], runs: Mapping[str, int]) -> str | None:
    cut = [axis for axis in axes if axis in runs]
    if not cut:
        return None
    return f"{what} looks at the whole axis '{cut[0]}'; leave that axis whole, or choose a recipe without it"


def _rotation(what: str, rotation: Rotation | None, axis: str, runs: Mapping[str, int]) -> str | None:
    if rotation is None:
        return None
    return _straddles(what, rotation.size, axis, runs) if rotation.size else _whole(what, (axis,), runs)


def _operand(where: str, operand: Operand, name: str, free: str, k: str, runs: Mapping[str, int]) -> str | None:
    if operand.format is None:
        return None
    reason = _format(where, operand.format, free, k, runs) or _split(where, operand, name, free, k, runs)
    if reason is None and operand.rounding == "ms_eden":
        what = f"the noise of ms_eden {where}"
        reason = _straddles(f"a group of {operand.group} {where}", operand.group, k, runs)
        reason = reason or _straddles(f"{what}, for {PANEL} rows at a time,", PANEL, free, runs)
    return reason


def _format(where: str, format: Format, free: str, k: str, runs: Mapping[str, int]) -> str | None:
    (down, along), name = format.block, f"format {format.name} {where}"
    for size, axis in ((down, free), (along, k)):
        reason = _straddles(f"a block of {down}x{along} {where}", size, axis, runs)
        if reason:
            return reason
    if format.tensor_scale == 128 and format.tensor_scale is not True:
        return _straddles(f"a scale of 1x128 {where}", 128, k, runs)
    shares = {"tensor": (free, k), "row": (k,), None: ()}[format.amax_of]
    spans = [axis for size, axis in ((down, free), (along, k)) if size == 0]
    if format.rule != "absmax":
        return _whole(f"rule {format.rule} of {name}", (*shares, *spans), runs)
    if format.tensor_scale or not shares:  # what is shared is the tensor's or the row's maximum, not that of blocks
        return _whole(f"a block of {down}x{along} {where}", spans, runs)
    return None


def _split(where: str, operand: Operand, name: str, free: str, k: str, runs: Mapping[str, int]) -> str | None:
    split: Split | None = operand.split
    if split is None:
        return None
    assert operand.format is not None
    what, features = f"split by {split} {where}", MATRICES[name][1]
    if isinstance(split, LowRankSplit) or (isinstance(split, MeanSplit) and name == "w"):
        return _whole(what, (free, k), runs)
    if isinstance(split, (ChannelSplit, ResidualSplit)):
        return _whole(what, ("tokens", features), runs) or _format(where, split.format, free, k, runs)
    reason = _whole(what, ("tokens", features) if split.remembers else ("tokens",), runs)
    if reason is None and split.term == "quantized":  # the centre is a row of features in the operand's format
        row = dataclasses.replace(operand.format, block=(1, operand.format.block[1]))
        reason = _format(f"(centre of {name})", row, "", features, runs)
    return reason


# ---- one forward


def bound(call: Call, tokens: int, in_features: int, out_features: int) -> Call:
    """The call with the sizes of this rank's part, (T, K) and (N, K), and only the cuts that there are.

    Raises:
        ValueError: if the recipe cannot be cut so; names layer, recipe, reason and fix.
    """
    cuts = {axis: cut for axis, cut in call.cuts.items() if cut.ranks > 1}
    if not cuts:
        return dataclasses.replace(call, cuts={})
    ranks = tuple((axis, cut.ranks) for axis, cut in sorted(cuts.items()))
    run = aligned_run(cuts["tokens"], tokens) if "tokens" in cuts else None
    whole = [size * dict(ranks).get(axis, 1) for axis, size in (("out", out_features), ("in", in_features))]
    reason = _refusal(call.recipe, whole[0], whole[1], ranks, run)
    if reason:
        raise ValueError(refused(call.stream.layer, call.recipe, dict(ranks), reason))
    sizes = {"tokens": tokens, "in": in_features, "out": out_features}
    return dataclasses.replace(call, cuts=cuts, sizes=sizes)


@lru_cache(maxsize=1024)
def _refusal(
    recipe: LinearRecipe, out: int, inp: int, ranks: tuple[tuple[str, int], ...], run: int | None
) -> str | None:
    return cut_refusal(recipe, out, inp, dict(ranks), run)


def refused(layer: str, recipe: LinearRecipe, cuts: Mapping[str, int], reason: str) -> str:
    """The sentence of an error."""
    how = " and ".join(f"'{axis}' over {ranks}" for axis, ranks in cuts.items() if ranks > 1)
    return f"layer '{layer}': recipe {recipe.name} cannot be cut {how} ranks: {reason}"


def positions(cut: Cut, rows: int) -> Tensor:
    """int64 (rows,), on the CPU: where this rank's rows lie in the whole axis."""
    if cut.index is None:
        return torch.arange(cut.rank * rows, (cut.rank + 1) * rows)
    index = cut.index(rows).cpu().long()
    if index.shape != (rows,):
        raise ValueError(f"a cut must give the place of each of {rows} rows, got a tensor of {tuple(index.shape)}")
    return index


@lru_cache(maxsize=256)
def aligned_run(cut: Cut, rows: int) -> int:
    """The largest number g such that this rank's rows, taken g by g, are contiguous and begin at multiples of g."""
    index = positions(cut, rows)
    begins = torch.ones(rows, dtype=torch.bool)
    begins[1:] = index[1:] != index[:-1] + 1
    return math.gcd(rows, *begins.nonzero()[:, 0].tolist(), *index[begins].tolist())


@lru_cache(maxsize=64)
def _places(cut: Cut, rows: int, padded: int, device: torch.device) -> Tensor:
    return F.pad(positions(cut, rows), (0, padded - rows)).to(device)  # zeros are rounded to zero whatever their noise


def cuts_of(name: str, call: Call, axes: Iterable[str] | None = None) -> tuple[Cut, ...]:
    """The cuts of a matrix (x, w or dy), or of some axes."""
    if not call.cuts:
        return ()
    return tuple(call.cuts[axis] for axis in axes or MATRICES[name] if axis in call.cuts)


def sharing(role: str, name: str, format: Format | None, call: Call) -> tuple[Cut, ...]:
    """The cuts over which the maxima of an operand are to be shared."""
    if not call.cuts or format is None or format.amax_of is None:
        return ()
    return cuts_of(name, call, (PRODUCTS[role][2],) if format.amax_of == "row" else None)


def maxima(x: Tensor, format: Format, cuts: tuple[Cut, ...]) -> Tensor:
    """What a format scales x (rows, k) by: () or (rows, 1) fp32, the largest over all ranks; a collective if cut.

    NaN where any rank has NaN or infinity: a maximum over ranks alone might lose it.
    """
    largest = (x.abs().amax(dim=1, keepdim=True) if format.amax_of == "row" else x.abs().amax()).float()
    if not cuts:
        return largest
    largest = largest.nan_to_num(nan=torch.inf, posinf=torch.inf)
    for cut in cuts:
        dist.all_reduce(largest, dist.ReduceOp.MAX, cut.group)
        if cut.count is not None:
            cut.count(2 * largest.nbytes)  # an all-reduce is a reduce-scatter and an all-gather
    return torch.where(largest.isfinite(), largest, torch.nan)


def window_of(role: str, side: Side, x: Tensor, operand: Operand, call: Call) -> Window | None:
    """Whose noise the operand x (rows, k), padded, draws: None = its own."""
    name = GEMM_OPERANDS[role][side == "b"]
    if operand.rounding == "nearest" or not cuts_of(name, call):
        return None
    assert call.sizes is not None, "call.sizes goes with call.cuts"
    whole = {axis: size * (call.cuts[axis].ranks if axis in call.cuts else 1) for axis, size in call.sizes.items()}
    gemm: Gemm = getattr(call.recipe, role)
    if name != "dy" and (operand.source == "fprop" or operand.reuse):  # padded by the forward first
        whole["in"] = padded_sizes(call.recipe.fprop, 1, 1, whole["in"], call.policy.pad)[2]
    m, n, k = (whole[axis] for axis in PRODUCTS[role])
    padded = dict(zip(PRODUCTS[role], padded_sizes(gemm, m, n, k, call.policy.pad), strict=True))
    down, across = (padded[axis] for axis in MATRICES[name])
    rows, columns = (call.cuts.get(axis) for axis in MATRICES[name])
    first = columns.rank * call.sizes[MATRICES[name][1]] if columns else 0
    here = x.shape[TRANSPOSED[role][side == "b"]]
    return Window((down, across), first, _places(rows, call.sizes[MATRICES[name][0]], here, x.device) if rows else None)
