"""Tables of runs: CSV, TSV, JSON, JSON Lines and Parquet, one row a run; also what the web page of W&B exports.

Columns are recognised by their names (columns.py). Whatever is not is kept under its own name. A table whose columns
hold the facts of lowprec (`facts.parameters.non_embedding`, ... as W&B flattens a config) is read as if from run
folders.

The loss is taken to be in nats per token, unless `loss_unit` says bits per token, which are multiplied by ln 2. Bits or
nats per byte are refused, by the name of the column: how many bytes a token has is not in the table.
"""

import contextlib
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.sources import STATUS_NUMBERS, Found
from lowprec.scaling.sources.columns import NEEDED, WITHOUT_EMBEDDINGS, is_missing, match, number, plain
from lowprec.scaling.sources.facts import Ending, Row, float_of, row_of, ungrouped
from lowprec.scaling.table import LABELS, NUMBERS, OPERANDS, REFERENCE, Dropped

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
LOSSES = ("loss", "loss_hp", "delta")

_PER_BYTE = re.compile(r"(^|_)(bpb|bpc|(bits|nats)_per_(byte|char|character))(_|$)")
_BITS = re.compile(r"(^|_)(bits|bpt)(_|$)")
_PERPLEXITY = re.compile(r"(^|_)(ppl|perplexity)(_|$)")
_FACTS = re.compile(r"(config\.)?facts\.(.+)")
_TEXTS = ("name", "hash", "plan", "tokenizer", "format", "element", "precision", "optimizer", "shape", "loss_unit")
_CHART = re.compile(r".+ - .+__(MIN|MAX)")


def load(path: Path) -> pd.DataFrame:
    """A file as columns of objects; cells of CSV are strings, "" = empty. Raises ValueError with one sentence."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path).astype(object)
            return frame.where(frame.notna(), None)
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path)
        return as_columns(_records(path))
    except (ValueError, UnicodeDecodeError, ImportError, OSError) as error:  # pandas' own errors are ValueErrors
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {why}") from None


def as_columns(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of JSON as columns; what is nested is named `outer.inner`."""
    return pd.DataFrame([_flat(record) for record in records], dtype=object)


def _read_csv(path: Path) -> pd.DataFrame:
    """Cells as they stand: pandas would take the hash `12e45` for a number and the label `None` for nothing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        mark = max(",\t;", key=file.readline().count)
        file.seek(0)
        rows = [row for row in csv.reader(file, delimiter=mark) if row]
    if not rows:
        raise ValueError("it is empty")
    header = [name.strip() or f"column {i + 1}" for i, name in enumerate(rows[0])]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"column {twice[0]!r} is there twice")
    for i, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} cells and the header has {len(header)}")
    return pd.DataFrame(rows[1:], columns=header, dtype=object)


def _records(path: Path) -> list[Mapping[str, Any]]:
    """Objects of a JSON file (a list, or {"runs": a list}) or of JSON Lines, where a torn last line is ignored."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        node = json.loads(text)
        node = next((value for value in node.values() if isinstance(value, list)), node) if _is_map(node) else node
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        node = [json.loads(line) for line in lines[:-1]]
        with contextlib.suppress(json.JSONDecodeError):
            node += [json.loads(line) for line in lines[-1:]]
    if not isinstance(node, list) or not all(map(_is_map, node)):
        raise ValueError("a table of runs is a list of objects, one a run")
    return node


