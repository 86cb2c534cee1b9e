"""Block Hadamard rotations: spread outliers over a block before it is quantised.

``rotate(x)`` multiplies every block of ``n`` consecutive elements of the last axis by the orthogonal matrix
``diag(signs) H_n / sqrt(n)`` (Sylvester order). Rotating the contracted axis of *both* operands of a matrix product
leaves the product unchanged, ``(A R)(B R)^T = A B^T``, but each operand is flatter, so a block scale loses less
(arXiv:2509.25149 section 4.2; QuaRot, arXiv:2404.00456).

The order of operations is part of the definition, so that a kernel can equal it bit for bit: multiply by the fp32
numbers ``signs * n**-0.5`` (first, so that 3e38 does not overflow on the way), run the butterfly in fp32 with
distances 1, 2, 4, ..., ``(u, v) -> (u + v, u - v)``, and round to the input's dtype (bf16 inputs are rotated into
bf16, as TransformerEngine and torchao do). The inverse runs the butterfly first and multiplies last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.stream import Stream

_NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def fixed_signs(n: int) -> Tensor:
    """The sign vector that a whole run shares: for n = 16 the one that NVFP4 training stacks hard-code; fp32 (n,)."""
    if n == 16:
        return torch.tensor(_NVFP4_SIGNS, dtype=torch.float32, device="cpu")
    return Stream(layer="fixed_signs").signs(f"signs{n}", n)


def hadamard(n: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix, fp32 (n, n).

    Raises:
        ValueError: if n is not a power of two.
    """
    check_size(n)
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * n**-0.5


def check_size(n: int) -> None:
    """Refuse sizes that have no Sylvester-Hadamard matrix."""
    if n < 2 or n & (n - 1):
        raise ValueError(f"Hadamard size {n} is not a power of two of at least 2; use 16, 32, 64 or 128")


def rotate(x: Tensor, n: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Rotate blocks of ``n`` along the last axis.

    Args:
        x: (..., k) of any floating dtype with k a multiple of n.
        n: block size, a power of two.
        signs: (n,) of +-1, or None for all ones.
        inverse: apply the transpose instead, which undoes the rotation.

    Returns:
        Same shape and dtype as x; computed in fp32 and rounded once to x's dtype.

    Raises:
        ValueError: if n is no power of two or does not divide k.
    """
    check_size(n)
    if x.shape[-1] % n:
        raise ValueError(
            f"a Hadamard block of {n} does not divide the axis of {x.shape[-1]}; pad it or choose a smaller size"
        )
    t = x.float().reshape(-1, n)
    factor = torch.full((n,), n**-0.5, device=t.device)
    factor = factor if signs is None else factor * signs.to(t.device)
    t = t if inverse else t * factor
    h = 1
    while h < n:
        pairs = t.reshape(-1, n // (2 * h), 2, h)
        u, v = pairs[:, :, 0], pairs[:, :, 1]
        t = torch.stack([u + v, u - v], dim=2).reshape(-1, n)
        h *= 2
    t = t * factor if inverse else t
    return t.reshape(x.shape).to(x.dtype)
