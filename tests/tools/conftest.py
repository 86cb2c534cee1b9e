"""A tiny model and its data, as overrides of any *_tiny recipe, for tools that look into a run."""

import random

import pytest


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two blocks of width 64 on a few kilobytes of made-up text, one token a byte; 8 steps, saved every 4."""
    folder, r = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(r.choices(words, k=150)))
    model = "model.dim=64 model.layers=2 model.heads=2 model.kv_heads=2 model.ffn_dim=128"
    data = f"data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.sources.0.path={folder}"
    more = "train.global_batch=4 train.micro_batch=2 train.steps=8 train.checkpoint_every=4 data.validation_sequences=2"
    return [*model.split(), *data.split(), *more.split(), f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
