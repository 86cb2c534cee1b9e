"""Checksums find every kind of damage, on any number of ranks; a save that fails leaves nothing, on all of them."""

import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # what DTensor imports at its first use: once here instead of in every forked rank
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lowprec.train.checkpoint import Checkpoints, committed
from lowprec.train.integrity import COMMITTED, MANIFEST, damage
from tests.ranks import run

pytestmark = pytest.mark.distributed


class State:
    """What Checkpoints asks of a TrainState: a weight (64, 32) cut by rows, a replicated vector, a text."""

    def __init__(self, step: int = 0, rows: int = 64) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.weight = distribute_tensor(torch.full((rows, 32), float(step)), mesh, [Shard(0)])
        self.vector, self.step = torch.full((8,), float(step)), step
        self.oscillation = SimpleNamespace(reopen=lambda step: None)
        self.engine = SimpleNamespace(transport=None)

    def state_dict(self) -> dict[str, Any]:
        progress = json.dumps({"step": self.step})
        return {"model": {"weight": self.weight, "vector": self.vector}, "progress": progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = json.loads(state["progress"])["step"]

    def values(self) -> list[float]:
        """Distinct values of all tensors: [step] if everything is of that step."""
        parts: list[Tensor] = [self.weight.full_tensor().flatten(), self.vector]
        return torch.cat(parts).unique().tolist()


def checkpoints(folder: str, background: bool = False) -> tuple[Checkpoints, list[str]]:
    """Keeps 9; and what it says on this rank."""
    world = SimpleNamespace(rank=dist.get_rank(), size=dist.get_world_size(), is_first=dist.get_rank() == 0)
    world.control, world.storage = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    said: list[str] = []
    return Checkpoints(Path(folder), world, 9, 0, background, said.append), said  # type: ignore[arg-type]


def save(folder: str, *steps: int) -> None:
    for step in steps:
        assert checkpoints(folder)[0].save(State(step)) is None  # type: ignore[arg-type]


def load(folder: str) -> tuple[int, list[float], list[str]]:
    """Newest that is sound: its step, the values in its tensors, and what was said."""
    found, said = checkpoints(folder)
    state = State(0)
    newest = found.latest()
    assert newest is not None and found.load(state, newest) == []  # type: ignore[arg-type]
    return state.step, state.values(), said


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGES = {
    "cut short": ("__1_0.distcp", lambda file: file.write_bytes(file.read_bytes()[:-1]), "__1_0.distcp is cut short: "),
    "empty": ("__0_0.distcp", lambda file: file.write_bytes(b""), "__0_0.distcp is cut short: 0 bytes instead of "),
    "longer": ("__0_0.distcp", lambda file: file.write_bytes(file.read_bytes() + b"x"), "__0_0.distcp is too long: "),
    "missing": ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    "first bit": ("__0_0.distcp", lambda file: flip(file, 0), "__0_0.distcp has changed: its checksum is "),
    "last bit": ("__1_0.distcp", lambda file: flip(file, -1), "__1_0.distcp has changed: its checksum is "),
    "index": (COMMITTED, lambda file: flip(file, 999), ".metadata has changed: its checksum is "),
    "index cut": (COMMITTED, lambda file: file.write_bytes(file.read_bytes()[:50]), ".metadata is cut short: 50 bytes"),
    "manifest": (MANIFEST, lambda file: file.write_bytes(file.read_bytes()[:50]), "checksums.json is damaged"),
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3, written by two ranks."""
    folder = tmp_path_factory.mktemp("three")
    run(2, save, str(folder), 1, 2, 3)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_a_damaged_one_is_loaded(three: Path, tmp_path: Path, kind: str) -> None:
    """Two ranks find the damage, whichever of them looks at the file, say it in a sentence and go back one."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    name, do, words = DAMAGES[kind]
    do(folder / "step_00000003" / name)
    kept = {p.name for p in (folder / "step_00000003").iterdir()}
    (step, values, said), (other_step, other_values, silent) = run(2, load, str(folder))
    assert (step, values) == (other_step, other_values) == (2, [2.0])
    assert silent == [] and len(said) == 1
    assert said[0].startswith(f"the checkpoint of step 3 is damaged ({words}")
    assert said[0].endswith("damaged_00000003: the run goes on from step 2")
    assert list(committed(folder)) == [1, 2]
    assert {p.name for p in (folder / "damaged_00000003").iterdir()} == kept, "it is set aside, not removed"


def test_any_flipped_bit_is_found(three: Path, tmp_path: Path) -> None:
    """Bits spread over every file of a checkpoint, one at a time, the manifest's own included."""
    folder = tmp_path / "step"
    shutil.copytree(three / "step_00000003", folder)
    assert damage(folder) is None
    for file in list(folder.iterdir()):
        size_bits, sound = 8 * file.stat().st_size, file.read_bytes()
        for bit in range(3, size_bits, size_bits // 37):
            flip(file, bit)
            assert damage(folder) is not None, f"bit {bit} of {file.name}"
            file.write_bytes(sound)
    assert damage(folder) is None


def save_and_load_in_turn(folder: str) -> list[Any]:
    """A step is damaged, set aside, saved again and damaged again."""
    outcome = []
    for _ in range(2):
        save(folder, 1, 2)
        dist.barrier()
        if dist.get_rank() == 0:
            flip(Path(folder) / "step_00000002" / "__0_0.distcp", 77)
        dist.barrier()
        outcome.append(load(folder)[:2])
    return outcome


def test_a_step_set_aside_can_be_saved_again(tmp_path: Path) -> None:
    """And damaged again: each damaged folder keeps a name of its own."""
    assert run(2, save_and_load_in_turn, str(tmp_path)) == [[(1, [1.0])] * 2] * 2
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000001", "damaged_00000002", "damaged_00000002_2"}


def fails_to_load(folder: str, rows: int) -> str:
    found, _ = checkpoints(folder)
    with pytest.raises(ValueError) as caught:
        found.load(State(0, rows), 3)  # type: ignore[arg-type]
    return str(caught.value)


def test_none_is_sound(three: Path, tmp_path: Path) -> None:
    """All of them are named on every rank, and nothing is renamed: the next start must not begin anew."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for step in (1, 2, 3):
        flip(folder / f"step_0000000{step}" / f"__{step % 2}_0.distcp", 1000)
    first, second = run(2, fails_to_load, str(folder), 64)
    assert first == second and all(
        f"step_0000000{step}: __{step % 2}_0.distcp has changed" in first for step in (1, 2, 3)
    )
    assert list(committed(folder)) == [1, 2, 3]


def test_one_that_does_not_fit_is_not_damaged(three: Path, tmp_path: Path) -> None:
    """Another model is the user's mistake: the tensor is named, and no sound checkpoint is set aside for it."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for sentence in run(2, fails_to_load, str(folder), 48):
        assert "step_00000003 cannot be read: " in sentence and "model.weight" in sentence and "\n" not in sentence
    assert list(committed(folder)) == [1, 2, 3]


def test_one_that_is_a_program_is_not_damaged(three: Path, tmp_path: Path) -> None:
    """It is refused on all ranks, stays where it is, and no older one is taken as if nothing had been."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    (folder / "step_00000003" / MANIFEST).unlink()
    (folder / "step_00000003" / COMMITTED).write_bytes(f"cos\nsystem\n(Vtouch {tmp_path}/touched\ntR.".encode())
    first, second = run(2, fails_to_load, str(folder), 64)
    assert (
        first == second and "step_00000003 is refused: it asks for os.system, which no checkpoint is made of" in first
    )
    assert list(committed(folder)) == [1, 2, 3] and not (tmp_path / "touched").exists()


def test_checkpoints_of_older_versions(three: Path, tmp_path: Path) -> None:
    """Without checksums they load, unverified, which is said; a file that is missing or too short is still found."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for manifest in folder.glob(f"*/{MANIFEST}"):
        manifest.unlink()
    step, values, said = run(2, load, str(folder))[0]
    assert (step, values) == (3, [3.0])
    assert len(said) == 1 and said[0].endswith("is of an older version without checksums: it is read unverified")
    short = folder / "step_00000003" / "__1_0.distcp"
    short.write_bytes(short.read_bytes()[:-1])
    step, values, said = run(2, load, str(folder))[0]
    assert (step, values) == (2, [2.0]) and "(__1_0.distcp is cut short: " in " ".join(said)


# ---- saves that fail


def save_without_room(folder: str, rank_without: int, limit_bytes: int, background: bool) -> Any:
    """Saves steps 1 to 3; at step 2 one rank may write no file beyond a limit."""
    found, said = checkpoints(folder, background)
    mine = limit_bytes if dist.get_rank() == rank_without else resource.RLIM_INFINITY
    outcomes = []
    for step in (1, 2, 3):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (mine, resource.RLIM_INFINITY))
        outcomes.append(found.save(State(step)))  # type: ignore[arg-type]
        if background:
            outcomes[-1] = found.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert found.finish() == outcomes[-1]
    return outcomes, said, sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("rank", "limit_bytes", "file"),
    [(1, 1000, "__1_0.distcp"), (0, 0, "__0_0.distcp")],
)
def test_a_full_disk_on_one_rank(tmp_path: Path, background: bool, rank: int, limit_bytes: int, file: str) -> None:
    """Every rank learns that and why the save failed, its folder is gone, and the next save succeeds."""
    first, second = run(2, save_without_room, str(tmp_path), rank, limit_bytes, background)
    why = f"the checkpoint of step 2 could not be saved: rank {rank}: File too large ({file})"
    assert first[0] == second[0] == [None, why, None]
    assert first[1] == [f"{why}; the newest is that of step 1"] and second[1] == []
    assert first[2] == ["step_00000001", "step_00000003"]
    assert damage(tmp_path / "step_00000003") is None


def save_from_the_second(folder: str, limit_bytes: int) -> Any:
    """All data is on the second rank; the first, which commits, may write no file beyond a limit."""
    found, _ = checkpoints(folder)
    state = SimpleNamespace(step=1, state_dict=lambda: {"a": torch.ones(4000)} if dist.get_rank() == 1 else {})
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    return found.save(state), sorted(Path(folder).iterdir())  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit_bytes", "file"), [(0, "checksums.json"), (400, ".metadata.tmp")])
def test_a_full_disk_in_the_commit(tmp_path: Path, limit_bytes: int, file: str) -> None:
    """All data is written, and there is no room for what makes it count: that is a failed save too."""
    for why, left in run(2, save_from_the_second, str(tmp_path), limit_bytes):
        assert why == f"the checkpoint of step 1 could not be saved: rank 0: File too large ({file})"
        assert left == []
