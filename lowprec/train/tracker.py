"""The tracker: tells every sink of a run (see :mod:`lowprec.train.sinks`) what happens, and survives all of them.

A sink that fails is dropped, which is said once, and training goes on: the record is metrics.jsonl. Where only a
probe's table or a checkpoint fails, that part alone is given up.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowprec.config import MonitorConfig, WandbMode
from lowprec.train.metrics import Record
from lowprec.train.sinks import Csv, Sink


class Tracker:
    """Does nothing (and imports no sink) where none is asked for, and on ranks other than the first."""

    def __init__(
        self,
        config: MonitorConfig,
        name: str,
        run_id: str,
        folder: Path,
        settings: dict[str, Any],
        say: Callable[[str], None],
        active: bool,
        step: int = 0,
    ) -> None:
        """settings: the configuration and the facts. step: steps done before this start."""
        self._say, self._sinks = say, list[Sink]()
        self._without = set[tuple[str, str]]()  # (sink, what it is not told any more)
        if not active:
            return
        if config.wandb is not WandbMode.disabled:
            self._open("W&B", lambda: _wandb(config, name, run_id, folder, settings))
        if config.tensorboard:
            self._open("TensorBoard", lambda: _tensorboard(folder, step))
        if config.csv:
            self._open(Csv.name, lambda: Csv(folder))

    def log(self, record: Record) -> None:
        """A line of metrics.jsonl."""
        self._tell(lambda sink: sink.log(record))

    def probe(self, line: Record) -> None:
        """A line of probes.jsonl."""
        self._tell(lambda sink: sink.probe(line), extra="heat maps")

    def alert(self, title: str, text: str) -> None:
        """What a person should see. title: one word or two, the same for all events of a kind."""
        self._tell(lambda sink: sink.alert(title, text))

    def rewind(self, step: int) -> None:
        """Steps after this one are done again."""
        self._tell(lambda sink: sink.rewind(step))

    def saved(self) -> None:
        """There may be a new checkpoint."""
        self._tell(lambda sink: sink.saved(), extra="checkpoints")

    @property
    def cancelled(self) -> bool:
        """Whether a person has asked for a stop, on the page of the run."""
        return any(sink.cancelled() for sink in self._sinks)

    def finish(self, exit_code: int) -> None:
        """Closes all sinks; further calls do nothing."""
        self._tell(lambda sink: sink.finish(exit_code))
        self._sinks = []

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:
            self._give_up(name, error)

    def _tell(self, what: Callable[[Sink], None], extra: str = "") -> None:
        """extra: what a sink can do without; if that fails, only that is given up."""
        for sink in [sink for sink in self._sinks if (sink.name, extra) not in self._without]:
            try:
                what(sink)
            except Exception as error:
                if extra:
                    self._without.add((sink.name, extra))
                    self._say(f"{sink.name} gets no {extra} from here on ({_reason(error)})")
                else:
                    self._sinks.remove(sink)
                    self._give_up(sink.name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._say(f"{name} is not used from here on ({_reason(error)}); metrics.jsonl has every number")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _wandb(config: MonitorConfig, name: str, run_id: str, folder: Path, settings: dict[str, Any]) -> Sink:
    from lowprec.train.sinks_wandb import Wandb

    return Wandb(config, name, run_id, folder, settings)


def _tensorboard(folder: Path, step: int) -> Sink:
    from lowprec.train.sinks_tensorboard import TensorBoard

    files = {name: folder / name for name in ("plan.txt", "config.yaml")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}
    return TensorBoard(folder, step, texts)
