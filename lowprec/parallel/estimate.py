"""Estimate: how long a step of a layout would take, from its account and the speeds of the hardware.

For each stage of a pipeline, of which the slowest counts (arXiv:2104.04473, arXiv:2312.12705):

    compute    FLOPs of its blocks (and head, and what is recomputed) / (peak x the share of it that products reach)
    serial     tensor- and context-parallel collectives and sends: a product waits for them
    bubble     (compute + serial) (p - 1) / (m v)
    weights    gathers hide behind compute, except those of the root and the first block
    gradients  sums hide behind the last backward pass, except the last block's and the root's; in a pipeline none hides
    update     reading and writing fp32 masters, gradients and moments

A collective of b logical bytes over n ranks takes (n - 1) / n b / speed, and a latency for each call. Inside a node
the speed is that of a device's links. A group that spans nodes is a ring through all of them, in which its k ranks of a
node drive k network cards: the speed is that of k cards, or of the inner links if those are slower.

Speeds are data-sheet values or the user's, shares of them are assumptions, and nothing here was measured: the estimate
puts layouts into an order, and its errors are those of its inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.model import flops_per_token
from lowprec.parallel.account import Account, StageAccount, Transfer
from lowprec.parallel.config import Recompute


@dataclass(frozen=True)
class Hardware:
    """One device, its links (one direction each) and its node."""

    name: str
    memory_bytes: float
    flops: Mapping[str, float]  # dense peak FLOP/s by precision
    memory_bytes_per_s: float
    inside_bytes_per_s: float  # to the other devices of its node
    between_bytes_per_s: float  # its share of the node's network
    per_node: int = 8
    precision: str = "bf16"  # which of `flops` counts
    compute_share: float = 0.4  # of the peak, assumed
    link_share: float = 0.8  # of the links' speed, assumed
    latency_s: float = 1e-5  # of a collective, assumed
    reserve: float = 0.1  # of the memory: fragments, buffers of the network library, workspaces; assumed

    @property
    def flops_per_s(self) -> float:
        """What products reach. Raises ValueError for a precision that the device does not list."""
        if self.precision not in self.flops:
            raise ValueError(f"{self.name} lists no FLOP/s in {self.precision}: choose one of {', '.join(self.flops)}")
        return self.flops[self.precision] * self.compute_share

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * (1 - self.reserve)

    def neighbours(self, ranks: int, stride: int, world: int) -> int:
        """How many of a group of ranks so far apart share a node; 1 where nodes cut groups unevenly."""
        span, node = ranks * stride, self.per_node
        if world <= node or node % span == 0:
            return ranks
        return node // stride if span % node == 0 and node % stride == 0 else 1

    def crosses(self, ranks: int, stride: int, world: int) -> bool:
        """Whether such a group spans nodes."""
        return self.neighbours(ranks, stride, world) < ranks

    def seconds(self, transfer: Transfer, world: int) -> float:
        """How long the collectives of a kind take in a step."""
        near, inside = self.neighbours(transfer.ranks, transfer.stride, world), self.inside_bytes_per_s
        speed = inside if near == transfer.ranks else min(inside, near * self.between_bytes_per_s)
        share = 1.0 if transfer.name == "pipeline_send" else (transfer.ranks - 1) / transfer.ranks
        return share * transfer.bytes / (speed * self.link_share) + transfer.calls * self.latency_s


HARDWARE = {
    # 80 GB HBM3, 3.35 TB/s; NVLink 4 900 GB/s both ways; a 400 Gb/s card a device (DGX)
    "h100_sxm": Hardware("h100_sxm", 80e9, {"bf16": 989e12, "fp8": 1979e12}, 3.35e12, 450e9, 50e9),
    # 180 GB HBM3e, 8 TB/s; NVLink 5 1.8 TB/s both ways; a 400 Gb/s card a device (HGX, DGX)
    "b200": Hardware("b200", 180e9, {"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9e15}, 8e12, 900e9, 50e9),
    # 186 GB HBM3e; 72 devices are one NVLink domain, here a node; a 400 Gb/s card a device
    "gb200_nvl72": Hardware("gb200_nvl72", 186e9, {"bf16": 2.5e15, "fp8": 5e15, "fp4": 1e16}, 8e12, 900e9, 50e9, 72),
    # of no data sheet: round numbers, which only put layouts into an order; memory is the machine's where it is known
    "cpu": Hardware("cpu", 8e9, {"bf16": 4e11, "fp32": 2e11}, 3e10, 3e9, 1e9, reserve=0.2),
}
"""Values of public data sheets (dense products, without sparsity), never measurements."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step that nothing hides, by what they are spent on."""

    compute: float
    serial: float  # collectives and sends that a product waits for
    bubble: float
    weights: float
    gradients: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.serial + self.bubble + self.weights + self.gradients + self.update


def estimate(found: Account, hardware: Hardware) -> Times:
    """Times of the slowest stage."""
    return max((_stage_times(found, stage, hardware) for stage in found.stages), key=lambda times: times.step)


def _stage_times(found: Account, stage: StageAccount, hardware: Hardware) -> Times:
    job, layout, micros = found.job, found.layout, found.job.micros(found.layout)
    spent = {"weight": 0.0, "amax": 0.0, "gradient": 0.0, "serial": 0.0}
    gathers = 2
    for transfer in stage.transfers:
        kind = transfer.name.split("_")[0]
        spent[kind if kind in spent else "serial"] += hardware.seconds(transfer, layout.ranks)
        gathers += transfer.calls * (kind == "weight")
    compute = stage_flops(found, stage) / hardware.flops_per_s
    busy = compute + spent["serial"]
    hidden = 0.0 if layout.pp > 1 else 2 / 3 * busy / micros
    return Times(
        compute,
        spent["serial"],
        busy * (layout.pp - 1) / (micros * layout.virtual_stages),
        spent["amax"] + max(spent["weight"] - busy, spent["weight"] * 2 / gathers),
        max(spent["gradient"] - hidden, spent["gradient"] * 2 / (2 + job.model.layers / layout.pp)),
        stage.memory["parameters"] / 4 * (12 + 2 * job.optimizer_bytes) / hardware.memory_bytes_per_s,
    )


def stage_flops(found: Account, stage: StageAccount) -> float:
    """FLOPs of a step on one rank of a stage, with what is computed again."""
    job, layout = found.job, found.layout
    flops = flops_per_token(job.model, job.seq_len)
    core = flops["attention_qk"] + flops["attention_pv"]
    blocks = (flops["total"] - flops["lm_head"]) / layout.pp
    again = {Recompute.none: 0.0, Recompute.selective: core / layout.pp / 3, Recompute.full: blocks / 3}
    head = flops["lm_head"] if stage.stage == layout.pp - 1 else 0.0
    tokens = job.tokens(layout) * job.micros(layout)
    return tokens * (blocks + again[layout.recompute] + head) / layout.tp
