"""Plan: which recipe each linear layer of a model follows, when, by whom it is computed, and why.

Rules are strict. A pattern is a glob over module names (``*`` crosses dots). ``{first:2}``, ``{last:8}`` and
``{last:15%}`` stand for the first or last blocks of the numbered list at that place (a share is rounded up to whole
blocks). The first rule that matches a layer decides it; a rule that decides no layer, and a linear layer that no rule
matches, are errors: a wish that silently does nothing is the commonest way to train in the wrong precision.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lowprec.linear.backends import choose
from lowprec.linear.function import TOKEN_TILE, Policy
from lowprec.linear.module import QuantizedLinear
from lowprec.linear.precision import Precision, Rule
from lowprec.linear.recipe import BF16, LinearRecipe
from lowprec.numerics import Clock

_PLACEHOLDER = re.compile(r"\{(first|last):(\d+)(%?)\}")


@dataclass(frozen=True)
class Entry:
    """One linear layer of the model."""

    layer: str
    out_features: int
    in_features: int
    recipe: str
    rule: Rule


def compile_pattern(pattern: str, names: list[str]) -> re.Pattern[str]:
    """A rule's pattern as a regular expression over the layer names it may see.

    Raises:
        ValueError: if a placeholder is misspelt or stands where the names have no number.
    """
    rest = _PLACEHOLDER.sub("", pattern)
    if "{" in rest or "}" in rest:
        raise ValueError(f"rule '{pattern}': cannot read the braces; write {{first:2}}, {{last:8}} or {{last:15%}}")

    def glob(text: str) -> str:
        return re.escape(text).replace(r"\*", ".*").replace(r"\?", ".")

    out, done = "", 0
    for found in _PLACEHOLDER.finditer(pattern):
        out += glob(pattern[done : found.start()])
        numbers = sorted({int(m[1]) for name in names if (m := re.match(out + r"(\d+)(?:\.|$)", name))})
        if not numbers:
            raise ValueError(f"rule '{pattern}': no layer has a number where {found[0]} stands")
        count = int(found[2])
        if found[3]:
            if count > 100:
                raise ValueError(f"rule '{pattern}': {found[0]} is more than all blocks; give at most 100%")
            count = math.ceil(len(numbers) * count / 100)
        chosen = numbers[:count] if found[1] == "first" else numbers[max(len(numbers) - count, 0) :]
        out += f"(?:{'|'.join(map(str, chosen))})" if chosen else r"(?!)"
        done = found.end()
    return re.compile(out + glob(pattern[done:]))


@dataclass
class Plan:
    """The decided precision of a whole model. Build with :meth:`of`, then :meth:`apply`."""

    precision: Precision
    entries: tuple[Entry, ...]
    clock: Clock
    layers: dict[str, QuantizedLinear]

    @classmethod
    def of(cls, model: nn.Module, precision: Precision, seed: int = 0, backend: str | None = None) -> Plan:
        """Match every ``nn.Linear`` of a model (also on the meta device) against the rules.

        Args:
            model: any module; nothing is changed.
            precision: the parsed precision file.
            seed: keys all random bits of the run.
            backend: overrides the precision file's backend.

        Raises:
            ValueError: for a rule that decides no layer, or a layer that no rule decides.
        """
        if backend is not None:
            choose(backend, BF16.fprop, "fprop", None, 1, 1, torch.bfloat16, torch.device("cpu"))  # checks the name
            precision = Precision(precision.linear, precision.rules, precision.schedule, backend, precision.pad)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if not linears:
            raise ValueError("the model has no nn.Linear layer; there is nothing to plan")
        patterns = [(rule, compile_pattern(rule.match, list(linears))) for rule in precision.rules]
        entries, used = [], set()
        for name, module in linears.items():
            rule = next((rule for rule, pattern in patterns if pattern.fullmatch(name)), None)
            if rule is None:
                raise ValueError(
                    f"no rule matches the layer '{name}'; add one, such as {{match: \"{name}\", recipe: bf16}}"
                )
            used.add(rule)
            entries.append(Entry(name, module.out_features, module.in_features, rule.recipe, rule))
        for rule, pattern in patterns:
            if rule not in used:
                taken = any(pattern.fullmatch(name) for name in linears)
                why = (
                    "all it matches was decided by earlier rules"
                    if taken
                    else f"it matches none of {_sample(list(linears))}"
                )
                raise ValueError(
                    f'rule {{match: "{rule.match}", recipe: {rule.recipe}}} decides no layer: {why}; change it'
                )
        return cls(precision, tuple(entries), Clock(seed), {})

    def apply(self, model: nn.Module) -> None:
        """Turn the planned layers into :class:`QuantizedLinear`, in place (also on the meta device)."""
        policy = Policy(self.precision.backend, self.precision.pad)
        for entry in self.entries:
            module = model.get_submodule(entry.layer)
            assert isinstance(module, nn.Linear)
            recipe = self.precision.linear[entry.recipe]
            self.layers[entry.layer] = QuantizedLinear.convert(module, recipe, self.clock, entry.layer, policy)
        self.at(0.0)

    def at(self, progress_frac: float) -> None:
        """Give every layer its recipe for this training progress: 0 at the first step, below 1 at the last."""
        recipes = self.precision.at(progress_frac)
        for entry in self.entries:
            self.layers[entry.layer].recipe = recipes[entry.recipe]

    @contextlib.contextmanager
    def high_precision(self) -> Iterator[None]:
        """Inside, every layer runs unquantised: how good are the weights themselves?"""
        before = {name: layer.recipe for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.recipe = BF16
            yield
        finally:
            for name, layer in self.layers.items():
                layer.recipe = before[name]

    def fingerprint(self) -> str:
        """Short hash of everything here that changes numbers: layers, recipes, schedule, padding (not the backend)."""
        p = self.precision
        used = {entry.recipe for entry in self.entries}
        schedule = [c for c in p.schedule if c.recipe in used]
        text = (
            repr([(e.layer, e.out_features, e.in_features, p.linear[e.recipe]) for e in self.entries])
            + repr(schedule)
            + p.pad
        )
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def table(
        self, tokens: int | None = None, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
    ) -> str:
        """The plan for people: rows of like layers, then each recipe's equations, the schedule and remarks.

        Args:
            tokens: rows of the activations (micro-batch x sequence) if known; padding of wgrad is judged by it.
            dtype, device: of the activations; decide the backend.
        """
        rows = [("layer", "shape (out, in)", "recipe", "backend f/d/w", "rule")]
        remarks: dict[str, None] = {}
        for names, entry in _merged(self.entries):
            backends = self._backends(entry, tokens, dtype, torch.device(device), remarks)
            rows.append(
                (names, f"({entry.out_features}, {entry.in_features})", entry.recipe, backends, entry.rule.match)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * len(max(lines, key=len)))
        for name in dict.fromkeys(entry.recipe for entry in self.entries):
            lines += [
                "",
                f"recipe {name}",
                *("  " + line for line in self.precision.linear[name].describe().splitlines()),
            ]
        for change in self.precision.schedule:
            target = f"{change.recipe}.{change.gemm}" if change.gemm else change.recipe
            lines.append(f"schedule: from {change.start:.0%} of training, {target} as in {change.replacement.name}")
        lines += ["", *remarks, f"plan {self.fingerprint()}, {len(self.entries)} linear layers"]
        return "\n".join(lines)

    def _backends(
        self, entry: Entry, tokens: int | None, dtype: torch.dtype, device: torch.device, remarks: dict[str, None]
    ) -> str:
        names = []
        recipe: LinearRecipe = self.precision.linear[entry.recipe]
        if tokens is not None and self.precision.pad == "zero":
            tokens += -tokens % TOKEN_TILE
        out, inp = entry.out_features, entry.in_features
        for role, (m, n, k) in {
            "fprop": (tokens, out, inp),
            "dgrad": (tokens, inp, out),
            "wgrad": (out, inp, tokens),
        }.items():
            gemm = getattr(recipe, role)
            padded = []
            for size, multiple in zip((m, n, k), gemm.multiples()):
                wanted = None if size is None else size + -size % multiple
                if wanted != size:
                    action = (
                        f"is padded to {wanted}"
                        if self.precision.pad == "zero"
                        else "is refused when it runs (pad: refuse)"
                    )
                    remarks[
                        f"note: {entry.layer} {role}: a size of {size} is no multiple of {multiple} and {action}"
                    ] = None
                padded.append(wanted)
            assert padded[1] is not None
            chosen, refusals = choose(
                self.precision.backend, gemm, role, padded[0], padded[1], padded[2], dtype, device
            )
            if chosen.name != "native":
                remarks.update({f"note: {chosen.name} computes instead of {why}": None for why in refusals})
            names.append(chosen.name)
        return names[0] if len(set(names)) == 1 else "/".join(names)


def _sample(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)} layers)" if len(names) > 6 else "")


def _merged(entries: tuple[Entry, ...]) -> list[tuple[str, Entry]]:
    """Rows of the table: runs of blocks with equal decisions share a line, ``layers.2-11.attn.q_proj``."""
    groups: dict[tuple[str, str, int, int, Rule], list[Entry]] = {}
    for entry in entries:
        stem = re.sub(r"\.\d+\.", ".#.", entry.layer, count=1)
        groups.setdefault((stem, entry.recipe, entry.out_features, entry.in_features, entry.rule), []).append(entry)
    rows = []
    for (stem, *_), members in groups.items():
        numbers = [int(m[1]) for entry in members if (m := re.search(r"\.(\d+)\.", entry.layer))]
        rows.append((stem.replace("#", _ranges(numbers), 1), members[0]))
    return rows


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
