"""The precision controller: what a probe finds may raise one product of a layer to higher precision, and lower it back.

    probe:
      every: 100
      rules:
        - {match: "layers.*", gemm: wgrad, measure: sqnr_db, below: 6, back: 8, patience: 2}
        - {match: "*.down_proj", gemm: fprop, operand: x, measure: saturation_frac, above: 0.02}

After `patience` probes in a row beyond the bound, the product is that of the recipe `to` (bf16 unless said otherwise)
from the next step on; with `back`, after as many probes on the good side of that bound it is the plan's again. Probes
always measure the plan's own recipe, also while it is raised. Every change is an entry of the plan's schedule for that
layer, a line in events.jsonl, and part of the checkpoint, so a resumed run goes on in the same precision.

What this is not: a guard. It looks every `probe.every` steps, and at a side batch; what happens to a step that went
wrong is decided by :mod:`lowprec.train.guard`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowprec.config import ProbeRule
from lowprec.linear import Plan
from lowprec.linear.plan import compile_pattern
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.train.metrics import Record

OF_PRODUCTS = ("sqnr_db", "bias", "cosine")
OF_OPERANDS = ("sqnr_db", "bias", "underflow_frac", "saturation_frac", "amax", "kurtosis", "max_over_mean")


class Controller:
    """Rules, and what they have decided so far."""

    def __init__(self, rules: Iterable[ProbeRule], plan: Plan, names: list[str]) -> None:
        """names: the layers that are probed. Raises ValueError for a rule that can never act."""
        self.rules, self.plan = list(rules), plan
        self.patterns = [self._pattern(i, rule, names) for i, rule in enumerate(self.rules)]
        self.streaks: dict[str, int] = {}  # "rule/layer" -> probes in a row that agree on a change
        self.dropped: list[str] = []  # what a checkpoint had raised by rules that are no more

    def _pattern(self, i: int, rule: ProbeRule, names: list[str]) -> re.Pattern[str]:
        where = f"probe.rules[{i}]"
        for key, valid in (("gemm", tuple(GEMM_OPERANDS)), ("to", tuple(self.plan.precision.linear))):
            if getattr(rule, key) not in valid:
                raise ValueError(f"{where}.{key}={getattr(rule, key)!r}: choose one of {', '.join(valid)}")
        operands = ("out", *GEMM_OPERANDS[rule.gemm])
        if rule.operand not in operands:
            raise ValueError(f"{where}.operand={rule.operand!r}: {rule.gemm} has {', '.join(operands)}")
        measures = OF_PRODUCTS if rule.operand == "out" else OF_OPERANDS
        if rule.measure not in measures:
            raise ValueError(f"{where}.measure={rule.measure!r}: of {rule.operand} there are {', '.join(measures)}")
        if (rule.below is None) == (rule.above is None):
            raise ValueError(f"{where}: give one bound, below or above")
        bound = rule.above if rule.below is None else rule.below
        assert bound is not None
        if rule.back is not None and (rule.back < bound if rule.below is not None else rule.back > bound):
            raise ValueError(f"{where}.back={rule.back:g} must lie on the good side of the bound {bound:g}")
        if rule.patience < 1:
            raise ValueError(f"{where}.patience={rule.patience} must be at least 1 probe")
        if self.plan.precision.linear[rule.to].remembers:
            raise ValueError(f"{where}.to={rule.to}: a recipe that remembers cannot be entered on the way; take bf16")
        if rule.to != "bf16" and any(self.plan.layers[name].cuts for name in names if name in self.plan.layers):
            raise ValueError(
                f"{where}.to={rule.to}: layers are cut over ranks (parallel.tp or cp), where only bf16 is sure to fit"
            )
        pattern = compile_pattern(rule.match, names)
        if not any(pattern.fullmatch(name) for name in names):
            raise ValueError(f"{where}.match={rule.match!r} matches none of the layers that are probed")
        return pattern

    def judge(self, step: int, layers: Mapping[str, Record]) -> list[Record]:
        """Reads a probe made after ``step`` steps and changes the plan; returns a line for events.jsonl a change."""
        events = []
        for i, (rule, pattern) in enumerate(zip(self.rules, self.patterns)):
            for name, found in layers.items():
                if not pattern.fullmatch(name):
                    continue
                value = found.get("gemms", {}).get(rule.gemm, {}).get(rule.operand, {}).get(rule.measure)
                key, at = f"{i}/{name}", (name, rule.gemm)
                holder = self.plan.raised.get(at)
                if value is None or (holder is not None and holder[1] != i):
                    continue  # nothing measured, or another rule's
                wants = self._back(rule, value) if holder is not None else self._beyond(rule, value)
                self.streaks[key] = self.streaks.get(key, 0) + 1 if wants else 0
                if self.streaks[key] < rule.patience:
                    continue
                self.streaks[key] = 0
                what = f"probe: {name} {rule.gemm} {rule.operand} {rule.measure} {value:.4g}"
                if holder is None:
                    self.plan.raised[at] = (rule.to, i)
                    action = f"{rule.gemm} as in {rule.to}"
                else:
                    del self.plan.raised[at]
                    action = f"{rule.gemm} as planned"
                events.append({"step": step, "what": what, "action": action, "layer": name, "rule": i})
        return events

    @staticmethod
    def _beyond(rule: ProbeRule, value: float) -> bool:
        return value < rule.below if rule.below is not None else rule.above is not None and value > rule.above

    @staticmethod
    def _back(rule: ProbeRule, value: float) -> bool:
        if rule.back is None:
            return False
        return value > rule.back if rule.below is not None else value < rule.back

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        raised = [[*at, *to] for at, to in sorted(self.plan.raised.items())]
        return {"raised": raised, "streaks": self.streaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse; without an entry the plan is as it was written. What no present rule says is dropped."""
        self.plan.raised, self.dropped = {}, []
        for name, gemm, to, i in state.get("raised", []):
            if self._says(int(i), name, gemm, to):
                self.plan.raised[name, gemm] = (to, int(i))
            else:
                self.dropped.append(f"{name} {gemm} as in {to}")
        self.streaks = {
            key: n for key, n in state.get("streaks", {}).items() if int(key.partition("/")[0]) < len(self.rules)
        }

    def _says(self, i: int, name: str, gemm: str, to: str) -> bool:
        if i >= len(self.rules):
            return False
        return (self.rules[i].gemm, self.rules[i].to) == (gemm, to) and bool(self.patterns[i].fullmatch(name))
