"""Token store: tokenised documents in a folder, read by memory map.

    manifest.json            vocabulary, dtype, counts, fingerprint, what it was made from, the list of shards
    tokenizer.json           the tokenizer that made it
    tokens_00000.bin         ids of shard 0, document after document: little-endian uint16, uint32 if they do not fit
    lengths_00000.npy        int64 tokens of each document with its end-of-document token; no document crosses shards
    hashes_00000.npy         uint64 hash of each document's text: decides whether it is held out, wherever it turns up

A store is written into a temporary folder and renamed when complete, so whoever sees it sees all of it. Concurrent
processes that need the same store meet at a file lock: the first builds, the others wait and open it; a dead builder's
lock frees itself.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lowprec.data.tokenizer import Tokenizer

FORMAT = "lowprec-tokens-1"
_BATCH_DOCUMENTS = 256  # texts encoded at a time
SHARD_TOKENS = 100_000_000


def hash_text(text: str) -> int:
    """64 bits that depend on the text alone: equal documents are held out together, in every source and every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def held_out(hashes_D: np.ndarray, validation_frac: float) -> np.ndarray:
    """Which documents belong to validation: a bool per uint64 hash."""
    return hashes_D < np.uint64(int(validation_frac * 2**64))


class NoDocumentsError(ValueError):
    pass


class TokenStore:
    """Random access to the documents of a store. Raises ValueError if the folder is none, or is damaged."""

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{folder} holds no manifest.json: give a folder written by lowprec-prepare")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{manifest} is of format {self.manifest.get('format')!r}, not {FORMAT}: prepare it again")
        self.folder = folder
        shards = range(len(self.manifest["shards"]))
        self._shards = [
            np.memmap(folder / f"tokens_{i:05d}.bin", dtype=self.manifest["dtype"], mode="r") for i in shards
        ]
        self.lengths_D = np.concatenate([np.load(folder / f"lengths_{i:05d}.npy") for i in shards])
        self.hashes_D = np.concatenate([np.load(folder / f"hashes_{i:05d}.npy") for i in shards])
        if [len(s) for s in self._shards] != [s["tokens"] for s in self.manifest["shards"]]:
            raise ValueError(
                f"{folder}: the token files do not have the sizes of manifest.json: copy or prepare the folder again"
            )
        documents = [s["documents"] for s in self.manifest["shards"]]
        self._shard_D = np.repeat(np.arange(len(shards)), documents)
        shard_start = np.cumsum([0, *(len(s) for s in self._shards)])
        self._start_D = np.cumsum(self.lengths_D) - self.lengths_D - shard_start[self._shard_D]

    @property
    def tokens(self) -> int:
        return int(self.lengths_D.sum())

    def read(self, document: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Ids `first` .. `first + count` of a document (a view of the file): fewer where the document ends."""
        length = int(self.lengths_D[document])
        stop = length if count is None else min(length, first + count)
        start = self._start_D[document]
        return self._shards[self._shard_D[document]][start + first : start + stop]


def write_store(
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    about: dict[str, Any],
    label: str,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenise `texts` into the new `folder`, which appears when complete. Raises NoDocumentsError if there is none."""
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        identity = hashlib.blake2b(tokenizer.hash.encode(), digest_size=8)
        shards: list[dict[str, int]] = []
        text_bytes, encoded = 0, _encoded(texts, tokenizer)
        while (first := next(encoded, None)) is not None:
            lengths, hashes, sizes = _write_shard(temporary, len(shards), dtype, chain([first], encoded), shard_tokens)
            identity.update(hashes.astype("<u8").tobytes())
            text_bytes += sizes
            shards.append({"documents": len(lengths), "tokens": int(lengths.sum())})
        if not shards:
            raise NoDocumentsError(f"{label} holds no document with text: check the path and the text field")
        tokenizer.save(temporary / "tokenizer.json")
        manifest = {
            "format": FORMAT, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "eos_token": tokenizer.eos_token,
            "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}, "fingerprint": identity.hexdigest(),
            "source": about, "documents": sum(s["documents"] for s in shards),
            "tokens": sum(s["tokens"] for s in shards), "text_bytes": text_bytes, "shards": shards,
        }  # fmt: skip
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shard(
    folder: Path, shard: int, dtype: str, encoded: Iterable[tuple[np.ndarray, int, int]], tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Write documents until the shard holds `tokens`: their lengths, their hashes, and their bytes of text in all."""
    lengths: list[int] = []
    hashes: list[int] = []
    total, text_bytes = 0, 0
    with open(folder / f"tokens_{shard:05d}.bin", "wb") as file:
        for ids, text_hash, size in encoded:
            ids.astype(dtype).tofile(file)
            lengths.append(len(ids))
            hashes.append(text_hash)
            total, text_bytes = total + len(ids), text_bytes + size
            if total >= tokens:
                break
    lengths_D, hashes_D = np.array(lengths, dtype=np.int64), np.array(hashes, dtype=np.uint64)
    np.save(folder / f"lengths_{shard:05d}.npy", lengths_D)
    np.save(folder / f"hashes_{shard:05d}.npy", hashes_D)
    return lengths_D, hashes_D, text_bytes


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int, int]]:
    """(ids, hash, bytes) of each text."""
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH_DOCUMENTS)):
        for text, ids in zip(batch, tokenizer.encode_documents(batch)):
            yield ids, hash_text(text), len(text.encode())


def cache_folder(cache_dir: str | None) -> Path:
    """Where stores and trained tokenizers are kept between runs."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec"


@contextmanager
def build_once(path: Path) -> Iterator[bool]:
    """True to the one process that has to make `path`; False, after waiting for it, to all others."""
    if path.exists():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        missing = not path.exists()
        if missing:
            for left_over in path.parent.glob(f"{path.name}.tmp*"):
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        yield missing
