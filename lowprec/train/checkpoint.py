"""Checkpoints: one folder per step, written by torch's distributed checkpoint (DCP).

    checkpoints/step_00000050/  __0_0.distcp  __1_0.distcp  ...  .metadata

DCP writes `.metadata` last and by rename, so a folder that has it is complete ("committed") and one without it is
torn: what a killed process left. Nothing is ever written into a committed folder, so an interrupted save cannot harm
an older checkpoint. There is no `latest` pointer that could disagree with the folders: the newest committed folder is
the latest.

A save in the background copies the state first (blocking, short) and writes from the copy; only one is under way at a
time.
"""

import shutil
from concurrent.futures import Future
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lowprec.parallel import World
from lowprec.train.state import OPTIONAL, TrainState

_COMMITTED = ".metadata"


def committed(folder: Path) -> dict[int, Path]:
    """Complete checkpoints in `folder`, oldest first: {step: path}."""
    found = {int(p.name.removeprefix("step_")): p for p in folder.glob("step_*") if (p / _COMMITTED).is_file()}
    return dict(sorted(found.items()))


class Checkpoints:
    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int, background: bool) -> None:
        self.folder, self.world = folder, world
        self.keep_last, self.keep_every, self.background = keep_last, keep_every, background
        self._under_way: Future[Any] | None = None

    def clean(self) -> None:
        """Removes torn folders. Call before anything is saved; a collective."""
        if self.world.is_first:
            for path in self.folder.glob("step_*"):
                if not (path / _COMMITTED).is_file():
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier(self.world.control)

    def latest(self) -> int | None:
        """The step of the newest committed checkpoint, the same on every rank; a collective."""
        newest = [max(committed(self.folder), default=None)]
        dist.broadcast_object_list(newest, src=0, group=self.world.control)
        return newest[0]

    def load(self, state: TrainState, step: int) -> list[str]:
        """Fills `state` in place from the checkpoint of `step`; a collective. Raises ValueError if it does not fit.

        Returns the keys of recipes' memories that it does not hold, or not in this shape: they begin anew.
        """
        state.oscillation.reopen(step)
        wanted = state.state_dict()
        try:
            optional = [key for key in wanted if key.startswith(OPTIONAL)]
            held = dcp.FileSystemReader(self._path(step)).read_metadata().state_dict_metadata if optional else {}
            missing = [key for key in optional if getattr(held.get(key), "size", None) != wanted[key].shape]
            for key in missing:
                del wanted[key]
            dcp.load(wanted, checkpoint_id=self._path(step), process_group=self.world.storage)
        except (CheckpointException, RuntimeError, KeyError, OSError, EOFError, UnpicklingError) as error:
            raise ValueError(f"the checkpoint {self._path(step)} cannot be read: {_last_line(error)}") from error
        state.load_state_dict(wanted)
        return missing

    def save(self, state: TrainState) -> None:
        """Saves `state` under its step, unless it is there already, and then prunes older ones; a collective."""
        self.finish()
        path = self._path(state.step)
        if state.step in committed(self.folder):
            return
        if self.background:
            self._under_way = dcp.async_save(state.state_dict(), checkpoint_id=path, process_group=self.world.storage)  # type: ignore[assignment]
        else:
            try:
                dcp.save(state.state_dict(), checkpoint_id=path, process_group=self.world.storage)
            except CheckpointException as error:
                raise RuntimeError(f"the checkpoint {path} could not be written: {_last_line(error)}") from error
            self._prune()

    def finish(self) -> None:
        """Waits for a save in the background. Raises RuntimeError if it failed."""
        if self._under_way is None:
            return
        future, self._under_way = self._under_way, None
        try:
            future.result()
        except (CheckpointException, Exception) as error:
            raise RuntimeError(f"a checkpoint in {self.folder} could not be written: {_last_line(error)}") from error
        self._prune()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _prune(self) -> None:
        if not self.world.is_first:
            return
        for step, path in list(committed(self.folder).items())[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                (path / _COMMITTED).unlink()  # torn first, so that an interrupted removal is not taken for a checkpoint
                shutil.rmtree(path, ignore_errors=True)


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
