"""Weights & Biases shows the numbers of metrics.jsonl, as one run however often started, and no secrets."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb
import yaml
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps import utils as sweeps

from lowprec.config import MonitorConfig
from lowprec.launch.train import main
from lowprec.scaling.sources.wandb_files import read_file
from lowprec.train.sinks import Csv, grouped
from lowprec.train.tracker import Tracker
from tests.train.wandb_online import Server, serve

SECRET = "0123456789abcdef0123456789abcdef01234567"  # shaped like a key


def offline_file(path: Path) -> dict[str, Any]:
    """Run, config and history out of an offline .wandb file: records in the LevelDB log format, blocks of 32 KiB."""
    data, offset, partial = path.read_bytes(), 7, b""
    found: dict[str, Any] = {"history": [], "config": {}, "alerts": [], "artifacts": []}
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        _, size, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if left < 7 or (size == 0 and kind == 0):
            offset += left
            continue
        partial = (b"" if kind in (1, 2) else partial) + data[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (2, 3):  # first, middle: the record goes on
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(partial)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found["history"].append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items})
        if record.WhichOneof("record_type") == "run":
            found["id"] = record.run.run_id
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "checkpoint":
            contents = record.artifact.manifest.contents
            found["artifacts"].append((record.artifact.name, [entry.ref for entry in contents]))
        if record.WhichOneof("record_type") == "alert":
            found["alerts"].append((record.alert.title, record.alert.text))
        if record.WhichOneof("record_type") == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_offline_writes_the_record_and_resumes_the_same_run(train, read, tmp_path: Path, monkeypatch) -> None:
    """Every number of metrics.jsonl is in the offline files, under one run id after a restart; no secret is."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("SLURM_JOB_COMMENT", SECRET)  # W&B would note it, with command line, host and packages
    offline = ("monitor.wandb=offline", "monitor.checkpoints=true", "schedule=constant", "train.eval_every=0")
    assert train(tmp_path, *offline, "train.steps=4") == 0
    assert train(tmp_path, *offline, "train.steps=6") == 0

    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    runs = [offline_file(path) for path in files]
    assert [run["id"] for run in runs] == [(tmp_path / "run_id").read_text().strip()] * 2
    assert numbers(line for run in runs for line in run["history"]) == [grouped(record) for record in read(tmp_path)]
    again = [{k: v for k, v in line.items() if k[0] != "_"} for path in files for line in read_file(path)[1]]
    assert again == read(tmp_path)  # what is fitted from offline files has the names of metrics.jsonl
    plans = [line["about/plan._type"] for run in runs for line in run["history"] if "about/plan._type" in line]
    assert plans == ["html-file"] * 2
    references = [reference for run in runs for _, references in run["artifacts"] for reference in references]
    assert {Path(urlsplit(r).path).parent for r in references} == {
        tmp_path.resolve() / "checkpoints" / f"step_{step:08d}" for step in (4, 6)
    }
    assert runs[0]["config"]["train"]["steps"] == 4 and runs[0]["config"]["precision"]["linear"]["nvfp4"]
    assert runs[0]["exit"] == 0

    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert not list(tmp_path.rglob("requirements.txt"))


def numbers(history: Any) -> list[dict[str, Any]]:
    """Lines of a history that are lines of metrics.jsonl, without W&B's own keys."""
    return [{key: line[key] for key in line if key[0] != "_"} for line in history if "step" in line]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        wandb.teardown()  # the client reads the environment once
        yield server
        wandb.teardown()


def test_online_resumes_the_same_run_and_a_tag_cancels_it(train, read, tmp_path: Path, server: Server, capsys) -> None:
    """One run on the server after a restart. The tag `cancel` ends a run in order, with 0; the next start goes on."""
    online = ("monitor.wandb=online", "schedule=constant", "schedule.warmup_frac=0", "train.eval_every=0")
    assert train(tmp_path, *online, "train.steps=3", "monitor.cancel_s=0") == 0
    run_id = (tmp_path / "run_id").read_text().strip()
    run = server.runs[run_id]
    assert numbers(run["history"]) == [grouped(record) for record in read(tmp_path)] and run["exit"] == 0

    run["tags"] = ["mine", "cancel"]
    capsys.readouterr()
    assert train(tmp_path, *online, "train.steps=500", "monitor.cancel_s=0.05") == 0
    assert "cancelled on the page of the run: stopped after step" in capsys.readouterr().out
    done = read(tmp_path)[-1]["step"]
    assert 3 < done < 500 and (tmp_path / "checkpoints" / f"step_{done:08d}" / ".metadata").exists()
    assert (tmp_path / "exit_code").read_text() == "0\n"
    assert run["tags"] == ["mine", "cancelled"]

    assert train(tmp_path, *online, f"train.steps={done + 2}", "monitor.cancel_s=0.05") == 0
    assert [line["step"] for line in numbers(run["history"])] == list(range(1, done + 3))
    assert set(server.starts) == {run_id} and list(server.runs) == [run_id]


