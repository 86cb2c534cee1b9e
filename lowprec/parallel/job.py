"""Job, from a run's parts: what accounts and proposals need to know of model, plan, optimizer and wire.

job = job_of(model, plan, comm, optim, micro_batch=8, seq_len=1024, global_batch=512)
proposal = propose(job, 64, HARDWARE["h100_sxm"], refuse=uncuttable(plan, 1024))
"""

from collections.abc import Callable
from typing import Any

import torch

from lowprec.comm import CommConfig
from lowprec.linear import Plan
from lowprec.linear.product import kept_bytes_per_token
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.model import ModelConfig
from lowprec.optim import OptimConfig, build_optimizer
from lowprec.parallel.layout import Job, Layout
from lowprec.parallel.tensor import ROW
from lowprec.parallel.wire import Wire

PLACES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "mlp", "up_proj": "mlp",
          "down_proj": "down", "in_proj": "in", "out_proj": "out"}  # fmt: skip
"""Which input of a block a linear layer keeps."""


def job_of(
    model: ModelConfig,
    plan: Plan,
    comm: CommConfig,
    optim: OptimConfig,
    *,
    micro_batch: int,
    seq_len: int,
    global_batch: int,
    dtype: torch.dtype = torch.bfloat16,
    documents: bool = True,
    cpu: bool = False,
    ranks_per_node: int = 1,
) -> Job:
    """What is trained. dtype: of activations. documents: attention stays inside them. cpu: its kernels are used."""
    return Job(
        model,
        micro_batch,
        seq_len,
        global_batch,
        value_bytes=dtype.itemsize,
        optimizer_bytes=optimizer_bytes(optim),
        operand_bytes=operand_bytes(plan, cpu),
        kept=kept_inputs(plan, model, dtype) if plan.policy.save == "codes" else {},
        documents=documents,
        cpu=cpu,
        wire=Wire.of(comm, plan, dtype, ranks_per_node),
    )


def optimizer_bytes(optim: OptimConfig) -> float:
    """Bytes of state that an optimizer keeps for a value of a matrix; found by giving it one step on a small one."""
    layer = torch.nn.Linear(128, 128, bias=False, device="cpu")
    optimizer = build_optimizer(layer, optim)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    state = [t for t in optimizer.state[layer.weight].values() if isinstance(t, torch.Tensor) and t.ndim]
    return sum(t.numel() * t.element_size() for t in state) / layer.weight.numel()


def operand_bytes(plan: Plan, cpu: bool) -> float:
    """Bytes of a value of the widest quantised operand: its code and share of a scale; a CPU's products take whole
    bytes and fp32 scales of 16. 0 if nothing is quantised."""
    used = [plan.precision.linear[name] for name in {entry.recipe for entry in plan.entries}]
    operands = [
        side for recipe in used for role in GEMM_OPERANDS for side in (getattr(recipe, role).a, getattr(recipe, role).b)
    ]
    bits = [side.format.bits for side in operands if side.format is not None]
    return (1.25 if cpu else max(bits) / 8 + 1 / 16) if bits else 0.0


def kept_inputs(plan: Plan, model: ModelConfig, dtype: torch.dtype) -> dict[str, float]:
    """`Job.kept` of a plan with `save: codes`: each layer keeps codes of its own; an input is kept once for all."""
    known: dict[Any, float] = {}
    total, inputs = dict.fromkeys(PLACES.values(), 0.0), set()
    having: dict[str, set[str]] = {place: set() for place in total}
    for entry in plan.entries:
        block, _, name = entry.layer.rpartition(".")
        if name not in PLACES:
            continue
        having[PLACES[name]].add(block)
        key, whole = (entry.recipe, entry.out_features, entry.in_features), entry.in_features * dtype.itemsize
        if key not in known:
            recipe = plan.precision.linear[entry.recipe]
            known[key] = kept_bytes_per_token(recipe, entry.out_features, entry.in_features, dtype, plan.policy)
        if known[key] < whole:
            total[PLACES[name]] += known[key]
        elif (block, PLACES[name]) not in inputs:
            inputs.add((block, PLACES[name]))
            total[PLACES[name]] += whole
    return {place: value / len(having[place]) for place, value in total.items() if having[place]}


def uncuttable(plan: Plan, seq_len: int) -> Callable[[Layout], str | None]:
    """Why the recipes of `plan` (applied) cannot be cut as a layout wants: what `propose` takes as `refuse`."""
    known: dict[tuple[int, int], str | None] = {}

    def refuse(layout: Layout) -> str | None:
        key = (layout.tp, layout.cp)
        if key not in known:
            known[key] = None if key == (1, 1) else _refusal(plan, seq_len, layout)
        return known[key]

    return refuse


def _refusal(plan: Plan, seq_len: int, layout: Layout) -> str | None:
    if layout.cp > 1 and any(core.recipe for core in plan.cores.values()):
        return "quantised attention is computed over whole sequences only"
    cuts = {}
    for entry in plan.entries:
        axis = "in" if entry.layer.rpartition(".")[2] in ROW else "out"
        cuts[entry.layer] = {axis: layout.tp, "tokens": layout.cp}
    try:
        plan.refuse_cuts(cuts, seq_len // (2 * layout.cp) if layout.cp > 1 else None)
    except ValueError as error:
        return str(error)
    return None
