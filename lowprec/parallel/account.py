"""Account: what a layout costs each rank, in bytes of memory and in bytes received, before anything runs.

Nothing here is measured and nothing is a tensor: sizes in, bytes out. The formulas follow this implementation term by
term, so that tests can compare them with what a model keeps and with the counters of real collectives.

*Memory.* A rank whose shard has P_s parameters holds 4 P_s of fp32 masters, 4 P_s of gradients and 8 P_s of AdamW's
moments: the 16 bytes a parameter of ZeRO (arXiv:1910.02054). On top come gathered weights, gradients not yet summed
over ranks, activations and logits. Activations a token and block follow arXiv:2205.05198, whose 34 h (+ 5 a s of
attention scores: none with a fused kernel) become here, with C the width, Q and KV those of the query and key heads
together, F the MLP's

    norms  2 x 4 C (fp32 copies: + 4 C)    their outputs, gathered  2 x 2 C    q, k, v and y  2 (2 Q + 2 KV)
    MLP    8 F swiglu, 4 F relu2           dropout masks  none (- 2 C)         statistics     8 + 4 heads

Tensor parallel, with sequence parallel, divides all but the gathered outputs; context parallel leaves 1 / cp of the
tokens but gathers k and v. A stage of a pipeline keeps as many micro-batches as stages follow it, itself included
(1F1B, arXiv:2104.04473), and with v interleaved stages a rank 1 + (p - 1) / (p v) whole micro-batches on the first.

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
from lowprec.model.config import Activation
from lowprec.parallel.config import Recompute
from lowprec.parallel.layout import Job, Layout, Stage, Stages

BLOCKED_TOKENS = 2048
"""Up to so many tokens, attention on a CPU keeps its probabilities."""
_QUERIES = 128  # of a block of those


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
        lines += [f"memory of a rank{place}, computed: {amount(stage.memory_bytes)}"]
        lines += [f"  {name:<28}{amount(part):>10}" for name, part in stage.memory.items() if part]
        for stage in self.stages:
            total, place = sum(stage.wire_bytes.values()), f" of stage {stage.stage}" if many else ""
            lines += ["", f"received by a rank{place} in a step, logical bytes (and a parameter): {amount(total)}"]
            parts = {**stage.wire_bytes, "all": total} if total else {}
            lines += [f"  {name:<32}{amount(part):>10}{part / parameters:>8.2f}" for name, part in parts.items()]
        return "\n".join([*lines, "", f"pipeline bubble: {self.bubble:.1%} of a step"] if many else lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        stages = [{"memory": s.memory, "memory_bytes": s.memory_bytes, "wire_bytes": s.wire_bytes} for s in self.stages]
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
        found.append(StageAccount(stage.index, memory(job, layout, stage), received))
    return Account(job, layout, tuple(found))


# ---- memory


def memory(job: Job, layout: Layout, stage: Stage) -> dict[str, float]:
    """Bytes of one rank at its peak, the beginning of a backward pass, by what they are."""
    model, value, root, largest = job.model, job.value_bytes, stage.root.values, stage.largest
    shard, tokens = stage.total.shard, activations(job, layout, stage)
    several = layout.pp > 1 or job.micros(layout) > 1  # backward passes before gradients are summed over ranks
    if several:  # all of them, whole, in fp32; and the buffer of one sum
        gradients = 4.0 * max(stage.total.values, shard) + 4 * max(largest, root)
    else:  # the shards; of the root and of one block whole, the block's in the compute dtype and in fp32
        gradients = 4.0 * (shard + root) + max((value + 4) * largest, 4 * root)
    blocks = stage.total.held_bytes - stage.root.held_bytes
    gathered = 2.0 * stage.widest if layout.reshard_after_forward else float(blocks)  # two: the next one is prefetched
    if several:  # between two passes all weights are there, and the activations of one pass are not
        gathered = max(gathered, blocks - tokens["activations"] / in_flight(job, layout, stage.index))
    gathered += stage.root.held_bytes
    gathered += value * model.vocab_size * model.dim // layout.tp if stage.last else 0  # the head's copy in this dtype
    if job.wire.hpz:
        gathered += stage.total.weight_bytes / layout.near(job.wire)
    return {
        "parameters": 4.0 * shard,
        "optimizer": job.optimizer_bytes * shard,
        "gradients": gradients,
        "error feedback": job.wire.feedback * shard * layout.fsdp,
        "gathered weights": gathered,
        **tokens,
    }


def activations(job: Job, layout: Layout, stage: Stage) -> dict[str, float]:
    """The part of `memory` that grows with the tokens of a micro-batch."""
    model, value, tokens, how = job.model, job.value_bytes, job.tokens(layout), layout.recompute
    every = sum(block_terms(job, layout, Recompute.none).values())
    kept = sum(block_terms(job, layout, how).values())
    again = 0.0 if how is Recompute.none else every - kept * (how is Recompute.selective)
    flowing = value * (2 * model.dim + 3 * model.ffn_dim / layout.tp)  # gradients on their way through a block
    passes, depth = in_flight(job, layout, stage.index), stage.blocks / layout.virtual_stages
    found = {
        "activations": tokens * kept * depth * passes,
        "work on a block": tokens * (again + flowing),
        "positions, mask": context_bytes(job, layout) * passes,
    }
    if stage.last:
        found["logits, loss"] = tokens * sum(loss_terms(job, layout).values())
    if layout.pp > 1:  # what a pass received and what it sent, until its backward
        sides = 2 if layout.virtual_stages > 1 else 2 - stage.first - stage.last
        found["pipeline buffers"] = tokens * value * model.dim / layout.tp * sides * passes
    return found


def block_terms(job: Job, layout: Layout, recompute: Recompute) -> dict[str, float]:
    """Bytes a token and block that are kept between forward and backward, by what they are."""
    model, value, tp, copies = job.model, job.value_bytes, layout.tp, 2 if job.cpu else 1
    if recompute is Recompute.full:
        return {"block input": value * model.dim / tp}
    q, kv = model.heads * model.dim_per_head / tp, model.kv_heads * model.dim_per_head / tp
    heads, f, is_gated = model.heads / tp, model.ffn_dim / tp, model.activation is Activation.swiglu
    terms = {
        "norms": 2 * (4 * copies * model.dim + 4) / tp,
        "qkv input": job.kept.get("qkv", value * model.dim),
        "mlp input": job.kept.get("mlp", value * model.dim),
    }
    if model.qk_norm:
        terms["q and k norms"] = 4 * copies * (q + kv) + 4 * (model.heads + model.kv_heads) / tp
    keys = 1.0 if layout.cp == 1 else layout.cp + 0.5  # a token; with cp, of two parts of the sequence one by one
    o_input = job.kept.get("o", value * model.heads * model.dim_per_head) / tp
    if recompute is Recompute.selective:
        terms |= {"q, k, v": value * (q + 2 * kv), "o input": o_input}
    elif _keeps_scores(job):
        terms |= {"q, k, v": value * (q + 2 * kv * keys), "o input": o_input}
        terms["attention probabilities"] = value * heads * _seen(job.seq_len, layout.cp)
    else:  # the fused kernel's output is the input of o, and is kept once; with cp, its two parts are joined
        copied = q if job.documents or layout.cp > 1 else kv  # with a mask, k and v are copied for every query head
        terms |= {"q, k, v": value * (q + 2 * copied * keys), "y": value * q, "attention statistics": 4 * heads}
        terms["o input"] = o_input if "o" in job.kept or layout.cp > 1 else 0.0
    mlp = (2 if is_gated else 1) + (is_gated and recompute is Recompute.none)  # gate, up, silu(gate); or relu(up)
    return terms | {"mlp": value * mlp * f, "down input": job.kept.get("down", value * model.ffn_dim) / tp}


def loss_terms(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes a token that the end of the model keeps, by what they are; logits and their gradient exist together."""
    model, value, tp = job.model, job.value_bytes, layout.tp
    return {
        "token ids": 8.0,
        "last norm": (4 * (2 if job.cpu else 1) * model.dim + 4) / tp,
        "head input": value * model.dim,
        "logits and gradient": 2 * value * model.vocab_size / tp,
        "targets, normaliser": 8.0 + 1 + (tp > 1) + 4,
    }


