"""What `lowprec-scaling advise` says: for every budget the answer, a table of the precisions, what else to know."""

import argparse
import math
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lowprec.scaling.advise import Advice, advise, critical_tokens, interval, iso_flop, iso_loss
from lowprec.scaling.fit import Fit
from lowprec.scaling.late import late_switch, recovered
from lowprec.scaling.surface import Surface
from lowprec.tools import scaling_show as show
from lowprec.tools.scaling_commands import REFUSED, fitted
from lowprec.tools.scaling_record import write
from lowprec.tools.scaling_runs import load, settings

LOSSES = dict.fromkeys(("loss", "loss_low", "loss_high", "loss_best", "loss_worst", "loss_stay"), ".4f")


def described(found: Fit, formats: Mapping[str, Mapping[str, float]]) -> None:
    """Raises ValueError for a --format that lacks a column the law looks at, or names one that it does not."""
    needed = [name for name in found.law.law.needs if name not in ("N", "D", "precision", "N_mean", "unique_tokens")]
    for name, given in formats.items():
        also = {f"bits_{operand}" for operand in getattr(found.law.law, "operands", ())}
        if odd := sorted({*given} - {*needed} - also):
            listed = ", ".join(needed) or "no column of a format"
            raise ValueError(f"--format {name}: law {found.law.name} does not look at {odd[0]}; it needs {listed}")
        if gone := [column for column in needed if column not in given]:
            raise ValueError(f"--format {name} needs {', '.join(f'{column}=VALUE' for column in gone)} too")


def command(options: argparse.Namespace) -> int:
    table = load(options)
    found, boot, verdict = fitted(options, table, options.law)
    if verdict.grade == "REFUSE" and not options.force:
        print(f"lowprec-scaling: no advice from this fit ({verdict}); --force gives it anyway", file=sys.stderr)
        return REFUSED
    formats = {name: settings(pairs, "--format", number=True) for name, *pairs in options.format}
    described(found, formats)
    surface = Surface(found, boot, _numbers(settings(options.given, "--given")), formats, options.reference)
    speedup = settings(options.speedup, "--speedup", number=True)
    serve = settings(options.serve_speedup, "--serve-speedup", number=True)
    if options.late_switch:
        check_late(surface, options.late_switch, speedup)
    print(f"{len(table)} runs, law {found.law.name}: {found.law.law.formula}", *show.judged(verdict), sep="\n")
    answers = []
    for budget in options.budget:
        answer = advise(
            surface, budget, speedup=speedup, kappa=options.kappa, max_N=_largest(options.max_params),
            served_tokens=options.inference_tokens, serve_speedup=serve,
        )  # fmt: skip
        answers.append(answer)
        told = [note for note in answer.notes if note != f"The fit is {verdict}."]  # stands above
        print("", decision(answer), choices(answer), *told, *critical(surface, answer), sep="\n")
        if options.late_switch:
            print(late(surface, answer, options.late_switch, speedup))
    if options.iso_flop:
        rows = iso_flop(surface, options.budget, speedup=speedup, points=9, kappa=options.kappa)
        print("\nLoss along each budget, around the best size:", show.frame(rows, LOSSES), sep="\n")
    if options.iso_loss:
        rows = iso_loss(surface, options.iso_loss, speedup=speedup, kappa=options.kappa)
        print("\nThe smallest budget that reaches a loss:", show.frame(rows, LOSSES), sep="\n")
    if options.out:
        save(options, answers, str(verdict))
    return 0


def save(options: argparse.Namespace, answers: list[Advice], verdict: str) -> None:
    """advice.json: the tables as records."""
    found = [{"budget": a.budget, "best": a.best, "reference": a.reference, "level": a.level, "notes": a.notes,
              "precisions": a.table.rename_axis("precision").reset_index().to_dict("records")}
             for a in answers]  # fmt: skip
    write(
        options.out / "advice.json",
        {"law": options.law, "verdict": verdict, "command": options.command, "advice": found},
    )
    print(f"\nwritten: {options.out / 'advice.json'}")


