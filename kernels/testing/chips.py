"""The chips that kernels are compiled for: what one streaming multiprocessor (SM) holds, and the published speeds.

Occupancy follows NVIDIA's occupancy calculator: registers are given to warps in units of 256 from four partitions of
16384, a CTA takes 1 KiB of shared memory beyond its own, and the scarcest of registers, shared memory, warps and CTAs
decides how many CTAs an SM holds.

The static roofline of a kernel, both in seconds: memory = bytes / bandwidth; issue = thread instructions /
(SMs x 4 schedulers x 32 lanes x clock).  The kernel can be bandwidth-bound only if issue < memory.  It is a bound on
speed and no prediction: latency, bank conflicts and occupancy are not in it.  None of these figures was measured
here.  `Chip.source` says where the speeds come from; where two are published the stricter one for the question "is it
bound by memory?" is taken: the lower clock, the higher bandwidth.  Warps, CTAs and shared memory are those of the table
of compute capabilities in NVIDIA's CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str  # the part whose speeds are given
    capability: int  # what Triton's GPUTarget takes: 100 is compiled as sm_100a
    sms: int
    clock_ghz: float
    bandwidth_gb_s: float
    warps: int  # per SM
    ctas: int  # per SM
    shared_bytes: int  # per SM
    shared_per_cta_bytes: int
    source: str  # of SMs, clock and bandwidth
    registers_per_thread: int = 255
    tensor_memory_columns: int = 0  # 128 lanes x 32 bits each; only sm_100 has this memory

    def ctas_per_sm(self, registers: int, shared_bytes: int, threads: int) -> int:
        warps_per_cta = -(-threads // 32)
        warp_registers = -(-max(registers, 1) // 8) * 256
        by_registers = 16384 // warp_registers * 4 // warps_per_cta
        by_shared = self.shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128)
        return min(by_registers, by_shared, self.warps // warps_per_cta, self.ctas)

    def memory_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / (self.bandwidth_gb_s * 1e9)

    def issue_seconds(self, thread_instructions: float) -> float:
        return thread_instructions / (self.sms * 128 * self.clock_ghz * 1e9)


_A100 = "NVIDIA A100 80GB datasheet and whitepaper, from memory: unconfirmed"
_H100 = (
    "NVIDIA H100 datasheet and whitepaper (SXM5), as quoted by glennklockwood.com/garden/processors/h100: 132 SMs, "
    "3.35 TB/s, 1.83 GHz for tensor cores, which is the dense BF16 peak of 989.4 TFLOP/s over 132 SMs x 4096 FLOP "
    "(1.98 GHz else)"
)
_B200 = (
    "DGX B200 datasheet: 64 TB/s over 8 GPUs; 148 SMs and 7,672 GB/s by a B200's driver (github.com/pytorch/ao/pull/"
    "4002); no clock is published: 1.85 GHz is the dense BF16 peak of HGX B200, 2.25 PFLOP/s, over 148 SMs x 8192 FLOP,"
    " unconfirmed (1.98 GHz by its FP32 peak of 75 TFLOP/s)"
)
_RTX = (
    "NVIDIA's specifications of the GeForce RTX 5090, as printed in Linux Format, May 2025: 170 SMs, boost 2407 MHz, "
    "1,792 GB/s"
)
ARCHES: dict[str, Chip] = {
    "sm_80": Chip("A100 SXM 80 GB", 80, 108, 1.41, 2039, 64, 32, 164 << 10, 163 << 10, _A100),
    "sm_90": Chip("H100 SXM", 90, 132, 1.83, 3350, 64, 32, 228 << 10, 227 << 10, _H100),
    "sm_100": Chip("B200", 100, 148, 1.85, 8000, 64, 32, 228 << 10, 227 << 10, _B200, tensor_memory_columns=512),
    "sm_120": Chip("RTX 5090", 120, 170, 2.407, 1792, 48, 24, 100 << 10, 99 << 10, _RTX),
}
PRODUCT = ("sm_90", "sm_100", "sm_120")  # every kernel is compiled for these in the tests; sm_80 on request


def chip_of(arch: str) -> Chip:
    if arch not in ARCHES:
        raise ValueError(f"No chip {arch!r} is described for kernels: write one of {', '.join(ARCHES)}.")
    return ARCHES[arch]
