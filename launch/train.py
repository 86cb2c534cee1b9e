"""Trains a recipe.

    torchrun launch/train.py recipe=nvfp4_tiny
    torchrun --nproc-per-node 2 launch/train.py recipe=nvfp4_tiny train.steps=50
    lowprec-train --config-dir DIR recipe=mine         (your own recipe in DIR/recipe/mine.yaml)

A run is composed by Hydra from the YAML files of `recipes/` and `key=value` overrides, checked against the
dataclasses of `lowprec.config`, planned on the meta device, and only then built. Whatever is wrong is said in one
sentence before that.

Hydra's own command line is not used: every rank would write log folders, and its errors are stack traces.

Exit codes: 0 finished (before, or cancelled on its W&B page) · 2 the command, a setting or a file is wrong · 70 the
loss diverged · 74 a disk could not be written · 75 stopped by a signal or the time limit and saved, or another rank was
lost: start the same command again. The run folder's file `exit_code` says the same to a scheduler, whatever torchrun
makes of it.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of launch/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))
# Threads that wait go to sleep after a short spin (libgomp reads this when torch is loaded): on cores shared with
# another job its default, a long spin, made a step thirty times slower. It changes no number.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import lowprec.recipes
from lowprec.config import Run, check_world, load
from lowprec.model import count_parameters, flops_per_token
from lowprec.parallel import end_process, start_world, stop_world
from lowprec.train import REQUEUE, Stop, check, laid_out, open_session, plan_model, train
from lowprec.train.checkpoint import UNSAVED
from lowprec.train.signals import Stopped
from lowprec.train.watchdog import leave, lost_contact

SHIPPED = Path(lowprec.recipes.__path__[0])
GROUPS = ("recipe", *get_type_hints(Run))  # folders of YAML files, in recipes/ and in a user's --config-dir


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (see above). A process that has lost another rank does not return, it ends."""
    options = parse(sys.argv[1:] if argv is None else argv)
    stop, run, session = Stop(), None, None
    try:
        with stop.at_once():
            run = prepare(options, stop)
            if run is None:  # it asked for a text, which was printed
                return 0
            session = open_session(run, start_world(run.parallel))
        if session and is_first():
            keep_code(run, REQUEUE)  # what a killed process leaves behind
        code = train(session, stop) if session else 0
    except BaseException as error:
        step = session.state.step if session else None
        code, sentence = outcome(error, stop, step)
        keep_code(run, code, unless_kept=code == REQUEUE)
        if not sentence:
            raise
        if code == 2 and step is None and not is_first():
            time.sleep(3)  # torchrun ends all ranks when one has failed: let the first rank speak
        else:
            print(f"lowprec-train: {sentence}", file=sys.stderr, flush=True)
        if lost_contact(error):
            leave(code)
        return code
    finally:
        stop_world()
    if is_first():
        keep_code(run, code)
    return code


def prepare(options: argparse.Namespace, stop: Stop) -> Run | None:
    """The checked run, or None if a text was asked for instead. Raises what `outcome` explains."""
    choices = groups([SHIPPED, *options.config_dir])
    if options.help:
        print(help_text(choices) if is_first() else "", end="")
        return None
    check_overrides(options.overrides, choices)
    config = compose_run(options.overrides, options.config_dir)
    if options.cfg:
        print(OmegaConf.to_yaml(config) if is_first() else "", end="")
        return None
    run, ranks = load(config), int(os.environ.get("WORLD_SIZE", "1"))
    if options.plan and is_first():
        print(size_of(run))
    stop.limit(run.train.time_limit_s)
    _, plan = plan_model(run)  # a rule that does not fit is found here, before any data is read
    run, why = laid_out(run, plan, ranks)
    check_world(run, ranks)
    if why and is_first():
        print(why, flush=True)
    if options.plan:
        print(plan.table(run.train.micro_batch * run.data.seq_len) if is_first() else "")
        return None
    check(run)
    return run


