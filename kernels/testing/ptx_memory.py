"""Memory of a simulated GPU: tensors at made-up addresses, shared memory per program, and the bill for every access.

Each tensor gets an address range of its own with forbidden ground around it, so an access that leaves a tensor by one
byte is an error and not a neighbour's data.  Accesses must be aligned to their width, as on a GPU.  A race is an error
too: a program that loads what another one stored, or two that store different values to one place.

**Sectors.**  A warp's access is served in sectors of 32 aligned bytes.  `requests` counts warps, `sectors` the distinct
sectors of each request, `bytes` what the threads asked for: bytes / (32 sectors) is the efficiency of a request.
`unique_bytes` counts every sector once for the whole launch: what DRAM must move at least.  sectors x 32 is what the
caches serve; divided by the size of the tensor, the number of passes over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .ptx_parse import Fault

Array = NDArray[Any]
_FIRST, _GAP = 0x7F00_0000_0000, 1 << 20


@dataclass
class Traffic:
    """Of one argument, one direction ("load", "store" or "atomic")."""

    requests: int = 0
    sectors: int = 0
    bytes: int = 0
    unique_bytes: int = 0

    @property
    def efficiency(self) -> float:
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0


class Global:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.bases: list[int] = []
        self.data: list[Array] = []
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self._touched: dict[tuple[str, str], Array] = {}
        self._writer: list[Array | None] = []  # per tensor and byte, the program that stored it, or -1
        self._next = _FIRST

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Maps a tensor and returns its address: its storage begins at a multiple of 256 bytes, as a GPU's does."""
        if tensor.device.type != "cpu":
            raise ValueError(f"The executor runs on the CPU, and {name} is on {tensor.device}.")
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        flat = tensor.detach().as_strided((span,), (1,)).view(torch.uint8).numpy()
        base = self._next + (tensor.data_ptr() - tensor.untyped_storage().data_ptr()) % 256
        self._next += (flat.nbytes + 2 * _GAP) // _GAP * _GAP
        self.names.append(name)
        self.bases.append(base)
        self.data.append(flat)
        self._writer.append(None)
        return base

    def _groups(self, addresses: Array, width: int, what: str) -> list[tuple[int, Array, Array]]:
        """[(tensor, which of the accesses, offsets in units of `width`)], or a Fault."""
        crooked = np.nonzero(addresses % np.uint64(width))[0]
        if len(crooked):
            bad = int(crooked[0])
            raise Fault(f"{what} of {width} bytes is misaligned: {self.place(int(addresses[bad]))}.", bad)
        if not self.data:
            raise Fault(f"{what} of {width} bytes at {int(addresses[0]):#x}, but the kernel was given no tensor.")
        number = np.searchsorted(np.array(self.bases, np.uint64), addresses, "right").astype(np.int64) - 1
        out = []
        for one in np.unique(number):
            which = np.nonzero(number == one)[0]
            base = self.bases[max(one, 0)]
            offset = addresses[which].astype(np.int64) - base
            outside = (offset < 0) | (offset + width > self.data[max(one, 0)].nbytes)
            if outside.any():
                bad = int(which[outside][0])
                raise Fault(f"{what} of {width} bytes is out of bounds: {self.place(int(addresses[bad]))}.", bad)
            out.append((int(one), which, offset))
        return out

    def place(self, address: int) -> str:
        """ "x_ptr + 4096, which has 4096 bytes"."""
        i = max((i for i, base in enumerate(self.bases) if base <= address), default=0)
        return f"{self.names[i]} {address - self.bases[i]:+d}, which has {self.data[i].nbytes} bytes"

    def load(self, addresses: Array, width: int, program: Array) -> Array:
        """(accesses, width) bytes; `program` tells whose access each is."""
        out = np.empty((len(addresses), width), np.uint8)
        for tensor, which, offset in self._groups(addresses, width, "A load"):
            cells, writer = offset[:, None] + np.arange(width), self._writer[tensor]
            out[which] = self.data[tensor][cells]
            if writer is not None:
                self._race(writer[cells] >= 0, writer[cells], program, which, addresses, "loads what another stored")
        return out

    def store(self, addresses: Array, values: Array, program: Array) -> None:
        width = values.shape[1]
        for tensor, which, offset in self._groups(addresses, width, "A store"):
            cells, data, writer = offset[:, None] + np.arange(width), self.data[tensor], self._writer[tensor]
            if writer is None:
                writer = self._writer[tensor] = np.full(data.nbytes, -1, np.int32)
            changed = (writer[cells] >= 0) & (data[cells] != values[which])
            self._race(changed, writer[cells], program, which, addresses, "stores something else than another did")
            data[cells], writer[cells] = values[which], program[which, None]
            lost = (data[cells] != values[which]).any(1)
            if lost.any():
                bad = int(which[lost][0])
                raise Fault(f"Threads store different values at once: {self.place(int(addresses[bad]))}.", bad)

    def _race(
        self, candidates: Array, writer: Array, program: Array, which: Array, addresses: Array, what: str
    ) -> None:
        """Programs run in no order, so one must not depend on the stores of another."""
        wrong = (candidates & (writer != program[which, None])).any(1)
        if wrong.any():
            bad = int(which[wrong][0])
            raise Fault(f"A program {what} in the same launch: {self.place(int(addresses[bad]))}.", bad)

    def update(self, addresses: Array, dtype: Any, combine: Any) -> Array:
        """Atomic read-modify-write in the order of threads: `combine(old values, which threads)` gives the new ones.
        Returns what each thread found there."""
        found = np.empty(len(addresses), dtype)
        for tensor, which, offset in self._groups(addresses, np.dtype(dtype).itemsize, "An atomic operation"):
            found[which] = _update(self.data[tensor], offset, which, dtype, combine)
        return found

    def account(self, direction: str, addresses: Array, active: Array, width: int) -> None:
        """Adds one access of all threads to the bill.  `addresses` and `active` have one entry a thread."""
        first = addresses[active]
        number = np.searchsorted(np.array(self.bases, np.uint64), first, "right").astype(np.int64) - 1
        for tensor in np.unique(number):
            key = (self.names[tensor], direction)
            bill = self.traffic.setdefault(key, Traffic())
            base, data = self.bases[tensor], self.data[tensor]
            mine = active.copy()
            mine[active] = number == tensor
            sector = np.where(mine, (addresses // np.uint64(32)).astype(np.int64) - base // 32, -1)
            warps = np.sort(np.append(sector, np.full(-len(sector) % 32, -1)).reshape(-1, 32), axis=1)
            distinct = (warps[:, 1:] != warps[:, :-1]).sum(1) + 1 - (warps[:, 0] == -1)
            bill.requests += int((distinct > 0).sum())
            bill.sectors += int(distinct.sum())
            bill.bytes += int(mine.sum()) * width
            seen = self._touched.setdefault(key, np.zeros((data.nbytes + base % 32 + 31) // 32, bool))
            seen[sector[mine]] = True
            bill.unique_bytes = 32 * int(seen.sum())


def _update(data: Array, offset: Array, which: Array, dtype: Any, combine: Any) -> Array:
    """Atomic updates of bytes at `offset`, one after the other where several hit one place; what each found."""
    width = np.dtype(dtype).itemsize
    cells = offset[:, None] + np.arange(width)
    if len(np.unique(offset)) == len(offset):
        old = np.ascontiguousarray(data[cells]).view(dtype)[:, 0]
        data[cells] = np.ascontiguousarray(combine(old, which).astype(dtype)).view(np.uint8).reshape(-1, width)
        return old
    found = np.empty(len(offset), dtype)
    for i, cell in enumerate(cells):
        found[i : i + 1] = data[cell].view(dtype)
        data[cell] = combine(found[i : i + 1], which[i : i + 1]).astype(dtype).view(np.uint8)
    return found


class Shared:
    """Shared memory of every program: (programs, bytes), filled with NaN patterns."""

    def __init__(self, programs: int, size: int):
        self.size = size
        self.data = np.full((programs, max(size, 1)), 0xFF, np.uint8)

    def cells(self, program: Array, offset: Array, width: int, what: str, granule: int | None = None) -> Any:
        """Index of (accesses, width) bytes after the checks."""
        if (offset % (granule or width)).any():
            raise Fault(f"{what} of {width} bytes of shared memory is misaligned.")
        if len(offset) and (int(offset.min()) < 0 or int(offset.max()) + width > self.size):
            raise Fault(
                f"{what} of {width} bytes leaves the {self.size} bytes of shared memory at {int(offset.max())}."
            )
        return program[:, None], offset[:, None] + np.arange(width)

    def update(self, program: Array, offset: Array, dtype: Any, combine: Any) -> Array:
        self.cells(program, offset, np.dtype(dtype).itemsize, "An atomic operation")
        flat = program * self.data.shape[1] + offset
        return _update(self.data.reshape(-1), flat, np.arange(len(flat)), dtype, combine)
