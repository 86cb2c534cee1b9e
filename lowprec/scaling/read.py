"""read: run folders, tables and W&B, in any mix, as one RunTable; read_curve: the whole curve of one run.

    read(["runs/ladder"])                                      run folders, wherever under it they are
    read(["old.csv", "runs/ladder"], columns={"D": "toks"})    tables: CSV, TSV, JSON, JSON Lines, Parquet
    read(["wandb://me/ladder"])                                a W&B project; also .wandb files and offline-run folders

What a table cannot be without is said in one sentence (a missing column, a loss in bits or per byte, N with
embeddings here and without them there). What is derived is said in `notes`: with two of N, D and C the third follows
from C = 6 N D. What is left out is in `dropped`, with the reason (clean.py).

The result does not depend on the order of the sources, but for the order of the rows. `RunTable.to_csv` and back gives
the same table: what N counts travels in the column `n_kind`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lowprec.scaling.clean import clean
from lowprec.scaling.sources import STATUS, STATUS_NUMBERS, Found, exports
from lowprec.scaling.sources.columns import check_map
from lowprec.scaling.sources.curve_tables import is_curve_table, read_curve, read_curves
from lowprec.scaling.sources.folders import LOG, Progress, find, read_folders
from lowprec.scaling.table import LABELS, NUMBERS, OPERANDS, Dropped, RunTable

__all__ = ["read", "read_curve"]

KINDS = ("non_embedding", "total")
ORDER = ("run", "N", "N_total", "D", "C", "loss", "loss_hp", "delta", "precision", *OPERANDS, "bits_w", "bits_a",
         "bits_kv", "bits_g", "exponent_bits", "mantissa_bits", "block", "gmse_w", "gmse_a", "gmse_g",
         "quantized_frac", "unique_tokens", "N_mean", "schedule", "optimizer", "lr", "seed", "data", "plan", "curve",
         "source")  # fmt: skip


def read(
    sources: Sequence[str | Path],
    *,
    columns: Mapping[str, str] | None = None,
    n_kind: str | None = None,
    loss_unit: str = "nats",
    keep_unfinished: bool = False,
    progress: Progress | None = None,
    cache: str | Path | None = None,
) -> RunTable:
    """The runs of all sources.

    Args:
        sources: folders, files and wandb://entity/project, see above.
        columns: {column of the run table: its name in tables}, for names that are not recognised.
        n_kind: what N counts, "non_embedding" or "total", where a source does not say; and what it shall count where a
            source has both. None: as the sources say.
        loss_unit: "nats" or "bits" per token, of tables that do not say.
        keep_unfinished: see :func:`lowprec.scaling.clean.clean`.
        progress: called with (runs done, runs in all) of a source, now and then.
        cache: a folder that keeps what was read from W&B, so that the next time no network is needed.

    Raises ValueError with one sentence.
    """
    if loss_unit not in ("nats", "bits"):
        raise ValueError(f"--loss-unit {loss_unit}: it can be nats or bits, per token")
    if n_kind not in (None, *KINDS):
        raise ValueError(f"--n-kind {n_kind}: it can be {' or '.join(KINDS)}")
    if not sources:
        raise ValueError("there is nothing to read: give run folders, tables or wandb://entity/project")
    wanted = dict(columns or {})
    check_map(wanted)
    found: list[Found] = []
    folders: dict[str, str] = {}  # absolute path -> as given: each is read once
    offline: dict[str, str] = {}
    for source in dict.fromkeys(map(str, sources)):
        path = Path(source)
        if source.startswith("wandb://"):
            raw = _project(source, Path(cache) if cache else None, progress)
            found.append(exports.read_table(raw, source, wanted, loss_unit))
        elif path.is_dir() or path.name == LOG or path.suffix == ".wandb":
            logs, files = _under(path)
            folders = {os.path.abspath(folder): folder for folder in logs} | folders
            offline = {os.path.abspath(file): file for file in files} | offline
        elif path.suffix in exports.SUFFIXES:
            raw = exports.load(path)
            reader = read_curves if is_curve_table(raw) else exports.read_table
            found.append(reader(raw, source, wanted, loss_unit))
        else:
            known = ", ".join(exports.SUFFIXES)
            raise ValueError(f"{source} is not there, or no folder, {known}, .wandb or wandb://entity/project")
    if folders:
        found.append(read_folders(list(folders.values()), progress))
    if offline:
        from lowprec.scaling.sources.wandb_files import read_files

        found.append(read_files([Path(file) for file in offline.values()]))
    return _table(found, n_kind, keep_unfinished)


def _project(url: str, cache: Path | None, progress: Progress | None) -> pd.DataFrame:
    """The runs of a W&B project, from the server or the cache."""
    from lowprec.scaling.sources.wandb_api import fetch

    runs = fetch(url, cache, progress)
    return exports.load(runs) if isinstance(runs, Path) else exports.as_columns(runs)


def _under(path: Path) -> tuple[list[str], list[str]]:
    """(run folders, .wandb files) that a path stands for."""
    if path.is_dir():
        logs, files = find(str(path))
        if not logs and not files:
            raise ValueError(f"there is no {LOG} and no .wandb file under {path}: a table is given by its own path")
        return logs, files
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    return ([str(path.parent)], []) if path.name == LOG else ([], [str(path)])


def _table(found: Sequence[Found], n_kind: str | None, keep_unfinished: bool) -> RunTable:
    """One table out of what the sources hold."""
    notes = [note for part in found for note in part.notes]
    dropped = tuple(lost for part in found for lost in part.dropped)
    frames = [part.frame for part in found if len(part.frame)]
    if not frames:
        raise ValueError(f"no run can be used: {_reasons(dropped)}" if dropped else "the sources hold no runs")
    frame = _typed(pd.concat([part.astype(object) for part in frames], ignore_index=True))
    frame, kind = _count_alike(frame, n_kind, notes)
    _complete(frame, notes)
    table = clean(RunTable(frame, kind, dropped, tuple(notes)), keep_unfinished=keep_unfinished)
    if not len(table):
        raise ValueError(f"no run can be used: {_reasons(table.dropped)}")
    frame = _named(table.frame)
    frame = frame.drop(columns=[name for name in STATUS if name in frame])
    frame = frame[[name for name in frame if frame[name].notna().any()]]
    extras = sorted(name for name in frame if name not in ORDER)
    frame = frame[[*(name for name in ORDER if name in frame), *extras]]
    return dataclasses.replace(table, frame=frame, notes=tuple(dict.fromkeys(table.notes)))


def _reasons(dropped: Sequence[Dropped]) -> str:
    """The commonest reasons, with an example of each."""
    runs: dict[str, list[str]] = {}
    for lost in dropped:
        runs.setdefault(lost.reason, []).append(lost.run)
    common = sorted(runs, key=lambda reason: -len(runs[reason]))[:3]
    return "; ".join(
        f"{runs[why][0]}" + (f" and {len(runs[why]) - 1} more" * (len(runs[why]) > 1)) + f": {why}" for why in common
    )


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as float64, labels as text or None; of other columns those with numbers only are numbers, others text."""
    columns = {}
    for name in frame.columns:
        values = frame[name]
        if name in (*NUMBERS, *STATUS_NUMBERS):
            columns[name] = values.astype(np.float64)
            continue
        missing = values.isna()
        if name not in (*LABELS, *STATUS) and all(isinstance(value, (int, float)) for value in values[~missing]):
            columns[name] = values.astype(np.float64)
        else:
            texts = [None if gone else str(value) for value, gone in zip(values, missing)]
            columns[name] = pd.Series(texts, index=frame.index, dtype=object)
    return pd.DataFrame(columns)


