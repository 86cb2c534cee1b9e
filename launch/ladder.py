"""A ladder: a YAML file that stands for many runs, sizes x durations x precisions x seeds, to fit scaling laws to.

::

    recipe: ladder_tiny                       # what the runs have in common
    overrides: [data.seq_len=256]             # optional
    sizes:                                    # by name, the overrides that make one
      d64: [model.dim=64, model.ffn_dim=192]
    tokens: [1.0e6, 4.0e6]                    # of a run; rounded up to whole steps
    precision: [bf16, nvfp4]                  # files of recipes/precision
    seeds: [0]                                # of weights and data; the same seed sees the same data at every precision
    repeats:                                  # optional: more seeds where the noise is to be known
      - {seeds: [1, 2], sizes: [d64], precision: [bf16]}      # a key left out = all of them
    ratio: [2, 500]                           # optional: leave out what has fewer or more tokens a parameter

Instead of `tokens` there may be `tokens_per_param: [5, 20, 80]` (D = r N of each size) or `budgets: [1.0e12, 4.0e12]`
(iso-FLOP: D = C / FLOP per token of each size, with head and attention as in the plan's column FLOP, so with
`model.vocab_size` as it is configured). N is counted without embeddings and head. Durations that come to the same steps
of the same run are merged, since the second would be taken for an independent repeat.

Overrides of a size beat those of the ladder, and those of the command line beat both. What the ladder itself decides
(recipe, precision, seed, train.steps, name, run.dir) is no override.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lowprec.config import Run, load
from lowprec.launch.train import SHIPPED, check_overrides, compose_run, explain, groups
from lowprec.model import count_parameters, flops_per_token
from lowprec.train import check, plan_model

LADDERS = SHIPPED / "sweep"
DURATIONS = ("tokens", "tokens_per_param", "budgets")
KEYS = ("recipe", "overrides", "sizes", *DURATIONS, "ratio", "precision", "seeds", "repeats")
DECIDED = ("recipe", "precision", "seed", "train.steps", "name", "run.dir")

Axes = dict[str, list[Any]]  # {"sizes": names, one of DURATIONS: numbers, "precision": names, "seeds": integers}


@dataclass(frozen=True)
class Ladder:
    """A checked ladder file. Every block of axes stands for all their combinations; a run may be in several."""

    recipe: str
    overrides: list[str]
    sizes: dict[str, list[str]]
    duration: str  # which of DURATIONS
    blocks: list[Axes]
    ratio: tuple[float, float]  # smallest and largest tokens / N


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a ladder."""

    name: str
    size: str
    precision: str
    folder: Path
    run: Run = field(repr=False)
    words: tuple[str, ...] = field(repr=False)  # for lowprec-train
    parameters: int  # without embeddings and head
    steps: int
    tokens: int
    flops_per_token: float

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens


# ---- the file


def path_of(source: str) -> Path:
    """The file that a name or a path stands for."""
    return Path(source) if source.endswith((".yaml", ".yml")) else LADDERS / f"{source}.yaml"


def read_ladder(source: str) -> Ladder:
    """The ladder of that name in recipes/sweep, or of that path. Raises ValueError with one sentence."""
    path = path_of(source)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in LADDERS.glob("*.yaml")))
        raise ValueError(f"there is no ladder {source!r}: give the path of a YAML file, or one of {known}")
    try:
        return _parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        what = "is not valid YAML: " if isinstance(error, yaml.YAMLError) else ""
        raise ValueError(f"{path}: {what}{' '.join(str(error).split())}") from None


def _parse(node: Any) -> Ladder:
    _check_keys(node, KEYS, "a ladder")
    for key in ("recipe", "sizes", "precision"):
        if node.get(key) is None:
            raise ValueError(f"{key} is missing")
    given = [key for key in DURATIONS if key in node]
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(DURATIONS)}, not {' and '.join(given) or 'none'}")
    duration, sizes = given[0], node["sizes"]
    if not isinstance(sizes, dict) or not sizes:
        raise ValueError(f"sizes maps names to lists of overrides, such as {{d64: [model.dim=64]}}, {_is(sizes)}")
    axes: Axes = {
        "sizes": [_name(size, "sizes") for size in sizes],
        duration: _numbers(node[duration], duration),
        "precision": [_name(name, "precision") for name in _list(node["precision"], "precision", "[bf16, nvfp4]")],
        "seeds": _seeds(node.get("seeds", [0])),
    }
    blocks, repeats = [axes], node.get("repeats") or []
    if not isinstance(repeats, list):
        raise ValueError(f"repeats is a list of mappings, such as [{{seeds: [1, 2], sizes: [d64]}}], {_is(repeats)}")
    for repeat in repeats:
        _check_keys(repeat, tuple(axes), "an entry of repeats")
        blocks.append(axes | {key: _repeated(value, key, axes[key], duration) for key, value in repeat.items()})
    return Ladder(
        _name(node["recipe"], "recipe"),
        _overrides(node.get("overrides") or [], "overrides"),
        {str(size): _overrides(words, f"sizes.{size}") for size, words in sizes.items()},
        duration,
        blocks,
        _ratio(node.get("ratio")),
    )


