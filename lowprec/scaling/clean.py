"""Which runs a law may be fitted to. What is left out is listed with its reason; what is merely odd is named in a note.

Left out, in this order (a run has one reason):

    diverged       exit code 70; a loss that is not finite or not positive; a training loss that ends more than 0.5 nats
                   above its lowest mean
    unfinished     fewer steps than planned; a W&B run that crashed or still runs; a learning rate that has not decayed
                   as the schedule wants. A loss before the decay is higher than the final one that laws speak of.
    no loss        none of held-out text, or not at the last step; no N or D
    mislabelled    a folder, name or label that says FP8 although nothing is quantised, or bf16 although something is:
                   such comparisons have been published
    twice          the same run again: the same run id, or the same numbers

Named in a note: losses above 11 nats (a uniform guess among 60,000 tokens), losses above that of a smaller run with
fewer tokens, labels that stand for several recipes, several data sets, losses that differ between sources by the factor
of nats and bits.
"""

import bisect
import dataclasses
import math
import re
from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import pandas as pd

from lowprec.scaling.table import OPERANDS, REFERENCE, Dropped, RunTable

DIVERGED = 70  # exit code
RISE = 0.5  # nats
DECAYED = 0.1  # of the way from the last learning rate to the peak
GUESS = 11.0  # nats
ABOVE = 1.05  # times the loss of a run that had less of everything
LN2 = math.log(2)

BITS = ("bits_w", "bits_a", "bits_kv", "bits_g")
_EDGE, _END = r"(?<![a-z0-9])", r"(?![a-z0-9])"
_LOW = re.compile(_EDGE + r"(nvfp4|(mx)?fp[468]|(mx)?int[2348]|w(?!16)\d{1,2}a\d{1,2}|w16a(?!16)\d{1,2}|bitnet)" + _END)
_PARTLY = re.compile(" and others$| with attention| from ")  # see facts.label_of
_HIGH = re.compile(_EDGE + r"(bf16|bfloat16|fp16|fp32|w16a16)" + _END)


def clean(table: RunTable, *, keep_unfinished: bool = False) -> RunTable:
    """The runs that finished and are what they say, each once; the others are added to `dropped`, remarks to `notes`.

    Args:
        table: runs of any source; what it does not say (see :data:`lowprec.scaling.sources.STATUS`) is not judged.
        keep_unfinished: runs that stopped early or have not decayed stay, with the tokens of their last validation.
    """
    frame = table.frame.reset_index(drop=True)
    reasons = [_reason(row, keep_unfinished) for row in frame.to_dict("records")]
    for i, why in _twice(frame, [not reason for reason in reasons]).items():
        reasons[i] = why
    places = zip(frame["run"], _cells(frame, "source"), reasons)
    lost = tuple(Dropped(str(run), why, str(source or "")) for run, source, why in places if why)
    kept = frame[[not why for why in reasons]].reset_index(drop=True)
    notes = table.notes + tuple(note for note in remarks(kept) if note not in table.notes)
    return dataclasses.replace(table, frame=kept, dropped=table.dropped + lost, notes=notes)


# ---- a run by itself


def _reason(row: dict[Hashable, object], keep_unfinished: bool) -> str:
    """Why a run is left out; "" if it is not."""

    def get(name: str) -> float:
        value = row.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    done, planned, loss, delta = get("_steps_done"), get("_steps_planned"), get("loss"), get("delta")
    at = f" after {done:.0f} of {planned:.0f} steps" if planned > 0 and done >= 0 else ""
    state = str(row.get("_state") or "").lower()
    if get("_exit_code") == DIVERGED or state == "diverged" or math.isinf(loss):
        return f"diverged: loss or gradient became NaN or infinite{at}"
    if loss <= 0:
        return f"a loss of {loss:g} nats cannot be"
    if get("_rise") > RISE:
        return f"diverged: its training loss ends {get('_rise'):.2g} nats above its lowest"
    if not keep_unfinished and (why := _unfinished(done, planned, state)):
        return why
    if not keep_unfinished and get("_end_lr_frac") - get("_final_frac") > DECAYED:
        return f"its schedule has not decayed: the last learning rate is {get('_end_lr_frac'):.2g} of the peak"
    if math.isnan(loss) and math.isnan(delta):
        return "it has no validation loss"
    if get("_loss_step") < done and not keep_unfinished:
        return (
            f"it has no validation loss at its last step {done:.0f} (the last one is of step {get('_loss_step'):.0f})"
        )
    for name in ("N", "D"):
        if name in row and not 0 < get(name) < math.inf and "#" not in str(row.get("curve")):  # but for curve tables
            return f"its {name} is {row[name]}" if get(name) <= 0 else f"it has no {name}"
    for label in (row.get("_label"), row.get("precision")):
        if why := contradiction(str(label or ""), row):
            return f"mislabelled: {why}; rename it if that is right"
    return ""


