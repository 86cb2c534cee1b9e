"""plan: what a run would be, before it is started: precision, memory, bytes on the wire, and the layout to take.

    python tools/plan.py recipe=nvfp4_130m comm=nvfp4_fp8 --world 4
    python tools/plan.py --parallel recipe=nvfp4_130m train.micro_batch=8 --world 64 --per-node 8 --device-memory 80e9
    python tools/plan.py --parallel recipe=bf16_tiny model=llama3_8b --world 64 --hardware b200 --json

The run is composed as `lowprec-train` does it: a recipe and key=value overrides. Printed are the precision plan and the
account of the configured layout: memory of a rank and logical bytes by collective in a step, as `wire_bytes` of
metrics.jsonl will count them. With ``--parallel``: every way to lay the run out over so many ranks, with its account
and an estimate of the step, which one `parallel=auto` takes, and why.

Nothing is run and nothing is measured. Memory and bytes are computed from shapes; times from the data sheet of
``--hardware`` or the speeds given, and are only good for comparing layouts. Without ``--hardware`` the devices are this
machine's.

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

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lowprec.config import Run, load
from lowprec.launch.train import SHIPPED, check_overrides, compose_run, explain, groups, size_of
from lowprec.linear import Plan
from lowprec.parallel import EngineKind
from lowprec.parallel.account import account
from lowprec.parallel.auto import propose, this_machine
from lowprec.parallel.estimate import HARDWARE, Hardware
from lowprec.parallel.job import uncuttable
from lowprec.parallel.layout import Job, Layout
from lowprec.train import plan_model
from lowprec.train.session import job_of_run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (see above)."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        check_overrides(options.overrides, groups([SHIPPED, *options.config_dir]))
        run = load(compose_run(options.overrides, options.config_dir))
        if run.parallel.engine is EngineKind.deepspeed:
            raise ValueError(
                "DeepSpeed's memory and bytes are its own: accounts are of FSDP2; choose another parallel="
            )
        hardware = hardware_of(options)
        _, plan = plan_model(run)
        job = job_of_run(run, plan, hardware.per_node, hardware.name == "cpu")
        if options.parallel or run.parallel.auto:
            proposal = propose(job, options.world, hardware, run.parallel, uncuttable(plan, run.data.seq_len))
            if options.parallel:
                print(json.dumps(proposal.to_dict(), indent=1) if options.json else proposal.table(options.rows))
                return 0 if proposal.chosen else 2
        layout = proposal.layout if run.parallel.auto else Layout.of(run.parallel, options.world)
        print(json.dumps(report(job, layout), indent=1) if options.json else text(run, plan, job, layout))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        print(f"plan: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Options; everything else is an override of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", action="store_true", help="every layout, the choice and the reason")
    parser.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks")
    parser.add_argument("--per-node", type=int, help="ranks that share a node's links")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), help="data-sheet values of a device")
    parser.add_argument("--device-memory", type=float, metavar="BYTES", help="memory of a rank")
    parser.add_argument("--inside", type=float, metavar="BYTES/S", help="a device's links in a node, one direction")
    parser.add_argument(
        "--between", type=float, metavar="BYTES/S", help="a device's share of the network, one direction"
    )
    parser.add_argument("--flops", type=float, metavar="FLOP/S", help="what products reach on a device")
    parser.add_argument("--precision", help="of the data sheet's FLOP/s: bf16, fp8 or fp4 (default bf16)")
    parser.add_argument("--rows", type=int, default=12, help="layouts to print")
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(argv)


def hardware_of(options: argparse.Namespace) -> Hardware:
    """The device: a data sheet or this machine, with what the command line replaces."""
    for name in ("world", "per_node", "device_memory", "inside", "between", "flops"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive")
    known = HARDWARE.get(options.hardware) or this_machine(options.per_node or options.world)
    given: dict[str, Any] = {
        "per_node": options.per_node,
        "memory_bytes": options.device_memory,
        "inside_bytes_per_s": options.inside,
        "between_bytes_per_s": options.between,
        "precision": options.precision,
    }
    if options.flops:
        given |= {"flops": {options.precision or "bf16": options.flops}, "compute_share": 1.0}
    hardware = dataclasses.replace(known, **{key: value for key, value in given.items() if value is not None})
    assert hardware.flops_per_s > 0  # or the precision is refused here
    return hardware


def text(run: Run, plan: Plan, job: Job, layout: Layout) -> str:
    """The precision plan, then the account."""
    table = plan.table(run.train.micro_batch * run.data.seq_len)
    return "\n".join([size_of(run), "", table, "", str(account(job, layout))])


def report(job: Job, layout: Layout) -> dict[str, Any]:
    """The account as plain values."""
    fields = dataclasses.asdict(layout) | {"recompute": layout.recompute.value}
    return {"layout": fields, "ranks": layout.ranks} | account(job, layout).to_dict()


if __name__ == "__main__":
    sys.exit(main())
