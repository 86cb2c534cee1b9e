"""Where the hosts are matters: bytes between them, and a cable that is pulled.

Two hosts are two network namespaces (tests/hosts.py), with two ranks each; what passes between them is read from the
counters of the interface. These tests are skipped, with the reason, where `unshare -rnu true` is refused or there is
no program `ip`: a laptop may be like that, the machine that decides about a merge must not be.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.hosts import PATIENCE_S, Hosts, metrics_of, missing, two_hosts
from tests.layouts import train_on

pytestmark = pytest.mark.distributed

SIZE = "model.dim=128 model.layers=4 model.ffn_dim=512 train.steps=3 parallel.hang_s=0".split()  # noqa: SIM905
COMMS = {
    "bf16": ("comm=bf16",),
    "nvfp4_fp8": ("comm=nvfp4_fp8",),
    "zeropp": ("comm=zeropp",),  # ranks of a node: as many as were started on a host
    "hsdp": ("comm=bf16", "parallel=hsdp"),
}
LESS = {"nvfp4_fp8": 0.4, "zeropp": 0.25, "hsdp": 0.45}  # than comm=bf16; by their bytes 0.37, 0.21 and 0.41


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    why = missing()
    if why:
        pytest.skip(why)
    with two_hosts() as hosts:
        yield hosts


def numbers(records: list[dict[str, Any]]) -> list[list[float | None]]:
    return [[record.get(key) for key in ("step", "loss", "grad_norm", "val_loss")] for record in records]


def crossing(name: str, wire_bytes: dict[str, int]) -> float:
    """Bytes that a host must receive in a step, from the logical bytes of one rank. What stays in a host is not among
    them: `.._in_node`, and of HSDP all but the all-reduce.

    Of an all-gather over 4 ranks gloo passes the result along a ring, 3/4 of it over each link, and one link leads into
    each host. Of an all-to-all of n bytes a rank gets n/4 from each of 2 ranks elsewhere, and a host has 2 ranks: n.
    Of one between 2 ranks, each on its host, n/2 crosses, and again a host has 2 such ranks: n. That is the second
    level of qgZ; HSDP's all-reduce of n bytes is such an all-to-all and an all-gather, and the meter counts 2 n: 2 n.
    """
    if name == "hsdp":
        return wire_bytes["gradient_all_reduce"]
    return 0.75 * wire_bytes["weight_all_gather"] + wire_bytes["gradient_reduce_scatter"]


def test_numbers_and_bytes_of_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    """The cable carries in every step what the meter says, and at most 5 % more (headers, norms, agreements); and
    losses are those of one host, bit for bit."""
    records, received = {}, {}
    for name, overrides in COMMS.items():
        records[name], by_host = hosts.train(tmp_path, *SIZE, *overrides, f"run.dir={name}")
        wire = records[name][-1]["wire_bytes"]
        expected = crossing(name, wire)
        for host, steps in enumerate(by_host):
            assert len(steps) == 3
            for count in steps:
                assert expected <= count <= 1.05 * expected + 20_000, f"{name}, host{host}: {steps}, {expected}, {wire}"
        received[name] = by_host[0][-1]
    for name, share in LESS.items():
        assert received[name] < share * received["bf16"], received
    for name in ("bf16", "hsdp"):
        assert numbers(train_on(4, tmp_path, *SIZE, *COMMS[name], "run.dir=one")) == numbers(records[name])
        shutil.rmtree(tmp_path / "one")


def test_the_cable_is_pulled(hosts: Hosts, tmp_path: Path) -> None:
    """Under torchrun: every rank ends by itself with code 75 while the cable is out, the ranks that are gone are named,
    and no stack trace of ours is shown; the same command then goes on, and its numbers are those of a run on one host
    that nothing happened to."""
    steps = ("train.steps=40", "train.checkpoint_every=5")
    words = (*steps, "parallel.hang_s=8", "run.dir=cut")
    run_dir, outputs = tmp_path / "cut", [tmp_path / f"cut.host{host}" for host in (0, 1)]

    def said() -> str:
        return "\n".join(output.read_text() for output in outputs)

    started = hosts.torchrun(tmp_path, *words)
    try:
        wait(lambda: steps_in(run_dir) >= 8, started, said)
        hosts.cable(up=False)
        assert [process.wait(PATIENCE_S) for process in started] == [1, 1], said()  # torchrun's own code
        assert 8 <= steps_in(run_dir) < 40, said()
        assert (run_dir / "exit_code").read_text() == "75\n"
        assert "lowprec-train: ranks 2, 3 (host1) hang: no sign of life for " in outputs[0].read_text()
        assert "lowprec-train: " in outputs[1].read_text()
        assert all(set(re.findall(r"exitcode *: *(-?\d+)", o.read_text())) == {"75"} for o in outputs), said()
        assert "lowprec/train/" not in said()
        hosts.cable(up=True)
        started = hosts.torchrun(tmp_path, *words)
        assert [process.wait(PATIENCE_S) for process in started] == [0, 0], said()
    finally:
        hosts.cable(up=True)
        for process in started:
            process.terminate()
            process.wait(60)
    assert (run_dir / "exit_code").read_text() == "0\n"
    records = metrics_of(run_dir)
    assert records[0]["attempt"] == 1 and records[-1]["attempt"] == 2
    assert numbers(records) == numbers(train_on(4, tmp_path, *steps, "run.dir=whole"))


def steps_in(run_dir: Path) -> int:
    """Whole lines of metrics.jsonl, which may be being written."""
    file = run_dir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait(condition: Callable[[], bool], started: list[Popen[str]], said: Callable[[], str]) -> None:
    """Until the condition holds; AssertionError if a process ends before, or it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started), said()
        time.sleep(0.05)
