"""Text to training batches: sources, tokenizers, packing, mixtures, and a loader that resumes on any number of ranks.

config.py     what to train on: the dataclasses behind the `data:` node
sources.py    documents of the standard library, text, JSONL, Parquet, or the Hugging Face hub
tokenizer.py  any tokenizer.json, one token a byte, or a byte-level BPE trained on the spot
store.py      tokenised documents on disk, read by memory map
packing.py    documents end to end, cut into sequences; targets and document masking
streaming.py  the same from a source that is tokenised while training
loader.py     mixture, global batches, ranks, state
build.py      puts them together: build_data(config, seed) -> Data
"""

from lowprec.data.build import Data, build_data
from lowprec.data.config import DataConfig, PhaseConfig, SourceConfig, SourceKind, TextUnit
from lowprec.data.loader import Loader, Step, TrainData
from lowprec.data.packing import IGNORED, Batch
from lowprec.data.tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "Data",
    "DataConfig",
    "Loader",
    "PhaseConfig",
    "SourceConfig",
    "SourceKind",
    "Step",
    "TextUnit",
    "Tokenizer",
    "TrainData",
    "build_data",
]
