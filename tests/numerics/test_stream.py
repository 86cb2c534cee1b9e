"""Stream: known answers, independence of process and layout."""

import subprocess
import sys

import torch

from lowprec.numerics import Clock, Stream
from lowprec.numerics.stream import philox


def test_philox_known_answers():
    """Philox4x32-10 test vectors of the Random123 distribution."""

    def run(counter, key):
        return [int(word[0]) for word in philox([torch.tensor([c]) for c in counter], key)]

    assert run([0, 0, 0, 0], (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert run([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = run([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_layout_of_the_bits():
    """Element i is a half of word (i % 8) // 2 of Philox group i // 8."""
    stream = Stream(seed=3, step=5, micro=7, layer="l")
    bits = stream.bits("r", (3, 9)).reshape(-1)
    for i in (0, 1, 6, 7, 8, 26):
        words = philox([torch.tensor([c]) for c in (i // 8, 0, 5, 7)], stream.key("r"))
        assert bits[i] == (int(words[i % 8 // 2]) >> 16 * (i % 2)) & 0xFFFF


def test_every_coordinate_changes_the_bits_and_nothing_else_does():
    base = Stream(1, 2, 3, "a")
    bits = base.bits("r", (64,))
    others = [Stream(2, 2, 3, "a"), Stream(1, 3, 3, "a"), Stream(1, 2, 4, "a"), Stream(1, 2, 3, "b")]
    for other in [s.bits("r", (64,)) for s in others] + [base.bits("s", (64,))]:
        assert (bits == other).sum() < 8
    assert torch.equal(bits, Clock(1, 2, 3).stream("a").bits("r", (64,)))


def test_another_process_draws_the_same_bits():
    """Python salts hash() per process; stream keys do not depend on it."""
    code = "from lowprec.numerics import Stream; print(Stream(1, 2, 3, 'layers.0').bits('dgrad.dy', (4,)).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.strip() == str(Stream(1, 2, 3, "layers.0").bits("dgrad.dy", (4,)).tolist())


def test_noise_is_uniform_and_signs_are_balanced():
    """Mean, variance and lag-1 correlation of n uniforms within 4 standard errors (fixed stream)."""
    n = 2**17
    u = Stream(seed=11).noise("u", (n,)).double() - 0.5
    assert u.abs().max() < 0.5
    assert abs(u.mean()) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.square().mean() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    assert abs((u[1:] * u[:-1]).mean()) < 4 / 12 / n**0.5
    assert abs(Stream().signs("s", n).sum()) < 4 * n**0.5
