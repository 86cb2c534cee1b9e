"""Element: every grid against an independent definition, rounding exhaustively."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.numerics import ELEMENTS, Stream

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MASKED = {f"e8m{m}" if m else "e8m0_signed": (2 - 2.0**-m) * 2.0**127 for m in range(8)}
LARGEST = {**MASKED, **{f"midrise{b}": 2 ** (b - 1) - 0.5 for b in range(1, 9)}, "if4_int": 6,
           "e2m1": 6, "e1m2": 3.5, "e3m2": 28, "e2m3": 7.5, "e4m3": 448, "e5m2": 57344, "ue5m3": 61440,
           "e8m0": 2.0**127,
           "int2": 1, "int3": 3, "int4": 7, "int5": 15, "int6": 31, "int7": 63, "int8": 127, "ternary": 1}  # fmt: skip
BITS = {**{name: 9 + m for m, name in enumerate(MASKED)}, **{f"midrise{b}": b for b in range(1, 9)}, "if4_int": 4,
        "e2m1": 4, "e1m2": 4, "e3m2": 6, "e2m3": 6, "ternary": 2, **{f"int{b}": b for b in range(2, 9)}}  # fmt: skip


def test_the_set_of_elements_and_their_ranges():
    assert {name: e.max for name, e in ELEMENTS.items()} == LARGEST
    assert {name: e.bits for name, e in ELEMENTS.items()} == {name: BITS.get(name, 8) for name in LARGEST}


@pytest.mark.parametrize("name", FLOAT8)
def test_fp8_equals_torch_casts_on_every_bf16_number(name):
    """All 65,536 bf16 bit patterns: values and codes of the finite ones equal torch's saturating cast."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].float()
    element = ELEMENTS[name]
    expected = x.clamp(-element.max, element.max).to(FLOAT8[name])
    assert torch.equal(element.round(x), expected.float())
    assert torch.equal(element.encode(x), expected.view(torch.uint8))


@pytest.mark.parametrize("name", ELEMENTS)
def test_codes_round_trip_and_are_distinct(name):
    """Decoding every code and encoding it again gives the code back (but for codes that stand for nothing)."""
    element = ELEMENTS[name]
    codes = torch.arange(2**element.bits).to(torch.uint8 if element.bits <= 8 else torch.int32)
    values = element.decode(codes)
    real = ~values.isnan()
    expected = codes[real]
    if element.signed and not element.twos_complement:
        assert real.sum() == 2 * len(element.values)
    elif element.signed:
        assert real.sum() == 2 * len(element.values) - 1  # one zero
    assert torch.equal(element.encode(values[real]), expected)


def test_bf16_without_mantissa_bits_cut_is_the_cast_of_torch():
    """e8m7 on fp32 bit patterns, subnormals included, and its codes are the bf16 bits."""
    x = (
        torch.randint(-(2**31), 2**31 - 1, (200000,), generator=torch.Generator().manual_seed(0))
        .int()
        .view(torch.float32)
    )
    x = x[x.isfinite() & (x.abs() < ELEMENTS["e8m7"].max)]
    assert torch.equal(ELEMENTS["e8m7"].round(x), x.bfloat16().float())
    assert torch.equal(ELEMENTS["e8m7"].encode(x).to(torch.int16), x.bfloat16().view(torch.int16))


# The wide grids of masked bf16 are compared with torch above and with the list in test_rounding.py.
@pytest.mark.parametrize("name", [n for n in ELEMENTS if n != "e8m0" and n not in MASKED])
def test_nearest_is_nearest_and_ties_go_to_the_even_code(name):
    """Against brute force over the value list, at grid points, midpoints and their fp32 neighbours."""
    element = ELEMENTS[name]
    grid = torch.tensor(element.values, dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, grid[-1:] * 1.5]).float()
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(0.0))])
    distance = (x.double()[:, None] - grid).abs()
    best = distance.min(1, keepdim=True).values
    even_first = distance + (torch.arange(len(grid)) % 2) * best.clamp(min=1e-300) * 1e-12  # breaks exact ties only
    expected = grid[even_first.argmin(1)].float()
    assert torch.equal(element.round(x), expected)
    if element.signed:
        assert torch.equal(element.round(-x), -expected)
    else:
        assert torch.equal(element.round(-x), torch.zeros_like(x))


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "int4", "ternary", "e3m2"])
def test_stochastic_rounding_is_exact_for_every_noise(name):
    """Over all 65,536 noise values the share rounded up is the fraction: |bias| <= step / 131072."""
    element = ELEMENTS[name]
    noise = (torch.arange(65536).float() + 0.5) / 65536
    generator = torch.Generator().manual_seed(0)
    for x in (torch.rand(12, generator=generator) * element.max).tolist() + list(element.values[:3]):
        x = torch.tensor(x).item()
        rounded = element.round(torch.full((65536,), x), noise)
        low = max(v for v in element.values if v <= x)
        high = min((v for v in element.values if v > x), default=element.max)
        assert set(rounded.tolist()) <= {low, high}
        assert abs(rounded.double().mean().item() - x) <= (high - low) / 131072 * (1 + 1e-6)
        assert torch.equal(element.round(torch.full((65536,), -x), noise), -rounded)


def test_saturation_sign_of_zero_and_nan():
    e2m1 = ELEMENTS["e2m1"]
    x = torch.tensor([torch.inf, -torch.inf, 1e30, -0.0, 0.0, torch.nan])
    rounded = e2m1.round(x)
    assert rounded[:3].tolist() == [6, -6, 6] and rounded[5].isnan()
    assert rounded[3].signbit() and not rounded[4].signbit()
    assert e2m1.encode(torch.tensor([-0.0, 0.0, -6.0])).tolist() == [8, 0, 15]
    with pytest.raises(ValueError, match="cannot encode NaN as e2m1"):
        e2m1.encode(x)


def test_twos_complement_codes():
    assert ELEMENTS["int4"].encode(torch.tensor([-7.0, -1.0, 0.0, 7.0])).tolist() == [9, 15, 0, 7]
    assert ELEMENTS["ternary"].encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [3, 0, 1]


@given(st.sampled_from(list(ELEMENTS)), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_is_idempotent_and_monotone(name, x):
    element = ELEMENTS[name]
    pair = torch.tensor([x, x * 1.25]).sort().values
    once = element.round(pair)
    assert torch.equal(element.round(once), once)
    assert once[0] <= once[1]


@pytest.mark.parametrize("dtype,name", itertools.product((torch.bfloat16, torch.float16), ("e2m1", "e4m3")))
def test_half_precision_inputs_keep_shape_and_value(dtype, name):
    x = (Stream().noise("x", (7, 9)) * 8 - 4).to(dtype)
    assert torch.equal(ELEMENTS[name].round(x), ELEMENTS[name].round(x.float()))
