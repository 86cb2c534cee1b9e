"""parallel=auto: every layout of so many ranks, its account and estimate, and the one to take, with the reason.

The search is exhaustive and deterministic: all ways to factor the ranks into the five axes, each with and without
recomputation, weights kept between forward and backward, and interleaved stages. A layout is rejected, with a reason,
if it does not divide the model or the batch, if tensor parallelism would leave a node (arXiv:2104.04473 and, on
Frontier, arXiv:2312.12705 found that too slow), or if its account does not fit the memory. Of the others, those within
5 % of the shortest estimated step cannot be told apart by an estimate; the simplest of these is taken. Where all ranks
share a node, sharding alone (FSDP2) is taken if it fits.

The micro-batch is the user's: tensor scales span one, so it belongs to the recipe. Whatever else the user has set is
kept too: sizes above one, recomputation, interleaving, kept weights.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from lowprec.parallel.account import Account, account, amount
from lowprec.parallel.config import AXES, ParallelConfig, Recompute
from lowprec.parallel.estimate import HARDWARE, Hardware, Times, estimate
from lowprec.parallel.layout import Job, Layout, Stages, refusal

TOLERANCE = 0.05
"""Estimated steps that differ by less are taken as equal."""
PLAIN = (0, 0, 1, False)
"""Complexity of sharding alone."""
_LEVELS = {Recompute.none: 0, Recompute.selective: 1, Recompute.full: 2}


@dataclass(frozen=True)
class Candidate:
    """A layout with its account and estimate, or with the reason why neither was made."""

    layout: Layout
    rejected: str | None
    account: Account | None = None
    times: Times | None = None

    @property
    def complexity(self) -> tuple[int, ...]:
        """Smaller is simpler: other axes than `shard`, recomputation, interleaving, kept weights."""
        layout = self.layout
        others = sum(getattr(layout, axis) > 1 for axis in AXES if axis != "shard")
        return others, _LEVELS[layout.recompute], layout.virtual_stages, self.keeps_weights

    @property
    def keeps_weights(self) -> bool:
        """Whether weights stay between forward and backward that would not be there otherwise.

        With several micro-batches all of them are there once a micro-batch anyway, and keeping them is no price.
        """
        single = self.account is not None and self.layout.pp == 1 and self.account.job.micros(self.layout) == 1
        return single and not self.layout.reshard_after_forward

    def received(self, hardware: Hardware) -> tuple[int, int]:
        """Bytes that the busiest rank receives in a step: inside nodes, and where a group spans nodes."""
        found = [(0, 0)]
        for stage in () if self.account is None else self.account.stages:
            far = sum(t.bytes for t in stage.transfers if hardware.crosses(t.ranks, t.stride, self.layout.ranks))
            found.append((sum(t.bytes for t in stage.transfers) - far, far))
        return max(found, key=sum)

    def to_dict(self, hardware: Hardware) -> dict[str, Any]:
        """Plain values, for JSON."""
        layout = {f.name: getattr(self.layout, f.name) for f in fields(Layout)}
        found = {"layout": layout | {"recompute": self.layout.recompute.value}, "rejected": self.rejected}
        if self.account is None or self.times is None:
            return found
        inside, between = self.received(hardware)
        times = asdict(self.times) | {"step": self.times.step}
        return found | self.account.to_dict() | {"inside_bytes": inside, "between_bytes": between, "seconds": times}


@dataclass(frozen=True)
class Proposal:
    """Every candidate, in the order of their estimated steps (rejected ones last), and the choice."""

    job: Job
    ranks: int
    hardware: Hardware
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    why: str  # one sentence: of the choice, or of there being none and the smallest change that would help

    @property
    def layout(self) -> Layout:
        """The layout to take. Raises ValueError, with the smallest change that would help, if there is none."""
        if self.chosen is None:
            raise ValueError(self.why)
        return self.chosen.layout

    def table(self, rows: int = 12) -> str:
        """For people: each mesh as it is best used, the first `rows` that fit, and why others are out."""
        best: dict[tuple[int, ...], Candidate] = {}
        for candidate in [c for c in (self.chosen, *self.candidates) if c is not None and not c.rejected]:
            best.setdefault(tuple(getattr(candidate.layout, axis) for axis in AXES), candidate)
        fitting = sorted(best.values(), key=_order)
        shown = [c for i, c in enumerate(fitting) if i < rows or c is self.chosen]
        more = len(fitting) - len(shown)
        reasons: dict[str, list[Candidate]] = {}
        for candidate in (c for c in self.candidates if c.rejected):
            kind = "memory" if candidate.account else re.sub(r"\d+", "N", str(candidate.rejected))
            reasons.setdefault(kind, []).append(candidate)
        lines = [_head(self.ranks, self.hardware), "", _TITLES]
        lines += [_row(c, self.hardware, "->" if c is self.chosen else "  ") for c in shown]
        lines += [f"  ... {more} more that fit"] if more else []
        for group in reasons.values():
            nearest = min(group, key=lambda c: 0.0 if c.account is None else c.account.fullest.memory_bytes)
            lines.append(f"out, {len(group)} such as {nearest.layout}: {nearest.rejected}")
        return "\n".join([*lines, "", self.why])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: every candidate, the choice and the reason."""
        found = [c.to_dict(self.hardware) for c in self.candidates]
        chosen = None if self.chosen is None else self.candidates.index(self.chosen)
        return {"ranks": self.ranks, "hardware": asdict(self.hardware), "chosen": chosen, "why": self.why,
                "candidates": found}  # fmt: skip


