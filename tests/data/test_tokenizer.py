"""lowprec.data.tokenizer: exact round trips, and document ends that text cannot forge."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.data import tokenizer as tok

BYTES = tok.byte_level()
TEXTS = ["".join(f"def f{i}(x):\n    return x + {i % 7}\n" for i in range(99)), "naïve café 😀"]
BPE = tok.train_bpe(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_round_trip_and_are_the_ids(text: str) -> None:
    """The ids of the byte tokenizer are the UTF-8 bytes, and they decode to the text."""
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_trained_bpe_round_trips_any_text(text: str) -> None:
    """Byte-level BPE has no unknown token: even scripts it was not trained on come back exactly."""
    assert BPE.decode(BPE.encode(text)) == text


def test_text_cannot_forge_a_document_end() -> None:
    """A document that spells <|endoftext|> gets ordinary tokens; only the appended one is the end."""
    for tokenizer in (BYTES, BPE):
        assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
        (ids,) = tokenizer.encode_documents(["a<|endoftext|>b"])
        assert (ids == tokenizer.eos_id).tolist() == [False] * (len(ids) - 1) + [True]


def test_training_is_repeatable_and_survives_a_file(tmp_path: Path) -> None:
    """The same text gives the same tokenizer, and its hash is that of the saved tokenizer.json."""
    again = tok.train_bpe(TEXTS, 300)
    BPE.save(tmp_path / "tokenizer.json")
    assert BPE.vocab_size == 300 and again.hash == BPE.hash == tok.load(str(tmp_path)).hash


def test_end_token_is_found_named_or_asked_for(tmp_path: Path) -> None:
    """The document end comes from the argument, tokenizer_config.json or the usual names, else one sentence asks."""
    file = tmp_path / "tokenizer.json"
    tokenizer = tok.train_bpe(TEXTS, 300)
    tokenizer.backend.add_special_tokens(["<stop>"])
    tokenizer.save(file)
    assert tok.load(str(file)).eos_token == "<|endoftext|>"
    assert tok.load(str(file), "<stop>").eos_id == 300
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert tok.load(str(file)).eos_token == "<stop>"
    with pytest.raises(ValueError, match=r"no end-of-document token among </x>: set data.eos_token .*<stop>"):
        tok.load(str(file), "</x>")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    """A missing path and a file of another kind are told apart, each in one sentence."""
    with pytest.raises(ValueError, match=r"data\.tokenizer=nope\.json: no such file; give a tokenizer\.json, 'bpe"):
        tok.load("nope.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a tokenizer\.json"):
        tok.load(str(tmp_path / "x.json"))
