"""lowprec.data.store: what was written is read back, built once by many processes, and never seen half made."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lowprec.data import tokenizer as tok
from lowprec.data.store import NoDocumentsError, TokenStore, hash_text, held_out, write_store

BYTES = tok.byte_level()


@pytest.mark.parametrize("shard_tokens", [1, 500, 10**9])
def test_documents_come_back(shard_tokens: int, texts: list[str], tmp_path: Path) -> None:
    """Every document reads back from shards of any size, whole or in part, with its end token and its hash."""
    write_store(tmp_path / "s", texts, BYTES, {}, "s", shard_tokens)
    store = TokenStore(tmp_path / "s")
    assert [store.read(i).tolist() for i in range(60)] == [[*text.encode(), 256] for text in texts]
    assert store.read(3, 1, 2).tolist() == list(texts[3].encode()[1:3])
    assert store.hashes_D.tolist() == [hash_text(text) for text in texts]
    assert store.tokens == store.manifest["tokens"] == sum(len(t) + 1 for t in texts)
    assert len(store.manifest["shards"]) == {1: 60, 10**9: 1}.get(shard_tokens, len(store.manifest["shards"]))
    assert tok.load(str(tmp_path / "s")).hash == BYTES.hash


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    """Ids of a vocabulary over 65,536 need four bytes, and survive."""
    backend = tok.byte_level().backend
    backend.add_tokens([f"w{i:05d}" for i in range(66_000)])
    write_store(tmp_path / "s", ["w65999"], tok.Tokenizer(backend, "big"), {}, "s")
    store = TokenStore(tmp_path / "s")
    assert store.manifest["dtype"] == "<u4" and store.read(0).tolist() == [257 + 65_999, 256]


def test_the_split_is_a_fraction_and_a_function_of_the_text() -> None:
    """Hashes are uniform (3 sigma of a binomial), fixed for ever, and a larger fraction contains a smaller one."""
    hashes = np.array([hash_text(str(i)) for i in range(20_000)], dtype=np.uint64)
    few, more = held_out(hashes, 0.01), held_out(hashes, 0.1)
    assert abs(more.sum() - 2000) < 3 * (20_000 * 0.1 * 0.9) ** 0.5
    assert few.sum() > 0 and not (few & ~more).any() and not held_out(hashes, 0.0).any()
    assert hash_text("lowprec") == 321067254966841050


def test_an_empty_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    """Zero documents are an error, and a failed build leaves no folder, whole or temporary."""
    with pytest.raises(NoDocumentsError, match="holds no document with text"):
        write_store(tmp_path / "s", [], BYTES, {}, "s")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """No manifest, another format, and a truncated token file are each told."""
    with pytest.raises(ValueError, match=r"holds no manifest.json: give a folder written by lowprec-prepare"):
        TokenStore(tmp_path)
    write_store(tmp_path / "s", ["some text"], BYTES, {}, "s")
    tokens = tmp_path / "s" / "tokens_00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"do not have the sizes of manifest.json"):
        TokenStore(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"is of format 'other', not lowprec-tokens-1"):
        TokenStore(tmp_path / "s")


_BUILDER = """
import sys, time
from pathlib import Path
from lowprec.data.store import build_once
path, log = Path(sys.argv[1]), open(sys.argv[2], "a")
with build_once(path) as missing:
    if missing:
        Path(str(path) + ".tmp1").mkdir()
        log.write("built\\n"); log.flush()
        time.sleep(float(sys.argv[3]))
        Path(str(path) + ".tmp1").rename(path)
assert path.exists()
"""


def test_one_of_many_processes_builds_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    """A builder killed with SIGKILL blocks nobody; of two that then come at once, exactly one builds."""

    def start(seconds: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _BUILDER, str(tmp_path / "c" / "x"), str(log), str(seconds)])

    log = tmp_path / "log"
    killed = start(60)
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    processes = [start(0.3) for _ in range(2)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    assert log.read_text() == "built\n" * 2
