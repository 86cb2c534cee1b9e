"""One process and two follow the same curve, and a checkpoint of two continues on one."""

import shutil
import subprocess
from pathlib import Path

import pytest


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def test_two_micro_batches_give_the_same_bits_on_two_ranks(train, spawn, compare, tmp_path: Path) -> None:
    """With two micro-batches a sum has one order only: an NVFP4 run is bit-equal, even one that changes ranks."""
    assert train(tmp_path / "one") == 0
    output = finish(spawn(tmp_path / "two", "train.checkpoint_every=5", "train.checkpoint_async=true", ranks=2))
    assert compare(tmp_path / "two") == compare(tmp_path / "one")
    assert output.count("finished 8 steps") == 1, "only the first rank speaks"

    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000008")  # what two ranks saved at step 5 goes on alone
    assert train(tmp_path / "two") == 0
    assert compare(tmp_path / "two") == compare(tmp_path / "one")


def test_more_micro_batches_agree_to_the_order_of_the_sum(train, spawn, read, tmp_path: Path) -> None:
    """Six micro-batches in bf16: equal at first; sums of six gradients in another order differ by rounding."""
    size = ("recipe=bf16_tiny", "train.global_batch=6", "train.micro_batch=1", "train.eval_every=0")
    assert train(tmp_path / "one", *size) == 0
    finish(spawn(tmp_path / "two", *size, ranks=2))
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one[0]["loss"] == two[0]["loss"]
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-6)  # six fp32 additions: 6 * 2**-24
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)  # one rounding to bf16
