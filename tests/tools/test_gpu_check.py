"""tools/gpu_check: its checks run here in the interpreter, agree, and find a kernel that is made wrong on purpose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton import choose
from lowprec.kernels.triton_backend import TritonBackend
from lowprec.tools import bench_linear, gpu_check, gpu_checks, gpu_speed, kernel_measure

ROOT = Path(gpu_check.__file__).resolve().parent.parent
CPU = torch.device("cpu")


@triton.jit
def forgetful_max(low, high, CHIP: tl.constexpr):
    """Ignores half of every segment."""
    return tl.max(tl.abs(low), 1)


@pytest.mark.parametrize(
    ("group", "only", "least"),
    [
        ("definition", "nvfp4", 7),
        ("kernels", "nvfp4 rows rotated by 16, hardware stochastic", 1),
        ("kernels", "decode_sum: int8", 1),
        ("backends", "nvfp4", 3),
    ],
)
def test_everything_agrees(group: str, only: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The definition, kernels against the executor, products against the oracle: exit code 0."""
    assert gpu_check.main(["--interpret", "--group", group, "--only", only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"equal     {group}: ") for line in lines) >= least
    assert lines[-1].endswith("agree, 0 differ, 0 left out")


def test_there_is_a_check_for_every_kernel() -> None:
    """Every variant that can be executed, every codec, the update, and every product of the recipes."""
    names = {f"{c.group}: {c.name}" for c in gpu_checks.checks(CPU, gpu_check.GROUPS)}
    for variant in kernel_measure.variants():
        assert (f"kernels: {variant.kernel}: {variant.name}" in names) == variant.executes
    for word in ("codec int4", "adamw", "nvfp4 rotated by 128", "fp8_row with inf", "scaled_mm, mxfp8 wgrad", "limits"):
        assert any(word in name for name in names), word


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A block's maximum over half of the block: codes differ from the definition, exit code 1."""
    monkeypatch.setattr(choose, "segment_max", forgetful_max)
    assert gpu_check.main(["--interpret", "--group", "definition", "--only", "mxfp8 nearest"]) == 1
    out = capsys.readouterr().out
    assert "WRONG     definition: mxfp8 nearest" in out and "codes differ" in out


def test_a_kernel_that_the_device_runs_differently_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The executor runs what was launched; a device that ran something else is caught by the comparison."""
    honest = gpu_checks.copied

    def other(args: dict, device: torch.device) -> dict:
        return {n: 0.5 * v if n == "x_ptr" else v for n, v in honest(args, device).items()}

    monkeypatch.setattr(gpu_checks, "copied", other)
    assert gpu_check.main(["--interpret", "--group", "kernels", "--only", "amax: of the rows"]) == 1
    assert "amax_ptr of amax_kernel differs from the compiled PTX" in capsys.readouterr().out


def test_a_backend_of_zeros_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TritonBackend, "multiply", lambda self, a, b, gemm, dtype: torch.zeros(32, 64, dtype=dtype))
    assert gpu_check.main(["--interpret", "--group", "backends", "--only", "mxfp8 fprop"]) == 1
    assert "all zeros" in capsys.readouterr().out


def test_a_kernel_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of resources\nmore")

    monkeypatch.setattr(gpu_checks._Product, "__call__", broken)
    assert gpu_check.main(["--interpret", "--group", "backends", "--only", "mxfp8 fprop"]) == 1
    assert "RuntimeError: out of resources\n" in capsys.readouterr().out


def test_nothing_to_check_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--interpret", "--only", "no such check"]) == 2
    assert "no such check" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["tools/gpu_check.py"], ["-m", "lowprec.tools.gpu_check"]])
def test_without_a_gpu(command: list[str]) -> None:
    """One sentence and exit code 2."""
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=blind, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr and "--interpret" in done.stderr


def test_arguments_keep_strides_and_aliases() -> None:
    """Two views of one buffer are two views of one buffer on the device as well."""
    words = torch.arange(8, dtype=torch.int32)
    args = {"words": words[2:], "bytes": words.view(torch.uint8), "t": torch.ones(3, 5).T, "n": 3}
    there = gpu_checks.copied(args, CPU)
    there["words"][0] = 99
    assert there["bytes"].view(torch.int32)[2] == 99 and words[2] == 2
    assert there["t"].stride() == (1, 5) and there["n"] == 3


def test_the_bytes_of_a_launch() -> None:
    """Every tensor once, also one that was passed twice."""
    x, amax = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(1)
    launch = type("Launch", (), {"args": {"x_ptr": x, "amax_ptr": amax, "amax_t_ptr": amax, "n": 16}})
    assert gpu_speed.least_bytes(launch) == 36
    row = gpu_speed.Speed("quantize_kernel", "nvfp4 rows, nearest", 10.0, 36_000_000, 0.45)
    assert "3,600" in gpu_speed.table([row]) and "45%" in gpu_speed.table([row])


def test_speed_takes_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of a kernel are rows of their own, their share is bytes over bandwidth over time (here made up)."""
    monkeypatch.setattr(gpu_speed, "SHAPE", (128, 128))
    monkeypatch.setattr(gpu_speed, "CASES", gpu_speed.CASES[2:3])
    monkeypatch.setattr(gpu_speed, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(gpu_speed, "seconds", lambda launch, reps: 1e-3)
    with interpreted():
        rows = gpu_speed.measure(CPU)
    assert [row.kernel for row in rows] == ["amax_kernel", "quantize_kernel"]
    assert all(row.case == "nvfp4 rows rotated, nearest" for row in rows)
    for row in rows:
        assert row.moved_bytes >= 128 * 128 * 2 and row.share == pytest.approx(row.moved_bytes / 1e6)


def test_bench_linear_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_linear.main(["--device", "cuda", "--quick"]) == 2
    assert "no CUDA device: " in capsys.readouterr().err


def test_backends_side_by_side() -> None:
    """What serves is measured, what refuses is listed, peers that are not installed say so."""
    rows, refused = bench_linear.measure_backends(
        ["nvfp4", "int8_pow2"], (32, 64, 64), 1, ("torch", "scaled_mm"), "cpu"
    )
    assert [(row.recipe, row.backend) for row in rows] == [("nvfp4", "torch"), ("int8_pow2", "torch")]
    assert all(row.right for row in rows)
    assert rows[0].te == rows[0].torchao == "not installed" and rows[1].te == "no such recipe"
    assert len(refused) == 2 and refused[0].startswith("nvfp4: backend 'scaled_mm' refuses")
    text = bench_linear.table(rows)
    assert "torchao" in text and "not installed" in text