def _repeated(node: Any, key: str, known: list[Any], duration: str) -> list[Any]:
    """What an entry of `repeats` says of one axis: seeds of its own, of the others what the ladder has."""
    if key == "seeds":
        return _seeds(node)
    listed = _list(node, f"{key} of repeats")
    chosen: list[Any] = _numbers(node, key) if key == duration else [_name(value, key) for value in listed]
    for value in chosen:
        if value not in known:
            raise ValueError(f"repeats names {value!r}, which is not among {key}: {_listed(known)}")
    return chosen


def _check_keys(node: Any, valid: tuple[str, ...], what: str) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{what} is a mapping with the keys {', '.join(valid)}, {_is(node)}; see lowprec-sweep --help")
    for key in node:
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"there is no key {key!r}{hint}; {what} has {', '.join(valid)}")


def _list(node: Any, key: str, example: str = "[...]") -> list[Any]:
    if not isinstance(node, list) or not node:
        raise ValueError(f"{key} is a list with at least one entry, such as {example}, {_is(node)}")
    return node


def _numbers(node: Any, key: str) -> list[float]:
    numbers = []
    for value in _list(node, key, "[1.0e6, 4.0e6]"):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{key} has {value!r}, which is not a number above 0")
        numbers.append(number)
    return numbers


def _seeds(node: Any) -> list[int]:
    for value in _list(node, "seeds", "[0, 1]"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"seeds has {value!r}, which is not a whole number of at least 0")
    return list(node)


def _name(value: Any, key: str) -> str:
    if not re.fullmatch(r"[\w.-]+", str(value)) or isinstance(value, (bool, float, list, dict)):
        raise ValueError(f"{key} has {value!r}, which is not a name: use letters, digits, dots, dashes and underscores")
    return str(value)


def _overrides(node: Any, key: str) -> list[str]:
    if not isinstance(node, list) or not all(isinstance(word, str) for word in node):
        raise ValueError(f"{key} is a list of overrides, such as [model.dim=64, optim.lr=2.0e-3], {_is(node)}")
    return node


def _ratio(node: Any) -> tuple[float, float]:
    if node is None:
        return 0.0, math.inf
    limits = _numbers(node, "ratio")
    if len(limits) != 2 or limits[0] > limits[1]:
        raise ValueError(f"ratio is [smallest, largest] tokens a parameter, such as [2, 500], {_is(node)}")
    return limits[0], limits[1]


def _is(node: Any) -> str:
    text = repr(node)
    return f"not {text if len(text) <= 60 else text[:57] + '...'}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


# ---- from the file to the runs


