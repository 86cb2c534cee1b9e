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

from dataclasses import dataclass

from lowprec.model import flops_per_token
from lowprec.parallel.account import Account, StageAccount
from lowprec.parallel.config import Recompute
from lowprec.parallel.devices import HARDWARE, Hardware

__all__ = ["HARDWARE", "Hardware", "Times", "estimate", "stage_flops"]


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