def _count_alike(frame: pd.DataFrame, n_kind: str | None, notes: list[str]) -> tuple[pd.DataFrame, str]:
    """N counts the same in all rows, and what that is. Raises ValueError if that cannot be had."""
    said = frame["_n_kind"] if "_n_kind" in frame else pd.Series(None, index=frame.index, dtype=object)
    kinds = sorted(said.dropna().unique())
    if odd := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(
            f"{frame['source'][said == odd[0]].iloc[0]}: n_kind is {odd[0]!r}; it can be {' or '.join(KINDS)}"
        )
    if len(kinds) == 2 and not n_kind:
        one, two = (frame["source"][said == kind].iloc[0] for kind in KINDS)
        whole = "N_total" in frame and frame["N_total"].notna()[said == "non_embedding"].all()
        fix = (
            "--n-kind total makes them alike"
            if whole
            else "give the total for all, as column N_total, or leave one out"
        )
        raise ValueError(f"N counts no embeddings in {one}, and all parameters in {two}: {fix}")
    kind = n_kind or (kinds[0] if kinds else "non_embedding")
    other = said.notna() & (said != kind)
    if other.any() and kind == "non_embedding":
        raise ValueError(
            f"--n-kind {kind}: {frame['source'][other].iloc[0]} counts all parameters and does not tell those"
        )
    if other.any():
        if "N_total" not in frame or frame["N_total"][other].isna().any():
            where = frame["source"][other].iloc[0]
            raise ValueError(f"--n-kind {kind}: {where} counts no embeddings and has no column N_total")
        frame["N"] = frame["N"].where(~other, frame["N_total"])
    if not n_kind and said.isna().any() and "N" in frame and frame["N"][said.isna()].notna().any():
        where = ", ".join(frame["source"][said.isna()].unique()[:3])
        meaning = "parameters without embeddings" if kind == "non_embedding" else "all parameters"
        notes.append(f"{where} does not say what N counts; it is taken as {meaning} (--n-kind says otherwise)")
    return frame, kind


