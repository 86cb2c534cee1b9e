"""Two hosts on one machine: two network namespaces, each with an own name, joined by a cable that can be pulled.

    with two_hosts() as hosts:
        hosts.run(0, "ip", "-br", "address")     # a command on a host; host0 is 10.0.0.1, host1 is 10.0.0.2
        hosts.train(folder, "comm=bf16")         # launch/train.py, two ranks a host, forked
        hosts.torchrun(folder, "comm=bf16")      # the same under torchrun, one on each host
        hosts.cable(up=False)

Namespaces of user, network and host name are made by `unshare`, the cable is a veth pair; no privileges are needed
where user namespaces are allowed. A process moves into a host by setns(2). Inside a host ranks talk over its loopback
device; whatever goes from host to host goes through `eth0`, which counts. Files are shared, as on a cluster.

What this is not: slow. A veth pair loses nothing and passes on many gigabytes a second, with checksums and packets of
up to 64 KB, so headers weigh nothing.
"""

import atexit
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lowprec
import lowprec.train.loop as loop
from lowprec.launch.train import command
from tests.layouts import settings
from tests.ranks import CONTEXT

HOSTS, RANKS_PER_HOST = 2, 2
PORT = "29500"  # free: namespaces are new
PATIENCE_S = 150.0  # for a run, on a machine that does other things too
ENTER = ("nsenter", "--preserve-credentials", "--user", "--net", "--uts", "--target")
SCRIPT = Path(lowprec.__path__[0]) / "launch" / "train.py"


def missing() -> str | None:
    """Why this machine cannot make hosts, or None."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"there is no program {program} (Debian: apt install iproute2 util-linux)"
    made = subprocess.run(["unshare", "-rnu", "true"], capture_output=True, text=True)
    return f"user namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def two_hosts() -> Iterator["Hosts"]:
    """The hosts, up and connected; they are gone with their last process."""
    with subprocess.Popen(["unshare", "-rnu", *WAIT], stdin=-1, stdout=-1) as first:
        _ready(first)
        inside = [*ENTER, str(first.pid), "unshare", "-nu", *WAIT]  # in the user namespace of the first
        with subprocess.Popen(inside, stdin=-1, stdout=-1) as second:
            _ready(second)
            hosts = Hosts([first.pid, second.pid])
            hosts.run(0, *f"ip link add eth0 type veth peer name eth0 netns {second.pid}".split())
            for host in range(HOSTS):
                hosts.run(host, "hostname", f"host{host}")
                for words in (
                    "link set lo up",
                    f"address add 10.0.0.{host + 1}/24 dev eth0",
                    "link set eth0 addrgenmode none",  # IPv4 only
                    "link set eth0 up",
                ):
                    hosts.run(host, "ip", *words.split())
            yield hosts


WAIT = ("sh", "-c", "echo; exec cat")  # what keeps a namespace: until its standard input is closed


def _ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout and process.stdout.readline(), "unshare failed"


class Hosts:
    """Two hosts of two ranks each; rank r is on host r // 2."""

    def __init__(self, keepers: list[int]) -> None:
        """keepers: for every host a process in its namespaces."""
        self.keepers = keepers

    def run(self, host: int, *words: str) -> None:
        """Runs a short command on a host; CalledProcessError if it fails."""
        subprocess.run([*ENTER, str(self.keepers[host]), *words], check=True, timeout=30)

    def cable(self, up: bool) -> None:
        """Plugs the cable in, or pulls it: connections stay and are silent."""
        self.run(1, "ip", "link", "set", "eth0", "up" if up else "down")

    def train(self, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """Trains in `folder`/<name of the run>, as `tests.layouts.train_on` does, on all ranks of both hosts.

        Returns the lines of metrics.jsonl, and for each host the bytes that came in through the cable in each step.
        """
        words, run_dir = command_line(folder, *overrides)
        outputs = [folder / f"{run_dir.name}.host{host}" for host in range(HOSTS)]
        processes = [CONTEXT.Process(target=self._rank, args=(rank, words, outputs)) for rank in range(4)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * 4, f"exit codes {codes}:\n" + "\n".join(o.read_text()[-2000:] for o in outputs)
        received = [json.loads(output.with_suffix(f".bytes{i}").read_text()) for i, output in enumerate(outputs)]
        return metrics_of(run_dir), received

    def _rank(self, rank: int, words: list[str], outputs: list[Path]) -> None:
        """A forked process becomes a rank on its host."""
        host, local = divmod(rank, RANKS_PER_HOST)
        atexit._clear()  # what the tests' process wanted done at its end is not this one's to do
        file = os.open(outputs[host], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        enter(self.keepers[host])
        os.environ |= environment() | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": PORT, "WORLD_SIZE": "4"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(RANKS_PER_HOST)}
        torch.set_num_threads(1)
        count_steps(outputs[host].with_suffix(f".bytes{host}") if local == 0 else None)
        sys.argv = ["lowprec-train", *words]
        command()

    def torchrun(self, folder: Path, *overrides: str) -> list["subprocess.Popen[str]"]:
        """Starts a run with torchrun, one on each host; their output goes to `folder`/<name of the run>.host<i>."""
        words, run_dir = command_line(folder, *overrides)
        options = f"--nnodes=2 --nproc-per-node={RANKS_PER_HOST} --master-addr=10.0.0.1 --master-port={PORT}".split()
        torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
        started = []
        for host, keeper in enumerate(self.keepers):
            there = [*ENTER, str(keeper), *torchrun, f"--node-rank={host}", str(SCRIPT), *words]
            with (folder / f"{run_dir.name}.host{host}").open("a") as output:
                env = os.environ | environment()
                started.append(subprocess.Popen(there, env=env, stdout=output, stderr=output, text=True))
        return started


def command_line(folder: Path, *overrides: str) -> tuple[list[str], Path]:
    """Words for launch/train.py, as `tests.layouts.train_on` makes them, and the run folder."""
    wishes = dict(word.split("=", 1) for word in [*settings(folder), "recipe=nvfp4_tiny", *overrides])
    run_dir = folder / wishes.pop("run.dir", "run")
    return [*(f"{key}={value}" for key, value in wishes.items()), f"run.dir={run_dir}"], run_dir


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; [] before there are any."""
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def environment() -> dict[str, str]:
    """What a user of several hosts sets: gloo would look up the host's own name, which here no one knows."""
    return {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}


def enter(process: int) -> None:
    """Moves this process, which must have one thread, into the namespaces of another."""
    files = [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net", "uts")]
    for file in files:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns failed")
        os.close(file)


def received_bytes() -> int:
    """What has come in through this host's end of the cable."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == "eth0:")


def count_steps(file: Path | None) -> None:
    """From here on this process writes to `file` what its host receives in each training step.

    Nobody begins a step before all have read the counter, nor reads it before all have ended the step.
    """
    train_step, counts = loop.train_step, []

    def counted(session: Any) -> Any:
        dist.barrier(session.world.control)
        before = received_bytes()
        dist.barrier(session.world.control)
        done = train_step(session)
        dist.barrier(session.world.control)
        counts.append(received_bytes() - before)
        if file:
            file.write_text(json.dumps(counts))
        return done

    loop.train_step = counted
