"""A source that is tokenised while training: documents come from a reader, sequences from a buffer.

Its place is four integers: the epoch, the shard (in the epoch's random order), the document in that shard, and the
token of that document at which the next sequence begins. Resuming skips to the document and tokenises it again; nothing
buffered is saved.

Shuffling must keep that exact, so it is done in blocks: shards in a random order, and 1,024 documents of a shard at a
time in a random order. This is weaker than the full shuffle of a token store.

Every rank reads the whole stream and keeps its own micro-batches: simple, and exact on any number of ranks, but each
rank then tokenises everything (some 0.5 M tokens/s a core). With many ranks, or several epochs, prepare token shards
first.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from lowprec.data.packing import Sequence, permutation
from lowprec.data.sources import Documents
from lowprec.data.store import hash_text, held_out
from lowprec.data.tokenizer import Tokenizer

_BLOCK_DOCUMENTS = 1024  # part of the order: a change breaks the resume of older runs
_BATCH_DOCUMENTS = 32  # texts encoded at a time

Place = tuple[int, int, int]  # epoch, shard, document


def is_held_out(text: str, validation_frac: float) -> bool:
    return bool(held_out(np.array([hash_text(text)], dtype=np.uint64), validation_frac)[0])


def held_out_texts(documents: Documents, tokenizer: Tokenizer, validation_frac: float, tokens: int) -> Iterator[str]:
    """The first held-out documents of a source that make `tokens` tokens."""
    for text in documents.read():
        if tokens > 0 and is_held_out(text, validation_frac):
            tokens -= len(tokenizer.encode(text)) + 1
            yield text
        if tokens <= 0:
            return


class Stream:
    """Training sequences of a streamed source, strictly one after another."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        validation_frac: float,
        seq_len: int,
        shuffle: bool,
        key: tuple[int, ...],
    ) -> None:
        self._documents, self._tokenizer, self._frac = documents, tokenizer, validation_frac
        self._seq_len, self._shuffle, self._key = seq_len, shuffle, key
        self.seek({"epoch": 0, "shard": 0, "document": 0, "token": 0})

    def state(self) -> dict[str, int]:
        epoch, shard, document = self._buffer[0][0] if self._buffer else self._from
        return {"epoch": epoch, "shard": shard, "document": document, "token": self._token}

    def seek(self, state: dict[str, int]) -> None:
        self._from: Place = state["epoch"], state["shard"], state["document"]
        self._token = state["token"]  # of the first document in the buffer
        self._buffer: list[tuple[Place, np.ndarray]] = []
        self._source = self._encoded(*self._from)

    def read(self, first: int, wanted: list[bool]) -> tuple[list[Sequence], int]:
        """The next `len(wanted)` sequences: those wanted, and the number of document borders in all. `first` is where
        we are.
        """
        sequences = [self._next() for _ in wanted]
        borders = sum(int((documents[1:] != documents[:-1]).sum()) for _, documents in sequences)
        return [s for s, w in zip(sequences, wanted) if w], borders

    def _next(self) -> Sequence:
        pieces: list[np.ndarray] = []
        missing, first = self._seq_len + 1, self._token
        while missing:
            if len(pieces) == len(self._buffer):
                self._buffer.append(next(self._source))
            pieces.append(self._buffer[len(pieces)][1][first : first + missing])
            missing, first = missing - len(pieces[-1]), 0
        self._token += self._seq_len
        while self._token >= len(self._buffer[0][1]):
            self._token -= len(self._buffer.pop(0)[1])
        return np.concatenate(pieces).astype(np.int64), np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])

    def _encoded(self, epoch: int, shard: int, document: int) -> Iterator[tuple[Place, np.ndarray]]:
        """Training documents with their places, from a place on, for ever."""
        while True:
            found = False
            shards = self._documents.shards
            order = permutation(len(shards), *self._key, epoch) if self._shuffle else np.arange(len(shards))
            for s in range(shard, len(shards)):
                for batch in self._batches(epoch, s, int(order[s]), document):
                    found = True
                    ids = self._tokenizer.encode_documents([text for _, text in batch])
                    yield from zip((place for place, _ in batch), ids)
                document = 0
            if not found and shard == 0:
                raise ValueError(
                    f"{self._documents.label} holds no training document with text: check the path and the text field"
                )
            epoch, shard = epoch + 1, 0

    def _batches(self, epoch: int, s: int, shard: int, document: int) -> Iterator[list[tuple[Place, str]]]:
        """Training texts of one shard with their places, a few at a time, from the `document`-th of its order on."""
        begin = document // _BLOCK_DOCUMENTS * _BLOCK_DOCUMENTS
        texts = self._documents.shards[shard](begin)
        while block := list(islice(texts, _BLOCK_DOCUMENTS)):
            order = permutation(len(block), *self._key, epoch, shard, begin) if self._shuffle else np.arange(len(block))
            places = [(begin + i, block[at]) for i, at in enumerate(order) if begin + i >= document]
            kept = [((epoch, s, i), text) for i, text in places if text and not is_held_out(text, self._frac)]
            for i in range(0, len(kept), _BATCH_DOCUMENTS):
                yield kept[i : i + _BATCH_DOCUMENTS]
            begin += len(block)
