"""Ranks that share a layer: the codes, and the products, of one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lowprec.linear import Gemm, LinearRecipe, Operand, Policy, QuantizedLinear, load_recipe
from lowprec.linear.backends import backend
from lowprec.linear.call import Cut
from lowprec.linear.cut import PRODUCTS, cut_refusal
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.split import ChannelSplit
from lowprec.linear.state import end_step
from lowprec.numerics import FORMATS, Clock
from tests.ranks import run

pytestmark = pytest.mark.distributed

AXES = ("tokens", "in", "out")
SMALL = {"tokens": 128, "in": 128, "out": 64}
WIDE = {"tokens": 256, "in": 256, "out": 256}  # for blocks and rotations of 128
BF16, FP32 = torch.bfloat16, torch.float32

RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml") if not path.stem.endswith("_attention"))
FAMILIES = (
    "bf16", "nvfp4", "mxfp8", "mxfp4", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "fp8_hybrid", "fp8_delayed",
    "quartet2", "halo2_block", "int8_pow2", "nvfp4_4over6", "lowprec_max", "fp4_all_the_way",
)  # fmt: skip

WHOLE_AXIS = r"rotation of \w+ \(H of the whole axis .*\) looks at the whole axis"
MEAN = r"split by (moving )?mean, \w+ \(.* of .*\) looks at the whole axis 'tokens'"
SPREAD = r"rule \w+ of format \w+ \(. of fprop\) looks at the whole axis"
REFUSED = {
    "averis": {"tokens": MEAN},
    "bitnet_158": {"in": SPREAD, "out": SPREAD},
    "bitnet_158_median": {"in": SPREAD, "out": SPREAD},
    "chon": {"tokens": "split by residual.*axis 'tokens'", "in": "split by residual.*axis 'in'"},
    "halo1_fp8": {"in": WHOLE_AXIS},
    "halo1_int8": {"in": WHOLE_AXIS},
    "halo2_fp6": {"in": WHOLE_AXIS, "tokens": WHOLE_AXIS},
    "halo2_fp8": {"in": WHOLE_AXIS, "tokens": WHOLE_AXIS},
    "halo2_int8": {"in": WHOLE_AXIS, "tokens": WHOLE_AXIS},
    "hp_mean": {"tokens": MEAN},
    "hp_mean_ema": {"tokens": MEAN, "in": r"split by moving mean.*axis 'in'"},
    "lowprec_max": {"tokens": MEAN},
    "metis_lowrank": {axis: f"split by rank 8.*axis '{axis}'" for axis in AXES},
    "quest_fp4": {"in": SPREAD},
    "quest_w1a1": {"in": SPREAD},
    "quest_w4": {"in": SPREAD},
    "quest_w4a4": {"in": SPREAD},
    "tetrajet_v2": {"tokens": "split by channels.*axis 'tokens'", "in": "split by channels.*axis 'in'"},
}
"""The shipped recipes that cannot be cut along an axis, and why. All others can, and give the numbers of one rank."""

RANDOM = Operand(FORMATS["int8_tensor"], "stochastic")
ALL_RANDOM = LinearRecipe("all_random", *[Gemm(RANDOM, RANDOM)] * 3)
"""One scale a matrix and no blocks: every matrix may be cut anywhere, inside a group of eight random numbers too."""


HELD = LinearRecipe("held", *[Gemm(*[Operand(FORMATS["fp8_tensor"], amax="hold", window=9)] * 2)] * 3)
COLLECTED = LinearRecipe(
    "collected", Gemm(Operand(FORMATS["nvfp4"], split=ChannelSplit(FORMATS["mxfp8"], 0.1, (0, 2))), Operand())
)


def gemms(recipe):
    return recipe.fprop, recipe.dgrad, recipe.wgrad


def sizes_of(recipe):
    """Sizes whose halves hold whole blocks."""
    return WIDE if max(max(gemm.multiples) for gemm in gemms(recipe)) > 32 else SMALL


def places(rank, ranks, tokens, rows):
    """Which tokens a rank has: chunks r and 2n - 1 - r of 2n; in a test of wide blocks the parts in reverse order."""
    count = ranks if tokens == WIDE["tokens"] else 2 * ranks
    chunks = torch.arange(tokens).tensor_split(count)
    mine = [ranks - 1 - rank] if count == ranks else [rank, 2 * ranks - 1 - rank]
    found = torch.cat([chunks[i] for i in mine])
    assert len(found) == rows
    return found


class Layer:
    """A layer that is whole, or this rank's part of it, and everything that its backends prepare.

    ``axes``: those that are cut: (group, ranks, rank).
    """

    def __init__(self, recipe, sizes, served="auto", axes=None, save="inputs"):
        self.sizes, self.counted, cuts = sizes, [], {}
        self.places = {name: torch.arange(size) for name, size in sizes.items()}
        for axis, (group, ranks, rank) in (axes or {}).items():
            own = self.places[axis].tensor_split(ranks)[rank]
            index = partial(places, rank, ranks, sizes["tokens"]) if axis == "tokens" else None
            cuts[axis] = Cut(group, ranks, rank, index, self.counted.append)
            self.places[axis] = own if index is None else index(len(own))
        policy, shape = Policy(served, save=save), (len(self.places["in"]), len(self.places["out"]))
        self.layer = QuantizedLinear(*shape, False, recipe=recipe, clock=Clock(3), layer="l", policy=policy)
        self.layer.cuts = cuts
        with torch.no_grad():
            self.layer.weight.copy_(self.part(draw(1, sizes["out"], sizes["in"]), "out", "in"))

    def part(self, x, rows, columns):
        return x[self.places[rows]][:, self.places[columns]]

    def run(self, dtype, seed=2, poison=False):
        """Forward and backward: the results by product, in fp32, and the operands in the order of their making."""
        x, dy = (draw(seed, self.sizes["tokens"], self.sizes[axis]) for axis in ("in", "out"))
        x, dy = x * (1 + 30 * (x > 2.5)), dy * (1 + 30 * (dy > 2.5))  # few are large, so the parts' maxima differ
        if poison:
            x[0, 0] = torch.nan
        x, dy = self.part(x, "tokens", "in").to(dtype).requires_grad_(), self.part(dy, "tokens", "out")
        self.layer.weight.grad = None
        with Recording() as made:
            y = self.layer(x)
            y.backward(dy.to(dtype))
        results = zip(PRODUCTS, (y.detach(), x.grad, self.layer.weight.grad))
        return {role: result.float().clone(memory_format=torch.contiguous_format) for role, result in results}, made


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recording:
    """Inside, every operand that a backend prepares is noted: (product, side, backend, values, tensor scale)."""

    def __enter__(self):
        self.before = {cls: cls.prepare for cls in {type(backend(name)) for name in ("cpu", "cpu_portable", "torch")}}
        made = []
        for cls, original in self.before.items():

            def prepare(own, x, gemm, side, stream, role, *more, original=original):
                operand = original(own, x, gemm, side, stream, role, *more)
                made.append((role, side, own.name, *own.unpacked(operand, FP32)))
                return operand

            cls.prepare = prepare
        return made

    def __exit__(self, *error):
        for cls, original in self.before.items():
            cls.prepare = original


def compare_operands(part, all_made, made):
    """Which operands of a part are not, bit for bit, that part of the whole's."""
    wrong = [] if len(made) == len(all_made) else [f"{len(made)} operands instead of {len(all_made)}"]
    for (role, side, name, values, scale), (*same, own, own_scale) in zip(all_made, made):
        m, n, k = PRODUCTS[role]
        free = n if side == "b" else m
        values, own = part.part(values, free, k), own[: len(part.places[free]), : len(part.places[k])]
        if scale.numel() > 1:
            scale, own_scale = scale[part.places[free]], own_scale[: len(part.places[free])]
        if same != [role, side, name] or not torch.equal(scale, own_scale) or not torch.equal(values, own):
            wrong.append(f"{role}.{side} by {same[2]}: {(values != own).float().mean():.0%} of values differ")
    return wrong


