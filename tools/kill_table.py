"""What kills a run, and what does not: faults against real runs, and whether the numbers are still those of a run that
nothing happened to.

    python tools/kill_table.py                    every fault, as a table
    python tools/kill_table.py --quick --json     some of them, as [{fault, outcome, lost_steps, lost_tokens, ...}]
    python tools/kill_table.py --only hang        those whose name has this in it
    python tools/kill_table.py --write docs/scaling-out.md      the table, between the marks in that file

A run is launch/train.py in real processes, two unless the fault says otherwise, forked from this one (a fork is there
in a tenth of a second, an interpreter with torch in six) and joined by gloo. Faults come from outside, as signals,
limits of the kernel and changes to files; only a bad batch and a slow disk are put in by a function that replaces
another. Then the same command is started again, to the end:

    lost_steps               steps that had been done and were done again
    lost_tokens              tokens that the run has passed over for good: 0, unless the guard was told to
    equal_to_uninterrupted   every line of metrics.jsonl, but for times and memory, has the bits of the run without the
                             fault; after a change of ranks, whose sums have another order, to TOLERANCE of the loss
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import lowprec.train.loop as loop
from lowprec.data import Loader
from lowprec.tools.kill_run import BATCH, EVERY, Failed, Patch, Row, Run, difference, lost_tokens, make_text
from lowprec.train.checkpoint import committed

TOLERANCE = 1e-4  # relative, of a loss in fp32, after so few steps


# ---- faults: each breaks `run`, sees to it that it is finished, and returns what happened


def kill_one(run: Run, victim: int = 1) -> str:
    run.start()
    run.until_step(8)
    run.kill(signal.SIGKILL, victim)
    codes = run.wait(1 - victim)
    said = run.line(r"lost contact to another rank in step \d+")
    return f"{said}, exit {codes[0]}; {run.finish()}"


def kill_all(run: Run) -> str:
    run.start()
    run.until_step(8)
    run.kill(signal.SIGKILL)
    run.wait()
    return f"nothing could be said; {run.finish()}"


def kill_in_save(run: Run) -> str:
    run.start(patch=slow_disk)
    run.until_saving()
    run.kill(signal.SIGKILL)
    run.wait()
    return _torn(run)


def kill_in_async_save(run: Run) -> str:
    run.start("train.checkpoint_async=true", patch=slow_disk)
    run.until_saving()
    step = run.done()
    run.until_step(step + 1)  # training goes on meanwhile
    run.kill(signal.SIGKILL)
    run.wait()
    return f"killed one step further on; {_torn(run)}"


def _torn(run: Run) -> str:
    (torn,) = run.torn()
    how = run.finish()
    if run.torn() or "damaged" in run.said():
        raise Failed(f"{torn} should have been removed without a word")
    return f"{torn} was torn and never read; {how}"


def terminate(run: Run) -> str:
    run.start()
    run.until_step(8)
    run.kill(signal.SIGTERM)
    codes = run.wait()
    return f"{run.line(r'SIGTERM received: stopped after step [0-9]+')}, exit {codes[0]}; {run.finish()}"


def terminate_early(run: Run) -> str:
    run.start()
    run.until(lambda: run.processes[0].is_alive() and (run.folder / "config.yaml").exists())
    run.kill(signal.SIGTERM)
    codes = run.wait()
    if run.done():
        return f"{run.line(r'SIGTERM received: stopped after step [0-9]+')}, exit {codes[0]}; {run.finish()}"
    return f"{run.line(r'SIGTERM received before the first step')}, exit {codes[0]}; {run.finish()}"


def full_disk(run: Run) -> str:
    run.start()
    run.until_step(2)
    limit_file_size(run.processes[1].pid, 1000)
    run.until(lambda: "could not be saved" in run.said())
    limit_file_size(run.processes[1].pid, resource.RLIM_INFINITY)
    codes = run.wait()
    said = run.line(r"the checkpoint of step \d+ could not be saved: [^;]*")
    return f"{said}; the run went on, exit {codes[0]}"


def full_disk_to_the_end(run: Run) -> str:
    run.start()
    run.until(lambda: committed(run.folder / "checkpoints"))
    limit_file_size(run.processes[1].pid, 1000)
    codes = run.wait()
    run.line("what came after the newest checkpoint is lost")
    return f"the last save failed too, exit {codes[0]}; with room again {run.finish()}"


def limit_file_size(pid: int, limit_bytes: int) -> None:
    """What a process may write to one file, from outside: a full disk that others do not see."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def damage(run: Run, how: Callable[[Path], None]) -> str:
    run.start()
    run.until_step(2 * EVERY + 2)
    run.kill(signal.SIGKILL)
    run.wait()
    how(max(committed(run.folder / "checkpoints").values()) / "__1_0.distcp")
    resumed = run.finish()
    return f"{run.line('the checkpoint of step [0-9]+ is damaged [(][^)]*[)]')}; {resumed}"


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def hang(run: Run, victim: int = 1) -> str:
    run.start("parallel.hang_s=3")
    run.until_step(8)
    run.kill(signal.SIGSTOP, victim)
    codes = run.wait(1 - victim)
    said = run.line(rf"rank {victim}.* hangs: [^;]*")
    run.end()
    return f"'{re.sub(r'[(].*?[)] ', '', said)}', exit {codes[0]}; {run.finish()}"


