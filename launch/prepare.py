"""lowprec-prepare: turn text into token shards that any number of runs read by memory map.

    lowprec-prepare tokens/web --kind parquet --path 'web/*.parquet' --tokenizer tokenizer.json
    lowprec-prepare tokens/edu --kind hub --path HuggingFaceFW/fineweb-edu --name sample-10BT --streaming
    lowprec-train 'data.sources=[{kind: tokens, path: tokens/web, weight: 3}, {kind: tokens, path: tokens/edu}]' ...

One folder per source, mixed by weight when training. The shards hold all documents; which of them are held out for
validation is decided by their hashes when they are read, so `data.validation_frac` can still be chosen then.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lowprec.data.build import open_tokenizer
from lowprec.data.config import DataConfig, SourceConfig, SourceKind, TextUnit
from lowprec.data.sources import Documents, open_source
from lowprec.data.store import SHARD_TOKENS, TokenStore, cache_folder, write_store


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("lowprec-prepare", description="Turn text into token shards and a manifest.")
    p.add_argument("out", type=Path, help="folder to write; must not exist yet")
    p.add_argument("--kind", choices=[k.name for k in SourceKind if k is not SourceKind.tokens], default="stdlib")
    p.add_argument("--path", help="file, folder or glob pattern; for --kind hub the dataset's name or folder")
    p.add_argument(
        "--text-field", default="text", help="column that holds the text (jsonl, parquet, hub; default: %(default)s)"
    )
    p.add_argument("--name", help="hub: which configuration of the dataset")
    p.add_argument("--split", default="train", help="hub: which split (default: %(default)s)")
    p.add_argument("--revision", help="hub: commit or tag")
    p.add_argument("--streaming", action="store_true", help="hub: read without keeping a copy of the dataset on disk")
    p.add_argument("--unit", choices=[u.name for u in TextUnit], default="file", help="text: what one document is")
    p.add_argument("--exclude", nargs="*", metavar="FOLDER", help="text, stdlib: names of folders to leave out")
    p.add_argument("--limit", type=int, help="only the first so many documents")
    p.add_argument(
        "--tokenizer", default="bpe:4096", help="tokenizer.json, hub:NAME, bpe:SIZE or byte (default: %(default)s)"
    )
    p.add_argument("--eos-token", help="token that ends a document (default: found among the usual names)")
    p.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="begin a new file after this many (default: %(default)s)"
    )
    p.add_argument("--cache-dir", help="where a tokenizer trained by bpe:SIZE is kept")
    p.add_argument("--overwrite", action="store_true", help="replace a folder written by lowprec-prepare")
    return p


def prepare(a: argparse.Namespace) -> TokenStore:
    """Write the shards. Raises ValueError with one sentence if that cannot be done."""
    if a.shard_tokens < 1:
        raise ValueError(f"--shard-tokens {a.shard_tokens} must be at least 1")
    if a.out.exists() and not (a.overwrite and (a.out / "manifest.json").is_file()):
        remedy = (
            "add --overwrite to replace it"
            if (a.out / "manifest.json").is_file()
            else "it was not written by lowprec-prepare"
        )
        raise ValueError(f"{a.out} exists already: choose another folder ({remedy})")
    source = SourceConfig(kind=SourceKind[a.kind], path=a.path, text_field=a.text_field, name=a.name, split=a.split,
                          revision=a.revision, streaming=a.streaming, unit=TextUnit[a.unit], exclude=a.exclude,
                          limit=a.limit)  # fmt: skip
    config = DataConfig(sources=[source], tokenizer=a.tokenizer, eos_token=a.eos_token)
    config.check()
    documents = open_source(source, "lowprec-prepare")
    tokenizer = open_tokenizer(config, [documents], cache_folder(a.cache_dir))
    finished = a.out.with_name(a.out.name + ".new") if a.out.exists() else a.out
    shutil.rmtree(a.out.with_name(a.out.name + ".new"), ignore_errors=True)  # of a run that was killed
    write_store(finished, _with_progress(documents), tokenizer, documents.about, documents.label, a.shard_tokens)
    if finished != a.out:
        shutil.rmtree(a.out)
        finished.rename(a.out)
    return TokenStore(a.out)


def _with_progress(documents: Documents) -> Iterator[str]:
    """The documents, with a line on stderr every ten seconds."""
    begin = told = time.monotonic()
    read_bytes = 0
    for count, text in enumerate(documents.read(), 1):
        read_bytes += len(text)
        yield text
        if time.monotonic() - told > 10:
            told = time.monotonic()
            rate = read_bytes / 1e6 / (told - begin)
            print(f"{count:,} documents, {read_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s", file=sys.stderr, flush=True)


def main() -> None:
    arguments = parser().parse_args()
    begin = time.monotonic()
    try:
        store = prepare(arguments)
    except ValueError as error:
        sys.exit(f"lowprec-prepare: {error}")
    m = store.manifest
    print(
        f"{m['documents']:,} documents, {m['tokens']:,} tokens of {m['tokenizer']['name']} "
        f"({m['vocab_size']:,} entries), {m['text_bytes'] / m['tokens']:.2f} bytes a token, "
        f"{len(m['shards'])} shard(s), {time.monotonic() - begin:.1f} s\n"
        f"train on it with: data.sources='[{{kind: tokens, path: {arguments.out}}}]'"
    )


if __name__ == "__main__":
    main()
