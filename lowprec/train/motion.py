"""How weights move under quantisation: do updates arrive, and do weights only flip between two values?

In the last steps before a probe the motion of some rows of every quantised weight is followed: w the fp32 master, Q(w)
the value that the forward product gives it (nearest, the tensor's present maximum)::

    oscillation  sum |Q(w_t) - Q(w_t-1)| / sum |w_t - w_t-1| over the window: about 1 where Q follows, large where
                 values flip (TetraJet-v2, arXiv:2510.27527; per weight in `lowprec.train.oscillation`)
    edq          <dQ, dw> / |dw|^2 of the window's last step, dQ = Q(w + dw) - Q(w): effective descent quality
                 (Collage, arXiv:2405.03637, there divided by |dw| once); 1 = the update arrives, 0 = it is lost
    edq_bf16     the same of the bf16 copy that unquantised layers compute with
    steps        of the window; fewer than `probe.window` where a run was resumed within one
    lost_frac    share of the changed weights whose Q did not change in the last step

Rows are the first of each weight on the first rank; the tensor's maximum is one all-reduce over all layers. A weight
that the recipe rotates, splits, or rounds stochastically has no value of its own and is left out, and so is one whose
blocks straddle the shards of two ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.linear import LinearRecipe, Plan
from lowprec.numerics import Format
from lowprec.parallel import World
from lowprec.train.metrics import Record
from lowprec.train.oscillation import has_one_maximum, quantised, straddles

ROWS = 64  # of each weight; whole blocks of any format that has fewer rows a block


@dataclass
class _Path:
    """One weight's rows, fp32 (rows, K), and sums over the window."""

    master: Tensor
    value: Tensor
    moved: float = 0.0
    flipped: float = 0.0


class Motion:
    """Follows weights from step to step; see the module's text."""

    def __init__(self, plan: Plan, world: World, dtype: torch.dtype, names: list[str], every: int, window: int) -> None:
        self.plan, self.world, self.dtype, self.names = plan, world, dtype, names
        self.every, self.window = every, min(window, every)
        self.formats: dict[str, Format] = {}  # of the open window; the same on every rank
        self.paths: dict[str, _Path] = {}
        self.steps = 0  # of the open window
        self._last: dict[str, tuple[Tensor, Tensor]] = {}  # master and value before the last update

    def follows(self, step: int) -> bool:
        """Whether the update of the step with this index (from 0) is one of the last before a probe."""
        return bool(self.every and self.window) and (step % self.every) >= self.every - self.window

    @torch.no_grad()
    def before_update(self, step: int, recipes: dict[str, LinearRecipe]) -> None:
        """Call before the update of a step: a window may begin; a collective."""
        if self.follows(step) and (not self.steps or step % self.every == self.every - self.window):
            self.forget()
            self.formats = {n: f for n in self.names if (f := self._format(n, recipes[n])) is not None}
            self.paths = {n: _Path(*pair) for n, pair in self._look(self.formats).items()}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Call after the update; a collective."""
        if not self.follows(step):
            return
        self.steps += 1
        now = self._look(self.formats)
        for name, (master, value) in now.items():
            path = self.paths[name]
            path.moved += (master - path.master).abs().double().sum().item()
            path.flipped += (value - path.value).abs().double().sum().item()
            self._last[name] = path.master, path.value
            path.master, path.value = master, value

    @torch.no_grad()
    def measures(self) -> dict[str, Record]:
        """By layer, of the window that has just ended; {} where none was followed to its end."""
        found: dict[str, Record] = {}
        for name, path in self.paths.items():
            if name not in self._last:
                continue
            before, value = self._last[name]
            dw, changed = path.master - before, path.master != before
            lost = (changed & (path.value == value)).sum() / changed.sum().clamp(min=1)
            copies = path.master.bfloat16().float() - before.bfloat16().float()
            found[name] = {
                "steps": self.steps,
                "oscillation": path.flipped / path.moved if path.moved else None,
                "edq": quality(path.value - value, dw),
                "edq_bf16": quality(copies, dw),
                "lost_frac": lost.item(),
            }
        self.forget()
        return found

    def forget(self) -> None:
        """Gives the open window up."""
        self.formats, self.paths, self._last, self.steps = {}, {}, {}, 0

    def _look(self, formats: dict[str, Format]) -> dict[str, tuple[Tensor, Tensor]]:
        """The rows of every master now, and their quantised values."""
        whole = {name: self._local(name).to(self.dtype) for name in formats}
        needed = [name for name, format in formats.items() if has_one_maximum(format)]
        maxima: dict[str, Tensor] = {}
        if needed:
            stacked = torch.stack([w.abs().amax().float() if w.numel() else w.new_zeros(()).float()
                                   for w in (whole[name] for name in needed)])  # fmt: skip
            if self.world.size > 1:
                dist.all_reduce(stacked, dist.ReduceOp.MAX)
            maxima = dict(zip(needed, stacked.unbind(), strict=True))
        found = {}
        for name, format in formats.items():
            rows = whole[name][:ROWS]
            if len(rows):
                found[name] = self._local(name)[:ROWS].float().clone(), quantised(format, rows, maxima.get(name))
        return found

    def _local(self, name: str) -> Tensor:
        weight = self.plan.layers[name].weight.detach()
        return weight.to_local() if hasattr(weight, "to_local") else weight

    def _format(self, name: str, recipe: LinearRecipe) -> Format | None:
        fprop, weight = recipe.fprop, self.plan.layers[name].weight
        alone = not (fprop.inner or fprop.outer_b or fprop.b.split) and fprop.b.rounding == "nearest"
        format = fprop.b.format
        if format is None or not alone or not 0 < max(format.block[0], 1) <= ROWS or ROWS % max(format.block[0], 1):
            return None
        if format.block[0] == 0 and not has_one_maximum(format):
            return None
        return None if straddles(format, weight) else format


def quality(arrived: Tensor, wanted: Tensor) -> float | None:
    """<arrived, wanted> / |wanted|^2; None for no update."""
    norm = wanted.double().square().sum().item()
    return (arrived.double() * wanted.double()).sum().item() / norm if norm else None
