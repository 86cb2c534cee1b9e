"""A pipeline gives the numbers of one process: losses, gradient norms, weights, memories, logits, the next token.

Every micro-batch meets the same products on the same tensors and gradients are added in the same order, so equality is
to the bit. Where data-parallel ranks sum gradients too, it is equality to those ranks without a pipeline.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from lowprec.comm import CommConfig
from lowprec.data import Batch
from lowprec.linear import Plan, load_precision
from lowprec.linear.deoscillation import Deoscillation
from lowprec.linear.precision import Precision, Rule
from lowprec.model import ModelConfig, build, cross_entropy
from lowprec.optim import OptimConfig, build_optimizer
from lowprec.parallel import Engine, ParallelConfig, Recompute, World, parallelize, start_world
from lowprec.parallel.pipeline import Pipeline, check_micros, check_stages, deal
from lowprec.train.oscillation import Oscillation
from tests.ranks import run

pytestmark = pytest.mark.distributed

# five blocks: no number of stages here divides them
MODEL = ModelConfig(vocab_size=64, dim=64, layers=5, heads=2, kv_heads=2, ffn_dim=96, max_seq_len=64)
MICROS, SEQUENCES, TOKENS, STEPS = 4, 2, 64, 3
Job = tuple[ParallelConfig, str]

STOCHASTIC = {"format": "nvfp4", "rounding": "stochastic"}
NOISY = {  # random bits in the forward pass: what is computed again must draw them again
    "linear": {"noisy": {"fprop": {"x": STOCHASTIC, "w": "nvfp4"}, "dgrad": {"dy": STOCHASTIC, "w": "nvfp4"}}},
    "rules": [{"match": "*", "recipe": "noisy"}],
}


def job(recipe: str, **layout: Any) -> Job:
    return ParallelConfig(**{"shard": 1, "timeout_s": 30, **layout}), recipe


# {the layout's name: (ranks, the layout's job, ranks of what it must equal, that one's job)}
CASES: dict[str, tuple[int, Job, int, Job]] = {
    "1F1B": (2, job("bf16", pp=2), 1, job("bf16")),
    "1F1B, stochastic rounding": (2, job("nvfp4", pp=2), 1, job("nvfp4")),
    "1F1B, memory": (2, job("fp8_delayed", pp=2), 1, job("fp8_delayed")),
    "interleaved": (2, job("mxfp8", pp=2, virtual_stages=2), 1, job("mxfp8")),
    "interleaved, memory": (2, job("fp8_delayed", pp=2, virtual_stages=2), 1, job("fp8_delayed")),
    "interleaved, recomputed": (
        *(2, job("noisy", pp=2, virtual_stages=2, recompute=Recompute.full)),
        *(1, job("noisy")),
    ),
    "four stages, of which one has nothing to deoscillate": (4, job("nvfp4_deosc", pp=4), 1, job("nvfp4_deosc")),
    "sharded": (4, job("nvfp4", pp=2, shard=2), 2, job("nvfp4", shard=2)),
    "interleaved and sharded": (4, job("nvfp4", pp=2, shard=2, virtual_stages=2), 2, job("nvfp4", shard=2)),
    "tensor parallel": (4, job("bf16", pp=2, tp=2), 2, job("bf16", tp=2)),
    "context parallel": (4, job("bf16", pp=2, cp=2), 2, job("bf16", cp=2)),
}


def batch(step: int, micro: int) -> Batch:
    """Two documents a row, the border somewhere else in every batch."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(MODEL.vocab_size, (SEQUENCES, TOKENS + 1), generator=generator)
    documents = (torch.arange(TOKENS) >= 5 + 3 * micro).long().expand(SEQUENCES, TOKENS)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents.contiguous())


def precision_of(recipe: str) -> Precision:
    """All linear layers in one recipe; with deoscillation, over the whole run, the last block and the head in bf16."""
    precision = load_precision(NOISY if recipe == "noisy" else recipe)
    rules = (Rule("*", precision.rules[-1].recipe),)
    if precision.deoscillation is None:
        return replace(precision, rules=rules)
    window = Deoscillation(ratio=1.5, start=0, every=STEPS, window=STEPS)
    return replace(precision, deoscillation=window, rules=(Rule("layers.4.*", "bf16"), Rule("lm_head", "bf16"), *rules))


