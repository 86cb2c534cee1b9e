"""Meter: how many bytes collectives moved, by name.

What is counted is the *logical* payload of one rank, which depends neither on the library nor on the number of ranks:

================== =============================================================
all-gather         the whole gathered result
reduce-scatter     the whole input before it is reduced
all-reduce         twice its buffer: a reduce-scatter and an all-gather
point to point     what is received
group of one rank  nothing
================== =============================================================

So sharded bf16 training counts 2 + 2 + 2 bytes a parameter and step on any number ``W`` of ranks; ``(W - 1) / W`` of
that crosses a link. What this is not: a measurement of the network. gloo, for one, moves twice the bytes of a
reduce-scatter.
"""

from __future__ import annotations


class Meter:
    """Bytes by name since the last :meth:`take`; `calls` counts all collectives ever."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self.calls = 0

    def add(self, name: str, count_bytes: int) -> None:
        """Count a collective."""
        self._bytes[name] = self._bytes.get(name, 0) + count_bytes
        self.calls += 1

    def take(self) -> dict[str, int]:
        """{name: bytes}, sorted by name; counting starts anew."""
        taken, self._bytes = self._bytes, {}
        return dict(sorted(taken.items()))
