"""MS-EDEN kernels, interpreted and compiled, equal `Format.eden`, bit for bit, in one pass after the maximum."""

import pytest
import torch

from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton.eden import quantize_eden
from lowprec.kernels.triton.rotate import Turn
from lowprec.numerics.format import Format
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.hadamard import rotate
from lowprec.numerics.stream import Stream
from tests.kernels.triton.proofs import Proof, assert_equal, on
from tests.kernels.triton.test_triton_formats import MORE, edges
from tests.kernels.triton.test_triton_quantize import hard

STREAM = Stream(3, (1 << 31) + 5, 1, "eden")
SOME = FORMATS | MORE


def wanted(x: torch.Tensor, f: Format, role: str, group: int = 128):  # -> QTensor
    return f.eden(x, STREAM.scale_noise(role, x, f.block[1]), group)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvfp4_eden", 128),
        ("nvfp4_eden", 16),
        ("nvfp4_eden_46", 64),
        ("if4", 32),
        ("nvfp4_ue5m3", 128),
        ("nvfp4_double", 64),
        ("nvfp4_row", 32),
        ("fp8_1x128", 128),
        ("int4_1x32", 128),
    ],
)
def test_both_directions_of_edge_values(name: str, group: int) -> None:
    """Ragged in both axes: the last group is short, and 16 rows of noise reach over the edge."""
    f = SOME[name]
    for x in (edges(21, 75), hard(40, 136).T):
        with interpreted():
            out = quantize_eden(x, f, STREAM, columns=True, group=group)
        assert out.rows and out.columns
        assert_equal(out.rows.qtensor(), wanted(x, f, "rows", group))
        assert_equal(out.columns.qtensor(), wanted(x.T, f, "columns", group))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_poison(bad: float) -> None:
    for name in ("nvfp4_eden", "fp8_1x128", "nvfp4_ue5m3"):
        x = hard(16, 144)
        x[5, 17] = bad
        with interpreted():
            out = quantize_eden(x, FORMATS[name], STREAM)
        assert out.rows
        assert_equal(out.rows.qtensor(), wanted(x, FORMATS[name], "rows"))


def test_after_a_rotation_with_swizzled_scales_and_a_given_maximum() -> None:
    """The noise of the scales is indexed by row and block, so a rotation before changes none of it."""
    x, f, signs = hard(150, 256), FORMATS["nvfp4_eden"], STREAM.signs("signs", 128)
    turned = rotate(x, 128, signs)
    with interpreted():
        out = quantize_eden(x, f, STREAM, turn=Turn.of(128, signs), swizzle=True)
        given = quantize_eden(hard(16, 32), f, STREAM, amax=torch.tensor(3.0))
    assert out.rows and given.rows
    assert_equal(out.rows.qtensor(), wanted(turned, f, "rows"))
    noise = STREAM.scale_noise("rows", hard(16, 32), 16)
    assert_equal(given.rows.qtensor(), f.eden(hard(16, 32), noise, 128, torch.tensor(3.0)))


def test_what_is_refused() -> None:
    x = torch.randn(16, 128)
    for name, group, word in (
        ("nvfp4_2d", 128, "1 x n blocks"),
        ("fp8_row", 128, "1 x n blocks"),
        ("nvfp4_eden", 256, "group 256"),
        ("fp8_1x128", 64, "group 64"),
        ("mxfp4", 128, "too coarse"),
    ):
        with pytest.raises(ValueError, match=word):
            quantize_eden(x, FORMATS[name], STREAM, group=group)


@pytest.mark.parametrize(
    ("arch", "columns", "turned"), [("sm_100", True, False), ("sm_90", False, False), ("sm_120", False, True)]
)
def test_compiled(arch: str, columns: bool, turned: bool) -> None:
    """Two passes over x: its maximum, then codes and corrected scales; no spills; 16-byte loads."""
    f, proofs = FORMATS["nvfp4_eden"], list[Proof]()
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    signs = STREAM.signs("signs", 128)
    turn = Turn.of(128, signs) if turned else None
    out = quantize_eden(
        x, f, STREAM, columns=columns, turn=turn, turn_columns=turn, arch=arch, start=on(arch, proofs)
    )  # fmt: skip
    assert out.rows and len(proofs) == 2
    assert_equal(out.rows.qtensor(), wanted(rotate(x, 128, signs) if turned else x, f, "rows"))
    if columns:
        assert out.columns
        x_t = x.T
        assert_equal(
            out.columns.qtensor(),
            f.eden(rotate(x_t, 128, signs) if turned else x_t, STREAM.scale_noise("columns", x_t, 16)),
        )
    proof = proofs[-1]
    assert proof.compiled.stack_bytes == 0 and not proof.compiled.over_limits()
    assert proof.compiled.global_accesses()["load"][16]
    assert proof.run.moved_bytes() <= 1.05 * (2 + (1 + columns) * (1 / 2 + 1 / 16)) * x.numel()
