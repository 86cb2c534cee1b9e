"""The loader: which sequences make step n, for whom, and how to go on after a stop.

Training data is one endless list of sequences, and sequence g of it is a pure function of (configuration, seed, g):
first the source (by weight), then the place in that source. A step takes the next `global_batch` of them, whatever the
number of ranks:

    micro-batch m of a step = sequences g0 + m*micro_batch ...
    rank r of W takes micro-batches r*A ... r*A + A - 1, where A = micro-batches of a step / W

So the state is one integer, the sequences consumed (plus a few for each streamed source), equal on all ranks, and loads
on any number of them. The next step is prepared by a thread while this one trains; only what was handed out counts as
consumed.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.data.packing import Batch, Epochs, Sequence, collate
from lowprec.data.sources import Documents
from lowprec.data.store import TokenStore
from lowprec.data.streaming import Stream
from lowprec.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    micros: list[tuple[int, Batch]]  # (number of the micro-batch in the global batch, batch): those of this rank
    num_targets: int  # targets that count in the whole global batch: the divisor of its loss


@dataclass(frozen=True)
class TrainSource:
    """Training part of one source: documents of a store, or a stream."""

    label: str
    weight: float
    store: TokenStore | None = None
    documents: np.ndarray | None = None  # of the store: those not held out
    stream: Documents | None = None


@dataclass(frozen=True)
class TrainData:
    sources: list[TrainSource]
    tokenizer: Tokenizer
    validation_frac: float
    shuffle: bool
    document_masking: bool
    identity: dict[str, Any]  # what a resumed run must find unchanged: {what: JSON value}

    def reader(self, i: int, seq_len: int, seed: int) -> Epochs | Stream:
        """Sequences of source i. Raises ValueError if it is too small for one."""
        source, key = self.sources[i], (seed % 2**64, i)
        if source.stream is not None:
            return Stream(source.stream, self.tokenizer, self.validation_frac, seq_len, self.shuffle, key)
        assert source.store is not None and source.documents is not None
        epochs = Epochs(source.store, source.documents, seq_len, self.shuffle, key)
        if epochs.sequences == 0:
            tokens = int(source.store.lengths_D[source.documents].sum())
            raise ValueError(
                f"{source.label} has {tokens} training tokens in {len(source.documents)} documents, fewer than one "
                f"sequence of data.seq_len={seq_len} + 1: lower data.seq_len or data.validation_frac, or add text"
            )
        return epochs


def schedule(weights: list[float], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and place in that source of the sequences first, ..., first + count - 1 of a mixture.

    Source k wants its m-th sequence at time (m + 1/2) / w_k (weights w sum to 1), and sequences are dealt out in order
    of those times: as even as can be. After t sequences source k has had w_k t of them, give or take 1/2 + w_k K/2 for
    K sources.
    """
    w = np.array(weights) / sum(weights)
    slack = len(w) + 1
    low = np.maximum(0, np.floor(w * first).astype(np.int64) - slack)  # all before these come before `first`
    high = np.ceil(w * (first + count)).astype(np.int64) + slack
    source = np.repeat(np.arange(len(w)), high - low)
    place = np.concatenate([np.arange(lo, hi) for lo, hi in zip(low, high)])
    order = np.lexsort((source, (place + 0.5) / w[source]))[first - low.sum() :][:count]
    return source[order], place[order]


class Loader:
    """Steps of training data for one rank. ValueError if the batch cannot be cut, or `state` belongs to other data."""

    def __init__(
        self,
        data: TrainData,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"train.global_batch={global_batch} must be a multiple of train.micro_batch={micro_batch} times "
                f"{world} ranks: for example {micro_batch * world * max(1, global_batch // (micro_batch * world))}"
            )
        self._data, self._global_batch, self._micro_batch = data, global_batch, micro_batch
        self._accumulation = global_batch // micro_batch // world
        self._first_micro = rank * self._accumulation
        self._identity = {**data.identity, "seed": seed, "data.seq_len": seq_len}
        self._readers = [data.reader(i, seq_len, seed) for i in range(len(data.sources))]
        self._seq_len = seq_len
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowprec-data")
        self._ahead: Future[tuple[Step, dict[str, Any]]] | None = None
        self._state: dict[str, Any] = {"samples": 0, "streams": self._places(), "identity": self._identity}
        if state is not None:
            self.load_state_dict(state)

    def next_step(self) -> Step:
        """This rank's micro-batches of the next step, and the number of valid targets of all ranks."""
        self._ahead = self._ahead or self._thread.submit(self._produce, self._state["samples"])
        try:
            step, self._state = self._ahead.result()
        except BaseException:
            self._rewind()  # so that a failed read can be tried again
            raise
        self._ahead = self._thread.submit(self._produce, self._state["samples"])
        return step

    def skip(self, steps: int) -> None:
        """Consume steps without training on them (around a loss spike, say)."""
        for _ in range(steps):
            self.next_step()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on all ranks; loads on any number of them, and with another batch size."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for what, was in state["identity"].items():
            now = self._identity.get(what)
            if now != was:
                raise ValueError(
                    f"cannot resume on other data: {what} was {was} and is now {now}; restore it, or start a new run "
                    "from the weights"
                )
        self._state = {"samples": int(state["samples"]), "streams": dict(state["streams"]), "identity": self._identity}
        self._rewind()

    def _rewind(self) -> None:
        """Put the streams where the state says and forget what was prepared."""
        if self._ahead is not None:
            self._ahead.exception()  # wait for the thread
            self._ahead = None
        for i, place in self._state["streams"].items():
            reader = self._readers[int(i)]
            assert isinstance(reader, Stream), "equal identities have equal kinds of sources"
            reader.seek(place)

    def close(self) -> None:
        """Stop the background thread (it also ends with the process)."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _places(self) -> dict[str, dict[str, int]]:
        return {str(i): reader.state() for i, reader in enumerate(self._readers) if isinstance(reader, Stream)}

    def _produce(self, samples: int) -> tuple[Step, dict[str, Any]]:
        """The step that begins at a sequence, and the state after it."""
        source_G, place_G = schedule([s.weight for s in self._data.sources], samples, self._global_batch)
        begin = self._first_micro * self._micro_batch
        mine_G = np.zeros(self._global_batch, dtype=bool)
        mine_G[begin : begin + self._accumulation * self._micro_batch] = True
        taken: dict[int, Sequence] = {}
        borders = 0
        for i, reader in enumerate(self._readers):
            (where,) = np.nonzero(source_G == i)
            if len(where):
                sequences, ends = reader.read(int(place_G[where[0]]), mine_G[where].tolist())
                borders += ends
                taken.update(zip(where[mine_G[where]].tolist(), sequences))
        masking = self._data.document_masking
        micros = []
        for micro in range(self._first_micro, self._first_micro + self._accumulation):
            rows = range(micro * self._micro_batch, (micro + 1) * self._micro_batch)
            micros.append((micro, collate([taken[row] for row in rows], masking)))
        num_targets = self._global_batch * self._seq_len - (borders if masking else 0)
        state = {"samples": samples + self._global_batch, "streams": self._places(), "identity": self._identity}
        return Step(micros, num_targets), state
