"""Error feedback: what a codec lost in this step is added to what it sends in the next.

``e`` is a rank's memory, one number for every gradient it sends, ``Q`` the codec::

    h = g + e        sent: Q(h)

    ef     e <- h - Q(h)                              arXiv:1901.09847
    loco   e <- beta * e + (1 - beta) * (h - Q(h))    arXiv:2407.04480: beta 0.8; e = 0 every `reset` steps; kept in FP8

Under ``ef`` errors do not add up: after any number of steps the sum of what was sent differs from the sum of the
gradients by ``e``, one rounding error. ``loco`` averages errors instead: less exact, steadier, and a quarter of the
memory. That memory is the price of both: 4 bytes (ef) or 1.03 (loco) for *every* parameter on *every* rank, since a
rank sends gradients of all of them and not of its shard alone.

A step that is not taken must not leave traces, least of all NaN: what a step writes is pending until
:meth:`Feedback.end_step` says whether it counts. What this is not: compensation of the second level of a two-level
reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.comm.codec import CODECS

BETA = 0.8
KINDS = ("ef", "loco")


class Feedback:
    """The memory of one buffer of gradients (of one sharded module).

    Args:
        kind: ``ef`` or ``loco``.
        reset: forget the memory every so many steps that counted; 0 = never.
    """

    def __init__(self, kind: str = "ef", reset: int = 0) -> None:
        if kind not in KINDS or reset < 0:
            raise ValueError(
                f"feedback is one of {', '.join(KINDS)} with reset >= 0 steps, got '{kind}' with reset {reset}"
            )
        self.kind, self.reset, self.steps = kind, reset, 0
        self._storage = CODECS["fp8" if kind == "loco" else "fp32"]
        self._shape: tuple[int, int] | None = None
        self._kept: Tensor | None = None  # (rows, bytes) uint8, after the last step that counted; None = zeros
        self._pending: Tensor | None = None  # the same, of the step under way

    def compensate(self, g_WN: Tensor) -> Tensor:
        """The gradient plus the memory, fp32 (ranks, n): what is to be encoded.

        Raises:
            ValueError: if the memory is of a gradient of another shape.
        """
        shape = (g_WN.shape[0], g_WN.shape[1])
        if self._shape not in (None, shape):
            raise ValueError(
                f"error feedback of shape {self._shape} meets a gradient of {shape}: it is of another layout or model;"
                " resume without it (it starts at zero)"
            )
        self._shape = shape
        e_WN = self._memory()
        return g_WN.float() if e_WN is None else g_WN.float() + e_WN

    def update(self, h_WN: Tensor, sent_WN: Tensor) -> None:
        """Remember the error of what was sent in the place of ``h``, both fp32 (ranks, n)."""
        error_WN = h_WN - sent_WN
        if self.kind == "loco":
            error_WN *= 1 - BETA
            e_WN = self._memory()
            error_WN = error_WN if e_WN is None else error_WN.add_(e_WN, alpha=BETA)
        self._pending = self._storage.encode(error_WN)

    def end_step(self, accept: bool) -> None:
        """The step counts (the memory moves on) or not (the memory is as before the step)."""
        if accept and self._pending is not None:
            self._kept = self._pending
        self._pending = None
        self.steps += accept
        if accept and self.reset and self.steps % self.reset == 0:
            self._kept = None

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's memory: ``error`` (ranks, bytes) uint8, no rows = zeros; ``shape`` (2,), ``steps`` () int64."""
        error = torch.empty(0, 0, dtype=torch.uint8) if self._kept is None else self._kept
        shape = torch.tensor(self._shape or (0, 0), dtype=torch.int64)
        return {"error": error, "shape": shape, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`; only under the layout it was saved with.

        Raises:
            ValueError: if it is the memory of another kind of feedback.
        """
        rows, n = state["shape"].tolist()
        error = state["error"]
        if len(error) and error.shape != (rows, self._storage.payload_bytes(n)):
            raise ValueError(
                f"the saved error feedback of shape {tuple(error.shape)} is not {self.kind}'s of {(rows, n)} gradients:"
                " resume with the feedback it was saved with, or without it"
            )
        self._shape = (rows, n) if rows else None
        self._kept = error.clone() if len(error) else None
        self._pending, self.steps = None, int(state["steps"])

    def _memory(self) -> Tensor | None:
        stored = self._kept if self._pending is None else self._pending
        if stored is None or self._shape is None:
            return None
        return self._storage.decode(stored, self._shape[1])
