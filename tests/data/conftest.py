"""Small corpora for the data tests."""

import random
from pathlib import Path

import pytest

from lowprec.data import DataConfig, SourceConfig, SourceKind


@pytest.fixture
def texts() -> list[str]:
    """60 different documents of 1 to 400 characters."""
    r = random.Random(1)
    return [f"{i} " + "".join(r.choices("abcdefgh \n", k=r.randrange(400))) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """The documents, one per file."""
    path = tmp_path / "texts"
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_text(text)
    return path


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> DataConfig:
    source = SourceConfig(kind=SourceKind.text, path=str(folder))
    return DataConfig(
        sources=[source], tokenizer="byte", seq_len=32, validation_frac=0.1, cache_dir=str(tmp_path / "cache")
    )
