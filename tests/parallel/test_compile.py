"""`parallel.compile` changes no number where the compiler only captures (aot_eager), with recomputation and weights as codes."""

from pathlib import Path

import pytest

from tests.layouts import train_on

pytestmark = pytest.mark.distributed

NUMBERS = ("loss", "grad_norm", "val_loss")


def test_compiled_blocks_give_the_same_numbers(tmp_path: Path) -> None:
    layout = ("parallel=fsdp_recompute", "comm.codes=true")
    eager, compiled = (
        train_on(
            2,
            tmp_path,
            f"run.dir={name}",
            *layout,
            "train.steps=2",
            "model.layers=1",
            "parallel.compile_with=aot_eager",
            more,
        )
        for name, more in (("eager", "parallel.compile=false"), ("compiled", "parallel.compile=true"))
    )
    assert [[r.get(key) for key in NUMBERS] for r in compiled] == [[r.get(key) for key in NUMBERS] for r in eager]
