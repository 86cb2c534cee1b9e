"""Random bits of the C++ kernels against published vectors and the plain-torch generator."""

import ctypes

import pytest
import torch

from lowprec.kernels.cpu.build import Unavailable, cpu_description, load
from lowprec.numerics import Stream

try:
    cpu_description()
    MISSING = ""
except Unavailable as error:
    MISSING = str(error)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# Random123, kat_vectors, "philox4x32 10": counter, key -> four words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits_of(key: tuple[int, ...], step: int, micro: int, first: int) -> list[int]:
    """64 random 16-bit integers from eight consecutive counters."""
    library, reason = load()
    assert library is not None, reason
    out = (ctypes.c_uint16 * 64)()
    library.lowprec_philox((ctypes.c_uint32 * 2)(*key), (ctypes.c_uint32 * 2)(step, micro), ctypes.c_uint64(first), out)
    return list(out)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Philox4x32-10 gives the words that Random123 publishes, low half first."""
    bits = bits_of(key, counter[2], counter[3], counter[0] | counter[1] << 32)
    assert bits[:8] == [half for word in words for half in (word & 0xFFFF, word >> 16)]


def test_same_bits_as_the_stream() -> None:
    """The eight counters of one call are the eight groups of Stream.bits."""
    stream = Stream(seed=11, step=2**31 + 5, micro=9, layer="lm_head")
    expected = stream.bits("dgrad.dy", (4, 64))
    for row in range(4):
        bits = bits_of(stream.key("dgrad.dy"), stream.step, stream.micro, row * 8)
        assert torch.equal(torch.tensor(bits, dtype=torch.int32), expected[row])


def test_counters_carry_into_the_high_word() -> None:
    """Elements beyond 2**35 use the second counter word: eight counters that cross the border equal single calls."""
    border = 2**32 - 3
    together = bits_of((1, 2), 3, 4, border)
    single = [half for i in range(8) for half in bits_of((1, 2), 3, 4, border + i)[:8]]
    assert together == single
    assert bits_of((1, 2), 3, 4, 2**32)[:8] != bits_of((1, 2), 3, 4, 0)[:8]
