"""The loader: which sequences make step n, for whom, and how to go on after a stop.

Training data is one endless list of sequences, and sequence g of it is a pure function of (configuration, seed, g):
first the source (by the weights of its phase), then the place in that source. A step takes the next `global_batch` of
them, whatever the number of ranks:

    micro-batch m of a step = sequences g0 + m*micro_batch ...
    rank r of W takes micro-batches r*A ... r*A + A - 1, where A = micro-batches of a step / W

So the state is one integer, the sequences consumed (plus a few for each streamed source), equal on all ranks, and loads
on any number of them. The next step is prepared by a thread while this one trains; only what was handed out counts as
consumed.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowprec.data.packing import Batch, Epochs, Sequence, collate
from lowprec.data.sources import Documents
from lowprec.data.store import TokenStore
from lowprec.data.streaming import Stream
from lowprec.data.tokenizer import Tokenizer

Phases = list[tuple[int, list[float]]]
"""From which sequence on which weights hold, in order; the first from 0."""


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
    phases: list[tuple[float, list[float]]] = field(default_factory=list)  # share of the run, weights from there on

    def phases_of(self, sequences: int) -> Phases:
        """The mixture of a run of so many sequences."""
        first: Phases = [(0, [source.weight for source in self.sources])]
        return first + [(round(start * sequences), weights) for start, weights in self.phases]

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
    K sources. A source of weight 0 gets none.
    """
    before, source, place = _around(weights, first, count)
    return source[first - before :][:count], place[first - before :][:count]


def _around(weights: list[float], first: int, count: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The mixture from a little before `first`: how many sequences precede, then sources and places in order."""
    (k,) = np.nonzero(np.array(weights))
    w = np.array(weights)[k] / sum(weights)
    slack = len(k) + 1
    low = np.maximum(0, np.floor(w * first).astype(np.int64) - slack)  # all before these come before `first`
    high = np.ceil(w * (first + count)).astype(np.int64) + slack
    source = np.repeat(np.arange(len(k)), high - low)
    place = np.concatenate([np.arange(lo, hi) for lo, hi in zip(low, high)])
    order = np.lexsort((source, (place + 0.5) / w[source]))
    return int(low.sum()), k[source[order]], place[order]


def phased(phases: Phases, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As `schedule`, of weights that change: in every phase a source goes on where the one before has left it."""
    sources, places = [], []
    taken_K = np.zeros(len(phases[0][1]), dtype=np.int64)
    for (begin, weights), end in zip(phases, [*(begin for begin, _ in phases[1:]), first + count]):
        low, high = max(first, begin), min(first + count, end)
        if low < high:
            source, place = schedule(weights, low - begin, high - low)
            sources.append(source)
            places.append(place + taken_K[source])
        if end < first + count:
            taken_K = taken_K + _taken(weights, end - begin)
    return np.concatenate(sources), np.concatenate(places)


def _taken(weights: list[float], count: int) -> np.ndarray:
    """How many of the first `count` sequences of a mixture are each source's: the first place not yet dealt out."""
    before, source, place = _around(weights, count, 0)
    taken_K = np.zeros(len(weights), dtype=np.int64)
    rest = slice(count - before, None)
    taken_K[source[rest][::-1]] = place[rest][::-1]  # the earliest is written last
    return taken_K


class Loader:
    """Steps of training data for one rank; `steps` is how many the whole run has, which data with phases must know.

    ValueError if the batch cannot be cut, or `state` belongs to other data.
    """

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
        steps: int | None = None,
    ) -> None:
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"train.global_batch={global_batch} must be a multiple of train.micro_batch={micro_batch} times "
                f"{world} ranks: for example {micro_batch * world * max(1, global_batch // (micro_batch * world))}"
            )
        self._data, self._global_batch, self._micro_batch = data, global_batch, micro_batch
        if data.phases and not steps:
            raise ValueError("data.phases are shares of the run: give the loader the number of its steps")
        self._phases = data.phases_of((steps or 0) * global_batch)
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
        source_G, place_G = phased(self._phases, samples, self._global_batch)
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