def context_bytes(job: Job, layout: Layout) -> float:
    """Tables of rotary positions and mask of a micro-batch, which its layers share."""
    rows = job.micro_batch if job.documents else 1
    tables = 4.0 * job.model.dim_per_head * rows * job.seq_len if job.model.rope_theta is not None else 0.0
    has_mask = layout.recompute is not Recompute.none if _keeps_scores(job) else job.documents
    return tables + has_mask * job.value_bytes * rows * job.seq_len**2 / layout.cp


def in_flight(job: Job, layout: Layout, index: int) -> int:
    """Forward passes (of one stage of the rank) whose backward is still to come, at most."""
    parts, micros, after = layout.virtual_stages, job.micros(layout), layout.pp - index - 1
    if parts == 1:
        return min(after + 1, micros)
    each = micros // (micros // layout.pp)  # of a round
    return min(2 * after + (parts - 1) * each + 1, micros * parts)


def _keeps_scores(job: Job) -> bool:
    return job.cpu and job.seq_len <= BLOCKED_TOKENS


def _seen(tokens: int, cp: int) -> float:
    """Keys that a query meets on average, in whole blocks of queries; of cp ranks, the first."""
    size = tokens if cp == 1 else tokens // (2 * cp)
    total = 0
    for chunk in sorted({0, tokens - size}):  # the first and the last
        ends = [min(start + _QUERIES, size) for start in range(0, size, _QUERIES)]
        total += sum((end - start) * (chunk + end) for start, end in zip([0, *ends], ends))
    return total / (tokens / cp)


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
    micros, blocks, tokens, tp = job.micros(layout), stage.blocks, job.tokens(layout), layout.tp
    buffer = job.wire.activation(tokens * job.model.dim // tp, tp)
    gathers = scatters = 4 * blocks  # inputs of attention and MLP, gradients of their outputs; and the other way round
    if layout.recompute is Recompute.full:  # as far as the backward needs it: not the MLP's output
        gathers, scatters = gathers + 2 * blocks, scatters + blocks
    ends = stage.first + stage.last  # the embedding's output is scattered, the head's input gathered; gradients alike
    gathers, scatters = micros * (gathers + ends), micros * (scatters + ends)
    yield Transfer("activation_all_gather", tp, 1, gathers * buffer, gathers)
    yield Transfer("activation_reduce_scatter", tp, 1, scatters * buffer, scatters)
    vectors = [-(-size // tp) * tp for size in stage.total.vectors]  # each rank's gradient is of its tokens
    yield Transfer("activation_all_reduce", tp, 1, micros * 2 * 4 * sum(vectors), micros * len(vectors))
    yield Transfer("other", tp, 1, stage.last * micros * 2 * 4 * tokens * tp, micros)  # normaliser, target's logit


def _context(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Context parallel: every layer gathers k and v of the whole sequence; their gradients are scattered back."""
    model, cp, passes = job.model, layout.cp, job.micros(layout) * stage.blocks
    buffer = job.wire.activation(job.tokens(layout) * 2 * model.kv_heads * model.dim_per_head // layout.tp, cp)
    gathers = passes * (1 if layout.recompute is Recompute.none else 2)
    yield Transfer("kv_all_gather", cp, layout.tp, gathers * buffer, gathers)
    yield Transfer("kv_reduce_scatter", cp, layout.tp, passes * buffer, passes)


def _pipeline(job: Job, layout: Layout, stage: Stage) -> Iterator[Transfer]:
    """Activations from the stage before, gradients from the one after, for every micro-batch."""
    calls = job.micros(layout) * (2 * layout.virtual_stages - stage.first - stage.last)
    size = job.tokens(layout) * job.model.dim // layout.tp * job.value_bytes
    yield Transfer("pipeline_send", layout.pp, layout.stride("pp"), calls * size, calls)
