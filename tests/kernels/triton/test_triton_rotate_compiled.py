"""Rotations as compiled: the PTX executed equals the definition, and they add instructions but no memory traffic."""

import pytest
import torch

from lowprec.kernels.testing.chips import PRODUCT
from lowprec.kernels.triton.launch import quantize
from lowprec.kernels.triton.rotate import Turn, rotate
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.hadamard import fixed_signs
from lowprec.numerics.hadamard import rotate as defined
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import Proof, assert_equal, on

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")
FIXED = Turn.of(16, fixed_signs(16), fixed=True)
ROWS, BOTH = 2.5625, 3.125  # bytes an element of bf16 -> NVFP4, in one direction and in two


def matrix(along: bool = True) -> torch.Tensor:
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[1, 16:32] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    return x if along else x.T.contiguous().T


def signs_of(turn: Turn) -> torch.Tensor:
    return torch.tensor([-1.0 if turn.signs >> e & 1 else 1.0 for e in range(turn.size)])


def prove(arch: str, turn: Turn | None, turn_columns: Turn | None, *, rows: bool = True, columns: bool = False,
          stochastic: bool = False, along: bool = True) -> list[Proof]:  # fmt: skip
    """NVFP4 of both passes, equal to the definition; without spills, and within 1.05 of the least bytes."""
    f, x, proofs = FORMATS["nvfp4"], matrix(along), []
    out = quantize(
        x, f, rows=rows, columns=columns, turn=turn, turn_columns=turn_columns, stream=STREAM if stochastic else None,
        arch=arch, start=on(arch, proofs),
    )  # fmt: skip
    for got, one, of, role in ((out.rows, turn, x, "rows"), (out.columns, turn_columns, x.T, "columns")):
        if got is not None:
            noise = STREAM.noise_like(role, of) if stochastic else None
            assert_equal(got.qtensor(), f.quantize(defined(of, one.size, signs_of(one)) if one else of, noise))
    assert [p.launch.kernel.__name__ for p in proofs] == ["amax_kernel", "quantize_kernel"]
    for proof, least in zip(proofs, (2.0, BOTH if rows and columns else ROWS), strict=True):
        assert not proof.compiled.over_limits()
        assert proof.run.moved_bytes() <= 1.05 * least * x.numel()
        widths = proof.compiled.global_accesses()["load"]
        assert widths[16] and sum(n for width, n in widths.items() if width < 16) <= 4  # the others: maxima
    return proofs


def assert_bound_by_memory(proof: Proof, moved: float) -> None:
    chip = proof.compiled.chip
    assert chip.issue_seconds(proof.instructions_per_element) < chip.memory_seconds(moved)


@pytest.mark.parametrize("arch", PRODUCT)
def test_rows_rotated(arch: str) -> None:
    proofs = prove(arch, FIXED, None)
    if arch == "sm_100":
        assert proofs[1].compiled.count(r"FADD2") * 2 == proofs[1].elements_per_thread * 4  # 4 distances, 2 at once
        assert proofs[1].instructions_per_element <= 10
        assert_bound_by_memory(proofs[0], 2)
        assert_bound_by_memory(proofs[1], ROWS)


@pytest.mark.parametrize("arch", PRODUCT)
def test_rows_and_columns_rotated(arch: str) -> None:
    proofs = prove(arch, None, FIXED, columns=True)
    if arch == "sm_100":
        assert proofs[1].instructions_per_element <= 18
        assert_bound_by_memory(proofs[0], 2)
        assert_bound_by_memory(proofs[1], BOTH)


@pytest.mark.parametrize(("columns", "most"), [(False, 14), (True, 27)])
def test_the_price_of_stochastic_rounding_in_hardware(columns: bool, most: float) -> None:
    proofs: list[Proof] = []
    turns = (None, FIXED) if columns else (FIXED, None)
    quantize(
        matrix(), FORMATS["nvfp4"], columns=columns, turn=turns[0], turn_columns=turns[1], stream=STREAM,
        hardware_noise=True, arch="sm_100", start=on("sm_100", proofs),
    )  # fmt: skip
    assert proofs[1].instructions_per_element <= most and not proofs[1].compiled.over_limits()
    assert proofs[1].compiled.count_ptx(r"cvt\.rs\.satfinite\.e2m1x4\.f32")


def test_new_signs_compile_nothing() -> None:
    """Signs of a step are arguments: two steps are one kernel."""
    a, b = (Turn.of(16, STREAM.signs(role, 16)) for role in ("one", "two"))
    assert a != b
    first, second = prove("sm_120", a, None)[1], prove("sm_120", b, None)[1]
    assert first.compiled.cubin == second.compiled.cubin


@pytest.mark.parametrize(
    ("arch", "n", "columns", "along"),
    [("sm_90", 128, False, True), ("sm_100", 32, True, False), ("sm_120", 64, True, True)],
)
def test_larger_blocks(arch: str, n: int, columns: bool, along: bool) -> None:
    """Of 32 to 128, whose segments are exchanged by shuffles."""
    turn = Turn.of(n, STREAM.signs("wgrad.signs", n))
    proofs = prove(arch, *((None, turn) if columns else (turn, None)), rows=not columns, columns=columns, along=along)
    assert all(proof.compiled.count(r"SHFL") for proof in proofs)


@pytest.mark.parametrize("arch", ["sm_120"])
def test_stochastic_rounding_after_a_rotation(arch: str) -> None:
    """In software: the bits of the definition."""
    prove(arch, None, FIXED, columns=True, stochastic=True)


@pytest.mark.parametrize("arch", PRODUCT)
@pytest.mark.parametrize(("n", "along"), [(16, True), (16, False), (128, True), (128, False)])
def test_a_matrix(arch: str, n: int, along: bool) -> None:
    """2 + 2 bytes an element, 16 at a time."""
    x, signs, proofs = matrix(along), fixed_signs(n), []
    out = rotate(x, n, signs, inverse=n == 128, arch=arch, start=on(arch, proofs))
    assert torch.equal(out, defined(x, n, signs, inverse=n == 128))
    accesses = proofs[0].compiled.global_accesses()
    assert set(accesses["load"]) == set(accesses["store"]) == {16} and not proofs[0].compiled.over_limits()
    assert proofs[0].run.moved_bytes() == 4 * x.numel()
    if arch == "sm_100":
        assert_bound_by_memory(proofs[0], 4)