def _is_map(node: Any) -> bool:
    return isinstance(node, Mapping)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Row:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay."""
    flat: Row = {}
    for key, value in record.items():
        if _is_map(value):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_table(raw: pd.DataFrame, source: str, wanted: Mapping[str, str], loss_unit: str = "nats") -> Found:
    """The runs of a table.

    Args:
        raw: as :func:`load` gives it.
        source: path or URL.
        wanted: {column of the run table: the source's name}, the user's own.
        loss_unit: "nats" or "bits", per token.

    Raises ValueError with one sentence if what a run table needs is not there.
    """
    if raw.empty:
        raise ValueError(f"{source} holds no runs")
    raw = raw.set_axis([str(name) for name in raw.columns], axis=1)
    if not any(_FACTS.fullmatch(name) for name in raw.columns):
        return _read_plain(raw, source, wanted, loss_unit)
    rows, dropped, plain_rows = _read_facts(raw, source)
    found = [Found(pd.DataFrame(rows), tuple(dropped))]
    if plain_rows:
        others = raw.iloc[plain_rows].dropna(axis=1, how="all")
        try:
            found.append(_read_plain(others, source, wanted, loss_unit))
        except ValueError as error:
            lost = [Dropped(_name(raw.iloc[i], source, i), f"it has no facts, and {error}", source) for i in plain_rows]
            found.append(Found(pd.DataFrame(), tuple(lost)))
    frame = pd.concat([part.frame for part in found if len(part.frame)] or [pd.DataFrame()], ignore_index=True)
    return Found(frame, sum((part.dropped for part in found), ()), sum((part.notes for part in found), ()))


# ---- tables of other people


def _read_plain(raw: pd.DataFrame, source: str, wanted: Mapping[str, str], loss_unit: str) -> Found:
    names = match(list(raw.columns), wanted, source)
    notes: list[str] = []
    bits = check_units(list(raw.columns), {c: name for c, (name, _) in names.items()}, source, loss_unit)
    check_needed(list(raw.columns), set(names), source, curves=_of_curves(raw, names))
    columns: dict[str, Any] = {}
    taken = {name for name, _ in names.values()}
    for column, (name, factor) in names.items():
        if column in NUMBERS or column in STATUS_NUMBERS:
            try:
                values = _numbers(raw[name], column, name, source) * factor
            except ValueError:
                if column in (*NEEDED, *wanted) or name == column:
                    raise
                notes.append(f"{source}: column {name!r} is not taken as {column}, since not all of it are numbers")
                taken.remove(name)
                continue
            columns[column] = values * math.log(2) if bits and column in LOSSES else values
        else:
            columns[column] = [None if is_missing(value) else str(value) for value in raw[name]]
    if bits:
        notes.append(f"{source}: losses were in bits and are multiplied by ln 2")
    loss = names.get("loss", ("", 1.0))[0]
    if plain(loss) != "loss" and "loss" in raw.columns and "loss" not in wanted:
        notes.append(f"{source}: the loss is its column {loss!r}; `loss` is taken as that of training")
    for name in raw.columns:
        if name not in taken:
            columns[f"{name}_in_source" if name in (*NUMBERS, *LABELS) else name] = extra(raw[name])
    frame = pd.DataFrame(columns)
    return Found(_finish(frame, {column: name for column, (name, _) in names.items()}, source), (), tuple(notes))


def _finish(frame: pd.DataFrame, names: Mapping[str, str], source: str) -> pd.DataFrame:
    """What follows from the columns of a table: names of runs, what N counts, labels of precisions."""
    stem = source.rpartition("/")[2].rpartition(".")[0] or source
    if "run" not in frame:
        frame["run"] = [f"{stem}:{i + 1}" for i in range(len(frame))]
    if "N" in names and plain(names["N"]) in WITHOUT_EMBEDDINGS:
        kind: str | None = "non_embedding"
    else:  # where all parameters are given beside N, N is without embeddings
        kind = "non_embedding" if "N" in frame and "N_total" in frame else None
    if "N" not in frame and "N_total" in frame:
        frame["N"], kind = frame["N_total"], "total"
    if kind and "_n_kind" not in frame:
        frame["_n_kind"] = kind
    if "_run_id" in frame and frame["_run_id"].duplicated().any():
        frame = frame.rename(columns={"_run_id": names["_run_id"]})
    if "precision" in frame:
        frame["precision"] = [None if is_missing(label) else reference(label) for label in frame["precision"]]
    elif {"fwd", "bwd"} <= set(frame.columns):
        pairs = zip(frame["fwd"], frame["bwd"])
        frame["precision"] = [REFERENCE if reference(f) == reference(b) == REFERENCE else f"{f}/{b}" for f, b in pairs]
    elif {"bits_w", "bits_a"} <= set(frame.columns):
        pairs = zip(frame["bits_w"], frame["bits_a"])
        frame["precision"] = [REFERENCE if w == a == 16 else f"w{w:g}a{a:g}" for w, a in pairs]
    if "source" not in frame:
        frame["source"] = source
    frame["_origin"] = source
    frame["_label"] = frame["run"] if "run" in names else ""
    return frame


def reference(label: Any) -> str:
    """`BF16` and `bfloat16` -> `bf16`; other labels as they are."""
    return REFERENCE if str(label).strip().lower() in (REFERENCE, "bfloat16") else str(label)


def _of_curves(raw: pd.DataFrame, names: Mapping[str, tuple[str, float]]) -> bool:
    """Whether the rows stand for curves of a curve table."""
    return "curve" in names and any("#" in str(value) for value in raw[names["curve"][0]])


def check_needed(have: Sequence[str], found: set[str], source: str, curves: bool = False) -> None:
    """Raises ValueError if there is no loss, or fewer than two of N, D and C. Of `curves`, less need be known."""
    sizes = found & {"N", "D", "C"} | ({"N"} if "N_total" in found else set())
    if {"loss", "delta"} & found and (curves or len(sizes) >= 2):
        return
    if any(_CHART.fullmatch(name) for name in have):
        raise ValueError(f"{source} is the export of a chart: export the table of runs, or read wandb://entity/project")
    lost = "loss" if not {"loss", "delta"} & found else next(name for name in "NDC" if name not in sizes)
    more = "" if lost == "loss" else " (two of N, D and C are enough)"
    raise ValueError(
        f"{source} has no column for {lost}{more}: say which it is, --columns {lost}=NAME; it has {', '.join(have)}"
    )


def check_units(have: Sequence[str], names: Mapping[str, str], source: str, loss_unit: str) -> bool:
    """Whether the losses are in bits per token. Raises ValueError if they are in a unit that has no way to nats."""
    losses = [names[column] for column in LOSSES if column in names]
    for name in losses or have:
        if _PER_BYTE.search(plain(name)):
            raise ValueError(
                f"{source}: column {name!r} is per byte or character, and a run table needs nats per token: "
                "multiply by the bytes per token (bits also by ln 2)"
            )
        if _PERPLEXITY.search(plain(name)):
            raise ValueError(
                f"{source}: column {name!r} is a perplexity: give its logarithm, the loss in nats per token"
            )
        if name in losses and _BITS.search(plain(name)) and loss_unit != "bits":
            raise ValueError(
                f"{source}: column {name!r} is in bits: say --loss-unit bits, and it is multiplied by ln 2"
            )
    return loss_unit == "bits" and not any(re.search("(^|_)nats(_|$)", plain(name)) for name in losses)


def _numbers(values: pd.Series, column: str, name: str, source: str) -> np.ndarray:
    """A column as float64 (rows,). A loss that is written but not finite becomes infinite: the run diverged."""
    out = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            out[i] = number(value)
        except ValueError as error:
            raise ValueError(f"{source}, row {i + 1}: column {name!r} is taken as {column}, but {error}") from None
        if column == "loss" and not math.isfinite(out[i]) and (isinstance(value, float) or _is_nan(value)):
            out[i] = math.inf
    return out


def _is_nan(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in ("nan", "inf", "infinity", "-inf", "-infinity")


def extra(values: pd.Series) -> pd.Series | list[Any]:
    """A column that nobody uses: numbers if all its cells are plain numbers, otherwise text as it was."""
    texts = [None if is_missing(value) else value for value in values]
    try:
        found = [math.nan if text is None else float(text) for text in texts]
    except (TypeError, ValueError):
        return texts
    if any(isinstance(text, bool) for text in texts):
        return texts
    same = all(
        text is None or not isinstance(text, str) or repr(x) in (text, f"{text}.0") for text, x in zip(texts, found)
    )
    return pd.Series(found, index=values.index) if same and any(text is not None for text in texts) else texts


# ---- tables that hold facts of lowprec


def _read_facts(raw: pd.DataFrame, source: str) -> tuple[list[Row], list[Dropped], list[int]]:
    """(rows of the runs with facts, those left out, positions of the runs without facts)."""
    rows, dropped, others = [], [], []
    for i, record in enumerate(raw.to_dict("records")):
        facts = _facts(record)
        if not facts:
            others.append(i)
            continue
        logged = {n: v for n, v in record.items() if not (n.startswith("config.") or is_missing(v))}
        grouped_last = sorted(logged.items(), key=lambda kv: "/" in kv[0])  # a run resumed by a newer version has both
        measured = {plain(ungrouped(n)): v for n, v in grouped_last}
        name = _name(record, source, i)
        try:
            row = row_of(facts, _ending(measured))
        except ValueError as error:
            dropped.append(Dropped(name, str(error), source))
            continue
        state, run_id = measured.get("state"), measured.get("id", measured.get("run_id"))
        row |= {"run": name, "source": record.get("source") or source, "_origin": "wandb"}
        row |= {"_run_id": run_id, "_state": row.get("_state") or state, "curve": record.get("curve")}
        rows.append(row)
    return rows, dropped, others


def _ending(measured: Mapping[str, Any]) -> Ending:
    """From the summary of a run, the last value of everything that it logged."""
    step, tokens = float_of(measured.get("step")), float_of(measured.get("tokens"))
    texts = [str(measured.get(name, "")).lower() for name in ("loss", "val_loss")]
    loss, loss_hp = (float_of(measured.get(name)) for name in ("val_loss", "val_loss_high_precision"))
    broken = any(text in ("nan", "inf", "infinity", "-infinity") for text in texts)
    return Ending(step, tokens, float_of(measured.get("lr")), step, tokens, loss, loss_hp, not broken, math.nan)


def _facts(record: Mapping[str, Any]) -> Row:
    """Facts out of flattened columns; {} if the row has none. Cells of CSV are JSON, or text."""
    facts: Row = {}
    for name, value in record.items():
        if (found := _FACTS.fullmatch(name)) and not is_missing(value):
            path = found[2].split(".")
            if path[0] == "operands" and len(path) >= 3:  # operands bear a dot in their names
                path[1:3] = [f"{path[1]}.{path[2]}"]
            node = facts
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = value if path[-1] in _TEXTS else _cell(value)
    if facts:
        operands: Row = dict.fromkeys(OPERANDS) | facts.get("operands", {})
        facts = {"precision_schedule": [], **facts, "operands": operands}
        for operand in filter(None, operands.values()):
            operand.setdefault("exponent_bits", None)
            operand.setdefault("mantissa_bits", None)
    return facts


def _cell(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _name(record: Mapping[str, Any] | pd.Series, source: str, i: int) -> str:
    for name, value in record.items():
        if plain(str(name)) in ("name", "run", "display_name") and not is_missing(value):
            return str(value)
    return f"{source}:{i + 1}"
