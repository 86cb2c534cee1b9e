"""Inline assembly without a GPU.  A text that was registered runs its Python; any other is executed as PTX.

`tl.inline_asm_elementwise(text, constraints, args, dtype, is_pure, pack)` gives one invocation `pack` neighbouring
elements of every argument; elements under 32 bits share registers, min(32 / bits, pack) to a register, first in the
low bits.  Operands are numbered $0, $1, ... results first.

Registering says what a text is *meant* to do: the interpreter then tests the kernel around it, and only the executor
of compiled code (`ptx`) tests the text.  Unregistered, both run the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_MEANING: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def registered(meanings: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the context the text of each key stands for its function: `function(*arrays)` gets the arguments as they
    stand in the kernel (numpy, elementwise) and returns one array, or a tuple of them, of the result dtypes."""
    before = dict(_MEANING)
    _MEANING.update(meanings)
    try:
        yield
    finally:
        _MEANING.clear()
        _MEANING.update(before)


def run(
    text: str, constraints: str, values: Sequence[np.ndarray], results: Sequence[Any], pack: int
) -> list[np.ndarray]:
    if text in _MEANING:
        out = _MEANING[text](*values)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        return [np.asarray(o).astype(np.dtype(k), copy=False) for o, k in zip(outs, results, strict=True)]
    from .ptx_asm import execute  # the executor, only when it is needed

    return execute(text, constraints, values, results, pack)
