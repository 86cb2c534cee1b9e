"""Precision: a precision file (or the ``precision:`` node of a run), parsed strictly.

A file names formats, linear recipes, the rules that give each layer one, and what changes during training::

    formats:                                       # optional: more formats than numerics ships
      nvfp4_row: {element: e2m1, block: [1, 16], scale: e4m3, tensor_scale: true}
    linear:                                        # named recipes; an operand is a format's name or a mapping
      nvfp4:
        fprop: {x: nvfp4, w: nvfp4_2d}
        dgrad: {dy: {format: nvfp4, rounding: stochastic}, w: {reuse: fprop}}
        wgrad: {dy: {format: nvfp4, rounding: stochastic}, x: nvfp4, inner: {size: 16, signs: fixed}}
    rules:                                         # first match wins; one that decides no layer is an error
      - {match: lm_head, recipe: bf16}
      - {match: "layers.{last:15%}.*", recipe: bf16}
      - {match: "layers.*", recipe: nvfp4}
    schedule:                                      # by training progress, 0 to 1
      - {from: 0.82, set: {nvfp4.fprop: bf16}}
    backend: auto                                  # auto | cpu | torch | oracle
    pad: zero                                      # sizes that no block divides: zero | refuse

``bf16`` names the unquantised recipe, product or operand. ``default`` names the first recipe under ``linear:``
(``bf16`` if there is none), so that a run's rules need not know which precision file they meet. Every misspelt key,
name or value is one sentence that lists what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowprec.linear.backends import CHOICES
from lowprec.linear.recipe import BF16, GEMM_OPERANDS, ROUNDINGS, SIGNS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.numerics import FORMATS, Format

RECIPES_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "precision"
PADS = ("zero", "refuse")


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches the pattern get the recipe."""

    match: str
    recipe: str


@dataclass(frozen=True)
class Change:
    """From this training progress on, a recipe (or one product of it) is another."""

    start: float
    recipe: str
    gemm: str | None
    replacement: LinearRecipe


@dataclass(frozen=True)
class Precision:
    """A parsed precision file: named recipes, rules and the schedule."""

    linear: dict[str, LinearRecipe]
    rules: tuple[Rule, ...]
    schedule: tuple[Change, ...] = ()
    backend: str = "auto"
    pad: str = "zero"

    def at(self, progress_frac: float) -> dict[str, LinearRecipe]:
        """The recipes by name at this training progress (0 at the first step)."""
        now = dict(self.linear)
        for change in self.schedule:
            if progress_frac >= change.start:
                if change.gemm is None:
                    now[change.recipe] = dataclasses.replace(change.replacement, name=change.recipe)
                else:
                    product = getattr(change.replacement, change.gemm)
                    now[change.recipe] = dataclasses.replace(now[change.recipe], **{change.gemm: product})
        return now


def pick(kind: str, name: object, valid: Iterable[str], where: str) -> str:
    """``name`` if valid, else one sentence with the nearest and all valid names."""
    valid = list(valid)
    if isinstance(name, str) and name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean '{near[0]}'? Valid" if near else "valid"
    raise ValueError(f"{where}: unknown {kind} '{name}'; {hint}: {', '.join(valid)}")


