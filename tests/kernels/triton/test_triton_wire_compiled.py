"""The wire kernels as compiled: the PTX executed makes the codec's bytes and numbers, and moves what it must."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.comm import CODECS, Codec
from lowprec.comm.codec import PLAIN, QUANTIZED
from lowprec.kernels.testing.chips import PRODUCT
from lowprec.kernels.testing.compile import Compiled, compile_for, signature_of
from lowprec.kernels.testing.ptx import Run, run_ptx
from lowprec.kernels.triton import wire
from lowprec.kernels.triton.memory import Launch
from lowprec.numerics import Stream

STREAM = Stream(1, (1 << 31) + 7, 2, "layer")
N, ROWS = 4096, 3


def on(arch: str, proofs: list[tuple[Launch, Compiled, Run]]) -> Any:
    """A `start` that compiles for `arch` as the GPU's runtime would, executes, and notes it in `proofs`."""

    def start(launch: Launch) -> None:
        free = {p.name for p in launch.kernel.params if p.do_not_specialize}
        whole = [n for n, v in launch.args.items() if type(v) is int and v % 16 == 0 and n not in free]
        c = compile_for(launch.kernel, signature_of(launch.args), launch.constants, arch, align=whole,
                        num_warps=launch.warps)  # fmt: skip
        proofs.append((launch, c, run_ptx(c, launch.grid, launch.args)))

    return start


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


def row_of(codec: Codec, n: int) -> wire.Row:
    return wire.Row(codec.format or PLAIN[codec.name], codec.rotation, n, codec.width(n), *codec._layout(n))


def prove(codec: Codec, arch: str, dtype: torch.dtype = torch.float32, n: int = N) -> None:
    """Encode and sum: equal, nothing spilled, 16-byte accesses of numbers, words of codes, 1.05 of the bytes."""
    x = torch.randn(ROWS, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 32:64] = 0
    x[2] *= 1e-30
    payload, row = codec.encode(x, STREAM, "key"), row_of(codec, n)
    proofs: list[tuple[Launch, Compiled, Run]] = []
    if codec.format:
        random = (STREAM, "key") if codec.rounding == "stochastic" else None
        assert torch.equal(wire.encode(x, row, random, arch=arch, start=on(arch, proofs)), payload)
    encoders = len(proofs)
    total = wire.decode(payload, row, sum_rows=True, start=on(arch, proofs))
    assert same(total, codec.decode_sum(payload, n))
    for i, (launch, c, run) in enumerate(proofs):
        assert not c.over_limits() and c.stack_bytes == 0 and not run.approximate
        if n % 256:
            continue
        widths = c.global_accesses()
        given = launch.args["x_ptr" if i < encoders else "out_ptr"]
        moved = given.numel() * given.element_size()
        if "amax_ptr" not in launch.args or launch.constants.get("F"):  # not the first pass, which writes no payload
            moved += payload.numel()
        factors = 4 * codec.rotation * launch.grid[0] * launch.grid[1]  # from the cache, not from memory
        assert run.moved_bytes() <= 1.05 * moved + factors
        numbers, codes = ("load", "store") if i < encoders else ("store", "load")
        assert widths[numbers][16] and set(widths[numbers]) <= {4, 16}
        least = 16 if codec.name in PLAIN else 8 if codec.format and codec.format.bits == 8 else 4
        assert launch.constants.get("UNIT", least) in (1 if least == 16 else least,)
        assert launch.kernel is wire.row_amax_kernel or widths[codes][least]


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize("name", QUANTIZED)
def test_codecs(name: str, arch: str) -> None:
    prove(CODECS[name], arch)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_sums(name: str) -> None:
    prove(CODECS[name], "sm_100")


@pytest.mark.parametrize(
    ("name", "rotation", "arch"), [("int8", 64, "sm_90"), ("nvfp4", 128, "sm_100"), ("int4", 16, "sm_120")]
)
def test_rotated_and_stochastic(name: str, rotation: int, arch: str) -> None:
    prove(replace(CODECS[name], rotation=rotation, rounding="stochastic"), arch, torch.bfloat16)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_ragged(name: str) -> None:
    """Byte by byte: neither codes nor scales begin at a word."""
    prove(replace(CODECS[name], rounding="stochastic"), "sm_90", n=171)


@pytest.mark.parametrize(("name", "dtype"), [("nvfp4", torch.bfloat16), ("int8", torch.float32)])
def test_decode(name: str, dtype: torch.dtype) -> None:
    codec, proofs = CODECS[name], []
    payload = codec.encode(torch.randn(ROWS, N))
    y = wire.decode(payload, row_of(codec, N), dtype, start=on("sm_100", proofs))
    assert y.dtype == dtype and same(y, codec.decode(payload, N, dtype))
    _, c, run = proofs[0]
    assert c.stack_bytes == 0 and c.global_accesses()["store"][16]
    assert run.moved_bytes() <= 1.05 * (payload.numel() + y.numel() * y.element_size())


def test_conversions_of_the_chip() -> None:
    """NVFP4 is rounded by the instruction from sm_100 on, E4M3 from sm_90 on."""
    x = torch.randn(1, N)
    for name, arch, text in (
        ("nvfp4", "sm_100", r"cvt\.rn\.satfinite\.e2m1x2\.f32"),
        ("nvfp4", "sm_120", r"cvt\.rn\.satfinite\.e2m1x2\.f32"),
        ("fp8", "sm_90", r"cvt\.rn\.satfinite\.e4m3x2\.f32"),
    ):
        proofs: list[tuple[Launch, Compiled, Run]] = []
        wire.encode(x, row_of(CODECS[name], N), arch=arch, start=on(arch, proofs))
        assert proofs[-1][1].count_ptx(text)
