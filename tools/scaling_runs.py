"""Which runs: the options that every command of `lowprec-scaling` shares, and the table that they choose.

Runs are read, then chosen: ``--precision``, then ``--where``, then ``--drop-highest``. What was left out stays in the
table's list with the option that left it out, and is printed and written with every result.
"""

import argparse
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lowprec.scaling.read import read
from lowprec.scaling.table import LABELS, RunTable

TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    "<": operator.lt, ">": operator.gt,
}  # fmt: skip
TEST = re.compile(r"\s*([\w.]+(?:\s*/\s*[\w.]+)?)\s*(<=|>=|!=|==|=|<|>)\s*(.+?)\s*")


def many(
    p: "argparse.ArgumentParser | argparse._ArgumentGroup", flag: str, metavar: str, text: str, **more: Any
) -> None:
    """An option of one value or more, that may be given again."""
    p.add_argument(flag, nargs="+", action="extend", default=[], metavar=metavar, help=text, **more)


def add_source(p: argparse.ArgumentParser, required: bool = True) -> None:
    """--runs and how to read them."""
    g = p.add_argument_group("runs")
    many(
        g,
        "--runs",
        "SRC",
        "run folders or folders of them, tables, .wandb files, wandb://entity/project",
        required=required,
    )
    many(g, "--columns", "OURS=THEIRS", "columns of tables by other names, such as N=params loss=final_val")
    g.add_argument("--n-kind", choices=("non_embedding", "total"), help="what N counts, where a source does not say")
    g.add_argument("--cache", metavar="DIR", help="keep what W&B sends there, and ask it only once")
    g.add_argument("--loss-unit", choices=("nats", "bits"), default="nats", help="of tables (default: %(default)s)")
    g.add_argument(
        "--keep-unfinished", action="store_true", help="keep runs that stopped before the end of their schedule"
    )


def add_choice(p: argparse.ArgumentParser) -> None:
    """Which of the runs that were read."""
    g = p.add_argument_group("which of them")
    many(g, "--precision", "LABEL", "only runs in these precisions")
    many(g, "--where", "TEST", "only runs that pass, such as 'N<1e9' 'D/N>=20' 'data==c4' (quote them for the shell)")
    g.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave out the K runs of the highest loss")


def settings(pairs: Iterable[str], option: str, number: bool = False) -> dict[str, Any]:
    """{name: value} of ["name=value", ...]. Raises ValueError with one sentence."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} {pair}: give NAME=VALUE")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        try:
            found[name] = float(value) if number else value
        except ValueError:
            raise ValueError(f"{option} {pair}: {value!r} is not a number") from None
    return found


def load(options: argparse.Namespace) -> RunTable:
    """The table that the options of `add_source` and, where the command has them, `add_choice` name."""
    table = read(
        options.runs, columns=settings(options.columns, "--columns") or None, n_kind=options.n_kind,
        loss_unit=options.loss_unit, keep_unfinished=options.keep_unfinished, cache=options.cache,
        progress=meter("reading runs", options.progress),
    )  # fmt: skip
    return choose(table, options) if "precision" in options else table


def choose(table: RunTable, options: argparse.Namespace) -> RunTable:
    """The runs that --precision, --where and --drop-highest leave. ValueError if that is none."""
    if options.precision:
        table = only(table, options.precision)
    for test in options.where:
        table = table.where(passes(table, test), f"not {test.strip()} (--where)")
    if len(table) and options.drop_highest:
        table = table.drop_highest(options.drop_highest)
    if not len(table):
        raise ValueError(f"no run is left: {'; '.join(left_out(table)) or 'the sources hold none'}")
    return table


def only(table: RunTable, labels: Sequence[str]) -> RunTable:
    """The runs in these precisions."""
    have = table.frame["precision"].fillna("-").astype(str) if "precision" in table.frame else None
    if have is None:
        raise ValueError(
            "--precision: the run table has no column 'precision'; name it with --columns precision=THEIRS"
        )
    if missing := [label for label in labels if label not in set(have)]:
        raise ValueError(f"--precision {missing[0]}: no run has it; there are {', '.join(sorted(set(have)))}")
    return table.where(have.isin(labels).to_numpy(), f"not in {', '.join(labels)} (--precision)")


def passes(table: RunTable, test: str) -> np.ndarray:
    """(n,) bool: which runs pass a test such as "D/N>=20" or "data==c4"."""
    if not (match := TEST.fullmatch(test)):
        raise ValueError(f"--where {test!r}: give COLUMN, one of < <= > >= == !=, and a value, such as 'N<1e9'")
    left, sign, right = match.groups()
    names = [name.strip() for name in left.split("/")]
    if len(names) == 1 and names[0] in LABELS:
        if sign not in ("==", "=", "!="):
            raise ValueError(f"--where {test!r}: {names[0]} is a label; compare it with == or !=")
        return np.asarray(TESTS[sign](table.column(names[0]).astype(str), right.strip("'\"")), dtype=bool)
    try:
        value = float(right)
    except ValueError:
        raise ValueError(f"--where {test!r}: {right!r} is not a number") from None
    if odd := [name for name in names if table.column(name).dtype == object]:
        raise ValueError(f"--where {test!r}: {odd[0]} is a label, not a number")
    values = table.column(names[0]) / (table.column(names[1]) if len(names) == 2 else 1.0)
    return np.asarray(TESTS[sign](values, value), dtype=bool)


def left_out(table: RunTable, names: int = 3) -> list[str]:
    """One line a reason: how many runs it left out, and the first few of them."""
    reasons: dict[str, list[str]] = {}
    for gone in table.dropped:
        reasons.setdefault(gone.reason, []).append(gone.run)
    lines = []
    for reason, runs in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(runs) > names else ""
        lines.append(f"{len(runs)} left out, {reason}: {', '.join(runs[:names])}{more}")
    return lines


def meter(what: str, wanted: bool) -> Callable[[int, int], None] | None:
    """progress(done, all) that writes one line of stderr again and again, if that is a terminal or `wanted`."""
    terminal = sys.stderr.isatty()
    if not (terminal or wanted):
        return None

    def show(done: int, whole: int) -> None:
        end = "\n" if done >= whole or not terminal else ""
        print(f"{chr(13) if terminal else ''}{what} {done}/{whole}", end=end, file=sys.stderr, flush=True)

    return show
