"""Hadamard rotations: spread outliers over a block, or a whole axis, before it is quantised.

``rotate(x)`` multiplies every block of ``n`` consecutive elements of the last axis by the orthogonal matrix
``diag(signs) H_n / sqrt(n)``. Rotating the contracted axis of *both* operands of a matrix product leaves the product
unchanged, ``(A R)(B R)^T = A B^T``, but each operand is flatter, so a block scale loses less (arXiv:2509.25149 section
4.2; QuaRot, arXiv:2404.00456; whole axes: HALO, arXiv:2501.02625).

For ``n`` a power of two, ``H_n`` is Sylvester's. A whole axis may have any length ``n = 2**a * m`` for which a Hadamard
matrix of order ``m`` is known here: ``H_n = H_(2**a) (x) P_m`` with Paley's constructions, ``m = q + 1`` (prime power
q = 3 mod 4) or ``m = 2 (q + 1)`` (prime power q = 1 mod 4). That covers the widths of common models.

The order of operations is part of the definition, so that a kernel can equal it bit for bit: multiply by the fp32
numbers ``signs * n**-0.5`` (first, so that 3e38 does not overflow on the way), run the butterfly in fp32 with
distances 1, 2, 4, ..., ``(u, v) -> (u + v, u - v)``, and round to the input's dtype (bf16 inputs are rotated into
bf16, as TransformerEngine and torchao do). The inverse runs the butterfly first and multiplies last. With a factor
``m`` its product comes before the butterfly, summed in fp64 and rounded once to fp32, so that no order of summation
shows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowprec.numerics.stream import Stream

_NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_LARGEST_PALEY = 1024


@functools.cache
def fixed_signs(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The sign vector that a whole run shares: for n = 16 the one that NVFP4 training stacks hard-code; fp32 (n,).

    Made once for each device, since a copy from the host would make it wait for the device; do not write to it.
    """
    if n == 16:
        return torch.tensor(_NVFP4_SIGNS, dtype=torch.float32, device=device)
    return Stream(layer="fixed_signs").signs(f"signs{n}", n, device)


def check_size(n: int) -> None:
    """Refuse block sizes that are no power of two."""
    if n < 2 or n & (n - 1):
        raise ValueError(f"Hadamard size {n} is not a power of two of at least 2; use 16, 32, 64 or 128")


def hadamard_order_refusal(n: int) -> str | None:
    """Why an axis of n elements cannot be rotated as a whole, or None."""
    if n >= 2 and _paley_factor(n) is not None:
        return None
    return (
        f"no Hadamard matrix of order {n} is at hand (2^a, or 2^a m with a Paley order m <= {_LARGEST_PALEY});"
        " use a block size such as 16 or 128"
    )


def hadamard(n: int) -> Tensor:
    """The orthonormal Hadamard matrix of :func:`rotate` without signs, fp32 (n, n), on the CPU.

    Raises:
        ValueError: if none of that order is at hand.
    """
    return rotate(torch.eye(n, device="cpu"), n)


def rotate(x: Tensor, n: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Rotate blocks of ``n`` along the last axis.

    Args:
        x: (..., k) of any floating dtype with k a multiple of n.
        n: block size: a power of two, or any order that :func:`hadamard_order_refusal` accepts.
        signs: (n,) of +-1, or None for all ones.
        inverse: apply the transpose instead, which undoes the rotation.

    Returns:
        Same shape and dtype as x; computed in fp32 and rounded once to x's dtype.

    Raises:
        ValueError: if there is no matrix of order n or n does not divide k.
    """
    m = _paley_factor(n) if n >= 2 else None
    if m is None:
        raise ValueError(hadamard_order_refusal(n))
    if x.shape[-1] % n:
        raise ValueError(
            f"a Hadamard block of {n} does not divide the axis of {x.shape[-1]}; pad it or choose a smaller size"
        )
    t = x.float().reshape(-1, n)
    factor = torch.full((n,), n**-0.5, device=t.device)
    factor = factor if signs is None else factor * signs.to(t.device)
    t = t if inverse else t * factor
    if m > 1:
        p = _paley_matrix(m).to(t.device)
        t = (t.reshape(-1, m).double() @ (p.T if inverse else p)).float().reshape(-1, n)
    h = m
    while h < n:
        pairs = t.reshape(-1, n // (2 * h), 2, h)
        u, v = pairs[:, :, 0], pairs[:, :, 1]
        t = torch.stack([u + v, u - v], dim=2).reshape(-1, n)
        h *= 2
    t = t * factor if inverse else t
    return t.reshape(x.shape).to(x.dtype)


@functools.cache
def _paley_factor(n: int) -> int | None:
    """m of n = 2**a * m: 1 for a power of two, else the smallest order that Paley's constructions reach, or None."""
    m = n // (n & -n)
    if m == 1:
        return 1
    while n % m == 0 and m <= _LARGEST_PALEY:
        if m % 4 == 0 and (_prime_power(m - 1) or (m // 2 % 4 == 2 and _prime_power(m // 2 - 1))):
            return m
        m *= 2
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p an odd prime, where GF(q) is polynomials modulo x**k - c: k = 1, 2, or 3 if 3 | p - 1."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 2)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p > 2 and p**k == q and (k <= 2 or (k == 3 and p % 3 == 1)) else None


def _quadratic_character(p: int, k: int) -> Tensor:
    """Q[i, j] = 1 if a_i - a_j is a nonzero square of GF(p**k), -1 if it is no square, 0 if i = j; fp64."""
    q = p**k
    digits = torch.stack([torch.arange(q) // p**d % p for d in range(k)], 1)  # (q, k): coefficients of each element
    place = torch.tensor([p**d for d in range(k)])
    for c in range(1, p):  # x**k - c is irreducible iff exactly half of the nonzero elements are squares
        square = torch.zeros(q, k, dtype=torch.int64)
        for i in range(k):
            for j in range(k):
                square[:, (i + j) % k] += digits[:, i] * digits[:, j] * (c if i + j >= k else 1)
        squares = torch.unique((square % p) @ place)
        if len(squares) == (q + 1) // 2:
            break
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    return character[(digits[:, None] - digits[None]) % p @ place]


@functools.cache
def _paley_matrix(m: int) -> Tensor:
    """A Hadamard matrix of order m, entries +-1, fp64 (m, m), on the CPU."""
    second_kind = _prime_power(m - 1) is None
    field = _prime_power(m // 2 - 1 if second_kind else m - 1)
    assert field is not None
    character = _quadratic_character(*field)
    q = character.shape[0]
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = 1.0 if second_kind else -1.0
    core[1:, 1:] = character
    unit = torch.eye(q + 1, dtype=torch.float64)
    if not second_kind:
        return core + unit
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) + torch.kron(
        unit, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    )
