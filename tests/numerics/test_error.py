"""Error measures on numbers worked out by hand."""

import math

import pytest
import torch

from lowprec.numerics import FORMATS
from lowprec.numerics.error import bias, kurtosis, relative_error, saturation_frac, sqnr_db, underflow_frac


def test_relative_error_and_sqnr():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])
    assert relative_error(x, y) == 0.01 and sqnr_db(x, y) == pytest.approx(20)
    assert relative_error(x, x) == 0 and sqnr_db(x, x) == math.inf
    assert relative_error(0 * x, 0 * x) == 0 and relative_error(0 * x, y) == math.inf and sqnr_db(0 * x, y) == -math.inf


def test_small_errors_of_bf16_tensors_are_not_lost():
    """Computed in fp64: squares of 1e-30 do not vanish."""
    x = torch.full((4,), 1e-30, dtype=torch.bfloat16)
    assert relative_error(x, x * 0.5) == 0.25


def test_bias_is_the_shrinking_along_the_reference():
    """Shrinking to 0.9 is bias 0.1; an error at right angles is none."""
    x = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert bias(x, 0.9 * x) == pytest.approx(0.1)
    assert bias(x, x + torch.tensor([1.0, -1.0, 2.0, -2.0])) == pytest.approx(0)
    assert bias(0 * x, x) == 0


def test_underflow_and_saturation_shares():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert underflow_frac(x, torch.tensor([0.0, 0.0, 2.0, 3.0, 4.0])) == 0.25
    assert underflow_frac(0 * x, 0 * x) == 0
    assert saturation_frac(torch.tensor([-7.0, 6.0, 5.0, 6.5]), 6.0) == 0.5
    tiny = torch.ones(1, 32)
    tiny[0, 1:16] = 0.01
    assert underflow_frac(tiny, FORMATS["mxfp4"].quantize(tiny).dequantize()) == 15 / 32


def test_kurtosis():
    """3 for Gaussian data, 1 for coin flips, large with an outlier, NaN for a constant."""
    x = torch.randn(400000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(x + 5) == pytest.approx(3, abs=3 * (24 / 400000) ** 0.5)
    assert kurtosis(torch.tensor([1.0, -1.0])) == 1
    assert kurtosis(torch.cat([x, torch.tensor([500.0])])) > 100
    assert math.isnan(kurtosis(torch.ones(5)))