def hang_in_data(run: Run) -> str:
    run.start("parallel.hang_s=3", patch=stuck_loader)
    codes = run.wait()
    said = run.line(r"rank 1 .* hangs: no progress in step 9, in [^;]*")
    return f"'{re.sub(r'[(].*?[)] ', '', said, count=1)}', exit {codes[0]}; {run.finish()}"


def data_gone(run: Run) -> str:
    run.start()
    run.until_step(8)
    run.kill(signal.SIGKILL)
    run.wait()
    return _put_back(run, lambda: run.finish(expect=2))


def data_gone_while_running(run: Run) -> str:
    run.start()
    run.until_step(8)
    return _put_back(run, lambda: run.wait())


def _put_back(run: Run, meanwhile: Callable[[], Any]) -> str:
    text = run.folder.parent / "text"
    aside = text.rename(text.with_name(f"text_of_{run.folder.name}"))
    try:
        meanwhile()
        said, code = run.line(r"(?<=lowprec-train: ).*"), run.processes[0].exitcode
    finally:
        aside.rename(text)
    if code != 2 or "Traceback" in run.said():
        raise Failed(f"exit code {code}: {run.said()[-1500:]}")
    said = re.sub(r"(;| [(]looked).*", "", said.replace(f"{text.parent}/", ""))
    return f"'{said}', exit {code}; put back, it {run.finish()}"


def bad_batch(run: Run) -> str:
    """The batch is in the reference too; what is more here is that the run is killed afterwards."""
    run.start()
    run.until_step(16)
    run.kill(signal.SIGKILL)
    run.wait()
    resumed = run.finish()
    decided = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    first = decided[0]
    return f"step {first['step']}: {first['what']}, guard: {first['action']}; killed later, {resumed}"


def other_ranks(run: Run, *layouts: tuple[int, str]) -> str:
    went = []
    for ranks, layout in layouts[:-1]:
        run.start(layout, ranks=ranks)
        run.until_step(run.done() + 7)
        run.kill(signal.SIGTERM)
        run.wait()
        went.append(f"{layout.removeprefix('parallel=')} on {ranks} to {run.line('stopped after step [0-9]+')[14:]}")
    ranks, layout = layouts[-1]
    run.finish(layout, ranks=ranks)
    return f"{', '.join(went)}, {layout.removeprefix('parallel=')} on {ranks} to the end"


# ---- what is put into a rank


def slow_disk() -> None:
    """Every fsync takes half a second longer."""
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.5)
        fsync(file)

    os.fsync = slow  # type: ignore[assignment]


def stuck_loader() -> None:
    """The second rank never gets the batch of the ninth step."""
    real = Loader.next_step

    def stuck(self: Loader) -> Any:
        if os.environ["RANK"] == "1" and self.state_dict()["samples"] == 8 * BATCH:
            time.sleep(1e6)
        return real(self)

    Loader.next_step = stuck  # type: ignore[method-assign]


def poison(factor: float) -> None:
    """The batch of the twelfth step has its loss multiplied, whenever it comes."""
    real = loop.forward_backward

    def poisoned(session: Any, batch: Any) -> Any:
        loss = real(session, batch)
        return loss * factor if session.state.loader.state_dict()["samples"] == 12 * BATCH else loss

    loop.forward_backward = poisoned


# ---- the table


@dataclass(frozen=True)
class Fault:
    """One row: what is done, and to which kind of run."""

    name: str
    do: Callable[[Run], str]
    quick: bool = False
    overrides: tuple[str, ...] = ()
    patch: Patch = None
    exact: bool = True


