"""The report: one HTML page that says what a ladder of runs shows, with its figures beside it as SVG and PNG.

The order is that of a reader in a hurry: may the fit be used, what can be concluded and what not, what to train, what
to run next; then the coefficients, the figures, every run, what was dropped, and how to make the page again. Nothing on
it depends on when or where it was made: the same runs give the same bytes.

Figures are drawn from the first fit that was not refused. If all were, the page says so first, gives no advice, and
draws no curve: dots, residuals and intervals remain, for they show why.
"""

import collections
import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lowprec.scaling import draw, page, plots, plots_precision, plots_trust
from lowprec.scaling.advise import Advice
from lowprec.scaling.compare import Comparison
from lowprec.scaling.conclude import conclusions, extent
from lowprec.scaling.curves import lines
from lowprec.scaling.design import Design
from lowprec.scaling.draw import Drawing, count, flop
from lowprec.scaling.gaps import Gaps
from lowprec.scaling.table import LABELS, NUMBERS, REFERENCE, RunTable

if TYPE_CHECKING:
    from lowprec.scaling.diagnose import Verdict
    from lowprec.scaling.fit import Fit
    from lowprec.scaling.uncertainty import Bootstrap

    Fitted = tuple[Fit, Bootstrap | None, Verdict]

ROWS = 2000  # runs in the page's table; the rest is in runs.csv
COUNTS = ("N", "N_total", "N_mean", "D", "unique_tokens")  # columns shown as 1.2B
Thing = TypeVar("Thing")


def report(
    title: str, table: RunTable, fits: "Sequence[Fitted]",
    comparison: "Comparison | Sequence[Comparison] | None" = None, gaps: "Gaps | None" = None,
    advice: "Advice | Sequence[Advice] | None" = None, design: "Design | Sequence[Design] | None" = None,
    command: str = "", *, out: Path, reference: str = REFERENCE,
) -> Path:  # fmt: skip
    """Writes index.html, the figures and runs.csv into the folder `out`, which is made if need be; returns index.html.

    `fits`: (fit, bootstrap or None, verdict), the one that matters most first. `command` made the page, to be
    repeated; `reference` is the precision that others are measured against. Raises ValueError without a fit.
    """
    if not fits:
        raise ValueError("a report needs at least one fit")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    fits = [(fit, boot if boot is not None and len(boot.x) else None, verdict) for fit, boot, verdict in fits]
    main = next((entry for entry in fits if entry[2].grade != "REFUSE"), fits[0])
    refused = main[2].grade == "REFUSE"
    comparisons, advices, designs = several(comparison), several(advice), several(design)
    with draw.styled():
        groups = numbered(drawings(table, main, fits, comparisons, gaps, advices, reference))
    figures = [(name, "\n".join(_figures(group, out))) for name, group in groups.items()]
    left = [f"{d.title}: {d.caption}." for group in groups.values() for d in group if d.figure is None]
    table.to_csv(out / "runs.csv")
    can, cannot = conclusions(*main, comparisons, gaps)
    sections = [
        ("can", "What can be concluded", page.bullets(can)),
        ("cannot", "What cannot be concluded", page.bullets(cannot)),
        ("train", "What to train", _advice(advices, refused)),
        ("next", "Which runs to add", "\n".join(_design(one) for one in designs)),
        ("laws", "Laws compared", "\n".join(_comparison(one) for one in comparisons)),
        ("coefficients", "Coefficients", "\n".join(_coefficients(*entry) for entry in fits)),
        *((draw.file_name(name).lower(), name, body) for name, body in figures),
        ("left", "Not drawn, and why", page.bullets(left)),
        ("runs", "Runs", _runs(table, main[0])),
        ("dropped", "Dropped runs", _dropped(table, [fit for fit, _, _ in fits])),
        ("again", "How to make this page again", _again(table, fits, command)),
    ]
    path = out / "index.html"
    path.write_text(page.document(title, _intro(table, fits, refused), sections), encoding="utf-8")
    return path


