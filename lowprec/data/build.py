"""From a DataConfig to training data, validation batches and a tokenizer: makes and caches what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lowprec.data import tokenizer as tok
from lowprec.data.config import DataConfig, SourceConfig, SourceKind
from lowprec.data.loader import TrainData, TrainSource, schedule
from lowprec.data.packing import Batch, Packed, Sequence, collate
from lowprec.data.sources import Documents, digest, open_source
from lowprec.data.store import FORMAT, NoDocumentsError, TokenStore, build_once, cache_folder, held_out, write_store
from lowprec.data.streaming import held_out_texts
from lowprec.data.tokenizer import Tokenizer

_BPE_TEXT_BYTES = 64_000_000  # enough to train a tokenizer on


@dataclass(frozen=True)
class Data:
    train: TrainData  # for Loader
    validation: list[Batch]  # fixed; from documents that training never sees
    tokenizer: Tokenizer
    fingerprint: dict[str, Any]  # JSON-able: what the data was, for the run folder
    vocab_size: int  # the tokenizer's, rounded up to a multiple of 64: no token has an id at or above it


def build_data(config: DataConfig, seed: int = 0) -> Data:
    """Everything a run needs to know about its data. Safe to call from many processes at once.

    The tokenizer, the split and the validation batches are the same for every `seed`, so that runs can be compared; the
    seed orders the training data and is given to `Loader`. Raises ValueError with one sentence on anything missing or
    contradictory.
    """
    config.check()
    cache = cache_folder(config.cache_dir)
    labels = [f"data.sources[{i}]" for i in range(len(config.sources))]
    opened = [_open(source, label) for source, label in zip(config.sources, labels)]
    tokenizer = open_tokenizer(config, opened, cache)
    train, held = [], []
    for source, documents in zip(config.sources, opened):
        if isinstance(documents, TokenStore):
            store, label = documents, f"{documents.folder}"
            if store.manifest["tokenizer"]["hash"] != tokenizer.hash:
                raise ValueError(
                    f"{store.folder} was prepared with the tokenizer {store.manifest['tokenizer']['name']} "
                    f"({store.manifest['tokenizer']['hash']}), but this run uses {tokenizer.name} ({tokenizer.hash}): "
                    "prepare it again, or leave data.tokenizer empty and prepare all sources with one tokenizer"
                )
        elif source.streaming:
            train.append(TrainSource(documents.label, source.weight, stream=documents))
            held.append(_stream_validation(config, documents, tokenizer, cache))
            continue
        else:
            store, label = cached_store(documents, tokenizer, cache), documents.label
        out_D = held_out(store.hashes_D, config.validation_frac)
        train.append(TrainSource(label, source.weight, store=store, documents=np.flatnonzero(~out_D)))
        held.append((store, np.flatnonzero(out_D)))
    sequences = _validation(config, held)
    fingerprint = _fingerprint(config, opened, train, tokenizer, sequences)
    phases = [(phase.start, list(phase.weights)) for phase in config.phases]
    identity = {
        "data.tokenizer (hash)": tokenizer.hash,
        "data.sources (hashes of content)": [s["hash"] for s in fingerprint["sources"]],
        "data.sources (weights)": [s.weight for s in config.sources],
        **({"data.phases": [list(phase) for phase in phases]} if phases else {}),
        "data.validation_frac": config.validation_frac,
        "data.shuffle": config.shuffle,
    }
    data = TrainData(
        train, tokenizer, config.validation_frac, config.shuffle, config.document_masking, identity, phases
    )
    for i in range(len(train)):
        data.reader(i, config.seq_len, seed)  # raises now, and not at the first step
    batches = [sequences[i : i + config.validation_batch] for i in range(0, len(sequences), config.validation_batch)]
    validation = [collate(batch, config.document_masking) for batch in batches]
    return Data(data, validation, tokenizer, fingerprint, -(-tokenizer.vocab_size // 64) * 64)


def _open(source: SourceConfig, label: str) -> Documents | TokenStore:
    if source.kind is SourceKind.tokens:
        return TokenStore(Path(str(source.path)).expanduser())
    return open_source(source, label)


def cached_store(documents: Documents, tokenizer: Tokenizer, cache: Path) -> TokenStore:
    """The tokens of a source, made the first time."""
    folder = cache / "tokens" / digest([FORMAT, documents.key, tokenizer.hash])
    with build_once(folder) as missing:
        if missing:
            write_store(folder, documents.read(), tokenizer, documents.about, documents.label)
    return TokenStore(folder)


def _stream_validation(
    config: DataConfig, documents: Documents, tokenizer: Tokenizer, cache: Path
) -> tuple[TokenStore, np.ndarray] | None:
    """The first held-out documents of a streamed source that fill the validation sequences, in a store of their own."""
    frac, tokens = config.validation_frac, config.validation_sequences * config.seq_len + 1
    folder = cache / "tokens" / digest([FORMAT, documents.key, tokenizer.hash, "validation", frac, tokens])
    with build_once(folder) as missing:
        if missing:
            if next(documents.read(), None) is None:  # also tells a wrong field now rather than at the first step
                raise NoDocumentsError(
                    f"{documents.label} holds no document with text: check the path and the text field"
                )
            if frac == 0 or config.validation_sequences == 0:
                return None
            texts = held_out_texts(documents, tokenizer, frac, tokens)
            try:
                write_store(folder, texts, tokenizer, documents.about, documents.label)
            except NoDocumentsError:  # none happens to be held out: other sources may have some
                return None
    store = TokenStore(folder)
    return store, np.arange(len(store.lengths_D))


def open_tokenizer(config: DataConfig, opened: list[Documents | TokenStore], cache: Path) -> Tokenizer:
    """The tokenizer that `data.tokenizer` asks for."""
    stores = [source for source in opened if isinstance(source, TokenStore)]
    if config.tokenizer is None and stores:
        return tok.load(str(stores[0].folder), stores[0].manifest["eos_token"])
    wish = config.tokenizer or "bpe:4096"
    if wish == "byte":
        return tok.byte_level(config.eos_token)
    if wish.startswith("hub:"):
        try:
            backend = tokenizers.Tokenizer.from_pretrained(wish[4:])
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer={wish} cannot be fetched from the hub ({error})") from error
        return Tokenizer(backend, wish, config.eos_token)
    if not wish.startswith("bpe"):
        return tok.load(wish, config.eos_token)
    size = wish.removeprefix("bpe:")
    if not size.isdigit() or int(size) < 257:
        raise ValueError(
            f"data.tokenizer={wish}: write the size after a colon, at least 257 (256 bytes and the end), e.g. bpe:4096"
        )
    texts = [source for source in opened if isinstance(source, Documents)]
    if not texts:
        raise ValueError(
            f"data.tokenizer={wish} needs text to be trained on, but all sources are prepared tokens: leave it empty"
        )
    key = digest([[d.key for d in texts], size, config.eos_token, tokenizers.__version__])
    path = cache / "tokenizers" / f"{key}.json"
    with build_once(path) as missing:
        if missing:
            temporary = path.with_name(path.name + ".tmp")
            tok.train_bpe(_sample(texts), int(size), config.eos_token).save(temporary)
            temporary.replace(path)
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), wish, config.eos_token or tok.EOS)


def _sample(sources: list[Documents]) -> Iterator[str]:
    """The beginning of every source, 64 MB in all."""
    for source in sources:
        left = _BPE_TEXT_BYTES // len(sources)
        for text in source.read():
            yield text
            left -= len(text)
            if left <= 0:
                break


def _validation(config: DataConfig, held: list[tuple[TokenStore, np.ndarray] | None]) -> list[Sequence]:
    """Up to `validation_sequences`, mixed like the training data; ValueError if some are wanted and there is none."""
    if config.validation_sequences == 0 or config.validation_frac == 0:
        return []
    packs = [Packed(h[0], h[1][np.argsort(h[0].hashes_D[h[1]])], config.seq_len) if h else None for h in held]
    source_G, place_G = schedule([s.weight for s in config.sources], 0, config.validation_sequences)
    picked = [(packs[i], int(p)) for i, p in zip(source_G, place_G)]
    sequences = [pack.sequence(place) for pack, place in picked if pack is not None and place < len(pack)]
    if not sequences:
        documents = sum(len(h[1]) for h in held if h)
        raise ValueError(
            f"no validation sequence: the {documents} held-out documents (data.validation_frac="
            f"{config.validation_frac}) do not fill one of data.seq_len={config.seq_len} + 1 tokens; raise "
            "data.validation_frac, or set data.validation_sequences=0 to go without"
        )
    return sequences


def _fingerprint(
    config: DataConfig,
    opened: list[Documents | TokenStore],
    train: list[TrainSource],
    tokenizer: Tokenizer,
    validation: list[Sequence],
) -> dict[str, Any]:
    """What the data was, in JSON: enough to recognise it, and to say so when a resumed run finds something else."""
    sources = []
    for source, part in zip(opened, train):
        if part.store is not None:
            counts = {key: part.store.manifest[key] for key in ("documents", "tokens", "text_bytes")}
            about = {"hash": part.store.manifest["fingerprint"], **part.store.manifest["source"], **counts}
        else:
            assert isinstance(source, Documents)
            about = {"hash": digest([source.content, tokenizer.hash]), **source.about, "streaming": True}
        sources.append({**about, "weight": part.weight})
    return {
        "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "sources": sources,
        "validation": {"sequences": len(validation), "seq_len": config.seq_len, "frac": config.validation_frac},
    }
