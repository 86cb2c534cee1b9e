"""One step of AdamW on weights that are kept in bf16, rounded stochastically: :mod:`lowprec.numerics.update`, fused.

    weight, mean, square = adamw(weight, grad, mean, square);   weight = stochastic_bf16(weight, bits)

equal to the definition bit for bit: fp32, true divisions and square roots, one rounding an operation, and the bits of a
`Stream`, so that a resumed run rounds as the run would have.  Moments may be kept in bf16 too; they are then rounded
stochastically with bits of their own.  An fp32 weight is updated without rounding.

Memory, bytes a weight: every tensor is read and written once, the gradient read::

    bf16 weight and gradient, fp32 moments      2 (2 + 4 + 4) + 2 = 22
    all in bf16                                 2 (2 + 2 + 2) + 2 = 14       fp32 master with its bf16 copy: 30

A thread owns eight neighbours, which one Philox call serves; 16-byte accesses.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.stream import Stream
from lowprec.numerics.update import AdamW

from .eights import join_eight, load_eights, store_eights
from .memory import Launch, signed
from .noise import philox

ROLES = ("weight", "exp_avg", "exp_avg_sq")
_TILE = 2048  # weights of a program


@triton.jit
def group_bits(group, key_low, key_high, step):
    """Groups (E,) -> the eight 16-bit numbers of each, (E, 8) int32."""
    w0, w1, w2, w3 = philox(group, key_low, key_high, step, step * 0)
    return join_eight(
        (w0 & 0xFFFF).to(tl.int32), (w0 >> 16).to(tl.int32), (w1 & 0xFFFF).to(tl.int32), (w1 >> 16).to(tl.int32),
        (w2 & 0xFFFF).to(tl.int32), (w2 >> 16).to(tl.int32), (w3 & 0xFFFF).to(tl.int32), (w3 >> 16).to(tl.int32),
    )  # fmt: skip


@triton.jit
def element_bits(index, key_low, key_high, step):
    """The same for elements by their index (int64)."""
    w0, w1, w2, w3 = philox(index >> 3, key_low, key_high, step, step * 0)
    place = index & 7
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return tl.where((place & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def round_store(ptr, value, e, n, first, key_low, key_high, step, WHOLE: tl.constexpr):
    """Stores eights as they are in fp32, stochastically rounded in bf16; `first` is the index of the first of all."""
    if ptr.dtype.element_ty == tl.bfloat16:
        if WHOLE:
            bits = group_bits((first >> 3) + e, key_low, key_high, step)
        else:
            bits = element_bits(first + e[:, None] * 8 + tl.arange(0, 8)[None, :], key_low, key_high, step)
        high = (value.to(tl.int32, bitcast=True) + bits) >> 16
        value = tl.where(value == value, high, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    store_eights(ptr, value, e, n, WHOLE)


@triton.jit(do_not_specialize=["step", "key0", "key1", "key2", "key3", "key4", "key5", "decay", "new1", "keep2", "new2",
                               "root", "eps", "rate"])  # fmt: skip
def adamw_kernel(weight_ptr, grad_ptr, mean_ptr, square_ptr, n, first, step, key0, key1, key2, key3, key4, key5, decay,
                 new1, keep2, new2, root, eps, rate, WHOLE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Weights TILE i .. of program i; `first` is the index of the first in the whole parameter."""
    program = tl.program_id(0).to(tl.int64)
    at = program * TILE
    e = tl.arange(0, TILE // 8)
    left = n - at
    weight = load_eights(weight_ptr + at, e, left, WHOLE)
    grad = load_eights(grad_ptr + at, e, left, WHOLE)
    mean = load_eights(mean_ptr + at, e, left, WHOLE)
    square = load_eights(square_ptr + at, e, left, WHOLE)
    mean = mean + (grad - mean) * new1
    square = square * keep2 + (grad * grad) * new2
    size = tl.math.div_rn(tl.math.sqrt_rn(square), tl.zeros_like(square) + root) + eps
    weight = weight * decay - tl.math.div_rn(mean, size) * rate
    at_first = at + first
    round_store(weight_ptr + at, weight, e, left, at_first, key0, key1, step, WHOLE)
    round_store(mean_ptr + at, mean, e, left, at_first, key2, key3, step, WHOLE)
    round_store(square_ptr + at, square, e, left, at_first, key4, key5, step, WHOLE)


def adamw_(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, update: AdamW, stream: Stream, first: int = 0, *,
           start: Callable[[Launch], None] = Launch.__call__) -> None:  # fmt: skip
    """One step in place, on contiguous tensors of one size, each fp32 or bf16.

    Args:
        stream: the parameter's and the step's; its `micro` must be 0.
        first: where in the whole parameter these weights begin.
    """
    tensors = {"weight_ptr": weight, "grad_ptr": grad, "mean_ptr": mean, "square_ptr": square}
    if not all(t.is_contiguous() and t.numel() == weight.numel() for t in tensors.values()):
        raise ValueError("The update kernel takes contiguous tensors of one size: call .contiguous() on each.")
    if not weight.numel():
        return
    keys = [signed(word) for role in ROLES for word in stream.key(role)]
    args: dict[str, object] = {**tensors, "n": weight.numel(), "first": first, "step": signed(stream.step)}
    args.update({f"key{i}": word for i, word in enumerate(keys)}, **update.factors)
    whole = weight.numel() % 8 == 0 and first % 8 == 0
    start(Launch(adamw_kernel, (-(-weight.numel() // _TILE), 1), args, {"WHOLE": whole, "TILE": _TILE}, 4))
