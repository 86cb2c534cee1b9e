"""Account: what a layout costs each rank, in bytes of memory and in bytes received, before anything runs.

Nothing here is measured and nothing is a tensor: sizes in, bytes out. The formulas follow this implementation term by
term, so that tests can compare them with what a model keeps and with the counters of real collectives.

*Memory.* Of the fullest moment of a step: :mod:`lowprec.parallel.memory`.

*Bytes received.* The logical payload of a collective for one rank: the whole result of an all-gather, the whole input
of a reduce-scatter, twice the buffer of an all-reduce; of these (n - 1) / n crosses a link. Point to point: what is
received. A group of one counts nothing. So bf16 ZeRO-3 counts 2 + 2 + 2 bytes a parameter and step on any number of
ranks, 3 P values against the 2 P of an all-reduce (arXiv:1910.02054, section 7).

*When.* Weights of a block go after every forward pass (`reshard_after_forward`) and after the step's last backward; a
pass that finds them gone gathers them. So m micro-batches gather a block m + 1 times, in whatever order their passes
come, and once if nothing goes after the forward. The root is gathered once. Gradients are summed over ranks once, in
the last backward; a rank with several micro-batches holds whole fp32 gradients of its layers until then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowprec.model import count_parameters
from lowprec.parallel.config import Recompute
from lowprec.parallel.layout import PARTS, Job, Layout, Stage, Stages
from lowprec.parallel.memory import memory


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in one step of one rank: between so many ranks, so far from one another."""

    name: str  # as in `wire_bytes` of metrics.jsonl
    ranks: int
    stride: int
    bytes: int
    calls: int


