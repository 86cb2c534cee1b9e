"""Tables of whole curves: many rows a run, one a step, with `step`, `loss` and, for laws of schedules, `lr`.

    size_M,schedule,step,lr,loss
    25,cosine_24000,128,1.7e-5,9.01
    25,cosine_24000,256,3.5e-5,7.64

The columns that do not belong to a step say which run a row is of, and together they are its key, `25/cosine_24000`.
Such a table gives one row a run, with the loss of the last step and `curve` = `PATH#KEY`, which :func:`read_curve`
opens. How many tokens the run has seen is known only if there is a column for it.

A curve is a frame of `step`, `lr` (NaN where unknown), `loss` (of training; NaN where the step was not finite) and
`val_loss` (NaN where it was not evaluated), in the order of the steps.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.sources import Found
from lowprec.scaling.sources.columns import NAMES, number, plain
from lowprec.scaling.sources.exports import SUFFIXES, load, read_table
from lowprec.scaling.sources.facts import last_attempt
from lowprec.scaling.sources.folders import parse
from lowprec.scaling.table import LABELS

STEP = ("step", "iter", "iteration", "global_step")
CURVE = ("step", "lr", "loss", "val_loss")
RUN = ("N", "N_total", "seed", "run", "_run_id", *LABELS)  # columns that say which run a row is of


def is_curve_table(raw: pd.DataFrame) -> bool:
    """Whether a table has a row a step: a column of steps, and three rows a run or more."""
    if not any(plain(name) in STEP for name in raw.columns) or len(raw) < 3:
        return False
    key = key_columns(raw)
    return len(raw) >= 3 * (len(raw[key].astype(str).drop_duplicates()) if key else 1)


def key_columns(raw: pd.DataFrame) -> list[str]:
    """The columns that say which run a row is of: those of a name that does, and those of text."""
    names = {plain(c) for c in RUN} | {alias for c in RUN for group in NAMES.get(c, ()) for alias in group}
    names |= {f"{name}_{unit}" for name in names for unit in "mb"}
    return [
        name for name in raw.columns
        if plain(name) in names or (plain(name) not in (*STEP, *_of_a_step()) and not _numeric(raw[name]))
    ]  # fmt: skip


def _of_a_step() -> set[str]:
    return {"loss", "lr", *(alias for c in ("loss", "lr", "D") for group in NAMES[c] for alias in group)}


def _numeric(values: pd.Series) -> bool:
    try:
        for value in values.iloc[:100]:
            number(value)
    except ValueError:
        return False
    return True


def read_curves(raw: pd.DataFrame, source: str, wanted: Mapping[str, str], loss_unit: str = "nats") -> Found:
    """One row a run: its last step, with the peak learning rate. Raises ValueError as :func:`read_table` does."""
    if loss_unit != "nats":
        raise ValueError(
            f"{source} holds whole curves, which are read as they are: give their losses in nats per token"
        )
    key = key_columns(raw)
    step = next(name for name in raw.columns if plain(name) in STEP)
    lr = next((name for name in raw.columns if plain(name) in ("lr", *NAMES["lr"][0])), None)
    rows = []
    for name, group in _groups(raw, key):
        steps = np.array([number(value) for value in group[step]])
        row = group.iloc[int(steps.argmax())].to_dict() | {"run": name, "curve": f"{source}#{name}"}
        if lr:
            row[lr] = max(number(value) for value in group[lr])
        rows.append(row)
    last = pd.DataFrame(rows, dtype=object)
    return read_table(last, source, wanted, loss_unit)


def _groups(raw: pd.DataFrame, key: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """(key of a run, its rows), in order of their first row."""
    if not key:
        return [("run", raw)]
    names = raw[key].astype(str).agg("/".join, axis=1)
    return [(str(name), group) for name, group in raw.groupby(names, sort=False)]


def read_curve(ref: str) -> pd.DataFrame:
    """The curve that the column `curve` of a run table names: the path of a metrics.jsonl, or `PATH#KEY` of a table.

    Returns:
        A frame of `CURVE`, float64, in the order of the steps.

    Raises ValueError if there is no such curve.
    """
    if ref.startswith("wandb://"):
        from lowprec.scaling.sources.wandb_api import fetch_curve

        return as_curve(fetch_curve(ref))
    name, _, key = ref.rpartition("#")
    in_table = bool(key) and Path(name).suffix in SUFFIXES
    path = Path(name if in_table else ref)
    if not path.is_file():
        raise ValueError(f"there is no curve at {path}: the run table names a file that was moved or removed")
    if path.suffix == ".wandb":
        from lowprec.scaling.sources.wandb_files import read_history

        return as_curve(read_history(path))
    if not in_table:
        try:
            return as_curve(parse(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    raw = load(path)
    for found, group in _groups(raw, key_columns(raw)):
        if found == key:
            curve = _frame([_record(row) for row in group.to_dict("records")]).dropna(subset="step")
            ordered = curve.sort_values("step", kind="stable")  # tables have their rows in any order
            return ordered.drop_duplicates("step", keep="last").reset_index(drop=True)
    raise ValueError(f"{path} has no run {key!r}: its curves were named anew since the run table was made")


def _record(row: Mapping[str, object]) -> dict[str, object]:
    """A row of a curve table under the names of `CURVE`."""
    names = dict.fromkeys(STEP, "step") | dict.fromkeys(("lr", *NAMES["lr"][0]), "lr")
    names |= dict.fromkeys(NAMES["loss"][0], "val_loss") | dict.fromkeys((*NAMES["loss"][1], *NAMES["loss"][2]), "loss")
    return {names[plain(name)]: value for name, value in row.items() if plain(name) in names}


def as_curve(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of a log (steps that were done again are left out) as a curve."""
    return _frame(last_attempt(records)[0])


def _frame(records: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    rows = [[number(record.get(name)) for name in CURVE] for record in records]
    return pd.DataFrame(rows, columns=CURVE, dtype=np.float64)
