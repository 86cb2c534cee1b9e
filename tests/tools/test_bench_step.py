"""tools/bench_step.py: a row per recipe, checked against bf16's loss."""

import json

import pytest

from lowprec.tools import bench_step


def test_rows_and_memory(capsys):
    """--json prints ratios, losses near bf16's, and with --memory what fresh processes needed."""
    assert bench_step.main(["--recipes", "nvfp4", "--quick", "--threads", "1", "--json", "--memory"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["recipe"] == "nvfp4" and row["ratio_bf16"] > 0 and row["peak_mb"] > 0 and row["peak_bf16_mb"] > 0
    assert row["loss"] != row["loss_bf16"]


def test_a_model_that_computes_something_else_fails(capsys, monkeypatch):
    """A row whose loss is not bf16's is an error, whatever its time."""
    make = bench_step.make

    def broken(recipe, save="inputs"):
        model, plan = make(recipe, save)
        if recipe != "bf16":
            model.layers[0].mlp.up_proj.weight.data.mul_(50)
        return model, plan

    monkeypatch.setattr(bench_step, "make", broken)
    monkeypatch.setattr(bench_step, "LOSS_TOLERANCE", 1e-3)
    assert bench_step.main(["--recipes", "nvfp4", "--quick", "--threads", "1"]) == 1
    assert "nvfp4 is not near bf16's" in capsys.readouterr().err


def test_unknown_recipes_are_named():
    with pytest.raises(ValueError, match="did you mean 'nvfp4'"):
        bench_step.main(["--recipes", "nvfp5", "--quick"])