def outcome(error: BaseException, stop: Stop, step: int | None) -> tuple[int, str]:
    """(exit code, the sentence that says why); "" if this is no mishap but a bug, of which the stack trace is wanted.

    step: steps done, or None if the error came before the first one could be.
    """
    again = "start the same command again"
    if step is None and stop.received and isinstance(error, (Stopped, ValueError)):  # DCP wraps what it meets
        return REQUEUE, f"{stop.received} received before the first step, so nothing was lost: {again}"
    if wire := lost_contact(error):
        when = "before the first step" if step is None else f"in step {step + 1}"
        return REQUEUE, f"rank {os.environ.get('RANK', '0')} lost contact to another rank {when} ({wire}): {again}"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        when = "" if step is None else f", in step {step + 1}"
        return UNSAVED if full else 2, f"{_one_line(explain(error))}{when}; see to that and {again}"
    if step is None and isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)):
        return 2, explain(error)
    return 1, ""


def keep_code(run: Run | None, code: int, unless_kept: bool = False) -> None:
    """Writes `exit_code` into the run folder, for schedulers; where it cannot be written there is none."""
    if run is None or not (code == REQUEUE or Path(run.run.dir).is_dir()):
        return
    file = Path(run.run.dir) / "exit_code"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not (unless_kept and file.exists()):
            file.write_text(f"{code}\n", encoding="utf-8")
    except OSError:
        with suppress(OSError):
            file.unlink()


def is_first() -> bool:
    """Whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"


def command() -> None:
    """The console script: `main`, and an end that no thread can turn into an abort or hold up."""
    try:
        end_process(main())
    except Exception:
        traceback.print_exc()
        leave(1)


def parse(argv: list[str]) -> argparse.Namespace:
    """The few options; everything else is an override. Unknown options end the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="lowprec-train", add_help=False, usage="lowprec-train [options] recipe=NAME [key=value ...]"
    )
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(argv)


# ---- what can be chosen


def groups(folders: list[Path]) -> dict[str, dict[str, Path]]:
    """{group: {option: its YAML file}} over all search folders. A user's file may not bear a shipped one's name."""
    found: dict[str, dict[str, Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder} is not a folder")
        for path in sorted(p for group in GROUPS for p in folder.glob(f"{group}/*.yaml")):
            options = found.setdefault(path.parent.name, {})
            if path.stem in options:
                raise ValueError(
                    f"{path} has the name of {options[path.stem]}: rename it, or one would silently hide the other"
                )
            options[path.stem] = path
    return found


def help_text(choices: dict[str, dict[str, Path]]) -> str:
    """Usage, the recipes with the first line of each file, and the options of every other group."""
    assert __doc__ is not None
    lines = [
        __doc__,
        "options: --config-dir DIR, --cfg job (print the composed YAML), --plan (print the plan and stop), --help",
        "",
    ]
    lines += ["recipe="]
    for name, path in sorted(choices["recipe"].items()):
        comments = [
            line[1:].strip()
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.match("# (?!@package)", line)
        ]
        lines.append(f"  {name:<16}{comments[0] if comments else ''}")
    lines += [
        f"{group}=  {', '.join(sorted(options))}" for group, options in sorted(choices.items()) if group != "recipe"
    ]
    lines += [
        "",
        "keys (KEY=VALUE): " + ", ".join(get_type_hints(Run)) + "; e.g. train.steps=50; see --cfg job for all of them",
        "",
    ]
    return "\n".join(lines)


def size_of(run: Run) -> str:
    """What a run is before anything is allocated: parameters, training FLOPs, tokens."""
    parameters, flops = count_parameters(run.model), flops_per_token(run.model, run.data.seq_len)["total"]
    tokens = run.train.steps * run.train.global_batch * run.data.seq_len
    return (
        f"{run.name}: {parameters['total'] / 1e6:,.1f}M parameters "
        f"({parameters['non_embedding'] / 1e6:,.1f}M without embeddings and head), "
        f"{flops / 1e6:,.0f} MFLOP per token, {tokens / 1e6:,.1f}M tokens, {flops * tokens:.2e} FLOP"
    )


# ---- from the command line to a checked configuration


def compose_run(overrides: list[str], config_dirs: list[Path]) -> DictConfig:
    """The composed, type-checked configuration. `name` defaults to the recipe's."""
    ConfigStore.instance().store(name="schema", node=Run)
    search = ",".join(f"'file://{folder.resolve()}'" for folder in config_dirs)
    # free mappings to Hydra: `++` lets any key through to its own reader, which knows what is valid
    wishes = [f"++{o}" if o.startswith(("precision.", "parallel.deepspeed.")) else o for o in overrides]
    with initialize_config_module("lowprec.recipes", version_base="1.3"):
        try:
            config = compose("train", overrides=[f"hydra.searchpath=[{search}]", *wishes] if search else wishes)
        except AttributeError:  # what OmegaConf says to a mapping where the file has null
            raise ValueError(
                "a setting that is null in its file cannot be given a mapping: choose a file that has one, such as "
                "model=nemotron_h_tiny for model.mamba, and change its keys"
            ) from None
    if not config.name:
        with open_dict(config):
            config.name = next(o.partition("=")[2] for o in overrides if o.startswith("recipe="))
    return config


def check_overrides(overrides: list[str], choices: dict[str, dict[str, Path]]) -> None:
    """Raises ValueError for an override that names no recipe, no option of a group, or no key."""
    seen = set()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ValueError(
                f"{text!r} cannot be read as key=value (list elements are written key.0.sub=value)"
            ) from None
        key = override.key_or_group
        if not key:
            raise ValueError(f"{text!r} has no key: give it as key=value")
        if override.is_delete() or override.is_sweep_override():
            raise ValueError(f"{text!r}: every key of a run has one value; give it as key=value")
        if key in seen:
            raise ValueError(f"{key} is given twice")
        seen.add(key)
        if key in choices and not isinstance(override.value(), dict):
            _check_option(key, str(override.value()), choices)
        else:
            check_key(key)
    if "recipe" not in seen:
        raise ValueError(f"no recipe given: add recipe=NAME, one of {_listed(choices['recipe'])}")


def _check_option(group: str, option: str, choices: dict[str, dict[str, Path]]) -> None:
    if option not in choices[group]:
        raise ValueError(
            f"there is no {group} {option!r}{_did_you_mean(option, choices[group])}; "
            f"{group} can be {_listed(choices[group])}"
        )


def check_key(key: str) -> None:
    """Raises ValueError if `key` (such as train.steps or data.sources.0.path) is not a key of a run."""
    node: Any = Run
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    for i, part in enumerate(parts):
        where = ".".join(parts[:i])
        if get_origin(node) is list:  # `part` is an index
            node = get_args(node)[0]
            continue
        node = next((kind for kind in get_args(node) if is_dataclass(kind)), node)  # X | None
        if not is_dataclass(node):
            if _is_leaf(node):
                raise ValueError(f"there is no key {key!r}: {where} is a single value")
            return  # a free mapping: its own reader checks it
        hints = get_type_hints(node)
        if part not in hints:
            near = _did_you_mean(part, hints, ".".join([*parts[:i], "{}", *parts[i + 1 :]]))
            raise ValueError(f"there is no key {key!r}{near}; {where or 'a run'} has the keys {_listed(hints)}")
        node = hints[part]


def _is_leaf(hint: Any) -> bool:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if isinstance(kind, type)]
    return bool(kinds) and all(issubclass(kind, (int, float, str, Enum, type(None))) for kind in kinds)


