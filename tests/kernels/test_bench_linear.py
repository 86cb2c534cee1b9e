"""tools/bench_linear: it runs both ways, says what is what, and catches a layer that computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec.kernels.cpu.build import Unavailable, cpu_description
from lowprec.linear import BF16, QuantizedLinear, load_recipe
from lowprec.tools import bench_linear

try:
    cpu_description()
    MISSING = ""
except Unavailable as error:
    MISSING = str(error)
ROOT = Path(bench_linear.__file__).resolve().parent.parent
ARGUMENTS = ["--shape", "64", "128", "128", "--reps", "1", "--threads", "1"]


@pytest.mark.parametrize("command", [["tools/bench_linear.py"], ["-m", "lowprec.tools.bench_linear"]])
def test_runs_as_script_and_as_module(command: list[str]) -> None:
    """Both ways of calling print one JSON row for each recipe that has a target, and all rows are right."""
    done = subprocess.run(
        [sys.executable, *command, *ARGUMENTS, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [row["recipe"] for row in rows] == list(bench_linear.TARGETS)
    assert {"recipe", "backend", "ratio_bf16", "ratio_fp32", "snr_y", "snr_dx", "snr_dw"} <= set(rows[0])
    assert all(row["right"] and row["ratio_bf16"] > 0 and row["ratio_fp32"] > 0 for row in rows)
    assert MISSING or {row["backend"] for row in rows} == {"cpu"}


def test_every_shipped_recipe_is_as_precise_as_its_definition(capsys: pytest.CaptureFixture[str]) -> None:
    """`--recipes all` measures every precision file that quantises linear layers, and no row is wrong."""
    assert bench_linear.main([*ARGUMENTS, "--recipes", "all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert set(bench_linear.TARGETS) | {"bf16"} < {row["recipe"] for row in rows} and len(rows) > 40
    assert [row["recipe"] for row in rows] == bench_linear.shipped()


def test_recipes_with_commas_and_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Names may be separated by commas or spaces, and --quick names its own shape."""
    assert bench_linear.main(["--quick", "--recipes", "bf16,nvfp4", "mxfp4", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "512 tokens" in lines[0] and [line.split()[0] for line in lines[3:]] == ["bf16", "nvfp4", "mxfp4"]


def test_a_layer_that_quantises_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is fast because nothing is quantised is marked, and the exit code is 1."""
    honest = bench_linear.Problem.layer

    def lazy(self: bench_linear.Problem, recipe: str, backend: str) -> QuantizedLinear:
        layer = honest(self, recipe, backend)
        if backend != "torch":
            layer.recipe = BF16
        return layer

    monkeypatch.setattr(bench_linear.Problem, "layer", lazy)
    assert bench_linear.main([*ARGUMENTS, "--recipes", "nvfp4"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_layer_of_lower_precision_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP4 in the place of FP8 is found out as well."""
    honest = bench_linear.Problem.layer

    def coarse(self: bench_linear.Problem, recipe: str, backend: str) -> QuantizedLinear:
        layer = honest(self, recipe, backend)
        if backend != "torch":
            layer.recipe = load_recipe("nvfp4")
        return layer

    monkeypatch.setattr(bench_linear.Problem, "layer", coarse)
    assert bench_linear.main([*ARGUMENTS, "--recipes", "mxfp8"]) == 1


def test_unknown_recipe_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt recipe ends with exit code 2 and the list of valid names."""
    assert bench_linear.main([*ARGUMENTS, "--recipes", "nvfp5"]) == 2
    assert "nvfp4" in capsys.readouterr().err


def test_threads_option_is_what_the_kernels_use(capsys: pytest.CaptureFixture[str]) -> None:
    """--threads sets torch's number, which the kernels follow, and the table's title says it."""
    before = torch.get_num_threads()
    try:
        assert bench_linear.main([*ARGUMENTS[:-1], "2", "--recipes", "bf16"]) == 0
        assert torch.get_num_threads() == 2 and "2 thread(s)" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
