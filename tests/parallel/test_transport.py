"""What FSDP2 sends: codes do not change a bit, other codecs little, and every byte is counted."""

from pathlib import Path

import pytest
import torch

from lowprec.model import ModelConfig, count_parameters
from tests.layouts import train_on

pytestmark = pytest.mark.distributed

NUMBERS = ("loss", "grad_norm", "val_loss", "val_loss_high_precision")


def numbers(records: list[dict]) -> list[list[float | None]]:
    return [[record.get(key) for key in NUMBERS] for record in records]


@pytest.mark.parametrize(
    "recipe",
    ["nvfp4", "halo1_int8", "quartet2", "mxfp8"],
)
def test_codes_on_the_wire_do_not_change_a_bit(recipe: str, tmp_path: Path) -> None:
    """Losses, gradients and evaluations (with the recipe and without) are those of gathering bf16; fewer bytes do it.

    mxfp8's backward quantises the weight anew, so it takes no codes, and the plan says so.
    """
    size = ("model.dim=128", "model.ffn_dim=256", "model.heads=2", "train.eval_every=2", f"precision={recipe}")
    rules = '[{match: lm_head, recipe: bf16}, {match: "layers.*", recipe: default}]'
    plain = train_on(2, tmp_path, "run.dir=plain", *size, f"precision.rules={rules}")
    coded = train_on(2, tmp_path, "run.dir=coded", *size, f"precision.rules={rules}", "comm.codes=true")
    assert numbers(coded) == numbers(plain)
    before, after = (records[-1]["wire_bytes"]["weight_all_gather"] for records in (plain, coded))
    plan = (tmp_path / "coded" / "plan.txt").read_text()
    if recipe == "mxfp8":
        assert before == after and "does not travel as codes: dgrad" in plan
    else:
        assert after < 0.8 * before and "does not travel as codes" not in plan


def test_a_quantised_head_keeps_its_gradient_in_fp32(tmp_path: Path) -> None:
    """The root's gradients are added up in fp32, which those of codes are not: the head travels plain; it is said."""
    rules = 'precision.rules=[{match: "*", recipe: default}]'
    head = (rules, "model.tie_embeddings=false", "train.global_batch=4")  # one micro-batch a rank
    plain = train_on(2, tmp_path, "run.dir=plain", *head)
    assert numbers(train_on(2, tmp_path, "run.dir=coded", *head, "comm.codes=true")) == numbers(plain)
    assert "lm_head.weight does not travel as codes: its gradient" in (tmp_path / "coded" / "plan.txt").read_text()


def test_a_schedule_that_leaves_the_recipe(tmp_path: Path) -> None:
    """From half of the run on fprop is bf16: the weight itself is gathered again, and the numbers stay those."""
    switch = ("precision.schedule=[{from: 0.5, set: {nvfp4.fprop: bf16}}]", "train.eval_every=1")
    plain = train_on(2, tmp_path, "run.dir=plain", *switch)
    coded = train_on(2, tmp_path, "run.dir=coded", *switch, "comm.codes=true")
    assert numbers(coded) == numbers(plain)
    sent = [record["wire_bytes"]["weight_all_gather"] for record in coded]
    assert sent[0] == sent[1] < sent[2] == sent[3] == plain[0]["wire_bytes"]["weight_all_gather"]

    # an evaluation has no backward pass, so what it gathered would still be there when the recipes change
    kept = ("parallel.reshard_after_forward=false", "train.eval_high_precision=false", "comm.codes=true")
    losses = [record["loss"] for record in train_on(2, tmp_path, "run.dir=kept", *switch, *kept)]
    assert losses == [record["loss"] for record in plain]


def test_bytes_of_four_ranks(tmp_path: Path) -> None:
    """One micro-batch a rank: NVFP4 codes and 8-bit gradients stay below 2.2 bytes a parameter; bf16 counts 6, less the
    second gather that the root (embedding, norm) does not need."""
    shape = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 512, "vocab_size": 320}
    model = [f"model.{key}={value}" for key, value in shape.items()]
    config = ModelConfig(**shape, tie_embeddings=True)
    total, root = count_parameters(config)["total"], 320 * 128 + 128
    bf16 = train_on(4, tmp_path, "run.dir=bf16", *model, "comm=bf16", "train.steps=2")[-1]
    expected = 6 * (total - root) + 4 * 320 * 128 + (4 + 2) * 128  # the root's norm is gathered in fp32
    assert bf16["wire_bytes"].keys() == {"weight_all_gather", "gradient_reduce_scatter"}
    assert bf16["wire_bytes_per_param"] == pytest.approx(expected / total)
    low = train_on(4, tmp_path, "run.dir=low", *model, "comm=nvfp4_fp8", "train.steps=2")[-1]
    assert low["wire_bytes_per_param"] <= 2.2
    assert low["loss"] == pytest.approx(bf16["loss"], rel=2e-3)