# ---- one sentence per error


def explain(error: BaseException) -> str:
    """One sentence out of what Hydra, OmegaConf or YAML raised; a ValueError of ours is one already."""
    if isinstance(error, yaml.YAMLError):
        return f"a recipe is not valid YAML: {_one_line(str(error))}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return _one_line(str(error))
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    source = re.search(r"In '([^']+)'", text)
    where = f"in {source[1]}: " if source and source[1] != "train" else ""
    missing = re.search(r"Could not find '([^'/]+)/([^']+)'", text)
    if missing:
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        group, option = missing.groups()
        return (
            f"{where}there is no {group} {option!r}{_did_you_mean(option, options)}; {group} can be {_listed(options)}"
        )
    group = re.search(r"Could not override '(\w+)'.\s+No match in the defaults list", text)
    if group:
        valid = [name for name in GROUPS if (SHIPPED / name).is_dir()]
        return f"{where}there is no group {group[1]!r}{_did_you_mean(group[1], valid)}; the groups are {_listed(valid)}"
    key = re.search(r"full_key: (\S+)", text)
    if key:
        try:
            check_key(key[1])
        except ValueError as unknown:
            return f"{where}{unknown}"
    known = r"(Value|Invalid|Key|Cannot|Missing|Interpolation|Unsupported|Incompatible|field)"
    message = next((line for line in text.splitlines() if re.match(known, line)), _one_line(text))
    return f"{where}{f'{key[1]}: ' if key else ''}{message}"


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _did_you_mean(name: str, valid: Iterable[str], spelt: str = "{}") -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {spelt.format(close[0])}?)" if close else ""


if __name__ == "__main__":
    command()