def order_bound(whole, role, made):
    """What two orders of an fp32 sum may differ by: 2 (k + 8) 2^-24 of the largest sum of magnitudes of a product."""
    tokens, inp, out = (whole.sizes[axis] for axis in AXES)
    raw = {"x": draw(2, tokens, inp) * 31, "w": draw(1, out, inp), "dy": draw(2, tokens, out) * 31}
    a, b = {"fprop": (raw["x"], raw["w"]), "dgrad": (raw["dy"], raw["w"].T), "wgrad": (raw["dy"].T, raw["x"].T)}[role]
    largest = (a.abs() @ b.abs().T).max()  # unquantised operands, and terms beside the codes
    parts = {
        side: sum(values.abs() * scale for at, which, _, values, scale in made if (at, which) == (role, side))
        for side in "ab"
    }
    if all(isinstance(part, torch.Tensor) for part in parts.values()):
        largest += (parts["a"] @ parts["b"].T).max()
    return 2 * (whole.sizes[PRODUCTS[role][2]] + 8) * 2**-24 * largest


def differences(recipe, axes, served, dtype, sizes=None, save="inputs"):
    """What is not as in one process, in words."""
    sizes = sizes or sizes_of(recipe)
    whole, part = Layer(recipe, sizes, served), Layer(recipe, sizes, served, axes, save)
    (expected, all_made), (found, made) = whole.run(dtype), part.run(dtype)
    wrong = compare_operands(part, all_made, made) if save == "inputs" else []
    split = any(o.split for gemm in gemms(recipe) for o in (gemm.a, gemm.b))
    for role, (m, n, k) in PRODUCTS.items():
        wanted, got = part.part(expected[role], m, n), found[role]
        if k in axes:
            dist.all_reduce(got, group=axes[k][0])
        served_by = {name for at, _, name, *_ in all_made if at == role}
        if k not in axes and served_by == {"cpu"} and not split:
            good = torch.equal(wanted, got)
        else:  # torch may sum a matrix of another shape in another order
            exact = dtype == FP32 or (role == "wgrad" and recipe.wgrad.quantized)
            rounding = 0.0 if exact else 2**-8 * (1 + axes[k][1] if k in axes else 1)
            allowed = order_bound(whole, role, all_made) + rounding * wanted.abs().max()
            good = ((wanted - got).abs() <= allowed).all()
        if not good:
            wrong.append(f"{role} is off by {(wanted - got).abs().max():.3g} of {wanted.abs().max():.3g}")
    return [f"{recipe.name}, {'+'.join(axes)} cut, {served}, {dtype}: {line}" for line in wrong]


