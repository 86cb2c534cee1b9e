"""What `lowprec-scaling report` puts together: fits, held-out tests, paired gaps, advice and a design, on one page."""

import argparse

from lowprec.scaling.advise import advise
from lowprec.scaling.compare import holdouts
from lowprec.scaling.design import break_even_at, design
from lowprec.scaling.gaps import Gaps, gaps
from lowprec.scaling.report import report
from lowprec.scaling.surface import Surface
from lowprec.scaling.table import RunTable
from lowprec.tools import scaling_show as show
from lowprec.tools.scaling_commands import aim, compared, fitted, names
from lowprec.tools.scaling_record import record, write
from lowprec.tools.scaling_runs import load, settings


def command(options: argparse.Namespace) -> int:
    """The page, its figures, and fit.json of every law in a folder of its name."""
    table = load(options)
    print(show.about(table))
    fits = [fitted(options, table, law) for law in names(options.laws, "--laws")]
    for found, boot, verdict in fits:
        write(options.out / found.law.name / "fit.json", record(found, boot, verdict, table, options.command))
        print(f"\n{found.law.name}: {found.law.law.formula}", *show.judged(verdict), sep="\n")
    directions = options.holdout or [name for name in ("N", "D") if can_hold_out(table, name)]
    held = [compared(options, [found.law for found, _, _ in fits], table, direction) for direction in directions]
    advices, designs = [], []
    found, boot, verdict = next((entry for entry in fits if entry[2].grade != "REFUSE"), fits[0])
    if options.budget or options.next:
        surface = Surface(found, boot, reference=options.reference)
        speedup = settings(options.speedup, "--speedup", number=True)
        if verdict.grade != "REFUSE":
            advices = [advise(surface, budget, speedup=speedup, kappa=options.kappa) for budget in options.budget or ()]
        if options.next:
            best = [str(name) for answer in advices for name in answer.table.index if name != options.reference]
            target = (
                break_even_at(surface, best[0], options.budget[0], kappa=options.kappa)
                if best
                else aim(options, surface)
            )
            designs = [design(surface, target, options.next, kappa=options.kappa)]
    path = report(
        options.title, table, fits, held, paired(table, options.reference), advices, designs, options.command,
        out=options.out, reference=options.reference,
    )  # fmt: skip
    print(f"\nwritten: {path}")
    return 0


def can_hold_out(table: RunTable, direction: str) -> bool:
    """Whether the table has losses, and sizes or tokens per parameter enough to hold some out."""
    try:
        return "loss" in table and bool(holdouts(table, direction))
    except ValueError:
        return False


def paired(table: RunTable, reference: str) -> Gaps | None:
    """Gaps of the precisions to the reference, if there are pairs; without, the page says why there is no figure."""
    try:
        return gaps(table, reference) if "precision" in table else None
    except ValueError:
        return None
