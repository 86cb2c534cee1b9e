"""The wire kernels in the interpreter make the codec's bytes and numbers, bit for bit; and when the codec uses them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowprec.comm import CODECS, Codec
from lowprec.comm.codec import QUANTIZED
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton import wire
from lowprec.numerics import Stream

STREAM = Stream(1, (1 << 31) + 7, 2, "layer")
SIZES = (1, 31, 33, 1000)  # less than a block, ragged, whole eights at odd bytes
CODECS_ = [
    replace(CODECS[name], rotation=rotation, rounding=rounding)
    for name in QUANTIZED
    for rotation, rounding in ((0, "nearest"), (0, "stochastic"), (128, "nearest"), (16, "stochastic"))
]


def data(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed rows of many magnitudes; zero, tiny and huge blocks; ties; a zero row and a subnormal one."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=generator) * torch.randn(rows, n, generator=generator).square() * 10
    x *= torch.logspace(-3, 3, rows)[:, None]
    x[:, : n // 8] *= 1e-30
    x[:, n // 3 : n // 2] = 0.0
    x[-1, -5:] *= 1e25
    if rows > 4:
        x[1] = (torch.arange(n) % 29 - 14) / 4
        x[2] = 0.0
        x[3] *= 1e-39
        x[0, 0] = torch.finfo(torch.float32).max
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, one NaN being as good as another."""
    bits = [torch.where(t.isnan(), torch.nan, t.float()).view(torch.int32) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


@pytest.mark.parametrize("codec", CODECS_, ids=str)
def test_codecs(codec: Codec) -> None:
    """Payload, decoded rows in both dtypes, and sums of 1, 2 and 5 rows."""
    for n in SIZES:
        dtype = torch.bfloat16 if n in (31, 1000) else torch.float32
        x = data(5, n, dtype)
        payload = codec.encode(x, STREAM, "key")
        with interpreted():
            assert torch.equal(codec.encode(x, STREAM, "key", kernels=True), payload), n
            if n >= 33:
                assert same(codec.decode(payload, n, dtype, kernels=True), codec.decode(payload, n, dtype)), n
            for rows in {33: (1, 2), 1000: (5,)}.get(n, ()):
                assert same(codec.decode_sum(payload[:rows], n, kernels=True), codec.decode_sum(payload[:rows], n)), n


@pytest.mark.parametrize("codec", [c for c in CODECS_ if c.rounding == "nearest"], ids=str)
def test_more_than_a_tile(codec: Codec) -> None:
    """In whole words and eights."""
    x = data(2, 2304)
    payload = codec.encode(x)
    with interpreted():
        assert torch.equal(codec.encode(x, kernels=True), payload)
        assert same(codec.decode_sum(payload, 2304, kernels=True), codec.decode_sum(payload, 2304))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_plain_codecs(name: str) -> None:
    codec = CODECS[name]
    for n in SIZES:
        x = data(5, n)
        payload = codec.encode(x)
        with interpreted():
            assert torch.equal(codec.encode(x, kernels=True), payload)
            assert same(codec.decode(payload, n, kernels=True), codec.decode(payload, n))
            for rows in (1, 5):
                assert same(codec.decode_sum(payload[:rows], n, kernels=True), codec.decode_sum(payload[:rows], n))
    minus = torch.full((1, 8), -0.0)  # the sum of one row is the row
    with interpreted():
        assert torch.equal(codec.decode_sum(codec.encode(minus), 8, kernels=True).signbit(), minus[0].signbit())


@pytest.mark.parametrize("codec", CODECS_[::5], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison(codec: Codec, bad: float) -> None:
    """The bytes of NaN scales too; other blocks and rows are untouched."""
    x = data(3, 300)
    x[1, 150] = bad
    payload = codec.encode(x, STREAM, "key")
    with interpreted():
        assert torch.equal(codec.encode(x, STREAM, "key", kernels=True), payload)
        assert same(codec.decode(payload, 300, kernels=True), codec.decode(payload, 300))


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_largest_numbers(name: str) -> None:
    """What decodes to more than fp32 holds is cut to it, as by the codec."""
    codec = CODECS[name]
    x = torch.full((2, 256), torch.finfo(torch.float32).max)
    x[:, ::3] *= -1
    x[1, 128:] *= 1e-6
    payload = codec.encode(x)
    payload[:, codec.payload_bytes(256) - 64 :] |= 0x77  # the largest codes, which rounding alone seldom reaches
    with interpreted():
        assert torch.equal(codec.encode(x, kernels=True), codec.encode(x))
        assert same(codec.decode(payload, 256, kernels=True), codec.decode(payload, 256))


@pytest.mark.parametrize("codec", [*CODECS.values(), CODECS_[-1]], ids=str)
def test_a_payload_may_lie_anywhere(codec: Codec) -> None:
    """Rows that are slices of a larger buffer, at any byte; rows of x with a pitch of their own."""
    x = data(2, 64)
    payload = codec.encode(x, STREAM, "key")
    buffer = torch.zeros(2, payload.shape[1] + 9, dtype=torch.uint8)
    with interpreted():
        for offset in (0, 1, 4):
            rows = buffer[:, offset : offset + payload.shape[1]]
            rows.copy_(payload)
            assert same(codec.decode_sum(rows, 64, kernels=True), codec.decode_sum(payload, 64))
        wide = torch.cat([x, x], 1)[:, 7:71]
        assert torch.equal(
            codec.encode(wide, STREAM, "key", kernels=True), codec.encode(wide.contiguous(), STREAM, "key")
        )


def test_what_the_kernels_leave_to_torch() -> None:
    """Rotations beyond 128 and below 16, other dtypes, nothing at all: with or without, the same bytes."""
    x = torch.randn(2, 512)
    with interpreted():
        for rotation in (8, 256):
            codec = Codec("int4", rotation)
            payload = codec.encode(x, kernels=True)
            assert torch.equal(payload, codec.encode(x))
            assert torch.equal(codec.decode_sum(payload, 512, kernels=True), codec.decode_sum(payload, 512))
        codec = CODECS["nvfp4"]
        half = codec.decode(codec.encode(x), 512, torch.float16, kernels=True)
        assert half.dtype == torch.float16 and torch.equal(half, codec.decode(codec.encode(x), 512, torch.float16))
        assert codec.encode(x[:0], kernels=True).shape == (0, codec.payload_bytes(512))
        assert codec.decode(codec.encode(x[:0]), 512, kernels=True).shape == (0, 512)
        assert codec._kernels(x, 512, None) is None and codec._kernels(x, 512, True) is not None
    row = wire.Row(QUANTIZED["int4"], 256, 512, 512, 4, 20, 276)
    with pytest.raises(ValueError, match="Rotation by 256: the wire kernels rotate blocks of 16 to 128 values"):
        wire.encode(x, row)
    with pytest.raises(ValueError, match=r"Torch\.float16: the wire kernels write fp32 and bf16"):
        wire.decode(codec.encode(x), row._replace(rotation=0), torch.float16)
