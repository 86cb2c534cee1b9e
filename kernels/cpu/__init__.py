"""kernels.cpu: the C++ fast path for quantised products on x86-64 CPUs with AVX512-VNNI and AVX512-BF16.

=================  ==================================================================
:file:`simd.h`     rounding to E2M1, E4M3, E5M2; maxima that keep NaN
:file:`philox.h`   counter-based random bits
:file:`tile.h`     reading an operand along either axis; Hadamard rotation
:file:`quantise.h` scales, codes, packed layout
:file:`gemm_*.h`   the products: FP4 on the int8 unit, everything else in bf16
:file:`api.cpp`    the C interface
=================  ==================================================================

:mod:`~lowprec.kernels.cpu.build` compiles them, :mod:`~lowprec.kernels.cpu.backend` calls them.

Importing this needs neither a compiler nor the right CPU: :meth:`CpuBackend.refuses` says in words what is missing.
"""

from lowprec.kernels.cpu.backend import CpuBackend, backend

__all__ = ["CpuBackend", "backend"]
