"""DeepSpeed's ZeRO does what FSDP2 does, to the bit where sums have one order, and reads and writes its checkpoints."""

import json
import random
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor

from lowprec.comm import CommConfig
from lowprec.data import Batch
from lowprec.launch.train import main
from lowprec.linear import Plan, QuantizedLinear, load_precision
from lowprec.linear.precision import Rule
from lowprec.model import ModelConfig, build, cross_entropy
from lowprec.optim import OptimConfig, build_optimizer
from lowprec.parallel import Engine, EngineKind, ParallelConfig, Recompute, parallelize, start_world, zero_settings
from lowprec.parallel.zero import compute_in
from tests.ranks import run

pytestmark = pytest.mark.distributed

MODEL = ModelConfig(
    vocab_size=67, dim=64, layers=2, heads=2, kv_heads=2, ffn_dim=128, max_seq_len=64, qk_norm=True, tie_embeddings=True
)
TOKENS, STEPS, LINEAR = 32, 3, F.linear
FSDP: dict[str, Any] = {}
ZERO: list[dict[str, Any]] = [{"engine": EngineKind.deepspeed, "zero_stage": stage} for stage in (1, 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, before processes are forked."""
    deepspeed = zero_settings.load(torch.device("cpu"))
    assert deepspeed.__version__.startswith("0.19.")
    import_module("deepspeed.runtime.zero.stage3")
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # which imports torch's compiler: seconds


def make(layout: dict[str, Any], recipe: str = "bf16", optim: OptimConfig | None = None) -> Engine:
    """The model on this process's world."""
    config = ParallelConfig(timeout_s=30, **layout)
    world = start_world(config)
    with torch.device("meta"):
        model = build(MODEL)
    precision = load_precision(recipe)
    rules = (Rule("lm_head", "bf16"), Rule("*", precision.rules[-1].recipe))
    plan = Plan.of(model, replace(precision, rules=rules), seed=0)
    plan.apply(model)
    optimizer = partial(build_optimizer, config=optim or OptimConfig(lr=1e-2))
    return parallelize(model, plan, world, config, CommConfig(), torch.bfloat16, optimizer)


def batch(seed: int) -> Batch:
    ids = torch.randint(MODEL.vocab_size, (2, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None)


def step(engine: Engine, number: int, micros: int) -> tuple[float, float]:
    """A step as the loop takes it: (loss, gradient norm before it is clipped, which it is)."""
    total, (rank, size) = torch.zeros(()), engine.world.data

    def loss(micro: int, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss_sum, _ = cross_entropy(logits, targets)
        total.add_(loss_sum.detach())
        return loss_sum / (2 * TOKENS * micros)

    engine.clock.step = number
    engine.backward([(m, batch(100 * number + m)) for m in range(rank, micros, size)], loss)
    dist.all_reduce(total)
    norm = engine.clip(0.5).item()
    engine.update(1e-2)
    return total.item() / (2 * TOKENS * micros), norm


def skip(engine: Engine, factor: float) -> None:
    """A step that the guard does not let through."""
    engine.backward(
        [(0, batch(7)), (1, batch(8))], lambda micro, logits, targets: factor * logits.float().square().sum()
    )
    engine.clip(1.0)
    engine.drop_gradients()


def trained(layouts: list[dict[str, Any]], recipe: str, micros: int) -> list[Any]:
    """[losses, norms, logits of an evaluation, the next token's logits] of each layout, one after the other."""
    found = []
    for layout in layouts:
        engine = make(layout, recipe)
        engine.init_weights(0)
        steps = [step(engine, 0, micros)]
        if layout:
            skip(engine, 1.0)
            skip(engine, float("nan"))
            engine.drop_gradients()  # there are none
        engine.clock.step = 1
        engine.clock.micro = 0
        logits = engine.logits(batch(9))
        assert logits is not None
        steps += [step(engine, number, micros) for number in range(1, STEPS)]
        found.append(
            [*map(list, zip(*steps, strict=True)), logits.float().tolist(), engine.next_logits([3, 1]).tolist()]
        )
    return found


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_three_stages_equal_fsdp_and_one_process(recipe: str) -> None:
    """Every bit of losses, norms and logits; steps that were dropped leave no trace."""
    [one] = run(1, trained, [FSDP], recipe, 2)[0]
    two = run(2, trained, [FSDP, *ZERO], recipe, 2)
    for rank in two:
        for name, found in zip(["fsdp", "zero1", "zero2", "zero3"], rank, strict=True):
            assert found == one, name
    assert max(one[1]) > 0.5, "clipping is part of it"


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_copies_of_weights_are_not_kept(recipe: str) -> None:
    """The backward pass makes them again: if the weight has changed by then, it uses the changed one."""
    layer = QuantizedLinear(64, 32, bias=False, recipe=recipe)
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    compute_in(layer, torch.bfloat16)
    gradients = []
    for factor in (1.0, 2.0):
        y = layer(x)
        with torch.no_grad():
            layer.weight.mul_(factor)
        [gradient] = torch.autograd.grad(y, x, torch.ones_like(y))
        gradients.append(gradient)
    assert torch.equal(gradients[1], 2 * gradients[0])
    assert layer.weight.dtype == torch.float32


def test_micro_batches_are_accumulated() -> None:
    """Two on each rank, at stage 3 with everything computed again: the order of fp32 sums is another, nothing else."""
    layouts = [FSDP, *ZERO[:2], {**ZERO[2], "recompute": Recompute.full}]
    fsdp, *others = run(2, trained, layouts, "bf16", 4)[0]
    for found in others:
        assert found[0] == pytest.approx(fsdp[0], rel=1e-5)
        assert found[1] == pytest.approx(fsdp[1], rel=1e-4)


def test_settings_reach_deepspeed() -> None:
    """hpZ, pieces of pieces, offloading and buckets change no number; bf16 on the wire changes them a little."""
    small = {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000, "zero_hpz_partition_size": 2}
    offload = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5000}
    bf16 = {"communication_data_type": "bf16"}
    layouts = [
        FSDP,
        {**ZERO[2], "deepspeed": {"zero_optimization": {**small, **offload}}},
        {**ZERO[1], "deepspeed": {"zero_optimization": offload}},
        {**ZERO[1], "deepspeed": bf16},
    ]
    fsdp, pieces, offloaded, rounded = run(2, trained, layouts, "bf16", 2)[0]
    assert pieces == fsdp and offloaded == fsdp
    assert rounded[0] == pytest.approx(fsdp[0], rel=1e-3) and rounded[0] != fsdp[0]


# ---- checkpoints


def whole(x: Any) -> Any:
    return (x.full_tensor() if isinstance(x, DTensor) else x).tolist() if isinstance(x, torch.Tensor) else x


def exchanged(layouts: list[dict[str, Any]]) -> list[Any]:
    """{key: (kind, local shape, dtype)} of each layout's state, and {key: value} after it was given made-up values."""
    found: list[Any] = []
    for layout in layouts:
        engine = make(layout)
        engine.init_weights(0)
        state = {f"{part}/{k}": v for part, values in engine.state_dict().items() for k, v in values.items()}
        kinds = {
            k: (type(v).__name__, v.dtype, tuple(getattr(v, "_local_tensor", v).shape))
            for k, v in state.items()
            if isinstance(v, torch.Tensor)
        }
        for key, value in state.items():  # in place, as a checkpoint is read
            if isinstance(value, DTensor):
                values = len(key) + torch.arange(value.numel()).view(value.shape) / 7
                value.copy_(distribute_tensor(values, value.device_mesh, value.placements, src_data_rank=None))
            elif isinstance(value, torch.Tensor):
                value.fill_(5)
        parts = {
            part: {k.partition("/")[2]: v for k, v in state.items() if k.startswith(part)}
            for part in ("model", "optim")
        }
        engine.load_state_dict(parts)
        after = {f"{part}/{k}": v for part, values in engine.state_dict().items() for k, v in values.items()}
        found.append((kinds, {key: whole(value) for key, value in after.items()}))
    return found


def test_state_is_that_of_fsdp() -> None:
    """Keys, shards and values, on three ranks, which share nothing evenly."""
    small = {"zero_optimization": {"sub_group_size": 3000}}
    for rank in run(3, exchanged, [FSDP, ZERO[1], {**ZERO[2], "deepspeed": small}]):
        (kinds, values), *others = rank
        for found in others:
            assert found == (kinds, values)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of four steps and two blocks, with a checkpoint after every second step."""
    text, r = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(20):
        (text / f"{i}.txt").write_text(" ".join(r.choices(["one", "two", "three", "four", "five"], k=150)))
    model = "model.dim=64 model.layers=2 model.heads=2 model.kv_heads=2 model.ffn_dim=128"
    data = "data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.validation_sequences=4"
    t = "train.global_batch=4 train.micro_batch=2 train.steps=4 train.checkpoint_every=2 train.clip_norm=0.5"
    paths = [f"data.sources.0.path={text}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    return ["recipe=nvfp4_tiny", *model.split(), *data.split(), "data.validation_batch=2", *t.split(), *paths]


def records(folder: Path) -> list[list[float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[record[key] for key in ("step", "loss", "grad_norm")] for record in map(json.loads, lines)]


@pytest.mark.parametrize(("before", "after", "ranks"), [("fsdp", "deepspeed_zero3", 2), ("deepspeed_zero2", "fsdp", 1)])
def test_runs_go_on_under_the_other(words: list[str], tmp_path: Path, before: str, after: str, ranks: int) -> None:
    """The command line: after half of a run, what is left of it gives the same numbers."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run(2, main, [*words, f"run.dir={whole}", f"parallel={before}"]) == [0, 0]
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_00000004")
    assert run(ranks, main, [*words, f"run.dir={half}", f"parallel={after}"]) == [0] * ranks
    assert records(half) == records(whole)
    assert len(records(half)) == 4
    assert json.loads((half / "metrics.jsonl").read_text().splitlines()[-1])["attempt"] == 2


# ---- what is refused


def world(ranks: int = 4, **axes: int) -> Any:
    return SimpleNamespace(
        size=ranks, device=torch.device("cpu"), axis=lambda name: SimpleNamespace(name=name, size=axes.get(name, 1))
    )


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (3, zero(zeropp_loco_param={"err_beta": 0.8}), "LoCo-Zero.. has been removed"),
    (3, zero(mics_shard_size=2), "MiCS ZeRO-3 sharding has been removed"),
    (2, {"compression_training": {}}, "compression library has been removed"),
    (2, {"quantize_training": {}}, "has been removed"),
    (2, {"amp": {"enabled": True}}, "has been removed"),
    (2, {"optimizer": {"type": "OneBitAdam"}}, "optim=.*1-bit and 0/1 Adam no longer exist"),
    (2, {"gradient_clipping": 1.0}, "train.clip_norm"),
    (2, {"train_batch_size": 8}, "train.global_batch"),
    (2, {"fp16": {"enabled": True}}, "dtypes are lowprec's"),
    (2, {"communication_datatype": "bf16"}, "not passed on.*communication_data_type"),
    (2, {"communication_data_type": "fp8"}, "Invalid communication_data_type"),
    (2, zero(overlap_com=True), "overlap_com: Extra inputs are not permitted"),
    (2, zero(stage=1), "the stage is parallel.zero_stage"),
    (2, zero(round_robin_gradients=True), "mixes up the optimizer's state"),
    (3, zero(zero_quantized_weights=True), "no kernels for it on CPU"),
    (3, zero(zero_quantized_gradients=True), "no kernels for it on CPU"),
    (2, zero(zero_quantized_gradients=True), "ZeRO-2 does not read it"),
    (1, zero(zero_hpz_partition_size=2), "ZeRO-1 does not read it"),
    (1, zero(stage3_max_live_parameters=1), "ZeRO-1 does not read it"),
    (3, zero(zero_hpz_partition_size=3), "does not divide the 4 ranks"),
    (3, zero(offload_param={"device": "nvme"}), "choose cpu"),
    (2, {"zero_optimization": True}, "must be a mapping"),
]


@pytest.mark.parametrize(("stage", "settings", "why"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_settings(stage: int, settings: dict[str, Any], why: str) -> None:
    """In one sentence, be it lowprec's reason or DeepSpeed's own."""
    config = ParallelConfig(zero_stage=stage, deepspeed=settings)
    with pytest.raises(ValueError, match=why) as caught:
        zero_settings.settings(sys.modules["deepspeed"], world(), config)
    assert "\n" not in str(caught.value)


def test_settings_are_passed_on() -> None:
    """Those that are not lowprec's, unchanged; on CUDA the quantised collectives as well."""
    given = {"communication_data_type": "bf16", **zero(zero_hpz_partition_size=2, overlap_comm=True)}
    config = ParallelConfig(zero_stage=3, deepspeed=given)
    passed = zero_settings.settings(sys.modules["deepspeed"], world(), config)
    assert passed["communication_data_type"] == "bf16"
    assert (
        passed["zero_optimization"].items() >= {"stage": 3, "zero_hpz_partition_size": 2, "overlap_comm": True}.items()
    )
    assert "optimizer" not in passed and "gradient_clipping" not in passed
    on_cuda = world()
    on_cuda.device = torch.device("cuda")
    config = ParallelConfig(zero_stage=3, deepspeed=zero(zero_quantized_weights=True, zero_quantized_gradients=True))
    passed = zero_settings.settings(sys.modules["deepspeed"], on_cuda, config)
    assert passed["zero_optimization"]["zero_quantized_gradients"]


@pytest.mark.parametrize(
    ("axes", "config", "why"),
    [
        ({"tp": 2}, ParallelConfig(), "parallel.tp=2"),
        ({"cp": 2}, ParallelConfig(), "parallel.cp=2"),
        ({"pp": 2}, ParallelConfig(), "parallel.pp=2"),
        ({"replicate": 2}, ParallelConfig(), "parallel.replicate=2"),
        ({}, ParallelConfig(zero_stage=4), "stages 1, 2 and 3"),
        ({}, ParallelConfig(compile=True), "parallel.compile=true"),
        ({}, ParallelConfig(reshard_after_forward=False), "FSDP2's"),
    ],
)
def test_refused_layouts(axes: dict[str, int], config: ParallelConfig, why: str) -> None:
    with torch.device("meta"):
        plan = Plan.of(build(MODEL), load_precision("bf16"), seed=0)
    with pytest.raises(ValueError, match=why):
        zero_settings.check_layout(plan, world(**axes), config)


def test_deoscillation_is_refused() -> None:
    plan: Any = SimpleNamespace(precision=load_precision("nvfp4_deosc"))
    with pytest.raises(ValueError, match="deoscillation"):
        zero_settings.check_layout(plan, world(), ParallelConfig())


def refused(optim: OptimConfig) -> str:
    try:
        make(ZERO[1], optim=optim)
    except ValueError as error:
        return str(error)
    return ""


def test_an_optimizer_that_needs_matrices_is_refused() -> None:
    adafactor = OptimConfig("torch.optim.Adafactor", betas=None, eps=None)
    assert "choose one of" in run(1, refused, adafactor)[0]


def test_deepspeed_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, or of another version: the command that installs it."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"extra deepspeed .*pip install 'lowprec\[deepspeed\]'"):
        zero_settings.load(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.20.1"))
    with pytest.raises(ValueError, match=r"needs DeepSpeed 0\.19, not 0\.20\.1"):
        zero_settings.load(torch.device("cpu"))
