"""Device functions in a module of their own, as kernels have them: what `interpreted` must find by itself."""

import triton
import triton.language as tl


@triton.jit
def twice(x):
    return x + x


@triton.jit
def largest(x):
    return twice(tl.max(tl.abs(x), 0))


@triton.jit
def either(a, b):
    return tl.maximum(a, b)
