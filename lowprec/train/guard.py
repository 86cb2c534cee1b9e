"""Stops a run whose loss or gradient is no longer a number, without making the device wait for the host at every step.

Each step folds one flag into the last on the device; the host reads it when it reads the loss anyway (at a logged
step) and always before a checkpoint is written. So a checkpoint never holds weights from after a non-finite step, and
the loss curve never hides one.
"""

import torch


class Diverged(RuntimeError):
    """The loss or the gradient norm became infinite or NaN."""


class Guard:
    def __init__(self, device: torch.device) -> None:
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)  # first bad step, 0 = none

    def watch(self, step: int, finite: torch.Tensor) -> None:
        """Remembers `step` if its loss or gradient norm was not `finite` (() bool). No synchronisation."""
        self._bad_step = torch.where((self._bad_step == 0) & ~finite, step, self._bad_step)

    def check(self) -> None:
        """Raises Diverged if any watched step was not finite. Synchronises."""
        step = int(self._bad_step)
        if step:
            raise Diverged(
                f"step {step}: the loss or the gradient norm is not finite, so the run stops here and keeps its last "
                "checkpoint; a lower optim.lr, another seed or more layers in bf16 (precision.rules) may help"
            )
