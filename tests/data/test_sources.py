"""lowprec.data.sources: the same documents from every kind of file, map-style or streamed, without a network."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lowprec.data import SourceConfig, SourceKind, TextUnit
from lowprec.data.sources import open_source, stdlib_files


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> dict[str, str]:
    """The documents as JSON Lines and as Parquet, in two files each: {kind: glob pattern}."""
    for part, half in enumerate((texts[:25], texts[25:])):
        lines = [json.dumps({"body": text, "id": i}) for i, text in enumerate(half)]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(lines))
        datasets.Dataset.from_dict({"body": half, "id": list(range(len(half)))}).to_parquet(
            str(tmp_path / f"part{part}.parquet")
        )
    return {"jsonl": str(tmp_path / "*.jsonl"), "parquet": str(tmp_path / "*.parquet")}


@pytest.fixture
def hub(tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one dataset, someone/corpus: what was asked of it."""
    load: Callable[..., Any] = datasets.load_dataset
    asked: list[dict[str, Any]] = []

    def stub(path: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append({"path": path, "name": name, "split": split, "revision": revision, "streaming": streaming})
        if path != "someone/corpus":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        data = {"train": files["parquet"]}
        return load("parquet", data_files=data, split=split, streaming=streaming, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", stub)
    return asked


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_give_their_documents(
    kind: str, streaming: bool, files: dict[str, str], texts: list[str], folder: Path
) -> None:
    """JSON Lines and Parquet, streamed or not, hold the documents of the text files, in order."""
    source = SourceConfig(kind=SourceKind[kind], path=files[kind], text_field="body", streaming=streaming)
    documents = open_source(source, "s")
    as_text = open_source(SourceConfig(kind=SourceKind.text, path=str(folder)), "s")
    assert list(documents.read()) == list(as_text.read()) == texts
    assert len(documents.shards) == 2
    assert list(documents.shards[1](7)) == texts[25 + 7 :]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_is_passed_on(streaming: bool, hub: list[dict[str, Any]], texts: list[str]) -> None:
    """Name, configuration, split and revision reach `datasets`; map-style and streamed give the same documents."""
    source = SourceConfig(kind=SourceKind.hub, path="someone/corpus", name="small", split="train", revision="abc")
    source.text_field, source.streaming = "body", streaming
    assert list(open_source(source, "s").read()) == texts
    asked = {"path": "someone/corpus", "name": "small", "split": "train", "revision": "abc", "streaming": streaming}
    assert hub == [asked]


def test_a_hub_name_that_does_not_exist_is_one_sentence(hub: list[dict[str, Any]]) -> None:
    """The library's exception becomes one line that names the source."""
    source = SourceConfig(kind=SourceKind.hub, path="someone/else")
    with pytest.raises(ValueError, match=r"data\.sources\[3\] \(hub someone/else\) cannot be opened: .*doesn't exist"):
        list(open_source(source, "data.sources[3]").read())


def test_a_dataset_folder_is_read_by_the_hub_kind(
    files: dict[str, str], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder laid out as a dataset loads without a network, by the real `load_dataset`."""
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **k: load(path, cache_dir=str(tmp_path / "hf"), **k))
    data = tmp_path / "corpus"
    data.mkdir()
    for part in (0, 1):
        (tmp_path / f"part{part}.parquet").rename(data / f"train-{part}.parquet")
    source = SourceConfig(kind=SourceKind.hub, path=str(data), text_field="body", streaming=True)
    assert list(open_source(source, "s").read()) == texts


@pytest.mark.parametrize(
    ("unit", "documents"),
    [("file", ["a\nb\n\nc\n \n\nd\n"]), ("paragraph", ["a\nb", "c", "d\n"]), ("line", ["a", "b", "c", "d"])],
)
def test_units_of_text(unit: str, documents: list[str], tmp_path: Path) -> None:
    """A text file is one document, or one per paragraph, or one per line; blank ones are dropped."""
    (tmp_path / "x.txt").write_text("a\nb\n\nc\n \n\nd\n")
    source = SourceConfig(kind=SourceKind.text, path=str(tmp_path), unit=TextUnit[unit])
    assert list(open_source(source, "s").read()) == documents


def test_limit_and_exclude(folder: Path, texts: list[str]) -> None:
    """`limit` takes the first documents, `exclude` leaves folders out, and both change the cache key."""
    (folder / "drafts").mkdir()
    (folder / "drafts" / "x.txt").write_text("a draft")
    everything = open_source(SourceConfig(kind=SourceKind.text, path=str(folder)), "s")
    some = open_source(SourceConfig(kind=SourceKind.text, path=str(folder), limit=7), "s")
    clean = open_source(SourceConfig(kind=SourceKind.text, path=str(folder), exclude=["drafts"]), "s")
    assert sorted(everything.read()) == sorted([*texts, "a draft"])
    assert list(some.read()) == texts[:7] and list(some.shards[0](5)) == texts[5:7]
    assert list(clean.read()) == texts
    assert len({everything.key, some.key, clean.key}) == 3


def test_moved_files_are_the_same_content(folder: Path, tmp_path: Path) -> None:
    """A moved folder is another cache entry but the same data to a resumed run; a changed file is other data."""
    before = open_source(SourceConfig(kind=SourceKind.text, path=str(folder)), "s")
    moved = folder.rename(tmp_path / "moved")
    after = open_source(SourceConfig(kind=SourceKind.text, path=str(moved)), "s")
    assert before.key != after.key and before.content == after.content
    (moved / "000.txt").write_text("changed")
    assert open_source(SourceConfig(kind=SourceKind.text, path=str(moved)), "s").content != after.content


def test_stdlib_leaves_out_what_is_not_its_own() -> None:
    """Hundreds of library modules; no installed packages, tests or character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f.relative_to(root) for f in stdlib_files(["test", "tests", "idle_test", "encodings"])]
    assert len(files) > 400 and Path("argparse.py") in files and Path("json/decoder.py") in files
    assert not {"site-packages", "dist-packages", "test", "tests", "encodings"} & {
        p for f in files for p in f.parts[:-1]
    }


def test_one_package_of_the_stdlib() -> None:
    """`path` names a package of the library, and one that it does not have is a sentence."""
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files([], "asyncio")
    assert root / "asyncio" / "events.py" in files and {f.parent for f in files} == {root / "asyncio"}
    with pytest.raises(ValueError, match="no package 'asincio'"):
        stdlib_files([], "asincio")


def test_stdlib_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that was installed without its sources gets one sentence with the way out."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no standard-library sources in .* data=local_text"):
        open_source(SourceConfig(), "s")


@pytest.mark.parametrize(
    ("rows", "field", "message"),
    [
        ([{"body": "x", "id": 1}], "text", r"s \(jsonl .*\) has no field 'text': set text_field to one of body, id$"),
        ([{"text": ["x"]}], "text", r"field 'text' holds list, not text: set text_field to a text column"),
        (["not json"], "text", r"s \(jsonl .*\) cannot be read: "),
    ],
)
def test_wrong_rows(rows: list[Any], field: str, message: str, tmp_path: Path) -> None:
    """A missing field lists those present; a field of another type and a broken file are named."""
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    with pytest.raises(ValueError, match=message):
        list(open_source(SourceConfig(kind=SourceKind.jsonl, path=str(file), text_field=field), "s").read())


def test_missing_paths(tmp_path: Path) -> None:
    """A path that matches nothing, and a folder without files of the kind, say what was looked for."""
    with pytest.raises(ValueError, match=r"s \(text nope/\*\): no such file, folder or glob pattern \(looked from /"):
        open_source(SourceConfig(kind=SourceKind.text, path="nope/*"), "s")
    with pytest.raises(ValueError, match=r"no file in this folder ends in \.parquet; name other files by a glob"):
        open_source(SourceConfig(kind=SourceKind.parquet, path=str(tmp_path)), "s")
