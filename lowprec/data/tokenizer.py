"""Text to token ids and back. Everything is a `tokenizers.Tokenizer`, hence a tokenizer.json: one code path.

Three ways to get one:
  load(path)           any tokenizer.json
  byte_level()         one token a byte, id = byte; 256 is the end of a document. Needs no file and no training
  train_bpe(texts, n)  byte-level BPE (arXiv 1508.07909, on bytes as in GPT-2) of n entries; seconds for 10 MB

Every document is followed by one end-of-document token (`eos_id`). Text that merely spells a special token, such as
"<|endoftext|>" in a tokenizer's own source code, is encoded as ordinary text: documents cannot forge a boundary.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
_EOS_NAMES = (
    EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)


class Tokenizer:
    """A `tokenizers.Tokenizer` and its end-of-document token. Raises ValueError if that token cannot be found."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str, eos_token: str | None = None) -> None:
        self.backend, self.name = backend, name
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # spelled-out special tokens in a document are plain text
        candidates = [eos_token] if eos_token else _EOS_NAMES
        found = [token for token in candidates if backend.token_to_id(token) is not None]
        if not found:
            raise ValueError(
                f"tokenizer {name} has no end-of-document token among {', '.join(candidates)}: set data.eos_token to "
                f"one of its special tokens ({', '.join(special_tokens(backend)) or 'it has none'})"
            )
        self.eos_token: str = found[0]
        self.eos_id = int(backend.token_to_id(self.eos_token) or 0)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        return hashlib.blake2b(f"{self.backend.to_str()}{self.eos_id}".encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added before or after."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """uint32 ids of each text with `eos_id` appended; texts are encoded in parallel."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*e.ids, self.eos_id], dtype=np.uint32) for e in encoded]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def save(self, path: Path) -> None:
        path.write_text(self.backend.to_str())


def special_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    return [token.content for token in backend.get_added_tokens_decoder().values() if token.special]


def load(path: str, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer.json at `path` (a file, or a folder that holds one); a tokenizer_config.json beside it may name the
    EOS.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer={path}: no such file; give a tokenizer.json, 'bpe:4096', 'byte' or 'hub:NAME'"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"data.tokenizer={path} is not a tokenizer.json of the `tokenizers` library ({error})"
        ) from error
    return Tokenizer(backend, file.name, eos_token or _configured_eos(file.with_name("tokenizer_config.json")))


def _configured_eos(file: Path) -> str | None:
    eos: Any = json.loads(file.read_text()).get("eos_token") if file.is_file() else None
    return eos.get("content") if isinstance(eos, dict) else eos


def byte_level(eos_token: str | None = None) -> Tokenizer:
    """257 tokens: byte b is id b, and 256 ends a document."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([eos_token or EOS])
    return Tokenizer(backend, "byte", eos_token or EOS)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if printable Latin-1, else the next free character from U+0100
    on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def train_bpe(texts: Iterable[str], vocab_size: int, eos_token: str | None = None) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries (fewer if the text has too few pairs): the same text gives the same
    tokenizer.
    """
    eos = eos_token or EOS
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, f"bpe:{vocab_size}", eos)
