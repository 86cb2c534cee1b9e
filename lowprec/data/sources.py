"""Where documents come from: a source is a list of shards, and a shard a sequence of texts, readable from any one on.

That is all the rest of the package needs: a finite source is read once, front to back, into a token store; a streamed
one is read shard by shard in a random order, and its place is three integers (epoch, shard, document).

  stdlib    the .py files of Python's own library (or of one package of it), one document each. Left out:
            third-party packages, the test suites (half the bytes, mostly assertions, and absent from slim images:
            this way the corpus is the same there) and encodings/ (character tables). In Python 3.11 that is 608
            documents, 10.7 MB, 2.9 M tokens of bpe:4096; `exclude: []` brings everything: 1,761 documents, 31.5 MB,
            9.4 M tokens.
  text      one document a file, paragraph or line; a shard is a file
  jsonl, parquet, hub    through Hugging Face `datasets`; a shard is one of its shards (usually a file)
"""

import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from lowprec.data.config import SourceConfig, SourceKind, TextUnit

_STDLIB_EXCLUDE = ("test", "tests", "idle_test", "encodings")
_NEVER = {"site-packages", "dist-packages", "__pycache__"}
_SUFFIXES = {SourceKind.text: (".txt",), SourceKind.parquet: (".parquet",),
             SourceKind.jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz")}  # fmt: skip

Shards = list[Callable[[int], Iterator[str]]]  # each: first document -> texts from there on


@dataclass
class Documents:
    """Documents of one source; `open` lists its shards and is called as late as possible."""

    label: str  # for messages: data.sources[0] (text docs/)
    key: str  # of the cache: changes whenever a file is touched or moved
    content: str  # what a resumed stream must find again: like `key`, but blind to a file's folder and date
    about: dict[str, Any]  # goes into the fingerprint
    open: Callable[[], Shards]

    @cached_property
    def shards(self) -> Shards:
        return self.open()

    def read(self) -> Iterator[str]:
        """All non-empty texts in order."""
        for shard in self.shards:
            yield from filter(None, shard(0))


def open_source(config: SourceConfig, label: str) -> Documents:
    """The documents of a source of any kind but tokens. Raises ValueError if there is no such file or dataset."""
    kind = config.kind
    label = f"{label} ({kind.name}{' ' + config.path if config.path else ''})"
    about: dict[str, Any] = {"kind": kind.name}
    unit = config.unit
    if kind is SourceKind.stdlib:
        about |= {"python": platform.python_version()}
        files = stdlib_files(_STDLIB_EXCLUDE if config.exclude is None else config.exclude, config.path)
        about |= {"path": config.path} if config.path else {}
        unit = TextUnit.file
    elif kind is SourceKind.hub:
        about |= {"path": config.path, "name": config.name, "split": config.split, "revision": config.revision}
        folder = Path(str(config.path))
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    else:
        about |= {"path": config.path}
        files = find_files(config, label)
    shards: Callable[[], Shards]
    if kind in (SourceKind.stdlib, SourceKind.text):
        shards = lambda: [partial(_read_text, file, unit) for file in files]  # noqa: E731
    else:
        shards = partial(_dataset_shards, config, label, files)
    if config.limit is not None:
        about["limit"] = config.limit
        shards = partial(_limited, shards, config.limit)
    reading = [about, config.text_field, unit.name]
    stats = [(f, f.stat()) for f in files]
    key = digest([reading, [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f, s in stats]])
    content = digest(
        [{**about, "path": files == [] and config.path}, reading[1:], [(f.name, s.st_size) for f, s in stats]]
    )
    return Documents(label, key, content, about, shards)


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def stdlib_files(exclude: Iterable[str], package: str | None = None) -> list[Path]:
    """Sources of the running Python's library, or of one package of it ("asyncio"), sorted.

    Raises ValueError where they were not installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _walk(root, exclude) if f.suffix == ".py" and not f.name.startswith("_sysconfigdata")]
    if package and len(files) >= 100:
        files = [f for f in files if f.is_relative_to(root / package)]
        if not files:
            raise ValueError(
                f"the standard library has no package {package!r} with sources outside of {sorted(exclude)}: name a "
                "folder of it, for example asyncio, or leave the path out"
            )
    elif len(files) < 100:
        raise ValueError(
            f"this Python has no standard-library sources in {root} (a stripped or zipped installation): name your own "
            "text with data=local_text data.sources.0.path=FOLDER, or use a Python that has them"
        )
    return files


def _walk(root: Path, exclude: Iterable[str]) -> list[Path]:
    skip = _NEVER.union(exclude)
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skip]
        found += [Path(folder, name) for name in names]
    return sorted(found)


def find_files(config: SourceConfig, label: str) -> list[Path]:
    """Files of a path that is a file, a folder (searched for the kind's suffixes) or a glob pattern."""
    path, suffixes = Path(str(config.path)).expanduser(), _SUFFIXES[config.kind]
    if path.is_dir():
        files = [f for f in _walk(path, config.exclude or ()) if f.name.endswith(suffixes)]
        missing = f"no file in this folder ends in {' or '.join(suffixes)}; name other files by a glob pattern"
    else:
        excluded = set(config.exclude or ())
        matches = [path] if path.is_file() else [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        files = [f for f in matches if f.is_file() and not excluded & set(f.parts)]
        missing = f"no such file, folder or glob pattern (looked from {Path.cwd()})"
    if not files:
        raise ValueError(f"{label}: {missing}")
    return files


def _read_text(file: Path, unit: TextUnit, first: int) -> Iterator[str]:
    text = file.read_bytes().decode("utf-8", errors="replace")
    parts = {TextUnit.file: lambda: [text], TextUnit.line: text.splitlines,
             TextUnit.paragraph: lambda: re.split(r"\n(?:[ \t\r]*\n)+", text)}[unit]()  # fmt: skip
    return iter([part for part in parts if part.strip()][first:])


def _limited(shards: Callable[[], Shards], limit: int) -> Shards:
    """The first `limit` non-empty documents as one shard."""
    return [lambda first: islice((text for shard in shards() for text in shard(0) if text), first, limit)]


def _dataset_shards(config: SourceConfig, label: str, files: list[Path]) -> Shards:
    """Shards of a Hugging Face dataset: its own if it is streamed, a single one if it is map-style."""
    import datasets  # 1.4 s: only for those who need it

    if config.kind is SourceKind.hub:
        arguments: dict[str, Any] = {
            "path": config.path,
            "name": config.name,
            "split": config.split,
            "revision": config.revision,
        }
        streaming = config.streaming
    else:  # local files are read in place, without a copy in the library's own cache
        builder = "parquet" if config.kind is SourceKind.parquet else "json"
        arguments = {"path": builder, "data_files": [str(f) for f in files], "split": "train"}
        streaming = True
    try:
        dataset = datasets.load_dataset(**arguments, streaming=streaming)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(f"{label} cannot be opened: {_one_line(error)}") from error
    count = dataset.num_shards if streaming else 1

    def read(shard: int, first: int) -> Iterator[str]:
        # a new object each time: two iterators of one IterableDataset would share, and so disturb, their position
        part = dataset.shard(num_shards=count, index=shard) if streaming else dataset
        return _texts(part.skip(first), config.text_field, label)

    return [partial(read, shard) for shard in range(count)]


def _texts(rows: Iterable[dict[str, Any]], text_field: str, label: str) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{label} cannot be read: {_one_line(error)}") from error
        if text_field not in row:
            raise ValueError(f"{label} has no field {text_field!r}: set text_field to one of {', '.join(sorted(row))}")
        text = row[text_field]
        if not isinstance(text, str | None):
            raise ValueError(
                f"{label}: field {text_field!r} holds {type(text).__name__}, not text: set text_field to a text column"
            )
        yield (text or "").encode("utf-8", errors="replace").decode()  # lone surrogates of broken JSON escapes


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
