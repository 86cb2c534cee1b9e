"""Devices: published values of what runs are planned for. Data sheets, never measurements.

`flops` are dense peaks (data sheets like to print twice that, for 2:4 sparsity) with fp32 accumulation, by the
precision of a product's operands; a precision that is not listed is not there in hardware. Links and network count one
direction (data sheets print both together).

    name         bf16      fp8       fp4       int8      memory           links in a node   network a device
    h100_sxm     989 T     1,979 T   -         1,979 T   80 GB 3.35 TB/s  NVLink 4 450 GB/s     50 GB/s
    b200         2.25 P    4.5 P     9 P       4.5 P     180 GB 8 TB/s    NVLink 5 900 GB/s     50 GB/s
    b300         2.25 P    4.5 P     13.5 P    0.15 P    270 GB 8 TB/s    NVLink 5 900 GB/s    100 GB/s
    gb200_nvl72  2.5 P     5 P       10 P      5 P       186 GB 8 TB/s    NVLink 5 900 GB/s, 72 a domain
    rtx5090      209.5 T   419 T     1,676 T   838 T     32 GB 1.79 TB/s  PCIe 5 x16 64 GB/s, assumed
    cpu          of no data sheet: round numbers, which only put layouts into an order
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Moved(Protocol):
    """What :meth:`Hardware.seconds` needs to know of a transfer (:class:`lowprec.parallel.account.Transfer`)."""

    @property
    def name(self) -> str: ...
    @property
    def ranks(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def calls(self) -> int: ...


@dataclass(frozen=True)
class Hardware:
    """One device, its links (one direction each) and its node."""

    name: str
    memory_bytes: float
    flops: Mapping[str, float]  # dense peak FLOP/s by precision
    memory_bytes_per_s: float
    inside_bytes_per_s: float  # to the other devices of its node
    between_bytes_per_s: float  # its share of the node's network
    per_node: int = 8
    precision: str = "bf16"  # which of `flops` counts
    compute_share: float = 0.4  # of the peak, assumed
    link_share: float = 0.8  # of the links' speed, assumed
    latency_s: float = 1e-5  # of a collective, assumed
    reserve: float = 0.1  # of the memory: fragments, buffers of the network library, workspaces; assumed
    source: str = ""  # of the values
    names: tuple[str, ...] = ()  # what torch.cuda.get_device_name has in it

    @property
    def flops_per_s(self) -> float:
        """What products reach. Raises ValueError for a precision that the device does not list."""
        if self.precision not in self.flops:
            raise ValueError(f"{self.name} lists no FLOP/s in {self.precision}: choose one of {', '.join(self.flops)}")
        return self.flops[self.precision] * self.compute_share

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * (1 - self.reserve)

    def neighbours(self, ranks: int, stride: int, world: int) -> int:
        """How many of a group of ranks so far apart share a node; 1 where nodes cut groups unevenly."""
        span, node = ranks * stride, self.per_node
        if world <= node or node % span == 0:
            return ranks
        return node // stride if span % node == 0 and node % stride == 0 else 1

    def crosses(self, ranks: int, stride: int, world: int) -> bool:
        """Whether such a group spans nodes."""
        return self.neighbours(ranks, stride, world) < ranks

    def seconds(self, transfer: Moved, world: int) -> float:
        """How long the collectives of a kind take in a step."""
        near, inside = self.neighbours(transfer.ranks, transfer.stride, world), self.inside_bytes_per_s
        speed = inside if near == transfer.ranks else min(inside, near * self.between_bytes_per_s)
        share = 1.0 if transfer.name == "pipeline_send" else (transfer.ranks - 1) / transfer.ranks
        return share * transfer.bytes / (speed * self.link_share) + transfer.calls * self.latency_s


_TABLE = (
    Hardware(
        "h100_sxm",
        80e9,
        {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
        3.35e12,
        450e9,
        50e9,
        source="NVIDIA H100 data sheet, SXM; DGX H100: one 400 Gb/s card a device",
        names=("H100 80GB HBM3", "H100 SXM"),
    ),
    Hardware(
        "b200",
        180e9,
        {"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9e15, "int8": 4.5e15},
        8e12,
        900e9,
        50e9,
        source="NVIDIA Blackwell architecture technical brief, HGX B200; DGX B200: one 400 Gb/s card a device",
        names=("NVIDIA B200",),
    ),
    Hardware(
        "b300",
        270e9,
        {"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 13.5e15, "int8": 0.15e15},
        8e12,
        900e9,
        100e9,
        source="NVIDIA HGX B300 (8 devices: 108 PFLOP/s FP4 dense, 2.1 TB); one 800 Gb/s card a device",
        names=("NVIDIA B300",),
    ),
    Hardware(
        "gb200_nvl72",
        186e9,
        {"bf16": 2.5e15, "fp8": 5e15, "fp4": 1e16, "int8": 5e15},
        8e12,
        900e9,
        50e9,
        72,
        source="NVIDIA GB200 NVL72: 72 devices are one NVLink domain, here a node; one 400 Gb/s card a device",
        names=("GB200",),
    ),
    Hardware(
        "rtx5090",
        32e9,
        {"bf16": 209.5e12, "fp8": 419e12, "fp4": 1676e12, "int8": 838e12},
        1.792e12,
        64e9,
        12.5e9,
        source="NVIDIA RTX Blackwell architecture white paper; PCIe 5 x16 and a 100 Gb/s card are assumed",
        names=("RTX 5090",),
    ),
    Hardware("cpu", 8e9, {"bf16": 4e11, "fp32": 2e11}, 3e10, 3e9, 1e9, reserve=0.2, source="none: round numbers"),
)
HARDWARE = {device.name: device for device in _TABLE}
"""By name. Memory of "cpu" is the machine's where it is known."""
ALIASES = {"h100": "h100_sxm", "gb200": "gb200_nvl72"}
"""Shorter names."""


def device_named(name: str) -> Hardware:
    """The device of that name or alias. Raises ValueError for others."""
    if (known := HARDWARE.get(ALIASES.get(name, name))) is None:
        valid = ", ".join(sorted((*HARDWARE, *ALIASES)))
        raise ValueError(f"there is no device {name!r} in the table; choose one of {valid}")
    return known


def recognised(name: str) -> Hardware | None:
    """The device that calls itself so (`torch.cuda.get_device_name`), or None: then there is no published peak."""
    return next((device for device in _TABLE if any(part in name for part in device.names)), None)