def engine_of(config: ParallelConfig, recipe: str) -> tuple[Engine, World, Plan]:
    world = start_world(config)
    with torch.device("meta"):
        model = build(MODEL)
    plan = Plan.of(model, precision_of(recipe), seed=5)
    plan.apply(model)
    make = partial(build_optimizer, config=OptimConfig(lr=1e-2))
    engine = parallelize(model, plan, world, config, CommConfig(), torch.bfloat16, make)
    engine.init_weights(7)
    return engine, world, plan


def train(config: ParallelConfig, recipe: str) -> dict[str, Any]:
    """STEPS steps as the training loop takes them, an evaluation after each; then all there is to see."""
    engine, world, plan = engine_of(config, recipe)
    oscillation = Oscillation(plan, STEPS, torch.bfloat16, world.stage)
    rank, size = world.data
    mine = range(rank * MICROS // size, (rank + 1) * MICROS // size)
    seen: dict[str, Any] = {"losses": [], "norms": [], "reset": [], "logits": []}
    for step in range(STEPS):
        plan.clock.step = step
        losses_M = torch.zeros(MICROS)

        def loss(micro: int, logits: torch.Tensor, targets: torch.Tensor, losses_M: torch.Tensor = losses_M) -> Any:
            loss_sum, z_sum = cross_entropy(logits, targets, 1e-3, engine.vocab)
            losses_M[micro] += loss_sum.detach() * world.counts_loss
            return (loss_sum + z_sum) / (MICROS * SEQUENCES * TOKENS)

        engine.wire_bytes()
        reduced.clear()
        engine.backward([(micro, batch(step, micro)) for micro in mine], loss)
        seen["reduced"], seen["bytes"] = list(reduced), engine.wire_bytes().get("pipeline_send", 0)
        dist.all_reduce(losses_M)
        seen["losses"].append(losses_M.tolist())
        seen["norms"].append(engine.clip(0.5).item())
        oscillation.before_update(step)
        engine.update(1e-2)
        plan.end_step(step, None, world.stage)
        seen["reset"].append(oscillation.after_update(step))
        plan.clock.micro = 0
        logits = engine.logits(batch(9, 0))
        seen["logits"].append(None if logits is None else logits.float().numpy())
    seen["next"] = engine.next_logits([3, 1, 4, 1, 5]).numpy()
    seen["weights"] = {name: whole(tensor) for name, tensor in engine.state_dict()["model"].items()}
    seen["memories"] = {name: whole(tensor) for name, tensor in plan.state_dict().items()}
    if isinstance(engine, Pipeline):
        seen["buffers"] = sum(buffers(runner) for runner in engine._runners)
    return seen


reduced: list[int] = []  # the number of parameters of every reduction of gradients over ranks


def counted(params: list[Any], *args: Any) -> Any:
    reduced.append(len(params))
    return foreach_reduce(params, *args)


foreach_reduce = _fsdp_param_group.foreach_reduce


def whole(x: torch.Tensor) -> Any:
    return (x.full_tensor() if isinstance(x, DTensor) else x).numpy().copy()


def buffers(runner: Any) -> int:
    infos = [info for held in (runner.args_recv_info, runner.grad_recv_info) for row in held.values() for info in row]
    return sum(info.buffer is not None for info in infos)


def trains(jobs: list[Job]) -> list[dict[str, Any]]:
    _fsdp_param_group.foreach_reduce = counted  # in this process, which tests forked
    return [train(*job) for job in jobs]


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, str], list[dict[str, Any]]]:
    """{(ranks, repr of the job): what every rank saw}."""
    found = {}
    for ranks in (1, 2, 4):
        jobs = {repr(j): j for case in CASES.values() for n, j in (case[:2], case[2:]) if n == ranks}
        seen = run(ranks, trains, list(jobs.values()), timeout_s=150)
        found |= {(ranks, key): [of_rank[i] for of_rank in seen] for i, key in enumerate(jobs)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_fewer_processes(results, name: str) -> None:
    """Bit by bit. What a rank does not have (weights, memories, logits of other stages) others have."""
    ranks, job, fewer, other = CASES[name]
    got, wanted = results[ranks, repr(job)], results[fewer, repr(other)]
    for rank, seen in enumerate(got):
        expected = wanted[rank % fewer]  # pp is the outermost axis
        for what in ("losses", "norms", "reset"):
            assert seen[what] == expected[what]
        for what in ("weights", "memories"):
            assert all(np.array_equal(x, expected[what][key]) for key, x in seen[what].items())
        assert np.array_equal(seen["next"], expected["next"])
        if rank >= ranks - fewer:
            assert all(map(np.array_equal, seen["logits"], expected["logits"]))
        else:
            assert seen["logits"] == [None] * STEPS
    for what in ("weights", "memories"):
        assert sorted({key for seen in got for key in seen[what]}) == sorted(wanted[0][what])
        assert sum(len(seen[what]) for seen in got) == fewer * len(wanted[0][what]), "nothing is held twice"


def test_there_is_something_to_compare(results) -> None:
    """Losses change, memories are remembered, weights are put to rest."""
    (plain,), (delayed,), (resting,) = (results[1, repr(job(name))] for name in ("bf16", "fp8_delayed", "nvfp4_deosc"))
    assert len({tuple(losses) for losses in plain["losses"]}) == STEPS
    assert all(np.any(memory > 0) for memory in delayed["memories"].values()) and delayed["memories"]
    assert resting["reset"][-1]["osc_ratio"] > 0


def test_the_sum_over_ranks_comes_once_a_step(results) -> None:
    """Every parameter of a rank is in exactly one reduction: not one for every micro-batch."""
    for ranks, job, _, _ in CASES.values():
        for seen in results[ranks, repr(job)]:
            assert sum(seen["reduced"]) == len(seen["weights"])


def test_a_rank_receives_what_it_must_and_keeps_no_buffers(results) -> None:
    """A hidden state for every stage but the first and micro-batch, and a gradient for every stage but the last."""
    for ranks, (config, recipe), _, _ in CASES.values():
        hidden_bytes = SEQUENCES * TOKENS * MODEL.dim * 2 // (config.tp * config.cp)
        for rank, seen in enumerate(results[ranks, repr((config, recipe))]):
            place = rank // (ranks // config.pp)
            received = 2 * config.virtual_stages - (place == 0) - (place == config.pp - 1)
            assert seen["bytes"] == received * MICROS // config.shard * hidden_bytes
            assert seen["buffers"] == 0


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (5, 4, [1, 2, 1, 1]), (6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1]), (3, 3, [1] * 3)],
)
def test_blocks_are_dealt_out_evenly(layers: int, stages: int, counts: list[int]) -> None:
    """All of them, in order; stages with the head or the embedding get one less before others do."""
    blocks = deal(layers, stages)
    assert [len(part) for part in blocks] == counts
    assert [i for part in blocks for i in part] == list(range(layers))


