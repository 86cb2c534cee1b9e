"""Codecs: the payload is what the numeric format says, of the size it says, unbiased where it says, and loud."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowprec.comm import CODECS, Codec
from lowprec.comm.codec import _PIECE, QUANTIZED
from lowprec.kernels.cpu import qdq
from lowprec.numerics import Stream, fixed_signs, rotate
from lowprec.numerics.scale import SCALE_BITS

STREAM = Stream(seed=1, step=7, layer="layers.0")
SIZES = (1, 2, 15, 16, 33, 128, 129, 1000)
VARIANTS = [
    codec
    for name in QUANTIZED
    for codec in (
        Codec(name),
        Codec(name, rotation=32),
        Codec(name, rotation=256),
        Codec(name, rounding="stochastic"),
        Codec(name, rotation=32, rounding="stochastic"),
    )
]


def data(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed rows of many magnitudes, with zeros, a tiny and a huge block."""
    x = torch.distributions.StudentT(3.0).sample((rows, n)) * torch.logspace(-3, 3, rows)[:, None]
    x[:, : n // 8] *= 1e-30
    x[:, n // 3 : n // 2] = 0.0
    x[-1, -5:] *= 1e25
    return x.to(dtype)


def defined(codec: Codec, x_RN: Tensor) -> Tensor:
    """Encoded and decoded by the numeric format alone, row by row."""
    assert codec.format is not None
    rows, n = x_RN.shape
    width = codec.width(n)
    padded = torch.zeros(rows, width, dtype=x_RN.dtype)
    padded[:, :n] = x_RN
    if codec.rotation:
        padded = rotate(padded.float(), codec.rotation, fixed_signs(codec.rotation))
    noise = STREAM.noise("k", padded.shape) if codec.rounding == "stochastic" else None
    values = torch.cat(
        [codec.format.quantize(row[None], None if noise is None else noise[i : i + 1]).dequantize()
         for i, row in enumerate(padded)]
    )  # fmt: skip
    if codec.rotation:
        values = rotate(values, codec.rotation, fixed_signs(codec.rotation), inverse=True)
    return values[:, :n]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32)
    )


