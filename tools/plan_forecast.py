"""Forecast: what a run takes, as plain values: size, work by precision, memory, bytes, time, checkpoints, layers.

Everything is arithmetic on the run's configuration and on the published values of a device; nothing is run, and nothing
here is a measurement. docs/planner.md explains every key and every assumption.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lowprec.config import Run
from lowprec.linear import Plan
from lowprec.linear.backends import choose
from lowprec.linear.call import padded_sizes
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.model import count_parameters
from lowprec.parallel import Recompute
from lowprec.parallel.account import Account, account
from lowprec.parallel.devices import Hardware
from lowprec.parallel.estimate import estimate
from lowprec.parallel.ideal import Product, flops_by_precision, ideal_s, products
from lowprec.parallel.layout import Job, Layout
from lowprec.train.session import DTYPES

DAY_S = 86400.0
Forecast = dict[str, Any]


@dataclass(frozen=True)
class Wishes:
    """What is planned for.

    storage_bytes_per_s: what all devices together write to the file system.
    """

    devices: int
    hardware: Hardware
    storage_bytes_per_s: float


def forecast(run: Run, plan: Plan, job: Job, layout: Layout, wishes: Wishes) -> Forecast:
    """All there is to say of one run on one layout. Raises ValueError where it cannot be laid out like this."""
    starts = [0.0, *dict.fromkeys(change.start for change in plan.precision.schedule if change.start > 0)]
    work = {start: products(plan, run.model, run.data.seq_len, start) for start in starts}
    found = _size(run, plan, wishes) | _work(run, work, wishes)
    found |= _memory(job, layout, wishes.hardware) | _time(run, job, layout, work, wishes)
    return found | _checkpoint(run, job, wishes)


def _tokens(run: Run) -> int:
    return run.train.global_batch * run.data.seq_len


def _size(run: Run, plan: Plan, wishes: Wishes) -> Forecast:
    parts, recipes = count_parameters(run.model), plan.precision.at(0.0)
    blocks = [entry for entry in plan.entries if "." in entry.layer]
    return {
        "name": run.name,
        "device": wishes.hardware.name,
        "devices": wishes.devices,
        "parameters": parts["total"],
        "parameters_by_part": {name: size for name, size in parts.items() if name != "total"},
        "linears": len(plan.entries),
        "block_linears": len(blocks),
        "high_precision_linears": sum(not recipes[entry.recipe].quantized for entry in blocks),
        "steps": run.train.steps,
        "tokens_per_step": _tokens(run),
        "tokens": run.train.steps * _tokens(run),
    }


def _work(run: Run, work: dict[float, list[Product]], wishes: Wishes) -> Forecast:
    """FLOPs of a step, of the whole run, and by kind of product."""
    tokens, hardware = _tokens(run), wishes.hardware
    groups: dict[tuple[str, ...], list[Product]] = {}
    for product in work[0.0]:
        groups.setdefault((product.role, product.recipe, product.operands), []).append(product)
    total = dict.fromkeys(hardware.flops, 0.0)
    for start, share in spans(list(work)).items():
        for name, flops in flops_by_precision(work[start], hardware).items():
            total[name] += flops * tokens * run.train.steps * share
    by_precision = {name: flops * tokens for name, flops in flops_by_precision(work[0.0], hardware).items()}
    return {
        "flops_per_token": sum(product.flops for product in work[0.0]),
        "flops_by_precision": by_precision,
        "flops_by_precision_of_run": {name: flops for name, flops in total.items() if flops},
        "products": [
            {
                "role": group[0].role,
                "recipe": group[0].recipe,
                "operands": group[0].operands,
                "precision": group[0].precision,
                "runs_as": group[0].runs_as(hardware),
                "why": group[0].why(hardware),
                "layers": len(group),
                "flops": tokens * sum(product.flops for product in group),
            }
            for group in groups.values()
        ],
    }


def spans(starts: list[float]) -> dict[float, float]:
    """{start: share of the training until the next one}."""
    ordered = sorted(starts)
    return {start: end - start for start, end in zip(ordered, [*ordered[1:], 1.0])}


def _memory(job: Job, layout: Layout, hardware: Hardware) -> Forecast:
    found = account(job, layout)
    stage, choices = found.fullest, [how for how in Recompute if not (job.kept and how is Recompute.full)]
    wire = [s.wire_bytes for s in found.stages]
    return {
        "layout": asdict(layout) | {"recompute": layout.recompute.value},
        "layout_in_words": str(layout),
        "micro_batches": job.micros(layout),
        "memory_bytes": {name: part for name, part in stage.memory.items() if part},
        "memory_moment": stage.moment,
        "memory_total_bytes": stage.memory_bytes,
        "memory_by_recompute": {
            how.value: account(job, replace(layout, recompute=how)).fullest.memory_bytes for how in choices
        },
        "device_memory_bytes": hardware.memory_bytes,
        "fits": stage.memory_bytes <= hardware.usable_bytes,
        "wire_bytes_per_step": max(wire, key=lambda sent: sum(sent.values())),
        "stages": [{"memory_bytes": s.memory, "wire_bytes_per_step": s.wire_bytes} for s in found.stages],
        "bubble": found.bubble,
    }


def _time(run: Run, job: Job, layout: Layout, work: dict[float, list[Product]], wishes: Wishes) -> Forecast:
    """At the published peak, and estimated with the assumed shares of it; means over the schedule's phases."""
    steps, phases = run.train.steps, []
    made = account(job, layout)
    for start, share in spans(list(work)).items():
        phases.append({"from": start, "share": share} | _phase(made, work[start], _tokens(run), wishes))
    ideal, step = (sum(phase["share"] * phase[key] for phase in phases) for key in ("ideal_step_s", "step_s"))
    first = ("ideal_step_s", "ideal_step_s_by_precision", "step_s", "step_s_by_part")
    return {key: phases[0][key] for key in first} | {
        "phases": phases,
        "ideal_days": steps * ideal / DAY_S,
        "days": steps * step / DAY_S,
        "tokens_per_s": _tokens(run) / step,
        "utilisation": ideal / step,
        "mfu": sum(phase["share"] * phase["mfu"] * phase["step_s"] for phase in phases) / step,
    }


