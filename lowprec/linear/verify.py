"""Verify: before a run trains, every backend that its plan chose is held to the oracle once, on the run's own shapes.

A fast path that is wrong seldom crashes: gradients rounded stochastically to zero, a scale read in the wrong layout, a
library that changed under the run, all train, badly. So each distinct (backend, product, shape, dtype) of the plan is
made once on realistic data, both operands and their product:

* an operand must be the oracle's bit for bit, its values times block scales and its tensor scale (scales that are
  products of two, one per 128 elements, may be applied in another order: to fp32 rounding);
* a product must be the oracle's within ``2 k 2^-24 sum|a||b|``, the two orders of an fp32 sum, and one rounding to the
  output's dtype. FP8 instructions of Ada, Hopper and (not known, so allowed) sm_120 keep about 14 bits of a sum
  (arXiv:2412.19437, section 3.5.2): there ``2^-10 sum|a||b|``;
* a backend that draws random bits or rotates by itself (its ``exact(gemm)`` is False, TransformerEngine) cannot be
  equal: its product must be as near to the unquantised one as the oracle's is, by 1.25 in the Frobenius norm, and
  neither all zeros nor, in the mean, 5 % off (and three standard errors of that mean). With an attribute ``ties``,
  that share of an operand's values may differ (it lay between two codes), and the product is held to that of the
  backend's own operands.

To keep it short the work is bounded: about `ROWS` of each free axis and `TOKENS` of contracted tokens, with the run's
own remainder by `ROWS`, so that edges are as ragged as in the run; contracted features are never cut, as errors of sums
grow with them. What is checked is remembered for the process.

What this is not: a proof. It sees the shapes, formats and chips of this run, once; the tests see the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.linear import oracle
from lowprec.linear.backends import Backend, Side, choose
from lowprec.linear.call import TRANSPOSED, padded_sizes
from lowprec.linear.plan import Entry, Plan
from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, Operand
from lowprec.linear.split import ChannelSplit, ResidualSplit
from lowprec.numerics import Stream

ROWS = 256
TOKENS = 512
NOT_CHECKED = ("native", "oracle")


@dataclass(frozen=True)
class Case:
    """One product as it is checked; ``sizes`` (m, n, k) are capped, ``served`` those that chose the backend."""

    backend: str
    gemm: Gemm
    role: str
    sizes: tuple[int, int, int]
    served: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device


def verify(
    plan: Plan, tokens: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
) -> str:
    """Check what the plan chose for this rank's layers.

    Args:
        plan: applied, its layers cut as they will be.
        tokens: rows of the activations on this rank, before tokens are cut.
        dtype, device: of the activations.
        group: ranks that stop together, each with what the first of them found; a collective.

    Returns:
        One line for people; empty if there was nothing to check.

    Raises:
        ValueError: the first mismatch: layer, product, backend, what differed, and the fix.
    """
    begin, counts = time.perf_counter(), dict[str, int]()
    try:
        problem = _first_problem(plan, tokens, dtype, device, counts)
    except Exception as error:  # a rank that cannot even run a backend must not leave the others waiting
        if group is None:
            raise
        problem = f"the start-up check of the backends fails: {type(error).__name__}: {error}"
    if group is not None:
        everywhere: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, problem, group=group)
        problem = next((one for one in everywhere if one), "")
    if problem:
        raise ValueError(problem)
    if not counts:
        return ""
    told = ", ".join(f"{name} {count} product{'s' if count > 1 else ''}" for name, count in counts.items())
    return f"backends checked against the oracle: {told} in {time.perf_counter() - begin:.1f} s"


def _first_problem(plan: Plan, tokens: int, dtype: torch.dtype, device: torch.device, counts: dict[str, int]) -> str:
    """The first mismatch as a sentence, or nothing; counts the products by backend."""
    seen = set[Case]()
    for entry, case in cases(plan, tokens, dtype, device):
        if case in seen:
            continue
        seen.add(case)
        counts[case.backend] = counts.get(case.backend, 0) + 1
        try:
            found = _found(plan.policy.backend, case, plan.clock.seed)
        except Exception as error:
            found = f"it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if found:
            return (
                f"layer '{entry.layer}' ({entry.out_features}, {entry.in_features}), {case.role}: backend "
                f"'{case.backend}' on {device} is not the definition: {found}; train with precision.backend=torch"
            )
    return ""


@lru_cache(maxsize=4096)
def _found(wanted: str, case: Case, seed: int) -> str | None:
    """:func:`mismatch` of a case, once in a process."""
    chosen = choose(wanted, case.gemm, case.role, *case.served, case.dtype, case.device)[0]
    return mismatch(chosen, case, Stream(seed, 1, 0, "verify"))


def cases(plan: Plan, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Entry, Case]]:
    """What must be checked, with a layer that it is for; repeats itself."""
    pad = plan.precision.pad
    known: set[tuple[str, int, int, int]] = set()
    for entry in plan.entries:
        layer = plan.layers.get(entry.layer)
        if layer is None:
            continue
        ranks = {axis: cut.ranks for axis, cut in layer.cuts.items()}
        out, inp = entry.out_features // ranks.get("out", 1), entry.in_features // ranks.get("in", 1)
        rows = max(tokens // ranks.get("tokens", 1), 1)
        if (entry.recipe, out, inp, rows) in known:
            continue
        known.add((entry.recipe, out, inp, rows))
        for recipe in plan.precision.versions(entry.recipe):
            for role, sizes in (("fprop", (rows, out, inp)), ("dgrad", (rows, inp, out)), ("wgrad", (out, inp, rows))):
                whole: Gemm = getattr(recipe, role)
                if not whole.quantized:
                    continue
                served = padded_sizes(whole, *sizes, pad)
                if pad == "refuse" and served != sizes:  # the run will say so by itself
                    continue
                for gemm in _parts(whole):
                    chosen = choose(plan.policy.backend, gemm, role, *served, dtype, device)[0]
                    if chosen.name not in NOT_CHECKED:
                        capped = _capped(gemm, role, served)
                        yield entry, Case(chosen.name, gemm, role, capped, served, dtype, device)


def _parts(gemm: Gemm) -> list[Gemm]:
    """The products of a product's parts, as backends see them: without splits and outer rotations."""

    def sides(operand: Operand) -> list[Operand]:
        out = [dataclasses.replace(operand, split=None)]
        if isinstance(operand.split, ChannelSplit | ResidualSplit):
            keeps_mean = isinstance(operand.split, ChannelSplit) and operand.rounding == "stochastic"
            out.append(Operand(operand.split.format, "stochastic" if keeps_mean else "nearest"))
        return out

    return [Gemm(a, b, gemm.inner) for a in sides(gemm.a) for b in sides(gemm.b)]