def _complete(frame: pd.DataFrame, notes: list[str]) -> None:
    """Fills in, in place, what follows from the other columns."""
    for name in ("N", "D", "C"):
        if name not in frame:
            frame[name] = math.nan
    N, D, C = frame["N"].copy(), frame["D"].copy(), frame["C"].copy()
    for name, value, formula in (
        ("N", C / (6 * D), "C / (6 D)"),
        ("D", C / (6 * N), "C / (6 N)"),
        ("C", 6 * N * D, "6 N D"),
    ):
        gap = frame[name].isna() & value.notna()
        if gap.any():
            frame[name] = frame[name].where(~gap, value)
            notes.append(f"{name} = {formula} for {_count(gap)}")
    ratio = (C / (6 * N * D)).dropna()
    if len(ratio) and not 1 / 3 < ratio.median() < 3:
        notes.append(
            f"C is {ratio.median():.3g} times 6 N D in the middle of the runs that have all three: check the units"
        )
    for name in ("N", "D"):
        if frame[name].max() < 1e4:
            notes.append(
                f"{name} is at most {frame[name].max():g}: check its unit (a name such as {name}_M means millions)"
            )
    for name, other in (("unique_tokens", "D"), ("N_mean", "N")):
        if name not in frame:
            frame[name] = math.nan
        gap = frame[name].isna() & frame[other].notna()
        frame[name] = frame[name].where(~gap, frame[other])
        if gap.any() and not gap.all():
            notes.append(f"{name} = {other} for {_count(gap)}, whose sources do not say")


def _count(mask: pd.Series) -> str:
    return "all runs" if mask.all() else f"{int(mask.sum())} of {len(mask)} runs"


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Names that are there once: of runs that share one, the source is added, and where that does not help a number."""
    name = frame["run"].copy()
    shared = name.duplicated(keep=False)
    if "source" in frame:
        name = name.where(~shared, name + " (" + frame["source"].fillna("") + ")")
    order = frame.assign(_name=name).sort_values(
        [c for c in ("_name", "D", "loss", "precision") if c in frame or c == "_name"]
    )
    place = order.groupby("_name", sort=False).cumcount() + 1
    shared = name.duplicated(keep=False)
    return frame.assign(run=name.where(~shared, name + " #" + place.reindex(frame.index).astype(str)))
