"""lowprec-report: one HTML page about one run or several, for those without W&B. It needs no network, now or later.

    lowprec-report runs/nvfp4_tiny                           writes runs/nvfp4_tiny/report.html
    lowprec-report runs/nvfp4 runs/bf16 --out compare.html   curves overlaid, settings compared

Curves, validation with the recipe on and off, heat maps of every measure of the probes (layer x role, newest and over
time), histograms of block scales, events, the precision plan, settings and facts. It reads the run folder only, so it
works while a run goes on, and on what a killed run has left; what is missing is said on the page. Run it again for a
newer page.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.scaling import draw, page
from lowprec.scaling.draw import Drawing
from lowprec.tools import run_figures
from lowprec.tools.run_read import Record, RunView, ago, differences, leaves, read_run
from lowprec.train.sinks_heat import OPERANDS, value_of

LAYER_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((f"{gemm} SQNR, dB", ("gemms", gemm, "out", "sqnr_db")) for gemm in ("fprop", "dgrad", "wgrad")),
    *((f"underflow {gemm} {name}", ("gemms", gemm, name, "underflow_frac")) for gemm, name in OPERANDS),
    ("kurtosis of x", ("gemms", "fprop", "x", "kurtosis")), ("kurtosis of dy", ("gemms", "dgrad", "dy", "kurtosis")),
    ("gradient cosine", ("gradient", "cosine")), ("error, new (B)", ("error", "B")),
    ("error, propagated (A)", ("error", "A")), ("oscillation", ("weight", "oscillation")),
    ("lost updates", ("weight", "lost_frac")), ("EDQ", ("weight", "edq")),
)  # fmt: skip


def shown(drawing: Drawing) -> str:
    """A drawing inside the page."""
    assert drawing.figure is not None
    return page.figure(drawing, draw.embeddable(draw.as_svg(drawing.figure), drawing.name), files=False)


def details(summary: str, body: str) -> str:
    return f"<details><summary>{page.esc(summary)}</summary>\n{body}\n</details>" if body else ""


def report(runs: list[RunView]) -> str:
    """The page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    with draw.styled():
        sections = [
            ("overview", "Overview", overview(runs)),
            ("curves", "Curves", "\n".join(shown(drawing) for drawing in run_figures.curves(runs))),
            ("differences", "Settings that differ", compared(runs)),
        ]
        for i, run in enumerate(runs):
            name, key = (f": {run.name}", f"r{i}-") if len(runs) > 1 else ("", "")
            sections += [
                (f"{key}probe", f"Probes{name}", probe(run, key)),
                (f"{key}events", f"Events{name}", events(run)),
                (f"{key}plan", f"Precision plan{name}", pre(run.plan)),
                (f"{key}settings", f"Settings and facts{name}", settings(run)),
            ]
    intro = page.paragraph(f"Written by lowprec-report on {time.strftime('%Y-%m-%d %H:%M')} from the run folder alone.")
    return page.document(title, intro, sections)


def overview(runs: list[RunView]) -> str:
    """One row a fact, one column a run; then what is missing."""
    about = [facts_of(run) for run in runs]
    keys = list(dict.fromkeys(key for facts in about for key in facts))
    rows = [[key, *((str(facts.get(key, "")), "") for facts in about)] for key in keys]
    head = ["", *(run.name for run in runs)]
    return page.table(head, rows) + page.bullets(
        f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes
    )


def facts_of(run: RunView) -> Record:
    """What a person asks first."""
    last = run.records[-1] if run.records else {}
    judged = next((r for r in reversed(run.records) if "val_loss" in r), {})
    parameters = run.facts.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    steps = f" of {run.steps}" if run.steps else ""
    planned = run.facts.get("tokens")
    out: Record = {
        "state": run.state,
        "exit code": run.exit_code or "none was written",
        "steps": f"{run.step}{steps}",
        "tokens": _count(last.get("tokens")) + (f" of {_count(planned)}" if planned else ""),
        "parameters": _count(parameters.get("total")),
        "of these, without embeddings": _count(parameters.get("non_embedding")),
        "precision": run.facts.get("precision", "?"),
        "plan fingerprint": last.get("plan", run.facts.get("plan", "?")),
        "loss": _number(last.get("loss")),
    }
    if judged:
        out[f"validation loss (step {judged['step']})"] = _number(judged["val_loss"])
        out["the same weights unquantised"] = _number(judged.get("val_loss_high_precision"))
    if last:
        out["tokens per second"] = _count(last.get("tokens_per_s"))
        if remaining := left(run):
            out["time left"] = remaining
        out["starts that logged a step"] = last.get("attempt", 1)
    out["checkpoints"] = f"{len(run.checkpoints)}, newest of step {run.checkpoints[-1]}" if run.checkpoints else "none"
    out["probes"] = run.probe_count
    out["events"] = len(run.events)
    out["W&B run id"] = run.run_id or "none"
    out["folder"] = run.path
    return out


