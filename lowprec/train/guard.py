"""Guard: is a step's loss and gradient sound, and what is done if not.

    not finite       the loss or the gradient norm is infinite or NaN
    spike            the loss, or the logarithm of the gradient norm, lies more than `spike_sigmas` standard deviations
                     above the mean of the last `window` sound steps; before `window` steps there is no judgement

and for either, one action:

    keep             go on as if nothing had been; it is counted
    skip             the update is not made; the batch is lost, the step counts
    rollback         back to the last checkpoint; the data since then, with the bad batch, is passed over (as PaLM did
                     by hand, arXiv:2204.02311, section 5.1)
    raise_precision  the update is not made, and the next `raise_steps` steps run unquantised
    stop             the run ends and keeps its last checkpoint

The rule is evaluated on the device, on numbers that all ranks have alike, so all of them decide the same, and a run
that is started again decides the same again. Where the answer can only be "go on" or "stop" (the default), the host
does not wait for the device: bad steps are folded into a flag there, which is read at logged steps and always before a
checkpoint is written. With another action the host reads one number a step.

What the guard remembers (its window, its counts, how long precision is raised) is part of the checkpoint; its decisions
are lines of events.jsonl and counts in metrics.jsonl.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.config import GuardAction, GuardConfig

_NO_BAD_STEP = 0
_ACTING = (GuardAction.skip, GuardAction.rollback, GuardAction.raise_precision)


class Diverged(RuntimeError):
    """The run cannot go on: the guard says stop."""


@dataclass(frozen=True)
class Verdict:
    """What to do with a step; `what` is "" for a sound one, else "not finite" or "spike"."""

    action: GuardAction = GuardAction.keep
    what: str = ""

    @property
    def updates(self) -> bool:
        """Whether the optimizer's update is made."""
        return self.action in (GuardAction.keep, GuardAction.stop)


class Guard:
    """Judges steps. Counts: `spikes`, `skips`, `rollbacks`, `raises`."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.window_W2 = torch.full((config.window, 2), torch.nan, device=device)  # loss, log norm; newest first
        self.counts = {"skips": 0, "rollbacks": 0, "raises": 0}
        self.raised_until = 0  # steps before this one run unquantised
        self._spikes = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_step = torch.full((), _NO_BAD_STEP, dtype=torch.int64, device=device)  # the first, 0 = none

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """The verdict on the step that makes `step` steps done; loss and grad_norm () fp32, the same on all ranks."""
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        now_2 = torch.stack([loss, grad_norm.log()])
        mean_2, std_2 = self.window_W2.mean(0), self.window_W2.std(0, correction=0)
        floor_2 = torch.stack([mean_2[0].abs() * 1e-3, torch.full_like(mean_2[1], 1e-2)])
        spike = finite & (now_2 > mean_2 + self.config.spike_sigmas * torch.maximum(std_2, floor_2)).any()
        self._spikes += spike
        sound = finite & ~spike
        self.window_W2 = torch.where(sound, torch.cat([now_2[None], self.window_W2[:-1]]), self.window_W2)
        if self.config.on_nonfinite in _ACTING or self.config.on_spike in _ACTING:
            kind = int(spike + 2 * ~finite)  # waits for the device
            if kind == 0:
                return Verdict()
            what, action = ("spike", self.config.on_spike) if kind == 1 else ("not finite", self.config.on_nonfinite)
            return self._decided(step, action, what)
        stops = (spike & (self.config.on_spike is GuardAction.stop)) | (
            ~finite & (self.config.on_nonfinite is GuardAction.stop)
        )
        self._bad_step = torch.where((self._bad_step == _NO_BAD_STEP) & stops, step, self._bad_step)
        return Verdict()

    def _decided(self, step: int, action: GuardAction, what: str) -> Verdict:
        if action is GuardAction.stop:
            self._bad_step.fill_(step)
        elif action is GuardAction.skip:
            self.counts["skips"] += 1
        elif action is GuardAction.raise_precision:
            self.counts["raises"] += 1
            self.raised_until = step + self.config.raise_steps
        elif action is GuardAction.rollback:
            self.counts["rollbacks"] += 1
            if self.counts["rollbacks"] > self.config.max_rollbacks:
                raise Diverged(
                    f"step {step}: {what}, after guard.max_rollbacks={self.config.max_rollbacks} rollbacks already; "
                    "the run stops here and keeps its last checkpoint. A lower optim.lr or more layers in bf16 may help"
                )
        return Verdict(action, what)

    def raises(self, step: int) -> bool:
        """Whether the step with this index (from 0) runs unquantised."""
        return step < self.raised_until

    def check(self) -> None:
        """Raises Diverged if a step was bad and the action is to stop. Waits for the device."""
        step = int(self._bad_step)
        if step != _NO_BAD_STEP:
            spikes = ", or spikes" if self.config.on_spike is GuardAction.stop else ""
            raise Diverged(
                f"step {step}: the loss or the gradient norm is not finite{spikes}, so the run stops here and keeps "
                "its last checkpoint; a lower optim.lr, another seed, more layers in bf16 (precision.rules), "
                "guard=skip, guard=rollback or guard=raise_precision may help"
            )

    def record(self) -> dict[str, int]:
        """The counts that are not zero, for metrics.jsonl: guard_spikes, guard_skips, ..."""
        counts = {"spikes": int(self._spikes), **self.counts}
        return {f"guard_{what}": count for what, count in counts.items() if count}

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": by name, replicated; "counts": JSON-able}."""
        counts = self.counts | {"raised_until": self.raised_until}
        return {"tensors": {"window": self.window_W2, "spikes": self._spikes}, "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse; a window of another length begins anew."""
        tensors, counts = state["tensors"], dict(state["counts"])
        self.raised_until = counts.pop("raised_until", 0)
        self.counts |= counts
        if tensors["window"].shape == self.window_W2.shape:
            self.window_W2 = tensors["window"].clone()
        self._spikes = tensors["spikes"].clone()
