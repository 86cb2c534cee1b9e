"""lowprec.data.packing: sequences, shifted targets and document numbers, checked by hand and by counting."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lowprec.data import IGNORED
from lowprec.data import tokenizer as tok
from lowprec.data.packing import Epochs, Packed, collate, permutation
from lowprec.data.store import TokenStore, write_store

E = 256  # end of document
A, B, C, D, X, F = b"abcdxf"


def store_of(texts: list[str], folder: Path) -> TokenStore:
    write_store(folder / "s", texts, tok.byte_level(), {}, "s")
    return TokenStore(folder / "s")


def test_three_documents_by_hand(tmp_path: Path) -> None:
    """ab|cdx|f in sequences of 4: one token of overlap, E is predicted, the first token after E is not."""
    packed = Packed(store_of(["ab", "cdx", "f"], tmp_path), np.arange(3), seq_len=4)
    assert len(packed) == 2  # a b E c | d x E f | E
    batch = collate([packed.sequence(0), packed.sequence(1)], document_masking=True)
    assert batch.tokens.tolist() == [[A, B, E, C], [D, X, E, F]]
    assert batch.targets.tolist() == [[B, E, IGNORED, D], [X, E, IGNORED, E]]
    assert batch.document_ids is not None and batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert packed.borders(np.array([0, 1])) == 2

    plain = collate([packed.sequence(0), packed.sequence(1)], document_masking=False)
    assert plain.targets.tolist() == [[B, E, C, D], [X, E, F, E]] and plain.document_ids is None


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1000])
def test_every_token_is_predicted_once(seq_len: int, texts: list[str], tmp_path: Path) -> None:
    """Over one shuffled epoch the targets are the stream without its first token and the dropped rest, each once."""
    store = store_of(texts, tmp_path)
    epochs = Epochs(store, np.arange(60), seq_len, shuffle=True, key=(5,))
    assert epochs.sequences == (store.tokens - 1) // seq_len
    sequences, borders = epochs.read(0, [True] * epochs.sequences)
    batch = collate(sequences, document_masking=True)
    assert int((batch.targets == IGNORED).sum()) == borders

    stream = [t for d in permutation(60, 5, 0, 0) for t in [*texts[d].encode(), E]]
    predicted = [
        t for _, ids in sorted(zip(permutation(epochs.sequences, 5, 0, 1), (s[0][1:] for s in sequences))) for t in ids
    ]
    assert predicted == stream[1 : epochs.sequences * seq_len + 1]


def test_epochs_follow_one_another_in_new_orders(texts: list[str], tmp_path: Path) -> None:
    """A read across the end of an epoch equals reads on either side; epochs differ in order; unshuffled they do not."""
    store = store_of(texts, tmp_path)
    epochs = Epochs(store, np.arange(60), 50, shuffle=True, key=(1,))
    n = epochs.sequences
    across, _ = epochs.read(n - 3, [True] * 6)
    apart = epochs.read(n - 3, [True] * 3)[0] + epochs.read(n, [True] * 3)[0]
    assert [a[0].tolist() for a in across] == [b[0].tolist() for b in apart]
    first, second = (epochs.read(e * n, [True] * n)[0] for e in (0, 1))
    assert [s[0].tolist() for s in first] != [s[0].tolist() for s in second]
    plain = Epochs(store, np.arange(60), 50, shuffle=False, key=(1,))
    first, second = (plain.read(e * n, [True] * n)[0] for e in (0, 1))
    assert [s[0].tolist() for s in first] == [s[0].tolist() for s in second]


def test_unwanted_sequences_are_counted_but_not_read(texts: list[str], tmp_path: Path) -> None:
    """The border count is of all positions, whichever are wanted: every rank knows the global number of targets."""
    epochs = Epochs(store_of(texts, tmp_path), np.arange(60), 16, shuffle=True, key=(2,))
    everything, borders = epochs.read(10, [True] * 40)
    some, same = epochs.read(10, [False, True] * 20)
    assert same == borders > 0
    assert [s[0].tolist() for s in some] == [s[0].tolist() for s in everything[1::2]]


def test_permutation_is_fixed_and_fair() -> None:
    """Pinned values (a resumed run depends on them), a function of the whole key, and no favoured first element."""
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert sorted(permutation(1000, 3)) == list(range(1000))
    assert permutation(100, 1, 0).tolist() != permutation(100, 1, 1).tolist() != permutation(100, 2, 1).tolist()
    first = Counter(int(permutation(4, seed)[0]) for seed in range(4000))
    assert all(abs(first[i] - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for i in range(4))
