"""kernel_report: what each Triton kernel costs by its machine code, on chips that are not there.

    python tools/kernel_report.py                                  # a table; --json for the rows as a list
    python tools/kernel_report.py --kernel quantize --arch sm_100
    python tools/kernel_report.py --check                          # against docs/kernels.json: nothing may rise
    python tools/kernel_report.py --update                         # docs/kernels.json and docs/kernels.md anew
    python -m lowprec.tools.kernel_report --public                 # kernels of others, fetched to a cache on request

Kernels are compiled ahead of time and their code is executed on the CPU (:mod:`lowprec.tools.kernel_measure`); no GPU,
driver or nvcc is needed, only Triton.  The committed rows are a ratchet: a change to a kernel may not raise bytes,
instructions, registers, stack or shared memory without `--update`, and the diff then shows what it cost.  The numbers
depend on the compiler, so rows are compared only with those of the same version of Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.tools.kernel_measure import Row, chosen, measure, missing_triton
from lowprec.tools.kernel_page import page, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
RATCHET = ("bytes_per_element", "instr_per_element", "registers", "stack_bytes", "shared_bytes")


def dump(rows: list[Row]) -> str:
    """JSON, one row a line: a diff shows what changed."""
    return "[\n" + ",\n".join(json.dumps(row.json()) for row in rows) + "\n]\n"


def load(path: Path) -> list[Row]:
    """The committed rows.

    Raises:
        ValueError: if the file is missing or of another form.
    """
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; make it with --update.") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not of this report's form ({error}); make it anew with --update.") from error


def compare(rows: list[Row], before: list[Row]) -> tuple[list[str], list[str]]:
    """(what got worse or is not committed, what got better), as sentences."""
    old = {row.key: row for row in before}
    worse: list[str] = []
    better: list[str] = []
    for row in rows:
        name = f"{row.kernel}, {row.variant}, {row.arch}"
        if row.key not in old:
            worse.append(f"{name}: not in the committed rows; add it with --update.")
            continue
        was = old[row.key]
        if was.triton != row.triton:
            worse.append(f"{name}: compiled by Triton {row.triton}, committed with {was.triton}: not comparable.")
            continue
        for field in RATCHET:
            now, then = getattr(row, field), getattr(was, field)
            if now is not None and then is not None and now != then:
                (worse if now > then else better).append(f"{name}: {field} {then} -> {now}")
            elif (now is None) != (then is None):
                worse.append(f"{name}: {field} {then} -> {now}")
        if was.instructions_wanted_found and not row.instructions_wanted_found:
            worse.append(f"{name}: a wanted instruction is gone, {row.instructions_wanted}")
    return worse, better


def check(rows: list[Row], before: list[Row], whole: bool) -> int:
    """Print what changed; 1 if something got worse, or was committed and is no more."""
    worse, better = compare(rows, before)
    if whole:
        now = {row.key for row in rows}
        worse += [f"{', '.join(row.key)}: committed and no longer a variant." for row in before if row.key not in now]
    for line in better:
        print(f"better: {line}")
    for line in worse:
        print(f"WORSE: {line}")
    if better:
        print("keep what got better: kernel_report --update")
    print(f"{len(rows)} rows checked, {len(worse)} worse, {len(better)} better")
    return 1 if worse else 0


def update(rows: list[Row], before: list[Row], docs: Path, whole: bool) -> None:
    """Write the rows that were measured over the committed ones, and the page."""
    if not whole:
        new = {row.key: row for row in rows}
        rows = [new.pop(row.key, row) for row in before] + list(new.values())
    for line in compare(rows, before)[0] if before else ():
        print(f"rose: {line}")
    (docs / "kernels.json").write_text(dump(rows))
    (docs / "kernels.md").write_text(page(rows))
    print(f"wrote {docs / 'kernels.json'} and kernels.md: {len(rows)} rows")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("kernel_report", description="Static account of the Triton kernels, without a GPU.")
    p.add_argument("--arch", action="append", default=[], help="sm_90, sm_100 or sm_120; may be repeated")
    p.add_argument("--kernel", action="append", default=[], help='a kernel, or a part of "kernel: variant"')
    p.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    p.add_argument("--check", action="store_true", help="compare with docs/kernels.json; exit code 1 if worse")
    p.add_argument("--update", action="store_true", help="write docs/kernels.json and docs/kernels.md")
    p.add_argument("--public", action="store_true", help="kernels of other projects, fetched to a cache, instead")
    p.add_argument("--docs", type=Path, default=DOCS, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = _parser()
    a = p.parse_args(argv)
    if a.public and (a.check or a.update):
        p.error("--public rows are not kept: leave out --check and --update")
    if a.check and a.update:
        p.error("choose one of --check and --update")
    try:
        if reason := missing_triton():
            raise ValueError(reason)
        return _run(a)
    except ValueError as error:
        print(f"kernel_report: {error}", file=sys.stderr)
        return 2


def _run(a: Any) -> int:
    whole, path = not (a.kernel or a.arch), a.docs / "kernels.json"
    before: list[Row] = []
    if a.check or (a.update and path.exists()):
        try:
            before = load(path)
        except ValueError:
            if not (a.update and whole):  # a whole update replaces what cannot be read
                raise
    if a.public:
        from lowprec.tools.kernel_public import rows_of_others

        rows = rows_of_others(a.kernel, a.arch)
    else:
        rows = [measure(variant, arch) for variant, arch in chosen(a.kernel, a.arch)]
    if a.check:
        return check(rows, before, whole)
    if a.update:
        update(rows, before, a.docs, whole)
    else:
        print(dump(rows) if a.json else table(rows) + "\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
