"""tools/bench_quantize: it runs both ways, covers what it names, and catches wrong bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowprec.numerics import FORMATS
from lowprec.tools import bench_quantize

ROOT = Path(bench_quantize.__file__).resolve().parent.parent
ARGUMENTS = ["--shape", "64", "128", "--threads", "1", "--quick"]


@pytest.mark.parametrize("command", [["tools/bench_quantize.py"], ["-m", "lowprec.tools.bench_quantize"]])
def test_runs_as_script_and_as_module(command: list[str]) -> None:
    """Both ways of calling print one JSON row for each format, dtype and rounding, all of them equal."""
    done = subprocess.run(
        [sys.executable, *command, *ARGUMENTS, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert {row["format"] for row in rows} == set(bench_quantize.QUICK)
    assert {(row["rounding"], row["dtype"]) for row in rows} == {
        (rounding, dtype) for rounding in ("nearest", "stochastic") for dtype in ("float32", "bfloat16")
    }
    assert all(row["equal"] and row["ratio_copy"] > 0 for row in rows)


def test_the_formats_of_the_targets_are_all_served(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --formats every shipped format with a regular grid is measured; only IF4 is left out."""
    assert bench_quantize.main(["--shape", "64", "128", "--threads", "1", "--reps", "1", "--json"]) == 0
    served = {row["format"] for row in json.loads(capsys.readouterr().out)}
    assert set(FORMATS) - served == {name for name, f in FORMATS.items() if f.second}


@pytest.mark.parametrize("spoil", ["one code", "sign of zero", "swallowed nan"])
def test_wrong_bits_are_found(spoil: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One wrong element, +0 for -0, or a number where a NaN belongs: marked, said in a sentence, exit code 1."""
    honest = bench_quantize.fast

    def wrong(x: Tensor, *arguments: object) -> Tensor:
        y = honest(x, *arguments).clone()  # type: ignore[arg-type]
        if spoil == "one code":
            y[0, 5] *= 1.5
        return y + 0.0 if spoil == "sign of zero" else y.nan_to_num(1.0) if spoil == "swallowed nan" else y

    monkeypatch.setattr(bench_quantize, "fast", wrong)
    assert bench_quantize.main([*ARGUMENTS, "--formats", "mxfp4"]) == 1
    captured = capsys.readouterr()
    assert "WRONG" in captured.out and "not the bits of the definition: mxfp4 nearest" in captured.err


def test_formats_take_commas_and_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    """Names separated either way, or both, are measured in the order given."""
    assert bench_quantize.main([*ARGUMENTS, "--json", "--formats", "mxfp8,nvfp4", "mxfp4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(row["format"] for row in rows)) == ["mxfp8", "nvfp4", "mxfp4"]


def test_unknown_format_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence with the valid names, exit code 2."""
    assert bench_quantize.main(["--formats", "nvfp5"]) == 2
    assert "unknown format 'nvfp5'; choose from nvfp4" in capsys.readouterr().err


def test_same_bits() -> None:
    """Equal NaNs are equal; zeros of other signs and NaN against a number are not."""
    nan = torch.tensor([torch.nan, 1.0])
    assert bench_quantize.same_bits(nan, nan.clone())
    assert not bench_quantize.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bench_quantize.same_bits(nan, torch.tensor([0.0, 1.0]))