def _mapping(node: object, keys: Iterable[str], where: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """A plain dict with no other keys than ``keys``."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{where}: expected a mapping with the keys {', '.join(keys)}, got {node!r}")
    for key in node:
        pick("key", key, keys, where)
    for key in required:
        if key not in node:
            raise ValueError(f"{where}: the key '{key}' is missing; give {', '.join(required)}")
    return {str(key): value for key, value in node.items()}


def _format(name: str, node: object) -> Format:
    where = f"formats.{name}"
    fields = _mapping(
        node, ("element", "block", "scale", "tensor_scale", "scale_rounding"), where, ("element", "block")
    )
    block = fields.pop("block")
    if not isinstance(block, (list, tuple)) or not all(isinstance(size, int) for size in block):
        raise ValueError(f"{where}: block must be two whole numbers [free, contracted], got {block!r}")
    return Format(name, block=tuple(block), **fields)


def _operand(node: object, formats: Mapping[str, Format], where: str) -> tuple[Operand, str | None]:
    """An operand, and the product whose codes it reuses."""
    if node is None or node == "bf16":
        return Operand(), None
    if isinstance(node, str):
        return Operand(formats[pick("format", node, ["bf16", *formats], where)]), None
    fields = _mapping(node, ("format", "rounding", "reuse"), where)
    if "reuse" in fields:
        if fields["reuse"] != "fprop" or len(fields) > 1:
            raise ValueError(
                f"{where}: codes can only be reused from the forward product, as {{reuse: fprop}} and nothing else"
            )
        return Operand(), "fprop"
    name = pick("format", fields.get("format"), ["bf16", *formats], where)
    if name == "bf16":
        return Operand(), None
    return Operand(formats[name], pick("rounding", fields.get("rounding", "nearest"), ROUNDINGS, where)), None


def _reused(role: str, name: str, fprop: Gemm, inner: Rotation | None, where: str) -> Operand:
    """The forward pass's operand for use across the transpose; refused where its codes would not survive it."""
    if name not in GEMM_OPERANDS["fprop"]:
        raise ValueError(
            f"{where}: the forward product has no operand '{name}' to reuse; it has {', '.join(GEMM_OPERANDS['fprop'])}"
        )
    source = fprop.a if GEMM_OPERANDS["fprop"][0] == name else fprop.b
    if source.format is None:
        return Operand()
    free, contracted = source.format.block
    if free != contracted or source.rounding != "nearest" or fprop.inner is not None or inner is not None:
        raise ValueError(
            f"{where}: the forward codes of {name} cannot be reused: {role} contracts the other axis, and only square "
            f"blocks, rounded to nearest and unrotated, survive that (these are {free}x{contracted}, {source.rounding} "
            f"rounding); quantise it anew with {{format: {source.format.name}}}"
        )
    return dataclasses.replace(source, reuse=True)


def _gemm(role: str, node: object, formats: Mapping[str, Format], fprop: Gemm | None, where: str) -> Gemm:
    if node is None or node == "bf16":
        return Gemm()
    names = GEMM_OPERANDS[role]
    fields = _mapping(node, (*names, "inner"), where)
    inner = None
    if fields.get("inner") is not None:
        turn = _mapping(fields["inner"], ("size", "signs"), f"{where}.inner", ("size",))
        if "signs" in turn:
            pick("signs", turn["signs"], SIGNS, f"{where}.inner")
        inner = Rotation(**turn)
    operands = []
    for name in names:
        operand, reuse = _operand(fields.get(name), formats, f"{where}.{name}")
        if reuse:
            if fprop is None:
                raise ValueError(f"{where}.{name}: the forward product has nothing before it to reuse; name a format")
            operand = _reused(role, name, fprop, inner, f"{where}.{name}")
        operands.append(operand)
    return Gemm(operands[0], operands[1], inner)


def _linear_recipe(name: str, node: object, formats: Mapping[str, Format]) -> LinearRecipe:
    where = f"linear.{name}"
    if name == "bf16":
        raise ValueError(
            f"{where}: 'bf16' is the name of the unquantised recipe and cannot be redefined; choose another name"
        )
    fields = _mapping(node, GEMM_OPERANDS, where)
    fprop = _gemm("fprop", fields.get("fprop"), formats, None, f"{where}.fprop")
    dgrad = _gemm("dgrad", fields.get("dgrad"), formats, fprop, f"{where}.dgrad")
    wgrad = _gemm("wgrad", fields.get("wgrad"), formats, fprop, f"{where}.wgrad")
    return LinearRecipe(name, fprop, dgrad, wgrad)


def _changes(index: int, node: object, linear: Mapping[str, LinearRecipe]) -> list[Change]:
    where = f"schedule[{index}]"
    fields = _mapping(node, ("from", "set"), where, ("from", "set"))
    start = fields["from"]
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 <= start <= 1:
        raise ValueError(f"{where}: 'from' is training progress between 0 and 1, got {start!r}")
    changes = []
    if not isinstance(fields["set"], Mapping):
        raise ValueError(f"{where}.set: expected a mapping such as {{nvfp4.fprop: bf16}}, got {fields['set']!r}")
    for target, replacement in fields["set"].items():
        recipe, _, gemm = str(target).partition(".")
        recipe = pick("recipe", recipe, ["default", *(name for name in linear if name != "bf16")], f"{where}.set")
        recipe = _default(linear) if recipe == "default" else recipe
        if gemm:
            pick("product", gemm, GEMM_OPERANDS, f"{where}.set.{target}")
        chosen = linear[pick("recipe", replacement, linear, f"{where}.set.{target}")]
        changes.append(Change(float(start), recipe, gemm or None, chosen))
    return changes


def _default(linear: Mapping[str, LinearRecipe]) -> str:
    """The first recipe of a file, or bf16: what rules call ``default``."""
    return next((name for name in linear if name != "bf16"), "bf16")


def load_precision(source: str | Path | Mapping[str, Any]) -> Precision:
    """Parse a precision file.

    Args:
        source: the name of a shipped file (``"nvfp4"``), a path to a YAML file, or an already loaded mapping.

    Raises:
        ValueError: one sentence that names the wrong key, name or value and lists what is valid.
    """
    node = source if isinstance(source, Mapping) else _read(source)
    fields = _mapping(node, ("formats", "linear", "rules", "schedule", "backend", "pad"), "precision", ("rules",))
    formats = dict(FORMATS)
    for name, spec in (fields.get("formats") or {}).items():
        if name in FORMATS or name == "bf16":
            raise ValueError(f"formats.{name}: this name is taken by a built-in format; choose another")
        formats[name] = _format(name, spec)
    linear = {"bf16": BF16}
    for name, spec in (fields.get("linear") or {}).items():
        linear[name] = _linear_recipe(str(name), spec, formats)
    rules = []
    for index, rule in enumerate(fields["rules"] or []):
        spec = _mapping(rule, ("match", "recipe"), f"rules[{index}]", ("match", "recipe"))
        recipe = pick("recipe", spec["recipe"], ["default", *linear], f"rules[{index}]")
        rules.append(Rule(str(spec["match"]), _default(linear) if recipe == "default" else recipe))
    schedule = [c for i, entry in enumerate(fields.get("schedule") or []) for c in _changes(i, entry, linear)]
    return Precision(
        linear,
        tuple(rules),
        tuple(sorted(schedule, key=lambda change: change.start)),
        pick("backend", fields.get("backend", "auto"), CHOICES, "precision.backend"),
        pick("pad", fields.get("pad", "zero"), PADS, "precision.pad"),
    )


def _read(source: str | Path) -> Mapping[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        shipped = sorted(p.stem for p in RECIPES_FOLDER.glob("*.yaml"))
        path = RECIPES_FOLDER / f"{pick('precision recipe', str(source), shipped, 'precision')}.yaml"
    if not path.is_file():
        raise ValueError(
            f"precision file {path} does not exist; give a path to a YAML file or the name of a shipped recipe"
        )
    node = yaml.safe_load(path.read_text())
    if not isinstance(node, Mapping):
        raise ValueError(f"precision file {path} must be a mapping with the keys linear and rules")
    return node


def load_recipe(name: str | Path) -> LinearRecipe:
    """The linear recipe of a shipped precision file (or of a path): the one that bears the file's name, or its only
    one.

    Raises:
        ValueError: if the file does not exist or names several recipes of which none is called like the file.
    """
    if name == "bf16":
        return BF16
    linear = load_precision(name).linear
    named = [key for key in linear if key != "bf16"]
    stem = Path(name).stem
    if stem in linear:
        return linear[stem]
    if len(named) == 1:
        return linear[named[0]]
    raise ValueError(
        f"precision file '{name}' defines {', '.join(named) or 'no recipe'}; name one of them like the file"
    )
