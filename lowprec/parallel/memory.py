"""Memory: what a rank holds in the course of a step, moment by moment; the fullest moment is what it needs.

A rank whose shard has P_s parameters always holds 4 P_s of fp32 masters and the optimizer's moments, 8 P_s for AdamW.
With 4 P_s of gradients these are the 16 bytes a parameter of ZeRO (arXiv:1910.02054). The rest comes and goes, so it is
followed through the step as FSDP2 goes through it:

    loss        all activations; the logits, their gradient and two fp32 copies of a piece of them
    backward i  activations of the blocks up to i (with recomputation: their inputs, and block i whole), gradients that
                flow through it, its weights and what is gathered of the next ones; the summed gradients of the blocks
                behind it, and the buffer of the last sum, which FSDP2 lets go when the next is filled
    sum i       the block's gradients in the compute dtype, the fp32 buffer they are summed from, and what comes out
    gather      (several micro-batches) between two of them all weights are there, and whole fp32 gradients
    update      masters, moments, gradients, and the square of the largest one, whose norm is taken

Activations a token and block follow arXiv:2205.05198, whose 34 h (+ 5 a s of attention scores: none with a fused
kernel) become here, with C the width, Q and KV those of the query and key heads together, F the MLP's

    norms  2 x 4 C (fp32 copies: + 4 C)    their outputs, gathered  2 x 2 C    q, k, v and y  2 (2 Q + 2 KV)
    MLP    8 F swiglu, 4 F relu2           dropout masks  none (- 2 C)         statistics     8 + 4 heads

Tensor parallel, with sequence parallel, divides all but the gathered outputs; context parallel leaves 1 / cp of the
tokens but gathers k and v. A stage of a pipeline keeps as many micro-batches as stages follow it, itself included
(1F1B, arXiv:2104.04473), and with v interleaved stages a rank 1 + (p - 1) / (p v) whole micro-batches on the first.

Not in it: fragments of the allocator, buffers of the network library, and what C++ and CUDA libraries allocate by
themselves.
"""

import math
from collections.abc import Iterator

from lowprec.model.config import Activation
from lowprec.model.ssd import CHUNK
from lowprec.parallel.config import Recompute
from lowprec.parallel.layout import PARTS, Job, Layout, Stage, Unit, block_shapes, head_shape

BLOCKED_TOKENS = 2048
"""Up to so many tokens, attention on a CPU keeps its probabilities."""
_QUERIES = 128  # of a block of those
LOSS_VALUES = {True: 1 << 19, False: 1 << 26}
"""Logits that the loss turns into fp32 at a time: on a CPU (True) and on a GPU."""
SCAN_BYTES = (70.0, 9.0)
"""While the backward of a Mamba-2 block runs: bytes for every token and value of its inner width, and for every token,
head and token of a chunk. Measured on a CPU, where all of it is fp32; kernels of a GPU need less."""

Moment = tuple[str, dict[str, float]]
"""(name, bytes by what they are)."""


def memory(job: Job, layout: Layout, stage: Stage) -> Moment:
    """The fullest moment of a step on a rank of the stage."""
    return max(moments(job, layout, stage), key=lambda moment: sum(moment[1].values()))


def moments(job: Job, layout: Layout, stage: Stage) -> Iterator[Moment]:
    """What a rank holds in the course of a step's last micro-batch, in order."""
    always, during = _always(job, layout, stage), _during(job, layout, stage)
    several = layout.pp > 1 or job.micros(layout) > 1  # backward passes before gradients are summed over ranks
    whole = 4.0 * stage.total.values if several else 0.0  # of earlier micro-batches: all, whole, in fp32
    if stage.last:
        yield from _head(job, layout, stage, during, whole)
    yield from _backward(job, layout, stage, during, several)
    if several:
        blocks = sum(unit.held_bytes for unit in stage.each)
        gathered = during["gathered weights"] + blocks * layout.reshard_after_forward
        yield "between micro-batches", during | {"gradients": whole, "gathered weights": gathered}
    yield "update", always | {"gradients": 4.0 * stage.total.shard, "workspace": 4.0 * stage.total.largest_shard}


