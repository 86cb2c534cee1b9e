"""What to train on: the dataclasses behind the `data:` node of a run (the YAML files of `recipes/data/`).

Plain dataclasses of enums, lists and optional values, because Hydra checks YAML and command lines against them. Errors
of value are raised by `check()`; errors of content (a missing file, a wrong field) when the source is opened.
"""

import math
from dataclasses import dataclass, field
from enum import Enum


class SourceKind(Enum):
    stdlib = "stdlib"  # the source code of Python's own standard library: on every machine, no download
    text = "text"  # plain text files
    jsonl = "jsonl"  # one JSON object a line
    parquet = "parquet"
    hub = "hub"  # a dataset of the Hugging Face hub by name, or a dataset folder on disk
    tokens = "tokens"  # a folder written by lowprec-prepare


class TextUnit(Enum):
    """What one document of a text file is."""

    file = "file"
    paragraph = "paragraph"  # separated by blank lines
    line = "line"


@dataclass
class SourceConfig:
    """One source of documents. Without `streaming` it is tokenised once into a cache that is read by memory map."""

    kind: SourceKind = SourceKind.stdlib
    path: str | None = None  # file, folder or pattern; hub: the dataset's name or folder; stdlib: one package of it
    weight: float = 1.0  # share of the sequences (= of the tokens) of a mixture; need not sum to one
    text_field: str = "text"  # the column that holds the text (jsonl, parquet, hub)
    name: str | None = None  # hub: which configuration of the dataset
    split: str = "train"  # hub: which split
    revision: str | None = None  # hub: commit or tag; pin it to make a run repeatable
    streaming: bool = False  # tokenise while training instead of once before it
    unit: TextUnit = TextUnit.file  # text: what one document is
    exclude: list[str] | None = None  # text, stdlib: names of folders to leave out; null = a sensible list for stdlib
    limit: int | None = None  # only the first so many documents


@dataclass
class PhaseConfig:
    """Another mixture of the same sources, from some share of the run on."""

    start: float  # share of train.steps, above 0 and below 1
    weights: list[float]  # one for each source, in their order; 0 = not in this phase


@dataclass
class DataConfig:
    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    phases: list[PhaseConfig] = field(default_factory=list)  # before the first: the sources' own weights
    # "bpe:4096" trains a byte-level BPE on the sources, "byte" is one token a byte, "hub:NAME" asks the hub, anything
    # else is the path of a tokenizer.json. null = the tokenizer of a source of kind tokens if there is one, else
    # bpe:4096.
    tokenizer: str | None = None
    eos_token: str | None = None  # ends every document; null = found among the usual names
    seq_len: int = 256  # tokens
    document_masking: bool = (
        True  # attention stays inside a document and none is asked to predict the start of the next
    )
    shuffle: bool = True  # documents and sequences in a new random order every epoch
    validation_frac: float = 0.01  # of the documents, chosen by a hash of their content
    validation_sequences: int = 64  # at most; fixed for the whole run
    validation_batch: int = 8  # sequences
    cache_dir: str | None = None  # null = lowprec/ in the user's cache folder

    def check(self) -> None:
        """Raises ValueError with one sentence if a value cannot work."""
        if not self.sources:
            raise ValueError("data.sources is empty: list at least one source, e.g. [{kind: stdlib}]")
        for i, source in enumerate(self.sources):
            if not 0 < source.weight < float("inf"):
                raise ValueError(
                    f"data.sources[{i}].weight={source.weight} must be positive: remove the source to switch it off"
                )
            if source.path is None and source.kind is not SourceKind.stdlib:
                raise ValueError(
                    f"data.sources[{i}] of kind {source.kind.name} needs a path: {_PATH_HELP[source.kind]}"
                )
            if source.limit is not None and source.limit < 1:
                raise ValueError(f"data.sources[{i}].limit={source.limit} must be at least 1 document (null = all)")
            if source.streaming and source.kind is SourceKind.tokens:
                raise ValueError(
                    f"data.sources[{i}]: prepared tokens are read by memory map, so streaming must be false"
                )
        self._check_phases()
        at_least = {"seq_len": (self.seq_len, 1), "validation_sequences": (self.validation_sequences, 0),
                    "validation_batch": (self.validation_batch, 1)}  # fmt: skip
        for key, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"data.{key}={value} must be at least {least}")
        if not 0 <= self.validation_frac < 1:
            raise ValueError(
                f"data.validation_frac={self.validation_frac} must lie in [0, 1): it is a fraction, not a percentage"
            )

    def _check_phases(self) -> None:
        starts = [0.0, *(phase.start for phase in self.phases)]
        for i, phase in enumerate(self.phases):
            if not starts[i] < phase.start < 1:
                raise ValueError(
                    f"data.phases[{i}].start={phase.start} must lie above {starts[i]:g} and below 1: phases are listed"
                    " in order, by the share of train.steps at which each begins"
                )
            if (
                len(phase.weights) != len(self.sources)
                or min(phase.weights) < 0
                or not 0 < sum(phase.weights) < math.inf
            ):
                raise ValueError(
                    f"data.phases[{i}].weights={list(phase.weights)}: give each of the {len(self.sources)} sources of"
                    " data.sources a weight of 0 or more, not all 0"
                )


_PATH_HELP = {
    SourceKind.text: "a text file, a folder of .txt files, or a glob pattern like 'docs/**/*.md'",
    SourceKind.jsonl: "a .jsonl file, a folder of them, or a glob pattern",
    SourceKind.parquet: "a .parquet file, a folder of them, or a glob pattern",
    SourceKind.hub: "the dataset's name, e.g. HuggingFaceFW/fineweb-edu",
    SourceKind.tokens: "the folder that lowprec-prepare wrote",
}
