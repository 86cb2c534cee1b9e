"""Triton kernels: one idea a file, each equal to the definition in :mod:`lowprec.numerics` bit for bit.

`codes` rounds to elements, `scales` sizes blocks, `noise` draws the random bits of a `Stream`, `layout` says where scales
lie, `recipe` is a format as the kernels take it, `quantize` is
the kernel, `launch` its host side.  They are proved by :mod:`lowprec.kernels.testing`; their speed on a GPU has
not been measured by us.  Nothing outside of this folder imports Triton.
"""
