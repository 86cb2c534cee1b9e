"""TrainState: all that a run must remember to go on as if it had never stopped.

Weights, optimizer moments, and three numbers' worth of bookkeeping: the step, the tokens, and where the loader stands.
There is no random state to keep: every random bit is a function of (seed, step, micro-batch, layer, role). There is no
schedule state: learning rate and precision are functions of the step. The W&B run id lives in the run folder.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lowprec.data import Loader
from lowprec.model import Transformer


@dataclass
class TrainState:
    """Implements torch's `Stateful`. Tensors stay sharded, so a checkpoint loads on any number of ranks."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    loader: Loader
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens consumed

    def state_dict(self) -> dict[str, Any]:
        """{"model": ..., "optim": ..., "progress": JSON text}; the first two by parameter name."""
        model, optim = get_state_dict(self.model, self.optimizer)
        progress = {"step": self.step, "tokens": self.tokens, "loader": self.loader.state_dict()}
        return {"model": model, "optim": optim, "progress": json.dumps(progress)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
        )
        progress = json.loads(state_dict["progress"])
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.loader.load_state_dict(progress["loader"])