def alone(axis):
    """One axis cut over all ranks."""
    return {axis: (dist.group.WORLD, dist.get_world_size(), dist.get_rank())}


def compare(names, axes, backends, dtype, save="inputs"):
    return [
        line
        for name in names
        for axis in axes
        if axis not in REFUSED.get(name, {})
        for served in backends
        for line in differences(load_recipe(name), alone(axis), served, dtype, save=save)
    ]


def nothing(results):
    """Whether no rank found a difference; else all of them."""
    lines = [line for result in results for line in result]
    assert not lines, "\n".join(lines)
    return True


@pytest.mark.parametrize("axis", AXES)
def test_every_shipped_recipe(axis):
    """Operands bit for bit, products up to the order of sums, on the fastest backend that serves."""
    assert nothing(run(2, compare, RECIPES, [axis], ["auto"], BF16))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_backend(axis, dtype):
    """The same on the backends by name."""
    assert nothing(run(2, compare, FAMILIES, [axis], ["torch", "cpu_portable"], dtype))


@pytest.mark.parametrize("axis", AXES)
def test_what_is_refused(axis):
    """Exactly the recipes listed above, each for its own reason; the error names layer and recipe."""
    for name in RECIPES:
        recipe = load_recipe(name)
        sizes, reason = sizes_of(recipe), REFUSED.get(name, {}).get(axis)
        said = cut_refusal(recipe, sizes["out"], sizes["in"], {axis: 2}, 128 if sizes is WIDE else 32)
        assert (said is None) == (reason is None), (name, said)
        if reason is None:
            continue
        layer = QuantizedLinear(*(sizes[a] // (2 if a == axis else 1) for a in ("in", "out")), False, recipe=recipe)
        layer.cuts = {axis: Cut(None, 2, 0)}
        x = torch.randn(sizes["tokens"] // (2 if axis == "tokens" else 1), layer.in_features)
        with pytest.raises(ValueError, match=rf"layer 'linear': recipe {name} cannot be cut '{axis}' over 2.*{reason}"):
            layer(x)


def both_axes(names):
    """Four ranks: tokens over two, and in or out over two."""
    rank = dist.get_rank()
    tensor = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    context = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    return [
        line
        for name in names
        for axis in ("in", "out")
        for line in differences(
            load_recipe(name), {axis: (tensor, 2, rank % 2), "tokens": (context, 2, rank // 2)}, "auto", BF16
        )
    ]


def test_two_axes_at_once():
    """Tensor and context parallelism together: maxima are those of all four parts."""
    assert nothing(run(4, both_axes, ["nvfp4", "fp8_tensorwise", "fp8_rowwise", "quartet2", "int8_pow2"]))


def ragged():
    """Parts that are no multiples of anything, all products rounded stochastically."""
    sizes = {"tokens": 52, "in": 44, "out": 28}
    return [
        line
        for axis in AXES
        for served in ("torch", "cpu", "cpu_portable")
        for line in differences(ALL_RANDOM, alone(axis), served, FP32, sizes)
    ]


def test_parts_that_begin_anywhere():
    """Padding to whole tiles changes nothing, and random numbers are those of the place, in groups of eight or not."""
    assert nothing(run(2, ragged))


def test_keeping_codes():
    """save: codes under cuts: the same gradients."""
    assert nothing(run(2, compare, ["nvfp4", "fp8_tensorwise"], AXES, ["auto"], BF16, "codes"))


def poisoned():
    wrong, names = [], ("fp8_tensorwise", "nvfp4", "fp8_rowwise", "fp8_delayed", "masked_e8m3", "ue5m3")
    for recipe in (*map(load_recipe, names), HELD):
        for axis in AXES if recipe.name == "fp8_delayed" else ("tokens",):
            for served in ("torch", "cpu_portable", "auto"):
                axes, sizes = alone(axis), {"tokens": 64, "in": 32, "out": 32}
                whole, part = Layer(recipe, sizes, served), Layer(recipe, sizes, served, axes)
                for step in range(2):
                    whole.layer.clock.step = part.layer.clock.step = step
                    (expected, _), (found, _) = (layer.run(BF16, poison=bool(step)) for layer in (whole, part))
                    for layer in (whole, part):
                        end_step({"l": layer.layer.state}, step)
                for role, (m, n, k) in PRODUCTS.items():
                    if k in axes:
                        dist.all_reduce(found[role])
                    if not torch.equal(part.part(expected[role], m, n).isfinite(), found[role].isfinite()):
                        wrong.append(f"{recipe.name} {axis} {served} {role}")
    return wrong


def test_a_nan_is_seen_by_every_rank():
    """What one poisoned value breaks in one process it breaks on every rank, also where that rank did not see it."""
    assert nothing(run(2, poisoned))


def remembering():
    wrong, alike = [], [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for recipe in (load_recipe("fp8_delayed"), load_recipe("ue5m3"), HELD, COLLECTED):
        for axis in AXES if recipe is not COLLECTED else ("out",):
            whole, part = (Layer(recipe, SMALL, "auto", axes) for axes in (None, alone(axis)))
            for step in range(3):
                whole.layer.clock.step = part.layer.clock.step = step
                all_made, made = (layer.run(BF16, seed=5 + step)[1] for layer in (whole, part))
                case = f"{recipe.name} {axis} {step}"
                wrong += [f"{case}: {line}" for line in compare_operands(part, all_made, made)]
                end_step({"l": whole.layer.state}, step, group=alike)
                end_step({"l": part.layer.state}, step)
                a, b = whole.layer.state.tensors, part.layer.state.tensors
                wrong += [f"{case}: {key}" for key in a if not torch.equal(a[key], b[key])]
    return wrong


def test_memories_are_those_of_the_whole():
    """Delayed and held maxima, and sums of channels: what is used and what is remembered, step by step."""
    assert nothing(run(2, remembering))


def counting():
    found = {}
    for name in ("nvfp4", "fp8_rowwise", "mxfp8"):
        layer = Layer(load_recipe(name), SMALL, axes=alone("out"))
        layer.run(BF16)
        found[name] = layer.counted
    return found


def test_bytes_are_counted():
    """Twice four bytes for every maximum: of w and dy in three products; one a row; none where blocks are all."""
    for found in run(2, counting):
        assert found == {"nvfp4": [8] * 4, "fp8_rowwise": [8 * 128, 8 * 128], "mxfp8": []}


def sharded():
    mesh = DeviceMesh("cpu", [0, 1])
    whole, part = (Layer(load_recipe("nvfp4"), SMALL, axes=axes) for axes in (None, alone("out")))
    part.layer.weight = nn.Parameter(DTensor.from_local(part.layer.weight.detach(), mesh, [Shard(0)], run_check=False))
    x, dy = draw(1, SMALL["tokens"], SMALL["in"]), draw(2, SMALL["tokens"], SMALL["out"])
    whole.layer(x).backward(dy)
    part.layer(x).backward(part.part(dy, "tokens", "out"))
    grad = part.layer.weight.grad
    same = torch.equal(grad.to_local(), part.part(whole.layer.weight.grad, "out", "in"))
    return same, tuple(grad.placements) == (Shard(0),)


def test_the_weight_may_be_a_dtensor():
    """The layer computes with the local part, and the gradient comes back sharded."""
    assert run(2, sharded) == [(True, True)] * 2