def test_a_sweep_decides_the_run_id(train, tmp_path: Path, server: Server, monkeypatch) -> None:
    """Under an agent the run is the sweep's: its id is in the folder, and a start by hand goes on with it."""
    for key, value in {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "given1"}.items():
        monkeypatch.setenv(key, value)
    folder = "run.dir=" + str(tmp_path) + "/${oc.env:WANDB_RUN_ID}"
    assert train(tmp_path, folder, "monitor.wandb=offline", "train.steps=1") == 0
    assert (tmp_path / "given1" / "run_id").read_text() == "given1\n"
    assert [offline_file(p)["id"] for p in tmp_path.glob("given1/wandb/offline-run-*/run-*.wandb")] == ["given1"]


def test_the_sweep_of_the_docs_is_a_command_that_composes(monkeypatch, capsys) -> None:
    """docs/watching.md's sweep.yaml, expanded by the W&B agent's own code for one point of the grid."""
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    sweep = yaml.safe_load(page.split("```yaml\n# sweep.yaml\n")[1].split("```")[0])
    point = {key: {"value": about["values"][-1]} for key, about in sweep["parameters"].items()}
    words = sweeps.create_sweep_command(sweep["command"])
    filled = sweeps.create_sweep_command_args({"args": point}) | {"env": [], "program": []}
    argv = [part for word in words for part in (filled[word[2:-1]] if word.startswith("${") else [word])]
    monkeypatch.setenv("WANDB_RUN_ID", "given2")
    assert main([*argv, "--cfg", "job"]) == 0
    run = yaml.safe_load(capsys.readouterr().out)
    assert (run["optim"]["lr"], run["seed"], run["monitor"]["wandb"]) == (0.004, 1, "online")
    assert run["run"]["dir"] in ("runs/sweep/given2", "runs/sweep/${oc.env:WANDB_RUN_ID}")


def test_alerts_and_probes(train, tmp_path: Path) -> None:
    """A rollback is an alert; a probe is a picture and two tables."""
    spikes = ("guard=rollback", "guard.spike_sigmas=0.1", "guard.window=2", "guard.max_rollbacks=0")
    assert train(tmp_path / "a", "monitor.wandb=offline", "train.checkpoint_every=1", *spikes) == 70
    (file,) = (tmp_path / "a").glob("wandb/offline-run-*/run-*.wandb")
    assert [title for title, _ in offline_file(file)["alerts"]][-1] == "diverged"

    assert train(tmp_path / "b", "monitor.wandb=offline", "train.steps=2", "probe.every=1", "probe.window=1") == 0
    (file,) = (tmp_path / "b").glob("wandb/offline-run-*/run-*.wandb")
    lines = [line for line in offline_file(file)["history"] if "probe/roles._type" in line]
    assert len(lines) == 2 and all(line["probe/heat_map._type"] == "image-file" for line in lines)
    tables = sorted(file.parent.glob("files/media/table/probe/roles*.json"))
    rows = [dict(zip(t["columns"], row)) for t in map(json.loads, (p.read_text() for p in tables)) for row in t["data"]]
    probed = [json.loads(line) for line in (tmp_path / "b" / "probes.jsonl").read_text().splitlines()]
    for row in rows:
        found = probed[row["step"] - 1]["layers"][row["layer"]]["gemms"][row["gemm"]][row["operand"]]
        assert row["sqnr_db"] == pytest.approx(found["sqnr_db"]) and row["kurtosis"] == found.get("kurtosis")
    assert {row["operand"] for row in rows} == {"x", "w", "dy", "out"} and {row["step"] for row in rows} == {1, 2}


def test_disabled_writes_nothing(train, tmp_path: Path, monkeypatch) -> None:
    """Disabled is the default, whatever the environment says, and leaves no trace of W&B in the folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("W&B was started"))
    assert train(tmp_path, "train.steps=1") == 0
    assert not (tmp_path / "wandb").exists()


def test_a_failing_tracker_is_told_once_and_does_not_stop_training(
    train, read, tmp_path: Path, monkeypatch, capsys
) -> None:
    """W&B that cannot start, or breaks on the way, costs one sentence."""

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert train(tmp_path / "a", "monitor.wandb=online") == 0
    said = capsys.readouterr().out
    assert said.count("W&B is not used from here on (No API key configured.)") == 1
    assert len(read(tmp_path / "a")) == 8

    class Broken:
        id, tags = "one", ()

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, record: Any) -> None:
            raise ConnectionError("the network is gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    assert train(tmp_path / "b", "monitor.wandb=online") == 0
    assert capsys.readouterr().out.count("the network is gone") == 1
    assert len(read(tmp_path / "b")) == 8


def test_what_a_sink_can_do_without_is_given_up_alone(tmp_path: Path) -> None:
    """Heat maps that cannot be sent are told once; the numbers go on."""

    class Half(Csv):
        def probe(self, line: Any) -> None:
            raise ConnectionError("no pictures")

    said: list[str] = []
    tracker = Tracker(MonitorConfig(), "run", "id", tmp_path, {}, said.append, True)
    tracker._sinks = [Half(tmp_path)]
    for step in (1, 2):
        tracker.log({"step": step})
        tracker.probe({"step": step})
    assert said == ["metrics.csv gets no heat maps from here on (no pictures)"]
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3