def _unfinished(done: float, planned: float, state: str) -> str:
    if done < planned:
        return f"unfinished: {done:.0f} of {planned:.0f} steps"
    if state in ("running", "pending", "preempting"):
        return f"unfinished: W&B calls it {state}"
    if state in ("crashed", "failed", "killed", "preempted") and not done >= planned:
        return f"unfinished: W&B calls it {state}"
    return ""


def quantized(row: Mapping[Hashable, object]) -> bool | None:
    """Whether anything in a run is quantised, by its operands, else by its bits; None if neither says so."""
    bits = [float(str(row[name])) for name in BITS if row.get(name) == row.get(name) and row.get(name) is not None]
    formats = [row[name] for name in OPERANDS if isinstance(row.get(name), str)]
    if not formats and len(bits) < 2:
        return None
    frac = row.get("quantized_frac")
    return (
        any(name != REFERENCE for name in formats)
        or min(bits, default=16) < 16
        or (isinstance(frac, float) and frac > 0)
    )


def contradiction(label: str, row: Mapping[Hashable, object]) -> str:
    """How what a run is called contradicts what was quantised; "" if it does not, or claims nothing, or both.

    A run that says itself that it is partly quantised, or for some of the time, is not judged.
    """
    low, high, truth = _LOW.search(label.lower()), _HIGH.search(label.lower()), quantized(row)
    if truth is None or bool(low) == bool(high) or _PARTLY.search(str(row.get("precision"))):
        return ""
    if low and not truth:
        return f"{label!r} says {low[0]}, but nothing in it is quantised"
    if high and truth:
        return f"{label!r} says {high[0]}, but something in it is quantised"
    return ""


# ---- the same run twice


def _twice(frame: pd.DataFrame, alive: list[bool]) -> dict[int, str]:
    """{position: why} of runs that are there again. The copy with the most tokens stays, then that of a run folder, of
    W&B, of a table, then the first by name: so the order of the sources does not matter."""
    runs, sources, origins, ids = (_cells(frame, name) for name in ("run", "source", "_origin", "_run_id"))
    kinds = {"folder": 0, "wandb": 1}
    tokens = list(frame["D"].fillna(0.0)) if "D" in frame else [0.0] * len(frame)
    order = sorted(
        (i for i in range(len(frame)) if alive[i]),
        key=lambda i: (-tokens[i], kinds.get(str(origins[i]), 2), str(sources[i]), str(runs[i])),
    )
    rest = [name for name in frame if name not in ("run", "source", "curve") and not name.startswith("_")]
    again: dict[int, str] = {}
    for what, keys in (
        ("run id", ids),
        ("numbers", _numbers(frame, ("N", "D", "loss", "loss_hp", "precision", "seed"), exact=True)),
        ("numbers", _numbers(frame, rest)),
    ):
        seen: dict[Hashable, int] = {}
        for i in order:
            if i in again or keys[i] is None:
                continue
            first = seen.setdefault(keys[i], i)
            if first != i:
                where = f"{runs[first]} of {sources[first]}" if sources[first] else str(runs[first])
                fix = f" {ids[i]}; if they are different runs, remove the file run_id of one" if keys is ids else ""
                again[i] = f"the same run as {where}: the same {what}{fix}"
    return again


def _cells(frame: pd.DataFrame, name: str) -> list[Hashable]:
    """A column as a list, None where it is empty or missing."""
    return [None if pd.isna(value) else value for value in frame[name]] if name in frame else [None] * len(frame)


def _numbers(frame: pd.DataFrame, columns: Iterable[str], exact: bool = False) -> list[Hashable]:
    """What a row holds in `columns`, as a key; None for rows without a loss.

    `exact`: also None where the loss was rounded to less than 10 digits, so that other runs may have the same.
    """
    names = [name for name in columns if name in frame]
    if "loss" not in frame:
        return [None] * len(frame)
    values = frame[names].astype(object).where(frame[names].notna(), None)
    keys: list[Hashable] = [tuple(map(str, row)) for row in values.itertuples(index=False)]
    digits = [len(repr(float(x)).replace(".", "").lstrip("0")) if np.isfinite(x) else 0 for x in frame["loss"]]
    return [key if count >= (10 if exact else 1) else None for key, count in zip(keys, digits)]