def _always(job: Job, layout: Layout, stage: Stage) -> dict[str, float]:
    """What is never let go."""
    total, wire = stage.total, job.wire
    return {
        "parameters": 4.0 * total.shard,
        "optimizer": job.optimizer_bytes * total.shard,
        "error feedback": wire.feedback * total.shard * layout.fsdp,
        "secondary weights": total.weight_bytes / layout.near(wire) if wire.hpz else 0.0,
    }


def _during(job: Job, layout: Layout, stage: Stage) -> dict[str, float]:
    """And what is there throughout the backward pass."""
    model, total, root, ranks = job.model, stage.total, stage.root, layout.fsdp
    passes, tokens = in_flight(job, layout, stage.index), job.tokens(layout)
    ahead = sum(_kept(job, layout, stage)) * (passes / layout.virtual_stages - 1) if layout.pp > 1 else 0.0
    sides = 2 if layout.virtual_stages > 1 else 2 - stage.first - stage.last
    received = tokens * job.value_bytes * model.dim / layout.tp * sides * passes  # and sent, until its backward
    kept = 0.0 if layout.reshard_after_forward else float(sum(unit.held_bytes for unit in stage.each))
    return _always(job, layout, stage) | {
        "activations": ahead,  # of other passes
        "positions, mask": context_bytes(job, layout) * passes,
        "pipeline buffers": received if layout.pp > 1 else 0.0,
        "gathered weights": root.held_bytes + kept,
        # what FSDP2 gathered last in the forward pass, and this rank's rows as they travel, for the next gather
        "communication buffers": float(stage.each[-1].weight_bytes + total.encoded_bytes) if ranks > 1 else 0.0,
    }


def _head(job: Job, layout: Layout, stage: Stage, during: dict[str, float], whole: float) -> Iterator[Moment]:
    """The loss, and the product before it."""
    tokens, reshards = job.tokens(layout), layout.reshard_after_forward
    head = math.prod(head_shape(job.model, layout.tp))
    copy = float(job.value_bytes * head)  # the head's weight in the compute dtype
    ends = {name: tokens * size for name, size in loss_terms(job, layout).items()}
    kept = sum(_kept(job, layout, stage))
    found = during | {"activations": during["activations"] + kept, "gradients": whole}
    logits = job.model.vocab_size // layout.tp
    yield (
        "loss",
        found
        | {
            "gathered weights": during["gathered weights"] + copy,
            "logits, loss": sum(ends.values()),
            "workspace": 2 * 4.0 * min(tokens * logits, max(LOSS_VALUES[job.cpu], logits)),
        },
    )
    yield (
        "backward of the head",
        found
        | {
            "gathered weights": during["gathered weights"] + copy + stage.each[-1].held_bytes * reshards,
            "logits, loss": sum(ends.values()) - ends["logits and gradient"] / 2,
            "workspace": copy + 4.0 * head,  # the weight's gradient as it comes, and in fp32
        },
    )


