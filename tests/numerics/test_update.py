"""Stochastic rounding to bf16 is exact in the mean, and loud; AdamW is torch's."""

import torch

from lowprec.numerics.stream import Stream
from lowprec.numerics.update import AdamW, adamw, stochastic_bf16

ALL = torch.arange(65536, dtype=torch.int32)


def test_every_draw_counts_once() -> None:
    """Over all 65536 draws a number goes up as often as its lower half says: the mean is the number."""
    for x in (1.0 + 2**-9, -1.0 - 2**-20, 3.14159, -1e-40, 2.0**-126 * 1.3, 6.1e37, -0.1):
        number = torch.tensor([x], dtype=torch.float32)
        rounded = stochastic_bf16(number.expand(65536), ALL)
        assert len(rounded.unique()) == 2 and torch.equal(rounded.double().mean(), number.double()[0])
        lower = int(number.view(torch.int32)[0]) & 0xFFFF
        assert int((rounded.abs() == rounded.abs().max()).sum()) == lower


def test_numbers_of_bf16_stay() -> None:
    """Whatever the draw, also zeros, subnormals, infinities; NaN is NaN."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for draw in (0, 1, 32768, 65535):
        y = stochastic_bf16(x.float(), torch.full(x.shape, draw, dtype=torch.int32))
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.view(torch.int16)[~x.isnan()], x.view(torch.int16)[~x.isnan()])
    odd = torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN that could overflow
    assert stochastic_bf16(odd, torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


def test_the_two_neighbours() -> None:
    """Never further than one step of bf16, and the bits of a stream leave no bias."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    y = stochastic_bf16(x, Stream(1).bits("weight", x.shape))
    error = (y.double() - x.double()) / x.double().abs()
    assert error.abs().max() < 2**-7
    assert abs(float(error.mean())) < 3 * float(error.std()) / 256


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator)
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mean, square = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 20):
        grad = torch.randn(1000, generator=generator)
        parameter.grad = grad.clone()
        theirs.step()
        weight, mean, square = adamw(weight, grad, mean, square, AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1, step))
    torch.testing.assert_close(weight, parameter.data, rtol=1e-5, atol=1e-6)
