"""The quantise kernels as compiled: the PTX executed equals the definition, the machine code is what was meant."""

import pytest
import torch

from lowprec.kernels.testing.chips import PRODUCT
from lowprec.kernels.triton.launch import quantize
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import Proof, assert_equal, on

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")
# format, columns -> bytes moved an element at least: in, codes, scales
BYTES = {
    ("nvfp4", False): 2.5625,
    ("nvfp4", True): 3.125,
    ("nvfp4_2d", True): 2 + 2 * (1 / 2 + 1 / 256),
    ("mxfp4", False): 2 + 1 / 2 + 1 / 32,
    ("mxfp8", False): 3 + 1 / 32,
    ("mxfp8", True): 2 + 2 * (1 + 1 / 32),
    ("fp8_1x128", False): 3 + 4 / 128,
    ("fp8_128x128", True): 4.0,
    ("fp8_tensor", False): 3.0,
    ("fp8_row", False): 3.0,
}


def prove(
    name: str,
    arch: str,
    columns: bool = False,
    stochastic: bool = False,
    shape: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> Proof:
    f = FORMATS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    x[1, 16:32] = 0
    x[2] *= 1e-30
    proofs: list[Proof] = []
    out = quantize(x, f, columns=columns, stream=STREAM if stochastic else None, arch=arch, start=on(arch, proofs))
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, STREAM.noise("rows", x.shape) if stochastic else None))
    if columns:
        assert out.columns
        noise = STREAM.noise_like("columns", x.T) if stochastic else None
        assert_equal(out.columns.qtensor(), f.quantize(x.T, noise))
    for proof in proofs:
        assert not proof.compiled.over_limits() and proof.compiled.stack_bytes == 0
    return proofs[-1]


def assert_lean(proof: Proof, least: float, elements: int) -> None:
    """16-byte loads of x and no narrower ones; at most 1.05 of the bytes that must move."""
    widths = proof.compiled.global_accesses()["load"]
    assert widths[16] and sum(n for width, n in widths.items() if width < 16) <= 8  # the others: maxima
    assert proof.run.moved_bytes() <= 1.05 * least * elements


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize("stochastic", [False, True])
def test_nvfp4_rows(arch: str, stochastic: bool) -> None:
    proof = prove("nvfp4", arch, stochastic=stochastic)
    assert_lean(proof, BYTES["nvfp4", False], 128 * 128)
    hardware = arch != "sm_90" and not stochastic
    assert proof.compiled.count_ptx(r"cvt\.rn\.satfinite\.e2m1x2") == (
        proof.elements_per_thread // 2 if hardware else 0
    )
    assert bool(proof.compiled.count(r"F2FP.*E2M1")) == hardware
    if arch == "sm_100" and not stochastic:  # below memory time on a B200: 2.5625 bytes an element allow 11.2
        chip = proof.compiled.chip
        assert chip.issue_seconds(proof.instructions_per_element) < chip.memory_seconds(2.5625)


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize("stochastic", [False, True])
def test_nvfp4_rows_and_columns(arch: str, stochastic: bool) -> None:
    proof = prove("nvfp4", arch, True, stochastic)
    assert_lean(proof, BYTES["nvfp4", True], 128 * 128)


@pytest.mark.parametrize(
    ("name", "columns", "arch"),
    [
        ("mxfp4", False, "sm_120"),
        ("mxfp8", False, "sm_90"),
        ("mxfp8", True, "sm_100"),
        ("nvfp4_2d", True, "sm_100"),
        ("fp8_128x128", True, "sm_90"),
        ("fp8_1x128", False, "sm_90"),
        ("fp8_tensor", False, "sm_100"),
        ("fp8_row", False, "sm_90"),
    ],
)
def test_other_formats(name: str, columns: bool, arch: str) -> None:
    proof = prove(name, arch, columns)
    assert_lean(proof, BYTES[name, columns], 128 * 128)
    if FORMATS[name].element == "e4m3":
        assert proof.compiled.count_ptx(r"cvt\.rn\.satfinite\.e4m3x2\.f32")


def test_ragged_fp32() -> None:
    prove("nvfp4", "sm_100", shape=(33, 72), dtype=torch.float32)


def test_hardware_stochastic_rounding() -> None:
    """`cvt.rs`: every value is one of its two neighbours, and the mean error over a tensor is near zero."""
    f, x = FORMATS["nvfp4"], torch.randn(128, 128, generator=torch.Generator().manual_seed(5))
    proofs: list[Proof] = []
    out = quantize(x, f, stream=STREAM, hardware_noise=True, arch="sm_100", start=on("sm_100", proofs))
    assert out.rows
    c = proofs[-1].compiled
    assert c.count_ptx(r"cvt\.rs\.satfinite\.e2m1x4\.f32") == proofs[-1].elements_per_thread // 4 and not c.stack_bytes
    q, nearest = out.rows.qtensor(), f.quantize(x)
    assert torch.equal(q.scales.float(), nearest.scales.float())
    scale = nearest.block_scales().repeat_interleave(16, 1) * nearest.tensor_scale
    u = x / scale
    step = torch.where(u.abs() < 2, 0.5, torch.where(u.abs() < 4, 1.0, 2.0))
    error = q.values() - u
    inside = u.abs() <= 6
    assert bool((error.abs() < step * 1.0001)[inside].all()) and bool((error.abs() > 0.26)[inside].any())
    assert abs(float((error / step)[inside].mean())) < 0.01
