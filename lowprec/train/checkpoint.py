"""Checkpoints: one folder per step, written by torch's distributed checkpoint (DCP).

    checkpoints/step_00000050/      __0_0.distcp  __1_0.distcp  ...  checksums.json  .metadata
    checkpoints/damaged_00000050/   what was found damaged and set aside

`.metadata` is written last and by rename (:mod:`lowprec.train.integrity`), so a folder that has it is complete
("committed") and one without it is torn: what a killed process left. Nothing is ever written into a committed folder,
and older ones are removed only after a newer one is committed, so an interrupted save harms none of them. There is no
`latest` pointer that could disagree with the folders: the newest committed folder is the latest.

A save in the background copies the state first (blocking, short) and writes from the copy; only one is under way at a
time. A save that fails (a full disk, on any rank) leaves nothing behind and does not end the run: all ranks agree that
it failed and why, and the next save is tried in its turn. Only the last one must succeed, see `finish`.

A checkpoint is believed after its checksums: the ranks share its files. If one is damaged, the checkpoint before it is
taken. Ranks may hold different keys: what is saved is the union, and each rank reads the keys it asks for, whatever
number of ranks wrote them.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lowprec.parallel import World
from lowprec.train import reader
from lowprec.train.integrity import COMMITTED, Writer, damage, read_sums
from lowprec.train.state import OPTIONAL, TrainState

UNSAVED = 74  # EX_IOERR of sysexits.h: the state at the end of the run, or of this process, is not on the disk

T = TypeVar("T")


def committed(folder: Path) -> dict[int, Path]:
    """Complete checkpoints in `folder`, oldest first: {step: path}. Whether they are sound is not looked at."""
    steps = {path: path.name.removeprefix("step_") for path in folder.glob("step_*")}
    found = {int(step): path for path, step in steps.items() if step.isdigit() and (path / COMMITTED).is_file()}
    return dict(sorted(found.items()))


class Checkpoints:
    """The checkpoints of a run. Every method is a collective of the whole world."""

    def __init__(
        self,
        folder: Path,
        world: World,
        keep_last: int,
        keep_every: int,
        background: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        """say: told, on the first rank, of checkpoints that were damaged or could not be saved."""
        self.folder, self.world = folder, world
        self.keep_last, self.keep_every, self.background = keep_last, keep_every, background
        self._say = say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if background else None
        self._under_way: tuple[int, Future[str | None]] | None = None
        self._failed: str | None = None  # why the newest save failed

    def clean(self) -> None:
        """Removes torn folders. Call before anything is saved."""
        if self.world.is_first:
            for path in self.folder.glob("step_*"):
                if not (path / COMMITTED).is_file():
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier(self.world.control)

    def latest(self) -> int | None:
        """The step of the newest committed checkpoint, the same on every rank."""
        return self._agreed(lambda: max(committed(self.folder), default=None))

    # ---- saving

    def save(self, state: TrainState) -> str | None:
        """Saves `state` under its step, unless it is there already, and then prunes older ones.

        Returns why that failed, in a sentence that has been said already, or None; the run may go on. In the
        background None means that the save has begun: its outcome comes with the next `save` or `finish`. Raises what
        is no failure of a disk, such as the loss of another rank.
        """
        self.finish()
        step, path = state.step, self._path(state.step)
        if self._agreed(lambda: step in committed(self.folder)):
            self._failed = None
            return None
        values = state.state_dict()
        if self._thread is None:
            return self._concluded(step, self._write(values, path))
        copy = DefaultStager(StagingOptions(False, False, False, False)).stage(values)
        self._under_way = step, self._thread.submit(self._write, copy, path)  # type: ignore[arg-type]
        return None

    def finish(self) -> str | None:
        """Waits for a save in the background. Returns why the newest save failed, or None if it did not.

        The end of a run, or of this process before it is started again, is no success if this is not None: what came
        after the newest checkpoint is lost (exit code UNSAVED).
        """
        if self._under_way is not None:
            (step, future), self._under_way = self._under_way, None
            self._concluded(step, future.result())
        return self._failed

    def _write(self, values: dict[str, Any], path: Path) -> str | None:
        """Writes and commits, or removes what there is and returns the reason, the same on every rank."""
        try:
            dcp.save(values, storage_writer=Writer(path), process_group=self.world.storage)
        except CheckpointException as error:
            self._remove(path)
            dist.barrier(self.world.storage)  # it is gone before anyone tries again
            return reader.reason(error)
        self._prune()
        return None

    def _concluded(self, step: int, why: str | None) -> str | None:
        self._failed = None
        if why is not None:
            self._failed = f"the checkpoint of step {step} could not be saved: {why}"
            self._tell(f"{self._failed}; the newest is {self._newest()}")
        return self._failed

    def _newest(self) -> str:
        return f"that of step {max(found)}" if (found := committed(self.folder)) else "none"

    def _prune(self) -> None:
        for step, path in list(committed(self.folder).items())[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Torn first, so that an interrupted removal is not taken for a checkpoint."""
        if self.world.is_first:
            try:
                (path / COMMITTED).unlink(missing_ok=True)
            except OSError:  # a disk that cannot even remove: `path` stays, and is no worse than before
                return
            shutil.rmtree(path, ignore_errors=True)

    # ---- loading

    def load(self, state: TrainState, step: int) -> list[str]:
        """Fills `state` in place from the checkpoint of `step` or, if that is damaged, from the newest sound one
        before it: `state.step` tells. Damaged ones are then renamed to damaged_<step>, and it is said.

        Returns the keys of recipes' memories that it does not hold, or not in this shape, on any rank: they begin
        anew. Raises ValueError if no checkpoint is sound (then nothing is renamed), or if it does not fit the state.
        """
        self.finish()
        damaged: dict[int, str] = {}
        for tried in self._agreed(lambda: sorted((s for s in committed(self.folder) if s <= step), reverse=True)):
            why, found = self._examine(tried)
            if found is not None:
                missing = self._read(state, tried, found)
                self._set_aside(damaged, tried)
                return missing
            damaged[tried] = why
        listed = "; ".join(f"{self._path(s)}: {why}" for s, why in damaged.items()) or "there is none"
        raise ValueError(
            f"no checkpoint up to step {step} in {self.folder} is sound ({listed}): put back a copy of one, or choose "
            "another run.dir to begin anew"
        )

    def _examine(self, step: int) -> tuple[str, Metadata | None]:
        """What is wrong with a checkpoint, or its contents; the ranks share the reading and agree on the outcome.

        Raises ValueError if it asks for anything but data.
        """
        path, found, refused = self._path(step), None, ""
        why = damage(path, self.world.rank, self.world.size)
        try:
            found = reader.read_metadata(path)
        except reader.Refused as error:
            refused = f"the checkpoint {path} is refused: {error}"
        except (OSError, ValueError) as error:
            why = why or str(error)
        outcomes: list[tuple[str, str]] = [("", "")] * self.world.size
        dist.all_gather_object(outcomes, (why or "", refused), group=self.world.control)
        wrong = next((why for why, _ in outcomes if why), "")
        refused = next((refused for _, refused in outcomes if refused), "")
        if refused and not wrong:
            raise ValueError(refused)
        if not wrong and read_sums(path) is None:
            self._tell(f"the checkpoint {path} is of an older version without checksums: it is read unverified")
        return wrong, None if wrong else found

    def _read(self, state: TrainState, step: int, found: Metadata) -> list[str]:
        state.oscillation.reopen(step)
        wanted, held = state.state_dict(), found.state_dict_metadata
        transport = state.engine.transport
        own = f"comm/{transport.own}" if transport else ""  # of this rank alone; sizes are known once a step was made
        for key, tensor in held.items():
            if own and key.startswith(own) and isinstance(tensor, TensorStorageMetadata):
                wanted[key] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        missing = [
            k for k in wanted if k.startswith(OPTIONAL) and getattr(held.get(k), "size", None) != wanted[k].shape
        ]
        for key in missing:
            del wanted[key]
        reader.read(wanted, self._path(step), found, self.world.storage)
        state.load_state_dict(wanted)
        everywhere: list[list[str]] = [[]] * self.world.size
        dist.all_gather_object(everywhere, missing, group=self.world.control)
        return sorted({key for keys in everywhere for key in keys})

    def _set_aside(self, damaged: dict[int, str], loaded: int) -> None:
        """Renames damaged checkpoints so that their steps can be saved again; says so. ValueError if that fails."""
        for step, why in damaged.items():
            aside, failed = self._agreed(partial(_set_aside, self._path(step)))
            if failed:
                raise ValueError(f"the damaged checkpoint {self._path(step)} ({why}) cannot be renamed: {failed}")
            self._tell(
                f"the checkpoint of step {step} is damaged ({why}) and was renamed to {aside}: "
                f"the run goes on from step {loaded}"
            )

    # ---- among ranks

    def _agreed(self, find: Callable[[], T]) -> T:
        """What `find` finds on the first rank: two ranks may not see a shared disk alike."""
        found = [find() if self.world.is_first else None]
        dist.broadcast_object_list(found, src=0, group=self.world.control)
        return found[0]  # type: ignore[return-value]

    def _tell(self, sentence: str) -> None:
        if self.world.is_first:
            self._say(sentence)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _set_aside(path: Path) -> tuple[Path, str]:
    """Renames `path` to the first free damaged_<step>; returns the new name and why that failed, "" if it did not."""
    first = path.with_name(path.name.replace("step_", "damaged_"))
    aside = next(p for p in [first, *(Path(f"{first}_{i}") for i in range(2, 1000))] if not p.exists())
    try:
        os.rename(path, aside)
    except OSError as error:
        return aside, str(error.strerror)
    return aside, ""