def decision(answer: Advice) -> str:
    """The answer in one sentence: what is best, and how sure that is."""
    head = (
        f"With {answer.budget:.3g} FLOP at the speed of {answer.reference}, the smallest loss is that of {answer.best}"
    )
    shares = answer.table["p_best"].astype(float)
    if math.isnan(shares[answer.best]):
        return f"{head}."
    rivals = [f"{name} in {share:.0%}" for name, share in shares.items() if name != answer.best and share >= 0.005]
    sure = "" if shares[answer.best] >= answer.level else ": these runs do not settle it"
    return (
        f"{head}, in {shares[answer.best]:.0%} of the refits{' (' + ', '.join(rivals) + ')' if rivals else ''}{sure}."
    )


def choices(answer: Advice) -> str:
    """One row a precision, the best first."""
    rows = [("precision", "speed-up", "N", "D", "loss", "interval", "break-even", "interval", "better", "best of all")]
    for name, row in answer.table.iterrows():
        even = ("1", "-") if name == answer.reference else (f"{row.break_even:.3g}", _between(row, "break_even", ".3g"))
        chance = ["-" if math.isnan(p) else f"{p:.0%}" for p in (row.p_better, row.p_best)]
        loss = (f"{row.loss:.4f}", _between(row, "loss", ".4f"))
        better = "-" if name == answer.reference else chance[0]
        rows.append(
            (str(name), f"{row.speedup:g}", show.count(row.N), show.count(row.D), *loss, *even, better, chance[1])
        )
    return show.aligned(rows)


def critical(surface: Surface, answer: Advice) -> list[str]:
    """For precisions whose law has one: the tokens beyond which training longer makes the loss worse."""
    found = []
    for name, row in answer.table.iterrows():
        at, low, high = interval(critical_tokens(surface, str(name), float(row.N)), answer.level)
        if math.isfinite(at):
            tokens = show.count(at) + ("" if math.isnan(low) else f" ({show.count(low)} to {show.count(high)})")
            found.append(
                f"{name}: by this law, more than {tokens} tokens make the loss of {show.count(row.N)} parameters worse."
            )
    return found


def check_late(surface: Surface, label: str, speedup: dict[str, float]) -> None:
    """Raises ValueError for a switch that is none, or that cannot gain anything."""
    others = [name for name in surface.precisions if name != surface.reference]
    if label not in others:
        raise ValueError(
            f"--late-switch {label}: give a precision other than the reference: {', '.join(others) or 'none'}"
        )
    if label not in speedup:
        raise ValueError(f"--late-switch {label} needs its --speedup: without one nothing is gained by low precision")


def late(surface: Surface, answer: Advice, label: str, speedup: dict[str, float]) -> str:
    """The table of a late switch to the reference, at that precision's best N and D."""
    row = answer.table.loc[label]
    rows = late_switch(surface, label, float(row.N), float(row.D), speedup=speedup)
    measured = recovered(surface.fit.table, surface.reference)
    lines = [
        f"\n{label} at N = {show.count(row.N)} on {show.count(row.D)} tokens, the last share of them in "
        f"{answer.reference}; `needed` is the share of the gap that the switch must recover to beat staying:",
        show.frame(rows, LOSSES),
    ]
    if len(measured):
        lines += ["Measured on runs that switched:", show.frame(measured)]
    else:
        lines.append("No run of the table switched, so what a switch recovers is not known here: train one of each.")
    return "\n".join(lines)


def _between(row: pd.Series, name: str, form: str) -> str:
    return show.between(row[f"{name}_low"], row[f"{name}_high"], form)


def _numbers(given: dict[str, str]) -> dict[str, Any]:
    """Values that are numbers as numbers, others as labels."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


def _largest(given: list[str]) -> float | dict[str, float]:
    """--max-params 7e9, or bf16=7e9 nvfp4=12e9."""
    if len(given) == 1 and "=" not in given[0]:
        try:
            return float(given[0])
        except ValueError:
            raise ValueError(f"--max-params {given[0]}: give a number, or PRECISION=NUMBER for each") from None
    return settings(given, "--max-params", number=True) if given else math.inf