def cells(ladder: Ladder, folder: Path, more: list[str], config_dirs: list[Path]) -> tuple[list[Cell], list[str]]:
    """The runs of a ladder, cheapest first, and sentences on those that were merged or left out.

    Everything is composed and planned here, so whatever is wrong is said now: a ValueError with one sentence.
    """
    points = {p: None for block in ladder.blocks for p in itertools.product(*block.values())}
    runs = compose(ladder, more, config_dirs)
    found: dict[tuple[Any, ...], Cell] = {}
    notes: dict[str, None] = {}
    for size, duration, precision, seed in points:
        run, words = runs[size, precision]
        flops = flops_per_token(run.model, run.data.seq_len)["total"]
        parameters = count_parameters(run.model)["non_embedding"]
        per_step = run.train.global_batch * run.data.seq_len
        count = {"tokens": duration, "tokens_per_param": duration * parameters, "budgets": duration / flops}
        steps = math.ceil(count[ladder.duration] / per_step)
        label, tokens = _label(ladder.duration, duration), steps * per_step
        if not ladder.ratio[0] <= tokens / parameters <= ladder.ratio[1]:
            told = f"{tokens / parameters:.3g} tokens a parameter, and ratio is {_listed(ladder.ratio)}"
            notes[f"left out: {size} at {label} has {told}"] = None
            continue
        name = f"{size}_{label}_{precision}_s{seed}"
        if (twin := found.get((size, precision, seed, steps))) is not None:
            if twin.name != name:
                notes[f"merged: {name} has the {steps} steps of {twin.name}"] = None
            continue
        path = folder / name
        own = (f"train.steps={steps}", f"seed={seed}", f"name={name}", f"run.dir={_quoted(path)}")
        run = replace(
            run, seed=seed, name=name, train=replace(run.train, steps=steps), run=replace(run.run, dir=str(path))
        )
        with _named(name):
            check(run)
        found[size, precision, seed, steps] = Cell(
            name, size, precision, path, run, (*words, *own), parameters, steps, tokens, flops
        )
    names = [cell.name for cell in found.values()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two different runs would be called {twice}: their durations differ too little for a name")
    if not found:
        raise ValueError(f"ratio leaves nothing of the ladder: {'; '.join(notes)}")
    return sorted(found.values(), key=lambda cell: (cell.flops, cell.name)), list(notes)


def compose(
    ladder: Ladder, more: list[str], config_dirs: list[Path]
) -> dict[tuple[str, str], tuple[Run, tuple[str, ...]]]:
    """{(size, precision): (the run but for seed and duration, words for lowprec-train)}, each pair planned on meta.

    Hydra needs a tenth of a second for a run. So each size and each precision is composed once, and a pair is put
    together, unless a size has overrides of `precision`, or a precision file sets more than the precision.
    """
    choices, axes = groups([SHIPPED, *config_dirs]), ladder.blocks[0]
    folders = tuple(word for folder in config_dirs for word in ("--config-dir", str(folder)))
    _refuse_decided({"overrides": ladder.overrides, "the command line": more})
    _refuse_decided({f"sizes.{size}": words for size, words in ladder.sizes.items()})

    def words_of(size: str, precision: str) -> list[str]:
        kept = {key: word for part in (ladder.overrides, ladder.sizes[size], more) for key, word in _keyed(part)}
        return [f"recipe={ladder.recipe}", f"precision={precision}", *kept.values()]

    @cache
    def composed(size: str, precision: str) -> Run:
        with _named(f"size {size}, precision {precision}"):
            for part in (ladder.overrides, ladder.sizes[size], more):  # a key may be given again, but not in one list
                check_overrides([f"recipe={ladder.recipe}", f"precision={precision}", *part], choices)
            return load(compose_run(words_of(size, precision), config_dirs))

    def put_together(size: str, precision: str) -> Run:
        base, other = composed(plain[0], axes["precision"][0]), composed(plain[0], precision)
        if replace(other, precision=base.precision) != base:
            return composed(size, precision)
        return replace(composed(size, axes["precision"][0]), precision=other.precision)

    plain = [s for s in axes["sizes"] if not any(key.startswith("precision.") for key, _ in _keyed(ladder.sizes[s]))]
    found = {}
    for size, precision in itertools.product(axes["sizes"], axes["precision"]):
        run = put_together(size, precision) if size in plain else composed(size, precision)
        with _named(f"size {size}, precision {precision}"):
            plan_model(run)
        found[size, precision] = run, (*folders, *words_of(size, precision))
    return found


def _keyed(words: list[str]) -> list[tuple[str, str]]:
    """[(key, override)]."""
    return [(word.partition("=")[0].lstrip("+"), word) for word in words]


def _refuse_decided(parts: Mapping[str, list[str]]) -> None:
    for where, words in parts.items():
        for key, word in _keyed(words):
            if key in DECIDED:
                raise ValueError(f"{word!r} of {where}: {key} is decided by the ladder, so change it there")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Inside, an error is one sentence that begins with what it is about."""
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{what}: {explain(error)}") from error


def _label(duration: str, value: float) -> str:
    """1.5e6 tokens -> 1.5M; 20 tokens per parameter -> 20tpp; a budget of 1e12 -> 1e12flop."""
    if duration == "tokens_per_param":
        return f"{value:g}tpp"
    if duration == "budgets":
        return f"{value:g}flop".replace("e+", "e")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _quoted(path: Path) -> str:
    """A path as Hydra reads it."""
    text = str(path)
    return text if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else "'" + text.replace("'", "\\'") + "'"
