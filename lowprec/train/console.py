"""What a person sees: one line per logged step, and a progress bar with the time left where there is a terminal.

On a pipe or in a log file the same lines come out as plain text. Only the first rank speaks.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lowprec.train.metrics import Record


class Narrator:
    def __init__(self, speaks: bool, total_steps: int = 0) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.total_steps, self._first = total_steps, (0, time.monotonic())
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """A sentence or a table, as it is."""
        self.console.print(Text(text), soft_wrap=True)

    @contextmanager
    def progress(self, step: int) -> Iterator[None]:
        """While the loop runs, which begins after `step` steps: a bar below the lines, on a terminal."""
        self._first = (step, time.monotonic())
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        off = self.console.quiet or not self.console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=off) as self._bar:
            self._bar.add_task("training", total=self.total_steps, completed=step)
            yield
        self._bar = None

    def step(self, record: Record) -> None:
        """One line of a metrics record."""
        first_step, first_s = self._first
        step, total = record["step"], self.total_steps
        left_s = (time.monotonic() - first_s) / max(step - first_step, 1) * (total - step)
        line = Text(f"step {step:>{len(str(total))}}/{total} {step / total:4.0%}  ")
        loss, norm = (math.nan if record[key] is None else record[key] for key in ("loss", "grad_norm"))
        line.append(f"loss {loss:.4f}", style="bold")
        line.append(f"  grad {norm:.3f}  lr {record['lr']:.2e}  {_si(record['tokens_per_s'])} tok/s")
        line.append(f"  data {record['data_s'] / record['step_s']:.0%}  {record['mem_bytes'] / 2**30:.2f} GiB")
        line.append(f"  eta {_clock(left_s)}")
        for key, label in (("val_loss", "val"), ("val_loss_high_precision", "val (high precision)")):
            if key in record:
                value = math.nan if record[key] is None else record[key]
                line.append(f"  {label} {value:.4f}", style="green")
        if "osc_ratio" in record:
            line.append(f"  put to rest {record['osc_ratio']:.2%} of weights")
        self.console.print(line, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)


def _si(x: float) -> str:
    return f"{x / 1e6:.2f}M" if x >= 1e6 else f"{x / 1e3:.1f}k" if x >= 1e3 else f"{x:.0f}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
