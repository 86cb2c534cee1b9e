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
ranks with one each round the same tokens with the same bits. Ranks that share one matrix draw the bits of their part of
it: a :class:`Window` says where the part lies in the whole, whose indices are those above.
"""

from __future__ import annotations

import hashlib
import math
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


@dataclass(frozen=True, eq=False)
class Window:
    """Where a part of a matrix lies in the whole, both as they lie in memory.

    Attributes:
        shape: (rows, columns) of the whole.
        first_column: column of the whole at which the part begins; its columns follow one another.
        rows: int64, one for each row of the part, on the CPU: its place in the whole. None: 0, 1, 2, ...
    """

    shape: tuple[int, int]
    first_column: int = 0
    rows: Tensor | None = None

    def places(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 (rows,): where the part's rows lie in the whole."""
        return torch.arange(rows, device=device) if self.rows is None else self.rows.to(device)


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

    def _groups(self, role: str, group: Tensor) -> Tensor:
        """The eight 16-bit numbers, int32, of every group in an int64 tensor (...): (..., 8)."""
        fill = torch.full_like(group, 1)
        words = philox([group & _MASK, group >> 32, fill * self.step, fill * self.micro], self.key(role))
        return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).to(torch.int32)

    def bits(
        self,
        role: str,
        shape: tuple[int, ...] | torch.Size,
        device: torch.device | str = "cpu",
        window: Window | None = None,
    ) -> Tensor:
        """16-bit random integers in [0, 65535], int32, in row-major order of ``shape``.

        ``window`` makes them those of a part, (rows, columns) = ``shape``, of a larger matrix.
        """
        if window is None:
            count = math.prod(shape)
            groups = torch.arange((count + 7) // 8, dtype=torch.int64, device=device)
            return self._groups(role, groups).reshape(-1)[:count].reshape(shape)
        rows, columns = shape
        first_R1 = (window.places(rows, device) * window.shape[1] + window.first_column)[:, None]
        groups_RG = first_R1 // 8 + torch.arange((columns + 14) // 8, device=device)  # 7 more where a row begins inside
        return self._groups(role, groups_RG).flatten(1).gather(1, first_R1 % 8 + torch.arange(columns, device=device))

    def noise(
        self,
        role: str,
        shape: tuple[int, ...] | torch.Size,
        device: torch.device | str = "cpu",
        window: Window | None = None,
    ) -> Tensor:
        """Uniform noise in (0, 1), fp32, exact multiples of 1/131072; ``window`` as for :meth:`bits`."""
        return (self.bits(role, shape, device, window).float() + 0.5) / 65536

    def noise_like(self, role: str, x: Tensor, window: Window | None = None) -> Tensor:
        """Noise for x (rows, k), indexed by position in memory, so a transposed view gets the transposed noise.

        ``window`` is of the memory: of (k, rows) for a transposed view.
        """
        if x.stride(0) < x.stride(1):
            return self.noise(role, (x.shape[1], x.shape[0]), x.device, window).T
        return self.noise(role, tuple(x.shape), x.device, window)

    def scale_noise(self, role: str, x: Tensor, block: int, window: Window | None = None) -> Tensor:
        """Noise for the scales of 1 x ``block`` blocks of x (rows, k): (rows, blocks).

        It is drawn in panels of 16 rows: ``[row // 16, block, row % 16]``. ``window`` is of x's memory; 16 rows that
        begin at a multiple of 16, and a block, must lie together in the whole.
        """
        rows, blocks = x.shape[0], -(-x.shape[1] // block)
        panels, within = (rows + 15) // 16, None
        if window is not None:
            down, across = window.places(max(x.shape), x.device), window.first_column
            along_k = torch.arange(blocks, device=x.device) * block
            of_panel = torch.arange(panels, device=x.device) * 16
            if x.stride(0) < x.stride(1):
                place_P, place_B, k = of_panel + across, down[along_k], window.shape[0]
            else:
                place_P, place_B, k = down[of_panel], along_k + across, window.shape[1]
            lines = (place_P // 16 * -(-k // block))[:, None] + place_B // block
            within = Window((1, 16), 0, lines.flatten())
        noise = self.noise(role, (panels * blocks, 16), x.device, within).view(panels, blocks, 16)
        return noise.transpose(1, 2).reshape(-1, blocks)[:rows]

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
