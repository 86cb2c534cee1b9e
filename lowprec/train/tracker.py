"""Weights & Biases as a second view of metrics.jsonl: the same numbers under the same names.

- The run id comes from the run folder, so a restarted run is the same W&B run (`resume="allow"`). W&B is never asked
  what was done before: offline it does not know.
- Every chart is over `tokens` (`define_metric`). No `step=` is passed: W&B drops steps below the last one it saw,
  which is just what a run that resumes from a checkpoint sends.
- The configuration is uploaded. Source code, git remotes, the console and the environment are not.
- If W&B fails, that is said once and training goes on: the record is metrics.jsonl.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowprec.config import MonitorConfig, WandbMode
from lowprec.train.metrics import Record


class Tracker:
    """Does nothing (and does not import wandb) when disabled or on ranks other than the first."""

    def __init__(
        self,
        config: MonitorConfig,
        name: str,
        run_id: str,
        folder: Path,
        settings: dict[str, Any],
        say: Callable[[str], None],
        active: bool,
    ) -> None:
        self._say, self._run = say, None
        if not active or config.wandb is WandbMode.disabled:
            return
        try:
            import wandb

            quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True, init_timeout=60)
            self._run = wandb.init(
                project=config.project, entity=config.entity, group=config.group, tags=config.tags or None, name=name,
                id=run_id, resume="allow", mode=config.wandb.value, dir=str(folder), config=settings, settings=quiet,
            )  # fmt: skip
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="tokens")
        except Exception as error:
            self._give_up(error)

    def log(self, record: Record) -> None:
        if self._run is not None:
            try:
                self._run.log(record)
            except Exception as error:
                self._give_up(error)

    def finish(self, exit_code: int) -> None:
        """Closes the W&B run; further calls do nothing."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
                self._run = None
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._say(f"W&B is not used from here on ({reason}); metrics.jsonl has every number")
