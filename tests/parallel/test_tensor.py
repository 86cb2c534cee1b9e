"""Tensor parallelism with sequence parallelism: the numbers of one process, for every recipe that can be cut."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lowprec.comm import CODECS, CommConfig
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.model import Activation, ModelConfig, cross_entropy
from lowprec.parallel import Recompute
from lowprec.parallel.tensor import refuse
from tests.parallel.agreement import MODEL, Case, Outcome, assert_agree, assert_same, make, train, trained
from tests.ranks import run

pytestmark = pytest.mark.distributed

RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
WIDE = replace(MODEL, layers=1, kv_heads=4, ffn_dim=256, vocab_size=512)  # halves of all cut axes hold 128 features

WHOLE_AXES = {  # recipes that look at the whole of an axis, and the product that is named first
    "bitnet_158": "rule mean of format ternary (w of fprop)",
    "bitnet_158_median": "rule median of format ternary (w of fprop)",
    "chon": "split by residual, top 9% in nvfp4 (x of fprop)",
    "halo1_fp8": "the rotation of fprop (H of the whole axis (none signs))",
    "halo1_int8": "the rotation of fprop (H of the whole axis (none signs))",
    "halo2_fp6": "the rotation of fprop (H of the whole axis (none signs))",
    "halo2_fp8": "the rotation of fprop (H of the whole axis (none signs))",
    "halo2_int8": "the rotation of fprop (H of the whole axis (none signs))",
    "hp_mean_ema": "split by moving mean, exact (x of fprop)",
    "metis_lowrank": "split by rank 8, quantized (w of fprop)",
    "quest_fp4": "rule rms of format quest (x of fprop)",
    "quest_w1a1": "rule rms of format quest (x of fprop)",
    "quest_w4": "rule rms of format quest (w of fprop)",
    "quest_w4a4": "rule rms of format quest (x of fprop)",
    "tetrajet_v2": "split by channels, top 10% in mxfp8 (x of fprop)",
}


def tried(function: Callable[[], object]) -> object:
    """What it returns, or what it refuses."""
    try:
        return function()
    except ValueError as error:
        return str(error)


def short(recipe: str) -> Case:
    """One step of one micro-batch through one layer."""
    return Case(recipe, model=WIDE, steps=1, micros=1, tokens=32)


def one_process(recipes: list[str]) -> list[list[Outcome]]:
    return [trained(short(recipe), 2) for recipe in recipes]


def two_processes(recipes: list[str]) -> list[object]:
    return [tried(lambda recipe=recipe: train(short(recipe), {"tp": 2})) for recipe in recipes]


@pytest.mark.parametrize("part", [0, 1])
def test_every_recipe_agrees_with_one_process_or_is_refused_by_name(part):
    """Loss and gradients of a step, for all shipped recipes: shared maxima, the same noise, whole blocks."""
    recipes = RECIPES[part::2]
    ones, twos = run(1, one_process, recipes)[0], run(2, two_processes, recipes)[0]
    for recipe, (one, *shaken), two in zip(recipes, ones, twos, strict=True):
        if isinstance(two, str):
            assert WHOLE_AXES.get(recipe, "nothing") in two and "cannot be cut" in two, (recipe, two)
        else:
            assert recipe not in WHOLE_AXES
            assert_agree(one, two, shaken)


@pytest.mark.parametrize("case", [Case(), Case("nvfp4", torch.bfloat16)], ids=str)
def test_steps_agree_with_one_process(case):
    """Three steps, of documents, left-out targets, z-loss and QK-norm, on two ranks and with FSDP2 on four.

    FSDP2 changes no bit: it deals out micro-batches and rows, and sums in fp32 what one process sums in fp32.
    """
    one, *shaken = run(1, trained, case, 2)[0]
    two, *_ = run(2, train, case, {"tp": 2})
    four, *others = run(4, train, case, {"tp": 2, "shard": 2})
    assert_agree(one, two, shaken)
    assert_same(two, four)
    for other in others:
        assert_same(four, other)


def test_the_norm_for_clipping_is_that_of_one_process():
    """To 1e-6, of equal gradients; a norm's weight, which tp ranks have in common, counts once."""
    one, two = run(1, train, Case(steps=1))[0], run(2, train, Case(steps=1), {"tp": 2})[0]
    exact = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in one.gradients.values()))
    assert abs(one.norms[0] / exact - 1) < 1e-6 and abs(two.norms[0] / exact - 1) < 1e-6


def test_four_parts_tied_head_relu2_and_copies():
    """Four parts of every matrix; then HSDP x TP: with copies of the shards no bit changes either."""
    model = replace(MODEL, kv_heads=4, tie_embeddings=True, activation=Activation.relu2, qk_norm=False)
    case = Case("nvfp4", model=model, steps=1)
    one, *shaken = run(1, trained, case, 2)[0]
    assert_agree(one, run(4, train, case, {"tp": 4})[0], shaken)
    two, copies = run(2, train, case, {"tp": 2})[0], run(4, train, case, {"tp": 2, "replicate": 2})[0]
    assert_agree(one, two, shaken)
    assert_same(two, copies)


def recomputed() -> list[Outcome]:
    modes = (Recompute.none, Recompute.selective, Recompute.full)
    case = Case("nvfp4", torch.bfloat16, steps=1)
    return [train(replace(case, settings={"recompute": how}), {"tp": 2}) for how in modes]


def test_recomputation_changes_nothing():
    """Collectives of a block's forward run again in the backward, in the same order on all ranks."""
    kept, *others = run(2, recomputed)[0]
    for other in others:
        assert_same(kept, other)


