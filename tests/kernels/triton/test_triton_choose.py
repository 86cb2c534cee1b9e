"""Formats whose blocks choose: the kernels choose as `Format.quantize` does where errors are hard to compare."""

import pytest
import torch

from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton.launch import quantize
from lowprec.numerics.format import Format
from lowprec.numerics.formats import FORMATS
from tests.kernels.triton.proofs import Proof, assert_equal, on
from tests.kernels.triton.test_triton_formats import MORE

SOME = FORMATS | MORE


def check(f: Format, x: torch.Tensor, amax: torch.Tensor | None = None) -> None:
    with interpreted():
        out = quantize(x, f, amax=amax)
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x, amax=amax))


def normal(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["nvfp4_46", "if4", "if4_46", "square_46", "row_46", "group_if4", "plain_two"])
def test_all_magnitudes_of_a_tensor(name: str) -> None:
    """Squares underflow in small tensors, where the first candidate wins; values overflow in large ones."""
    f = SOME[name]
    more = (-145, -100, -77, -75, -74, 60, 110, 117) if name == "nvfp4_46" else ()
    for exponent in (-127, -90, -60, 120, 126, *more):
        check(f, normal(16, 128, exponent + 200) * 2.0**exponent)


@pytest.mark.parametrize("exponent", [-120, -100, -91, -60, 100])
def test_a_given_maximum_far_from_the_tensors_own(exponent: int) -> None:
    for name in ("nvfp4_46", "if4_46"):
        for own in (-100, -76, 0):
            check(SOME[name], normal(16, 32) * 2.0**own, torch.tensor(2.0**exponent))


def test_every_candidate_is_chosen_somewhere() -> None:
    """In ordinary data; and equal errors go to the first."""
    x = normal(64, 128)
    q = FORMATS["nvfp4_46"].quantize(x)
    largest = q.values().abs().view(64, 8, 16).amax(2)
    assert {4.0, 6.0} <= set(largest.flatten().tolist())
    assert 0 < int(FORMATS["if4"].quantize(x).scales.float().signbit().sum()) < 64 * 8
    check(FORMATS["nvfp4_46"], x)
    check(FORMATS["if4"], x)
    same = torch.zeros(16, 64)
    same[:, ::16] = 6.0  # one number a block is exact under either target
    for name in ("nvfp4_46", "row_46", "if4"):
        check(SOME[name], same)


def test_sums_of_blocks_of_many_rows_and_columns() -> None:
    """Errors are added in the definition's order in every shape of block, whichever way memory runs."""
    for block in ((1, 64), (32, 32), (128, 16)):
        f = Format("any", "e2m1", block, "e4m3", True, targets=(6.0, 4.0))
        x = normal(130, 136, sum(block))
        check(f, x)
        check(f, x.T.contiguous().T)


def test_compiled() -> None:
    """The error by `mae` and a scale for the row; of E2M1 by the chip's conversions there and back."""
    f, x, proofs = SOME["row_46"], normal(64, 128).bfloat16(), list[Proof]()
    out = quantize(x, f, arch="sm_100", start=on("sm_100", proofs))
    assert out.rows
    assert_equal(out.rows.qtensor(), f.quantize(x))
    proof = proofs[-1]
    assert proof.compiled.stack_bytes == 0 and proof.compiled.global_accesses()["load"][16]
    assert proof.compiled.count_ptx(r"cvt\.rn\.f16x2\.e2m1x2")
