"""Runs on W&B: the real client against a server on this machine, files that the real client left, and exports."""

import csv
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.scaling.read import read, read_curve
from lowprec.scaling.sources import wandb_api
from lowprec.scaling.sources.wandb_files import chunks, read_file
from lowprec.tools.fit_scaling import main
from lowprec.train.sinks import grouped
from tests.scaling.made_runs import facts, log, make_run
from tests.scaling.wandb_server import Server, serve

KEY = "0123456789abcdef0123456789abcdef01234567"
ELSEWHERE = ["source", "curve"]  # where a run was read from


def on_wandb(name: str, about: dict[str, Any] | None, records: list[dict[str, Any]], state: str = "finished") -> dict:
    """What W&B holds of a run: the last value of everything, and the config."""
    summary: dict[str, Any] = {"_step": len(records), "_runtime": 1.0}
    for record in records:
        summary |= record
    config = {"optim": {"lr": 0.002}, "name": name} | ({"facts": about} if about else {})
    return {"name": name, "id": f"id-{name}", "state": state, "config": config, "summary": summary, "history": records}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A project of lowprec's runs, one of somebody else's, and a login; waits take no time."""
    runs = [on_wandb(f"r{i}", facts("nvfp4" if i % 2 else "bf16", seed=i), log(level=3 + i / 97)) for i in range(5)]
    runs.append(on_wandb("stopped", facts(), log()[:20], "crashed"))
    nan = log()[-1] | {"loss": "NaN", "val_loss": "NaN"}
    runs.append(on_wandb("broken", facts(), [*log()[:-1], nan], "failed"))
    others = [on_wandb(f"o{i}", None, [{"tokens": 1e9, "val/loss": 3.0 - i / 10, "lr": 0.0}]) for i in range(2)]
    for i, other in enumerate(others):
        other["config"] = {"model": {"weights": 1e6 * (i + 1)}}
    with serve({"me/ladder": runs, "me/others": others, "me/empty": []}) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the client makes an empty folder for each run
        monkeypatch.setattr(wandb_api, "PER_PAGE", 3)
        monkeypatch.setattr(wandb_api, "FIRST_WAIT_S", 0.0)
        yield server


def test_a_project(server: Server, tmp_path: Path) -> None:
    """All pages are read, and every run is the row that its run folder is, but for where it was read."""
    seen: list[tuple[int, int]] = []
    table = read(["wandb://me/ladder"], progress=lambda done, total: seen.append((done, total)))
    assert list(table.frame["run"]) == [f"r{i}" for i in range(5)] and seen[-1] == (7, 7)
    assert [v["cursor"] for what, v in server.asked if what == "runs("] == [None, "3", "6"]
    reasons = {lost.run: lost.reason.split(":")[0] for lost in table.dropped}
    assert reasons == {"stopped": "unfinished", "broken": "diverged"}
    for i in range(5):
        make_run(tmp_path / "runs" / f"r{i}", facts("nvfp4" if i % 2 else "bf16", seed=i), log(level=3 + i / 97))
    folders = read([str(tmp_path / "runs")])
    pd.testing.assert_frame_equal(table.frame.drop(columns=ELSEWHERE), folders.frame.drop(columns=ELSEWHERE))
    assert table.frame["source"][0] == "wandb://me/ladder/id-r0"
    both = read([str(tmp_path / "runs"), "wandb://me/ladder"])
    pd.testing.assert_frame_equal(both.frame, folders.frame)  # the same run ids: the folders stay


def test_filters_and_curves(server: Server) -> None:
    """What follows `?` goes to the server; a row leads to its curve."""
    table = read(["wandb://me/ladder?displayName=r1&state=finished"])
    wanted = [json.loads(v["filters"]) for what, v in server.asked if what == "runs("]
    assert wanted == [{"displayName": "r1", "state": "finished"}] and list(table.frame["run"]) == ["r1"]
    curve = read_curve(table.frame["curve"][0])
    records = log(level=3 + 1 / 97)
    assert list(curve["loss"]) == [record["loss"] for record in records]
    assert list(curve["lr"]) == [record["lr"] for record in records] and curve["val_loss"].notna().sum() == 4


def test_grouped_names_are_read_alike(server: Server) -> None:
    """Whether a run was logged with groups before the names or, by older versions, without: the same row and curve."""
    old = server.projects["me/ladder"][:5]
    named = [run | {"history": [grouped(line) for line in run["history"]]} for run in old]
    server.projects["me/new"] = [run | {"summary": grouped(run["summary"])} for run in named]
    assert "val/val_loss" in server.projects["me/new"][0]["summary"]
    before, after = read(["wandb://me/ladder?state=finished"]), read(["wandb://me/new"])
    pd.testing.assert_frame_equal(before.frame.drop(columns=ELSEWHERE), after.frame.drop(columns=ELSEWHERE))
    curves = [read_curve(table.frame["curve"][2]) for table in (before, after)]
    pd.testing.assert_frame_equal(*curves)
    assert curves[1]["val_loss"].notna().any()


def test_projects_of_others(server: Server) -> None:
    """Without facts, what was configured and logged is a table: last values win, but for what only the config knows."""
    table = read(["wandb://me/others"], columns={"N": "config.model.weights"})
    assert list(table.column("N")) == [1e6, 2e6] and list(table.column("loss")) == [3.0, 2.9]
    with pytest.raises(ValueError, match=r"wandb://me/others.* has no column for N .*config.model.weights"):
        read(["wandb://me/others?state=finished"])


def test_what_passes_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate limit costs a wait, and no run, also where the client itself gives up."""
    monkeypatch.setattr(wandb_api, "TIMEOUT_S", 1)  # the client waits two seconds after a 429
    server.failures = [429, 0, 429]  # of the first page and of the second
    assert list(read(["wandb://me/ladder"]).frame["run"]) == [f"r{i}" for i in range(5)]


