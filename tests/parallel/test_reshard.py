"""One run on five layouts in turn: each continues the checkpoint of the one before."""

from pathlib import Path

import pytest

from tests.layouts import train_on

pytestmark = pytest.mark.distributed

LAYOUTS = [
    (4, "parallel=fsdp"),
    (2, "parallel=tp"),
    (2, "parallel=pp"),
    (4, "parallel=hsdp"),
    (2, "parallel=cp"),
    (1, "parallel=single"),
]


def test_a_run_moves_from_layout_to_layout(tmp_path: Path) -> None:
    """Two steps on each, in fp32 and unquantised: the curve of one process that never stopped, to the order of sums.

    Reduction order: a loss is a mean of 512 terms and a gradient a sum over 512 tokens, whose fp32 rounding errors
    grow like sqrt(n) 2^-24, some 1e-6; Adam's division by the root of the second moment keeps them relative. Data
    position, moments, tokens and the guard's window travel along: a shifted batch or a lost moment changes the fourth
    digit (the other seed below does).
    """
    size = ("recipe=bf16_tiny", "train.dtype=fp32", "schedule=constant", "model.tie_embeddings=false", "optim.lr=0.002")
    steps = 2 * len(LAYOUTS)
    whole = train_on(1, tmp_path, "run.dir=whole", *size, f"train.steps={steps}", "train.eval_every=2")
    for i, (ranks, layout) in enumerate(LAYOUTS):
        moved = train_on(ranks, tmp_path, "run.dir=moved", *size, layout, f"train.steps={2 * i + 2}")
    assert [r["step"] for r in moved] == list(range(1, steps + 1))
    for a, b in zip(whole, moved, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=2e-5)
    other = train_on(1, tmp_path, "run.dir=other", *size, "train.steps=2", "seed=1")
    assert abs(other[-1]["loss"] - whole[1]["loss"]) > 1e-3


@pytest.mark.parametrize("precision", ["nvfp4", "fp8_delayed"])
def test_where_sums_keep_their_order_not_a_bit_changes(precision: str, tmp_path: Path) -> None:
    """A quantised run, with what its recipe remembers: 2 shards, then a pipeline of 2, then one process."""
    rules = 'precision.rules=[{match: lm_head, recipe: bf16}, {match: "layers.*", recipe: default}]'
    size = (f"precision={precision}", rules, "schedule=constant", "model.tie_embeddings=false", "train.micro_batch=4")
    whole = train_on(1, tmp_path, "run.dir=whole", *size, "train.steps=6", "train.eval_every=2")
    for steps, (ranks, layout) in zip((2, 4, 6), [(2, "parallel=fsdp"), (2, "parallel=pp"), (1, "parallel=fsdp")]):
        moved = train_on(ranks, tmp_path, "run.dir=moved", *size, layout, f"train.steps={steps}")
    keys = ("step", "tokens", "loss", "grad_norm", "val_loss", "val_loss_high_precision")
    assert [[r.get(k) for k in keys] for r in moved] == [[r.get(k) for k in keys] for r in whole]


def test_three_axes_at_once_on_eight_ranks(tmp_path: Path) -> None:
    """2 stages x 2 shards x 2 parts of every matrix, in fp32, unquantised: the curve of one process."""
    size = ("recipe=bf16_tiny", "train.dtype=fp32", "model.tie_embeddings=false", "optim.lr=0.002", "train.steps=3")
    one = train_on(1, tmp_path, "run.dir=one", *size)
    eight = train_on(8, tmp_path, "run.dir=eight", *size, "parallel.pp=2", "parallel.shard=2", "parallel.tp=2")
    for a, b in zip(one, eight, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
    assert one[-1]["val_loss"] == pytest.approx(eight[-1]["val_loss"], rel=2e-5)
