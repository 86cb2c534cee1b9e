"""Triton's interpreter with its numerics repaired, in the same process as real compiles.

    with interpreted():
        kernel[grid](x, y, BLOCK=128)          # CPU tensors; kernel is an ordinary @triton.jit function

A kernel and everything it calls, in whatever module, is interpreted: inside the context `JITFunction.run` and
`JITFunction.__call__` are replaced, so nothing has to be found or wrapped.  The language itself is patched only while
a kernel runs, so `compile_for` works inside the context as well as outside of it, on the same function objects.
(The stock switch, TRITON_INTERPRET=1, is read when a function is decorated: one process can then do one or the other.)

What the stock interpreter (3.9.0) gets wrong, and what is done here instead:

- fp32 -> bf16 truncates, fp32 -> fp8 loses carries and does not saturate, NaN and infinity of fp8 are lost: replaced by
  `floats.encode/decode`, exact, saturating as `cvt...satfinite` does;
- arithmetic, sums and `tl.dot` of bf16 take bit patterns for integers: done in fp32 and rounded, as the GPU does;
- a comparison keeps the type of its operands, so that one of two numbers cannot be broadcast: now a boolean;
- e5m2 -> bf16 of infinity and NaN is as compiled: Triton rebiases the exponent, and they become 65536 and more;
- int <-> bf16 casts take bit patterns for values; float -> int wraps: now values, saturating (at 16 bits for an 8-bit
  target, whose low half is kept), NaN to 0, as compiled code does;
- `tl.dot_scaled` reads E4M3 scales as if they were E8M0: decoded;
- inline asm raises: emulated, by `asm.run` (a registered function, or the PTX text itself executed);
- an address that leaves the tensors of a launch is followed, into whatever is there: now an IndexError.

What it stays blind to: the compiler, alignment, how a thread's elements are laid out (so `pack` in inline asm takes
neighbours of the last axis), and the order of float sums (numpy adds pairwise, a GPU in a tree over threads).

Everything touched is restored when the context ends, also after an exception.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from . import asm, floats

CHECKED = ("3.9.0",)
_FP8 = {tl.float8e4nv: "e4m3", tl.float8e5: "e5m2"}
_MISSING = object()


def _to_float32(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype == tl.bfloat16:
        return floats.bf16_value(data)
    if dtype in _FP8:
        return floats.decode(np.ascontiguousarray(data).view(np.uint8), _FP8[dtype])
    return data.astype(np.float64 if dtype == tl.float64 else np.float32)


def _from_float(value: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Nearest even into the storage of `dtype`; fp8 saturates."""
    if dtype in _FP8:
        return floats.encode(value, _FP8[dtype])
    if dtype == tl.bfloat16:
        return floats.bf16_bits(value) if value.dtype == np.float32 else floats.encode(value, "bf16", saturate=False)
    return value.astype(stock._get_np_dtype(dtype))


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    """Drop-in for the stock function: bits of `source` to bits of `target`, same shape."""
    if source not in _FP8 and target not in _FP8 and tl.bfloat16 not in (source, target):
        return _stock_convert(data, source, target, rounding)
    if rounding == stock._ir.ROUNDING_MODE.RTZ and target == tl.bfloat16 and source == tl.float32:
        return (np.ascontiguousarray(data).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    value = _to_float32(np.asarray(data).view(stock._get_np_dtype(source)), source)
    if source == tl.float8e5 and target == tl.bfloat16:
        codes = np.asarray(data).view(np.uint8)
        beyond = np.copysign(np.float32(1 << 14) * (4 + (codes & 3)), np.where(codes & 0x80, -1, 1))
        value = np.where((codes & 0x7F) >= 0x7C, beyond.astype(np.float32), value)
    out = _from_float(value, target)
    return out.view(f"uint{target.primitive_bitwidth}")


_stock_convert = stock._convert_float


def _cast(self: Any, src: Any, target: tl.dtype) -> Any:
    """int, float and bf16 in any combination, by value."""
    source, target = src.dtype.scalar, target.scalar
    value = _to_float32(src.data, source) if source.is_floating() else src.data
    if target.is_floating():
        return stock.TensorHandle(_from_float(value, target) if target != source else src.data, target)
    kind = stock._get_np_dtype(target)
    if source.is_floating() and kind != np.bool_:
        step = (
            np.dtype(f"{kind.kind}2") if kind.itemsize == 1 else kind
        )  # there is no cvt to 8 bits: 16, then the low 8
        return stock.TensorHandle(floats.to_integer(np.trunc(value), step).astype(kind), target)
    return stock.TensorHandle(value.astype(kind), target)


def _wide_bf16(method: Callable[..., Any]) -> Callable[..., Any]:
    """Operations on bf16 operands are done in float32 and rounded back (comparisons keep their boolean)."""

    def wrapped(self: Any, *operands: Any) -> Any:
        handles = [h for h in operands if isinstance(h, stock.TensorHandle)]
        if not any(h.dtype.scalar == tl.bfloat16 for h in handles) or operands[-1] in (np.where,):
            out = method(self, *operands)
            truth = out.data.dtype == np.bool_ and out.dtype.scalar != tl.int1
            return stock.TensorHandle(out.data, tl.int1) if truth else out
        wide = [
            stock.TensorHandle(_to_float32(h.data, tl.bfloat16), tl.float32)
            if isinstance(h, stock.TensorHandle) and h.dtype.scalar == tl.bfloat16
            else h
            for h in operands
        ]
        out = method(self, *wide)
        if out.data.dtype == np.bool_:
            return stock.TensorHandle(out.data, tl.int1)
        return stock.TensorHandle(floats.bf16_bits(out.data), tl.bfloat16)

    return wrapped


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if z.dtype.scalar != tl.bfloat16:
        return _stock_fma(self, x, y, z)
    exact = floats.fma_to_odd(*(floats.bf16_value(h.data) for h in (x, y, z)))
    return stock.TensorHandle(floats.encode(exact, "bf16", saturate=False), tl.bfloat16)


_stock_fma = stock.InterpreterBuilder.create_fma


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (
        stock.TensorHandle(floats.bf16_value(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h
        for h in (a, b)
    )
    return _stock_dot(self, a, b, *rest)


_stock_dot = stock.InterpreterBuilder.create_dot


def _sum(self: Any, value: Any) -> Any:
    if value.dtype != tl.bfloat16:
        return _stock_sum(self, value)
    total = np.sum(floats.bf16_value(value.handle.data), axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(floats.bf16_bits(total), value.dtype)


_stock_sum = stock.ReduceOps.sum


def _scale_to_f32(handle: Any, compute_type: tl.dtype) -> np.ndarray:
    if handle.dtype.scalar in _FP8:
        return _to_float32(handle.data, handle.dtype.scalar)
    return _stock_scale(handle, compute_type)


_stock_scale = stock._dot_scaled_scale_to_f32


class _Results:
    """What the language expects back from `create_inline_asm`: one handle per result."""

    def __init__(self, handles: list[Any]):
        self.handles = handles

    def get_result(self, i: int) -> Any:
        return self.handles[i]


def _inline_asm(self: Any, text: str, constraints: str, values: list[Any], result: Any, pure: bool, pack: int) -> Any:
    kinds = [t.scalar for t in result]
    arrays = [v.data for v in values]
    outs = asm.run(text, constraints, arrays, [stock._get_np_dtype(k) for k in kinds], pack)
    return _Results([stock.TensorHandle(o, k) for o, k in zip(outs, kinds)])


class _Bounds:
    """Where the tensors of a launch are: the stock interpreter reads and writes whatever an address points to."""

    def __init__(self, arguments: Iterable[tuple[str, Any]]):
        spans: list[list[Any]] = []  # [start, end, name], ascending; overlapping views are one span
        for start, end, name in sorted(_spans(arguments)):
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end, name])
        self.spans = spans
        self.starts = np.array([s[0] for s in spans], np.uint64)
        self.ends = np.array([s[1] for s in spans], np.uint64)

    def check(self, pointers: Any, mask: Any, what: str) -> None:
        where = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
        addresses = where[0][where[1].astype(bool)]
        if not addresses.size:
            return
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        index = np.searchsorted(self.starts, addresses, "right") - 1
        outside = index < 0
        if len(self.spans):
            outside |= addresses + np.uint64(width) > self.ends[index]
        if outside.any():
            at, i = int(addresses[outside][0]), max(int(index[outside][0]), 0)
            start, end, name = self.spans[i] if self.spans else (0, 0, "no tensor")
            raise IndexError(
                f"{what} of {width} bytes in program {stock.interpreter_builder.grid_idx} is out of bounds: "
                f"{name} {at - start:+d}, which has {end - start} bytes."
            )


def _spans(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[int, int, str]]:
    for name, value in arguments:
        if isinstance(value, tuple):
            yield from _spans((name, v) for v in value)
        value = getattr(value, "base", value)  # tensor descriptors, reinterpreted tensors
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size(), name


class _Rewriter(stock.FunctionRewriter):
    """The stock rewriter, without writing its own globals into the module of the kernel; sees closures too."""

    def _compile_and_exec(self, tree: Any) -> Any:
        needed = {k: getattr(stock, k) for k in ("interpreter_semantic", "_InterpreterComparison")}
        space = {**self.fn.__globals__, **inspect.getclosurevars(self.fn).nonlocals, **needed}
        local: dict[str, Any] = {}
        exec(compile(tree, filename=self.filename, mode="exec"), space, local)
        return local[self.fn.__name__]


# (method of the builder, which argument the pointers are, which the mask is, name for the reader)
_MEMORY = (
    ("create_masked_load", 0, 1, "A load"),
    ("create_masked_store", 0, 2, "A store"),
    ("create_atomic_rmw", 1, 3, "An atomic operation"),
    ("create_atomic_cas", 0, None, "An atomic operation"),
)


class _Session:
    """One `interpreted()` context: rewritten functions, and every attribute that was changed."""

    def __init__(self) -> None:
        self.rewritten: dict[Any, Any] = {}
        self.changed: list[tuple[Any, str, Any]] = []
        self.bounds = _Bounds([])

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.changed.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self.changed:
            owner, name, value = self.changed.pop()
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    def python_of(self, fn: Any) -> Callable[..., Any]:
        if fn not in self.rewritten:
            self.rewritten[fn] = _Rewriter(fn).rewrite_ast()
        return self.rewritten[fn]

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        """What `kernel[grid](...)` calls."""
        if warmup:
            return
        names = list(inspect.signature(kernel.fn).parameters)
        self.bounds = _Bounds([*zip(names, args), *kwargs.items()])
        with np.errstate(all="ignore"):
            stock.GridExecutor(self.python_of(kernel.fn), names, grid, kernel.pre_run_hooks)(*args, **kwargs)

    def bounded(self, method: Callable[..., Any], pointers: int, mask: int | None, what: str) -> Callable[..., Any]:
        """A memory operation of the builder that stays inside of the tensors of the launch."""

        def wrapped(builder: Any, *operands: Any, **options: Any) -> Any:
            self.bounds.check(operands[pointers], None if mask is None else operands[mask], what)
            return method(builder, *operands, **options)

        return wrapped

    def patch_language(self, fn: Any) -> Any:
        """Replaces the stock `_patch_lang`: the same patches, on the whole language, once per launch."""
        scope = stock._LangPatchScope()
        for language in (tl, tl.core):
            stock._patch_builtin(language, stock.interpreter_builder, scope)
            stock._patch_lang_core(language, scope)
        stock._patch_builtin(tl.math, stock.interpreter_builder, scope)
        for name, member in list(vars(tl.tensor).items()):
            if isinstance(member, JITFunction):  # x.sum(0) must bind x, which a JITFunction in a class does not
                scope.set_attr(tl.tensor, name, lambda *a, _f=member, **k: _f(*a, **k))
        stock._patch_builtin(tl.tensor, stock.interpreter_builder, scope)
        stock._patch_builtin(tl.core.tensor_descriptor_base, stock.interpreter_builder, scope)
        stock._patch_lang_tensor(tl.tensor, scope)
        scope.set_attr(triton.knobs.runtime, "interpret", True)
        return scope


def _check(things: tuple[Any, ...]) -> None:
    if triton.__version__ not in CHECKED:
        raise ValueError(
            f"kernels.testing.interpreter repairs Triton {' and '.join(CHECKED)} by name and was not checked with "
            f"{triton.__version__}: install triton=={CHECKED[-1]}, or add the version to CHECKED once its tests pass."
        )
    if triton.knobs.runtime.interpret:
        raise ValueError(
            "Unset TRITON_INTERPRET: with it Triton's own functions can only be interpreted, the stock way."
        )
    for thing in things:
        if not isinstance(thing, types.ModuleType) and not hasattr(thing, "fn"):
            raise ValueError(f"interpreted() takes @triton.jit kernels or modules, not {thing!r}.")


@contextlib.contextmanager
def interpreted(*kernels: Any) -> Iterator[None]:
    """Launches of Triton kernels run in the repaired interpreter until the context ends.  The arguments, kernels or
    their modules, say what the caller is about to run and are checked to be that; what they call is found by itself."""
    _check(kernels)
    session = _Session()
    builder = stock.InterpreterBuilder
    try:
        session.set(JITFunction, "run", lambda kernel, *a, **k: session.run(kernel, *a, **k))
        session.set(JITFunction, "__call__", lambda kernel, *a, **k: session.python_of(kernel.fn)(*a, **k))
        session.set(stock, "_patch_lang", session.patch_language)
        session.set(stock, "_convert_float", _convert_float)
        session.set(stock, "_dot_scaled_scale_to_f32", _scale_to_f32)
        session.set(builder, "cast_impl", _cast)
        session.set(builder, "create_inline_asm", _inline_asm)
        session.set(builder, "create_fma", _fma)
        session.set(builder, "create_dot", _dot)
        session.set(stock.ReduceOps, "sum", _sum)
        for name in ("binary_op", "ternary_op", "unary_op"):
            session.set(builder, name, _wide_bf16(getattr(builder, name)))
        for name, pointers, mask, what in _MEMORY:
            session.set(builder, name, session.bounded(getattr(builder, name), pointers, mask, what))
        yield
    finally:
        session.restore()