def test_a_key_that_the_server_refuses(server: Server) -> None:
    server.locked = True
    with pytest.raises(
        ValueError, match=r"wandb://me/ladder: W&B does not accept your login .*run `wandb login --relogin`"
    ):
        read(["wandb://me/ladder"])


def test_the_second_reading_is_offline(server: Server, tmp_path: Path) -> None:
    """With a cache the server is asked once; the file is a table of its own."""
    first = read(["wandb://me/ladder"], cache=tmp_path / "kept")
    server.failures, asked = [404] * 9, len(server.asked)
    pd.testing.assert_frame_equal(read(["wandb://me/ladder"], cache=tmp_path / "kept").frame, first.frame)
    assert len(server.asked) == asked
    (file,) = (tmp_path / "kept").iterdir()
    pd.testing.assert_frame_equal(read([str(file)]).frame, first.frame)


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lowprec-scaling ingest` on a project writes the same table, and with --cache asks once."""
    words = [
        "ingest",
        "--runs",
        "wandb://me/ladder",
        "--cache",
        str(tmp_path / "kept"),
        "--out",
        str(tmp_path / "r.csv"),
    ]
    assert main(words) == 0 and "5 runs" in capsys.readouterr().out
    asked = len(server.asked)
    assert main(words) == 0 and len(server.asked) == asked
    table = read([str(tmp_path / "r.csv")])
    assert list(table.frame["run"]) == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize(
    "url, failures, sentence",
    [
        ("wandb://me/nothing", [], "there is no such project, or it is private and your login may not see it"),
        ("wandb://me/secret", [403], "there is no such project, or it is private and your login may not see it"),
        ("wandb://me/lost", [404], "there is no such project, or it is private and your login may not see it"),
        ("wandb://me/ladder?a=1", [401], "W&B does not accept your login (no): run `wandb login --relogin`"),
        ("wandb://me/ladder?a=2", [400], "W&B refuses the request (400: no)"),
        ("wandb://me/empty", [], "there is no run in me/empty"),
        ("wandb://me/ladder?state=running", [], "there is no run in me/ladder that the filters keep"),
        ("wandb://me", [], "wandb://me: write wandb://entity/project"),
    ],
)
def test_what_is_refused_for_good(server: Server, url: str, failures: list[int], sentence: str) -> None:
    """One sentence, at once, with the address."""
    server.failures = failures
    with pytest.raises(ValueError) as error:
        read([url])
    assert sentence in str(error.value) and url.partition("?")[0] in str(error.value)


def test_nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a key the fix is `wandb login`."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="you are not logged in to W&B: run `wandb login`"):
        read(["wandb://me/ladder"])


class Refused(Exception):
    """As requests has it."""

    def __init__(self, status: int) -> None:
        super().__init__("no")
        self.response = type("Response", (), {"status_code": status})()


def test_patience_doubles_and_ends() -> None:
    """Waits of 2, 4, 8 ... seconds, a little more by chance, and an end after the sixth try."""
    waits: list[float] = []
    answers: list[Any] = [Refused(429), TimeoutError("slow"), Refused(503), "done"]

    def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wandb_api.patiently("me/x", ask, waits.append) == "done"
    assert [2 ** int(i + 1) <= wait <= 1.25 * 2 ** (i + 1) for i, wait in enumerate(waits)] == [True] * 3
    answers = [Refused(429)] * 6
    with pytest.raises(ValueError, match=r"W&B could not be asked, 6 times in a row \(429: no\); try again later"):
        wandb_api.patiently("me/x", ask, waits.append)
    assert not answers


# ---- files of the client


def offline_run(
    folder: Path, run_id: str, records: list[dict[str, Any]], about: dict[str, Any], exit_code: int = 0
) -> Path:
    """What the client leaves of a run that was logged offline; the .wandb file."""
    quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
    before = set(folder.rglob("*.wandb"))
    named: dict[str, Any] = {"project": "p", "name": "wb", "id": run_id, "config": {"facts": about}}
    run = wandb.init(**named, mode="offline", dir=str(folder), settings=quiet)
    run.define_metric("*", step_metric="tokens")
    for record in records:
        run.log(record)
    run.finish(exit_code=exit_code)
    (path,) = set(folder.rglob("*.wandb")) - before
    for _ in range(1000):  # the client's own process writes the file, and may do so after `finish`
        if "exit" in read_file(path)[0]:
            return path
        time.sleep(0.02)
    raise TimeoutError(path)


def test_offline_files(tmp_path: Path) -> None:
    """The file of an offline run is the row of its run folder; two starts of a run are one; a torn end is ignored."""
    (tmp_path / "wb").mkdir()
    about = facts("nvfp4")
    path = offline_run(tmp_path / "wb", "abc", log()[:25], about)
    stopped = read([str(path)], keep_unfinished=True).frame
    assert stopped["D"][0] == log()[19]["tokens"] and stopped["loss"][0] == log()[19]["val_loss"]
    with pytest.raises(ValueError, match="no run can be used: wb: unfinished: 25 of 40 steps"):
        read([str(path)])
    os.rename(
        path.parent, path.parent.with_name("offline-run-20200101_000000-abc")
    )  # starts within a second share a name
    second = offline_run(tmp_path / "wb", "abc", log()[20:], about)
    table = read([str(tmp_path / "wb")])
    make_run(tmp_path / "folder" / "wb", about)
    folders = read([str(make_run(tmp_path / "same" / "wb", about, log()))])
    pd.testing.assert_frame_equal(table.frame.drop(columns=ELSEWHERE), folders.frame.drop(columns=ELSEWHERE))
    assert any("5 records of steps that were done again" in note for note in table.notes)
    curve = read_curve(table.frame["curve"][0])
    assert list(curve["loss"]) == [record["loss"] for record in log()]

    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    torn = read([str(tmp_path / "wb")], keep_unfinished=True).frame
    assert torn["D"][0] < table.frame["D"][0]
    second.write_bytes(b"x" + data)
    with pytest.raises(ValueError, match=r"is no .wandb file of the W&B client"):
        read([str(second)])


def test_files_in_a_run_folder_are_not_another_run(tmp_path: Path) -> None:
    """What the client left within a run folder is passed over, unless it is asked for."""
    folder = make_run(tmp_path / "a", facts("nvfp4"))
    path = folder / "wandb" / "offline-run-1-x" / "run-x.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b":W&B")
    assert list(read([str(tmp_path)]).frame["run"]) == ["a"]


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=6), st.integers(0, 32768))
@settings(max_examples=50)
def test_any_split_into_blocks(sizes: list[int], before_end: int) -> None:
    """Records come back however they fall on the blocks, also where too little is left of one for a header."""
    records = [bytes([i + 1]) * size for i, size in enumerate([max(32768 - 14 - before_end, 1), *sizes])]
    data = b":W&B\xe1\xbe\x00"
    for record in records:
        rest, first = record, True
        while rest or first:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                left = 32768
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            data += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.wandb")
        path.write_bytes(data)
        assert list(chunks(path)) == records
        path.write_bytes(data[:-1])
        assert list(chunks(path)) == records[:-1]


def test_records_longer_than_a_block(tmp_path: Path) -> None:
    """A config of 100 kB crosses the blocks of the file and comes back whole."""
    (tmp_path / "wb").mkdir()
    about = facts(padding="x" * 100_000)
    path = offline_run(tmp_path / "wb", "long", log(), about)
    assert read([str(path)]).frame["loss"][0] == log()[-1]["val_loss"]


# ---- exports


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@pytest.mark.parametrize("prefix", ["", "config."])
def test_the_table_that_the_web_page_exports(tmp_path: Path, prefix: str) -> None:
    """Flattened facts in a CSV are the same rows again, hashes of digits included."""
    rows = []
    for i, precision in enumerate(("bf16", "nvfp4")):
        about = facts(precision, plan="149681995393", data=facts()["data"] | {"hash": "12e4567890123456"})
        make_run(tmp_path / "runs" / f"r{i}", about, log(level=3 + i / 97))
        row = {"Name": f"r{i}", "ID": f"w{i}", "State": "finished", "Tags": ""} | log(level=3 + i / 97)[-1]
        rows.append(row | flat({"facts": about}, prefix))
    header = list(dict.fromkeys(name for row in rows for name in row))
    with (tmp_path / "export.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else ("" if v is None else v) for k, v in row.items()}
            )
    folders = read([str(tmp_path / "runs")])
    table = read([str(tmp_path / "export.csv")])
    pd.testing.assert_frame_equal(
        table.frame.drop(columns="source"), folders.frame.drop(columns=ELSEWHERE), check_exact=True
    )


def test_runs_without_facts_among_runs_with_them(tmp_path: Path) -> None:
    """They are read as a table if they can be, and are left out with the reason if not."""
    rows = [on_wandb("ours", facts(), log()), on_wandb("theirs", None, [{"tokens": 1e9, "val_loss": 3.0}])]
    path = tmp_path / "runs.jsonl"

    def table() -> Any:
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "history"}) + "\n" for row in rows))
        return read([str(path)])

    (lost,) = table().dropped
    assert lost.run == "theirs" and "it has no facts, and" in lost.reason and "has no column for N" in lost.reason
    rows[1]["config"]["n_params"] = 5e6
    assert list(table().column("N")) == [100_000, 5e6]


def test_the_name_of_a_recipe_accuses_nobody(tmp_path: Path) -> None:
    """A bf16 run that W&B calls nvfp4_tiny, as its recipe is called, stays, counts as bf16, and a note says so."""
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({k: v for k, v in on_wandb("nvfp4_tiny", facts(), log()).items() if k != "history"}))
    table = read([str(path)])
    assert table.frame["precision"][0] == "bf16"
    assert any(
        "'nvfp4_tiny' says nvfp4, but nothing in it is quantised; it counts as bf16" in note for note in table.notes
    )
