"""From facts.json and the end of a log to one row of the run table.

The trainer writes down what a run is in plain numbers (docs/runs.md), into the run folder and into the config of W&B,
so a row is the same wherever the run is read from. What a log adds is its end:

    loss       the last `val_loss`; D = the tokens consumed by then, C = flops_per_token D
    rise       mean training loss of the last twentieth of the log, less the lowest such mean: large if it came apart

A resumed run of lowprec drops the lines of steps that it does again. Other trainers append, so a step that comes again,
or an earlier one, means that the lines since then are void.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lowprec.scaling.table import OPERANDS, REFERENCE

VERSION = 1  # of facts.json
Row = dict[str, Any]
T = TypeVar("T")
BF16: Row = {"exponent_bits": 8, "mantissa_bits": 7, "bits": 16, "gaussian_mse": 0.0, "block": [1, 1]}


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a log ends.

    Attributes:
        step, tokens, lr: of the last record; NaN if it does not say.
        loss_step, loss_tokens, loss, loss_hp: of the last record with a validation loss; NaN if there is none.
        finite: whether the last validation loss is a number, and the training loss if it is newer.
        rise: nats, see above; NaN without training losses.
        repeated: records that a later attempt made void.
    """

    step: float
    tokens: float
    lr: float
    loss_step: float
    loss_tokens: float
    loss: float
    loss_hp: float
    finite: bool
    rise: float
    repeated: int = 0


def float_of(value: Any) -> float:
    """A number of JSON; NaN for null, "NaN" and whatever else is not one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def ungrouped(key: str) -> str:
    """`val/val_loss` -> `val_loss`: the trainer logs to W&B under the names of its metrics.jsonl, behind a group for
    the charts; older versions did so without a group.
    """
    return key.rpartition("/")[2]


def sampled(records: Sequence[T]) -> Sequence[T]:
    """Up to 127 of the records, evenly spaced, the last among them: enough for `rise_of`."""
    return records[::-1][:: max(len(records) // 64, 1)][::-1]


def rise_of(losses: Sequence[float] | np.ndarray) -> float:
    """Mean of the last twentieth of `losses` (n,) less the lowest mean of a twentieth, of those that are finite."""
    values = np.asarray(losses, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan
    size = max(len(values) // 20, 1)
    means = values[len(values) % size :].reshape(-1, size).mean(axis=1)
    return float(means[-1] - means.min())


def last_attempt(records: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The records that count, in order of their steps, and how many were done again after a resume."""
    kept: list[Mapping[str, Any]] = []
    repeated = 0
    for record in records:
        while kept and record["step"] <= kept[-1]["step"]:
            kept.pop()
            repeated += 1
        kept.append(record)
    return kept, repeated


def ending_of(records: Sequence[Mapping[str, Any]], repeated: int = 0) -> Ending:
    """The end of a log given as records (at least one) in the order of their steps."""
    last = records[-1]
    nothing: Mapping[str, Any] = {}
    judged = next((record for record in reversed(records) if "val_loss" in record), nothing)
    losses = [float_of(record["loss"]) for record in sampled(records) if record.get("loss") is not None]
    return ending(last, judged, losses, repeated)


def ending(last: Mapping[str, Any], judged: Mapping[str, Any], losses: Any, repeated: int = 0) -> Ending:
    """From the last record, the last one with a validation loss ({} = none), and training losses."""
    steps = float_of(last.get("step")), float_of(judged.get("step"))
    finite = not judged or math.isfinite(float_of(judged["val_loss"]))
    if steps[0] != steps[1] and "loss" in last:  # else the validation has shown what became of the last update
        finite = finite and math.isfinite(float_of(last["loss"]))
    return Ending(
        steps[0],
        float_of(last.get("tokens")),
        float_of(last.get("lr")),
        steps[1],
        float_of(judged.get("tokens")),
        float_of(judged.get("val_loss")),
        float_of(judged.get("val_loss_high_precision")),
        finite,
        rise_of(losses),
        repeated,
    )


def row_of(facts: Mapping[str, Any], end: Ending) -> Row:
    """Columns of the run table and of STATUS, but for `run`, `source`, `curve`, `_origin`, `_label` and `_run_id`.

    Raises ValueError with a reason if the facts are of another version, or not whole, or their loss is not in nats.
    """
    if facts.get("version") != VERSION:
        raise ValueError(f"its facts are of version {facts.get('version')}, and this reads version {VERSION}")
    if facts.get("loss_unit") != "nats per token":
        raise ValueError(f"its loss is in {facts.get('loss_unit')}, not in nats per token")
    try:
        row = _columns(facts)
        D = end.loss_tokens if math.isfinite(end.loss_tokens) else end.tokens
        row |= {"D": D, "C": float(facts["flops_per_token"]) * D, "loss": end.loss, "loss_hp": end.loss_hp}
        row |= {
            "_steps_done": end.step,
            "_steps_planned": facts["steps"],
            "_loss_step": end.loss_step,
            "_rise": end.rise,
        }
        row |= {"_final_frac": 1.0 if row["schedule"] == "constant" else facts["schedule"]["final_frac"]}
        row |= {"_end_lr_frac": end.lr / facts["lr"] if facts["lr"] else math.nan}
    except (KeyError, TypeError) as error:
        raise ValueError(f"its facts are not whole ({type(error).__name__}: {error})") from None
    if not end.finite:
        row["_state"] = "diverged"
    return row


def _columns(facts: Mapping[str, Any]) -> Row:
    operands = {name: facts["operands"][name] for name in OPERANDS}
    w, a, g = (operands[name] or BF16 for name in ("fprop.w", "fprop.x", "dgrad.dy"))
    data = facts["data"]
    return {
        "N": facts["parameters"]["non_embedding"],
        "N_total": facts["parameters"]["total"],
        "_n_kind": "non_embedding",
        "precision": label_of(facts),
        **{name: operand["format"] if operand else REFERENCE for name, operand in operands.items()},
        "bits_w": w["bits"],
        "bits_a": a["bits"],
        "bits_g": g["bits"],
        "bits_kv": 16 if facts.get("attention", "unknown") is None else None,
        "exponent_bits": w["exponent_bits"],
        "mantissa_bits": w["mantissa_bits"],
        "block": math.prod(w["block"]) or None,  # 0 = the whole axis, whose length the facts do not tell
        "gmse_w": w["gaussian_mse"],
        "gmse_a": a["gaussian_mse"],
        "gmse_g": g["gaussian_mse"],
        "quantized_frac": facts["quantized_frac"],
        "schedule": facts["schedule"]["shape"],
        "optimizer": facts["optimizer"],
        "lr": facts["lr"],
        "seed": facts["seed"],
        "data": f"{data['hash']} {data['tokenizer']}",
        "plan": facts["plan"],
    }


def label_of(facts: Mapping[str, Any]) -> str:
    """The recipe's name, with every change during training: `nvfp4, fprop bf16 from 0.82`.

    "bf16" only if nothing is quantised at any time; a run of which a smaller part is, is `bf16 and others`.
    """
    label = str(facts["precision"])
    if not any(facts["operands"].values()):
        label = REFERENCE if not facts["quantized_frac"] else f"{REFERENCE} and others"
    if facts.get("attention"):
        label += " with attention"
    for change in facts["precision_schedule"]:
        what = f"{change['gemm']} {change['recipe']}" if change.get("gemm") else str(change["recipe"])
        label += f", {what} from {change['from']:g}"
    return label