def several(thing: "Thing | Sequence[Thing] | None") -> list[Thing]:
    """None, one or many as a list."""
    if thing is None:
        return []
    return list(thing) if isinstance(thing, (list, tuple)) else [thing]  # type: ignore[list-item]


def drawings(
    table: RunTable, main: "Fitted", fits: "Sequence[Fitted]", comparisons: Sequence[Comparison], gaps: Gaps | None,
    advices: Sequence[Advice], reference: str = REFERENCE,
) -> dict[str, list[Drawing]]:  # fmt: skip
    """All figures by section, those without data included (they say why)."""
    fit, boot, verdict = main
    law = lines(fit, boot, "the fit was refused" if verdict.grade == "REFUSE" else "", reference)
    speeds = {str(name): float(s) for name, s in advices[0].table["speedup"].items()} if advices else {}
    intervals = boot.intervals() if boot else {}
    held = [plots_trust.held_out(one, table) for one in comparisons]
    return {
        "Runs and the law": [
            *([plots.loss_compute(law), plots.loss_tokens(law)] if "N" in fit.table and "D" in fit.table else []),
            plots.isoflop(law),
            plots_trust.extrapolation(law, boot),
        ],
        "Precisions": [
            plots_precision.price(law, {name: s for name, s in speeds.items() if s != 1}),
            plots_precision.paired_gaps(gaps, table),
            *plots_precision.efficiency(law, intervals),
        ],
        "How far to trust it": [
            plots_trust.residuals(fit),
            *(held or [Drawing("heldout", "Held-out predictions", "no comparison was given")]),
            *(plots_trust.coefficients(one, refits) for one, refits, _ in fits),
            plots_trust.pairs(fit, boot),
            plots_trust.profile_E(fit, boot),
        ],
    }


def numbered(groups: dict[str, list[Drawing]]) -> dict[str, list[Drawing]]:
    """The same with a number behind every name that occurs again, as names become files."""
    seen: collections.Counter[str] = collections.Counter()
    renamed: dict[str, list[Drawing]] = {name: [] for name in groups}
    for group, drawing in ((group, drawing) for group, found in groups.items() for drawing in found):
        seen[drawing.name] += 1
        again = f"{drawing.name}_{seen[drawing.name]}"
        renamed[group].append(dataclasses.replace(drawing, name=again) if seen[drawing.name] > 1 else drawing)
    return renamed


def _figures(group: Sequence[Drawing], out: Path) -> list[str]:
    return [page.figure(d, draw.save(d.figure, out / d.name)) for d in group if d.figure is not None]


