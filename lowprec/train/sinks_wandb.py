"""Weights & Biases: the numbers of metrics.jsonl in groups, probes as tables and a heat map, alerts, and a way to stop.

- The run id comes from the run folder, so a restarted run is the same W&B run (`resume="allow"`). W&B is never asked
  what was done before: offline it does not know. Under a `wandb agent` the id is the sweep's, and the folder takes it.
- Every chart is over `tokens` (`define_metric`). No `step=` is passed: W&B drops steps below the last one it saw,
  which is just what a run that resumes from a checkpoint sends.
- The configuration with the facts, and the precision plan as a page, are uploaded. Source code, git remotes,
  console, command line, host, environment and the list of packages are not.
- `probe/heat_map` is a picture, `probe/roles` and `probe/layers` are tables, one each probe.
- Checkpoints can be artifacts (`monitor.checkpoints`): references to their paths, nothing is uploaded.
- A person stops a run by giving it the tag `cancel` on its page: a thread looks for it every `monitor.cancel_s`
  seconds, when online. At the end `cancelled` takes its place, so that a later start goes on.
"""

import html
import io
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowprec.config import MonitorConfig, WandbMode
from lowprec.train.checkpoint import committed
from lowprec.train.metrics import Record
from lowprec.train.sinks import grouped

CANCEL, CANCELLED = "cancel", "cancelled"
MEASURES = ("sqnr_db", "bias", "cosine", "underflow_frac", "saturation_frac", "amax", "kurtosis", "max_over_mean")
OF_LAYERS = (
    ("gradient", "cosine"), *(("error", name) for name in ("R", "A", "B", "C", "gain")),
    *(("weight", name) for name in ("oscillation", "edq", "edq_bf16", "lost_frac")),
)  # fmt: skip


class Wandb:
    """The sink."""

    name = "W&B"

    def __init__(self, config: MonitorConfig, name: str, run_id: str, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        quiet = wandb.Settings(
            console="off", disable_git=True, disable_code=True, silent=True, init_timeout=60,
            x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,  # command line, host, packages
        )  # fmt: skip
        self._run = wandb.init(
            project=config.project, entity=config.entity, group=config.group, name=name,
            id=run_id, resume="allow", mode=config.wandb.value, dir=str(folder), config=settings, settings=quiet,
        )  # fmt: skip
        have = tuple(self._run.tags or ())  # not given to init, which would replace what people have added since
        if more := [tag for tag in config.tags if tag not in have]:
            self._run.tags = (*have, *more)
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        if self._run.id != run_id:  # a sweep's
            (folder / "run_id").write_text(f"{self._run.id}\n", encoding="utf-8")
        if (folder / "plan.txt").exists():
            text = html.escape((folder / "plan.txt").read_text(encoding="utf-8"))
            self._run.log({"about/plan": wandb.Html(f"<pre>{text}</pre>", inject=False)})
        self._named = set(committed(folder / "checkpoints")) if config.checkpoints else None
        self._cancel = None
        if config.wandb is WandbMode.online and config.cancel_s > 0:
            self._cancel = Cancel(f"{self._run.entity}/{self._run.project}/{self._run.id}", config.cancel_s)

    def log(self, record: Record) -> None:
        self._run.log(grouped(record))

    def probe(self, line: Record) -> None:
        from PIL import Image

        from lowprec.train.sinks_heat import overview_png

        picture = self._wandb.Image(Image.open(io.BytesIO(overview_png(line))), caption=f"step {line['step']}")
        roles, layers = tables(line)
        self._run.log({
            "probe/heat_map": picture,
            "probe/roles": self._wandb.Table(columns=["step", "layer", "gemm", "operand", *MEASURES], data=roles),
            "probe/layers": self._wandb.Table(columns=["step", "layer", *map("_".join, OF_LAYERS)], data=layers),
        })  # fmt: skip

    def alert(self, title: str, text: str) -> None:
        level = "ERROR" if title == "diverged" else "WARN"
        self._run.alert(title=title[:63], text=text, level=level, wait_duration=300)  # of one title, once in 5 minutes

    def rewind(self, step: int) -> None: ...

    def saved(self) -> None:
        if self._named is None:
            return
        for step, path in committed(self._folder / "checkpoints").items():
            if step not in self._named:
                self._named.add(step)
                artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", "checkpoint", metadata={"step": step})
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
                self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.asked

    def finish(self, exit_code: int) -> None:
        if self._cancel is not None:
            self._cancel.end()
            if self._cancel.asked and exit_code == 0:  # else the next start obeys the tag
                self._run.tags = self._cancel.tags
        self._run.finish(exit_code=exit_code)


class Cancel(threading.Thread):
    """Looks for the tag `cancel` on a run's page; a server that does not answer is asked again in its turn."""

    def __init__(self, path: str, every_s: float) -> None:
        super().__init__(name="wandb-cancel", daemon=True)
        self.path, self.every_s, self.asked = path, every_s, False
        self.tags: tuple[str, ...] = ()  # what the run's are to be, once it has been asked
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not (self.asked or self._ended.wait(self.every_s)):
            with suppress(Exception):
                self._look()

    def _look(self) -> None:
        import wandb

        run: Any = wandb.Api(timeout=20).run(self.path)
        if CANCEL in run.tags:
            self.tags = tuple(dict.fromkeys(CANCELLED if tag == CANCEL else tag for tag in run.tags))
            self.asked = True

    def end(self) -> None:
        """No further look is begun."""
        self._ended.set()


def tables(line: Record) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of `probe/roles` and `probe/layers` from a line of probes.jsonl; None where nothing was measured."""
    roles, layers = [], []
    for name, found in line["layers"].items():
        for gemm, operands in found.get("gemms", {}).items():
            for operand, measures in operands.items():
                roles.append([line["step"], name, gemm, operand, *(measures.get(key) for key in MEASURES)])
        layers.append([line["step"], name, *(found.get(part, {}).get(key) for part, key in OF_LAYERS)])
    return roles, layers
