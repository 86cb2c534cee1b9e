"""Transport: what FSDP2 sends of a model, and as what.

Every unit that FSDP2 gathers (a block; the rest) gets its collectives from :mod:`lowprec.comm`: counted, in the codec
of `comm=`, with fp32 sums. Matrices travel in one of three ways, chosen anew at every gather:

    codes    the layer's recipe will quantise the weight anyway: the ranks quantise their rows, and what is gathered are
             the codes that the product uses (:mod:`lowprec.linear.weight`). The loss does not change by a bit. The
             maxima of all such weights, which some formats need, are one stacked all-reduce a step (HQ-FSDP,
             arXiv:2501.02625)
    codec    `comm.weights`: encoded, gathered, decoded
    plain    the dtype the layer computes in

Codes depend on the recipe in force, so an evaluation in high precision, or a schedule that switches a layer to bf16,
gathers the weight itself. A rank encodes its rows once a step and sends them again for the backward pass.

Vectors (norms) are plain. A matrix whose rows the ranks cannot share evenly is plain too, and `remarks` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lowprec.comm import (
    Codec,
    CommConfig,
    Feedback,
    FeedbackKind,
    GradientReduceScatter,
    Meter,
    MeteredAllGather,
    Nodes,
    all_reduce_hook,
    max_all_reduce,
)
from lowprec.linear import Plan, QuantizedLinear
from lowprec.linear.recipe import LinearRecipe
from lowprec.linear.weight import CodedWeight, codes_refusal, encode_weight, local_amax, needs_amax, payload
from lowprec.parallel.mesh import World


@dataclass
class Matrix:
    """One sharded weight matrix and how it travels."""

    name: str
    param: Any  # FSDP2's handle
    layer: QuantizedLinear | None  # None: an embedding
    encoded: tuple[object, Tensor, Tensor | None] | None = None  # (of which way, bytes, tensor scale) since the update
    way: object = None  # how it was gathered last: a recipe (codes), a codec, or None (plain)

    @property
    def rows(self) -> Tensor:
        """This rank's rows of the fp32 master."""
        return self.param._sharded_local_tensor


