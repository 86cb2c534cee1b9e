"""Plan: which recipe each linear layer of a model follows, when, by whom it is computed, and why.

Rules are strict. A pattern is a glob over module names (``*`` crosses dots). ``{first:2}``, ``{last:8}`` and
``{last:15%}`` stand for the first or last blocks of the numbered list at that place (a share is rounded up to whole
blocks). The first rule that matches a layer decides it; a rule that decides no layer, and a linear layer that no rule
matches, are errors: a wish that silently does nothing is the commonest way to train in the wrong precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from lowprec.linear import state
from lowprec.linear.attention import AttentionCore, apply_attention
from lowprec.linear.backends import choose, te_says
from lowprec.linear.call import TILE, Policy, padded_sizes
from lowprec.linear.cut import cut_refusal, refused
from lowprec.linear.module import QuantizedLinear
from lowprec.linear.precision import Precision, Rule
from lowprec.linear.product import keep_refusal, kept_bytes_per_token
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
    """The decided precision of a whole model. Build with :meth:`of`, then :meth:`apply`.

    ``raised`` holds products that a controller has taken out of the plan: (layer, product) -> (recipe whose product is
    used instead, number of the rule that did it).
    """

    precision: Precision
    entries: tuple[Entry, ...]
    clock: Clock
    policy: Policy
    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    raised: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    cores: dict[str, AttentionCore] = field(default_factory=dict)

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
            precision = dataclasses.replace(precision, backend=backend)
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
            if rule not in used and not rule.optional:
                taken = any(pattern.fullmatch(name) for name in linears)
                why = (
                    "all it matches was decided by earlier rules"
                    if taken
                    else f"it matches none of {_sample(list(linears))}"
                )
                raise ValueError(
                    f'rule {{match: "{rule.match}", recipe: {rule.recipe}}} decides no layer: {why}; change it'
                )
        if precision.backend == "te":
            _refuse_te(precision, dict.fromkeys(entry.recipe for entry in entries))
        policy = Policy(precision.backend, precision.pad, precision.save)
        return cls(precision, tuple(entries), Clock(seed), policy)

    def apply(self, model: nn.Module) -> None:
        """Turn the planned layers into :class:`QuantizedLinear`, in place (also on the meta device)."""
        for entry in self.entries:
            module = model.get_submodule(entry.layer)
            assert isinstance(module, nn.Linear)
            recipes = self.precision.versions(entry.recipe)
            self.layers[entry.layer] = QuantizedLinear.convert(module, recipes, self.clock, entry.layer, self.policy)
        self.cores = apply_attention(model, self.precision.attention, self.clock, self.policy)
        self.at(0.0)

    def at(self, progress_frac: float) -> None:
        """Give every layer its recipe for this training progress: 0 at the first step, below 1 at the last."""
        recipes = self.recipes_at(progress_frac)
        for (name, gemm), (to, _) in self.raised.items():
            product = getattr(self.precision.linear[to], gemm)
            recipes[name] = dataclasses.replace(recipes[name], **{gemm: product})
        for name, layer in self.layers.items():
            layer.recipe = recipes[name]

    def recipes_at(self, progress_frac: float) -> dict[str, LinearRecipe]:
        """The recipe of every layer at this training progress, as planned: whatever is raised."""
        recipes = self.precision.at(progress_frac)
        return {entry.layer: recipes[entry.recipe] for entry in self.entries}

    def keep(self, names: Iterable[str]) -> None:
        """Let go of the layers that are not named, and of attention cores without any: a pipeline stage has but some.

        ``entries``, the table and the fingerprint stay those of the whole model.
        """
        names = set(names)
        self.layers = {name: layer for name, layer in self.layers.items() if name in names}
        self.cores = {at: core for at, core in self.cores.items() if any(n.startswith(f"{at}.") for n in self.layers)}

    def refuse_cuts(self, cuts: Mapping[str, Mapping[str, int]] | None = None, tokens: int | None = None) -> None:
        """Raise if a layer cannot be cut over ranks under a recipe that it has or will be given.

        Args:
            cuts: by layer, the ranks that share each axis that is cut (``out``, ``in``, ``tokens``). None: what the
                layers' ``cuts`` say.
            tokens: as for :func:`lowprec.linear.cut.cut_refusal`, where tokens are cut.

        Raises:
            ValueError: naming layer, recipe, reason and fix; also for a layer that the plan does not know.
        """
        if cuts is None:
            cuts = {name: {a: cut.ranks for a, cut in layer.cuts.items()} for name, layer in self.layers.items()}
        entries = {entry.layer: entry for entry in self.entries}
        for name, ranks in cuts.items():
            if name not in entries:
                raise ValueError(f"there is no linear layer '{name}' to cut; the plan has {_sample(list(entries))}")
            entry = entries[name]
            for recipe in self.precision.versions(entry.recipe):
                reason = cut_refusal(recipe, entry.out_features, entry.in_features, ranks, tokens)
                if reason:
                    raise ValueError(refused(name, recipe, ranks, reason))

    @property
    def states(self) -> dict[str, state.LayerState]:
        """What the layers remember between steps, by layer; layers that remember nothing are left out."""
        return {name: layer.state for name, layer in self.layers.items() if layer.state.memories}

    @contextlib.contextmanager
    def high_precision(self) -> Iterator[None]:
        """Inside, every layer runs unquantised: how good are the weights themselves?"""
        before = [(layer, layer.recipe) for layer in self.layers.values()]
        cores = [(core, core.recipe) for core in self.cores.values()]
        try:
            for layer, _ in before:
                layer.recipe = BF16
            for core, _ in cores:
                core.recipe = None
            yield
        finally:
            for layer, recipe in before:
                layer.recipe = recipe
            for core, attention in cores:
                core.recipe = attention

    def end_step(self, step: int, accept: torch.Tensor | None = None, group: dist.ProcessGroup | None = None) -> None:
        """After the optimizer: let the layers remember what they saw (see :func:`lowprec.linear.state.end_step`)."""
        self.policy.shared.clear()
        state.end_step(self.states, step, accept, group)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What all layers remember, as ``{"layer/key": fp32 tensor}``; empty for most recipes."""
        return state.state_dict(self.states)

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of :meth:`state_dict`; ValueError if the tensors are of other recipes."""
        state.load_state_dict(self.states, tensors)

    def fingerprint(self) -> str:
        """Short hash of everything here that changes numbers: layers, recipes, schedule, padding (not the backend)."""
        p = self.precision
        used = {entry.recipe for entry in self.entries}
        schedule = [c for c in p.schedule if c.recipe in used]
        text = (
            repr([(e.layer, e.out_features, e.in_features, p.linear[e.recipe]) for e in self.entries])
            + repr(schedule)
            + p.pad
            + repr((p.deoscillation, p.attention))
            + (repr(sorted(self.raised.items())) if self.raised else "")
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
        rows = [("layer", "shape (out, in)", "recipe", "backend f/d/w", "kept B/token", "rule")]
        remarks: dict[str, None] = {}
        for names, entry in _merged(self.entries):
            backends = self._backends(entry, tokens, dtype, torch.device(device), remarks)
            shape = f"({entry.out_features}, {entry.in_features})"
            rows.append((names, shape, entry.recipe, backends, self._kept(entry, dtype, remarks), entry.rule.match))
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
        if self.precision.attention:
            lines += ["", "attention", *("  " + line for line in self.precision.attention.describe().splitlines())]
        if self.precision.deoscillation:
            lines += ["", f"{self.precision.deoscillation}"]
        if self.precision.backend == "te" or torch.device(device).type == "cuda":
            for name in dict.fromkeys(entry.recipe for entry in self.entries):
                if self.precision.linear[name].quantized:
                    remarks[f"note: te (backend: te), recipe {name}: {te_says(self.precision.linear[name])}"] = None
        lines += ["", *remarks, f"plan {self.fingerprint()}, {len(self.entries)} linear layers"]
        return "\n".join(lines)

    def _kept(self, entry: Entry, dtype: torch.dtype, remarks: dict[str, None]) -> str:
        """Bytes a token that the layer keeps of its input for the backward."""
        recipe = self.precision.linear[entry.recipe]
        kept = kept_bytes_per_token(recipe, entry.out_features, entry.in_features, dtype, self.policy)
        if self.policy.save == "codes" and recipe.quantized and kept == entry.in_features * dtype.itemsize:
            why = keep_refusal(recipe) or "its codes, laid out for the backend, take as much memory"
            remarks[f"note: recipe {recipe.name} keeps inputs instead of codes: {why}"] = None
        return f"{kept:,.0f}"

    def _backends(
        self, entry: Entry, tokens: int | None, dtype: torch.dtype, device: torch.device, remarks: dict[str, None]
    ) -> str:
        names = []
        recipe: LinearRecipe = self.precision.linear[entry.recipe]
        out, inp, pad = entry.out_features, entry.in_features, self.precision.pad
        for role, sizes in {
            "fprop": (tokens, out, inp),
            "dgrad": (tokens, inp, out),
            "wgrad": (out, inp, tokens),
        }.items():
            gemm = getattr(recipe, role)
            m, n, k = (size or TILE for size in sizes)
            whole = padded_sizes(gemm, m, n, k, pad)
            padded = [None if size is None else wanted for size, wanted in zip(sizes, whole)]
            for size, wanted in zip(sizes, padded):
                if gemm.quantized and size != wanted:
                    action = f"is padded to {wanted}" if pad == "zero" else "is refused when it runs (pad: refuse)"
                    remarks[
                        f"note: {entry.layer} {role}: whole blocks need {wanted} instead of {size}: it {action}"
                    ] = None
            assert padded[1] is not None
            chosen, refusals = choose(
                self.precision.backend, gemm, role, padded[0], padded[1], padded[2], dtype, device
            )
            if chosen.name != "native":
                remarks.update({f"note: {chosen.name} computes instead of {why}": None for why in refusals})
            names.append(chosen.name)
        return names[0] if len(set(names)) == 1 else "/".join(names)


def _refuse_te(precision: Precision, names: Iterable[str]) -> None:
    """Raise if TransformerEngine cannot express a recipe that is, or will be, in force."""
    for name in names:
        for recipe in precision.versions(name):
            if recipe.quantized and (said := te_says(recipe)).startswith("refuses"):
                raise ValueError(f"recipe {name}: backend 'te' {said}; use backend 'auto'")


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
