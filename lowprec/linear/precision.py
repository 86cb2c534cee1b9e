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
    backend: auto                                  # auto, or one of lowprec.linear.backends by name
    verify: true                                   # hold each backend to the oracle before training
    pad: zero                                      # sizes that no block divides: zero | refuse
    save: inputs                                   # what the backward keeps of x: inputs | codes
    attention: {qk: {q: int8_row, k: int8_row}}    # optional: see lowprec.linear.attention
    deoscillation: {ratio: 8, start: 0.6}          # optional: see lowprec.linear.deoscillation

A rule with ``optional: true`` may decide no layer. All keys of formats, operands and products are listed in
:mod:`lowprec.linear.parse`. ``bf16`` names the unquantised recipe, product or operand. ``default`` names the first
recipe under ``linear:`` (``bf16`` if there is none), so that a run's rules need not know which precision file they
meet. Every misspelt key, name or value is one sentence that lists what is valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowprec.linear.attention import AttentionRecipe, attention_recipe
from lowprec.linear.backends import CHOICES
from lowprec.linear.deoscillation import Deoscillation
from lowprec.linear.parse import at, mapping, parse_format, parse_linear_recipe, pick
from lowprec.linear.recipe import BF16, GEMM_OPERANDS, LinearRecipe
from lowprec.numerics import FORMATS

RECIPES_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "precision"
PADS = ("zero", "refuse")
SAVES = ("inputs", "codes")
KEYS = ("formats", "linear", "rules", "schedule", "attention", "backend", "verify", "pad", "save", "deoscillation")


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches the pattern get the recipe."""

    match: str
    recipe: str
    optional: bool = False  # may decide no layer (of this model)


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
    save: str = "inputs"
    deoscillation: Deoscillation | None = None
    attention: AttentionRecipe | None = None
    verify: bool = True

    def versions(self, name: str) -> list[LinearRecipe]:
        """All that the recipe of that name is in the course of training, the first first."""
        return [self.at(start)[name] for start in dict.fromkeys((0.0, *(change.start for change in self.schedule)))]

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


def _changes(index: int, node: object, linear: Mapping[str, LinearRecipe]) -> list[Change]:
    where = f"schedule[{index}]"
    fields = mapping(node, ("from", "set"), where, ("from", "set"))
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
    node = source if isinstance(source, Mapping) else read_file(source)
    fields = mapping(node, KEYS, "precision", ("rules",))
    formats = dict(FORMATS)
    for name, spec in (fields.get("formats") or {}).items():
        if name in FORMATS or name == "bf16":
            raise ValueError(f"formats.{name}: this name is taken by a built-in format; choose another")
        formats[name] = parse_format(name, spec)
    linear = {"bf16": BF16}
    for name, spec in (fields.get("linear") or {}).items():
        linear[name] = parse_linear_recipe(str(name), spec, formats)
    rules = []
    for index, rule in enumerate(fields["rules"] or []):
        spec = mapping(rule, ("match", "recipe", "optional"), f"rules[{index}]", ("match", "recipe"))
        recipe = pick("recipe", spec["recipe"], ["default", *linear], f"rules[{index}]")
        recipe = _default(linear) if recipe == "default" else recipe
        rules.append(Rule(str(spec["match"]), recipe, spec.get("optional") is True))
    schedule = [c for i, entry in enumerate(fields.get("schedule") or []) for c in _changes(i, entry, linear)]
    return Precision(
        linear,
        tuple(rules),
        tuple(sorted(schedule, key=lambda change: change.start)),
        pick("backend", fields.get("backend", "auto"), CHOICES, "precision.backend"),
        pick("pad", fields.get("pad", "zero"), PADS, "precision.pad"),
        pick("save", fields.get("save", "inputs"), SAVES, "precision.save"),
        _deoscillation(fields.get("deoscillation")),
        attention_recipe(fields.get("attention"), formats),
        _verify(fields.get("verify", True)),
    )


def _verify(node: object) -> bool:
    if not isinstance(node, bool):
        raise ValueError(
            f"precision.verify: expected true or false (whether backends are checked before training), got {node!r}"
        )
    return node


def _deoscillation(node: object) -> Deoscillation | None:
    if node is None:
        return None
    keys = [field.name for field in dataclasses.fields(Deoscillation)]
    with at("precision"):
        return Deoscillation(**mapping(node, keys, "deoscillation"))


def read_file(source: str | Path) -> Mapping[str, Any]:
    """The mapping in a shipped precision file (by name) or in a YAML file (by path). Raises ValueError."""
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
    if len(named) <= 1:
        return linear[named[0]] if named else BF16
    raise ValueError(f"precision file '{name}' defines {', '.join(named)}; name one of them like the file")
