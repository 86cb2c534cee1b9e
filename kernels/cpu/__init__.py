"""kernels.cpu: the C++ fast path for quantised products on x86-64 CPUs with AVX512-VNNI and AVX512-BF16.

==================  ===============================================================
:file:`simd.h`      rounding to any element; maxima that keep NaN
:file:`philox.h`    counter-based random bits
:file:`tile.h`      reading an operand along either axis; block Hadamard rotation
:file:`hadamard.h`  rotating a whole matrix, also whole axes
:file:`scale.h`     block scales
:file:`operand.h`   preparing an operand: sizes, scales, codes
:file:`codes.h`     the same from codes that were made before
:file:`packed.h`    the layout of a prepared operand
:file:`stored.h`    the same in little memory, for the backward pass
:file:`gemm_*.h`    the products: integers on the int8 unit, everything else in bf16
:file:`api.cpp`     the C interface
==================  ===============================================================

:mod:`~lowprec.kernels.cpu.build` compiles them, :mod:`~lowprec.kernels.cpu.operand` describes operands to them,
:mod:`~lowprec.kernels.cpu.backend` calls them.

Importing this needs neither a compiler nor the right CPU: :meth:`CpuBackend.refuses` says in words what is missing.
"""

from lowprec.kernels.cpu.backend import CpuBackend, backend, rotate

__all__ = ["CpuBackend", "backend", "rotate"]
