"""LayerState: what one layer remembers between two optimizer steps.

Most recipes remember nothing: every scale comes from the tensor at hand. A few do, and all of what they keep is one of

    history  the maxima of the last `length` steps; delayed scaling aims at the largest of them
             (TransformerEngine's Float8 DelayedScaling with the "max" algorithm; arXiv:2209.05433)
    hold     a maximum sampled every `every` steps and held in between (UE5M3, arXiv:2609.02846)
    ema      an exponential moving average per channel: a centre that is frozen within a step, so causal
    total    a sum per channel over the steps `span`: which channels are large (TetraJet-v2, arXiv:2510.27527)

A step reads what earlier steps left and never what it observes itself::

    state = LayerState({"fprop.x.amax": Memory("history", length=16), "x.mean": Memory("ema", length=K, decay=0.99)})
    amax = state.amax("fprop.x.amax", current)             # reading; current = this tensor's own maximum, () fp32
    state.observe("fprop.x.amax", current, micro)          # any number of micro-batches, in training only
    end_step({"layer": state}, step)                       # after the optimizer: reduce over ranks, then fold

Observing is idempotent: a micro-batch whose forward pass is computed again counts once. What is not finite (a poisoned
micro-batch, or a step whose update was not accepted) is never folded. All ranks fold the same numbers, so the state is
replicated and a checkpoint of it loads on any number of ranks.

What this is not: a buffer of the module (state_dict keys stay those of ``nn.Linear``), or anything that a step may
change while it runs. TransformerEngine folds after every micro-batch; here a step of any number of micro-batches folds
once, so the numbers do not depend on how a batch is cut up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand
from lowprec.linear.split import ChannelSplit, MeanSplit

KINDS = ("history", "hold", "ema", "total")


@dataclass(frozen=True)
class Memory:
    """How one quantity is remembered.

    Attributes:
        kind: ``history``, ``hold`` (both of maxima, observed as () tensors), ``ema`` or ``total`` (of (K,) vectors).
        length: history: steps it looks back; ema and total: the channels K.
        every: hold: steps between two samples, counted from step 0.
        decay: ema: weight of the past, at least 0 and below 1; the first mean enters whole.
        span: total: the steps [first, last) that are summed, counted from 0.
    """

    kind: str
    length: int = 1
    every: int = 1
    decay: float = 0.0
    span: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of memory '{self.kind}'; choose one of {', '.join(KINDS)}")
        if min(self.length, self.every) < 1 or not 0 <= self.decay < 1 or not 0 <= self.span[0] <= self.span[1]:
            raise ValueError(
                f"a memory needs length and every of at least 1, 0 <= decay < 1 and a span [first, last) of steps,"
                f" got {self}"
            )

    @property
    def of_maxima(self) -> bool:
        """Whether it is of () maxima (reduced by max) or of (K,) vectors (reduced by sum)."""
        return self.kind in ("history", "hold")

    def empty(self) -> Tensor:
        """fp32, what it is before anything was folded: zeros; an ema NaN, so that its first mean enters whole."""
        shape = () if self.kind == "hold" else (self.length,)
        return torch.full(shape, torch.nan if self.kind == "ema" else 0.0)


def memories_of(recipes: Iterable[LinearRecipe], out_features: int, in_features: int) -> dict[str, Memory]:
    """What a layer (out_features, in_features) must remember to follow any of these recipes, by key.

    Keys: ``"<role>.<operand>.amax"`` for delayed and held maxima (an operand that reuses forward codes reads the
    forward's), ``"<operand>.mean"`` for a moving average, ``"x.energy"`` for channels chosen by what a span collects.

    Raises:
        ValueError: if two operands want one key in two ways.
    """
    found: dict[str, Memory] = {}
    for recipe in recipes:
        for role, names in GEMM_OPERANDS.items():
            gemm: Gemm = getattr(recipe, role)
            for name, operand in zip(names, (gemm.a, gemm.b), strict=True):
                for key, memory in _wanted(role, name, operand, {"dy": out_features}.get(name, in_features)):
                    if found.setdefault(key, memory) != memory:
                        raise ValueError(
                            f"recipe {recipe.name}: '{key}' is remembered in two ways ({found[key]} and {memory});"
                            " give all operands and scheduled recipes that share it the same window, decay or span"
                        )
    return found


def _wanted(role: str, name: str, operand: Operand, features: int) -> list[tuple[str, Memory]]:
    split, wanted = operand.split, []
    if operand.amax == "delayed" and not operand.reuse:
        wanted.append((f"{role}.{name}.amax", Memory("history", length=operand.window)))
    if operand.amax == "hold" and not operand.reuse:
        wanted.append((f"{role}.{name}.amax", Memory("hold", every=operand.window)))
    if isinstance(split, MeanSplit) and split.remembers:
        wanted.append((f"{name}.mean", Memory("ema", length=features, decay=split.decay)))
    if isinstance(split, ChannelSplit) and split.collect:
        wanted.append(("x.energy", Memory("total", length=features, span=split.collect)))
    return wanted


@dataclass
class LayerState:
    """The memories of one layer.

    Attributes:
        memories: what is remembered, by key; the same on every rank. Keys are plain: ``"fprop.x.amax"``, ``"x.mean"``.
        tensors: fp32, replicated, one for each key from the first moment on, on the layer's device (see :meth:`to`):
            history (length,) newest first, hold (), ema (K,), total (K,).
    """

    memories: dict[str, Memory] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {key: memory.empty() for key, memory in self.memories.items()}
        self._maxima: dict[str, Tensor] = {}  # observed in this step: () fp32
        self._sums: dict[str, tuple[Tensor, frozenset[int]]] = {}  # ... (K,) fp64 and the micro-batches in it
        self._holding: set[str] = set()  # keys of kind hold that have a sample above zero

    def to(self, device: torch.device | str) -> None:
        """Move to the layer's device; a ``QuantizedLinear`` does it when it is moved itself."""
        self.tensors = {key: tensor.to(device) for key, tensor in self.tensors.items()}

    def amax(self, key: str, current: Tensor) -> Tensor:
        """() fp32: the largest of the history; ``current`` (() fp32) while that is zero, as before the first step."""
        largest = self.tensors[key].amax()
        return torch.where(largest > 0, largest, current)

    def held(self, key: str, step: int) -> Tensor | None:
        """() fp32: the sample held in this step. None in a step that samples (a multiple of ``every``) or as long as
        there is no sample above zero: then use the tensor's own maximum, and observe it."""
        if key not in self._holding or step % self.memories[key].every == 0:
            return None
        return self.tensors[key]

    def mean(self, key: str) -> Tensor:
        """(K,) fp32: the moving average; zero where nothing was folded yet."""
        return self.tensors[key].nan_to_num(0.0)

    def total(self, key: str, step: int) -> Tensor | None:
        """(K,) fp32: the sum over the whole span; None before its end."""
        return self.tensors[key] if step >= self.memories[key].span[1] else None

    def observe(self, key: str, value: Tensor, micro: int) -> None:
        """Note a value of this step; call in training only (where gradients are enabled), at most once per micro-batch
        and key unless a micro-batch is computed again.

        Args:
            key: one of ``memories``.
            value: () a maximum (history, hold), or (K,) the mean or sum over this micro-batch's tokens (ema, total).
            micro: number of the micro-batch, ``stream.micro``.

        Raises:
            ValueError: for an unknown key or a value of another shape.
        """
        memory = self.memories.get(key)
        if memory is None:
            raise ValueError(f"nothing is remembered as '{key}'; this layer remembers {', '.join(self.memories)}")
        shape = () if memory.of_maxima else (memory.length,)
        if value.shape != shape:
            raise ValueError(f"'{key}' is observed as a tensor of shape {shape}, got {tuple(value.shape)}")
        value = value.detach()
        if memory.of_maxima:
            before = self._maxima.get(key)
            self._maxima[key] = value.float() if before is None else torch.maximum(before, value.float())
        else:
            total, micros = self._sums.get(key, (torch.zeros_like(value, dtype=torch.float64), frozenset()))
            if micro not in micros:
                self._sums[key] = (total + value.double(), micros | {micro})

    def forget(self) -> None:
        """Drop what was observed since the last :func:`end_step`."""
        self._maxima, self._sums = {}, {}

    def _due(self, key: str, step: int) -> bool:
        """Whether this step may change the key; the same on every rank."""
        memory = self.memories[key]
        if memory.kind == "hold":
            return key not in self._holding or step % memory.every == 0
        return memory.kind != "total" or memory.span[0] <= step < memory.span[1]


def end_step(
    states: Mapping[str, LayerState],
    step: int,
    accept: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fold what all layers observed in step ``step`` into their tensors; a collective if any layer remembers anything.

    One all-reduce serves all maxima and one all sums, in the order of layer names and keys, so every rank ends with
    identical tensors; a layer that saw nothing on this rank, or on any, takes part. Nothing is read back to the host
    but the samples of ``hold``, in the steps that take them.

    Args:
        states: by layer name; the same names and memories on every rank, all tensors on one device.
        step: index of the step that was done, from 0.
        accept: () bool, the same on every rank: whether the step's update counts. False folds nothing.
        group: the ranks that share the batch; None = all.
    """
    due = [(s, key) for _, s in sorted(states.items()) for key in sorted(s.memories) if s._due(key, step)]
    maxima = [(s, key) for s, key in due if s.memories[key].of_maxima]
    sums = [(s, key) for s, key in due if not s.memories[key].of_maxima]
    if maxima:
        _fold_maxima(maxima, accept, group)
    if sums:
        _fold_sums(sums, accept, group)
    for state in states.values():
        state.forget()


def _fold_maxima(due: list[tuple[LayerState, str]], accept: Tensor | None, group: dist.ProcessGroup | None) -> None:
    device = due[0][0].tensors[due[0][1]].device
    nothing = torch.full((), -torch.inf, device=device)
    new_D = torch.stack([state._maxima.get(key, nothing) for state, key in due])
    new_D = new_D.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a maximum over ranks may lose a NaN
    _all_reduce(new_D, dist.ReduceOp.MAX, group)
    good_D = new_D.isfinite() if accept is None else new_D.isfinite() & accept
    lengths = [s.memories[key].length if s.memories[key].kind == "history" else 0 for s, key in due]
    for length in sorted(set(lengths)):  # all tensors of one shape at once
        rows = [i for i, other in enumerate(lengths) if other == length]
        old = torch.stack([due[i][0].tensors[due[i][1]] for i in rows])  # (rows, length), hold: (rows,)
        new, good = new_D[rows], good_D[rows]
        if length:
            new, good = torch.cat([new[:, None], old[:, :-1]], dim=1), good[:, None]
        folded = torch.where(good, new, old)
        for i, tensor in zip(rows, folded.unbind(), strict=True):
            due[i][0].tensors[due[i][1]] = tensor
        if not length:
            for i, sample in zip(rows, folded.tolist(), strict=True):
                (due[i][0]._holding.add if sample > 0 else due[i][0]._holding.discard)(due[i][1])


def _fold_sums(due: list[tuple[LayerState, str]], accept: Tensor | None, group: dist.ProcessGroup | None) -> None:
    device = due[0][0].tensors[due[0][1]].device
    lengths = [state.memories[key].length for state, key in due]
    nothing: frozenset[int] = frozenset()
    parts, counts = [], []
    for (state, key), length in zip(due, lengths, strict=True):
        total_K, micros = state._sums.get(key, (torch.zeros(length, dtype=torch.float64, device=device), nothing))
        parts.append(total_K)
        counts.append(len(micros))
    stacked = torch.cat([*parts, torch.tensor(counts, dtype=torch.float64, device=device)])
    _all_reduce(stacked, dist.ReduceOp.SUM, group)
    *totals, counts_D = stacked.split([*lengths, len(due)])
    for (state, key), total_K, count in zip(due, totals, counts_D, strict=True):
        memory, old_K = state.memories[key], state.tensors[key]
        if memory.kind == "ema":
            new_K = (total_K / count).float()  # NaN if no rank saw anything
            folded_K = torch.where(old_K.isnan(), new_K, memory.decay * old_K + (1 - memory.decay) * new_K)
        else:
            new_K = total_K.float()
            folded_K = old_K + new_K
        good_K = new_K.isfinite() if accept is None else new_K.isfinite() & accept
        state.tensors[key] = torch.where(good_K, folded_K, old_K)


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op, group)


def state_dict(states: Mapping[str, LayerState]) -> dict[str, Tensor]:
    """All tensors as ``{"layer/key": tensor}``; the keys depend on the recipes alone, not on the step."""
    return {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}


def load_state_dict(states: Mapping[str, LayerState], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`state_dict`, also into a model that has not run yet.

    Raises:
        ValueError: if the keys or shapes are not those of these layers' recipes; nothing is changed then.
    """
    own = state_dict(states)
    differing = [f"{key} is missing" for key in own if key not in tensors]
    differing += [f"{key} is unknown" for key in tensors if key not in own]
    differing += [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the saved precision state is of other recipes: {', '.join(differing[:3])}{more};"
            " load it into a model with the recipes it was saved with"
        )
    for name, state in states.items():
        state.tensors = {
            key: tensors[f"{name}/{key}"].detach().to(old.device, torch.float32, copy=True)
            for key, old in state.tensors.items()
        }
        held = [key for key, memory in state.memories.items() if memory.kind == "hold"]
        state._holding = {key for key in held if state.tensors[key] > 0}
        state.forget()
