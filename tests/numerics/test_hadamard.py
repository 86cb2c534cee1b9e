"""Hadamard rotations: orthogonal, exact where they must be, refused where undefined."""

import pytest
import torch

from lowprec.numerics import Stream, fixed_signs, hadamard, hadamard_order_refusal, rotate
from lowprec.numerics.hadamard import check_size


@pytest.mark.parametrize("n", [2, 4, 16, 32, 64, 128])
def test_butterfly_equals_the_matrix_and_undoes_itself(n):
    """fp32 butterfly against the fp64 matrix: log2(n) + 1 roundings, each at most 2^-24 of the block's 1-norm."""
    x = Stream().noise("x", (8, 2 * n)) - 0.5
    signs = Stream().signs("s", n)
    matrix = signs[:, None].double() * hadamard(n).double()
    expected = (x.double().view(-1, n) @ matrix).view_as(x)
    bound = (n.bit_length() + 1) * 2.0**-24 * x.abs().view(-1, n).sum(1).max().item()
    assert (rotate(x, n, signs) - expected).abs().max() <= bound
    assert (rotate(rotate(x, n, signs), n, signs, inverse=True) - x).abs().max() <= 2 * bound
    assert torch.allclose(hadamard(n) @ hadamard(n).T, torch.eye(n), atol=1e-6)


def test_rotating_both_operands_leaves_the_product():
    a, b = Stream().noise("a", (24, 64)).double(), Stream().noise("b", (40, 64)).double()
    turned = rotate(a.float(), 16, fixed_signs(16)).double() @ rotate(b.float(), 16, fixed_signs(16)).double().T
    assert (turned - a @ b.T).abs().max() < 64 * 8 * 2.0**-24


def test_dtype_is_kept_and_large_numbers_do_not_overflow_on_the_way():
    """Sixteen times 8e37 has the rotated value 3.2e38, though its plain sum is beyond fp32."""
    y = rotate(torch.full((1, 16), 8e37), 16)
    assert y[0, 0] == pytest.approx(3.2e38, rel=1e-6) and (y[0, 1:] == 0).all()
    assert rotate(y.bfloat16(), 16).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [12, 20, 28, 36, 44, 52, 60, 76, 84, 108, 140, 148, 344, 768, 1536])
def test_axes_of_other_lengths_have_an_orthogonal_matrix_of_plus_and_minus_one(n):
    """Paley's two constructions, over prime fields and extensions (52: GF(25), 344: GF(343)), and 2^a times them."""
    x = Stream().noise("x", (4, n)) - 0.5
    signs = Stream().signs("s", n)
    matrix = hadamard(n).double()
    assert torch.allclose(matrix.abs() * n**0.5, torch.ones(n, n, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-6)
    bound = 16 * 2.0**-24 * x.abs().sum(1).max().item()
    assert (rotate(x, n, signs) - (x * signs).double() @ matrix).abs().max() <= bound
    assert (rotate(rotate(x, n, signs), n, signs, inverse=True) - x).abs().max() <= 2 * bound


@pytest.mark.parametrize("n", [896, 5120, 5632, 6912, 8960, 9728, 11008, 13824, 14336, 18944, 27648, 29568])
def test_widths_of_common_models_can_be_rotated_whole(n):
    assert hadamard_order_refusal(n) is None


def test_refusals_name_the_size():
    """92 = 4 * 23 has no Paley matrix, 6 has none at all."""
    for n in (1, 6, 92, 15):
        assert hadamard_order_refusal(n) is not None
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {n} is at hand"):
            rotate(torch.ones(2, n), n)
    with pytest.raises(ValueError, match="24 is not a power of two"):
        check_size(24)
    with pytest.raises(ValueError, match="block of 16 does not divide the axis of 40"):
        rotate(torch.ones(2, 40), 16)
