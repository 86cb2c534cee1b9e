"""LinearRecipe: how one linear layer computes, as data.

A linear layer is three matrix products, and each has two operands::

    fprop   y  = x  w^T     contracts in_features      operands x, w
    dgrad   dx = dy w       contracts out_features     operands dy, w
    wgrad   dw = dy^T x     contracts tokens           operands dy, x

So a precision recipe is six :class:`Operand` and the rotations between them. Every product is written ``a b^T`` with
the contracted axis last: ``a`` is (m, k), ``b`` is (n, k). All types here are frozen and hashable, refuse combinations
that cannot be right when they are made, and print as three equations (:meth:`LinearRecipe.describe`).

Two rules place every rotation of the literature. One of the contracted axis belongs to the product (``inner``): both
operands get it, so it cancels by construction. One of a free axis belongs to an operand (``outer_a``, ``outer_b``) and
is undone on the output. A forward operand that comes back in a backward product (``reuse``, ``source: fprop``) is still
in the forward's rotated space; the product knows and turns its output back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lowprec.linear.split import ChannelSplit, ResidualSplit, Split
from lowprec.numerics import Format
from lowprec.numerics.hadamard import check_size

GEMM_OPERANDS: dict[str, tuple[str, str]] = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
"""The products by name, each with the names of its operands ``a`` and ``b``."""

ROUNDINGS = ("nearest", "stochastic", "ms_eden")
SIGNS = ("none", "fixed", "step")
SOURCES = ("original", "fprop")
GRADIENTS = ("ste", "trust", "clip")
AMAXES = ("current", "delayed", "hold")


def _one_of(kind: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        raise ValueError(f"unknown {kind} '{name}'; choose one of {', '.join(valid)}")


@dataclass(frozen=True)
class Operand:
    """One side of one product.

    Attributes:
        format: how it is quantised; None leaves it in the layer's own dtype.
        rounding: ``nearest`` (ties to even), ``stochastic``, or ``ms_eden`` (nearest codes, then scales corrected per
            ``group`` and rounded stochastically, arXiv:2601.22813).
        group: elements that share one MS-EDEN correction.
        source: ``original``: the tensor itself. ``fprop``: the value it had in the forward product, dequantised (the
            exact straight-through gradient of the quantised forward).
        reuse: these are the codes of the forward pass. They are computed again, not kept: reuse is only admitted where
            quantising the same tensor along its other axis must give them (square blocks or one block, nearest).
        split: the operand as a sum of parts that are treated differently.
        gradient: of a forward operand: ``ste`` (straight through), ``trust`` (zero where the rounding error exceeds
            half the last gap of the grid: QuEST, arXiv:2502.05003) or ``clip`` (zero beyond ``clip * max``).
        clip: see ``gradient``.
        amax: where the tensor's maximum comes from: ``current``, ``delayed`` (largest of the last ``window`` steps) or
            ``hold`` (sampled every ``window`` steps).
        window: see ``amax``, in steps.
    """

    format: Format | None = None
    rounding: str = "nearest"
    group: int = 128
    source: str = "original"
    reuse: bool = False
    split: Split | None = None
    gradient: str = "ste"
    clip: float = 1.0
    amax: str = "current"
    window: int = 0

    def __post_init__(self) -> None:
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("source", self.source, SOURCES)
        _one_of("gradient", self.gradient, GRADIENTS)
        _one_of("amax", self.amax, AMAXES)
        f = self.format
        if f is None:
            if self.rounding != "nearest" or self.split or self.gradient != "ste" or self.amax != "current":
                raise ValueError("rounding, split, gradient and amax need a format: nothing is quantised without one")
            return
        if self.rounding == "stochastic" and (f.targets or f.second):
            raise ValueError(
                f"stochastic rounding does not go with format {f.name}, which keeps the better of two candidates per "
                "block: the choice depends on the noise, so the mean is biased; round to nearest or use ms_eden"
            )
        if self.rounding == "ms_eden" and (f.block[0] != 1 or f.block[1] == 0 or self.group % f.block[1]):
            raise ValueError(
                f"ms_eden corrects the scales of 1xB blocks in groups of {self.group} elements; format {f.name} has "
                f"{f.block[0]}x{f.block[1]} blocks: use 1xB with B dividing the group"
            )
        if (self.amax != "current") != (self.window > 0):
            raise ValueError("amax: delayed or hold needs window: (steps, at least 1), and a window needs one of them")
        if self.amax != "current" and f.block != (0, 0) and f.tensor_scale is not True:
            raise ValueError(
                f"amax: {self.amax} remembers one maximum a tensor; format {f.name} has no scale of the whole tensor"
            )
        if self.amax != "current" and self.split:
            raise ValueError(
                f"amax: {self.amax} remembers the maximum of a tensor, not of the parts of a split; drop one"
            )
        if self.gradient == "clip" and self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")

    def __str__(self) -> str:
        if self.format is None:
            return "bf16" if self.source == "original" else "forward value"
        mark = {"nearest": "", "stochastic": "~", "ms_eden": f" eden{self.group}"}[self.rounding]
        notes = [
            "reused" if self.reuse else "",
            "of the forward value" if self.source == "fprop" else "",
            f"split by {self.split}" if self.split else "",
            f"gradient {self.gradient}" + (f" at {self.clip:g}" if self.gradient == "clip" else "")
            if self.gradient != "ste"
            else "",
            f"amax {self.amax} {self.window}" if self.window else "",
        ]
        noted = ", ".join(note for note in notes if note)
        return self.format.name + mark + (f" ({noted})" if noted else "")


@dataclass(frozen=True)
class Rotation:
    """A Hadamard rotation of blocks of an axis.

    Attributes:
        size: block, a power of two; 0 = the whole axis (HALO, arXiv:2501.02625).
        signs: ``none``, ``fixed`` (one vector for the whole run) or ``step`` (new ones for every micro-batch and
            layer).
        rounds: how often; two rounds with signs of their own spread sparse outliers further.
    """

    size: int
    signs: str = "fixed"
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.size:
            check_size(self.size)
        _one_of("rotation signs", self.signs, SIGNS)
        if self.rounds not in (1, 2) or (self.rounds == 2 and self.signs == "none"):
            raise ValueError("a rotation has 1 round, or 2 with signs (two without signs undo each other)")

    def __str__(self) -> str:
        return f"H{self.size or ' of the whole axis'} ({self.signs} signs{', twice' if self.rounds == 2 else ''})"


@dataclass(frozen=True)
class Gemm:
    """``out = a b^T`` with both operands quantised after the rotations.

    Attributes:
        a, b: the operands.
        inner: rotation of the contracted axis of both; it cancels in the product.
        outer_a, outer_b: rotation of the free axis of one; it is undone on the output.
    """

    a: Operand = Operand()
    b: Operand = Operand()
    inner: Rotation | None = None
    outer_a: Rotation | None = None
    outer_b: Rotation | None = None

    def __post_init__(self) -> None:
        if "ms_eden" in (self.a.rounding, self.b.rounding) and (self.inner is None or self.inner.signs != "step"):
            raise ValueError(
                "ms_eden is unbiased only over random rotations: give the product inner: {size: 128, signs: step}"
            )

        for outer, operand in ((self.outer_a, self.a), (self.outer_b, self.b)):
            if outer and operand.split:
                raise ValueError("an operand cannot be split and have its free axis rotated: the split sees other rows")

    @property
    def quantized(self) -> bool:
        """Whether anything but a plain product happens."""
        return self.a.format is not None or self.b.format is not None or any((self.inner, self.outer_a, self.outer_b))

    @cached_property
    def counts_zeros(self) -> bool:
        """Whether zeros added at an edge change numbers: a block's scale is a mean, or its grid has no zero."""
        formats = [operand.format for operand in (self.a, self.b) if operand.format]
        return any(f.rule != "absmax" or f.element_type.values[0] != 0 for f in formats)

    @cached_property
    def multiples(self) -> tuple[int, int, int]:
        """(m, n, k) multiples that whole blocks and rotations need."""
        a, b = (operand.format.block if operand.format else (1, 1) for operand in (self.a, self.b))
        free = [max(a[0], 1), max(b[0], 1)]
        for i, outer in enumerate((self.outer_a, self.outer_b)):
            free[i] = math.lcm(free[i], max(outer.size, 1) if outer else 1)
        groups = [operand.group for operand in (self.a, self.b) if operand.rounding == "ms_eden"]
        tiles = [operand.format.tensor_scale for operand in (self.a, self.b) if operand.format]
        wide = [t for t in tiles if isinstance(t, int) and not isinstance(t, bool)]
        inner = max(self.inner.size, 1) if self.inner else 1
        return free[0], free[1], math.lcm(max(a[1], 1), max(b[1], 1), inner, *groups, *wide)