@dataclass
class Transport:
    """The wire of one engine's model.

    Attributes:
        meter: bytes by collective.
        remarks: what travels otherwise than wished, and why; for the plan.
    """

    world: World
    config: CommConfig
    plan: Plan
    dtype: torch.dtype
    meter: Meter = field(default_factory=Meter)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._matrices: list[Matrix] = []
        self._units: list[FSDPModule] = []
        self._gathers: list[MeteredAllGather] = []
        self._feedback: dict[str, Feedback] = {}
        self._level: Nodes | None = None  # of a reduce-scatter in two levels
        self._amax: dict[str, Tensor] | None = None  # of the matrices whose format needs it; None: not of these weights

        self.remarks.extend(f"note: {sentence}" for sentence in _idle(self.config, self.world))

    # ---- laying it over a model

    def install(self, root: nn.Module) -> None:
        """Gives every FSDP2 unit under `root` its collectives; after sharding and `to_empty`, before the first step."""
        fsdp, replicate = self.world.fsdp, self.world.axis("replicate")
        nodes = self._nodes() if self.config.hpz or self._two_level else None
        self._level = nodes if self._two_level else None
        layers = {id(layer): name for name, layer in self.plan.layers.items()}
        for name, unit in root.named_modules():
            if not isinstance(unit, FSDPModule) or not (params := list(_params(unit))):
                continue
            self._units.append(unit)
            key = f"comm.{name or 'root'}"
            if replicate.size > 1:
                codec = self.config.between_codec
                unit.set_all_reduce_hook(all_reduce_hook(codec, replicate.group, self.meter, self._stream(key), key))
            if fsdp.size() == 1:
                continue
            feedback = self.config.new_feedback()
            if feedback is not None:
                self._feedback[name or "root"] = feedback
            two_level = (nodes, self.config.between_codec) if self._two_level else (None, None)
            unit.set_custom_reduce_scatter(
                GradientReduceScatter(
                    self.config.gradient_codec, self.meter, self._stream(key), key, feedback, *two_level
                )
            )
            gather = MeteredAllGather(self.meter, nodes if self.config.hpz else None)
            unit.set_custom_all_gather(gather)
            self._gathers.append(gather)
            for param in params:
                self._install_matrix(param, layers)

    def _install_matrix(self, param: Any, layers: dict[int, str]) -> None:
        module = param._module_info.module
        name = layers.get(id(module), "embed")
        rows = param._sharded_local_tensor
        if rows.ndim != 2 or not (self.config.codes or self.config.weight_codec):
            return
        if rows.shape[0] * self.world.fsdp.size() != param._orig_size[0]:
            self.remarks.append(
                f"note: {name}.weight travels in {self.dtype}: {self.world.fsdp.size()} ranks cannot share its "
                f"{param._orig_size[0]} rows evenly"
            )
            return
        matrix = Matrix(name, param, module if isinstance(module, QuantizedLinear) else None)
        rows.fsdp_pre_all_gather = MethodType(_pre, _Hook(self, matrix))
        rows.fsdp_post_all_gather = MethodType(_post, _Hook(self, matrix))
        self._matrices.append(matrix)
        if self.config.codes and matrix.layer is not None and matrix.layer.recipe.quantized:
            why = self._refusal(matrix, matrix.layer.recipe)
            if why:
                self.remarks.append(f"note: {name}.weight does not travel as codes: {why}")

    @property
    def _two_level(self) -> bool:
        return bool(self.config.gradients_between) and self.world.axis("replicate").size == 1

    def _nodes(self) -> Nodes:
        ranks = self.config.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size))
        inner = self.world.axis("tp").size  # ranks of a node that share a place in the sharding group
        per_node = max(1, min(ranks // inner, self.world.fsdp.size()))
        return Nodes.split(self.world.fsdp.get_group(), per_node, self.world.timeout)

    def _stream(self, key: str) -> Any:
        return lambda: self.plan.clock.stream(key)

    # ---- in a step

    def new_weights(self) -> None:
        """The parameters have changed: what was encoded of them is void."""
        self._amax = None
        for matrix in self._matrices:
            matrix.encoded = None
        for gather in self._gathers:
            gather.new_weights()

    def regather(self) -> None:
        """Frees what is gathered: the next use gathers anew, as its recipe says. Maxima and secondary shards of hpZ,
        which belong to the recipe of before, are void too."""
        self.new_weights()
        for unit in self._units:
            unit.reshard()

    def end_step(self, accept: Tensor | bool) -> None:
        """Whether the update was made: only then do errors of gradients that were sent count as sent."""
        if self._feedback:
            accepted = bool(accept)  # waits for the device, once
            for feedback in self._feedback.values():
                feedback.end_step(accepted)

    def way(self, matrix: Matrix) -> LinearRecipe | Codec | None:
        """How a matrix travels now."""
        if self.config.codes and matrix.layer is not None:
            recipe = matrix.layer.recipe
            if recipe.quantized and self._refusal(matrix, recipe) is None:
                return recipe
        return self.config.weight_codec

    def _refusal(self, matrix: Matrix, recipe: LinearRecipe) -> str | None:
        if (matrix.param.mp_policy.param_dtype or matrix.rows.dtype) != self.dtype:
            return f"its gradient is added up in {matrix.rows.dtype}, and that of codes comes in {self.dtype}"
        return codes_refusal(recipe, *matrix.rows.shape)

    def encode(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """This rank's rows as they travel now, uint8 or the compute dtype, and the tensor scale of codes."""
        way, rows = self.way(matrix), matrix.rows
        if way is None:
            return rows.to(matrix.param.param_dtype or rows.dtype), None
        if matrix.encoded is None or matrix.encoded[0] != way:
            if isinstance(way, Codec):
                matrix.encoded = way, way.encode(rows.reshape(1, -1))[0], None
            else:
                assert matrix.layer is not None
                amax = self._maximum(matrix) if needs_amax(way) else None
                q = encode_weight(rows, way, amax, matrix.layer.policy, self.dtype)
                scale = q.tensor_scale if isinstance(way.fprop.b.format.tensor_scale, bool) else None  # type: ignore[union-attr]
                matrix.encoded = way, payload(q), scale
        return matrix.encoded[1], matrix.encoded[2]

    def _maximum(self, matrix: Matrix) -> Tensor:
        """The largest element of the whole matrix; those of all matrices are found together, once a step."""
        if self._amax is None or matrix.name not in self._amax:
            wanted = {}
            for m in self._matrices:
                way = self.way(m)
                if isinstance(way, LinearRecipe) and needs_amax(way):
                    wanted[m.name] = local_amax(m.rows, way, m.layer.policy, self.dtype)  # type: ignore[union-attr]
            stacked = torch.stack(list(wanted.values()))
            for group in (self.world.fsdp.get_group(), self.world.axis("tp").group):
                stacked = max_all_reduce(stacked, group, self.meter)
            self._amax = dict(zip(wanted, stacked.unbind(), strict=True))
        return self._amax[matrix.name]

    # ---- in a checkpoint

    @property
    def own(self) -> str:
        """What this rank's keys begin with: errors are of one kind of feedback, one layout, one cut into nodes."""
        sizes = "x".join(str(size) for size in self.world.mesh.shape)
        level = f"x{self._level.inside.size()}" if self._level else ""
        return f"{self.config.feedback.value}/{sizes}{level}/{self.world.rank}/"

    def state_dict(self) -> dict[str, Tensor]:
        """Errors not sent yet, {"<own><unit>/<key>": tensor}."""
        return {
            f"{self.own}{unit}/{key}": tensor
            for unit, feedback in self._feedback.items()
            for key, tensor in feedback.state_dict().items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Inverse; under another layout or feedback the errors are forgotten."""
        for unit, feedback in self._feedback.items():
            prefix, device = f"{self.own}{unit}/", self.world.device
            own = {key.removeprefix(prefix): t.to(device) for key, t in tensors.items() if key.startswith(prefix)}
            if own:
                feedback.load_state_dict(own)


@dataclass
class _Hook:
    transport: Transport
    matrix: Matrix


def _pre(
    self: _Hook, mesh: Any, outer_size: Any, outer_stride: Any, module: nn.Module, mp_policy: Any
) -> tuple[tuple[Tensor, ...], Any]:
    """FSDP2 asks: what is gathered of this shard?"""
    matrix, way = self.matrix, self.transport.way(self.matrix)
    if matrix.way is not way and matrix.way != way:  # another size on the wire: FSDP2 makes its buffers anew
        matrix.param.all_gather_outputs = []
        if hasattr(matrix.param, "_unsharded_param"):
            del matrix.param._unsharded_param
        matrix.param._unsharded_inner_tensors = []
    matrix.way = way
    payload, scale = self.transport.encode(matrix)
    return (payload,), (way, scale)


def _post(
    self: _Hook, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """FSDP2 asks: what is the parameter, given what was gathered?"""
    way, scale = metadata
    shape, gathered = self.matrix.param._orig_size, outputs[0]
    ranks = self.transport.world.fsdp.size()
    local = out._local_tensor if isinstance(out, DTensor) else out
    if isinstance(way, LinearRecipe):
        if local is not None:
            assert isinstance(local, CodedWeight)
            local.refill(way, scale)
            return None
        weight = CodedWeight.of(gathered.view(ranks, -1), way, tuple(shape), scale, self.transport.dtype)
        return weight, (gathered,)
    if isinstance(way, Codec):
        decoded = way.decode(gathered.view(ranks, -1), self.matrix.rows.numel(), param_dtype).reshape(shape)
        if decoded.untyped_storage().data_ptr() != gathered.untyped_storage().data_ptr():
            gathered.untyped_storage().resize_(0)  # as FSDP2 does; it allocates it again before the next gather
        if local is not None:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(local):
                local.copy_(decoded)
            return None
        return decoded, (decoded,)
    return None if local is not None else (gathered.view(shape), (gathered,))


def _idle(config: CommConfig, world: World) -> Iterator[str]:
    """Settings that this layout has no use for, each in a sentence."""
    if world.size > 1 and world.fsdp.size() == 1:
        wished = {"feedback": config.feedback is not FeedbackKind.none, "hpz": config.hpz, "codes": config.codes}
        for key in (key for key, on in wished.items() if on):
            yield f"comm.{key} does nothing here: no ranks share the parameters (parallel.shard and parallel.cp are 1)"
    if world.size > 1 and config.activations and world.axis("tp").size == world.axis("cp").size == 1:
        yield "comm.activations does nothing here: no activations are gathered (parallel.tp and parallel.cp are 1)"


def _params(unit: FSDPModule) -> Iterator[Any]:
    """FSDP2's handles of the parameters that a unit gathers."""
    state = unit._get_fsdp_state()
    groups: Iterable[Any] = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            yield from group.fsdp_params
