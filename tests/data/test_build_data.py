"""lowprec.data.build_data: split, validation, cache, fingerprint, and one sentence for every mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lowprec.data import DataConfig, SourceConfig, SourceKind, build, build_data
from lowprec.data import tokenizer as tok
from lowprec.data.store import TokenStore, hash_text, held_out, write_store

RECIPES = Path(__file__).parents[2] / "recipes" / "data"


def test_validation_is_held_out_by_document(config: DataConfig, texts: list[str]) -> None:
    """Training documents and validation documents are disjoint and together all; copies of one text stay together."""
    data = build_data(config)
    source = data.train.sources[0]
    assert source.store is not None and source.documents is not None
    trained = {source.store.hashes_D[d] for d in source.documents}
    held = {hash_text(t) for t in texts} - trained
    assert 0 < len(held) < 20 and all(held_out(source.store.hashes_D[[0]] * 0 + h, 0.1) for h in held)  # type: ignore[arg-type]
    tokens = [t for b in data.validation for t in b.tokens.flatten().tolist()]
    expected = [t for text in sorted(texts, key=hash_text) if hash_text(text) in held for t in [*text.encode(), 256]]
    assert tokens == expected[: len(tokens)] and len(tokens) > len(expected) - 33


def test_validation_does_not_depend_on_the_seed_or_the_way_of_reading(config: DataConfig) -> None:
    """Two seeds, and the streamed source with the same held-out texts, validate on the same documents."""
    one, two = build_data(config, 0), build_data(config, 1)
    config.sources[0].streaming = True
    streamed = build_data(config)
    tokens = [[b.tokens.tolist() for b in d.validation] for d in (one, two, streamed)]
    assert tokens[0] == tokens[1] == tokens[2] and tokens[0]


def test_stdlib_corpus_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline default: millions of tokens of this Python, and a second start that trains and tokenises nothing."""
    config = DataConfig(cache_dir=str(tmp_path), validation_frac=0.02)
    first = build_data(config)
    source = first.fingerprint["sources"][0]
    assert source["tokens"] > 1_000_000 and source["documents"] > 400 and source["kind"] == "stdlib"
    assert source["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first.vocab_size == first.tokenizer.vocab_size == 4096
    assert 3 < source["text_bytes"] / source["tokens"] < 5
    assert len(first.validation) == 8 and first.validation[0].tokens.shape == (8, 256)
    assert json.loads(json.dumps(first.fingerprint)) == first.fingerprint

    def refuse(*_: Any) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(build, "write_store", refuse)
    monkeypatch.setattr(tok, "train_bpe", refuse)
    assert build_data(config).fingerprint == first.fingerprint


def test_two_processes_build_the_same_cache_at_once(config: DataConfig) -> None:
    """Started together on an empty cache, both finish, agree, and leave one tokenizer and one store."""
    source = config.sources[0]
    script = (
        "import json; from lowprec.data import *; "
        f"c = DataConfig(sources=[SourceConfig(kind=SourceKind.text, path={source.path!r})], tokenizer='bpe:300', "
        f"seq_len=32, validation_frac=0.1, cache_dir={config.cache_dir!r}); "
        "print(json.dumps(build_data(c).fingerprint))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert outputs[0] == outputs[1] and json.loads(outputs[0])["sources"][0]["documents"] == 60
    made = [p for p in Path(str(config.cache_dir)).glob("*/*") if p.suffix != ".lock"]
    assert sorted(p.parent.name for p in made) == ["tokenizers", "tokens"]


def test_a_changed_file_is_tokenised_again(config: DataConfig, folder: Path) -> None:
    """The cache notices a changed file; an unchanged corpus elsewhere has the same fingerprint."""
    before = build_data(config).fingerprint["sources"][0]["hash"]
    moved = folder.rename(folder.with_name("moved"))
    config.sources[0].path = str(moved)
    assert build_data(config).fingerprint["sources"][0]["hash"] == before
    (moved / "001.txt").write_text("changed")
    assert build_data(config).fingerprint["sources"][0]["hash"] != before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_way_of_reading_gives_the_same_tokens(
    kind: str, streaming: bool, config: DataConfig, texts: list[str], tmp_path: Path
) -> None:
    """Unshuffled, JSON Lines and Parquet, cached or streamed, make the training sequences of the text files."""
    config.shuffle = False
    expected = _first_tokens(config)
    getattr(datasets.Dataset.from_dict({"text": texts}), {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(
        str(tmp_path / f"x.{kind}")
    )
    config.sources = [SourceConfig(kind=SourceKind[kind], path=str(tmp_path / f"x.{kind}"), streaming=streaming)]
    assert _first_tokens(config) == expected


def _first_tokens(config: DataConfig) -> list[list[int]]:
    reader = build_data(config).train.reader(0, config.seq_len, seed=0)
    return [ids.tolist() for ids, _ in reader.read(0, [True] * 100)[0]]


def test_prepared_tokens_bring_their_tokenizer(config: DataConfig, texts: list[str], tmp_path: Path) -> None:
    """A source of kind tokens needs no tokenizer setting, gives the same data, and refuses a different tokenizer."""
    bpe = tok.train_bpe(texts, 300)
    write_store(tmp_path / "t", texts, bpe, {"kind": "text"}, "s")
    expected = _first_tokens(config)
    write_store(tmp_path / "b", texts, tok.byte_level(), {"kind": "text"}, "s")
    config.sources = [SourceConfig(kind=SourceKind.tokens, path=str(tmp_path / "b"))]
    config.tokenizer = None
    assert build_data(config).tokenizer.hash == tok.byte_level().hash and _first_tokens(config) == expected
    config.sources.append(SourceConfig(kind=SourceKind.tokens, path=str(tmp_path / "t")))
    with pytest.raises(
        ValueError, match=r"/t was prepared with the tokenizer bpe:300 .* but this run uses tokenizer.json"
    ):
        build_data(config)
    config.sources, config.tokenizer = config.sources[:1], "bpe:300"
    with pytest.raises(ValueError, match=r"bpe:300 needs text to be trained on, but all sources are prepared tokens"):
        build_data(config)


def test_going_without_validation(config: DataConfig) -> None:
    """validation_frac=0 trains on everything; validation_sequences=0 still holds documents out but reads none."""
    config.validation_frac = 0.0
    everything = build_data(config)
    assert everything.validation == [] and len(everything.train.sources[0].documents) == 60  # type: ignore[arg-type]
    config.validation_frac, config.validation_sequences = 0.1, 0
    some = build_data(config)
    assert some.validation == [] and len(some.train.sources[0].documents) < 60  # type: ignore[arg-type]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sources": []}, r"data\.sources is empty: list at least one source"),
    ({"weight": 0.0}, r"data\.sources\[0\]\.weight=0\.0 must be positive: remove the source"),
    ({"weight": float("nan")}, r"weight=nan must be positive"),
    ({"path": None}, r"data\.sources\[0\] of kind text needs a path: a text file, a folder"),
    ({"path": "nope"}, r"data\.sources\[0\] \(text nope\): no such file, folder or glob pattern"),
    ({"limit": 0}, r"data\.sources\[0\]\.limit=0 must be at least 1 document"),
    ({"kind": SourceKind.tokens}, r"holds no manifest\.json: give a folder written by lowprec-prepare"),
    ({"kind": SourceKind.tokens, "streaming": True}, r"read by memory map, so streaming must be false"),
    ({"validation_frac": 1.0}, r"data\.validation_frac=1\.0 must lie in \[0, 1\): it is a fraction"),
    ({"validation_frac": 1e-9}, r"no validation sequence: the 0 held-out documents .* raise data\.validation_frac"),
    ({"seq_len": 0}, r"data\.seq_len=0 must be at least 1"),
    ({"validation_batch": 0}, r"data\.validation_batch=0 must be at least 1"),
    (
        {"seq_len": 100_000, "validation_sequences": 0},
        r"\d+ training tokens in \d+ documents, fewer than one sequence of data\.seq_len=100000 \+ 1: lower data\.seq",
    ),
    ({"tokenizer": "nope.json"}, r"data\.tokenizer=nope\.json: no such file; give a tokenizer\.json, 'bpe:4096'"),
    ({"tokenizer": "bpe:12"}, r"data\.tokenizer=bpe:12: write the size after a colon, at least 257"),
    ({"tokenizer": "bpe"}, r"data\.tokenizer=bpe: write the size after a colon"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_each_mistake_is_one_sentence(change: dict[str, Any], message: str, config: DataConfig) -> None:
    """What is wrong, where, and what to do."""
    for key, value in change.items():
        setattr(config if hasattr(config, key) else config.sources[0], key, value)
    with pytest.raises(ValueError, match=message) as caught:
        build_data(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_without_text_is_refused(streaming: bool, config: DataConfig, tmp_path: Path) -> None:
    """Empty files are no documents, and zero documents no corpus."""
    (tmp_path / "empty.txt").write_text("\n \n")
    config.sources = [SourceConfig(kind=SourceKind.text, path=str(tmp_path / "empty.txt"), streaming=streaming)]
    with pytest.raises(
        ValueError, match=r"empty\.txt\) holds no document with text: check the path and the text field"
    ):
        build_data(config)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_data_recipe_composes(file: Path) -> None:
    """Each file of recipes/data fits the dataclass, passes the checks once its path is given, explains every key."""
    node = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(file))
    config = OmegaConf.to_object(node)
    assert isinstance(config, DataConfig)
    for source in config.sources:
        source.path = source.path or "given on the command line"
    config.check()
    top_level = [line for line in file.read_text().splitlines() if line and line[0] not in " #" and line != "sources:"]
    assert all("  # " in line for line in top_level), [line for line in top_level if "  # " not in line]


def test_a_source_is_set_on_the_command_line(tmp_path: Path) -> None:
    """data.sources.0.path=X and a whole list of sources both work as the recipes' comments say."""
    (tmp_path / "train.yaml").write_text("defaults: [/data@data: local_text]\n")
    (tmp_path / "data").symlink_to(RECIPES)
    with initialize_config_dir(str(tmp_path), version_base=None):
        one = compose("train", overrides=["data.sources.0.path=docs"]).data
        two = compose("train", overrides=["data.sources=[{kind: tokens, path: a, weight: 3}, {kind: tokens, path: b}]"])
    schema = OmegaConf.structured(DataConfig)
    assert OmegaConf.to_object(OmegaConf.merge(schema, one)).sources[0].path == "docs"  # type: ignore[union-attr]
    sources = OmegaConf.to_object(OmegaConf.merge(schema, two.data)).sources  # type: ignore[union-attr]
    assert [(s.kind, s.path, s.weight) for s in sources] == [(SourceKind.tokens, "a", 3), (SourceKind.tokens, "b", 1)]


def test_a_store_outlives_the_process_that_made_it(config: DataConfig) -> None:
    """The cached folder is an ordinary store: it can be opened by itself."""
    build_data(config)
    (folder,) = (p for p in (Path(str(config.cache_dir)) / "tokens").iterdir() if p.is_dir())
    assert len(TokenStore(folder).lengths_D) == 60