def left(run: RunView) -> str:
    """From the median of the last steps; "" for a run that has ended."""
    times = sorted(r["step_s"] for r in run.records[-50:] if isinstance(r.get("step_s"), (int, float)))
    if not times or run.steps is None or run.exit_code not in ("", "75"):
        return ""
    return f"{ago(times[len(times) // 2] * (run.steps - run.step))} at the present speed"


def compared(runs: list[RunView]) -> str:
    if len(runs) < 2:
        return ""
    rows = [[key, *((_short(value), "") for value in values)] for key, values in differences(runs)]
    if not rows:
        return page.paragraph("None but names and folders.")
    return page.table(["setting", *(run.name for run in runs)], rows)


def probe(run: RunView, prefix: str) -> str:
    """Heat maps of the newest probe, over time in a fold, histograms, and a table of the layers."""
    if not run.probes:
        return page.paragraph("No probe was made: start the run with probe.every=N to measure inside it.")
    newest, parts = run.probes[-1], []
    for drawing, later in run_figures.probes(run, prefix):
        parts.append(shown(drawing) + (details("the same over all probes", shown(later)) if later else ""))
    if histograms := run_figures.scales(run, prefix):
        parts.append(shown(histograms))
    rows = [
        [(name, ""), *(None if math.isnan(value := value_of(layer, path)) else value for _, path in LAYER_COLUMNS)]
        for name, layer in newest["layers"].items() if isinstance(layer, dict)
    ]  # fmt: skip
    table = page.table(["layer", *(name for name, _ in LAYER_COLUMNS)], rows, sortable=True)
    seconds = newest.get("seconds")
    intro = page.paragraph(
        f"The newest probe is that after step {newest['step']}"
        + (f"; it took {seconds:.3g} s. " if isinstance(seconds, (int, float)) else ". ")
        + "Dark cells are the bad ones (of a measure with a sign, those with a colour), empty ones were not measured; "
        "rows are kinds of linear layers, columns blocks."
    )
    return intro + "\n".join(parts) + details("all layers as a table (a click on a head sorts)", table)


def events(run: RunView) -> str:
    if not run.events:
        return page.paragraph("None: neither the guard nor the precision controller has acted.")
    first = ("step", "what", "action", "attempt")
    others = [key for key in dict.fromkeys(k for event in run.events for k in event) if key not in first]
    keys = [*first, *others]
    rows = [[_cell(event.get(key)) for key in keys] for event in run.events]
    return page.table(keys, rows, sortable=True)


def settings(run: RunView) -> str:
    facts = [[key, (_text(value), "")] for key, value in leaves(run.facts).items()]
    return "\n".join(
        [
            details("config.yaml", pre(run.config_text)),
            details("facts.json", page.table(["fact", "value"], facts) if facts else ""),
        ]
    ).strip()


def pre(text: str) -> str:
    return f"<pre>{page.esc(text)}</pre>" if text.strip() else ""


def _cell(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else ("" if value is None else _text(value), "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _short(value: Any, length: int = 70) -> str:
    text = _text(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "not finite" if value is None else str(value)


def _count(value: Any) -> str:
    return draw.count(value) if isinstance(value, (int, float)) else "?"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for what is no run folder or cannot be written."""
    assert __doc__ is not None
    usage, _, rest = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "lowprec-report", description=usage, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    p.add_argument("--out", type=Path, metavar="HTML", help="where to write; of one run, its report.html if not given")
    options = p.parse_args(argv)
    try:
        runs = named(read_run(path) for path in options.runs)
        out = options.out or (options.runs[0] if len(runs) == 1 else Path()) / "report.html"
        write(out, report(runs))
    except ValueError as error:
        print(f"lowprec-report: {error}", file=sys.stderr)
        return 2
    for run in runs:
        print(f"{run.name}: {run.state}, step {run.step}" + (f" of {run.steps}" if run.steps else ""))
    print(out)
    return 0


def named(found: Iterable[RunView]) -> list[RunView]:
    """Runs with names that tell them apart: of folders of one name, the path."""
    runs = list(found)
    names = [run.name for run in runs]
    for run in runs:
        run.name = str(run.path) if names.count(run.name) > 1 else run.name
    return runs


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises ValueError where that is not possible."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another file, --out HTML") from None


if __name__ == "__main__":
    sys.exit(main())
