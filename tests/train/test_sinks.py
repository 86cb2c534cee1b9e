"""CSV and TensorBoard show what metrics.jsonl has, also after a run has gone back and done steps again."""

import csv
import json
import struct
from pathlib import Path
from typing import Any

from lowprec.train.metrics import MetricsLog
from lowprec.train.sinks import COLUMNS, Csv, flat, group_of, grouped
from lowprec.train.sinks_tensorboard import TensorBoard, crc32c, masked

OFF = ("schedule=constant", "schedule.warmup_frac=0", "train.eval_every=0")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def texts(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Records as CSV has them, without what is empty."""
    return [{key: str(value) for key, value in flat(record).items() if value is not None} for record in records]


def test_csv_is_the_record_and_follows_it_back(train, read, tmp_path: Path) -> None:
    """A row a line, fixed columns, and no row of a step that is done again."""
    assert train(tmp_path, "monitor=csv", *OFF, "train.steps=3") == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:  # steps after the checkpoint, as a killed run leaves them
        file.write(json.dumps(read(tmp_path)[-1] | {"step": 4, "loss": 9.0}) + '\n{"step": 5, "lo')
    assert train(tmp_path, "monitor=csv", *OFF, "train.steps=5") == 0
    assert [{k: v for k, v in row.items() if v} for row in rows(tmp_path)] == texts(read(tmp_path))
    assert list(rows(tmp_path)[0])[: len(COLUMNS)] == list(COLUMNS) and len(rows(tmp_path)) == 5


def test_csv_takes_new_columns_and_rewinds(tmp_path: Path) -> None:
    """A key that comes late gets a column, for all rows; a rollback takes rows away."""
    with MetricsLog(tmp_path / "metrics.jsonl", 0) as log:
        sink = Csv(tmp_path)
        records = [{"step": 1, "loss": 3.5}, {"step": 2, "wire_bytes": {"all_gather": 7}, "x,y": 'a "b"'}]
        for record in records:
            log.write(record)
            sink.log(record)
        assert [{k: v for k, v in row.items() if v} for row in rows(tmp_path)] == texts(records)
        log.rewind(1)
        sink.rewind(1)
        again = {"step": 2, "loss": 1.0}
        log.write(again)
        sink.log(again)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("1", "3.5"), ("2", "1.0")]


def test_groups() -> None:
    """Every column that metrics.jsonl documents has a group; behind the last slash stands its name there."""
    assert {group_of(key) for key in COLUMNS} == {
        "", "train", "val", "speed", "memory", "wire", "probe", "guard", "deoscillation"
    }  # fmt: skip
    record = {"step": 1, "loss": 2.0, "wire_bytes": {"all_gather": 1}, "new": 3}
    assert grouped(record) == {"step": 1, "train/loss": 2.0, "wire/wire_bytes": {"all_gather": 1}, "more/new": 3}
    assert {key.rpartition("/")[2]: value for key, value in grouped(record).items()} == record


# ---- TensorBoard: a reader of its files, by the format's definition


def fields(data: bytes) -> list[tuple[int, Any]]:
    """(number, value) of a protobuf message: int, or bytes."""
    out, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            out.append((key >> 3, varint()))
            continue
        size = varint() if size is None else size
        out.append((key >> 3, data[at : at + size]))
        at += size
    return out


def events(path: Path) -> list[dict[int, Any]]:
    """The events of a file, whose checksums must be right."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = struct.unpack("<Q", data[at : at + 8])[0]
        body = data[at + 12 : at + 12 + size]
        sums = struct.unpack("<I", data[at + 8 : at + 12]), struct.unpack("<I", data[at + 12 + size : at + 16 + size])
        assert sums == ((masked(crc32c(data[at : at + 8])),), (masked(crc32c(body)),))
        found.append(dict(fields(body)))
        at += 16 + size
    return found


def scalars(found: list[dict[int, Any]]) -> list[tuple[int, str, float]]:
    """(step, tag, value) as TensorBoard keeps them: a session that starts at a step drops what was there from it on."""
    kept: list[tuple[int, str, float]] = []
    for event in found:
        if 7 in event:
            kept = [value for value in kept if value[0] < event[2]]
        for _, value in fields(event.get(5, b"")):
            entry = dict(fields(value))
            if 2 in entry:
                kept.append((event[2], entry[1].decode(), struct.unpack("<f", entry[2])[0]))
    return kept


def test_crc() -> None:
    """The check values of RFC 3720, B.4, and of the catalogue of CRCs."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_tensorboard_has_the_record_texts_and_heat_maps(train, read, tmp_path: Path) -> None:
    """Two starts, the second of which does a step again: scalars are those of metrics.jsonl, once each."""
    probing = ("monitor=tensorboard", "probe.every=2", "probe.window=0", *OFF)
    assert train(tmp_path, *probing, "train.steps=2") == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(read(tmp_path)[-1] | {"step": 3, "loss": 9.0}) + "\n")
    assert train(tmp_path, *probing, "train.steps=4") == 0

    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)
    assert [path.suffix for path in files] == [".0", ".1"]
    found = [event for path in files for event in events(path)]
    assert found[0][3] == b"brain.Event:2"
    shown = {(step, tag): value for step, tag, value in scalars(found)}
    for record in read(tmp_path):
        for key in ("loss", "lr", "grad_norm"):
            assert shown[record["step"], f"train/{key}"] == struct.unpack("<f", struct.pack("<f", record[key]))[0]
    values = [dict(fields(value)) for event in found for _, value in fields(event.get(5, b""))]
    pictures = [dict(fields(value[4])) for value in values if value[1] == b"probe/heat_map"]
    assert len(pictures) == 2 and all(p[4][:8] == b"\x89PNG\r\n\x1a\n" and p[2] > 300 for p in pictures)
    plan = next(value for value in values if value[1] == b"about/plan.txt")
    assert b"layers.0-1.attn.q_proj" in plan[8]


def test_tensorboard_drops_what_is_done_again(tmp_path: Path) -> None:
    """After a rollback within one start, too; what is not a finite number is left out."""
    sink = TensorBoard(tmp_path, 0, {})
    for step, loss in ((1, 3.0), (2, 2.0), (3, None)):
        sink.log({"step": step, "loss": loss, "plan": "abc"})
    sink.rewind(1)
    sink.alert("rollback", "to step 1")
    sink.log({"step": 2, "loss": 2.5})
    sink.finish(0)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert [v for v in scalars(events(path)) if v[1] == "train/loss"] == [
        (1, "train/loss", 3.0),
        (2, "train/loss", 2.5),
    ]