@pytest.mark.parametrize(
    ("model", "pp", "virtual", "said"),
    [
        (MODEL, 1, 2, "parallel.virtual_stages=2 gives every rank of a pipeline that many stages, but there is no"),
        (MODEL, 2, 0, "parallel.virtual_stages=0"),
        (MODEL, 4, 2, "model.layers=5 are fewer than the 8 pipeline stages (parallel.pp=4 x"),
        (replace(MODEL, tie_embeddings=True), 2, 1, "set model.tie_embeddings=false, or parallel.pp=1"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(model: ModelConfig, pp: int, virtual: int, said: str) -> None:
    """By name, with the numbers and what to change."""
    with pytest.raises(ValueError) as error:
        check_stages(model, pp, virtual)
    assert said in str(error.value)


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2])
def test_batches_are_refused_where_torch_refuses_them(pp: int, virtual: int) -> None:
    """And the batch that the sentence names is the next larger one that torch takes."""

    def torch_takes(micros: int) -> bool:
        stage = SimpleNamespace(num_stages=pp * virtual, group_size=pp, group_rank=0, stage_index=0)
        make: Any = Schedule1F1B if virtual == 1 else ScheduleInterleaved1F1B
        try:
            make(stage if virtual == 1 else [stage] * virtual, micros)
        except ValueError:
            return False
        return micros >= pp  # interleaved, torch also takes fewer: most ranks would wait all the time

    for micros in range(1, 3 * pp + 2):
        if torch_takes(micros):
            check_micros(pp, virtual, micros, 2, 4)
        else:
            fit = next(count for count in range(micros, 99) if torch_takes(count))
            with pytest.raises(ValueError, match=rf"train.global_batch={fit * 2 * 4}$"):
                check_micros(pp, virtual, micros, 2, 4)
