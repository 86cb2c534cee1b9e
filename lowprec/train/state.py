"""TrainState: all that a run must remember to go on as if it had never stopped.

Weights, optimizer moments, what the layers' recipes remember (amax histories and the like; most remember nothing), the
open window of de-oscillation if there is one, what the guard has seen, what the controller has raised, and some
bookkeeping: the step, the tokens, and where the loader stands. There is no random state to keep: every random bit is a
function of (seed, step, micro-batch, layer, role). There is no schedule state: learning rate and precision are
functions of the step. The W&B run id lives in the run folder.

Keys in a checkpoint: ``model.<name>``, ``optim...``, ``progress``, ``guard/<key>`` and ``precision/<layer>/<key>``
(replicated), ``oscillation/<layer>/<key>`` (sharded like the weight) and ``comm/<rank>/<key>`` (a rank's own).
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

from lowprec.data import Loader
from lowprec.linear import Plan
from lowprec.parallel import Engine
from lowprec.train.controller import Controller
from lowprec.train.guard import Guard
from lowprec.train.oscillation import Oscillation

OPTIONAL = ("precision/", "oscillation/", "guard/", "comm/")
"""Keys that a checkpoint need not have: one of another recipe (`run.allow_change`) starts without such memories."""


@dataclass
class TrainState:
    """Implements torch's `Stateful`. Tensors stay sharded, so a checkpoint loads on any number of ranks."""

    engine: Engine
    loader: Loader
    plan: Plan
    oscillation: Oscillation
    guard: Guard
    controller: Controller
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens consumed

    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ..., "progress": JSON text}, the first two by parameter name, and OPTIONAL keys."""
        guard = self.guard.state_dict()
        progress = {"step": self.step, "tokens": self.tokens, "loader": self.loader.state_dict()}
        progress["guard"], progress["controller"] = guard["counts"], self.controller.state_dict()
        state: dict[str, Any] = self.engine.state_dict() | {"progress": json.dumps(progress)}
        state |= {f"precision/{key}": tensor for key, tensor in self.plan.state_dict().items()}
        if self.engine.transport is not None:
            state |= {f"comm/{key}": tensor for key, tensor in self.engine.transport.state_dict().items()}
        state |= {f"guard/{key}": tensor for key, tensor in guard["tensors"].items()}
        return state | {f"oscillation/{key}": tensor for key, tensor in self.oscillation.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse; memories that are missing stay as they are, an open window of which anything is missing is given up.
        The window must be there already: `oscillation.reopen`."""
        self.engine.load_state_dict(state_dict)
        progress = json.loads(state_dict["progress"])
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.loader.load_state_dict(progress["loader"])
        if self.engine.transport is not None:
            self.engine.transport.load_state_dict(_under("comm/", state_dict))
        tensors = self.guard.state_dict()["tensors"] | _under("guard/", state_dict)
        self.guard.load_state_dict({"tensors": tensors, "counts": progress.get("guard", {})})
        self.controller.load_state_dict(progress.get("controller", {}))
        self.plan.load_state_dict(self.plan.state_dict() | _under("precision/", state_dict))
        self.oscillation.load_state_dict(_under("oscillation/", state_dict))


def _under(prefix: str, state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