def _capped(gemm: Gemm, role: str, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes (m, n, k), capped and still whole blocks."""
    most = (ROWS, ROWS, TOKENS if role == "wgrad" else sizes[2])
    m, n, k = (min(size, cap + size % ROWS) for size, cap in zip(sizes, most))  # ragged edges stay what they are
    return padded_sizes(gemm, m, n, k, pad="zero")


def sample(name: str, rows: int, columns: int, case: Case, stream: Stream) -> Tensor:
    """A matrix like a layer's x, w or dy, (rows, columns) in memory: outlier channels, a zero row, small gradients."""
    generator = torch.Generator().manual_seed(stream.key(name)[0])
    x = torch.randn(rows, columns, generator=generator)
    if name == "x":
        x[:, 3::97] *= 20
    if name == "dy":
        x *= 1e-4 * torch.randn(rows, 1, generator=generator).exp()
    if name == "w":
        x *= columns**-0.5
    elif rows > 1:
        x[rows // 2] = 0
    return x.to(case.device, case.dtype)


def mismatch(chosen: Backend, case: Case, stream: Stream) -> str | None:
    """How a backend's operands or product differ from the oracle's, in words; None if they do not."""
    gemm, role, (m, n, k) = case.gemm, case.role, case.sizes
    exact = getattr(chosen, "exact", lambda gemm: True)(gemm)
    originals, packed, defined = [], [], []
    for i, (name, rows) in enumerate(zip(GEMM_OPERANDS[role], (m, n))):
        side: Side = "b" if i else "a"
        operand: Operand = getattr(gemm, side)
        x = sample(name, k, rows, case, stream).T if TRANSPOSED[role][i] else sample(name, rows, k, case, stream)
        amax = _remembered(x, operand)
        packed.append(chosen.prepare(x, gemm, side, stream, role, amax))
        defined.append(oracle.prepare(x, operand, gemm.inner, stream, role, name, amax))
        originals.append(x)
        found = _operand_differs(chosen, packed[i], defined[i], operand) if exact else None
        if found:
            return f"{name} quantised to {operand} {found}"
        if exact and getattr(chosen, "ties", 0.0):
            defined[i] = _as_one_block(*chosen.unpacked(packed[i], torch.float32))
    kept = chosen.stored(packed[1], gemm, "b")  # what the backward may find
    for out_dtype, b in ((case.dtype, packed[1]), (torch.float32, kept)):
        out = chosen.multiply(packed[0], b, gemm, out_dtype)
        if out.shape != (m, n) or out.dtype != out_dtype:
            return f"the product is {out.dtype} of shape {tuple(out.shape)}, not {out_dtype} of shape {(m, n)}"
        differs = _product_differs(out, defined, case) if exact else _worse(out, defined, originals)
        if differs:
            return differs
    return None


def _remembered(x: Tensor, operand: Operand) -> Tensor | None:
    """Where a recipe delays or holds the maximum: one that is a little too small, so that values saturate."""
    if operand.amax == "current" or operand.format is None:
        return None
    x = x.float().abs()
    return 0.75 * (x.amax() if operand.format.amax_of == "tensor" else x.amax(1, keepdim=True))


def _operand_differs(chosen: Backend, packed: object, defined: oracle.Prepared, operand: Operand) -> str | None:
    values, scale = chosen.unpacked(packed, torch.float32)
    wanted, wanted_scale = defined.blockscaled(), defined.tensor_scale
    if values.shape != wanted.shape:
        return f"has shape {tuple(values.shape)}, not {tuple(wanted.shape)}"
    if not torch.equal(scale.reshape(-1), wanted_scale.reshape(-1)):
        values, wanted = values * scale.reshape(-1, 1), wanted * wanted_scale.reshape(-1, 1)
    slack = 2.0**-22 if operand.format is not None and operand.format.tensor_scale == 128 else 0.0
    wrong = ~((values - wanted).abs() <= slack * wanted.abs())
    share = float(wrong.float().mean())
    if share <= getattr(chosen, "ties", 0.0):
        return None
    if bool((values == 0).all()):
        return "is all zeros"
    i, j = wrong.nonzero()[0].tolist()
    return (
        f"differs in {share:.2%} of its values, the first at ({i}, {j}): {values[i, j].item():.6g} "
        f"instead of {wanted[i, j].item():.6g}"
    )


def _as_one_block(values: Tensor, scale: Tensor) -> oracle.Prepared:
    return oracle.Prepared(values, torch.ones_like(values[:, :1]), values.shape[1], scale)


def sum_error(case: Case) -> float:
    """What the sum of a product may lose, as a share of ``sum|a||b|``."""
    formats = [operand.format for operand in (case.gemm.a, case.gemm.b)]
    if case.device.type == "cuda" and all(f is not None and f.element in ("e4m3", "e5m2") for f in formats):
        major, minor = torch.cuda.get_device_capability(case.device)
        if (major, minor) < (10, 0) or major == 12:
            return 2.0**-10
    return 2 * case.sizes[2] * 2.0**-24


def _product_differs(out: Tensor, defined: list[oracle.Prepared], case: Case) -> str | None:
    wanted = oracle.multiply(*defined)
    a, b = (one.blockscaled().abs() * one.tensor_scale.reshape(-1, 1) for one in defined)
    bound = 1.01 * sum_error(case) * (a @ b.T) + torch.finfo(torch.float32).tiny
    if out.dtype != torch.float32:
        bound += (wanted.abs() + bound) * torch.finfo(out.dtype).eps / 2
    error = (out.float() - wanted).abs()
    wrong = ~(error <= bound)
    if not bool(wrong.any()):
        return None
    if bool((out == 0).all()):
        return "the product is all zeros"
    i, j = divmod(int((error / bound).nan_to_num(nan=torch.inf).argmax()), out.shape[1])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} products are beyond the bound of their fp32 sums, such as "
        f"({i}, {j}): {out[i, j].item():.6g} instead of {wanted[i, j].item():.6g} +- {bound[i, j].item():.2g}"
    )


def _worse(out: Tensor, defined: list[oracle.Prepared], originals: list[Tensor]) -> str | None:
    exact = originals[0].float() @ originals[1].float().T
    error, wanted = (float((y.float() - exact).norm() / exact.norm()) for y in (out, oracle.multiply(*defined)))
    if bool((out == 0).all()):
        return "the product is all zeros"
    if error > 1.25 * wanted:
        return f"the product's relative error is {error:.3g}, the definition's {wanted:.3g}"
    size = float((out.float() * exact).sum() / exact.square().sum())
    if abs(size - 1) > 0.05 + 3 * wanted / min(out.shape) ** 0.5:
        return f"the product is {size:.3g} of the unquantised one in the mean: its rounding is biased"
    return None
