"""The chips that kernels are compiled for: what one streaming multiprocessor (SM) holds, and the published speeds.

Occupancy follows NVIDIA's occupancy calculator: registers are given to warps in units of 256 from four partitions of
16384, a CTA takes 1 KiB of shared memory beyond its own, and the scarcest of registers, shared memory, warps and CTAs
decides how many CTAs an SM holds.

The static roofline of a kernel, both in seconds: memory = bytes / bandwidth; issue = thread instructions /
(SMs x 4 schedulers x 32 lanes x clock).  The kernel can be bandwidth-bound only if issue < memory.  It is a bound on
speed and no prediction: latency, bank conflicts and occupancy are not in it.  None of these figures was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str  # the part whose speeds are given
    capability: int  # what Triton's GPUTarget takes: 100 is compiled as sm_100a
    sms: int
    clock_ghz: float  # boost clock where published, the lower figure where sources differ
    bandwidth_gb_s: float
    warps: int  # per SM
    ctas: int  # per SM
    shared_bytes: int  # per SM
    shared_per_cta_bytes: int
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


ARCHES: dict[str, Chip] = {
    "sm_80": Chip("A100 SXM 80 GB", 80, 108, 1.41, 2039, 64, 32, 164 << 10, 163 << 10),
    "sm_90": Chip("H100 SXM", 90, 132, 1.755, 3350, 64, 32, 228 << 10, 227 << 10),
    "sm_100": Chip("B200", 100, 148, 1.85, 8000, 64, 32, 228 << 10, 227 << 10, tensor_memory_columns=512),
    "sm_120": Chip("RTX 5090", 120, 170, 2.407, 1792, 48, 24, 100 << 10, 99 << 10),
}
PRODUCT = ("sm_90", "sm_100", "sm_120")  # every kernel is compiled for these in the tests; sm_80 on request


def chip_of(arch: str) -> Chip:
    if arch not in ARCHES:
        raise ValueError(f"No chip {arch!r} is described for kernels: write one of {', '.join(ARCHES)}.")
    return ARCHES[arch]