def this_machine(per_node: int) -> Hardware:
    """This machine's devices: its GPUs' memory and, for the rest, the nearest data sheet; or shares of its memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        near = "b200" if properties.major >= 10 else "h100_sxm"
        return replace(HARDWARE[near], memory_bytes=float(properties.total_memory), per_node=per_node)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node
    return replace(HARDWARE["cpu"], memory_bytes=memory, per_node=per_node)


def propose(
    job: Job,
    ranks: int,
    hardware: Hardware,
    wishes: ParallelConfig | None = None,
    refuse: Callable[[Layout], str | None] = lambda layout: None,
) -> Proposal:
    """The best layout of `job` on so many ranks, with all others.

    wishes: sizes above one, recomputation, interleaving and kept weights that are set there are kept.
    refuse: further reasons against a layout, such as blocks of a format that tensor parallelism would cut.
    """
    wishes = wishes or ParallelConfig()
    found: list[Candidate] = []
    stages = Stages(job)
    for sizes in meshes(ranks, wishes):
        why = refusal(job, sizes) or _leaves_node(sizes, hardware) or refuse(sizes)
        found += [Candidate(sizes, why)] if why else _accounted(stages, sizes, hardware, wishes)
    fitting = sorted((c for c in found if not c.rejected), key=_order)
    others = sorted((c for c in found if c.rejected), key=lambda c: (c.account is None, _order(c)))
    if not fitting:
        why = _remedy(job, ranks, hardware, wishes, refuse, others)
        return Proposal(job, ranks, hardware, tuple(others), None, why)
    near = [c for c in fitting if _step(c) <= _step(fitting[0]) * (1 + TOLERANCE)]
    chosen = min(near, key=lambda c: (c.complexity, _order(c)))
    plain = [c for c in fitting if c.complexity == PLAIN and ranks <= hardware.per_node]
    if plain:
        chosen, why = plain[0], f"{plain[0].layout}: all ranks share a node, and sharding alone fits"
    else:
        why = _reason(chosen, near, fitting, others)
    return Proposal(job, ranks, hardware, (*fitting, *others), chosen, why)


def meshes(ranks: int, wishes: ParallelConfig) -> Iterator[Layout]:
    """All ways to factor so many ranks into the axes that agree with the sizes wished for."""

    def rest(place: int, left: int) -> Iterator[tuple[int, ...]]:
        if place == len(AXES):
            yield from [()] if left == 1 else []
            return
        wish = getattr(wishes, AXES[place])
        for size in (n for n in range(1, left + 1) if left % n == 0 and wish in (0, 1, n)):
            yield from ((size, *more) for more in rest(place + 1, left // size))

    for pp, replicate, shard, cp, tp in rest(0, ranks):
        yield Layout(pp, replicate, shard, cp, tp)


def _accounted(stages: Stages, sizes: Layout, hardware: Hardware, wishes: ParallelConfig) -> Iterator[Candidate]:
    """The ways to use a mesh, each with account and estimate; rejected where it does not fit."""
    levels: list[Recompute] = [wishes.recompute] if wishes.recompute is not Recompute.none else list(Recompute)
    if stages.job.kept:  # codes of inputs are kept, which full recomputation would keep in addition
        levels = [level for level in levels if level is not Recompute.full]
    depths = [1] if sizes.pp == 1 else [wishes.virtual_stages] if wishes.virtual_stages > 1 else [1, 2, 4]
    for depth in depths:
        deep = replace(sizes, virtual_stages=depth)
        if refusal(stages.job, deep):
            continue
        for recompute, reshard in product(levels, [True, False] if wishes.reshard_after_forward else [False]):
            layout = replace(deep, recompute=recompute, reshard_after_forward=reshard)
            made = account(stages.job, layout, stages)
            needed = made.fullest.memory_bytes
            fits = needed <= hardware.usable_bytes
            rejected = None if fits else f"needs {amount(needed)} of {amount(hardware.usable_bytes)} a rank"
            yield Candidate(layout, rejected, made, estimate(made, hardware))


def _leaves_node(layout: Layout, hardware: Hardware) -> str | None:
    if hardware.crosses(layout.tp, 1, layout.ranks):
        return f"tp {layout.tp} would leave the nodes of {hardware.per_node}"
    return None


def _step(candidate: Candidate) -> float:
    assert candidate.times is not None
    return candidate.times.step


def _order(candidate: Candidate) -> tuple[Any, ...]:
    layout = candidate.layout
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    return (0.0 if candidate.times is None else candidate.times.step, candidate.complexity, sizes)


# ---- in words


_TITLES = (
    f"  {'layout':<52}{'memory':>9}{'received':>10}{'of nodes':>10}{'step s':>8}"
    "  = compute + serial + bubble + weights + gradients + update"
)


def _head(ranks: int, hardware: Hardware) -> str:
    h = hardware
    return (
        f"{ranks} ranks, {h.per_node} a node, {h.name}: {amount(h.memory_bytes)} ({h.reserve:.0%} stay free), "
        f"{h.flops_per_s:.3g} FLOP/s, {amount(h.inside_bytes_per_s)}/s in a node, {amount(h.between_bytes_per_s)}/s "
        "between nodes. All is computed from data sheets or from what was given; nothing is measured."
    )


def _row(candidate: Candidate, hardware: Hardware, mark: str) -> str:
    assert candidate.account is not None and candidate.times is not None
    inside, between = candidate.received(hardware)
    parts = " + ".join(f"{part:.2g}" for part in asdict(candidate.times).values())
    needed = amount(candidate.account.fullest.memory_bytes)
    return (
        f"{mark}{candidate.layout!s:<52}{needed:>9}{amount(inside + between):>10}{amount(between):>10}"
        f"{candidate.times.step:>8.3g}  = {parts}"
    )


def _reason(chosen: Candidate, near: list[Candidate], fitting: list[Candidate], others: list[Candidate]) -> str:
    assert chosen.account is not None
    best, unfit = fitting[0], sum(c.account is not None for c in others)
    text = f"{chosen.layout}: of {len(fitting)} layouts that fit ({unfit} do not) "
    if chosen is best:
        text += "it has the shortest estimated step"
        if len(near) > 1:
            text += f", and none of the {len(near) - 1} within {TOLERANCE:.0%} is simpler"
    else:
        text += f"it is the simplest of the {len(near)} within {TOLERANCE:.0%} of the shortest step ({best.layout})"
    plain = [c for c in others if c.complexity == PLAIN]
    return text + "".join(f"; plain {c.layout} is out: {c.rejected}" for c in plain[:1])


def _remedy(
    job: Job,
    ranks: int,
    hardware: Hardware,
    wishes: ParallelConfig,
    refuse: Callable[[Layout], str | None],
    others: list[Candidate],
) -> str:
    """One sentence: what is missing, and the smallest change that would do."""
    made = [c.account for c in others if c.account is not None]
    if not made:
        return f"no layout of {ranks} ranks suits the model and the batch: {others[0].layout}: {others[0].rejected}"
    least = min(made, key=lambda a: a.fullest.memory_bytes)
    needed = least.fullest.memory_bytes
    text = (
        f"no layout of {ranks} ranks fits {amount(hardware.usable_bytes)} a rank: the smallest, {least.layout}, "
        f"needs {amount(needed)}; "
    )
    for micro_batch in _halves(job.micro_batch):
        if _fits(replace(job, micro_batch=micro_batch), ranks, hardware, wishes, refuse):
            return (
                text
                + f"train.micro_batch={micro_batch} instead of {job.micro_batch} would fit (it changes the numbers)"
            )
    for more in (ranks * 2**i for i in range(1, 8)):
        if _fits(job, more, hardware, wishes, refuse):
            return text + f"{more} ranks would fit"
    return text + f"devices of {amount(needed / (1 - hardware.reserve))} would fit"


def _halves(number: int) -> list[int]:
    found = []
    while number % 2 == 0:
        number //= 2
        found.append(number)
    return found


def _fits(
    job: Job, ranks: int, hardware: Hardware, wishes: ParallelConfig, refuse: Callable[[Layout], str | None]
) -> bool:
    """Whether any layout fits, asked of those that keep the least."""
    stages = Stages(job)
    for sizes in meshes(ranks, wishes):
        layout = replace(sizes, recompute=Recompute.full)
        if refusal(job, layout) or _leaves_node(layout, hardware) or refuse(sizes):
            continue
        if account(job, layout, stages).fullest.memory_bytes <= hardware.usable_bytes:
            return True
    return False
