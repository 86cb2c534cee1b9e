"""Averaging B draws: the error of an unbiased quantiser falls as 1/B, a biased one reaches a plateau.

With errors e_1 .. e_B of independent draws, ``U = mean over i != j of <e_i, e_j>`` estimates the squared bias
|E e|^2, which is the plateau that averaging approaches: ``E |mean e|^2 = |E e|^2 + E |e - E e|^2 / B``. If the bias is
zero, U has mean 0 and variance ``2 E<e_i, e_j>^2 / (B (B - 1))``, whatever the dependence between elements; the tests
allow three of these sigmas.
"""

from dataclasses import replace

import pytest
import torch

from lowprec.numerics import FORMATS, Stream, rotate

B = 64


def normal() -> torch.Tensor:
    return torch.randn(16, 256, generator=torch.Generator().manual_seed(7))


def sparse() -> torch.Tensor:
    """One element in 200 a hundred times larger: what one sign-randomised H_128 does not make Gaussian."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 512, generator=generator)
    return torch.where(torch.rand(64, 512, generator=generator) < 0.005, x * 100, x)


def stochastic(format, x, step):
    return format.quantize(x, Stream(step=step).noise("noise", x.shape)).dequantize()


def eden(format, group, rounds):
    """Rotate by fresh signs (once or twice), round by MS-EDEN, rotate back."""

    def draw(_, x, step):
        stream = Stream(step=step)
        signs = [stream.signs(f"signs{i}", 128) for i in range(rounds)]
        y = x
        for s in signs:
            y = rotate(y, 128, s)
        y = format.eden(y, stream.noise("scale", (x.shape[0], x.shape[1] // 16)), group).dequantize()
        for s in reversed(signs):
            y = rotate(y, 128, s, inverse=True)
        return y

    return draw


def bias_and_sigma(draw, format, x, count=B):
    """Squared bias over |x|^2, its standard deviation if there were none, and the error of a single draw."""
    errors = torch.stack([(draw(format, x, i) - x).flatten() for i in range(count)]).double() / x.double().norm()
    gram = errors @ errors.T
    single = gram.diagonal().mean().item()
    pairs = gram[~torch.eye(count, dtype=torch.bool)]
    return pairs.mean().item(), (2 * pairs.square().mean() / (count * (count - 1))).sqrt().item(), single


UNCLIPPED = [
    name
    for name, f in FORMATS.items()
    if f.rule == "absmax"
    and not (f.targets or f.second)
    and not (f.scale in ("e4m3", "ue5m3") and f.guard < 17 / 16)  # e4m3 scales round down by up to 1/17
    and not (f.scale_rounding in ("floor", "even") and f.guard == 1)
]
GUARDED = {f"{n} guarded": replace(FORMATS[n], guard=17 / 16) for n in ("nvfp4_2d", "nvfp4_row", "nvfp4_double")}


@pytest.mark.parametrize("name", [*UNCLIPPED, *GUARDED])
def test_stochastic_rounding_averages_out(name):
    """Every format that does not clip."""
    bias, sigma, single = bias_and_sigma(stochastic, {**FORMATS, **GUARDED}[name], normal())
    assert abs(bias) <= 3 * sigma and sigma < 0.01 * single


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("name,group", [("nvfp4_eden", 128), ("nvfp4_eden", 16), ("nvfp4_eden_46", 16), ("if4", 16)])
def test_eden_averages_out_with_fresh_signs(name, group, rounds):
    bias, sigma, single = bias_and_sigma(eden(FORMATS[name], group, rounds), None, normal())
    assert abs(bias) <= 3 * sigma and sigma < 0.01 * single


def test_what_is_biased():
    """Clipping, rounding to nearest, and EDEN without fresh signs all leave a plateau far beyond chance."""
    x = normal()
    for name in ("nvfp4", "mxfp4_floor"):
        bias, sigma, _ = bias_and_sigma(stochastic, FORMATS[name], x)
        assert bias > 5 * sigma, name
    fixed = eden(FORMATS["nvfp4_eden"], 128, 0)
    bias, sigma, single = bias_and_sigma(fixed, None, x)
    assert bias > 0.5 * single


def test_the_plateau_of_eden_on_sparse_outliers_and_the_second_round():
    """One rotation: averaging stops near 1e-3 of |x|^2 (a single draw: 1e-2). Two rotations: a hundredth of that or
    less. Stochastic rounding has none."""
    x = sparse()
    one, sigma, _ = bias_and_sigma(eden(FORMATS["nvfp4_eden"], 128, 1), None, x)
    assert 5e-4 < one < 2e-3 and one > 10 * sigma
    two, sigma, _ = bias_and_sigma(eden(FORMATS["nvfp4_eden"], 128, 2), None, x)
    assert two < 1e-5 + 3 * sigma and sigma < 1e-5
    none, sigma, _ = bias_and_sigma(stochastic, FORMATS["nvfp4_sr"], x)
    assert abs(none) <= 3 * sigma
