"""Names of columns in other people's tables, and the numbers under them.

A column is found under its own name (`N`, `loss`), under the one that `--columns loss=eval_loss` gives, or under a
name in common use, below. Names are compared in lower case with every run of other characters as one underscore, so
`Final-Val/Loss` is `final_val_loss`; `config.` and `summary.` in front are ignored. A name in an earlier group beats
one in a later group (a validation loss is the loss, whatever else is logged); two of the same group are refused, with
both names. `_m` and `_b` behind a size or a number of tokens mean millions and billions.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowprec.scaling.sources import STATUS
from lowprec.scaling.table import LABELS, NUMBERS

NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "run": (("run_name", "display_name"), ("name",)),
    "N": (
        ("n_non_embedding", "non_embedding", "non_embedding_params", "params_non_embedding", "n_no_embed"),
        ("n", "params", "n_params", "num_params", "parameters", "n_parameters", "num_parameters", "model_params"),
        ("model_size", "size"),
    ),
    "N_total": (("total_params", "params_total", "total_parameters", "n_params_total"),),
    "D": (
        ("tokens", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "total_tokens", "tokens_seen",
         "consumed_tokens", "tokens_trained"),
    ),
    "C": (("flops", "flop", "compute", "train_flops", "training_flops", "total_flops"),),
    "loss": (
        ("val_loss", "val_val_loss", "valid_loss", "validation_loss", "eval_loss", "test_loss", "final_val_loss",
         "final_eval_loss"),
        ("loss", "final_loss", "lm_loss"),
        ("train_loss", "training_loss", "final_train_loss"),
    ),
    "loss_hp": (("val_loss_high_precision", "val_val_loss_high_precision"),),
    "delta": (("ptq_delta", "loss_delta", "degradation"),),
    "precision": (("tag", "scheme", "format", "recipe", "quantization", "quantisation"),),
    "bits_w": (("w_bits", "wbits", "weight_bits", "bits_weights"),),
    "bits_a": (("a_bits", "abits", "activation_bits", "act_bits", "bits_activations"),),
    "bits_kv": (("kv_bits", "kv_cache_bits"),),
    "bits_g": (("g_bits", "grad_bits", "gradient_bits"),),
    "exponent_bits": (("exp_bits", "e_bits"),),
    "mantissa_bits": (("man_bits", "m_bits"),),
    "block": (("block_size", "group_size"),),
    "quantized_frac": (("quantized_fraction", "quantization_ratio"),),
    "unique_tokens": (("n_unique_tokens", "unique"),),
    "N_mean": (("mean_params", "average_params"),),
    "schedule": (("scheduler", "lr_schedule", "lr_scheduler"),),
    "optimizer": (("optimiser", "opt"),),
    "lr": (("learning_rate", "peak_lr", "max_lr", "train_lr"),),
    "seed": (("random_seed",),),
    "data": (("dataset", "corpus"),),
    "_run_id": (("run_id",), ("id",)),
    "_n_kind": (("n_kind",),),
    "_state": (("state", "status"),),
    "_exit_code": (("exit_code",),),
    "_steps_done": (("steps_done",),),
    "_steps_planned": (("steps_planned", "planned_steps"),),
}  # fmt: skip
WITHOUT_EMBEDDINGS = NAMES["N"][0]  # names that say what N counts
NEEDED = ("N", "N_total", "D", "C", "loss", "delta")
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}

_INNER = re.compile(r"(config|summary|summary_metrics)\.")
_NUMBER = re.compile(r"(-?[0-9.]+(?:e[+-]?\d+)?) ?([kmbgt]?)", re.IGNORECASE)


def plain(name: str) -> str:
    """`config.Final-Val/Loss` -> `final_val_loss`."""
    name = _INNER.sub("", str(name).strip())
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def match(have: Sequence[str], wanted: Mapping[str, str], source: str) -> dict[str, tuple[str, float]]:
    """{column of the run table: (the source's name for it, factor)}.

    Args:
        have: the source's columns.
        wanted: the user's own map, {column of the run table: the source's name}.
        source: for messages.

    Raises ValueError if a name of `wanted` is not there, or if two names in common use are.
    """
    found: dict[str, tuple[str, float]] = {}
    for column, name in wanted.items():
        if name in have:
            found[column] = (name, 1.0)
        elif column not in have:
            raise ValueError(f"{source} has no column {name!r} (--columns {column}={name}); it has {', '.join(have)}")
    taken = {name for name, _ in found.values()}
    for column in (*NUMBERS, *LABELS, *STATUS):
        if column not in found and (hit := _find(column, [name for name in have if name not in taken], source)):
            found[column] = hit
    return found


def _find(column: str, have: Sequence[str], source: str) -> tuple[str, float] | None:
    if column in have and (len(column) == 1 or (column != "loss" and f"config.{column}" not in have)):
        return column, 1.0  # not `loss`: where there is also a val_loss, it is that of training
    groups = NAMES.get(column, ())
    if len(column) > 1 and column != "loss":
        groups = ((plain(column),), *groups)
    for group in groups:
        hits = [name for name in have if plain(name) in group]
        factor = 1.0
        if not hits and column in ("N", "N_total", "D"):
            stems = {f"{name}_{unit}": SUFFIXES[unit] for name in (column.lower(), *group) for unit in "mb"}
            hits = [name for name in have if plain(name) in stems]
            factor = stems[plain(hits[0])] if hits else 1.0
        measured = column in (*NEEDED, "loss_hp")  # by the run, so not what its config planned
        hits = [name for name in hits if measured != bool(_INNER.match(name))] or hits
        if len(hits) > 1:
            raise ValueError(
                f"{source}: both {hits[0]!r} and {hits[1]!r} could be {column}: say which, --columns {column}={hits[0]}"
            )
        if hits:
            return hits[0], factor
    return (column, 1.0) if column in have else None


def check_map(wanted: Mapping[str, str]) -> None:
    """Raises ValueError if a column map names a column that the run table does not have."""
    for column, name in wanted.items():
        if column not in (*NUMBERS, *LABELS):
            near = difflib.get_close_matches(column, (*NUMBERS, *LABELS), 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it can be {', '.join((*NUMBERS, *LABELS))}"
            raise ValueError(f"--columns {column}={name}: the run table has no column {column!r}{hint}")


def number(value: Any) -> float:
    """A cell as a number: `30M` is 3e7 and `1,000` is 1000; NaN if it is empty. Raises ValueError for anything else."""
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    text = str(value).strip()
    if text.lower() in ("", "-", "na", "n/a", "nan", "none", "null"):
        return math.nan
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return float(text.replace(",", ""))
    if found := _NUMBER.fullmatch(text):
        return float(found[1]) * SUFFIXES.get(found[2].lower(), 1.0)
    raise ValueError(f"{text!r} is not a number")


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))
