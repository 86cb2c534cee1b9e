"""Hadamard rotations: orthogonal, exact where they must be, refused where undefined."""

import pytest
import torch

from lowprec.numerics import Stream, fixed_signs, hadamard, rotate


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


def test_refusals_name_the_size():
    with pytest.raises(ValueError, match="24 is not a power of two"):
        rotate(torch.ones(2, 24), 24)
    with pytest.raises(ValueError, match="block of 16 does not divide the axis of 40"):
        rotate(torch.ones(2, 40), 16)
