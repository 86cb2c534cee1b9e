"""lowprec-prepare: text to shards by the command, shards to batches by the training loader."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.data import DataConfig, Loader, SourceConfig, SourceKind, build_data
from lowprec.launch.prepare import main


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"document {i} " * (i % 7 + 1)}) for i in range(50)))
    return file


def test_shards_are_what_the_loader_reads(jsonl: Path, tmp_path: Path) -> None:
    """Prepared by the command, the corpus gives the batches that the text itself gives, from several shards."""
    out = tmp_path / "tokens"
    options = ["--kind", "jsonl", "--path", str(jsonl), "--text-field", "body", "--tokenizer", "byte"]
    command = [sys.executable, "-m", "lowprec.launch.prepare", str(out), *options, "--shard-tokens", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50 documents, 2,") and "kind: tokens" in done.stdout
    assert len(list(out.glob("tokens_*.bin"))) > 2

    prepared = DataConfig(sources=[SourceConfig(kind=SourceKind.tokens, path=str(out))])
    text = DataConfig(
        sources=[SourceConfig(kind=SourceKind.jsonl, path=str(jsonl), text_field="body")], tokenizer="byte"
    )
    steps = []
    for config in (prepared, text):
        config.seq_len, config.validation_frac, config.cache_dir = 16, 0.1, str(tmp_path / "cache")
        loader = Loader(build_data(config, 1).train, 16, 8, 4, 0, 1, seed=1)
        steps.append([loader.next_step() for _ in range(30)])
    for a, b in zip(*steps):
        assert a.num_targets == b.num_targets
        assert all(
            x.tokens.equal(y.tokens) and x.targets.equal(y.targets) for (_, x), (_, y) in zip(a.micros, b.micros)
        )


def fails(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The message with which the command ends, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lowprec-prepare", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return str(caught.value)


def test_mistakes_are_one_sentence(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a wrong field and a folder in the way end in one line and leave no folder behind."""
    out = str(tmp_path / "tokens")
    options = ["--kind", "jsonl", "--path", str(jsonl), "--tokenizer", "byte"]
    assert "no such file, folder or glob" in fails(monkeypatch, out, "--kind", "text", "--path", str(tmp_path / "nope"))
    assert "has no field 'text': set text_field to one of body" in fails(monkeypatch, out, *options)
    assert "it was not written by lowprec-prepare" in fails(monkeypatch, str(tmp_path), *options, "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_overwrite_replaces_a_prepared_folder(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --overwrite a second run refuses; with it the folder holds the new tokens, or the old if that fails."""
    manifest = tmp_path / "t" / "manifest.json"
    options = ["--kind", "jsonl", "--path", str(jsonl), "--text-field", "body", "--tokenizer", "byte"]
    monkeypatch.setattr(sys, "argv", ["lowprec-prepare", str(tmp_path / "t"), *options])
    main()
    assert capsys.readouterr().out.startswith("50 documents")
    assert "add --overwrite to replace it" in fails(monkeypatch, str(tmp_path / "t"), *options)
    fails(monkeypatch, str(tmp_path / "t"), *options, "--overwrite", "--text-field", "nope")
    assert json.loads(manifest.read_text())["documents"] == 50
    monkeypatch.setattr(sys, "argv", ["lowprec-prepare", str(tmp_path / "t"), *options, "--limit", "5", "--overwrite"])
    main()
    assert json.loads(manifest.read_text())["documents"] == 5 and len(list(tmp_path.iterdir())) == 2
