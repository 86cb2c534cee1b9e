"""Formats beyond NVFP4 as compiled: the PTX executed equals the definition, without spills, by 16-byte loads.

Every element, scale, tensor scale and rounding is compiled for one chip at least; names that differ from one of these
in a constant only are left to the interpreter.
"""

import pytest
import torch

from lowprec.kernels.triton.launch import quantize
from lowprec.numerics.element import ELEMENTS
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import Proof, assert_equal, on

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")
NEAREST = {"e2m1": 100, "e2m3": 100, "e3m2": 100, "e4m3": 89, "e5m2": 89}  # the first chip that converts
CASES = [  # format, chip, stochastic, columns too
    ("nvfp4_row", "sm_100", False, False),
    ("nvfp4_double", "sm_90", False, False),
    ("nvfp4_double", "sm_120", True, False),
    ("nvfp4_ue5m3", "sm_100", False, False),
    ("nvfp4_ue5m3", "sm_90", True, False),
    ("nvfp4_46", "sm_100", False, True),
    ("nvfp4_46", "sm_90", False, False),
    ("if4", "sm_100", False, False),
    ("ufp4", "sm_100", False, False),
    ("mxfp4_sr", "sm_120", True, False),
    ("mxfp6_e3m2", "sm_100", False, True),
    ("mxfp6_e2m3", "sm_90", True, False),
    ("mxfp6_e2m3", "sm_120", False, False),
    ("mxfp8_even", "sm_90", False, False),
    ("mxfp8_e5m2", "sm_100", False, False),
    ("mxfp8", "sm_100", True, True),
    ("fp8_tensor_e5m2_pow2", "sm_90", True, False),
    ("fp8_1x128_pow2", "sm_120", True, False),
    ("int8_row", "sm_100", True, False),
    ("int8_1x32_pow2", "sm_90", False, False),
    ("int4_1x32_pow2", "sm_120", False, True),
    ("int4_row", "sm_100", True, False),
]


def matrix(rows: int = 128, k: int = 128) -> torch.Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[1, 16:32] = 0
    x[2] *= 1e-30
    x[3, :16] = torch.tensor([0.25, -0.75, 1.25, 2.5, 3.5, -5.0, 6.0, -0.0]).repeat(2)
    return x


def assert_sound(proof: Proof) -> None:
    """No spills, nothing beyond the chip, 16-byte loads of x and no narrower ones but maxima."""
    c = proof.compiled
    assert not c.over_limits() and c.stack_bytes == 0, c.over_limits()
    widths = c.global_accesses()["load"]
    assert widths[16] and sum(n for width, n in widths.items() if width < 16) <= 8, widths


@pytest.mark.parametrize(("name", "arch", "stochastic", "columns"), CASES)
def test_compiled(name: str, arch: str, stochastic: bool, columns: bool) -> None:
    f, x, proofs = FORMATS[name], matrix(), list[Proof]()
    stream = STREAM if stochastic else None
    out = quantize(x, f, columns=columns, stream=stream, arch=arch, start=on(arch, proofs))
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, STREAM.noise("rows", x.shape) if stochastic else None))
    if columns:
        assert out.columns
        assert_equal(out.columns.qtensor(), f.quantize(x.T, STREAM.noise_like("columns", x.T) if stochastic else None))
    for proof in proofs:
        assert_sound(proof)
    hardware = not stochastic and int(arch[3:]) >= NEAREST.get(f.element, 999)
    assert bool(proofs[-1].compiled.count_ptx(rf"cvt\.rn\.satfinite\.{f.element}x2\.f32")) == hardware or (
        f.element == "e4m3"  # which also makes the scales
    )


def test_transposed_and_strided_inputs_compiled() -> None:
    """Columns in memory order; rows that lie 144 apart and end within a tile, their scales swizzled."""
    f = FORMATS["nvfp4"]
    for x, arch, swizzle in ((matrix().T, "sm_120", False), (matrix(130, 144)[:, 16:96], "sm_90", True)):
        proofs: list[Proof] = []
        out = quantize(x, f, swizzle=swizzle, arch=arch, start=on(arch, proofs))
        assert out.rows
        assert_equal(out.rows.qtensor(), f.quantize(x))
        for proof in proofs:
            assert_sound(proof)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_e5m2"])
def test_hardware_stochastic_rounding_of_bytes(name: str) -> None:
    """`cvt.rs` to four codes: every value is one of its two neighbours, the mean error is near zero."""
    f, x, proofs = FORMATS[name], matrix(), list[Proof]()
    out = quantize(x, f, stream=STREAM, hardware_noise=True, arch="sm_100", start=on("sm_100", proofs))
    assert out.rows
    assert_sound(proofs[-1])
    wanted = rf"cvt\.rs\.satfinite\.{f.element}x4\.f32"
    assert proofs[-1].compiled.count_ptx(wanted) == proofs[-1].elements_per_thread // 4
    q = out.rows.qtensor()
    assert torch.equal(q.scales.float(), f.quantize(x).scales.float())
    u = x.float() / q.block_scales().repeat_interleave(32, 1)
    element = ELEMENTS[f.element]
    low = element.round(u, torch.full_like(u, 1 - 2.0**-20))  # nothing is above this noise: towards zero
    high = element.round(u, torch.full_like(u, 2.0**-24))
    value = q.values()
    assert bool(((value == low) | (value == high)).all())
    step = (high - low).abs()
    inside = step > 0
    up = ((value == high) & inside).sum() / ((u - low).abs() / step)[inside].sum()
    assert abs(float(up) - 1) < 0.05  # as often as it is near, less 2^-9 of a step
