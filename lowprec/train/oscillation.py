"""De-oscillation: weights that only flip between two quantised values are put to rest (OsciReset, arXiv:2510.27527).

Over a window of steps two paths of every quantised weight are measured, that of the fp32 master and that of its
quantised value, and at the end of the window the master of those that flip without getting anywhere is set to that
value::

    d_w = sum |w_t - w_{t-1}|     d_Q = sum |Q(w_t) - Q(w_{t-1})|     where d_w > 0 and d_Q / d_w >= ratio:  w <- Q(w)

so they are half a bin away from the next flip. The optimizer's moments are left alone. Q is the format that the
forward product gives the weight, nearest, applied to the weight in the dtype the layer computes in, with the tensor's
present maximum (also where a recipe delays it).

Everything happens on the shards that a rank holds. Shards are whole rows, so blocks within a row are local; the
tensor's maximum is one all-reduce over all layers; a format whose blocks straddle two shards quantises the gathered
weight, one layer at a time. So the number of ranks changes no bit. Inside a window this costs one quantisation a step
and four fp32 numbers a tracked weight; with ``sample`` below 1 only the weights of each row are tracked that are
farthest from their value, in bins, when the window begins. Outside windows it costs nothing.

What this is not: freezing. A weight that is put to rest moves on with the next update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lowprec.linear import Plan
from lowprec.linear.recipe import Gemm
from lowprec.numerics import Format
from lowprec.train.metrics import Record


def quantised(format: Format, w_NK: Tensor, amax: Tensor | None = None) -> Tensor:
    """The values that a weight has in its format, fp32 (N, K); ``amax`` as for ``Format.quantize``."""
    return format.quantize(w_NK, amax=amax).dequantize()


def bins_off(format: Format, w_NK: Tensor, amax: Tensor | None = None) -> Tensor:
    """How far every weight is from its value, in bins of the grid: 0 to 1/2, more where it saturates; fp32 (N, K)."""
    q, element = format.quantize(w_NK, amax=amax), format.element_type
    largest = replace(q, codes=torch.full_like(q.codes, len(element.values) - 1))
    u_NK = w_NK.float() * element.max / largest.dequantize()
    grid = torch.tensor(sorted({sign * v for v in element.values for sign in (-1.0, 1.0)}), device=w_NK.device)
    below = (torch.searchsorted(grid, u_NK, right=True) - 1).clamp(0, len(grid) - 2)
    return ((u_NK - q.values()).abs() / (grid[below + 1] - grid[below])).nan_to_num(0.0, 0.0, 0.0)


@dataclass
class Track:
    """One layer's weights in a window; tensors are those of this rank's rows, (n, tracked), fp32 but for the index."""

    format: Format
    index: Tensor | None  # columns tracked in each row, int64; None = all
    moved: Tensor  # d_w
    flipped: Tensor  # d_Q
    master: Tensor | None = None  # w after the last update; None in a window that was just read from a checkpoint
    quantised: Tensor | None = None  # Q of it

    def of(self, full_NK: Tensor) -> Tensor:
        """The tracked elements of a matrix."""
        return full_NK if self.index is None else full_NK.gather(1, self.index)


class Oscillation:
    """Watches and resets the weights of a plan. Without ``deoscillation:`` in its precision file it does nothing."""

    def __init__(self, plan: Plan, steps: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> None:
        """plan: applied to the model; steps: of the whole run; dtype: what the layers compute in; group: the ranks that
        hold parts of the same layers (a pipeline stage), None = all.

        Raises:
            ValueError: if a weight to be watched has no quantised value of its own.
        """
        self.plan, self.steps, self.dtype, self.group = plan, steps, dtype, group
        self.setting = plan.precision.deoscillation
        self.tracks: dict[str, Track] = {}  # the open window, by layer
        refuse(plan)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Call before the optimizer's update of step ``step`` (from 0): a window may begin. A collective."""
        if self.setting is None:
            return
        if self.setting.window_of(step, self.steps) == step:
            self._open(step)
        unread = {name: track.format for name, track in self.tracks.items() if track.master is None}
        for name, master_NK, quantised_NK in self._on_shards(quantised, unread):
            track = self.tracks[name]
            track.master, track.quantised = track.of(master_NK).clone(), track.of(quantised_NK)

    @torch.no_grad()
    def after_update(self, step: int) -> Record:
        """Call after the update: measures and, at the end of a window, resets; a collective.

        Returns:
            {} but at the end of a window: then ``osc_ratio``, the share of tracked weights that was reset, and
            ``osc_mean``, the mean of d_Q / d_w over tracked weights, weighted by d_w.
        """
        if self.setting is None or self.setting.window_of(step, self.steps) is None:
            return {}
        ends = (step + 1) % self.setting.every == self.setting.window % self.setting.every
        sums = [torch.zeros(4, dtype=torch.float64, device=self._device)]  # all there is where nothing is tracked
        for name, master_NK, quantised_NK in self._on_shards(quantised, {n: t.format for n, t in self.tracks.items()}):
            track, master, value = (
                self.tracks[name],
                self.tracks[name].of(master_NK),
                self.tracks[name].of(quantised_NK),
            )
            assert track.master is not None and track.quantised is not None
            track.moved += (master - track.master).abs()
            track.flipped += (value - track.quantised).abs()
            track.master, track.quantised = master.clone(), value
            if ends:
                reset = (track.moved > 0) & (track.flipped / track.moved >= self.setting.ratio)
                rested = torch.where(reset, value, master)
                master_NK.copy_(rested) if track.index is None else master_NK.scatter_(1, track.index, rested)
                counted = (reset.float(), torch.ones_like(rested), track.flipped, track.moved)
                sums.append(torch.stack([x.sum(dim=1).double().sum() for x in counted]))  # rows whole: as in clipping
        if not ends:
            return {}
        self.tracks = {}
        total = torch.stack(sums).sum(0)
        _all_reduce(total, dist.ReduceOp.SUM, None)  # of all pipeline stages
        if total[1] == 0:
            return {}
        share, mean = total[0] / total[1], total[2] / total[3]
        return {"osc_ratio": share.item(), "osc_mean": mean.float().nan_to_num(0.0).item()}

    def state_dict(self) -> dict[str, Tensor]:
        """The open window as ``{"layer/moved" | "layer/flipped" | "layer/index": tensor}``, sharded like the weights;
        {} outside windows. The rest of a window is a function of the weights."""
        return {
            f"{name}/{key}": self._like_weight(name, tensor)
            for name, track in self.tracks.items()
            for key in ("moved", "flipped", "index")
            if (tensor := getattr(track, key)) is not None
        }

    def reopen(self, step: int) -> None:
        """Before a checkpoint of ``step`` done steps is read: memory for the window that was open then, if any."""
        self.tracks = {}
        first = self.setting.window_of(step, self.steps) if self.setting else None
        if self.setting is None or first is None or first == step:
            return
        for name, format in weight_formats(self.plan, first / self.steps).items():
            index = None
            if self.setting.sample < 1:
                index = torch.zeros_like(self._local(name), dtype=torch.int64)[:, : self._tracked(name)].contiguous()
            self.tracks[name] = self._track(name, format, index)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fills the window of :meth:`reopen`; where any of it is missing, the window is given up."""
        if state.keys() != self.state_dict().keys():
            self.tracks = {}
        for key, tensor in state.items() if self.tracks else ():
            name, _, what = key.rpartition("/")
            setattr(self.tracks[name], what, tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def _open(self, step: int) -> None:
        """A window begins: nothing has moved yet; which weights are tracked is decided."""
        assert self.setting is not None
        formats = weight_formats(self.plan, step / self.steps)
        if self.setting.sample == 1:
            self.tracks = {name: self._track(name, format, None) for name, format in formats.items()}
            return
        for name, _, bins_NK in self._on_shards(bins_off, formats):
            index = bins_NK.sort(dim=1, descending=True, stable=True).indices[:, : self._tracked(name)]
            self.tracks[name] = self._track(name, formats[name], index.clone())

    def _track(self, name: str, format: Format, index: Tensor | None) -> Track:
        like = self._local(name) if index is None else index
        return Track(
            format, index, torch.zeros_like(like, dtype=torch.float32), torch.zeros_like(like, dtype=torch.float32)
        )

    def _tracked(self, name: str) -> int:
        """Tracked weights in each row."""
        assert self.setting is not None
        return math.ceil(self.setting.sample * self.plan.layers[name].in_features)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.plan.layers.values())).weight.device

    def _local(self, name: str) -> Tensor:
        """The rows (n, K) of the layer's master weight that this rank holds; writing to them changes the weight."""
        weight = self.plan.layers[name].weight.detach()
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def _like_weight(self, name: str, local: Tensor) -> Tensor:
        """A matrix of this rank's rows as its part of the whole one."""
        weight = self.plan.layers[name].weight
        if not isinstance(weight, DTensor):
            return local
        columns = local.shape[1] * weight.shape[1] // self._local(name).shape[1]  # tensor parallelism may cut them
        shape = torch.Size((weight.shape[0], columns))
        return DTensor.from_local(
            local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(shape[1], 1)
        )

    def _on_shards(
        self, measure: Callable[[Format, Tensor, Tensor | None], Tensor], formats: Mapping[str, Format]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, master (n, K), what ``measure`` says of the whole weight, cut to these rows); a collective."""
        spread = {name for name, format in formats.items() if straddles(format, self.plan.layers[name].weight)}
        needed = [name for name, format in formats.items() if has_one_maximum(format) and name not in spread]
        parts = [self._local(name).to(self.dtype).abs() for name in needed]
        maxima: dict[str, Tensor] = {}
        if needed:
            stacked = torch.stack(
                [part.amax().float() if part.numel() else part.new_zeros(()).float() for part in parts]
            )
            stacked = stacked.nan_to_num(torch.inf, torch.inf)
            _all_reduce(stacked, dist.ReduceOp.MAX, self.group)
            maxima = dict(zip(needed, stacked.unbind(), strict=True))
        for name, format in formats.items():
            local, weight = self._local(name), self.plan.layers[name].weight
            if name in spread:
                assert isinstance(weight, DTensor)
                whole_NK = measure(format, weight.full_tensor().detach().to(self.dtype), None)
                everywhere = DTensor.from_local(whole_NK, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim)
                yield name, local, everywhere.redistribute(placements=weight.placements).to_local()
            else:
                part = measure(format, local.to(self.dtype), maxima.get(name)) if local.numel() else local
                yield name, local, part


def has_one_maximum(format: Format) -> bool:
    """Whether the format needs to know the largest weight of all and nothing else of other rows."""
    return format.rule == "absmax" and (format.tensor_scale is True or format.block == (0, 0))


def straddles(format: Format, weight: Tensor) -> bool:
    """Whether scales depend on more of the weight than one rank's rows and the largest weight of all."""
    if not isinstance(weight, DTensor) or weight.device_mesh.size() == 1:
        return False
    if weight.placements != (Shard(0),):
        return True
    rows, free = math.ceil(weight.shape[0] / weight.device_mesh.size()), format.block[0]
    if has_one_maximum(format):
        return format.block != (0, 0) and (free == 0 or rows % free != 0)
    return format.tensor_scale is True or free == 0 or rows % free != 0


def weight_formats(plan: Plan, progress: float) -> dict[str, Format]:
    """The layers here whose weight the forward product quantises at this progress, and how. Raises ValueError."""
    recipes, found = plan.precision.at(progress), {}
    for entry in plan.entries:
        fprop: Gemm = recipes[entry.recipe].fprop
        if fprop.b.format is None:
            continue
        if fprop.inner or fprop.outer_b or fprop.b.split or fprop.b.rounding != "nearest":
            raise ValueError(
                f"deoscillation: recipe {entry.recipe} rotates or splits the weight of fprop or rounds it"
                " stochastically, so a weight has no quantised value of its own to be set to; leave deoscillation out"
            )
        if entry.layer in plan.layers:  # not on another pipeline stage
            found[entry.layer] = fprop.b.format
    return found


def refuse(plan: Plan) -> None:
    """Raises ValueError if the plan wants de-oscillation of weights that have no quantised value of their own."""
    if plan.precision.deoscillation:
        for progress in (0.0, *(change.start for change in plan.precision.schedule)):
            weight_formats(plan, progress)


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op, group)
