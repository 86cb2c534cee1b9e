"""Reading checkpoints as data: nothing in a checkpoint can run.

torch's distributed checkpoint (DCP) reads `.metadata` with `pickle.load` and entries that are no tensors with
`torch.load(weights_only=False)`. Both run whatever code the file asks for. Here

- `.metadata` goes through an unpickler that knows the dozen classes it is made of and refuses every other name;
- entries, tensors or not, are read with `weights_only=True`: numbers, text, lists, dicts, tensors;
- a place in `.metadata` must be a file of the checkpoint's own folder.

All reading of checkpoints in lowprec goes through `read` and `read_metadata`; a test looks for other ways in. Whether
the bytes are those that were saved is the business of :mod:`lowprec.train.integrity`.
"""

import io
import pathlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from lowprec.train.integrity import COMMITTED, damage, is_plain


def _allowed() -> dict[tuple[str, str], Any]:
    """All that `.metadata` is made of: {(module, name): what it means}."""
    classes = [metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties,
               metadata.ChunkStorageMetadata, metadata.BytesStorageMetadata, metadata.MetadataIndex,
               metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo]  # fmt: skip
    found: dict[tuple[str, str], Any] = {(c.__module__, c.__name__): c for c in classes}
    found |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    found[("torch", "Size")] = torch.Size
    found[("torch.serialization", "_get_layout")] = torch.serialization._get_layout
    # DCP notes where it wrote; Python moved the class between versions
    return found | {(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")}


ALLOWED = _allowed()


class Refused(ValueError):
    """A file asks for something that a checkpoint has no business with."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise Refused(f"it asks for {module}.{name}, which no checkpoint is made of: do not trust where it is from")
        return ALLOWED[module, name]


def read_metadata(folder: Path) -> Metadata:
    """Which tensors a checkpoint holds and where; no code runs.

    Raises:
        Refused: if it names a class that does not belong there, or a file outside the folder.
        ValueError: if it is damaged; the sentence lacks its subject, as in `integrity.damage`.
        OSError: if it cannot be read.
    """
    try:
        found = _Unpickler(io.BytesIO((folder / COMMITTED).read_bytes())).load()
        sound = isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict)
        ends_bytes: dict[str, int] = {}  # of the last entry in each file
        for place in found.storage_data.values():
            ends_bytes[place.relative_path] = max(ends_bytes.get(place.relative_path, 0), place.offset + place.length)
    except (Refused, OSError):
        raise
    except Exception:  # whatever a damaged pickle runs into
        sound = False
    if not sound:
        raise ValueError(f"{COMMITTED} is damaged")
    for name, end_bytes in ends_bytes.items():
        if not is_plain(name):
            raise Refused(f"it asks for the file {name!r}, which is not in its folder: do not trust where it is from")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if (size_bytes := (folder / name).stat().st_size) < end_bytes:
            raise ValueError(f"{name} is cut short: {size_bytes} bytes instead of at least {end_bytes}")
    if found.storage_meta is None:
        found.storage_meta = metadata.StorageMeta()
    return found


def open_index(folder: Path) -> Metadata:
    """`read_metadata` after a look at every checksum, for one process. Raises ValueError if anything is wrong."""
    try:
        why = damage(folder)
        if why is None:
            return read_metadata(folder)
    except Refused as error:
        raise ValueError(f"the checkpoint {folder} is refused: {error}") from None
    except (OSError, ValueError) as error:
        why = str(error)
    raise ValueError(f"the checkpoint {folder} is damaged: {why}")


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, found: Metadata) -> None:
        super().__init__(folder)
        self._found = found

    def read_metadata(self) -> Metadata:  # without its **kwargs DCP looks for no other file
        return self._found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            entry = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(f"{key} is not plain data: {_unplain(error)}") from None
        set_element(self.original_state_dict, self.mappings[key], entry)


def read(
    wanted: dict[str, Any], folder: Path, found: Metadata | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Fills `wanted` (nested, as in a TrainState; tensors in place) from a checkpoint; what else it holds is ignored.

    found: from `read_metadata`. group: a collective of these processes, of which each asks for keys of its own; None =
    this process alone. Raises ValueError, on all of them and with the same sentence, if that cannot be done.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant to be
            reader = _Reader(folder, found or read_metadata(folder))
            dcp.load(wanted, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise ValueError(f"the checkpoint {folder} cannot be read: {reason(error)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {folder} cannot be read: {error}") from error


def reason(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in a few words."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError) and cause.strerror:
        name = f" ({Path(cause.filename).name})" if cause.filename else ""
        return f"rank {rank}: {cause.strerror}{name}"
    if isinstance(cause, pickle.UnpicklingError):
        return f"rank {rank}: {_unplain(cause)}"
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"rank {rank}: {lines[0]}" if len(error.failures) < 2 else f"{len(error.failures)} ranks: {lines[0]}"


def _unplain(error: pickle.UnpicklingError) -> str:
    """What `weights_only` did not like, without torch's advice to switch it off."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {asked[1]}: do not trust where it is from" if asked else "it is damaged"
