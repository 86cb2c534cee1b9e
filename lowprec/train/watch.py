"""Watch: what looks at a run from inside, and may act on what it sees: the probe, the weights' motion, the controller.

The loop calls `before_update` and `after_update` around each update and `look` after it; all three do nothing where
`probe.every` is 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lowprec.config import Run
from lowprec.data import Batch
from lowprec.linear import Plan
from lowprec.parallel import Engine, World
from lowprec.train.controller import Controller
from lowprec.train.metrics import MetricsLog, Record, finite
from lowprec.train.motion import Motion
from lowprec.train.probe import Probe, summary


class Watch:
    def __init__(self, run: Run, probe: Probe | None, motion: Motion | None, controller: Controller) -> None:
        self.steps, self.probe, self.motion, self.controller = run.train.steps, probe, motion, controller
        self.log: MetricsLog | None = None  # probes.jsonl, on the first rank
        self.newest: Record = {}  # the line that was written last

    @classmethod
    def of(
        cls, run: Run, plan: Plan, engine: Engine, world: World, validation: list[Batch], dtype: torch.dtype
    ) -> Watch:
        """What ``run.probe`` asks for. Raises ValueError for layers or rules that do not fit the plan."""
        config = run.probe
        if not config.every:
            if config.rules:
                raise ValueError("probe.rules are judged by probes: set probe.every, or leave the rules out")
            return cls(run, None, None, Controller([], plan, []))
        probe = Probe(config, plan, engine, world, validation, run.train.z_loss)
        motion = Motion(plan, world, dtype, probe.names, config.every, config.window)
        return cls(run, probe, motion, Controller(config.rules, plan, probe.names))

    def before_update(self, step: int) -> None:
        """Call with the index of the step, before the optimizer's update; a collective in the steps before a probe."""
        if self.motion is not None and self.motion.follows(step):
            self.motion.before_update(step, self.controller.plan.recipes_at(step / self.steps))

    def after_update(self, step: int) -> None:
        """Call after the update."""
        if self.motion is not None:
            self.motion.after_update(step)

    def due(self, step: int) -> bool:
        """Whether `look` will measure after so many steps."""
        return self.probe is not None and self.probe.due(step)

    def rewind(self, step: int) -> None:
        """Steps after this one are done again: their lines go, and a window that had begun is given up."""
        if self.motion is not None:
            self.motion.forget()
        if self.log is not None:
            self.log.rewind(step)

    def look(self, step: int, tokens: int, high_precision: Callable[[], Any]) -> Record:
        """After ``step`` steps: measures if it is time, writes the line, lets the controller act; a collective.

        Returns the keys of metrics.jsonl, and under ``events`` what the controller decided; {} if it is not time.
        """
        if self.probe is None or not self.due(step):
            return {}
        plan = self.controller.plan
        found = self.probe.run(plan.recipes_at((step - 1) / self.steps), high_precision)
        for name, measures in (self.motion.measures() if self.motion else {}).items():
            if name in found["layers"]:
                found["layers"][name]["weight"] = measures
        record = finite(summary(found))
        found = finite(found)
        events = self._agreed(step, found["layers"])
        if self.log is not None:
            self.newest = {"step": step, "tokens": tokens, **found}
            self.log.write(self.newest)
        return record | {"events": events}

    def _agreed(self, step: int, layers: dict[str, Record]) -> list[Record]:
        """The first rank judges, which has the measures; all change their plan alike."""
        events = self.controller.judge(step, layers)
        if not self.controller.rules:
            return events
        assert self.probe is not None
        state = [json.dumps(self.controller.state_dict())]
        dist.broadcast_object_list(state, src=0, group=self.probe.world.control)
        self.controller.load_state_dict(json.loads(state[0]))
        return events