@dataclass(frozen=True)
class StageAccount:
    """What a rank of one pipeline stage holds at its peak, by what it is, and receives in a step."""

    stage: int
    moment: str  # of a step: when it holds the most
    memory: dict[str, float]
    transfers: tuple[Transfer, ...]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes by collective, as the counters of a run name them."""
        names = sorted({t.name for t in self.transfers})
        return {name: sum(t.bytes for t in self.transfers if t.name == name) for name in names}


@dataclass(frozen=True)
class Account:
    """All stages of a layout; ranks of a stage are alike."""

    job: Job
    layout: Layout
    stages: tuple[StageAccount, ...]

    @property
    def fullest(self) -> StageAccount:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory_bytes)

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage waits for others: (p - 1) / (m v + p - 1), arXiv:2104.04473."""
        waits = self.layout.pp - 1
        return waits / (self.job.micros(self.layout) * self.layout.virtual_stages + waits)

    def __str__(self) -> str:
        layout, many, stage = self.layout, len(self.stages) > 1, self.fullest
        parameters, micros = count_parameters(self.job.model)["total"], self.job.micros(layout)
        place = f" of stage {stage.stage}, the fullest of {len(self.stages)}" if many else ""
        lines = [f"layout: {layout}; {layout.ranks} ranks, {micros} micro-batches a step and rank", ""]
        lines += [f"memory of a rank{place}, computed: {amount(stage.memory_bytes)} ({stage.moment})"]
        lines += [f"  {name:<28}{amount(part):>10}" for name, part in stage.memory.items() if part]
        for stage in self.stages:
            total, place = sum(stage.wire_bytes.values()), f" of stage {stage.stage}" if many else ""
            lines += ["", f"received by a rank{place} in a step, logical bytes (and a parameter): {amount(total)}"]
            parts = {**stage.wire_bytes, "all": total} if total else {}
            lines += [f"  {name:<32}{amount(part):>10}{part / parameters:>8.2f}" for name, part in parts.items()]
        return "\n".join([*lines, "", f"pipeline bubble: {self.bubble:.1%} of a step"] if many else lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        stages = [
            {"moment": s.moment, "memory": s.memory, "memory_bytes": s.memory_bytes, "wire_bytes": s.wire_bytes}
            for s in self.stages
        ]
        return {"memory_bytes": self.fullest.memory_bytes, "bubble": self.bubble, "stages": stages}


def amount(count_bytes: float) -> str:
    """Three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 999.5:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:,.3g} TB"


def account(job: Job, layout: Layout, stages: Stages | None = None) -> Account:
    """The account of a layout. Raises ValueError if the model or the batch cannot be laid out like this.

    stages: of `job`, where the caller asks for many layouts.
    """
    found = []
    for stage in (stages or Stages(job)).of(layout):
        received = tuple(t for t in transfers(job, layout, stage) if t.bytes and t.ranks > 1)
        found.append(StageAccount(stage.index, *memory(job, layout, stage), received))
    return Account(job, layout, tuple(found))


# ---- bytes received


def transfers(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """What a rank of the stage receives in a step."""
    yield from _weights(job, layout, stage)
    yield from _gradients(job, layout, stage)
    yield from _tensor(job, layout, stage)
    yield from _context(job, layout, stage)
    yield from _pipeline(job, layout, stage)


def _weights(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Gathered by FSDP; with hpZ, from neighbours except for the first time."""
    ranks, tp, root, near = layout.fsdp, layout.tp, stage.root.weight_bytes, layout.near(job.wire)
    weights, again = stage.total.weight_bytes - root, job.micros(layout) * layout.reshard_after_forward
    inside = again if job.wire.hpz else 0
    far = 1 + again - inside
    yield Transfer("weight_all_gather", ranks, tp, far * weights + root, far * stage.blocks + (root > 0))
    yield Transfer("weight_all_gather_in_node", near, tp, inside * weights, inside * stage.blocks)
    for among, stride in ((ranks, tp), (tp, 1)):  # one stacked maximum of all weights
        yield Transfer("amax_all_reduce", among, stride, 2 * 4 * stage.total.maxima, 1)


def _gradients(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Summed by FSDP, once a step: over those that share parameters, in one level or two, then over copies."""
    tp, level, total, calls = layout.tp, layout.level(job.wire), stage.total, stage.units
    outer, name = layout.fsdp // level, "gradient_reduce_scatter"
    yield Transfer(
        f"{name}_in_node" if job.wire.two_level and layout.replicate == 1 else name,
        level,
        tp,
        total.gradient_bytes,
        calls,
    )
    yield Transfer(name, outer, tp * level, total.between_bytes, calls)
    yield Transfer("gradient_all_reduce", layout.replicate, layout.stride("replicate"), total.replica_bytes, calls)


def _tensor(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Tensor parallel with sequence parallel: tokens are gathered before cut products and scattered after them."""
    micros, tokens, tp = job.micros(layout), job.tokens(layout), layout.tp
    buffer = job.wire.activation(tokens * job.model.dim // tp, tp)
    parts = sum(len(PARTS[kind]) for kind in stage.kinds)
    gathers = scatters = 2 * parts  # inputs of attention and MLP, gradients of their outputs; and the other way round
    if layout.recompute is Recompute.full:  # as far as the backward needs it: not the last output of a block
        gathers, scatters = gathers + parts, scatters + parts - stage.blocks
    ends = stage.first + stage.last  # the embedding's output is scattered, the head's input gathered; gradients alike
    gathers, scatters = micros * (gathers + ends), micros * (scatters + ends)
    yield Transfer("activation_all_gather", tp, 1, gathers * buffer, gathers)
    yield Transfer("activation_reduce_scatter", tp, 1, scatters * buffer, scatters)
    vectors = [-(-size // tp) * tp for size in stage.total.vectors]  # each rank's gradient is of its tokens
    yield Transfer("activation_all_reduce", tp, 1, micros * 2 * 4 * sum(vectors), micros * len(vectors))
    yield Transfer("other", tp, 1, stage.last * micros * 2 * 4 * tokens * tp, micros)  # normaliser, target's logit


def _context(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Context parallel: every layer gathers k and v of the whole sequence; their gradients are scattered back."""
    model, cp = job.model, layout.cp
    passes = job.micros(layout) * sum("attn" in PARTS[kind] for kind in stage.kinds)
    buffer = job.wire.activation(job.tokens(layout) * 2 * model.kv_heads * model.dim_per_head // layout.tp, cp)
    gathers = passes * (1 if layout.recompute is Recompute.none else 2)
    yield Transfer("kv_all_gather", cp, layout.tp, gathers * buffer, gathers)
    yield Transfer("kv_reduce_scatter", cp, layout.tp, passes * buffer, passes)


def _pipeline(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Activations from the stage before, gradients from the one after, for every micro-batch."""
    calls = job.micros(layout) * (2 * layout.virtual_stages - stage.first - stage.last)
    size = job.tokens(layout) * job.model.dim // layout.tp * job.value_bytes
    yield Transfer("pipeline_send", layout.pp, layout.stride("pp"), calls * size, calls)