def counted(activations: str) -> tuple[dict[str, int], list[str], float]:
    """What a micro-batch sends, who has which part of the parameters, and the loss."""
    engine = make(Case("fp8_tensorwise", torch.bfloat16, comm=CommConfig(activations=activations)), tp=2)
    parts = [f"{name} {p.placements[-1]} {tuple(p.to_local().shape)}" for name, p in engine.model.named_parameters()]
    engine.transport.meter.take()
    batch = Case().batch(0, 0)
    loss, _ = cross_entropy(engine.model(batch.tokens), batch.targets, group=engine.vocab)
    loss.backward()
    return engine.transport.meter.take(), parts, loss.item()


def test_bytes_on_the_wire_and_parts_of_parameters():
    """A block gathers and scatters twice each way, embedding and head once; maxima and norms are small change."""
    taken, parts, loss = run(2, counted, "")[0]
    half = 64 * MODEL.dim  # values: B T C of a rank
    times = 4 * MODEL.layers + 2
    assert taken["activation_all_gather"] == taken["activation_reduce_scatter"] == times * 2 * half * 2
    coded, _, near = run(2, counted, "fp8")[0]
    assert coded["activation_all_gather"] == times * 2 * CODECS["fp8"].payload_bytes(half)
    assert coded["activation_reduce_scatter"] == times * 2 * CODECS["fp8"].payload_bytes(half)
    assert 0 < abs(near / loss - 1) < 2**-4  # the rounding error of a single value

    norms = 2 * MODEL.layers * MODEL.dim + MODEL.dim + 2 * MODEL.layers * MODEL.head_dim
    assert taken["activation_all_reduce"] == 2 * 4 * norms
    # one maximum an operand at most, where the operand is cut: x of o and down, dy of the others, w of all; twice each
    row, column = 2 * MODEL.layers, 5 * MODEL.layers + 1
    assert 0 < taken["amax_all_reduce"] <= 2 * 4 * 2 * (row + column + (row + column))
    assert "embed.weight S(0) (192, 64)" in parts and "lm_head.weight S(0) (192, 64)" in parts
    assert "layers.0.attn.q_proj.weight S(0) (128, 64)" in parts
    assert "layers.1.mlp.down_proj.weight S(1) (64, 64)" in parts
    assert "norm.weight R (64,)" in parts


def vocabulary(dtype: torch.dtype, z_loss: float) -> tuple[list[float], np.ndarray]:
    """Losses, and the gradient of this rank's logits."""
    logits, targets = whole_vocabulary(dtype)
    part = logits.chunk(3, -1)[dist.get_rank()].clone().requires_grad_()
    loss, z = cross_entropy(part, targets, z_loss, dist.group.WORLD)
    ((loss + 2 * z) / 7).backward()
    return [loss.item(), z.item()], part.grad.float().numpy()


def whole_vocabulary(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 8, 30, generator=generator) * 3).to(dtype)
    targets = torch.randint(30, (2, 8), generator=generator)
    targets[0, 2:5] = -100
    logits[1, 0, 25] = 1e4  # far from overflow, wherever it is
    return logits, targets


@pytest.mark.parametrize(("dtype", "z_loss"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1)])
def test_the_loss_of_parts_of_the_vocabulary_is_that_of_the_whole(dtype, z_loss):
    """Every rank has the same sums. z errs by a few units in the last place, and so does exp(l - z), relatively."""
    parts = run(3, vocabulary, dtype, z_loss)
    logits, targets = whole_vocabulary(dtype)
    logits.requires_grad_()
    loss, z = cross_entropy(logits, targets, z_loss)
    ((loss + 2 * z) / 7).backward()
    for losses, _ in parts:
        assert losses == parts[0][0]
        assert losses == pytest.approx([loss.item(), z.item()], rel=3 * 2**-23)
    gradient, expected = torch.from_numpy(np.concatenate([part for _, part in parts], -1)), logits.grad.float()
    terms = expected.abs()
    terms.scatter_add_(-1, targets.clamp(min=0)[..., None], torch.full((*targets.shape, 1), 2 / 7))  # softmax - 1
    relative = (logits.float().logsumexp(-1, keepdim=True).abs() + 4) * 2**-21
    relative += 2**-8 if dtype == torch.bfloat16 else 0  # either is rounded to bf16
    assert ((gradient - expected).abs() <= relative * terms).all()


def test_models_that_cannot_be_cut_are_refused():
    """By name, with what would fit; before any process starts."""
    sizes = {"dim": 96, "heads": 6, "kv_heads": 6, "head_dim": 32, "ffn_dim": 96, "vocab_size": 300}
    refuse(ModelConfig(**sizes), 3)
    for change, words in (
        ({"heads": 8, "kv_heads": 2}, "parallel.tp=3 does not divide model.heads=8"),
        ({"kv_heads": 2}, "parallel.tp=3 does not divide model.kv_heads=2"),
        ({"ffn_dim": 100}, "parallel.tp=3 does not divide model.ffn_dim=100"),
        ({"vocab_size": 500}, "vocabulary of 500: .* model.vocab_multiple=3"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse(ModelConfig(**sizes | change), 3)


def refusals() -> list[object]:
    halves = replace(MODEL, head_dim=16)  # of k and v: one head of 16 features
    return [
        tried(lambda: make(Case("mxfp8", model=halves), tp=2)),
        tried(lambda: train(Case(tokens=63), {"tp": 2})),
    ]


def test_blocks_and_lengths_that_cannot_be_cut_are_refused():
    """Blocks when the model is laid out, a sequence when it comes."""
    for block, length in run(2, refusals):
        assert "'layers.0.attn.k_proj': recipe mxfp8 cannot be cut 'out' over 2 ranks: a block of 1x32" in block
        assert "a sequence of 63 tokens cannot be cut" in length and "data.seq_len a multiple of 2" in length