# ---- what is odd


def remarks(frame: pd.DataFrame) -> list[str]:
    """Sentences about runs that are kept."""
    if frame.empty or "loss" not in frame:
        return []
    notes = []
    if "_origin" in frame:  # names on W&B are those of the recipe, unless somebody wrote another
        for row in frame[frame["_origin"] == "wandb"].to_dict("records"):
            if why := contradiction(str(row["run"]), row):
                notes.append(f"W&B run {row['run']}: {why}; it counts as {row['precision']}")
    if len(high := frame[frame["loss"] > GUESS]):
        notes.append(f"{_names(high)}: losses above {GUESS:g} nats, worse than a uniform guess among 60,000 tokens")
    if {"N", "D"} <= set(frame.columns) and len(odd := frame[worse_than_smaller(frame)]):
        notes.append(
            f"{_names(odd)}: a loss {ABOVE - 1:.0%} above that of a run with no more parameters and no more tokens"
        )
    if "precision" in frame:
        columns = [name for name in (*OPERANDS, "quantized_frac") if name in frame]
        for label, group in frame.groupby("precision", sort=True):
            if columns and len(kinds := group[columns].dropna().drop_duplicates()) > 1:
                differ = [name for name in columns if kinds[name].nunique() > 1]
                notes.append(
                    f"precision {label!r} stands for {len(kinds)} recipes, which differ in {', '.join(differ)}"
                )
    if "data" in frame and (count := frame["data"].nunique()) > 1:
        notes.append(f"the runs are of {count} data sets or tokenizers: losses on different text are not comparable")
    if "schedule" in frame and "constant" in set(frame["schedule"]) and frame["schedule"].nunique() > 1:
        notes.append("some learning rates stay constant and others decay: their losses are not comparable")
    return notes + _unit_remarks(frame)


def _names(frame: pd.DataFrame) -> str:
    names = sorted(map(str, frame["run"]))
    return f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def worse_than_smaller(frame: pd.DataFrame) -> np.ndarray:
    """(rows,) whether a loss is 5 % above that of a run of the same precision and data whose N and D are no larger.

    Rows in order of N; of those before, a front of (D, lowest loss up to D) is kept.
    """
    odd = np.zeros(len(frame), dtype=bool)
    N, D, loss = (frame[name].to_numpy(dtype=float) for name in ("N", "D", "loss"))
    alike = [name for name in ("precision", "data") if name in frame]
    groups = frame.groupby(alike, dropna=False).indices.values() if alike else [np.arange(len(frame))]
    for rows in groups:
        front_D: list[float] = []
        front_loss: list[float] = []
        for i in sorted((i for i in rows if np.isfinite(N[i] + D[i] + loss[i])), key=lambda i: (N[i], D[i], loss[i])):
            at = bisect.bisect_right(front_D, D[i])
            if at and loss[i] > ABOVE * front_loss[at - 1]:
                odd[i] = True
            if not at or loss[i] < front_loss[at - 1]:
                end = at
                while end < len(front_loss) and front_loss[end] >= loss[i]:
                    end += 1
                front_D[at:end], front_loss[at:end] = [D[i]], [loss[i]]
    return odd


def _unit_remarks(frame: pd.DataFrame) -> list[str]:
    """Whether two sources differ by a factor of 1/ln 2 = 1.44 where N and D are alike (within 10 %)."""
    if "_origin" not in frame or frame["_origin"].nunique() < 2 or not {"N", "D"} <= set(frame.columns):
        return []
    cell = [tuple(np.round(np.log(pair) / 0.1)) for pair in frame[["N", "D"]].to_numpy(dtype=float)]
    means = frame.assign(_cell=cell).groupby(["_origin", "_cell"])["loss"].median().unstack(0)
    notes = []
    for i, one in enumerate(means.columns):
        for two in means.columns[i + 1 :]:
            ratio = (means[one] / means[two]).dropna()
            for high, low, factor in ((one, two, ratio), (two, one, 1 / ratio)):
                if len(factor) and abs(factor.median() * LN2 - 1) < 0.03:
                    notes.append(
                        f"losses of {_origin(high)} are {factor.median():.2f} times those of {_origin(low)} at like N "
                        "and D, as bits are to nats: if they are bits, read them with --loss-unit bits"
                    )
    return notes


def _origin(name: object) -> str:
    return {"folder": "the run folders", "wandb": "W&B"}.get(str(name), str(name))