STREAMED = ("data.sources.0.streaming=true",)
FP32 = ("recipe=bf16_tiny", "train.dtype=fp32")
SPIKE = ("guard=rollback", "guard.window=6", "train.checkpoint_every=4")
FAULTS = (
    Fault("kill -9 of one rank", kill_one, quick=True),
    Fault("kill -9 of the first rank", partial(kill_one, victim=0)),
    Fault("kill -9 of all ranks", kill_all),
    Fault("kill -9 during a save", kill_in_save, quick=True),
    Fault("kill -9 during an async save", kill_in_async_save),
    Fault("SIGTERM with a grace period", terminate, quick=True),
    Fault("SIGTERM before the first step", terminate_early),
    Fault("full disk during a save", full_disk),
    Fault("full disk until the end", full_disk_to_the_end),
    Fault("truncated checkpoint file", partial(damage, how=cut_short)),
    Fault("bit-flipped checkpoint file", partial(damage, how=flip_bit), quick=True),
    Fault("hang of a rank (SIGSTOP)", hang, quick=True),
    Fault("hang of the first rank (SIGSTOP)", partial(hang, victim=0)),
    Fault("hang of a rank (in its data)", hang_in_data),
    Fault("data gone at the restart", data_gone),
    Fault("data gone while running (streamed)", data_gone_while_running, overrides=STREAMED),
    Fault("NaN batch, guard=skip", bad_batch, overrides=("guard=skip",), patch=partial(poison, math.nan)),
    Fault("loss spike, guard=rollback", bad_batch, overrides=SPIKE, patch=partial(poison, 9.0)),
    Fault(
        "resume on 4, 2, 1 ranks",
        lambda run: other_ranks(run, (4, "parallel=fsdp"), (2, "parallel=fsdp"), (1, "parallel=single")),
        overrides=FP32,
        exact=False,
    ),
    Fault(
        "resume fsdp, tp, fsdp",
        lambda run: other_ranks(run, (2, "parallel=fsdp"), (2, "parallel=tp"), (2, "parallel=fsdp")),
        overrides=FP32,
        exact=False,
    ),
)  # fmt: skip


class Table:
    """Breaks runs in a folder, and compares each with one of its kind that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = cache(self._reference)
        make_text(folder)

    def _reference(self, overrides: tuple[str, ...], patch: Patch) -> Run:
        run = Run(self.folder / f"reference{len(list(self.folder.glob('reference*')))}", overrides, patch=patch)
        try:
            run.finish()
        finally:
            run.end()
        return run

    def row(self, number: int, fault: Fault) -> Row:
        """Does it."""
        run = Run(self.folder / f"fault{number}", fault.overrides, patch=fault.patch)
        row: Row = {"fault": fault.name}
        try:
            reference = self.reference(fault.overrides, fault.patch)
            row["outcome"] = fault.do(run)
            apart = difference(run, reference)
            row |= {"lost_steps": run.redone, "lost_tokens": lost_tokens(run)}
            row["equal_to_uninterrupted"] = apart == 0 or (not fault.exact and apart < TOLERANCE)
            if apart:
                row["outcome"] += f"; losses differ by at most {apart:.1g} of their value"
            return row
        except Failed as error:
            return row | {"outcome": f"FAILED: {error}", "lost_steps": None, "lost_tokens": None,
                          "equal_to_uninterrupted": False}  # fmt: skip
        finally:
            run.end()


def markdown(rows: list[Row]) -> str:
    """The table for a page."""
    lines = ["| fault | what happened | lost steps | lost tokens | equal to uninterrupted |", "|---|---|---|---|---|"]
    for row in rows:
        equal = "yes" if row["equal_to_uninterrupted"] else "NO"
        lines.append(f"| {row['fault']} | {row['outcome']} | {row['lost_steps']} | {row['lost_tokens']} | {equal} |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- kill table -->", "<!-- end -->"


def write(page: Path, table: str) -> None:
    """Puts the table between its marks in a page, which gets a section for it if it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Scaling out\n"
    if BEGIN not in text:
        text += f"\n## What kills a run, and what does not\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a run was harmed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the five faults that matter most")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name has this in it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run here, and leave everything there")
    options = parser.parse_args(argv)
    chosen = [f for f in FAULTS if options.only in f.name and (f.quick or not options.quick)]
    if not chosen:
        parser.error(f"no fault has {options.only!r} in its name: {', '.join(f.name for f in FAULTS)}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="kill_table_"))
    rows = []
    try:
        table = Table(folder)
        for number, fault in enumerate(chosen):
            rows.append(table.row(number, fault))
            print(f"{fault.name}: {rows[-1]['outcome']}", file=sys.stderr, flush=True)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.markdown or not options.write:
        print(markdown(rows))
    if options.write:
        write(options.write, markdown(rows))
    return 0 if all(row["equal_to_uninterrupted"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
