"""advise: which precision, how many parameters and how many tokens for a budget, and how sure that is.

A format trades accuracy for speed. For a law in which it makes N parameters worth eff_N N and D tokens worth eff_D D,
the trade has an exact rule, whatever the exponents (arXiv:2505.14669 fits such laws): only the product of effective
size, effective tokens and speed-up s enters the best loss of a budget, so a format is compute-optimal if and only if

    s eff_N eff_D > 1,        break-even speed-up s* = 1 / (eff_N eff_D)

For other laws (an additive gap k D^g / N^h, a critical data size) s* depends on the budget and is found from the
optimal losses themselves. `s` is measured by the user, end to end, on the user's device; nothing here assumes one. The
probability that a format wins is the share of bootstrap refits in which it does: it holds what the runs leave open, not
whether the law is right at that size; see compare.py for that.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lowprec.scaling.diagnose import judge
from lowprec.scaling.law import Array
from lowprec.scaling.laws.chinchilla import Chinchilla
from lowprec.scaling.laws.qat import ComputeOptimalQAT
from lowprec.scaling.problem import raw_columns
from lowprec.scaling.surface import KAPPA, Surface, crossing

FAR = 10.0  # an optimum this many times outside the fitted range is called far outside


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to train with a budget.

    Attributes:
        budget: FLOP at the speed of the reference precision.
        table: one row a precision, the best first: speedup, N, D, loss, gap (loss less that of the reference),
            break_even, time_frac (share of the budget in which the reference's loss is reached: break_even / speedup),
            more_tokens (times the tokens that match the reference at its own N and D), each but speedup with _low and
            _high; p_better (than the reference) and p_best (of all), shares of bootstrap samples, NaN without one;
            qat_frac (share of the tokens to train quantised if the weights alone are, after full precision, by the
            published rule of :class:`~lowprec.scaling.laws.qat.ComputeOptimalQAT`; NaN if their bits are not known).
        notes: what to know before acting on it, in sentences.
        level: of the intervals.
        reference: label of the reference precision.
    """

    budget: float
    table: pd.DataFrame
    notes: tuple[str, ...]
    level: float
    reference: str

    @property
    def best(self) -> str:
        """The precision of the smallest predicted loss."""
        return str(self.table.index[0])

    def sentences(self) -> list[str]:
        found = [f"With {self.budget:.3g} FLOP at the speed of {self.reference}:"]
        for name, row in self.table.iterrows():
            text = (
                f"{name}, {row.speedup:g} times as fast: N = {row.N:.3g} on D = {row.D:.3g} tokens, loss {row.loss:.4f}"
            )
            text += _spread(row, "loss", ".4f")
            if name != self.reference:
                text += f"; break-even speed-up {row.break_even:.3g}{_spread(row, 'break_even', '.3g')}"
                if math.isfinite(row.p_better):
                    text += f"; better than {self.reference} in {row.p_better:.0%} of the bootstrap samples"
                text += f"; at the N of {self.reference} it needs {row.more_tokens:.3g} times the tokens"
                text += f", {row.more_tokens / row.speedup:.3g} times the time, for the same loss"
            found.append(text)
        return [*found, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self.sentences())


