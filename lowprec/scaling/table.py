"""RunTable: one row a run, in named columns with one unit each; where it came from, and what was left out and why.

    column          unit     meaning
    run             -        its name, unique in the table
    N               count    parameters; without embeddings and head if `n_kind` is "non_embedding", else all
    N_total         count    all parameters
    D               tokens   tokens trained on
    C               FLOP     training compute; 6 N D where the source has none
    loss            nats     per token, of held-out text, at the end of a finished schedule
    loss_hp         nats     the same weights, every layer unquantised
    delta           nats     loss after post-training quantisation, or in low precision, less its reference
    precision       -        label of the recipe; "bf16" = nothing is quantised
    fprop.x ... wgrad.x      format of each of the six operands; "bf16" = left alone
    bits_w, bits_a, bits_kv, bits_g   bits of the forward's weights and activations, the KV cache, and the gradients;
                             16 = left alone
    bits_post       bits     of the weights after post-training quantisation; 16 = not quantised after training
    exponent_bits, mantissa_bits, block     of the forward's weights (E, M, B of arXiv:2501.02423); left alone: 8, 7, 1
    gmse_w, gmse_a, gmse_g   relative squared error on Gaussian numbers of weights, activations, gradients;
                             0 = left alone
    quantized_frac  0..1     share of the blocks' linear parameters that is quantised
    qat_frac        0..1     share of the tokens that were trained on with quantisation, at the end of the run
    unique_tokens   tokens   distinct tokens; D where the source has none
    N_mean          count    parameters averaged over training (pruning, growth); N where the source has none
    schedule        -        shape of the learning rate (cosine, wsd ...)
    optimizer, lr, seed, data, plan
    curve           -        path of the run's whole curve, for laws of the learning rate
    source          -        file or URL the row was read from

A column that the source does not have is absent, not filled with guesses; the two exceptions above are noted in
`notes`. Losses in bits or per byte are refused rather than mixed in.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
NUMBERS = ("N", "N_total", "D", "C", "loss", "loss_hp", "delta", "bits_w", "bits_a", "bits_kv", "bits_g",
           "bits_post", "qat_frac", "exponent_bits", "mantissa_bits", "block", "gmse_w", "gmse_a", "gmse_g",
           "quantized_frac", "unique_tokens", "N_mean", "lr", "seed")  # fmt: skip
LABELS = ("run", "precision", *OPERANDS, "schedule", "optimizer", "data", "plan", "curve", "source")
REFERENCE = "bf16"  # the precision that gaps are measured from


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A run that was read and left out."""

    run: str
    reason: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Runs in rows.

    Attributes:
        frame: the columns above (others are kept as they are and used by nobody).
        n_kind: what N counts, "non_embedding" or "total".
        dropped: runs that were read and left out, with the reason.
        notes: what was derived or assumed for all rows, in sentences.
    """

    frame: pd.DataFrame
    n_kind: str = "non_embedding"
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frame)

    def __contains__(self, column: str) -> bool:
        return column in self.frame.columns and bool(self.frame[column].notna().all())

    def column(self, name: str) -> np.ndarray:
        """One column as float64 (labels: object). Raises ValueError if it is missing, wholly or for some runs."""
        if name not in self.frame.columns:
            have = ", ".join(map(str, self.frame.columns))
            raise ValueError(f"the run table has no column {name!r}; it has {have}")
        values = self.frame[name]
        if missing := int(values.isna().sum()):
            first = self.frame["run"][values.isna()].iloc[0]
            raise ValueError(f"column {name!r} is empty for {missing} of {len(self)} runs, such as {first!r}")
        number = name in NUMBERS or (name not in LABELS and pd.api.types.is_numeric_dtype(values))
        return values.to_numpy(dtype=np.float64 if number else object)

    def columns(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        return {name: self.column(name) for name in names}

    def where(self, mask: np.ndarray, reason: str = "") -> "RunTable":
        """The runs at which `mask` holds; with a reason, the others are listed as dropped."""
        mask = np.asarray(mask, dtype=bool)
        gone = self.frame[~mask] if reason else self.frame[:0]
        lost = tuple(Dropped(str(row.run), reason, str(getattr(row, "source", ""))) for row in gone.itertuples())
        frame = self.frame[mask].reset_index(drop=True)
        return dataclasses.replace(self, frame=frame, dropped=self.dropped + lost)

    def drop(self, bad: Callable[[pd.Series], str]) -> "RunTable":
        """Without the runs for which `bad(row)` returns a reason."""
        reasons = [bad(row) for _, row in self.frame.iterrows()]
        lost = tuple(
            Dropped(str(row.run), why, str(getattr(row, "source", "")))
            for row, why in zip(self.frame.itertuples(), reasons)
            if why
        )
        frame = self.frame[[not why for why in reasons]].reset_index(drop=True)
        return dataclasses.replace(self, frame=frame, dropped=self.dropped + lost)

    def drop_highest(self, count: int) -> "RunTable":
        """Without the `count` runs of the highest loss."""
        if not 0 <= count < len(self):
            raise ValueError(f"--drop-highest {count}: the table has {len(self)} runs")
        order = np.argsort(-self.column("loss"), kind="stable")
        mask = np.ones(len(self), dtype=bool)
        mask[order[:count]] = False
        return self.where(mask, f"one of the {count} highest losses (--drop-highest)")

    def fingerprint(self) -> str:
        """Short hash of the rows, independent of their order."""
        rows = sorted(self.frame.to_csv(index=False).splitlines()[1:])
        return hashlib.blake2b("\n".join(rows).encode(), digest_size=6).hexdigest()

    def to_csv(self, path: Any) -> None:
        """Writes the rows, and `n_kind` as a column; `lowprec.scaling.read` reads the file back as it is."""
        self.frame.assign(n_kind=self.n_kind).to_csv(path, index=False)
