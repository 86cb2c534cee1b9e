"""The number formats of the executor and the interpreter against torch, numpy and the elements of lowprec."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lowprec.kernels.testing import floats
from lowprec.numerics.element import ELEMENTS

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def patterns(n: int = 200_000, seed: int = 0) -> np.ndarray:
    """float32 of random bits, plus numbers near the ranges of the small formats and every special value."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = (rng.standard_normal(n) * np.exp2(rng.integers(-20, 18, n))).astype(np.float32)
    grid = np.arange(-2048, 2049, dtype=np.float32)
    ties = np.concatenate([grid * np.float32(2.0**e) for e in range(-20, 8)])
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, 65519.996, 65520.0], np.float32)
    return np.concatenate([bits, near, ties, special])


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_torchs_with_saturation(name: str) -> None:
    """Every pattern rounds as torch does after a clamp; every code decodes as torch's."""
    x = patterns()
    limit = torch.finfo(FP8[name]).max
    want = torch.from_numpy(x).clamp(-limit, limit).to(FP8[name]).view(torch.uint8).numpy()
    got = floats.encode(x, name)
    real = ~np.isnan(x)
    assert np.array_equal(got[real], want[real])
    assert (got[~real] == 0x7F).all()
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes).view(FP8[name]).float().numpy()
    assert np.array_equal(floats.decode(codes, name), values, equal_nan=True)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2"])
def test_small_elements_are_lowprecs(name: str) -> None:
    x = patterns()
    x = x[~np.isnan(x)]
    want = ELEMENTS[name].round(torch.from_numpy(x).clamp(-1e30, 1e30)).numpy()
    got = floats.decode(floats.encode(x, name), name)
    assert np.array_equal(got, want)
    assert np.array_equal(floats.encode(got, name), floats.encode(x, name))


def test_halves_are_torchs() -> None:
    x = patterns()
    real = ~np.isnan(x)
    t = torch.from_numpy(x)
    bf16 = t.bfloat16().view(torch.int16).numpy().view(np.uint16)
    f16 = t.half().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(floats.bf16_bits(x)[real], bf16[real])
    assert np.array_equal(floats.encode(x, "bf16", saturate=False)[real], bf16[real])
    assert np.array_equal(floats.encode(x, "f16", saturate=False)[real], f16[real])
    assert np.array_equal(floats.bf16_value(bf16), t.bfloat16().float().numpy(), equal_nan=True)
    assert np.array_equal(floats.decode(f16, "f16"), t.half().float().numpy(), equal_nan=True)
    assert (floats.bf16_bits(x)[~real] == 0x7FFF).all()
    down = floats.decode(floats.encode(x, "bf16", toward_zero=True), "bf16")[np.isfinite(x)]
    assert np.array_equal(down.view(np.uint32), x[np.isfinite(x)].view(np.uint32) & 0xFFFF0000)


def test_exponent_bytes() -> None:
    """E8M0 bytes of powers of two and their neighbours, by definition: floor or ceiling of the exponent."""
    powers = np.arange(-126, 128)
    x = np.ldexp(1.0, powers).astype(np.float32)
    above = np.nextafter(x, np.float32(np.inf))
    assert np.array_equal(floats.e8m0_bits(x, up=True), powers + 127)
    assert np.array_equal(floats.e8m0_bits(above, up=True), np.minimum(powers + 128, 254))
    assert np.array_equal(floats.e8m0_bits(above, up=False), powers + 127)
    special = np.array([0.0, np.inf, np.nan, -4.0], np.float32)
    assert floats.e8m0_bits(special, up=True).tolist() == [0, 254, 255, 129]
    assert np.array_equal(floats.e8m0_value(np.arange(255)), np.ldexp(1.0, np.arange(255) - 127).astype(np.float32))


def test_stochastic_rounding_takes_the_neighbour_above_as_often_as_it_is_near() -> None:
    """With all 256 random bytes, x is rounded up exactly floor(256 fraction) times: no random error at all."""
    noise = np.arange(256) / 256
    for x in (0.1, 0.74, 1.2, 2.9, 5.3, -1.2, 0.0, 6.0, 7.0, 3.0):
        got = floats.decode(floats.encode(np.full(256, x, np.float32), "e2m1", noise), "e2m1")
        assert abs(got.mean() - np.clip(x, -6, 6)) <= 2 / 256  # 1/256 of the widest step, which is 2


def test_fma_rounds_once() -> None:
    """Against exact rational arithmetic, on operands chosen so that rounding the product first shows."""
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(4000).astype(np.float32) for _ in range(2))
    c = np.concatenate([(-a * b)[:2000], rng.standard_normal(2000).astype(np.float32) * 2.0**-20]).astype(np.float32)
    # (1 + 2^-12)^2 lies between two float32 numbers exactly; what is added decides, however small, and double drops it
    middle = np.array([1 + 2.0**-12] * 4 + [1 + 2.0**-11] * 2, np.float32)
    a, b = np.append(a, middle), np.append(b, middle)
    c = np.append(c, np.array([2.0**-80, -(2.0**-80), 0.0, 2.0**-126, 2.0**-90, -(2.0**-90)], np.float32))
    got = floats.fma(a, b, c)
    for i in range(len(a)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = np.float32(float(exact))  # float(Fraction) is correct to double; look at both neighbours
        candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
        best = min(candidates, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))
        assert got[i] == best
