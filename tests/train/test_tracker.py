"""Weights & Biases shows the numbers of metrics.jsonl, as one run however often started, and no secrets."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

SECRET = "0123456789abcdef0123456789abcdef01234567"  # shaped like a key


def offline_file(path: Path) -> dict[str, Any]:
    """Run, config and history out of an offline .wandb file: records in the LevelDB log format, blocks of 32 KiB."""
    data, offset, partial = path.read_bytes(), 7, b""
    found: dict[str, Any] = {"history": [], "config": {}}
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
            found["history"].append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
        if record.WhichOneof("record_type") == "run":
            found["id"] = record.run.run_id
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        if record.WhichOneof("record_type") == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_offline_writes_the_record_and_resumes_the_same_run(train, read, tmp_path: Path, monkeypatch) -> None:
    """Every number of metrics.jsonl is in the offline files, under one run id after a restart; no secret is."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MY_TOKEN", SECRET)
    offline = ("monitor.wandb=offline", "schedule=constant", "train.eval_every=0")
    assert train(tmp_path, *offline, "train.steps=4") == 0
    assert train(tmp_path, *offline, "train.steps=6") == 0

    runs = [offline_file(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert [run["id"] for run in runs] == [(tmp_path / "run_id").read_text().strip()] * 2
    history = [{key: line[key] for key in line if not key.startswith("_")} for run in runs for line in run["history"]]
    assert history == read(tmp_path)
    assert runs[0]["config"]["train"]["steps"] == 4 and runs[0]["config"]["precision"]["linear"]["nvfp4"]
    assert runs[0]["exit"] == 0

    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


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
        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, record: Any) -> None:
            raise ConnectionError("the network is gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    assert train(tmp_path / "b", "monitor.wandb=online") == 0
    assert capsys.readouterr().out.count("the network is gone") == 1
    assert len(read(tmp_path / "b")) == 8
