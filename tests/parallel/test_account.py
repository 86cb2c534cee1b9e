"""The account: equal to what a model keeps and to what real collectives count, and to the published formulas."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowprec.comm import CommConfig
from lowprec.data import Batch
from lowprec.linear import Plan, Rule, load_precision
from lowprec.model import MambaConfig, ModelConfig, build, count_parameters, cross_entropy
from lowprec.optim import OptimConfig
from lowprec.parallel import ParallelConfig, Recompute, start_world
from lowprec.parallel.account import account, amount
from lowprec.parallel.apply import parallelize, recompute
from lowprec.parallel.job import job_of, kept_inputs, optimizer_bytes
from lowprec.parallel.layout import Job, Layout, Stages, block_shapes, kinds, root_shapes
from lowprec.parallel.memory import block_terms, context_bytes, in_flight, loss_terms, moments
from lowprec.parallel.wire import Wire
from tests.ranks import run

SMALL = ModelConfig(vocab_size=96, dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=160, max_seq_len=4096)
LLAMA_8B = ModelConfig(vocab_size=128256, dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, max_seq_len=8192)
WIDE = ModelConfig(vocab_size=128, dim=256, layers=6, heads=8, kv_heads=8, ffn_dim=1024, activation="relu2")


HYBRID = ModelConfig(
    vocab_size=96,
    dim=64,
    layers=4,
    heads=4,
    kv_heads=2,
    ffn_dim=160,
    activation="relu2",
    rope_theta=None,
    pattern="M*M-",
    mamba=MambaConfig(heads=4, head_dim=32, groups=2, state=16),
)


def at(moment: str, job: Job, layout: Layout) -> dict[str, float]:
    """What a rank of the first stage holds then."""
    return dict(moments(job, layout, Stages(job).of(layout)[0]))[moment]


def planned(config: ModelConfig, recipe: str = "bf16", **changes: object) -> tuple[torch.nn.Module, Plan]:
    """The model on the meta device with its plan."""
    with torch.device("meta"):
        model = build(config)
    plan = Plan.of(model, replace(load_precision(recipe), **changes))
    plan.apply(model)
    return model, plan


# ---- shapes


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, tie_embeddings=True, qk_norm=True),
        replace(SMALL, activation="relu2"),
        HYBRID,
        replace(HYBRID, pattern="*--*", mamba=None),
    ],
)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    """Names and shapes of blocks and root; cut by tensor parallelism, every matrix shrinks and no vector does."""
    with torch.device("meta"):
        model = build(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = {
        f"layers.{i}.{name}": shape
        for i, kind in enumerate(kinds(config))
        for name, shape in block_shapes(config, kind=kind).items()
    }
    assert blocks | root_shapes(config) == wanted
    assert sum(map(math.prod, wanted.values())) == count_parameters(config)["total"]
    for name, shape in block_shapes(config, tp=2).items():
        whole = block_shapes(config)[name]
        assert math.prod(shape) * (2 if len(shape) > 1 else 1) == math.prod(whole)


# ---- memory


def saved_bytes(config: ModelConfig, tokens: int, how: Recompute, documents: bool, **plan_changes: object) -> int:
    """What autograd keeps of a forward pass over 2 sequences, each storage once, parameters left out."""
    model = build(config)
    model.init_weights(0)
    recipe = str(plan_changes.pop("recipe", "bf16"))
    Plan.of(model, replace(load_precision(recipe), **plan_changes)).apply(model)
    recompute(model, how)
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    ids = torch.arange(tokens).div(50, rounding_mode="floor").expand(2, -1) if documents else None
    tokens_BT = torch.randint(config.vocab_size, (2, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = cross_entropy(model(tokens_BT, ids), tokens_BT)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("how", list(Recompute))
@pytest.mark.parametrize(
    ("tokens", "documents", "changes"),
    [
        (300, False, {}),
        (256, True, {"activation": "relu2"}),
        (2064, False, {"qk_norm": True}),
        (2064, True, {"kv_heads": 1}),
    ],
)
def test_activations_are_what_autograd_keeps(how: Recompute, tokens: int, documents: bool, changes: dict) -> None:
    """To the byte, on a CPU: blocked attention up to 2048 tokens, the fused kernel beyond, documents, recomputation."""
    config = replace(SMALL, layers=1, **changes)
    one, two = (saved_bytes(replace(config, layers=n), tokens, how, documents) for n in (1, 2))
    job, layout = Job(config, 2, tokens, 2, documents=documents, cpu=True), Layout(recompute=how)
    copies = 2 * sum(math.prod(s) for s in block_shapes(config).values() if len(s) > 1)  # bf16 weights: FSDP's here
    block = 2 * tokens * sum(block_terms(job, layout, how).values()) + copies * (how is not Recompute.full)
    assert two - one == block
    ends = loss_terms(job, layout)
    ends["logits and gradient"] /= 2  # the gradient comes later
    root = 2 * tokens * sum(ends.values()) + 2 * config.vocab_size * config.dim
    if how is not Recompute.full:  # there it hangs on the function that runs again, where hooks do not see it
        root += context_bytes(job, layout)
    assert one - block == root


def test_kept_codes() -> None:
    """`save: codes`: what each layer keeps instead of its input, as autograd sees it."""
    config = ModelConfig(vocab_size=96, dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=512)
    changes = {"rules": (Rule("*", "nvfp4"),), "save": "codes"}
    _, plan = planned(config, "nvfp4", **changes)
    kept = kept_inputs(plan, config, torch.bfloat16)
    assert kept.keys() == {"qkv", "o", "mlp", "down"} and kept["down"] < 0.7 * 512 < 2 * 512
    job = job_of(config, plan, CommConfig(), OptimConfig(), micro_batch=2, seq_len=128, global_batch=2, cpu=True)
    plain = sum(block_terms(replace(job, kept={}), Layout(), Recompute.none).values())
    codes = sum(block_terms(job, Layout(), Recompute.none).values())
    inputs = 2 * (3 * 256 + 512)
    assert plain - codes == pytest.approx(inputs - sum(kept.values()))
    before, after = (
        saved_bytes(config, 128, Recompute.none, False, recipe="nvfp4", **changes | {"save": save})
        for save in ("inputs", "codes")
    )
    assert before - after == 2 * 128 * (2 * inputs + 2 * 256)  # both blocks and the head; codes are not autograd's


def test_activations_of_megatron() -> None:
    """arXiv:2205.05198: 34 s b h and, without a fused kernel, 5 a s^2 b (here causal: half, and no dropout: 2 of 5)."""
    c, tokens, heads = WIDE.dim, 2048, WIDE.heads
    fused = block_terms(Job(WIDE, 1, tokens, 1, documents=False), Layout(), Recompute.none)
    statistics = 2 * 4 + 4 * heads
    assert sum(fused.values()) == 34 * c - 2 * c + 4 * c + statistics  # no dropout masks; norms keep fp32
    blocked = block_terms(Job(WIDE, 1, tokens, 1, documents=False, cpu=True), Layout(), Recompute.none)
    assert blocked["attention probabilities"] == 2 * heads * (tokens + 128) / 2  # whole blocks of 128 queries
    cut = block_terms(Job(WIDE, 1, tokens, 1, documents=False), Layout(tp=4), Recompute.none)
    assert sum(cut.values()) == (36 * c + statistics) / 4 + 4 * c * (1 - 1 / 4)  # two inputs are gathered, not kept cut


def test_sixteen_bytes_a_parameter() -> None:
    """ZeRO-3, arXiv:1910.02054: masters, gradients and moments, over the ranks; a moment-less optimizer keeps none."""
    count = count_parameters(WIDE)["total"]
    for ranks in (1, 2, 8):
        memory = at("update", Job(WIDE, 1, 64, ranks), Layout(shard=ranks))
        assert memory["parameters"] == 4 * count / ranks and memory["optimizer"] == 8 * count / ranks
        assert memory["gradients"] == 4 * count / ranks
    assert optimizer_bytes(OptimConfig()) == 8
    assert optimizer_bytes(OptimConfig(_target_="torch.optim.SGD", betas=None, eps=None)) == 0


def test_micro_batches_hold_whole_gradients() -> None:
    """With several micro-batches gradients wait in fp32 for the last; weights fill what activations leave."""
    job, more, layout = Job(WIDE, 1, 64, 8), Job(WIDE, 1, 64, 16), Layout(shard=8)
    whole = count_parameters(WIDE)["total"]
    assert at("loss", more, layout)["gradients"] == 4 * whole and at("loss", job, layout)["gradients"] == 0
    between = at("between micro-batches", more, layout)["gathered weights"]
    assert between > at("loss", more, layout)["gathered weights"]
    kept = Layout(shard=8, reshard_after_forward=False)
    assert at("loss", job, kept)["gathered weights"] > between  # and the head's copy
    assert account(more, layout).fullest.memory_bytes > account(job, layout).fullest.memory_bytes + 3 * whole


def test_a_pipeline_keeps_what_is_in_flight() -> None:
    """1F1B: as many micro-batches as stages follow; interleaved: 1 + (p - 1) / (p v) whole ones (arXiv:2205.05198)."""
    job = Job(replace(WIDE, layers=16), 1, 64, 8)
    assert [in_flight(job, Layout(pp=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(job, Layout(pp=4, virtual_stages=2), 0) == 4 * 2 + 4 - 1
    whole = at("loss", job, Layout())["activations"]
    first = at("backward of block 3", job, Layout(pp=4))["activations"]
    assert first == whole
    interleaved = at("backward of block 3", job, Layout(pp=4, virtual_stages=2))["activations"]
    assert interleaved == pytest.approx(whole * (1 + 3 / (4 * 2)))
    assert account(job, Layout(pp=4)).bubble == 3 / (8 + 3)
    assert account(job, Layout(pp=4, virtual_stages=2)).bubble == 3 / (8 * 2 + 3)


# ---- bytes


def wire(job: Job, layout: Layout) -> dict[str, int]:
    return account(job, layout).stages[0].wire_bytes


def test_three_volumes_of_parameters() -> None:
    """ZeRO-3 moves 3 P values, 2 for the weights and 1 for the gradients, an all-reduce 2 P; m micro-batches gather
    m + 1 times; one rank moves nothing."""
    count = count_parameters(WIDE)["total"]
    root = sum(math.prod(shape) for shape in root_shapes(WIDE).values())
    job = Job(WIDE, 1, 64, 8, wire=Wire.plain(2, 2, 2))
    assert wire(job, Layout(shard=8)) == {
        "weight_all_gather": 2 * (2 * (count - root) + root),
        "gradient_reduce_scatter": 2 * count,
    }
    assert wire(job, Layout(replicate=8)) == {"gradient_all_reduce": 4 * count}
    again = replace(job, global_batch=24)
    assert wire(again, Layout(shard=8))["weight_all_gather"] == 2 * (4 * (count - root) + root)
    assert wire(again, Layout(shard=8, reshard_after_forward=False))["weight_all_gather"] == 2 * count
    assert wire(job, Layout()) == {}


def test_codes_stay_below_their_target() -> None:
    """NVFP4 codes and 8-bit gradients: at most 2.2 bytes a parameter of the blocks, against 6."""
    config = replace(WIDE, dim=512, ffn_dim=2048)
    _, plan = planned(config, "nvfp4", rules=(Rule("lm_head", "bf16"), Rule("*", "nvfp4")))
    comm = CommConfig(weights="int8", codes=True, gradients="fp8")
    found = wire(Job(config, 1, 64, 8, wire=Wire.of(comm, plan, torch.bfloat16)), Layout(shard=8))
    assert sum(found.values()) < 2.2 * count_parameters(config)["total"]


def test_what_cannot_be_laid_out_is_said() -> None:
    """The sentences of those who would refuse it, before anything starts."""
    job = Job(SMALL, 2, 64, 16)
    for layout, words in [
        (Layout(tp=8), "parallel.tp=8 does not divide model.heads=4"),
        (Layout(shard=16), "8 micro-batches a step cannot be shared evenly by 16 data-parallel ranks (train.micro"),
        (Layout(pp=8), "model.layers=4 are fewer than the 8 pipeline stages"),
        (Layout(pp=2, shard=8), "at least 2 micro-batches"),
        (Layout(cp=4), "data.seq_len=64 is no multiple of 128"),
    ]:
        with pytest.raises(ValueError) as error:
            account(job, layout)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="the Mamba-2 blocks"):
        account(replace(job, model=HYBRID), Layout(tp=2))


def test_in_words() -> None:
    """The printed account names layout, memory and every collective."""
    text = str(account(Job(SMALL, 2, 64, 16), Layout(pp=2, shard=2, tp=2)))
    for word in (
        "pp 2 x shard 2 x tp 2",
        "gathered weights",
        "pipeline_send",
        "activation_all_gather",
        "bubble: 20.0%",
    ):
        assert word in text


def step(config: ModelConfig, parallel: ParallelConfig, comm: CommConfig, recipe: str, micros: int) -> tuple[int, dict]:
    """(stage, bytes by collective) of a second step on this rank."""
    world = start_world(parallel)
    model, plan = planned(config, recipe)
    engine = parallelize(
        model, plan, world, parallel, comm, torch.bfloat16, lambda m: torch.optim.SGD(m.parameters(), foreach=False)
    )
    engine.init_weights(0)
    tokens = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(world.data[0]))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    counted: dict[str, int] = {}
    for _ in range(2):
        engine.backward([(i, batch) for i in range(micros)], lambda i, x, y: cross_entropy(x, y, group=engine.vocab)[0])
        engine.update(0.0)
        counted = engine.wire_bytes()
    return world.axis("pp").rank, counted


TWO_LEVEL = CommConfig(codes=True, gradients="int8", gradients_between="int4", hpz=True, ranks_per_node=2)
KEPT = {"shard": 1, "cp": 2, "recompute": Recompute.selective, "reshard_after_forward": False}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "parallel", "comm", "recipe"),
    [
        (2, {"hybrid": True}, CommConfig(weights="int8", codes=True, gradients="fp8"), "nvfp4"),
        (2, {}, CommConfig(weights="int8", codes=True, gradients="fp8"), "nvfp4"),
        (4, {"replicate": 2}, CommConfig(gradients="int4", gradients_between="fp8"), "bf16"),
        (4, {}, TWO_LEVEL, "fp8_tensorwise"),
        (4, {"tp": 2}, CommConfig(activations="fp8"), "bf16"),
        (4, {"shard": 1, "cp": 2, "tp": 2, "recompute": Recompute.full}, CommConfig(), "bf16"),
        (2, KEPT, CommConfig(), "bf16"),
        (4, {"pp": 2, "virtual_stages": 2}, CommConfig(gradients="bf16"), "bf16"),
    ],
)
def test_bytes_are_those_that_are_counted(ranks: int, parallel: dict, comm: CommConfig, recipe: str) -> None:
    """Exactly, by collective and rank, on real processes with three micro-batches (a pipeline: four)."""
    micros = 4 if "pp" in parallel else 3
    config = HYBRID if parallel.get("hybrid") else replace(SMALL, ffn_dim=96)
    parallel = {axis: size for axis, size in parallel.items() if axis != "hybrid"}
    layout = Layout.of(ParallelConfig(**parallel), ranks)
    counted = run(ranks, step, config, ParallelConfig(**parallel), comm, recipe, micros)
    _, plan = planned(config, recipe)
    sizes = {"micro_batch": 2, "seq_len": 64, "global_batch": 2 * micros * layout.data}
    found = account(job_of(config, plan, comm, OptimConfig(), **sizes, documents=False), layout)
    for stage, counts in counted:
        expected = found.stages[stage].wire_bytes
        expected.pop("other", None)  # the loss's own exchange, which nothing counts
        assert counts == expected


def test_the_page_keeps_its_word() -> None:
    """The example of docs/scaling-out.md, row by row."""
    page = (Path(__file__).parents[2] / "docs" / "scaling-out.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    rows = [row for row in rows if re.match(r"(pp|replicate|shard) \d", row[0])]
    assert len(rows) == 8
    for text, micros, *amounts in rows:
        sizes, _, how = text.partition(", recompute ")
        layout = Layout(
            **{axis: int(size) for axis, size in (part.split() for part in sizes.split(" x "))},
            recompute=Recompute(how or "none"),
        )
        job = Job(LLAMA_8B, 1, 8192, int(micros) * layout.data)
        stage = account(job, layout).fullest
        memory = stage.memory
        state = memory["parameters"] + memory["optimizer"]
        parts = (memory[key] for key in ("gradients", "gathered weights", "activations"))
        found = [stage.memory_bytes, state, *parts, sum(stage.wire_bytes.values())]
        assert [amount(value) for value in found] == amounts, text
