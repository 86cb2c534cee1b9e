"""A late precision switch: train cheaply, then spend the last share of the tokens in the reference precision.

What it costs is arithmetic: with a share h of the tokens in the reference and a format s times as fast, the run is
1 / ((1 - h) / s + h) times as fast as one wholly in the reference (a harmonic mean, so it falls quickly with h).

What it brings is not in any law here. The gap shrinks after the switch, and how fast depends on the learning rate that
is left; so without data the loss is only bounded, by the law of the format (nothing is recovered) and that of the
reference (everything is). Two numbers make a decision of it. `needed` is the share of the gap that a switch must
recover to beat staying in the format for the same time, with the tokens that its speed buys. `recovered` is what was
measured, if the table has runs that switched: their labels say so, "nvfp4, bf16 from 0.82" (one gemm alone: "nvfp4,
fprop bf16 from 0.82"; NVIDIA's recipe, arXiv:2509.25149, does that). The one assumption is that this share carries over
to another size.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lowprec.scaling.advise import check_speedups, interval
from lowprec.scaling.gaps import cells, seed_noise
from lowprec.scaling.surface import Surface
from lowprec.scaling.table import REFERENCE, RunTable

SWITCH = re.compile(r"(?P<base>.+), (?:(?P<gemm>fprop|dgrad|wgrad) )?(?P<recipe>\S+) from (?P<start>[\d.e-]+)")


def recovered(table: RunTable, reference: str = REFERENCE) -> pd.DataFrame:
    """Measured effect of switching to the reference: one row a run that switched once and has its two neighbours.

    Columns: run, base (precision before), gemm ("" = all), share (of the tokens after the switch), N, D, gap (nats over
    the reference), gap_without (of runs of the cell that did not switch), recovered (1 - gap / gap_without), sd (of
    `recovered`, from the seed noise; NaN without repeats). Empty if no run switched.
    """
    rows = []
    if "precision" in table:
        label, cell, loss = table.column("precision").astype(str), cells(table), table.column("loss")
        noise = seed_noise(table).sd
        for i, name in enumerate(label):
            found = SWITCH.fullmatch(name)
            if not found or found["recipe"] != reference or SWITCH.fullmatch(found["base"]):
                continue
            low, high = (loss[(cell == cell[i]) & (label == p)] for p in (found["base"], reference))
            if not len(low) or not len(high):
                continue
            gap, without = float(loss[i] - high.mean()), float(low.mean() - high.mean())
            kept = gap / without
            sd = noise / abs(without) * math.sqrt(1 + kept**2 / len(low) + (1 - kept) ** 2 / len(high))
            row = {"run": table.frame["run"].iloc[i], "base": found["base"], "gemm": found["gemm"] or ""}
            at = {"N": float(table.column("N")[i]), "D": float(table.column("D")[i])}
            rows.append({**row, "share": 1 - float(found["start"]), **at, "gap": gap, "gap_without": without,
                         "recovered": 1 - kept, "sd": sd})  # fmt: skip
    names = ["run", "base", "gemm", "share", "N", "D", "gap", "gap_without", "recovered", "sd"]
    return pd.DataFrame(rows, columns=names)


def late_switch(
    surface: Surface, precision: str, N: float, D: float, *, speedup: "Mapping[str, float] | None" = None,
    shares: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.18, 0.3, 0.5), level: float = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """What it means to train N parameters on D tokens in `precision` and the last share of them in the reference.

    One row a share: share, speedup (of the whole run), loss_best (everything recovered), loss_worst (nothing),
    loss_stay (the format alone for the same time, so on more tokens), needed (share of the gap to be recovered for the
    switch to pay; above 1: it cannot), needed_low, needed_high, loss (expected from `recovered`, interpolated over the
    measured shares of whole switches; NaN outside them). Raises ValueError for shares outside 0..1.
    """
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"a share of the tokens lies between 0 and 1, and not at {min(shares):g} to {max(shares):g}")
    s = check_speedups(speedup, surface)[precision]
    best, worst = surface.loss(N, D, surface.reference)[:, 0], surface.loss(N, D, precision)[:, 0]
    measured = recovered(surface.fit.table, surface.reference)
    measured = measured[(measured["base"] == precision) & (measured["gemm"] == "")].groupby("share")["recovered"].mean()
    rows = []
    for share in shares:
        stay = surface.loss(N, D * ((1 - share) + share * s), precision)[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = interval(np.where(worst > best, (worst - stay) / (worst - best), np.inf if s > 1 else 0.0), level)
        known = len(measured) and measured.index.min() <= share <= measured.index.max()
        part = float(np.interp(share, measured.index, measured)) if known else math.nan
        rows.append({"share": share, "speedup": 1 / ((1 - share) / s + share), "loss_best": best[0],
                     "loss_worst": worst[0], "loss_stay": stay[0], "needed": needed[0], "needed_low": needed[1],
                     "needed_high": needed[2], "loss": worst[0] - part * (worst[0] - best[0])})  # fmt: skip
    return pd.DataFrame(rows)