@dataclass(frozen=True)
class LinearRecipe:
    """A named precision recipe of one linear layer."""

    name: str
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()

    def __post_init__(self) -> None:
        sides = [getattr(gemm, side) for gemm in (self.fprop, self.dgrad, self.wgrad) for side in "ab"]
        by_feature = any(isinstance(side.split, (ChannelSplit, ResidualSplit)) for side in sides)
        if by_feature and self.fprop.inner and any(side.source == "fprop" for side in sides):
            raise ValueError(
                f"recipe {self.name}: features that are set apart are no features of the rotated forward; leave out "
                "fprop.inner, or the split, or take the backward operands from the original tensors"
            )

    @cached_property
    def quantized(self) -> bool:
        """Whether any of the three products is."""
        return self.fprop.quantized or self.dgrad.quantized or self.wgrad.quantized

    @cached_property
    def counts_rows(self) -> bool:
        """Whether tokens of zeros would change numbers: statistics are taken over whole operands."""
        gemms = (self.fprop, self.dgrad, self.wgrad)
        return any(gemm.counts_zeros or gemm.a.split or gemm.b.split for gemm in gemms)

    @property
    def remembers(self) -> bool:
        """Whether the layer must keep anything between steps (amax histories, centres, channel statistics)."""
        operands = [getattr(gemm, side) for gemm in (self.fprop, self.dgrad, self.wgrad) for side in "ab"]
        return any(o.amax != "current" or (o.split is not None and o.split.remembers) for o in operands)

    def describe(self) -> str:
        """The recipe as three equations; ``~`` marks stochastic rounding."""
        lines = []
        for role, out, left, right in (
            ("fprop", "y", "x", "w^T"),
            ("dgrad", "dx", "dy", "w"),
            ("wgrad", "dw", "dy^T", "x"),
        ):
            gemm: Gemm = getattr(self, role)
            turns = [f", contracted axis rotated by {gemm.inner}" if gemm.inner else ""]
            for name, outer in ((left, gemm.outer_a), (right, gemm.outer_b)):
                turns.append(f", free axis of {name} rotated by {outer}" if outer else "")
            lines.append(f"{role}  {out} = {left} {right}  with  {left}: {gemm.a}, {right}: {gemm.b}{''.join(turns)}")
        return "\n".join(lines)


BF16 = LinearRecipe("bf16")
"""Leave the layer alone: every product in the tensors' own dtype, as ``torch.nn.functional.linear``."""
