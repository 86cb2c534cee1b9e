"""A checkpoint belongs to no number of ranks and to no layout: whoever reads it finds the same tensors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # what DTensor imports at its first use: once here instead of in every forked rank
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lowprec.train.checkpoint import Checkpoints
from tests.ranks import run

pytestmark = pytest.mark.distributed

SHAPES = {"columns": (8, 6), "rows": (8, 6), "uneven": (5, 3), "copied": (4, 2), "vector": (7,)}
# over (data, tensor): how FSDP2 x tensor parallel cuts, a matrix whose rows do not divide, copies as of HSDP
TWO_D: dict[str, list[Placement]] = {
    "columns": [Shard(0), Shard(1)],
    "rows": [_StridedShard(0, split_factor=2), Shard(0)],
    "uneven": [Shard(0), Replicate()],
    "copied": [Replicate(), Replicate()],
    "vector": [Replicate(), Shard(0)],
}


def value(name: str) -> Tensor:
    """The whole tensor of that name: all numbers differ."""
    first, shape = 1000.0 * list(SHAPES).index(name), SHAPES[name]
    return torch.arange(first, first + torch.Size(shape).numel()).reshape(shape)


def cut(full: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """`full` as a DTensor; a strided cut (rows to the tensor ranks first, then to the data ranks) by hand."""
    if not isinstance(placements[0], _StridedShard):
        return distribute_tensor(full, mesh, placements)
    data, tensor = mesh.get_local_rank(0), mesh.get_local_rank(1)
    local = full.chunk(mesh.size(1))[tensor].chunk(mesh.size(0))[data].clone()
    return DTensor.from_local(local, mesh, placements, shape=full.shape, stride=full.stride())


def layout(kind: str) -> dict[str, Tensor]:
    """Every tensor of SHAPES laid out over this world: cut over 2 x 2 ranks, by rows over all of them, or whole."""
    if kind == "whole":
        return {name: value(name) for name in SHAPES}
    if kind == "2d":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        return {name: cut(value(name), mesh, placements) for name, placements in TWO_D.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(value(name), mesh, [Shard(0)]) for name in SHAPES}


def stage(kind: str) -> dict[str, Tensor]:
    """As ranks of a pipeline: the first half of the world holds two tensors, the second half the others."""
    names, ranks = list(SHAPES), dist.get_world_size()
    if ranks == 1:
        return {name: value(name) for name in names}
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("pp", "data"))
    mine = names[:2] if dist.get_rank() < ranks // 2 else names[2:]
    return {name: distribute_tensor(value(name), mesh["data"], [Shard(0)]) for name in mine}


class State:
    def __init__(self, kind: str) -> None:
        self.tensors, self.step = stage(kind) if kind == "stages" else layout(kind), 1
        rank = dist.get_rank()
        self.more: dict[str, Any] = {"plain": torch.full((3,), 7.0), f"comm/{rank}/error": torch.full((2,), rank + 1.0)}
        self.groups = [{"lr": 0.5, "betas": (0.9, 0.95), "fused": True, "eps": None}]
        self.oscillation = SimpleNamespace(reopen=lambda step: None)
        self.engine = SimpleNamespace(transport=None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.tensors,
            "optim": {"param_groups": self.groups},
            "progress": json.dumps({"step": 1}),
            **self.more,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def forget(self) -> None:
        for x in [*self.tensors.values(), *self.more.values()]:
            (x.to_local() if isinstance(x, DTensor) else x).fill_(-1.0)
        self.groups[0] = {"lr": 0.0, "betas": (0.0, 0.0), "fused": False, "eps": 1.0}


def save_or_load(folder: str, kind: str, what: str, optional: tuple[str, ...]) -> Any:
    """Saves, or loads into emptied tensors: what was missing, which `comm` error came back."""
    import lowprec.train.checkpoint as module

    module.OPTIONAL = optional  # type: ignore[misc]  # in this forked process only
    world = SimpleNamespace(rank=dist.get_rank(), size=dist.get_world_size(), is_first=dist.get_rank() == 0)
    world.control, world.storage = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    found, state = Checkpoints(Path(folder), world, 9, 0, background=False), State(kind)  # type: ignore[arg-type]
    if what == "save":
        assert found.save(state) is None  # type: ignore[arg-type]
        return None
    state.forget()
    missing = found.load(state, 1)  # type: ignore[arg-type]
    for name, tensor in state.tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, value(name)), name
    assert torch.equal(state.more["plain"], torch.full((3,), 7.0))
    assert state.loaded["progress"] == '{"step": 1}'
    assert state.loaded["optim"]["param_groups"] == [{"lr": 0.5, "betas": (0.9, 0.95), "fused": True, "eps": None}]
    return missing, state.more[f"comm/{dist.get_rank()}/error"].tolist()


OPTIONAL = ("comm/",)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, "2d"), [(2, "rows"), (1, "whole"), (4, "stages"), (4, "2d")]),
        ((4, "stages"), [(1, "whole"), (2, "stages"), (4, "2d")]),
        ((1, "whole"), [(4, "2d"), (4, "stages")]),
        ((2, "rows"), [(4, "2d"), (4, "rows")]),
    ],
    ids=lambda case: "" if isinstance(case, list) else f"{case[0]}-{case[1]}",
)
def test_any_layout_reads_any_other(tmp_path: Path, saved: tuple[int, str], loaded: list[tuple[int, str]]) -> None:
    """2-D, 1-D, pipeline stages with keys of their own, one process: the same tensors bit for bit, both ways.

    What a rank keeps for itself (`comm/<rank>/`) comes back where the rank is there again, is ignored where it is not,
    and is reported where a rank is new.
    """
    run(saved[0], save_or_load, str(tmp_path), saved[1], "save", OPTIONAL)
    for ranks, kind in loaded:
        new = [f"comm/{rank}/error" for rank in range(saved[0], ranks)]
        for rank, (missing, error) in enumerate(run(ranks, save_or_load, str(tmp_path), kind, "load", OPTIONAL)):
            assert missing == new
            assert error == ([-1.0] * 2 if rank >= saved[0] else [rank + 1.0] * 2)


def test_a_key_that_is_not_optional_must_be_there(tmp_path: Path) -> None:
    """The same load is refused, by name and on every rank, where `comm/` may not be missing."""
    run(1, save_or_load, str(tmp_path), "whole", "save", ())
    with pytest.raises(AssertionError, match=r"ValueError: .* cannot be read: rank 1: Missing key .*comm/1/error"):
        run(2, save_or_load, str(tmp_path), "rows", "load", ())