def _intro(table: RunTable, fits: "Sequence[Fitted]", refused: bool) -> str:
    names = draw.precisions(table)
    shown = ", ".join(map(draw.label, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    parts = [
        page.paragraph(f"{len(table)} runs: {extent(table)}; {shown}. Fingerprint of the runs: {table.fingerprint()}.")
    ]
    if refused:
        named = "{0}: {1}" if len(fits) > 1 else "{1}"
        reasons = [named.format(fit.law.name, reason) for fit, _, verdict in fits for reason in verdict.reasons]
        what = "No fit on this page may be used" if len(fits) > 1 else "The fit may not be used"
        parts.append(page.verdict(what, "REFUSE", reasons, loud=True))
    else:
        parts += [page.verdict(f"{f.law.name} ({f.law.law.formula})", v.grade, v.reasons) for f, _, v in fits]
    return "\n".join(parts)


def _spread(row: Any, name: str, form: Any) -> tuple[str, float]:
    """A cell 'value (low to high)'."""
    value, low, high = (float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    text = form(value)
    return (text if low != low else f"{text} ({form(low)} to {form(high)})", value)


def _advice(advices: Sequence[Advice], refused: bool) -> str:
    if refused:
        return page.paragraph("No advice: the fit was refused, see above.")
    parts = []
    for advice in advices:
        rows = []
        for name, row in advice.table.iterrows():
            even = "" if name == advice.reference else _spread(row, "break_even", lambda v: f"{v:.3g}")
            better = "" if name == advice.reference or row.p_better != row.p_better else f"{row.p_better:.0%}"
            rows.append([
                str(name), float(row.speedup), _spread(row, "N", count), _spread(row, "D", count),
                _spread(row, "loss", lambda v: f"{v:.4f}"), even, better,
            ])  # fmt: skip
        best = advice.table.iloc[0]
        choice = f"{advice.best}: N = {count(best.N)}, D = {count(best.D)} tokens, loss {best.loss:.4f}"
        said = f"With {advice.budget:.3g} FLOP at the speed of {advice.reference}, train {choice}."
        parts.append(page.paragraph(f"{said} In parentheses: {advice.level:.0%} intervals."))
        head = ["precision", "speed-up", "N", "D", "loss", "break-even speed-up", f"better than {advice.reference}"]
        parts += [page.table(head, rows), page.bullets(advice.notes)]
    return "\n".join(parts)


def _design(design: Design) -> str:
    first, *_ = design.sentences()
    rows = [
        [str(run.precision), (count(run.N), run.N), (count(run.D), run.D), float(run.ratio), int(run.repeats),
         (f"{run.C:.2g}", run.C)]
        for run in design.runs.itertuples()
    ]  # fmt: skip
    parts = [page.paragraph(first)]
    if rows:
        parts.append(page.table(["precision", "N", "D", "D/N", "seeds", "FLOP"], rows))
    return "\n".join([*parts, page.bullets(design.notes)])


def _figure(value: float, form: str) -> Any:
    """A cell with a formatted number; empty for NaN."""
    return (f"{value:{form}}", value) if value == value else ""


def _comparison(comparison: Comparison) -> str:
    rows = [
        [s.law, *(_figure(value, form) for value, form in ((s.mae, ".4f"), (s.bias, "+.4f"), (s.coverage, ".0%"))),
         s.n or "", *(_figure(value, form) for value, form in ((s.gap_mae, ".4f"), (s.aicc, ".1f"))), s.cannot]
        for s in comparison.scores
    ]  # fmt: skip
    head = ["law", "mean abs. error (nats)", "bias", f"inside {comparison.level:.0%} interval", "runs", "error of gaps",
            "AICc", "" if all(not s.cannot for s in comparison.scores) else "cannot predict it, for"]  # fmt: skip
    held = f"Direction {comparison.direction}; held out: {'; '.join(comparison.holdouts)}."
    return page.paragraph(held) + page.table(head, rows) + page.paragraph(comparison.sentences()[-1])


def _coefficients(fit: "Fit", boot: "Bootstrap | None", verdict: "Verdict") -> str:
    """Natural values beside those at the pivots, with intervals, and the numbers of the fit."""
    natural, pivoted = (boot.intervals(), boot.intervals(pivoted=True)) if boot else ({}, {})

    def interval(of: dict[str, tuple[float, float]], name: str) -> str:
        return f"{of[name][0]:.4g} to {of[name][1]:.4g}" if name in of else ""

    rows = []
    for name, value in fit.params.items():
        note = "at its bound" if name in fit.at_bound else "" if name in fit.free else "held fixed"
        here = [(f"{fit.pivoted[name]:.4g}", fit.pivoted[name]), interval(pivoted, name)]
        rows.append([name, (f"{value:.4g}", value), interval(natural, name), *here, note])
    head = ["coefficient", "natural", "95%", "at the pivots", "95%", ""]
    units = ", ".join(f"{c} = {(flop if c == 'C' else count)(v)}" for c, v in fit.pivots.items())
    spans = ", ".join(f"{name} {value:.3g}" for name, value in fit.spans.items())
    refits = f"{len(boot.x)} refits of resampled {boot.cluster}s" if boot else "no bootstrap"
    facts = (
        f"{verdict.grade}. {len(fit.residuals)} residuals, objective {fit.objective:.6g} (Huber, delta {fit.delta:g}), "
        f"root mean square {fit.rmse:.4g}, condition {fit.condition:.3g}, {fit.reached:.0%} of the restarts "
        f"ended here, {refits}. Largest over smallest: {spans}."
    )
    pivots = (
        f"Values at the pivots take N, D and C relative to their geometric means ({units}): natural A and B are little "
        "known on their own, because each moves with its exponent."
    )
    return f"<h3>{page.esc(fit.law.name)}</h3><p><code>{page.esc(fit.law.law.formula)}</code></p>" + "\n".join(
        [page.table(head, rows), page.paragraph(facts), page.paragraph(pivots) if units else ""]
    )


def _runs(table: RunTable, fit: "Fit") -> str:
    """Every run; columns that are the same for all are said in one line."""
    frame = table.frame.head(ROWS)
    known = [c for c in ("run", "precision", *NUMBERS, *LABELS) if c in frame]
    columns = list(dict.fromkeys([*known, *(c for c in frame if c not in known)]))
    constant = {
        c: frame[c].iloc[0] for c in columns if c != "run" and len(frame) > 1 and frame[c].nunique(dropna=False) == 1
    }
    columns = [c for c in columns if c not in constant]
    predicted = dict(zip(fit.table.frame["run"].astype(str), fit.predict(fit.table)))
    measured = fit.law.law.response
    rows = []
    for _, run in frame.iterrows():
        cells = [_cell(c, run[c]) for c in columns]
        value = predicted.get(str(run["run"]))
        if value is None:
            cells += ["", ""]
        else:
            cells += [(f"{value:.4f}", float(value)), (f"{value - run[measured]:+.4f}", float(value - run[measured]))]
        rows.append(cells)
    parts = [page.bullets(table.notes)]
    if constant:
        same = ", ".join(f"{c} = {_text(_cell(c, value))}" for c, value in constant.items())
        parts.append(page.paragraph(f"The same for all runs: {same}."))
    if len(table) > ROWS:
        parts.append(page.paragraph(f"The first {ROWS} of {len(table)} runs; all are in runs.csv."))
    head = [*columns, f"predicted ({fit.law.name})", "predicted − measured"]
    return "\n".join([*parts, page.table(head, rows, sortable=True)])


def _cell(column: str, value: Any) -> Any:
    """A cell of the table of runs."""
    if value is None or value != value:
        return ""
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if column in COUNTS or column == "C":
            return ((flop if column == "C" else count)(value), value)
        return (f"{value:.4f}", value) if column in ("loss", "loss_hp") else value
    return str(value)


def _text(cell: Any) -> str:
    return cell[0] if isinstance(cell, tuple) else page.number(cell)


def _dropped(table: RunTable, fits: "Sequence[Fit]") -> str:
    dropped = dict.fromkeys([*table.dropped, *(d for fit in fits for d in fit.table.dropped)])
    rows = [[d.run, d.reason, d.source] for d in dropped]
    more = f" The first {ROWS} are shown." if len(rows) > ROWS else ""
    said = page.paragraph(f"{len(rows)} runs were read and left out.{more}") if rows else page.paragraph("None.")
    return said + (page.table(["run", "reason", "source"], rows[:ROWS]) if rows else "")


def _again(table: RunTable, fits: "Sequence[Fitted]", command: str) -> str:
    versions = {"python": platform.python_version()}
    for name in ("lowprec", "numpy", "scipy", "pandas", "matplotlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f"<pre>{page.esc(command)}</pre>" if command else "",
        page.paragraph(f"Runs: {len(table)}, fingerprint {table.fingerprint()} (runs.csv beside this page). {said}."),
    ]
    for fit, _, _ in fits:
        if fit.law.path is not None and Path(fit.law.path).is_file():
            text = Path(fit.law.path).read_text(encoding="utf-8")
            parts.append(
                f"<details><summary>{page.esc(fit.law.name)}.yaml</summary><pre>{page.esc(text)}</pre></details>"
            )
    return "\n".join(filter(None, parts))
