"""tools/bench_comm: it runs both ways, covers every codec and every comm=, and catches wrong bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.comm import CODECS, Codec
from lowprec.tools import bench_comm

ROOT = Path(bench_comm.__file__).resolve().parent.parent
ARGUMENTS = ["--shape", "2", "1000", "--threads", "1", "--reps", "1"]


def test_runs_as_a_script_and_covers_everything() -> None:
    """One JSON row for each codec and variant, all with the right bits; two for each file of recipes/comm."""
    done = subprocess.run(
        [sys.executable, "tools/bench_comm.py", *ARGUMENTS, "--json"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    quantised = {
        (n, r, s) for n in CODECS if n not in ("fp32", "bf16") for r, s in ((0, "stochastic"), (64, "nearest"))
    }
    assert {(r["codec"], r["rotation"], r["rounding"]) for r in printed["codecs"]} == quantised | {
        (name, 0, "nearest") for name in CODECS
    }
    for row in printed["codecs"]:
        assert row["equal"] and min(row["encode_copies"], row["decode_copies"], row["sum_copies"]) > 0
        assert row["bits_per_value"] == Codec(row["codec"], row["rotation"], row["rounding"]).bits_per_value(1000)
    files = [path.stem for path in bench_comm.RECIPES.glob("*.yaml")]
    rows = [(c["comm"], c["matrix"]) for c in printed["bytes"]]
    assert sorted(rows) == sorted((file, matrix) for file in files for matrix in ("quantised", "other"))


def test_bytes_are_those_of_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 is 2 + 2 + 2; NVFP4 weights and eight-bit gradients stay under 2.2; ZeRO++ sends least between nodes."""
    assert bench_comm.main([*ARGUMENTS, "--codecs", "bf16", "--rotation", "0", "--json"]) == 0
    costs = {(c["comm"], c["matrix"]): c for c in json.loads(capsys.readouterr().out)["bytes"]}
    assert costs["bf16", "other"]["total"] == 6 and costs["fp32", "other"]["total"] == 8
    codes = (4 + 8 / 256) / 8  # one E4M3 scale a 16 x 16 block
    assert costs["nvfp4_fp8", "quantised"]["total"] == 2 * codes + 8.25 / 8 < 2.2
    assert costs["nvfp4_fp8_ef", "quantised"]["total"] == costs["nvfp4_fp8", "quantised"]["total"]
    zeropp = costs["zeropp", "other"]
    assert zeropp["between_nodes"] == pytest.approx(8.25 / 8 + 4.25 / 64, rel=1e-5)
    assert zeropp["between_nodes"] == min(c["between_nodes"] for c in costs.values())
    assert bench_comm.main([*ARGUMENTS, "--codecs", "int8", "--codes", "fp8_128x128"]) == 0
    printed = capsys.readouterr().out
    assert "int8, stochastic" in printed and "int8 rotated by 64" in printed and "fp8_128x128" in printed


def test_wrong_bits_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that is off, or a NaN that became a number: marked, said in a sentence, exit code 1."""
    honest = Codec.decode
    for spoil in (lambda y: y * (1 + 2**-20), lambda y: y.nan_to_num(1.0)):
        monkeypatch.setattr(Codec, "decode", lambda self, payload, n, spoil=spoil: spoil(honest(self, payload, n)))
        assert bench_comm.main([*ARGUMENTS, "--codecs", "nvfp4", "--rotation", "0"]) == 1
        captured = capsys.readouterr()
        assert "WRONG" in captured.out and "not the bits of the definition: nvfp4 nearest" in captured.err


def test_an_unknown_codec_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence with the valid names, exit code 2."""
    assert bench_comm.main(["--codecs", "fp4"]) == 2
    assert "unknown codec 'fp4'; choose from fp32, bf16" in capsys.readouterr().err
