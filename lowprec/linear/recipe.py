"""LinearRecipe: how one linear layer computes, as data.

A linear layer is three matrix products, and each has two operands::

    fprop   y  = x  w^T     contracts in_features      operands x, w
    dgrad   dx = dy w       contracts out_features     operands dy, w
    wgrad   dw = dy^T x     contracts tokens           operands dy, x

So a precision recipe is six :class:`Operand` and the rotations between them. All types here are frozen and hashable;
:meth:`LinearRecipe.describe` prints the three equations. Every product is written ``a b^T`` with the contracted axis
last: ``a`` is (m, k), ``b`` is (n, k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowprec.numerics import Format
from lowprec.numerics.hadamard import check_size

GEMM_OPERANDS: dict[str, tuple[str, str]] = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
"""The products by name, each with the names of its operands ``a`` and ``b``."""

ROUNDINGS = ("nearest", "stochastic")
SIGNS = ("none", "fixed", "step")


@dataclass(frozen=True)
class Operand:
    """One side of one product.

    Attributes:
        format: how it is quantised; None leaves it in the layer's own dtype.
        rounding: ``nearest`` (ties to even) or ``stochastic``.
        reuse: these are the codes of the forward pass. They are computed again, not kept: reuse is only admitted where
            quantising the same tensor along its other axis must give them (square blocks, nearest, unrotated).
    """

    format: Format | None = None
    rounding: str = "nearest"
    reuse: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"unknown rounding '{self.rounding}'; choose one of {', '.join(ROUNDINGS)}")

    def __str__(self) -> str:
        if self.format is None:
            return "bf16"
        return self.format.name + ("~" if self.rounding == "stochastic" else "") + (" (reused)" if self.reuse else "")


@dataclass(frozen=True)
class Rotation:
    """A block Hadamard rotation of the contracted axis of both operands; it cancels in the product.

    Attributes:
        size: block, a power of two.
        signs: ``none``, ``fixed`` (one vector for the whole run) or ``step`` (new ones for every micro-batch and
        layer).
    """

    size: int
    signs: str = "fixed"

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.signs not in SIGNS:
            raise ValueError(f"unknown rotation signs '{self.signs}'; choose one of {', '.join(SIGNS)}")


@dataclass(frozen=True)
class Gemm:
    """``out = a b^T`` with both operands quantised after an optional rotation of their contracted axis."""

    a: Operand = Operand()
    b: Operand = Operand()
    inner: Rotation | None = None

    @property
    def quantized(self) -> bool:
        """Whether anything but a plain product happens."""
        return self.a.format is not None or self.b.format is not None or self.inner is not None

    def multiples(self) -> tuple[int, int, int]:
        """(m, n, k) multiples that whole blocks and rotations need."""
        a, b = (operand.format.block if operand.format else (1, 1) for operand in (self.a, self.b))
        return max(a[0], 1), max(b[0], 1), math.lcm(max(a[1], 1), max(b[1], 1), self.inner.size if self.inner else 1)


@dataclass(frozen=True)
class LinearRecipe:
    """A named precision recipe of one linear layer."""

    name: str
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()

    @property
    def quantized(self) -> bool:
        """Whether any of the three products is."""
        return self.fprop.quantized or self.dgrad.quantized or self.wgrad.quantized

    def describe(self) -> str:
        """The recipe as three equations; ``~`` marks stochastic rounding."""
        lines = []
        for role, out, left, right in (
            ("fprop", "y", "x", "w^T"),
            ("dgrad", "dx", "dy", "w"),
            ("wgrad", "dw", "dy^T", "x"),
        ):
            gemm: Gemm = getattr(self, role)
            turn = f", contracted axis rotated by H{gemm.inner.size} ({gemm.inner.signs} signs)" if gemm.inner else ""
            lines.append(f"{role}  {out} = {left} {right}  with  {left}: {gemm.a}, {right}: {gemm.b}{turn}")
        return "\n".join(lines)


BF16 = LinearRecipe("bf16")
"""Leave the layer alone: every product in the tensors' own dtype, as ``torch.nn.functional.linear``."""
