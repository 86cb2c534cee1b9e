"""`parallel.compile` changes no number where the compiler only captures (aot_eager): recomputed, coded weights."""

from pathlib import Path

import pytest

from tests.layouts import train_on

pytestmark = pytest.mark.distributed

NUMBERS = ("loss", "grad_norm", "val_loss")


def test_compiled_blocks_give_the_same_numbers(tmp_path: Path) -> None:
    """Eager and compiled, all else equal."""
    layout = ("parallel=fsdp_recompute", "comm.codes=true", "parallel.compile_with=aot_eager")
    size = ("train.steps=2", "model.layers=1")
    eager = train_on(2, tmp_path, "run.dir=eager", *layout, *size)
    compiled = train_on(2, tmp_path, "run.dir=compiled", *layout, *size, "parallel.compile=true")
    assert [[r.get(key) for key in NUMBERS] for r in compiled] == [[r.get(key) for key in NUMBERS] for r in eager]
