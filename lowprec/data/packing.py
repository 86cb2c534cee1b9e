"""Packing: documents laid end to end and cut into sequences of one length (concat-and-split, no padding).

    stream     t0 t1 t2 E | u0 u1 E | v0 ...          documents in the order of the epoch, E = end of document
    sequence i = stream[i*T : i*T + T + 1]            one token of overlap: every token is predicted exactly once
    inputs  x = s[:-1],  targets y = s[1:]

Document masking (on by default): `document_ids` number the documents of a sequence from 0, so that attention can stay
inside each, and the one target that crosses a border is ignored: a model predicts E as the last token of a document,
but is not asked to guess the first token of an unrelated one from E (target -100). Off: one causal stream, every target
counts.

An epoch shuffles the documents, then the sequences cut from them, because neighbours of one long document in one batch
are correlated. What is left over at the end of the stream (less than a sequence) is dropped; another order drops
another rest.
"""

from dataclasses import dataclass

import numpy as np
import torch

from lowprec.data.store import TokenStore

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -100 = ignored
    document_ids: torch.Tensor | None  # (B, T) int64, 0, 1, ... along a sequence; None without document masking


Sequence = tuple[np.ndarray, np.ndarray]  # ids (T + 1) and document numbers (T + 1), int64


def collate(sequences: list[Sequence], document_masking: bool) -> Batch:
    """Sequences of T + 1 tokens as inputs and shifted targets."""
    ids_BS, documents_BS = (torch.from_numpy(np.stack(part)) for part in zip(*sequences))
    targets_BT = ids_BS[:, 1:].clone()
    if not document_masking:
        return Batch(ids_BS[:, :-1].contiguous(), targets_BT, None)
    targets_BT[documents_BS[:, 1:] != documents_BS[:, :-1]] = IGNORED
    return Batch(ids_BS[:, :-1].contiguous(), targets_BT, documents_BS[:, :-1].contiguous())


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of range(n), a function of the key alone: Philox bits are the same in every version of numpy."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(n), kind="stable")


class Packed:
    """The sequences of some documents of a store in a given order, by random access."""

    def __init__(self, store: TokenStore, documents: np.ndarray, seq_len: int) -> None:
        self.store, self.documents, self.seq_len = store, documents, seq_len
        self._ends = np.cumsum(store.lengths_D[documents])  # of each document in the stream

    def __len__(self) -> int:
        return max(0, int(self._ends[-1]) - 1) // self.seq_len if len(self._ends) else 0

    def sequence(self, i: int) -> Sequence:
        position, stop = i * self.seq_len, (i + 1) * self.seq_len + 1
        d = int(np.searchsorted(self._ends, position, side="right"))
        pieces = []
        while position < stop:
            document = int(self.documents[d])
            first = position - (int(self._ends[d]) - int(self.store.lengths_D[document]))
            pieces.append(self.store.read(document, first, stop - position))
            position += len(pieces[-1])
            d += 1
        return np.concatenate(pieces).astype(np.int64), np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])

    def borders(self, sequences: np.ndarray) -> int:
        """How many inputs of these sequences end a document: the targets that masking ignores, counted without reading
        tokens.
        """
        start = sequences * self.seq_len
        before, upto = (np.searchsorted(self._ends, at, side="right") for at in (start, start + self.seq_len))
        return int((upto - before).sum())


class Epochs:
    """The endless list of a store's sequences: position -> sequence (position % n) of epoch (position // n)."""

    def __init__(
        self, store: TokenStore, documents: np.ndarray, seq_len: int, shuffle: bool, key: tuple[int, ...]
    ) -> None:
        self._store, self._documents, self._seq_len, self._shuffle, self._key = store, documents, seq_len, shuffle, key
        self.sequences = len(Packed(store, documents, seq_len))
        self._cached: tuple[int, Packed, np.ndarray] | None = None

    def _epoch(self, epoch: int) -> tuple[Packed, np.ndarray]:
        if self._cached is None or self._cached[0] != epoch:
            documents, order = self._documents, np.arange(self.sequences)
            if self._shuffle:
                documents = documents[permutation(len(documents), *self._key, epoch, 0)]
                order = permutation(self.sequences, *self._key, epoch, 1)
            self._cached = epoch, Packed(self._store, documents, self._seq_len), order
        return self._cached[1:]

    def read(self, first: int, wanted: list[bool]) -> tuple[list[Sequence], int]:
        """Of positions `first`, `first + 1`, ...: the wanted sequences, and the number of borders in all of them."""
        sequences, borders, n = [], 0, self.sequences
        position, last = first, first + len(wanted)
        while position < last:
            packed, order = self._epoch(position // n)
            stop = min(last, (position // n + 1) * n)
            indices = order[position % n : position % n + stop - position]
            borders += packed.borders(indices)
            sequences += [packed.sequence(int(i)) for i, w in zip(indices, wanted[position - first :]) if w]
            position = stop
        return sequences, borders
