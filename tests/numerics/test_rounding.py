"""Rounding by arithmetic equals the list of values bit for bit, and does so in pieces as in one go."""

import pytest
import torch

from lowprec.numerics import ELEMENTS
from lowprec.numerics.rounding import Listed, Minifloat, Uniform, grid_of, in_pieces

EVERY_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with NaN where the other has NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def magnitudes(values: tuple[float, ...]) -> torch.Tensor:
    """Every bf16 number, random fp32 patterns, grid points, ties, and the neighbours of both, NaN and inf too."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (100000,), generator=generator).int().view(torch.float32)
    spread = torch.randn(100000, generator=generator) * torch.exp2(
        torch.randint(-10, 10, (100000,), generator=generator)
    )
    grid = torch.tensor(values, dtype=torch.float64)
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    points = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(0.0))])
    return torch.cat([EVERY_BF16, patterns, spread * values[-1] / 8, points]).abs()


@pytest.mark.parametrize("name", ELEMENTS)
def test_arithmetic_equals_the_list(name):
    """Nearest and stochastic, values and indices, for every element."""
    values = ELEMENTS[name].values
    grid, listed, a = grid_of(values), Listed(values), magnitudes(values)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 65536, a.shape, generator=generator)
    noises = [None, (bits + 0.5) / 65536] if len(values) > 1 else [None]
    number = ~a.isnan()
    for noise in noises:
        assert same(grid.round(a, noise), listed.round(a, noise))
        sub = None if noise is None else noise[number]
        assert torch.equal(grid.index(a[number], sub), listed.index(a[number], sub))
    beyond = torch.arange(len(values) + 1)
    assert same(grid.value(beyond), listed.value(beyond)) and grid.value(beyond)[-1].isnan()


def test_which_grids_are_arithmetic():
    """Only IF4's sevenths and the zero-less e8m0 need the search."""
    kinds = {name: type(grid_of(e.values)) for name, e in ELEMENTS.items()}
    assert {name for name, kind in kinds.items() if kind is Listed} == {"if4_int", "e8m0"}
    assert {kinds[name] for name in ("e2m1", "e4m3", "e8m0_signed", "ue5m3")} == {Minifloat}
    assert {kinds[name] for name in ("int8", "ternary", "midrise4", "e1m2")} == {Uniform}


def test_pieces_equal_the_whole():
    """More elements than one piece, a ragged last piece, a transposed view."""
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).T
    noise = torch.rand(700, 300, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    element = ELEMENTS["e2m1"]
    assert torch.equal(element.codes_of(x, noise), element._codes_of(x, noise))
    assert torch.equal(in_pieces(torch.neg, torch.float32, x), -x)