def _phase(made: Account, work: list[Product], tokens: int, wishes: Wishes) -> Forecast:
    """A step with these products. The estimate counts on a device whose peak is that of their mixture."""
    hardware, flops = wishes.hardware, flops_by_precision(work, wishes.hardware)
    ideal = ideal_s(flops, tokens, hardware, wishes.devices)
    each = sum(flops.values()) * tokens / wishes.devices
    mixed = replace(hardware, flops={"mixed": each / sum(ideal.values())}, precision="mixed")
    times = estimate(made, mixed)
    return {
        "ideal_step_s": sum(ideal.values()),
        "ideal_step_s_by_precision": ideal,
        "step_s": times.step,
        "step_s_by_part": asdict(times),
        "mfu": each / hardware.flops["bf16"] / times.step,
    }


def _checkpoint(run: Run, job: Job, wishes: Wishes) -> Forecast:
    """fp32 masters and the optimizer's moments of every parameter, a tied embedding under both its names; what recipes
    remember beside them is small."""
    size = count_parameters(run.model)["total"] * (4 + job.optimizer_bytes)
    size += 4 * run.model.vocab_size * run.model.dim * run.model.tie_embeddings
    return {
        "checkpoint_bytes": size,
        "checkpoint_s": size / wishes.storage_bytes_per_s,
        "storage_bytes_per_s": wishes.storage_bytes_per_s,
        "checkpoint_every": run.train.checkpoint_every,
    }


def layers(run: Run, plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    """The rule table: recipe, rule, and for each product who computes it on such a device and why nobody before."""
    dtype, tokens, found = DTYPES[run.train.dtype], run.train.micro_batch * run.data.seq_len, []
    recipes = plan.precision.at(0.0)
    for entry in plan.entries:
        out, inp = entry.out_features, entry.in_features
        roles = {"fprop": (tokens, out, inp), "dgrad": (tokens, inp, out), "wgrad": (out, inp, tokens)}
        backends: dict[str, str] = {}
        refusals: dict[str, list[str]] = {}
        for role in GEMM_OPERANDS:
            gemm = getattr(recipes[entry.recipe], role)
            sizes = padded_sizes(gemm, *roles[role], plan.precision.pad)
            chosen, why = choose(plan.precision.backend, gemm, role, *sizes, dtype, device)
            backends[role] = chosen.name
            if why and chosen.name != "native":
                refusals[role] = list(why)
        found.append({"layer": entry.layer, "out_features": out, "in_features": inp, "recipe": entry.recipe,
                      "rule": entry.rule.match, "backends": backends, "refused": refusals})  # fmt: skip
    return found
