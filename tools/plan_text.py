"""A forecast (tools/plan_forecast.py) for people: one page of text."""

from collections.abc import Callable
from typing import Any

from lowprec.parallel.account import amount
from lowprec.parallel.devices import Hardware

Forecast = dict[str, Any]
_TIMES = ("compute", "serial", "bubble", "weights", "gradients", "update")


def page(found: Forecast, hardware: Hardware, others: dict[str, Forecast], table: str) -> str:
    """Everything; others: what-if columns by name; table: the rule table."""
    lines = [
        f"{found['name']} on {found['devices']} x {found['device']}: arithmetic on the configuration and on published "
        "values; nothing is measured",
        *(f"note: {note}" for note in found["notes"]),
        "",
        *_size(found),
        "",
        *_products(found),
        "",
        *_memory(found, hardware),
        "",
        *_wire(found),
        "",
        *_time(found, hardware),
        "",
        *_checkpoint(found),
    ]
    if others:
        lines += ["", *_what_if({found["name"]: found} | others)]
    where = "layers: the rules at the start; backends are asked on this machine, where one may miss the device"
    return "\n".join([*lines, "", where, "", table])


def _size(found: Forecast) -> list[str]:
    parts = {name: size for name, size in found["parameters_by_part"].items() if size and name != "non_embedding"}
    split = ", ".join(f"{name} {_count(size)}" for name, size in parts.items())
    return [
        f"parameters  {_count(found['parameters'])}: {split}",
        f"layers      {found['block_linears']} linear layers in blocks, {found['high_precision_linears']} of them in "
        "high precision",
        f"training    {found['steps']:,} steps x {_count(found['tokens_per_step'])} tokens = "
        f"{_count(found['tokens'])} tokens, {found['flops_per_token'] * found['tokens']:.3g} FLOP",
    ]


def _products(found: Forecast) -> list[str]:
    total = sum(found["flops_by_precision"].values())
    rows: list[tuple[str, ...]] = [("product", "recipe", "operands", "layers", "runs as", "FLOP a step", "share")]
    for p in found["products"]:
        row = (p["role"], p["recipe"], p["operands"], str(p["layers"]), p["runs_as"])
        rows.append((*row, f"{p['flops']:.3g}", f"{p['flops'] / total:.1%}"))
    reasons = dict.fromkeys(p["why"] for p in found["products"] if p["why"])
    shares = [
        f"{when}: " + ", ".join(f"{name} {flops / sum(by.values()):.1%}" for name, flops in by.items())
        for when, by in (
            ("of the first step's FLOPs", found["flops_by_precision"]),
            ("of the run's FLOPs", found["flops_by_precision_of_run"]),
        )
    ]
    return [*_columns(rows), *shares, *(f"note: {reason}" for reason in reasons)]


def _memory(found: Forecast, hardware: Hardware) -> list[str]:
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    lines = [
        f"layout: {found['layout_in_words']}; {found['micro_batches']} micro-batches a step and rank",
        f"memory of a rank: {amount(found['memory_total_bytes'])} at its fullest ({found['memory_moment']}); {fits} in "
        f"{amount(hardware.memory_bytes)} of which {hardware.reserve:.0%} stay free",
        *(f"  {name:<24}{amount(part):>10}" for name, part in found["memory_bytes"].items()),
    ]
    choices = ", ".join(f"{how} {amount(size)}" for how, size in found["memory_by_recompute"].items())
    return [*lines, f"  by parallel.recompute: {choices}"]


def _wire(found: Forecast) -> list[str]:
    sent = found["wire_bytes_per_step"]
    head = f"received by a rank in a step, logical bytes: {amount(sum(sent.values()))}"
    return [head, *(f"  {name:<32}{amount(part):>10}" for name, part in sent.items())]


def _time(found: Forecast, hardware: Hardware) -> list[str]:
    peak = "a round number: no CPU's peak is published" if hardware.name == "cpu" else "products at the published peak"
    lines = ["time"]
    for phase in found["phases"]:
        parts = " + ".join(f"{name} {s:.3g}" for name, s in phase["ideal_step_s_by_precision"].items())
        rest = " + ".join(f"{name} {phase['step_s_by_part'][name]:.2g}" for name in _TIMES)
        lines += [
            f"  from {phase['from']:.0%} of training:",
            f"    ideal step      {phase['ideal_step_s']:.3g} s = {parts} ({peak})",
            f"    estimated step  {phase['step_s']:.3g} s = {rest}",
        ]
    return [
        *lines,
        f"  ideal {_days(found['ideal_days'])}, estimated {_days(found['days'])} "
        f"({hardware.compute_share:.0%} of the peak in products and {hardware.link_share:.0%} of the links: assumed); "
        f"{_count(found['tokens_per_s'])} tokens/s",
        f"  utilisation {found['utilisation']:.1%}, MFU against the bf16 peak {found['mfu']:.1%}, of the estimate",
        f"  {hardware.name}: {hardware.source}",
    ]


def _checkpoint(found: Forecast) -> list[str]:
    every = found["checkpoint_every"]
    when = f"every {every:,} steps, {every * found['step_s'] / 3600:.2g} h" if every else "at the end only"
    return [
        f"checkpoint: {amount(found['checkpoint_bytes'])}, {found['checkpoint_s']:.3g} s at "
        f"{amount(found['storage_bytes_per_s'])}/s of storage; {when}"
    ]


def _what_if(columns: dict[str, Forecast]) -> list[str]:
    def share(found: Forecast) -> str:
        by = found["flops_by_precision_of_run"]
        return ", ".join(f"{name} {flops / sum(by.values()):.0%}" for name, flops in by.items())

    rows: dict[str, Callable[[Forecast], str]] = {
        "linears in high precision": lambda f: f"{f['high_precision_linears']} of {f['block_linears']}",
        "FLOPs of the run": share,
        "ideal step, s": lambda f: f"{f['ideal_step_s']:.3g}",
        "estimated step, s": lambda f: f"{f['step_s']:.3g}",
        "ideal days": lambda f: f"{f['ideal_days']:.3g}",
        "estimated days": lambda f: f"{f['days']:.3g}",
        "memory of a rank": lambda f: amount(f["memory_total_bytes"]),
        "received in a step": lambda f: amount(sum(f["wire_bytes_per_step"].values())),
    }
    body = [(name, *(show(found) for found in columns.values())) for name, show in rows.items()]
    return _columns([("what if", *columns), *body])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _count(number: float) -> str:
    """Four digits and a unit: 12.31 B."""
    for unit in ("", " k", " M", " B"):
        if number < 999.95:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:,.4g} T"


def _days(days: float) -> str:
    return f"{days:.3g} days" if days >= 1 else f"{days * 24:.3g} h" if days >= 1 / 24 else f"{days * 1440:.3g} min"
