"""Error feedback: errors do not add up, a step that is not taken leaves no trace, and the memory can be saved."""

import math

import pytest
import torch

from lowprec.comm import CODECS, Codec, Feedback


def gradients(steps: int) -> torch.Tensor:
    """(steps, 2, 160) gradients with a constant part, which plain rounding loses again and again."""
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(2, 160, generator=generator)
    return constant + 1e-4 * torch.randn(steps, 2, 160, generator=generator)


def send(feedback: Feedback, g: torch.Tensor, codec: Codec, accept: bool = True) -> torch.Tensor:
    """One step: what arrives."""
    h = feedback.compensate(g)
    arrived = codec.decode(codec.encode(h), g.shape[1])
    feedback.update(h, arrived)
    feedback.end_step(accept)
    return arrived


@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8", "int8", "bf16"])
def test_errors_do_not_add_up(name: str) -> None:
    """After any number of steps the sums of sent and meant differ by less than a quantum; without feedback by many."""
    codec, feedback, steps = CODECS[name], Feedback("ef"), 60
    # Half a step at the largest value of a block: 1/14 and 1/12 of it, 2^-4, 1/254 and 2^-8 of itself; 17/16 where the
    # stored scale may be rounded down, and the value grows by the error fed back.
    half = {"int4": 1 / 14 * 17 / 16, "nvfp4": 1 / 6 * 17 / 16, "fp8": 2**-4, "int8": 1 / 254, "bf16": 2**-8}[name]
    largest = gradients(steps).abs().max().item()
    bound = half * largest / (1 - half) + steps * 2**-22 * largest  # ... and fp32 sums of so many
    lost, lost_without = torch.zeros(2, 160).double(), torch.zeros(2, 160).double()
    for g in gradients(steps):
        lost += g - send(feedback, g, codec)
        lost_without += g - codec.decode(codec.encode(g), 160)
        assert lost.abs().max() <= bound
    assert lost_without.square().mean() > 100 * lost.square().mean()


def test_loco_averages_errors_and_forgets() -> None:
    """e <- 0.8 e + 0.2 (h - Q(h)), kept as FP8 blocks, zero after every reset."""
    codec, fp8, feedback = CODECS["int4"], CODECS["fp8"], Feedback("loco", reset=4)
    e = torch.zeros(2, 160)
    for step, g in enumerate(gradients(10)):
        h = g + e
        expected = codec.decode(codec.encode(h), 160)
        assert torch.equal(send(feedback, g, codec), expected)
        e = fp8.decode(fp8.encode((h - expected) * (1 - 0.8) + 0.8 * e), 160)
        e = torch.zeros_like(e) if (step + 1) % 4 == 0 else e
        assert feedback.state_dict()["error"].numel() == (0 if (step + 1) % 4 == 0 else 2 * fp8.payload_bytes(160))
    plain = [g - codec.decode(codec.encode(g), 160) for g in gradients(60)]
    feedback = Feedback("loco")
    helped = [g - send(feedback, g, codec) for g in gradients(60)]
    assert sum(helped).square().mean() < 0.5 * sum(plain).square().mean()


@pytest.mark.parametrize("kind", ["ef", "loco"])
def test_a_step_that_is_not_taken_leaves_no_trace(kind: str) -> None:
    """After a rejected step, NaN or not, the next one sends what it would have sent without it."""
    codec, g = CODECS["fp8"], gradients(3)
    control, tested = Feedback(kind), Feedback(kind)
    send(control, g[0], codec), send(tested, g[0], codec)
    broken = g[1].clone()
    broken[1, 7] = math.nan
    assert send(tested, broken, codec, accept=False).isnan().any()
    send(tested, g[1], codec, accept=False)
    assert tested.steps == control.steps == 1
    assert torch.equal(send(tested, g[2], codec), send(control, g[2], codec))


def test_several_sends_in_a_step() -> None:
    """Micro-batches that are reduced one by one feed their errors on within the step; a rejection drops all of it."""
    codec, g = CODECS["int4"], gradients(3)
    feedback, control = Feedback("ef"), Feedback("ef")
    for part in g[:2]:
        h = feedback.compensate(part)
        feedback.update(h, codec.decode(codec.encode(h), 160))
        send(control, part, codec)
    feedback.end_step(True)
    assert torch.equal(feedback.state_dict()["error"], control.state_dict()["error"])


@pytest.mark.parametrize("kind", ["ef", "loco"])
def test_saved_and_loaded(kind: str) -> None:
    """A loaded memory goes on bit for bit, resets at the same step, and shares no storage with the saved one."""
    codec, g = CODECS["int4"], gradients(8)
    straight, first = Feedback(kind, reset=5), Feedback(kind, reset=5)
    sent = [send(straight, x, codec) for x in g]
    empty = {key: value.clone() for key, value in first.state_dict().items()}
    for x in g[:3]:
        send(first, x, codec)
    resumed = Feedback(kind, reset=5)
    resumed.load_state_dict(first.state_dict())
    send(first, g[0], codec)
    for x, expected in zip(g[3:], sent[3:]):
        assert torch.equal(send(resumed, x, codec), expected)
    resumed.load_state_dict(empty)
    assert torch.equal(send(resumed, g[0], codec), sent[0]) and resumed.steps == 1


def test_refusals() -> None:
    """Unknown kinds, another layout, another kind's memory."""
    with pytest.raises(ValueError, match="feedback is one of ef, loco with reset >= 0 steps, got 'EF21'"):
        Feedback("EF21")
    feedback = Feedback("ef")
    send(feedback, torch.randn(2, 160), CODECS["fp8"])
    with pytest.raises(ValueError, match="resume without it"):
        feedback.compensate(torch.randn(4, 80))
    with pytest.raises(ValueError, match="resume with the feedback it was saved with, or without it"):
        Feedback("loco").load_state_dict(feedback.state_dict())
