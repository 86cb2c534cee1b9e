"""Where runs come from: one file a kind of source, each with a function that returns what it found.

    folders        run folders of lowprec: metrics.jsonl and facts.json
    exports        tables: CSV, TSV, JSON, JSON Lines, Parquet; also what the web page of W&B exports
    curve_tables   tables of whole curves: many rows a run, one a step
    wandb_files    .wandb files that the W&B client leaves on the disk
    wandb_api      projects on a W&B server, by the user's own login
    facts          a run's facts and the end of its log -> one row, for all of the above
    columns        names of columns in other people's tables

A row holds columns of :mod:`lowprec.scaling.table`, and what is known about how the run ended in the columns of
`STATUS`, by which :mod:`lowprec.scaling.clean` decides what is kept; `read` returns the table without them.

    _origin        "folder", "wandb" or the path of a table
    _run_id        the same for every copy of one run
    _n_kind        what N counts; empty = the source does not say
    _label         what somebody called the run: its folder, or its name in a table
    _state         of W&B: finished, crashed, failed, killed, running; or "diverged"
    _exit_code     docs/runs.md; 70 = diverged
    _steps_done, _steps_planned, _loss_step    of the last record; of the whole run; of the loss
    _rise          nats: the training loss at the end, less its lowest (means over twentieths of the run)
    _end_lr_frac, _final_frac    the last learning rate over the peak, as it was and as the schedule wants it
"""

import dataclasses

import pandas as pd

from lowprec.scaling.table import Dropped

STATUS_LABELS = ("_origin", "_run_id", "_n_kind", "_label", "_state")
STATUS_NUMBERS = ("_exit_code", "_steps_done", "_steps_planned", "_loss_step", "_rise", "_end_lr_frac", "_final_frac")
STATUS = STATUS_LABELS + STATUS_NUMBERS


@dataclasses.dataclass(frozen=True)
class Found:
    """What one source holds: rows (columns of the run table and of `STATUS`), runs left out, and remarks."""

    frame: pd.DataFrame
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