def _spread(row: pd.Series, name: str, form: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"


def interval(values: Array, level: float) -> tuple[float, float, float]:
    """(of the fit, low, high) from row 0 and the percentiles of the others; NaN bounds without bootstrap samples."""
    if len(values) < 2:
        return float(values[0]), math.nan, math.nan
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(values[0]), float(low), float(high)


def check_speedups(speedup: "Mapping[str, float] | None", surface: Surface) -> dict[str, float]:
    """{precision: speed-up over the reference} for every precision, 1 where nothing is given.

    Raises ValueError for an unknown name, a number that is not positive, and a reference other than 1."""
    given = dict(speedup or {})
    if surface.reference not in surface.precisions:
        have = ", ".join(surface.precisions)
        raise ValueError(f"no run is in {surface.reference}, the precision to compare with; --reference can be {have}")
    for name, value in given.items():
        if name not in surface.precisions:
            raise ValueError(f"--speedup {name}: there is no such precision; there are {', '.join(surface.precisions)}")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--speedup {name}={value:g}: a speed-up is a positive number, such as 1.3")
    if given.get(surface.reference, 1.0) != 1.0:
        raise ValueError(f"--speedup {surface.reference}: speed-ups are over {surface.reference}, whose own is 1")
    return {name: float(given.get(name, 1.0)) for name in surface.precisions}


def efficiency(surface: Surface, precision: str) -> "Array | None":
    """(1 + samples,) eff_N eff_D of a precision over the reference's; None for laws not in N eff_N and D eff_D."""
    fit, law = surface.fit, surface.fit.law.law
    if not isinstance(law, Chinchilla) or hasattr(law, "gap"):
        return None
    theta = {name: np.array([value]) for name, value in fit.params.items()}
    if surface.boot is not None:
        theta = {name: np.append(value, surface.boot.samples[name]) for name, value in theta.items()}

    def product(label: str) -> Array:
        columns = law.prepare(raw_columns(fit.law, surface.runs(1e8, 1e10, label)))
        eff_N, eff_D = law.effective({name: value[:, None] for name, value in theta.items()}, columns)
        return np.broadcast_to(eff_N * eff_D, (len(theta["E"]), 1))[:, 0]

    return product(precision) / product(surface.reference)


def break_even(
    surface: Surface,
    precision: str,
    budget: float,
    *,
    kappa: float = KAPPA,
    max_N: tuple[float, float] = (math.inf, math.inf),
    served_tokens: float = 0.0,
    serve_speedup: float = 1.0,
) -> Array:
    """(1 + samples,) end-to-end speed-up over the reference at which the best losses of the budget are equal.

    Exact for laws in N eff_N and D eff_D, where the budget does not matter. For others, and where the sizes have a cap
    (`max_N`: the reference's, the format's) or tokens are served from the same budget, by search over 1/4 to 256: 0 if
    the format is better even at 1/4, inf if it is worse even at 256.
    """
    free = min(max_N) == math.inf and not served_tokens
    if free and (product := efficiency(surface, precision)) is not None:
        return 1 / product
    served: dict[str, Any] = {"served_tokens": served_tokens, "kappa": kappa, "points": 161}
    target = surface.optimum(budget, surface.reference, max_N=max_N[0], **served).loss
    speeds = np.geomspace(0.25, 256, 61)
    best = surface.optimum(
        budget, precision, speedup=speeds, max_N=max_N[1], serve_speedup=serve_speedup, **served
    ).loss
    return np.exp(crossing(np.log(speeds), best - target[:, None]))


def more_tokens(surface: Surface, precision: str, N: float, D: float) -> Array:
    """(1 + samples,) times D tokens at which `precision` has the reference's loss at the same N; inf if it never has.

    Searched from 1/16 to 4096 times. Less than 1: it is the better one.
    """
    target = surface.loss(N, D, surface.reference)
    times = np.geomspace(1 / 16, 4096, 481)
    return np.exp(crossing(np.log(times), surface.loss(N, D * times, precision) - target))


def critical_tokens(surface: Surface, precision: str, N: float) -> Array:
    """(1 + samples,) tokens beyond which training longer makes the loss of N parameters in that precision worse.

    inf where the law has no such point below 1e20 tokens. For the law of floating-point training (arXiv:2501.02423) it
    is [d gamma N^alpha (E + 1/2)^delta (M + 1/2)^nu / log2 B]^(1 / 2 beta). A law that was not fitted near it only
    extrapolates the trend of its gap.
    """
    D = np.geomspace(1e6, 1e20, 2801)
    losses = surface.loss(N, D, precision)
    at = np.argmin(losses, axis=1)
    # rounding makes a flat tail wiggle: a minimum counts if the loss rises by more than that behind it
    real = (at < len(D) - 1) & (losses[:, -1] - losses.min(axis=1) > 1e-9)
    return np.where(real, D[at], np.inf)


def advise(
    surface: Surface, budget: float, *, speedup: "Mapping[str, float] | None" = None,
    max_N: "float | Mapping[str, float]" = math.inf, served_tokens: float = 0.0,
    serve_speedup: "Mapping[str, float] | None" = None, kappa: float = KAPPA, level: float = 0.95,
) -> Advice:  # fmt: skip
    """Compute-optimal N and D of every precision for `budget` FLOP at the reference's speed, and which is best.

    `speedup`, `serve_speedup`: {precision: end-to-end speed-up over the reference}, of training and of serving, as
    measured. `max_N`: the most parameters that fit into memory, one number or one a precision. `served_tokens`: tokens
    that the model will generate or read in its life, at 2 N FLOP each, paid from the same budget. Raises ValueError for
    unknown precisions and numbers that are not positive.
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"--budget {budget:g}: a budget is a positive number of FLOP, such as 1e21")
    speed, serve = check_speedups(speedup, surface), check_speedups(serve_speedup, surface)
    if missing := sorted({*max_N} - {*speed}) if isinstance(max_N, Mapping) else []:
        raise ValueError(f"max_N has {missing[0]!r}, which is no precision; there are {', '.join(speed)}")
    caps = {name: float(max_N.get(name, math.inf) if isinstance(max_N, Mapping) else max_N) for name in speed}
    if not all(cap > 0 for cap in caps.values()) or served_tokens < 0:
        raise ValueError("the largest size must be positive and the served tokens at least 0")
    found = {
        name: surface.optimum(budget, name, speedup=speed[name], max_N=caps[name], served_tokens=served_tokens,
                              serve_speedup=serve[name], kappa=kappa)
        for name in surface.precisions
    }  # fmt: skip
    base = found[surface.reference]
    losses = np.stack([best.loss for best in found.values()])  # (precisions, 1 + samples)
    rows = {}
    for i, (name, best) in enumerate(found.items()):
        even = np.ones_like(best.loss)
        if name != surface.reference:
            even = break_even(surface, name, budget, kappa=kappa, max_N=(caps[surface.reference], caps[name]),
                              served_tokens=served_tokens, serve_speedup=serve[name])  # fmt: skip
        longer = more_tokens(surface, name, float(base.N[0]), float(base.D[0]))
        values = {"N": best.N, "D": best.D, "loss": best.loss, "gap": best.loss - base.loss, "break_even": even,
                  "time_frac": even / speed[name], "more_tokens": longer}  # fmt: skip
        row = {"speedup": speed[name]}
        for key, value in values.items():
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), interval(value, level)))
        row["p_better"] = float(np.mean(best.loss[1:] < base.loss[1:])) if losses.shape[1] > 1 else math.nan
        row["qat_frac"] = _qat_frac(surface, name, float(best.N[0]), float(best.D[0]))
        row["p_best"] = float(np.mean(losses[:, 1:].argmin(axis=0) == i)) if losses.shape[1] > 1 else math.nan
        rows[name] = row
    table = pd.DataFrame(rows).T.sort_values("loss", kind="stable")
    notes = _notes(
        surface, table, {**(speedup or {})}, {n: (bool(b.edge), bool(b.capped)) for n, b in found.items()}, kappa
    )
    return Advice(budget, table, tuple(notes), level, surface.reference)


def _qat_frac(surface: Surface, precision: str, N: float, D: float) -> float:
    """f* of the weights' bits; NaN where they are not known or not below 16."""
    bits = float(surface.runs(N, D, precision).frame.get("bits_w", pd.Series([math.nan])).iloc[0])
    return ComputeOptimalQAT().predicted_share(N, D, bits) if bits < 16 else math.nan


def _notes(
    surface: Surface,
    table: pd.DataFrame,
    given: Mapping[str, float],
    ends: Mapping[str, tuple[bool, bool]],
    kappa: float,
) -> list[str]:
    """What a user should know before acting."""
    fit, notes = surface.fit, []
    verdict = judge(fit, surface.boot)
    if verdict.grade != "OK":
        notes.append(f"The fit is {verdict}.")
    if unset := [name for name in table.index if name != surface.reference and name not in given]:
        names = ", ".join(unset)
        notes.append(
            f"No speed-up was given for {names}: 1 is used, with which a format that costs accuracy cannot win."
        )
    for name, (edge, capped) in ends.items():
        if capped:
            notes.append(f"{name}: N is the largest allowed; the budget would pay for more.")
        elif edge:
            notes.append(
                f"{name}: the law has no compute-optimal size within 1e4 times of N = D; do not use its exponents."
            )
    for axis in ("N", "D"):
        trained, top = fit.table.column(axis), float(table[axis].iloc[0])
        low, high = float(trained.min()), float(trained.max())
        if top > high or top < low:
            times = top / high if top > high else low / top
            way = "beyond the largest" if top > high else "below the smallest"
            warn = "; that far a law is a guess" if times > FAR else ""
            notes.append(f"The best {axis} lies {times:.3g} times {way} that was trained{warn}.")
    if "C" in fit.table:
        ratio = float(np.median(fit.table.column("C") / (fit.table.column("N") * fit.table.column("D"))))
        if abs(ratio / kappa - 1) > 0.05:
            notes.append(
                f"The runs took {ratio:.3g} FLOP a parameter and token (median), the advice assumes {kappa:g}."
            )
    if surface.boot is None:
        notes.append("There is no bootstrap, so there are no intervals.")
    return notes


def iso_flop(
    surface: Surface, budgets: Sequence[float], *, speedup: "Mapping[str, float] | None" = None, points: int = 25,
    span: float = 8.0, kappa: float = KAPPA, level: float = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """Loss along every budget, from N* / span to N* span.

    Columns: budget, precision, N, D, ratio (D/N), loss, loss_low, loss_high."""
    speed, parts = check_speedups(speedup, surface), []
    for budget in budgets:
        for name in surface.precisions:
            middle = float(surface.optimum(budget, name, speedup=speed[name], kappa=kappa).N[0])
            N = np.geomspace(middle / span, middle * span, points)
            D = budget * speed[name] / (kappa * N)
            losses = np.array([interval(column, level) for column in surface.loss(N, D, name).T])
            part = pd.DataFrame({"budget": budget, "precision": name, "N": N, "D": D, "ratio": D / N})
            parts.append(part.assign(loss=losses[:, 0], loss_low=losses[:, 1], loss_high=losses[:, 2]))
    return pd.concat(parts, ignore_index=True)


def iso_loss(
    surface: Surface, losses: Sequence[float], *, speedup: "Mapping[str, float] | None" = None, kappa: float = KAPPA,
    level: float = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """The smallest budget that reaches each loss: loss, precision, budget (FLOP at the reference's speed), budget_low,
    budget_high, N, D (at it). inf: the loss is below what the law reaches within 1e6 times the compute of the runs."""
    table, speed, rows = surface.fit.table, check_speedups(speedup, surface), []
    work = kappa * table.column("N") * table.column("D")
    C = np.geomspace(work.min() / 1e4, work.max() * 1e6, 121)
    for name in surface.precisions:
        best = surface.optimum(C, name, speedup=speed[name], kappa=kappa, points=121).loss  # (1 + samples, budgets)
        for loss in losses:
            with np.errstate(over="ignore"):
                need = interval(np.exp(crossing(np.log(C), best - loss)), level)
            at = surface.optimum(need[0], name, speedup=speed[name], kappa=kappa) if 0 < need[0] < math.inf else None
            row = {"loss": loss, "precision": name, **dict(zip(("budget", "budget_low", "budget_high"), need))}
            rows.append({**row, "N": at.N[0] if at else math.nan, "D": at.D[0] if at else math.nan})
    return pd.DataFrame(rows).sort_values(["loss", "budget"], ascending=[False, True]).reset_index(drop=True)