@pytest.mark.parametrize("codec", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_payload_decodes_to_what_the_format_makes(codec: Codec, dtype: torch.dtype) -> None:
    """Every variant, ragged sizes: decoded values equal Format.quantize().dequantize() bit for bit."""
    torch.manual_seed(0)
    for n in SIZES:
        x = data(3, n, dtype)
        y = codec.decode(codec.encode(x, STREAM, "k"), n)
        assert y.shape == x.shape and same_bits(y, defined(codec, x)), n


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_and_scales_lie_in_the_payload_as_they_are(name: str) -> None:
    """The bytes are tensor scale, block scales, packed codes of the QTensor."""
    torch.manual_seed(0)
    codec, x = CODECS[name], data(2, 260)
    assert codec.format is not None
    q = codec.format.quantize(x)
    parts = [q.scales.view(torch.uint8), q.pack()]
    parts = parts if q.tensor_scale is None else [q.tensor_scale.view(torch.uint8), *parts]
    assert torch.equal(codec.encode(x), torch.cat(parts, dim=1))


@pytest.mark.parametrize("codec", VARIANTS[::5], ids=str)
def test_without_a_compiler_the_bytes_are_the_same(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path makes the bytes of the C++ kernels, rotated and stochastic too."""
    torch.manual_seed(0)
    assert qdq.load()[0] is not None
    x = data(2, 1000)
    variants = [replace(codec, rotation=r, rounding=s) for r in (0, 64, 256) for s in ("nearest", "stochastic")]
    fast = [variant.encode(x, STREAM, "k") for variant in variants]
    monkeypatch.setattr(qdq, "load", lambda: (None, "no compiler"))
    for variant, payload in zip(variants, fast):
        assert torch.equal(variant.encode(x, STREAM, "k"), payload), variant


@pytest.mark.parametrize("codec", [*CODECS.values(), *VARIANTS], ids=str)
def test_sizes_are_counted(codec: Codec) -> None:
    """payload_bytes is the payload's size; bits_per_value follows, and tends to codes + scales."""
    for n in SIZES:
        payload = codec.encode(torch.randn(2, n), STREAM, "k")
        assert payload.dtype == torch.uint8 and payload.shape == (2, codec.payload_bytes(n))
        assert codec.bits_per_value(n) == 8 * payload.shape[1] / n
    assert codec.encode(torch.randn(2, 0), STREAM).shape == (2, 0) and codec.payload_bytes(0) == 0
    if codec.format:
        f, n = codec.format, 1 << 20
        scales = SCALE_BITS[f.scale] / f.block[1] + (32 / n if f.tensor_scale else 0)
        assert codec.bits_per_value(n) == (4 if f.bits == 4 else 8) + scales


def test_bits_of_the_table() -> None:
    """The figures of the module's docstring, for long rows."""
    n = 1 << 20
    row = {"int4": 32 / n, "nvfp4": 32 / n}
    bits = {name: codec.bits_per_value(n) - row.get(name, 0) for name, codec in CODECS.items()}
    assert bits == {"fp32": 32, "bf16": 16, "fp8": 8.25, "int8": 8.25, "int4": 4.25, "nvfp4": 4.5}


ERRORS = {"fp32": 0.0, "bf16": 2.8e-6, "fp8": 6.6e-4, "int8": 4.2e-5, "int4": 9.5e-3, "nvfp4": 9.1e-3}


@pytest.mark.parametrize(("name", "error"), ERRORS.items())
def test_errors_of_the_table(name: str, error: float) -> None:
    """Relative squared error on Gaussian data, to the digits that are printed (2^18 values fix them to 1 %)."""
    x = torch.randn(1, 1 << 18, generator=torch.Generator().manual_seed(0))
    codec = CODECS[name]
    y = codec.decode(codec.encode(x), x.shape[1])
    assert ((y - x).square().sum() / x.square().sum()).item() == pytest.approx(error, rel=0.02)


def test_plain_codecs_are_casts() -> None:
    """fp32 sends the bits, bf16 the rounded number; a bf16 input is exact in both."""
    torch.manual_seed(0)
    x = data(3, 77)
    assert torch.equal(CODECS["fp32"].decode(CODECS["fp32"].encode(x), 77), x)
    assert torch.equal(CODECS["bf16"].decode(CODECS["bf16"].encode(x), 77), x.bfloat16().float())
    for name in ("fp32", "bf16"):
        y = CODECS[name].decode(CODECS[name].encode(x.bfloat16()), 77, torch.bfloat16)
        assert y.dtype == torch.bfloat16 and torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("codec", [*CODECS.values(), *VARIANTS], ids=str)
def test_the_sum_is_taken_row_by_row_in_fp32(codec: Codec) -> None:
    """decode_sum adds what decode gives, in the order of the rows, and turns the sum back once; across pieces too."""
    torch.manual_seed(0)
    n = _PIECE + 300
    x = torch.randn(3, n)
    payload = codec.encode(x, STREAM, "k")
    rotation, unrotated = codec.rotation, codec
    if rotation:  # the rotated values themselves: codes of a codec without rotation, of the padded rows
        unrotated, n = replace(codec, rotation=0), codec.width(n)
    rows = unrotated.decode(payload, n)
    total = (rows[0] + rows[1]) + rows[2]
    if rotation:
        total = rotate(total, rotation, fixed_signs(rotation), inverse=True)
    assert torch.equal(codec.decode_sum(payload, x.shape[1]), total[: x.shape[1]])


@pytest.mark.parametrize("codec", [*CODECS.values(), *VARIANTS], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(codec: Codec, bad: float) -> None:
    """NaN or infinity anywhere decodes to something not finite there; other rows stay finite."""
    for n in (1, 40, 1000):
        for where in {0, n // 2, n - 1}:
            x = torch.randn(2, n)
            x[1, where] = bad
            payload = codec.encode(x, STREAM, "k")
            y = codec.decode(payload, n)
            assert not y[1, where].isfinite() and y[0].isfinite().all()
            assert not codec.decode_sum(payload, n)[where].isfinite()


def test_finite_stays_finite_and_symmetric() -> None:
    """The largest fp32 numbers survive; int8 has no -128; an all-zero row is zero."""
    for codec in CODECS.values():
        x = torch.full((1, 128), torch.finfo(torch.float32).max)
        x[0, 64:] *= -1
        if codec.name != "bf16":  # which has no such number
            y = codec.decode(codec.encode(x), 128)
            assert y.isfinite().all() and torch.equal(y[:, :64], -y[:, 64:])
        assert torch.equal(codec.decode(codec.encode(torch.zeros(2, 40)), 40), torch.zeros(2, 40))
    codes = CODECS["int8"].encode(torch.randn(1, 4096))[:, 4 * 32 :].view(torch.int8)
    assert codes.min() == -127 and codes.max() == 127


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("rotation", [0, 32])
def test_stochastic_rounding_is_unbiased(name: str, rotation: int) -> None:
    """The mean of many draws is the value: summed over 32 neighbours, also along their signs, within 3 sigma."""
    codec, draws, n = Codec(name, rotation, "stochastic"), 400, 2048
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, n)
    y = torch.cat([codec.decode(codec.encode(x, Stream(seed=5, step=i), "k"), n) for i in range(draws)]).double()
    error = y - x.double()
    for weight in (torch.ones(1, n), x.sign()):  # a bias upwards, a bias towards zero
        sums = (error * weight).unflatten(1, (-1, 32)).sum(2)  # (draws, groups)
        z = sums.mean(0) / (sums.std(0) / draws**0.5)
        assert z.square().sum() < z.numel() + 3 * (2 * z.numel()) ** 0.5  # chi squared of as many degrees
    nearest = replace(codec, rounding="nearest")
    z = nearest.decode(nearest.encode(x), n)
    assert error.mean(0).square().sum() < 0.1 * (z - x).square().sum()


def test_random_bits_are_keyed() -> None:
    """The same stream and key round alike; another step, layer or key does not."""
    codec, x = Codec("int4", rounding="stochastic"), torch.randn(2, 256)
    first = codec.encode(x, STREAM, "k/0")
    assert torch.equal(first, codec.encode(x, STREAM, "k/0"))
    for stream, key in ((STREAM, "k/1"), (replace(STREAM, step=8), "k/0"), (replace(STREAM, layer="x"), "k/0")):
        assert not torch.equal(first, codec.encode(x, stream, key))


@pytest.mark.parametrize("rotation", [2, 16, 64, 512])
def test_a_rotation_is_undone(rotation: int) -> None:
    """Rotating costs no accuracy on Gaussian data, and spreads an outlier's harm: the error of the rest falls."""
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    plain, rotated = CODECS["int4"], Codec("int4", rotation)
    gaussian = [(c.decode(c.encode(x), 4096) - x).square().mean().item() for c in (plain, rotated)]
    assert gaussian[1] == pytest.approx(gaussian[0], rel=0.1)
    x[0, ::64] *= 30
    outliers = [(c.decode(c.encode(x), 4096) - x).square().mean().item() for c in (plain, rotated)]
    assert outliers[1] < outliers[0] if rotation >= 16 else outliers[1] < 2 * outliers[0]


def test_wide_ranges_in_one_row() -> None:
    """Parameters whose gradients are 1e-8 of another's survive in int4, fp8 and int8; in nvfp4 they vanish."""
    x = torch.randn(1, 2048)
    x[:, 1024:] *= 1e-8
    kept = {name: CODECS[name].decode(CODECS[name].encode(x), 2048)[0, 1024:] for name in QUANTIZED}
    error = {name: ((y - x[0, 1024:]).square().sum() / x[0, 1024:].square().sum()).item() for name, y in kept.items()}
    assert max(error["int4"], error["fp8"], error["int8"]) < 0.012 and error["nvfp4"] == 1


def test_refusals() -> None:
    """One sentence each."""
    with pytest.raises(ValueError, match="unknown codec 'fp4'; choose one of fp32, bf16"):
        Codec("fp4")
    with pytest.raises(ValueError, match="unknown rounding 'up' of codec fp8"):
        Codec("fp8", rounding="up")
    with pytest.raises(ValueError, match="bf16 does not quantise: it takes no rotation"):
        Codec("bf16", rotation=16)
    with pytest.raises(ValueError, match="24 is not a power of two"):
        Codec("fp8", rotation=24)
    with pytest.raises(ValueError, match="needs random bits: pass the step's Stream"):
        Codec("fp8", rounding="stochastic").encode(torch.randn(1, 8))
    with pytest.raises(ValueError, match=r"rows \(rows, n\), got torch.float16"):
        CODECS["fp8"].encode(torch.randn(1, 8).half())
    with pytest.raises(ValueError, match="both sides must use the same codec and sizes"):
        CODECS["fp8"].decode(CODECS["int4"].encode(torch.randn(1, 8)), 8)


@pytest.mark.parametrize("codec", CODECS.values(), ids=str)
def test_a_payload_may_lie_anywhere(codec: Codec) -> None:
    """Rows that are slices of a larger buffer, at any byte, decode as if they were alone."""
    payload = codec.encode(torch.randn(2, 75))
    buffer = torch.zeros(2, payload.shape[1] + 9, dtype=torch.uint8)
    for offset in (1, 2, 3, 4):
        rows = buffer[:, offset : offset + payload.shape[1]]
        rows.copy_(payload)
        assert torch.equal(codec.decode(rows, 75), codec.decode(payload, 75))
        assert torch.equal(codec.decode(rows[:1], 75), codec.decode(payload[:1], 75))
        assert torch.equal(codec.decode_sum(rows, 75), codec.decode_sum(payload, 75))


def test_codecs_are_data() -> None:
    """Hashable, equal by value, changed by replace; a piece holds whole blocks."""
    assert {CODECS["int4"]: 1}[Codec("int4")] == 1
    assert str(replace(CODECS["int4"], rotation=64, rounding="stochastic")) == "int4 rotated by 64, stochastic"
    assert all(_PIECE % f.block[1] == 0 for f in QUANTIZED.values())
