"""Integrity: every byte of a checkpoint has a checksum, and the checkpoint counts only when all are on the disk.

    step_00000050/  __0_0.distcp  __1_0.distcp ...     data, one file a rank (torch's distributed checkpoint, DCP)
                    checksums.json                     {"files": {name: {"bytes": size, "crc32": "8 hex digits"}}}
                    .metadata                          which tensor lies where; its presence is the commit

Every rank sums its own file while it writes it, so nothing is read back and what is summed is what was meant to be
written, not what the disk made of it. The first rank gathers the sums, adds that of `.metadata`, and then:

    data, fsync  ->  checksums.json, fsync  ->  .metadata.tmp, fsync  ->  fsync of the folder and the one it is in
                 ->  rename to .metadata  ->  fsync of the folder

A process or a machine that dies anywhere in this leaves a folder without `.metadata`, which is never read.

The sum is the CRC-32 of zlib (ISO 3309). It finds every flipped bit and every burst of up to 32 bits for certain and
misses other damage once in 2^32; it takes a quarter of the time of BLAKE2b, each rank sums its own data, and zlib lets
go of the GIL, so a save in the background does not hold training up. It guards against accidents and is no signature:
who can change the data can change the sum, and a cryptographic hash that lies beside the data would be no better. What
a checkpoint may *do* when it is read is the business of :mod:`lowprec.train.reader`.
"""

import io
import json
import os
import pickle
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

COMMITTED = ".metadata"
MANIFEST = "checksums.json"
FORMAT = "lowprec-checksums-1"
_CHUNK_BYTES = 1 << 22

Sums = dict[str, dict[str, Any]]  # {file name: {"bytes": int, "crc32": str}}


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first thing that is wrong with the files of a committed checkpoint, as a sentence without a subject; or None.

    part, parts: of so many processes that share the work this is the part-th; each looks at every parts-th file, the
    sizes of all before the content of any. Of a checkpoint without checksums (of an older version) nothing is known.
    """
    try:
        sums = read_sums(folder)
        if sums is None:
            return None
        mine = sorted(sums, key=lambda name: (-sums[name]["bytes"], name))[part::parts]
        for name in mine:
            if not (folder / name).is_file():
                return f"{name} is missing"
            size_bytes, wanted_bytes = (folder / name).stat().st_size, sums[name]["bytes"]
            if size_bytes != wanted_bytes:
                what = "cut short" if size_bytes < wanted_bytes else "too long"
                return f"{name} is {what}: {size_bytes} bytes instead of {wanted_bytes}"
        for name in mine:
            found = checksum(folder / name)
            if found != sums[name]["crc32"]:
                return f"{name} has changed: its checksum is {found} instead of {sums[name]['crc32']}"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def read_sums(folder: Path) -> Sums | None:
    """The checksums of a checkpoint's files by name, or None if it was saved without. Raises ValueError if damaged."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        sums: Sums = content["files"]
        sound = content["format"] == FORMAT and COMMITTED in sums
        sound &= all(
            is_plain(name) and isinstance(s["bytes"], int) and len(s["crc32"]) == 8 for name, s in sums.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{MANIFEST} is damaged")
    return sums


def is_plain(name: str) -> bool:
    """Whether `name` can only mean a file inside the folder."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def checksum(file: Path) -> str:
    """CRC-32 of a file's content, 8 hex digits."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk: a file that is synchronised may still lose its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Summed(io.BufferedWriter):
    """A file that sums what is written to it, one after another (DCP never seeks).

    torch.save calls `write` from C++, which turns a full disk into "unexpected pos 704 vs 598". So the error is kept
    here, and the file raises it where it is flushed, which DCP does after every entry.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.crc, self.size_bytes = 0, 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                super().write(view)
            except OSError as error:
                self._error = error
        self.crc = zlib.crc32(view, self.crc)
        self.size_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        if self._error is not None:
            raise self._error
        super().flush()


class SummedFiles(FileSystem):
    """The file system that a writer sees: `sums` holds what was written through it."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[IO[bytes], None, None]:  # type: ignore[override]
        """Opens `path` for writing. Raises OSError, naming the file, if its content cannot be written."""
        path = Path(path)
        try:
            with Summed(path) as stream:
                yield stream
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        self.sums[path.name] = {"bytes": stream.size_bytes, "crc32": f"{stream.crc:08x}"}


class Writer(FileSystemWriter):
    """DCP's writer, with checksums, and with a commit that survives a power cut. One object writes one checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self.fs = self._files = SummedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Writes this rank's file. The result, which DCP carries to the first rank, has the sums beside the places."""
        written: Future[Any] = Future()
        written.set_result((super().write_data(plan, planner).value(), self._files.sums))
        return written

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """Commits; the first rank alone does this, when all have written."""
        folder, sums = Path(self.path), {name: entry for _, sums in results for name, entry in sums.items()}
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {w.index: w.storage_data for written, _ in results for w in written}
        metadata.storage_meta = StorageMeta(save_id=self.save_id)
        index = pickle.dumps(metadata)
        sums[COMMITTED] = {"bytes": len(index), "crc32": f"{zlib.crc32(index):08x}"}
        manifest = json.dumps({"format": FORMAT, "files": sums}, indent=1, sort_keys=True) + "\n"
        self._put(folder / MANIFEST, manifest.encode())
        self._put(folder / f"{COMMITTED}.tmp", index)
        sync_folder(folder)
        sync_folder(folder.parent)
        os.rename(folder / f"{COMMITTED}.tmp", folder / COMMITTED)
        sync_folder(folder)

    def _put(self, path: Path, content: bytes) -> None:
        with self.fs.create_stream(path, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
