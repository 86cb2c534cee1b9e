"""What the commands of `lowprec-scaling` do: from parsed options to what is printed and written, and the exit code."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import yaml

from lowprec.scaling.compare import Comparison, compare
from lowprec.scaling.design import Target, break_even_at, candidates, design, first_ladder, gap_at, loss_at
from lowprec.scaling.diagnose import Verdict, judge
from lowprec.scaling.fit import Fit, fit
from lowprec.scaling.gaps import gaps, seed_noise
from lowprec.scaling.law import LawFile, load_law
from lowprec.scaling.laws.curves import CurveLaw
from lowprec.scaling.surface import Surface
from lowprec.scaling.table import REFERENCE, RunTable
from lowprec.scaling.uncertainty import Bootstrap, bootstrap
from lowprec.tools import scaling_show as show
from lowprec.tools.scaling_record import record, write
from lowprec.tools.scaling_runs import load, meter, settings

REFUSED = 3


def ingest(options: argparse.Namespace) -> int:
    table = load(options)
    print(show.about(table))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out)
    print(f"written: {options.out}")
    return 0


def law_of(options: argparse.Namespace, name: str) -> LawFile:
    """The law as --option, --fix and --delta change its file; so held-out tests see the changed one too."""
    given = settings(options.option, "--option")
    try:
        law = load_law(name, **{key: yaml.safe_load(value) for key, value in given.items()})
    except (yaml.YAMLError, TypeError):
        raise ValueError(f"--option {' '.join(options.option)}: law {name} cannot take that") from None
    held = settings(options.fix, "--fix", number=True)
    params = {key: {**law.params.get(key, {}), "fixed": value} for key, value in held.items()}
    huber = law.huber if options.delta is None else options.delta
    return dataclasses.replace(law, huber=huber, params={**law.params, **params})


def expanded(law: LawFile, table: RunTable) -> RunTable:
    """For laws of whole curves, one row a logged point instead of one a run."""
    return law.law.expand(table) if isinstance(law.law, CurveLaw) else table


def fitted(options: argparse.Namespace, table: RunTable, name: str) -> tuple[Fit, Bootstrap | None, Verdict]:
    """A fit with its bootstrap and verdict, as the options ask."""
    law = law_of(options, name)
    found = fit(law, expanded(law, table), seed=options.seed)
    boot: Bootstrap | None = None
    if options.bootstrap and found.free:
        progress = meter(f"{law.name}: bootstrap", options.progress)
        cluster = "run" if isinstance(law.law, CurveLaw) else options.cluster
        boot = bootstrap(
            found, options.bootstrap, seed=options.seed, cluster=cluster, workers=options.workers, progress=progress
        )
        boot = boot if len(boot.x) else None  # no resample determined the parameters
    return found, boot, judge(found, boot)


def fit_one(options: argparse.Namespace) -> int:
    table = load(options)
    found, boot, verdict = fitted(options, table, options.law)
    print(show.about(table), show.fitted(found, boot, verdict), sep="\n\n")
    held = [compared(options, [found.law], table, direction) for direction in options.holdout]
    if options.out:
        heldout = {c.direction: heldout_of(c) for c in held} or None
        write(options.out / "fit.json", record(found, boot, verdict, table, options.command, heldout))
        table.to_csv(options.out / "runs.csv")
        print(f"\nwritten: {options.out / 'fit.json'}, {options.out / 'runs.csv'}")
    return REFUSED if options.strict and verdict.grade == "REFUSE" else 0


def compared(options: argparse.Namespace, laws: Sequence[LawFile], table: RunTable, direction: str) -> Comparison:
    """One direction, printed."""
    progress = meter(f"direction {direction}: law", options.progress)
    done = iter(range(len(laws)))
    tell = (lambda _: progress(next(done), len(laws))) if progress else None
    found = compare(
        laws, table, direction, above=options.above, axis=options.axis,
        bootstraps=options.coverage, seed=options.seed, progress=tell,
    )  # fmt: skip
    if progress:
        progress(len(laws), len(laws))
    head, *rest = found.sentences()
    scored = found.table()[[not score.cannot for score in found.scores]].drop(columns="cannot")
    rows = show.frame(
        scored, {"mae": ".4f", "bias": "+.4f", "gap_mae": ".4f", "gap_bias": "+.4f", "coverage": ".0%", "aicc": ".1f"}
    )
    unable = [text for score, text in zip(found.scores, rest) if score.cannot]
    print("", head, *([rows] if len(scored) else []), *unable, rest[-1], sep="\n")
    return found


def heldout_of(found: Comparison) -> dict[str, Any]:
    """A comparison of one law for fit.json."""
    return {**found.scores[0].as_dict(), "heldout": list(found.holdouts)}


def compare_laws(options: argparse.Namespace) -> int:
    table = load(options)
    laws = [load_law(name) for name in names(options.laws, "--laws")]
    print(show.about(table))
    found = [compared(options, laws, table, direction) for direction in options.holdout]
    print(f"\n{differences(table)}")
    if options.out:
        directions = {
            c.direction: {
                "winner": c.winner,
                "tied": c.tied,
                "heldout": c.holdouts,
                "scores": [s.as_dict() for s in c.scores],
            }
            for c in found
        }
        write(options.out / "compare.json", {"command": options.command, "directions": directions})
        for c in found:
            rows = [s.heldout.assign(law=s.law) for s in c.scores if len(s.heldout)]
            pd.concat(rows or [pd.DataFrame()]).to_csv(options.out / f"heldout_{c.direction}.csv", index=False)
        table.to_csv(options.out / "runs.csv")
        print(f"\nwritten: {options.out}")
    return 0 if all(c.winner for c in found) else 1


def differences(table: RunTable) -> str:
    """Paired gaps between precisions and the seed noise, or why there are none."""
    labels = set(table.frame["precision"].dropna()) if "precision" in table.frame else set()
    if len(labels) < 2:
        return str(seed_noise(table))
    try:
        return str(gaps(table))
    except ValueError as error:
        return f"no paired gaps: {error}"


def names(text: Sequence[str], option: str) -> list[str]:
    """Laws given as a,b c."""
    found = [name for part in text for name in part.split(",") if name]
    if not found:
        raise ValueError(f"{option}: give at least one law")
    if twice := [name for name in found if found.count(name) > 1]:
        raise ValueError(f"{option} {twice[0]} is given twice")
    return found


def design_runs(options: argparse.Namespace) -> int:
    """The first ladder without --runs, else the runs that sharpen the target."""
    ratios = {"ratios": options.ratios} if options.ratios else {}
    if not options.runs:
        labels = options.precision or [REFERENCE]
        ladder = first_ladder(options.budget, precisions=labels, kappa=options.kappa, **ratios).frame
        cells = ladder.groupby(["N", "D"], as_index=False, sort=False).agg(seeds=("seed", "nunique"))
        cells.insert(2, "D/N", cells["D"] / cells["N"])
        print(f"{len(ladder)} runs to begin with, {ladder['C'].sum():.3g} FLOP, each in {', '.join(labels)}:")
        print(show.frame(cells))
        return listed(options, ladder)
    if not options.law:
        raise ValueError("design from --runs needs --law: which runs tell most depends on what they are fitted with")
    found, _, verdict = fitted(options, load(options), options.law)
    surface = Surface(found, reference=options.reference)
    runs = candidates(surface, sizes=options.sizes, **ratios)
    answer = design(
        surface, aim(options, surface), options.budget, options=runs, most=options.most, kappa=options.kappa
    )
    rows = show.frame(answer.runs.rename(columns={"ratio": "D/N"}), {"gain": ".1%"})
    print(
        *show.judged(verdict), "", answer.sentences()[0], *([rows] if len(answer.runs) else []), *answer.notes, sep="\n"
    )
    return listed(options, answer.runs)


def aim(options: argparse.Namespace, surface: Surface) -> Target:
    """What --for and --target ask. Without a target: the loss of the reference at ten times the largest compute."""
    given = settings([part for text in options.target for part in text.split(",")], "--target")
    known = ("precision", "C") if options.purpose == "break-even" else ("N", "D", "precision")
    if odd := [name for name in given if name not in known]:
        raise ValueError(f"--target {odd[0]}: for {options.purpose} it can have {', '.join(known)}")
    precision = given.pop("precision", surface.reference if options.purpose == "loss" else "")
    if not precision:
        others = ", ".join(name for name in surface.precisions if name != surface.reference)
        raise ValueError(f"--for {options.purpose} needs --target precision=LABEL; there are {others or 'none'}")
    at = settings([f"{name}={value}" for name, value in given.items()], "--target", number=True)
    if bad := [name for name, value in at.items() if not 0 < value < math.inf]:
        raise ValueError(f"--target {bad[0]}={at[bad[0]]:g}: give a positive number")
    work = options.kappa * surface.fit.table.column("N") * surface.fit.table.column("D")
    if options.purpose == "break-even":
        return break_even_at(surface, precision, at.get("C", 10 * float(work.max())), kappa=options.kappa)
    if len(at) == 1:
        raise ValueError("--target needs both N and D")
    if not at:
        best = surface.optimum(10 * float(work.max()), precision, kappa=options.kappa)
        at = {"N": float(best.N[0]), "D": float(best.D[0])}
    return (loss_at if options.purpose == "loss" else gap_at)(surface, at["N"], at["D"], precision)


def listed(options: argparse.Namespace, runs: pd.DataFrame) -> int:
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        runs.to_csv(options.out, index=False)
        print(f"written: {options.out}")
    return 0