def _backward(job: Job, layout: Layout, stage: Stage, during: dict[str, float], several: bool) -> Iterator[Moment]:
    """The blocks, last to first, and the root."""
    root, tokens, value, reshards = stage.root, job.tokens(layout), job.value_bytes, layout.reshard_after_forward
    kept, ahead = _kept(job, layout, stage), during["activations"]
    work = {kind: tokens * (_again(job, layout, kind) + _flowing(job, layout, kind)) for kind in set(stage.kinds)}
    operands = {kind: tokens * _operands(job, layout, kind) for kind in set(stage.kinds)}
    gradients = 4.0 * (stage.total.values if several else math.prod(head_shape(job.model, layout.tp)) * stage.last)
    rest, buffer = sum(kept), 0.0
    for i in reversed(range(stage.blocks)):
        unit, kind, found = stage.each[i], stage.kinds[i], dict(during)
        mine = 4.0 * unit.values if several else float(value * unit.values)
        if i and layout.fsdp > 1 and reshards:  # gathered ahead
            found["communication buffers"] += stage.each[i - 1].weight_bytes
        before = gradients - mine * several
        if not _like_its_neighbours(stage, i):
            yield (
                f"backward of block {i}",
                found
                | {
                    "gradients": gradients + buffer,
                    "gathered weights": during["gathered weights"] + unit.held_bytes * reshards,
                    "activations": ahead + rest,
                    "work on a block": work[kind],
                    "workspace": operands[kind],
                },
            )
            yield (
                f"sum of block {i}",
                found
                | {
                    "gradients": before + _sum(unit, layout, mine),
                    "activations": ahead + rest - kept[i],
                    "work on a block": float(tokens * value * job.model.dim),
                },
            )
        rest, gradients, buffer = rest - kept[i], before + 4.0 * unit.shard, 4.0 * unit.shard * layout.fsdp
    yield (
        "sum of the root",
        during
        | {
            "gradients": 4.0 * (stage.total.shard - root.shard) + _sum(root, layout, 4.0 * root.values),
            "gathered weights": during["gathered weights"] - root.held_bytes,
            "activations": ahead,
        },
    )


def _like_its_neighbours(stage: Stage, i: int) -> bool:
    """Whether two blocks on either side are like this one: bytes change by equal steps there, so it is no peak."""
    near = range(i - 2, i + 3)
    return (
        near[0] >= 0
        and near[-1] < stage.blocks
        and all(stage.kinds[j] == stage.kinds[i] and stage.each[j] == stage.each[i] for j in near)
    )


def _sum(unit: Unit, layout: Layout, gradients: float) -> float:
    """What the sum of a unit's gradients over ranks takes: they go once they are in its buffer, of which another is
    sent; one rank divides by 1 instead."""
    ranks, shard = layout.fsdp, 4.0 * unit.shard
    buffer, payload = shard * ranks, unit.gradient_bytes
    if ranks == 1:
        return max(gradients + buffer, 3 * buffer)
    return max(gradients + buffer, buffer + (payload if payload >= buffer else 2 * payload) + 2 * shard)


def _kept(job: Job, layout: Layout, stage: Stage) -> list[float]:
    """Bytes of each block's activations between forward and backward."""
    each = {kind: sum(block_terms(job, layout, layout.recompute, kind).values()) for kind in set(stage.kinds)}
    return [job.tokens(layout) * each[kind] for kind in stage.kinds]


def _again(job: Job, layout: Layout, kind: str) -> float:
    """Bytes a token of what a block computes again."""
    if layout.recompute is Recompute.none:
        return 0.0
    every = sum(block_terms(job, layout, Recompute.none, kind).values())
    kept = sum(block_terms(job, layout, Recompute.selective, kind).values())
    return every - kept if layout.recompute is Recompute.selective else every


def _flowing(job: Job, layout: Layout, kind: str) -> float:
    """Bytes a token of gradients on their way through a block; of a scan, all that its backward needs."""
    model = job.model
    if kind == "M":
        assert model.mamba is not None
        return model.mamba.heads * (SCAN_BYTES[0] * model.mamba.head_dim + SCAN_BYTES[1] * CHUNK)
    inner = model.ffn_dim if "mlp" in PARTS[kind] else model.heads * model.dim_per_head
    return job.value_bytes * (2 * model.dim + 3 * inner / layout.tp)


