"""plan: what a run would take, before it is started.

    lowprec-plan recipe=nvfp4_12b devices=256 device=b200
    lowprec-plan recipe=nvfp4_12b devices=256 device=b200 --what-if bf16,fp8_hybrid,mxfp8 --json
    lowprec-plan --parallel recipe=bf16_tiny model=llama3_8b devices=64 device=h100

(or `python tools/plan.py ...`). The run is composed as `lowprec-train` does it: a recipe and key=value overrides, with
two words more: how many devices, and which (h100, b200, b300, gb200, rtx5090, cpu; without one, this machine's).
Printed are parameters, FLOPs by the precision that runs, memory of a device, bytes by collective in a step as
`wire_bytes` of metrics.jsonl will count them, ideal and estimated time, checkpoints, and the rule table layer by layer.
With ``--what-if`` the same run under other recipes, by the name of a precision file or of a whole recipe. With
``--parallel``: every way to lay the run out over so many devices, which one `parallel=auto` takes, and why.

Nothing is run and nothing is measured: memory and bytes are computed from shapes, times from published values. The
devices it plans for need not be there. docs/planner.md names every assumption.

Exit codes: 0; 2 the command or a setting is wrong, or no layout fits (a sentence says the smallest change that would).
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lowprec.config import Run, load
from lowprec.launch.train import SHIPPED, check_overrides, compose_run, explain, groups
from lowprec.linear import Plan
from lowprec.parallel import EngineKind
from lowprec.parallel.auto import Proposal, propose, this_machine
from lowprec.parallel.devices import ALIASES, HARDWARE, Hardware, device_named
from lowprec.parallel.job import uncuttable
from lowprec.parallel.layout import Job, Layout, refusal
from lowprec.tools.plan_forecast import Forecast, Wishes, forecast, layers
from lowprec.tools.plan_text import page
from lowprec.train import plan_model
from lowprec.train.session import DTYPES, job_of_run

WORDS = ("devices", "device")
"""What is said like an override and is no setting of the run."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (see above)."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        hardware = hardware_of(options)
        wishes = Wishes(options.devices, hardware, options.storage)
        run, notes = composed(options)
        _, plan = plan_model(run)
        if options.parallel:
            proposal = proposed(run, plan, wishes)
            print(json.dumps(proposal.to_dict(), indent=1) if options.json else proposal.table(options.rows))
            return 0 if proposal.chosen else 2
        job, layout = laid_out(run, plan, wishes)
        found = forecast(run, plan, job, layout, wishes) | {"notes": notes}
        others = {name: what_if(name, options, run, layout, wishes) for name in options.what_if}
        device = torch.device("cpu" if hardware.name == "cpu" else "cuda")
        if options.json:
            found |= {"hardware": dataclasses.asdict(hardware), "layers": layers(run, plan, device), "what_if": others}
            print(json.dumps(found, indent=1))
        else:
            table = plan.table(run.train.micro_batch * run.data.seq_len, DTYPES[run.train.dtype], device)
            text = page(found, hardware, others, table)
            if options.write:
                write(options.write, f"lowprec-plan {' '.join(shown(argv))}", text)
            print(text)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        print(f"plan: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Options; everything else is an override of the run."""
    parser = argparse.ArgumentParser(
        prog="lowprec-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = int(os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--devices", "--world", type=int, default=here, help="how many; also devices=N")
    parser.add_argument("--device", "--hardware", help=f"also device=NAME: {', '.join((*HARDWARE, *ALIASES))}")
    parser.add_argument("--what-if", type=lambda text: text.split(","), default=[], metavar="NAME,NAME")
    parser.add_argument("--storage", type=float, default=1e10, metavar="BYTES/S",
                        help="what all devices together write to storage (default 1e10, an assumption)")  # fmt: skip
    parser.add_argument("--efficiency", type=float, metavar="SHARE",
                        help="share of the peak that products reach (default 0.4, an assumption)")  # fmt: skip
    parser.add_argument("--parallel", action="store_true", help="every layout, the choice and the reason")
    parser.add_argument("--per-node", type=int, help="devices that share a node's links")
    parser.add_argument("--device-memory", type=float, metavar="BYTES", help="memory of a device")
    parser.add_argument("--inside", type=float, metavar="BYTES/S", help="a device's links in a node, one direction")
    parser.add_argument("--between", type=float, metavar="BYTES/S", help="a device's share of the network")
    parser.add_argument("--flops", type=float, metavar="FLOP/S", help="what products reach on a device")
    parser.add_argument("--precision", help="of the peak that compares layouts: bf16, fp8 or fp4 (default bf16)")
    parser.add_argument("--rows", type=int, default=12, help="layouts to print")
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("--json", action="store_true", help="plain values; docs/planner.md lists the keys")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the text between the marks of a page, too")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args([f"--{word}" if word.partition("=")[0] in WORDS else word for word in argv])


def hardware_of(options: argparse.Namespace) -> Hardware:
    """The device: of the table or this machine's, with what the command line replaces."""
    for name in ("devices", "per_node", "device_memory", "inside", "between", "flops", "storage", "efficiency"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive")
    here = options.device is None
    known = this_machine(options.per_node or options.devices) if here else device_named(options.device)
    given: dict[str, Any] = {
        "per_node": options.per_node,
        "memory_bytes": options.device_memory,
        "inside_bytes_per_s": options.inside,
        "between_bytes_per_s": options.between,
        "precision": options.precision,
        "compute_share": options.efficiency,
    }
    if options.flops:
        given |= {
            "flops": {"bf16": known.flops["bf16"]} | {options.precision or "bf16": options.flops},
            "compute_share": 1.0,
        }
    hardware = dataclasses.replace(known, **{key: value for key, value in given.items() if value is not None})
    assert hardware.flops_per_s > 0  # or the precision is refused here
    return hardware


def composed(options: argparse.Namespace) -> tuple[Run, list[str]]:
    """The run, with a batch that so many devices can share, and what was changed for that."""
    check_overrides(options.overrides, groups([SHIPPED, *options.config_dir]))
    run = load(compose_run(options.overrides, options.config_dir))
    if run.parallel.engine is EngineKind.deepspeed:
        raise ValueError("DeepSpeed's memory and bytes are its own: accounts are of FSDP2; choose another parallel=")
    if run.parallel.auto:
        return run, []
    sizes, t = run.parallel.sizes(options.devices), run.train
    data, micros = sizes["replicate"] * sizes["shard"], t.global_batch // t.micro_batch
    if micros % data == 0:
        return run, []
    batch = t.micro_batch * data * max(1, round(micros / data))
    others = [text for text in options.overrides if not text.startswith("train.global_batch=")]
    note = (
        f"the {t.global_batch} sequences of a step cannot be shared evenly by {data} data-parallel ranks: planned with "
        f"train.global_batch={batch}; training refuses the other"
    )
    return load(compose_run([*others, f"train.global_batch={batch}"], options.config_dir)), [note]


def proposed(run: Run, plan: Plan, wishes: Wishes) -> Proposal:
    """Every layout, and the one to take."""
    job = job_of_run(run, plan, wishes.hardware.per_node, wishes.hardware.name == "cpu")
    return propose(job, wishes.devices, wishes.hardware, run.parallel, uncuttable(plan, run.data.seq_len))


def laid_out(run: Run, plan: Plan, wishes: Wishes) -> tuple[Job, Layout]:
    """What is trained, and its layout. Raises ValueError if a recipe cannot be cut like this."""
    job = job_of_run(run, plan, wishes.hardware.per_node, wishes.hardware.name == "cpu")
    if run.parallel.auto:
        return job, proposed(run, plan, wishes).layout
    layout = Layout.of(run.parallel, wishes.devices)
    if why := refusal(job, layout) or uncuttable(plan, run.data.seq_len)(layout):
        raise ValueError(f"{layout}: {why}")
    return job, layout


def what_if(name: str, options: argparse.Namespace, run: Run, layout: Layout, wishes: Wishes) -> Forecast:
    """The same run with the precision of another file of recipes/precision, or of another recipe."""
    choices = groups([SHIPPED, *options.config_dir])
    if name in choices["precision"]:
        precision = yaml.safe_load(choices["precision"][name].read_text(encoding="utf-8"))
    else:
        check_overrides([f"recipe={name}"], choices)
        precision = load(compose_run([f"recipe={name}"], options.config_dir)).precision
    other = dataclasses.replace(run, name=name, precision=precision)
    _, plan = plan_model(other)
    job = job_of_run(other, plan, wishes.hardware.per_node, wishes.hardware.name == "cpu")
    return forecast(other, plan, job, layout, wishes)


def shown(argv: list[str] | None) -> list[str]:
    """The command's words, without --write and its page."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--write")
    return words[:at] + words[at + 2 :]


def write(file: Path, command: str, text: str) -> None:
    """Puts a command and its output between the two marks of a page. Raises ValueError if it has none."""
    old = file.read_text(encoding="utf-8")
    before, mark, rest = old.partition("<!-- plan -->\n")
    _, end, after = rest.partition("<!-- end of plan -->")
    if not mark or not end:
        raise ValueError(f"{file} has no place for a plan: put <!-- plan --> and <!-- end of plan --> into it")
    file.write_text(f"{before}{mark}```text\n$ {command}\n{text}\n```\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
