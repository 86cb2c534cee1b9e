"""Building the C++ kernels: once, safely, and with an answer in words where it cannot be done; and other refusals."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec.kernels.cpu import CpuBackend
from lowprec.kernels.cpu.build import Unavailable, cpu_description
from lowprec.linear import Gemm, Operand, Rotation
from lowprec.numerics import FORMATS, Format

try:
    cpu_description()
    MISSING = ""
except Unavailable as error:
    MISSING = str(error)
needs_cpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)
NVFP4 = Gemm(Operand(FORMATS["nvfp4"]), Operand(FORMATS["nvfp4_2d"]))
CPU = torch.device("cpu")

REPORT = """
import torch
from lowprec.kernels.cpu import CpuBackend
from lowprec.linear import QuantizedLinear, Gemm, Operand
from lowprec.numerics import FORMATS
torch.manual_seed(0)
y = QuantizedLinear(64, 64, bias=False, recipe="nvfp4")(torch.randn(32, 64))
gemm = Gemm(Operand(FORMATS["nvfp4"]), Operand(FORMATS["nvfp4_2d"]))
print(CpuBackend().refuses(gemm, "fprop", 32, 64, 64, torch.float32, torch.device("cpu")))
print(y.double().sum().item().hex(), tuple(y.shape))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that runs one NVFP4 layer with its own cache; prints the refusal (or None) and the result."""
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


@needs_cpu
def test_two_processes_build_once_and_agree(tmp_path: Path) -> None:
    """Two processes that start together share one library; a third finds it there, untouched."""
    first, second = start(tmp_path), start(tmp_path)
    results = [finish(first), finish(second)]
    assert results[0] == results[1] and results[0][0] == "None"
    (library,) = (tmp_path / "lowprec").glob("*.so")
    assert [p.suffix for p in sorted((tmp_path / "lowprec").iterdir())] == [".lock", ".so"]
    written = library.stat().st_mtime_ns
    assert finish(start(tmp_path)) == results[0]
    assert library.stat().st_mtime_ns == written


@needs_cpu
def test_without_a_compiler_it_says_so_and_torch_takes_over(tmp_path: Path) -> None:
    """No compiler and an empty cache: a sentence, and the layer still computes, with plain torch."""
    reason, result = finish(start(tmp_path, CXX="/nonexistent/c++"))
    assert "no C++ compiler" in reason and "/nonexistent/c++" in reason and "install" in reason
    assert result.endswith("(32, 64)")
    assert not list(tmp_path.rglob("*.so"))


@needs_cpu
def test_a_failing_compiler_and_an_unusable_cache_are_reported(tmp_path: Path) -> None:
    """A compiler that fails, and a cache folder that is a file, each give their own sentence."""
    failing = tmp_path / "failing-c++"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: no space" >&2\nexit 1\n')
    failing.chmod(0o755)
    broken = start(tmp_path / "cache", CXX=str(failing))
    (tmp_path / "file").write_text("")
    unusable = start(tmp_path / "file")
    assert "no space" in finish(broken)[0]
    assert "XDG_CACHE_HOME" in finish(unusable)[0]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("gemm", "sizes", "words"),
    [
        (Gemm(), (64, 64, 64), "neither operand"),
        (Gemm(*(Operand(FORMATS["if4"]),) * 2), (64, 64, 64), "two elements"),
        (Gemm(*(Operand(FORMATS["quest_int4"], "stochastic"),) * 2), (64, 64, 64), "stochastically"),
        (Gemm(*(Operand(dataclasses.replace(FORMATS["nvfp4_46"], block=(1, 256))),) * 2), (64, 64, 256), "targets"),
        (Gemm(*(Operand(dataclasses.replace(FORMATS["nvfp4_46"], block=(32, 16))),) * 2), (64, 64, 64), "targets"),
        (Gemm(*(Operand(FORMATS["int8_row"]),) * 2), (64, 64, 262144), "overflow"),
        (dataclasses.replace(NVFP4, inner=Rotation(0)), (64, 64, 944), "Hadamard"),
        (dataclasses.replace(NVFP4, inner=Rotation(256)), (64, 64, 128), "k = 128"),
        (NVFP4, (60, 64, 64), "m = 60 is not a positive multiple of 16"),
        (NVFP4, (64, 64, 72), "k = 72"),
        (Gemm(Operand(FORMATS["fp8_1x128"]), Operand(FORMATS["fp8_128x128"])), (64, 64, 128), "n = 64"),
        (Gemm(*(Operand(Format("odd", "e4m3", (1, 48))),) * 2), (64, 64, 96), "powers of two"),
        (Gemm(*(Operand(Format("odd", "e4m3", (8, 32))),) * 2), (64, 64, 96), "free axis"),
    ],
)
def test_refusals_name_the_reason(gemm: Gemm, sizes: tuple[int, int, int], words: str) -> None:
    """What the kernels cannot do is refused in one sentence that names it."""
    reason = CpuBackend().refuses(gemm, "fprop", *sizes, torch.bfloat16, CPU)
    assert reason is not None and words in reason and len(reason) < 200


def test_other_devices_and_dtypes_are_refused() -> None:
    """CUDA tensors and half precision are somebody else's, and so is an unquantised operand in fp32."""
    backend = CpuBackend()
    one_sided = Gemm(Operand(FORMATS["nvfp4"]), Operand())
    assert "bfloat16" in str(backend.refuses(one_sided, "fprop", 64, 64, 64, torch.float32, CPU))
    assert "cuda" in str(backend.refuses(NVFP4, "fprop", 64, 64, 64, torch.bfloat16, torch.device("cuda")))
    assert "float16" in str(backend.refuses(NVFP4, "fprop", 64, 64, 64, torch.float16, CPU))


@needs_cpu
def test_an_unknown_number_of_tokens_is_no_reason() -> None:
    """While a plan is made the number of tokens is open: forward (m) and weight gradient (k) are accepted."""
    backend = CpuBackend()
    assert backend.refuses(NVFP4, "fprop", None, 64, 64, torch.bfloat16, CPU) is None
    assert backend.refuses(NVFP4, "wgrad", 64, 64, None, torch.bfloat16, CPU) is None
