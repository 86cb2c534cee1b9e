"""Layout: how ranks share a model, on paper: what is trained (`Job`), the five sizes (`Layout`), and who holds what.

What the account is made of. A pipeline stage is a list of units; a unit is what FSDP2 gathers together: a block, or the
root (embedding, last norm, head: what the stage has of them). Tensor parallel cuts the rows of q, k, v, gate, up,
embedding and head and the columns of o and down; FSDP2 then deals out the rows of what is left, in equal numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowprec.model import ModelConfig
from lowprec.model.config import Activation
from lowprec.parallel.config import AXES, ParallelConfig, Recompute
from lowprec.parallel.context import token_multiple
from lowprec.parallel.pipeline import check_micros, check_stages, deal
from lowprec.parallel.tensor import refuse, refuse_scan
from lowprec.parallel.wire import Shape, Wire, padded


@dataclass(frozen=True)
class Layout:
    """Sizes of the five axes, outermost first, and how they are used; the part of `ParallelConfig` that costs bytes."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    virtual_stages: int = 1
    recompute: Recompute = Recompute.none
    reshard_after_forward: bool = True

    @classmethod
    def of(cls, config: ParallelConfig, ranks: int) -> "Layout":
        """What `config` means for so many ranks. Raises ValueError if they cannot be laid out like this."""
        settings: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
        return cls(**settings | config.sizes(ranks))

    def config(self, base: ParallelConfig) -> ParallelConfig:
        """`base` with this layout in it; what is no part of a layout (timeouts, compilation) stays."""
        return dataclasses.replace(
            base, auto=False, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        )

    @property
    def ranks(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """Ranks that train on different micro-batches."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Ranks over which a parameter is sharded."""
        return self.shard * self.cp

    def near(self, wire: Wire) -> int:
        """Of the ranks that share parameters, those of one node."""
        return max(1, min(wire.node // self.tp, self.fsdp))

    def level(self, wire: Wire) -> int:
        """Ranks over which gradients are summed first: those of a node, or all that share parameters."""
        return self.near(wire) if wire.two_level and self.replicate == 1 else self.fsdp

    def stride(self, axis: str) -> int:
        """Distance between neighbours along an axis."""
        return math.prod(getattr(self, inner) for inner in AXES[AXES.index(axis) + 1 :])

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one rank"
        more = [f"{self.virtual_stages} stages a rank"] if self.virtual_stages > 1 else []
        more += [f"recompute {self.recompute.value}"] if self.recompute is not Recompute.none else []
        more += ["weights kept"] if not self.reshard_after_forward else []
        return ", ".join([sizes, *more])


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the layout.

    kept: bytes a token and block that are kept of the inputs of linear layers, where that is not the input in the
    compute dtype: any of "qkv", "o", "mlp", "down", "in", "out" (`precision.save: codes`; averages over the blocks
    that have such a layer).
    """

    model: ModelConfig
    micro_batch: int  # sequences per forward pass
    seq_len: int
    global_batch: int  # sequences per step
    value_bytes: int = 2  # of the compute dtype
    optimizer_bytes: float = 8.0  # a parameter; AdamW: two fp32 moments
    operand_bytes: float = 0.0  # of a value of a quantised operand, as the product takes it
    kept: Mapping[str, float] = field(default_factory=dict)
    documents: bool = True  # attention stays inside documents: a mask, and k and v copied for every query head
    cpu: bool = False  # kernels of a CPU keep more: attention probabilities up to 2048 tokens, norms a second copy
    wire: Wire = field(default_factory=Wire.plain)

    def micros(self, layout: Layout) -> int:
        """Micro-batches of a step on one data-parallel rank."""
        return self.global_batch // self.micro_batch // layout.data

    def tokens(self, layout: Layout) -> int:
        """Tokens of a micro-batch on one rank; tensor-parallel ranks have them between them."""
        return self.micro_batch * self.seq_len // layout.cp


def refusal(job: Job, layout: Layout) -> str | None:
    """Why the model or the batch cannot be laid out like this, or None: the sentences of those who would refuse it."""
    model, micros = job.model, job.global_batch // job.micro_batch
    if micros % layout.data:
        fewer = job.global_batch // layout.data
        hint = f" (train.micro_batch={fewer} gives each one)" if fewer and job.global_batch % layout.data == 0 else ""
        return f"{micros} micro-batches a step cannot be shared evenly by {layout.data} data-parallel ranks{hint}"
    if job.seq_len % (multiple := token_multiple(layout.cp, layout.tp)):
        return f"data.seq_len={job.seq_len} is no multiple of {multiple}, which cp {layout.cp} x tp {layout.tp} needs"
    if (job.wire.hpz or job.wire.two_level) and layout.fsdp % (near := layout.near(job.wire)):
        return f"comm: nodes of {near} ranks do not divide the {layout.fsdp} that share parameters"
    try:
        refuse(model, layout.tp)
        refuse_scan(model, layout.tp, layout.cp)
        check_stages(model, layout.pp, layout.virtual_stages)
        check_micros(layout.pp, layout.virtual_stages, job.micros(layout), job.micro_batch, layout.data)
    except ValueError as error:
        return str(error)
    return None


# ---- parameters


def kinds(model: ModelConfig) -> str:
    """One character a block: "T" attention and MLP (a Transformer's layer), or the hybrid's "M", "-" and "*"."""
    return model.pattern or "T" * model.layers


PARTS = {"T": ("attn", "mlp"), "*": ("attn",), "-": ("mlp",), "M": ("mamba",)}
"""What a block of a kind is made of; each part has a norm before it."""


def block_shapes(model: ModelConfig, tp: int = 1, kind: str = "T") -> dict[str, Shape]:
    """Parameters of a block of a kind by name -> shape on one tensor-parallel rank."""
    makers = {"attn": _attention_shapes, "mlp": _mlp_shapes, "mamba": _mamba_shapes}
    shapes: dict[str, Shape] = {}
    for part in PARTS[kind]:
        shapes[f"{part}_norm.weight"] = (model.dim,)
        shapes |= {f"{part}.{name}": shape for name, shape in makers[part](model, tp).items()}
    return shapes


def _attention_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    c, width = model.dim, model.dim_per_head
    q, kv = model.heads * width // tp, model.kv_heads * width // tp
    shapes: dict[str, Shape] = {"q_proj.weight": (q, c), "k_proj.weight": (kv, c), "v_proj.weight": (kv, c)}
    shapes["o_proj.weight"] = (c, q)
    return shapes | ({"q_norm.weight": (width,), "k_norm.weight": (width,)} if model.qk_norm else {})


def _mlp_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    c, f = model.dim, model.ffn_dim // tp
    gate: dict[str, Shape] = {"gate_proj.weight": (f, c)} if model.activation is Activation.swiglu else {}
    return gate | {"up_proj.weight": (f, c), "down_proj.weight": (c, f)}


def _mamba_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    """arXiv:2405.21060; never cut by tensor parallelism."""
    m = model.mamba
    assert m is not None and tp == 1
    inner, channels = m.heads * m.head_dim, m.heads * m.head_dim + 2 * m.groups * m.state
    return {
        "A_log": (m.heads,),
        "D": (m.heads,),
        "dt_bias": (m.heads,),
        "in_proj.weight": (inner + channels + m.heads, model.dim),
        "conv1d.weight": (channels, 1, m.conv),
        "conv1d.bias": (channels,),
        "norm.weight": (inner,),
        "out_proj.weight": (model.dim, inner),
    }


def head_shape(model: ModelConfig, tp: int = 1) -> Shape:
    """The matrix that makes logits, be it the embedding's or its own."""
    return (model.vocab_size // tp, model.dim)


def root_shapes(model: ModelConfig, tp: int = 1, first: bool = True, last: bool = True) -> dict[str, Shape]:
    """Parameters outside the blocks, of a first and of a last pipeline stage."""
    matrix = head_shape(model, tp)
    shapes: dict[str, Shape] = {"embed.weight": matrix} if first else {}
    if last:
        shapes["norm.weight"] = (model.dim,)
        if not (model.tie_embeddings and first):
            shapes["lm_head.weight"] = matrix
    return shapes


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers and sums together: a block, or the root. Values are of one tensor-parallel rank."""

    values: int
    shard: int  # of these, in one rank's shard, padding included
    largest_shard: int  # the part of it that is of one parameter
    vectors: tuple[int, ...]  # sizes of those that tensor-parallel ranks have alike: norms
    weight_bytes: int  # what a gather yields
    held_bytes: int  # of it in memory
    encoded_bytes: int  # a rank's rows as they travel, kept for all gathers of a step
    maxima: int  # that are agreed on before a gather
    gradient_bytes: int  # what a reduce-scatter takes in; of two levels, the one inside nodes
    between_bytes: int  # the other one
    replica_bytes: int  # what an all-reduce between copies counts

    @classmethod
    def of(cls, name: str, shapes: Mapping[str, Shape], wire: Wire, layout: Layout) -> "Unit":
        """name: "layers.3", or "" for the root."""
        ranks, level, copies = layout.fsdp, layout.level(wire), layout.replicate
        weights = [wire.weight(f"{name}.{key}" if name else key, shape, ranks) for key, shape in shapes.items()]
        shards = [padded(shape, ranks) // ranks for shape in shapes.values()]
        shard = sum(shards)
        return cls(
            sum(map(math.prod, shapes.values())),
            shard,
            max(shards, default=0),
            tuple(shape[0] for shape in shapes.values() if len(shape) == 1),
            sum(weight.sent for weight in weights),
            sum(weight.held for weight in weights),
            sum(weight.encoded for weight in weights),
            sum(weight.maxima for weight in weights),
            wire.gradient(shard * (ranks // level), level),
            wire.between(shard, ranks // level),
            2 * wire.between(-(-shard // copies), copies),
        )


@dataclass(frozen=True)
class Stage:
    """What the ranks of one coordinate of the pipeline axis hold: one stage, or several interleaved ones."""

    index: int
    first: bool
    last: bool
    kinds: str  # of its blocks, see `kinds`
    each: tuple[Unit, ...]  # its blocks
    total: Unit  # sums over blocks and root
    root: Unit
    units: int  # blocks, and the root if it has any parameter

    @property
    def blocks(self) -> int:
        return len(self.each)


class Stages:
    """The stages of a job's layouts; what layouts have in common is made once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._units: dict[tuple[object, ...], Unit] = {}
        self._stages: dict[tuple[object, ...], list[Stage]] = {}

    def of(self, layout: Layout) -> list[Stage]:
        """In order. Raises ValueError where `refusal` has a reason."""
        if why := refusal(self.job, layout):
            raise ValueError(f"{layout}: {why}")
        key = (layout.pp, layout.virtual_stages, layout.replicate, layout.fsdp, layout.tp)
        if key not in self._stages:
            dealt = deal(self.job.model.layers, layout.pp * layout.virtual_stages)
            parts = [dealt[index :: layout.pp] for index in range(layout.pp)]
            self._stages[key] = [self._stage(index, ranges, layout) for index, ranges in enumerate(parts)]
        return self._stages[key]

    def _stage(self, index: int, ranges: list[range], layout: Layout) -> Stage:
        model, tp, first, last = self.job.model, layout.tp, index == 0, index == layout.pp - 1
        pattern, numbers = kinds(model), [number for part in ranges for number in part]
        shapes = {kind: block_shapes(model, tp, kind) for kind in set(pattern)}
        blocks = [self._unit(f"layers.{number}", shapes[pattern[number]], layout) for number in numbers]
        root = self._unit("", root_shapes(model, tp, first, last), layout, first, last)
        units = [*blocks, root] if root.values else blocks
        names = {f.name for f in dataclasses.fields(Unit)} - {"vectors", "largest_shard"}
        sums: dict[str, Any] = {name: sum(getattr(unit, name) for unit in units) for name in names}
        vectors = tuple(size for unit in units for size in unit.vectors)
        total = Unit(**sums, vectors=vectors, largest_shard=max(unit.largest_shard for unit in units))
        held = "".join(pattern[number] for number in numbers)
        return Stage(index, first, last, held, tuple(blocks), total, root, len(units))

    def _unit(self, name: str, shapes: Mapping[str, Shape], layout: Layout, *which: bool) -> Unit:
        key = (name, layout.replicate, layout.fsdp, layout.tp, *which)
        if key not in self._units:
            self._units[key] = Unit.of(name, shapes, self.job.wire, layout)
        return self._units[key]
