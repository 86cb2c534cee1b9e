"""Counter-based random bits: the same ``(seed, step, micro, layer, role)`` always draws the same numbers.

Stochastic rounding and random signs need random bits that a resumed run, a recomputed activation and another number of
ranks all draw again. So there is no generator with a state: bits are a pure function of a counter, Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which C++ and Triton compute identically.

Layout, fixed for every backend. The 64-bit key is a BLAKE2 hash of ``seed/layer/role``. The 128-bit counter is
``(group low, group high, step, micro)``. One Philox call serves a *group* of eight consecutive elements with 16 random
bits each: element ``i`` (row-major index in the tensor as it lies in memory) takes word ``(i % 8) // 2`` of group
``i // 8``, the low half if ``i`` is even, else the high half. Uniform noise is ``(bits + 1/2) / 65536``: symmetric
about 1/2, never 0 or 1, so that stochastic rounding errs by at most ``step / 131072`` in the mean.

``micro`` numbers the micro-batches of a step over all ranks, so one rank that accumulates two micro-batches and two
ranks with one each round the same tokens with the same bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors holding 32-bit words (one shape) and a key -> four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps mod 2**64: the bit pattern is the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


@dataclass(frozen=True)
class Stream:
    """The random bits of one layer in one micro-batch of one step."""

    seed: int = 0
    step: int = 0
    micro: int = 0
    layer: str = ""

    def key(self, role: str) -> tuple[int, int]:
        """Philox key of a role such as ``"dgrad.dy"``: two 32-bit words, the same in every process."""
        digest = hashlib.blake2b(f"{self.seed}/{self.layer}/{role}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def bits(self, role: str, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """16-bit random integers in [0, 65535], int32, in row-major order of ``shape``."""
        count = 1
        for size in shape:
            count *= size
        group = torch.arange((count + 7) // 8, dtype=torch.int64, device=device)
        fill = torch.full_like(group, 1)
        words = philox([group & _MASK, group >> 32, fill * self.step, fill * self.micro], self.key(role))
        halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)  # (groups, 8)
        return halves.reshape(-1)[:count].to(torch.int32).reshape(shape)

    def noise(self, role: str, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """Uniform noise in (0, 1), fp32, exact multiples of 1/131072."""
        return (self.bits(role, shape, device).float() + 0.5) / 65536

    def signs(self, role: str, n: int, device: torch.device | str = "cpu") -> Tensor:
        """n random signs, fp32, +1 or -1."""
        return 1.0 - 2.0 * (self.bits(role, (n,), device) & 1).float()


@dataclass
class Clock:
    """Where a run stands. One clock is shared by all layers of a model; the loop sets it before every micro-batch."""

    seed: int = 0
    step: int = 0
    micro: int = 0

    def stream(self, layer: str) -> Stream:
        """The stream of a layer now. Take it once per forward and keep it for the backward."""
        return Stream(self.seed, self.step, self.micro, layer)