def _operands(job: Job, layout: Layout, kind: str) -> float:
    """Bytes a token of quantised operands: of the widest layer both of both backward products; while the backward of a
    scan runs, those of the product after it."""
    shapes = block_shapes(job.model, layout.tp, kind)
    if kind == "M":
        return 2 * job.operand_bytes * sum(shapes["mamba.out_proj.weight"])
    return 4 * job.operand_bytes * max(max(shape) for shape in shapes.values() if len(shape) == 2)


def block_terms(job: Job, layout: Layout, recompute: Recompute, kind: str = "T") -> dict[str, float]:
    """Bytes a token that a block of a kind keeps between forward and backward, by what they are."""
    if recompute is Recompute.full:
        return {"block input": job.value_bytes * job.model.dim / layout.tp}
    parts = {"attn": _attention_terms, "mlp": _mlp_terms, "mamba": _mamba_terms}
    return {name: size for part in PARTS[kind] for name, size in parts[part](job, layout, recompute).items()}


def _norm_bytes(job: Job, layout: Layout) -> float:
    """What a norm before a mixer keeps: its fp32 input, on a CPU a second time, and a number."""
    return (4 * (2 if job.cpu else 1) * job.model.dim + 4) / layout.tp


def _attention_terms(job: Job, layout: Layout, recompute: Recompute) -> dict[str, float]:
    model, value, tp, copies = job.model, job.value_bytes, layout.tp, 2 if job.cpu else 1
    q, kv = model.heads * model.dim_per_head / tp, model.kv_heads * model.dim_per_head / tp
    terms = {
        "attention norm": _norm_bytes(job, layout),
        "qkv input": job.kept.get("qkv", value * model.dim),
    }
    if model.qk_norm:
        terms["q and k norms"] = 4 * copies * (q + kv) + 4 * (model.heads + model.kv_heads) / tp
    keys = 1.0 if layout.cp == 1 else layout.cp + 0.5  # a token; with cp, of two parts of the sequence one by one
    o_input = job.kept.get("o", value * model.heads * model.dim_per_head) / tp
    if recompute is Recompute.selective:
        return terms | {"q, k, v": value * (q + 2 * kv), "o input": o_input}
    if _keeps_scores(job):
        terms |= {"q, k, v": value * (q + 2 * kv * keys), "o input": o_input}
        return terms | {"attention probabilities": value * model.heads / tp * _seen(job.seq_len, layout.cp)}
    # the fused kernel's output is the input of o, and is kept once; with cp, its two parts are joined
    copied = q if job.documents or layout.cp > 1 else kv  # with a mask, k and v are copied for every query head
    terms |= {"q, k, v": value * (q + 2 * copied * keys), "y": value * q, "attention statistics": 4 * model.heads / tp}
    return terms | {"o input": o_input if "o" in job.kept or layout.cp > 1 else 0.0}


def _mlp_terms(job: Job, layout: Layout, recompute: Recompute) -> dict[str, float]:
    model, value, tp, is_gated = job.model, job.value_bytes, layout.tp, job.model.activation is Activation.swiglu
    inner = (2 if is_gated else 1) + (is_gated and recompute is Recompute.none)  # gate, up, silu(gate); or relu(up)
    return {
        "mlp norm": _norm_bytes(job, layout),
        "mlp input": job.kept.get("mlp", value * model.dim),
        "mlp": value * inner * model.ffn_dim / tp,
        "down input": job.kept.get("down", value * model.ffn_dim) / tp,
    }


def _mamba_terms(job: Job, layout: Layout, recompute: Recompute) -> dict[str, float]:
    """Whatever `recompute` says, what is between the two products is computed again (lowprec/model/mamba.py)."""
    model, value, m = job.model, job.value_bytes, job.model.mamba
    assert m is not None
    inner = m.heads * m.head_dim
    return {
        "mamba norm": _norm_bytes(job, layout),
        "in input": job.kept.get("in", value * model.dim),
        "in output": value * (2 * inner + 2 * m.groups * m.state + m.heads),
        "out input": job.kept.get("out", value * inner),
    }


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