def test_accumulation_gathers_once_for_the_forward_and_reduces_once(tmp_path: Path) -> None:
    """Four micro-batches a rank: one gradient reduction; a gather for the first forward and for each backward."""
    one = train_on(2, tmp_path, "run.dir=one", "train.global_batch=4", "train.steps=1", "model.tie_embeddings=false")
    four = train_on(2, tmp_path, "run.dir=four", "train.global_batch=16", "train.steps=1", "model.tie_embeddings=false")
    a, b = one[0]["wire_bytes"], four[0]["wire_bytes"]
    assert a["gradient_reduce_scatter"] == b["gradient_reduce_scatter"]
    root_bytes = 4 * (2 * 320 * 64 + 64)
    assert (b["weight_all_gather"] - root_bytes) * 2 == 5 * (a["weight_all_gather"] - root_bytes)


@pytest.mark.parametrize("comm", ["int8", "nvfp4_int4_loco", "zeropp"])
def test_every_comm_trains_and_resumes(comm: str, tmp_path: Path) -> None:
    """A run stopped in the middle and resumed gives the numbers of one that was not, error feedback included."""
    nodes = ("comm.ranks_per_node=1",) if comm == "zeropp" else ()
    settings = (f"comm={comm}", "schedule=constant", *nodes)
    whole = train_on(2, tmp_path, "run.dir=whole", *settings)
    train_on(2, tmp_path, "run.dir=parts", *settings, "train.steps=2")
    parts = train_on(2, tmp_path, "run.dir=parts", *settings)
    assert numbers(parts)[2:] == numbers(whole)[2:] and whole[-1]["loss"] < whole[0]["loss"]


def test_error_feedback_begins_anew_under_another_layout(tmp_path: Path) -> None:
    """As many ranks, but other buffers: a checkpoint of 4 shards goes on as 2 copies of 2, and says so."""
    settings = ("run.dir=run", "comm=nvfp4_fp8_ef", "schedule=constant", "train.eval_every=0")
    train_on(4, tmp_path, *settings, "train.steps=2")
    records = train_on(4, tmp_path, *settings, "train.steps=3", "parallel=hsdp")
    assert records[2]["loss"] < records[1]["loss"]
    assert "memories, which begin anew" in (tmp_path / "run.out").read_text()


def test_hsdp_equals_fsdp(tmp_path: Path) -> None:
    """2 copies x 2 shards against 4 shards: fp32 sums in another order."""
    fsdp = train_on(4, tmp_path, "run.dir=fsdp", "train.eval_every=0")
    hsdp = train_on(4, tmp_path, "run.dir=hsdp", "parallel=hsdp", "train.eval_every=0")
    assert fsdp[0]["loss"] == hsdp[0]["loss"]
    for a, b in zip(fsdp, hsdp, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)  # one rounding to bf16
    assert fsdp[0]["grad_norm"] == pytest.approx(hsdp[0]["grad_norm"], rel=1e-6)
    assert {"gradient_all_reduce", "gradient_reduce_scatter", "weight_all_gather"} == hsdp[0]["wire_bytes"].keys()


def test_low_precision_communication_stays_within_the_seed_noise(tmp_path: Path) -> None:
    """Over three seeds, the loss curve of NVFP4 weights and FP8 gradients differs less from that of bf16 communication
    (same seed) than bf16 curves of two seeds differ: at every third of the run."""
    size = ("train.steps=15", "train.eval_every=0", "optim.lr=0.004", "train.log_every=1", "schedule=constant")

    def curve(comm: str, seed: int) -> torch.Tensor:
        records = train_on(2, tmp_path, f"run.dir={comm}{seed}", f"comm={comm}", f"seed={seed}", *size)
        return torch.tensor([record["loss"] for record in records]).view(3, -1).mean(1)

    bf16, low = (torch.stack([curve(comm, seed) for seed in range(3)]) for comm in ("bf16", "nvfp4_fp8"))
    noise = bf16.std(0)
    assert ((low - bf16).abs().mean(0) < noise).all(), (bf16, low)
    assert ((low.mean(0) - bf16.mean(0)).abs() < noise / 2).all(), (bf16, low)
