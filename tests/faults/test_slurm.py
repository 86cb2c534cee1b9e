"""The Slurm and torchrun scripts: what is requeued, who gets the signal, and that a run goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowprec.train.metrics import read_metrics
from tests.layouts import settings, train_on

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
VARIES = ("tokens_per_s", "step_s", "data_s", "mem_bytes", "attempt")

COMMANDS = {
    "scontrol": '[ "$1" = show ] && echo node1 && exit\necho "$@" >>"$LOG"',
    "scancel": 'echo "scancel $*" >>"$LOG"\nkill -TERM "$(cat "$RUN_DIR/pid")"',
    "srun": 'echo "srun $*" >>"$LOG"\nwhile [ "$1" != --no-python ]; do shift; done; shift\nexec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


def environment(folder: Path, train: str) -> dict[str, str]:
    """Commands of Slurm that note what they are told, and a `lowprec-train` that is this shell script."""
    (folder / "bin").mkdir()
    for name, script in (COMMANDS | {"lowprec-train": train}).items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "OMP_NUM_THREADS": "1"}
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder / "log")}
    return os.environ | job | paths | {"RUN_DIR": str(folder / "run")}


def batch(env: dict[str, str], *words: str) -> tuple[int, str]:
    """Exit code of the job, and what Slurm was told besides `srun`."""
    log = Path(env["LOG"])
    log.write_text("")
    done = subprocess.run(["bash", SLURM / "train.sbatch", *words], env=env, timeout=120, capture_output=True)
    return done.returncode, "".join(line for line in log.read_text().splitlines(True) if not line.startswith("srun"))


@pytest.mark.parametrize("script", ["train.sbatch", "elastic.sh"])
def test_the_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", SLURM / script], check=True)


@pytest.mark.parametrize(
    ("code", "requeued"), [("0", False), ("1", False), ("2", False), ("70", False), ("74", False), ("75", True)]
)
def test_only_75_is_requeued(tmp_path: Path, code: str, requeued: bool) -> None:
    """The decision is the run folder's, for torchrun's own exit code is 1; without a word it is a wrong command."""
    env = environment(tmp_path, f'echo {code} >"$RUN_DIR/exit_code"; exit 1')
    assert batch(env) == (0 if requeued else int(code), "requeue 4711\n" if requeued else "")
    (tmp_path / "bin" / "lowprec-train").write_text("#!/bin/bash\nexit 1\n")
    assert batch(env) == (2, ""), "the code of the job before is not taken for this one's"


def test_fruitless_requeues_end(tmp_path: Path) -> None:
    """Lost again and again without a new checkpoint; one that makes progress is requeued for ever."""
    env = environment(tmp_path, 'echo 75 >"$RUN_DIR/exit_code"; mkdir -p "$RUN_DIR/checkpoints/$STEP"; exit 1')
    env |= {"MAX_RESTARTS": "2"}
    codes = [batch(env | {"STEP": f"step_0000000{min(i, 3)}"})[0] for i in range(1, 7)]
    assert codes == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_workers(tmp_path: Path, number: int) -> None:
    """The script passes it on as TERM, waits until they have saved, and requeues."""
    worker = """trap 'sleep 0.3; echo 75 >"$RUN_DIR/exit_code"; exit 1' TERM
    echo $$ >"$RUN_DIR/pid"; while :; do sleep 0.05; done"""
    env = environment(tmp_path, worker)
    with subprocess.Popen(["bash", SLURM / "train.sbatch"], env=env) as job:
        pid, end_s = tmp_path / "run" / "pid", time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end_s:
            time.sleep(0.01)
        job.send_signal(number)
        assert job.wait(60) == 0
    told = (tmp_path / "log").read_text().splitlines()[1:]
    assert told == ["scancel --signal=TERM 4711", "requeue 4711"]


def words(folder: Path, *overrides: str) -> list[str]:
    chosen = dict(word.split("=", 1) for word in [*settings(folder), "recipe=nvfp4_tiny", *overrides])
    return [f"{key}={value}" for key, value in chosen.items()]


def test_the_requeued_job_goes_on_with_the_same_run(tmp_path: Path) -> None:
    """A real run: the first job comes to its time limit and is requeued; the second finishes the same W&B run."""
    env = environment(tmp_path, f'exec {sys.executable} {ROOT / "launch" / "train.py"} "$@"')
    assert batch(env, *words(tmp_path, "train.time_limit_s=0.001")) == (0, "requeue 4711\n")
    run_id = (tmp_path / "run" / "run_id").read_text()
    assert batch(env, *words(tmp_path)) == (0, "")
    assert (tmp_path / "run" / "run_id").read_text() == run_id
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def worker(agent: int, rank: int) -> int | None:
    """The process id of a rank that torchrun (process `agent`) has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it has ended meanwhile
            continue
    return None


def test_torchrun_starts_a_killed_group_again(tmp_path: Path) -> None:
    """kill -9 of a worker under elastic.sh: the group is started again, and ends with an undisturbed run's numbers."""
    longer = ("train.steps=30", "train.checkpoint_every=5")
    env = environment(tmp_path, f'exec {sys.executable} {ROOT / "launch" / "train.py"} "$@"')
    env |= {"PROCESSES_PER_NODE": "2", "MAX_RESTARTS": "1"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [SLURM / "elastic.sh", *words(tmp_path, *longer)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as agent:
        while len(read_metrics(metrics)) < 8 and agent.poll() is None:
            time.sleep(0.005)
        victim = worker(agent.pid, 1)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        output = agent.communicate(timeout=200)[0].decode()
    assert agent.returncode == 0 and victim is not None, output
    assert "resumes after step 5" in output and (tmp_path / "run" / "exit_code").read_text() == "0\n"
    assert {record["attempt"] for record in read_metrics(metrics)} == {1, 2}
    assert numbers(read_metrics(metrics)) == numbers(train_on(2, tmp_path, "run.dir=whole", *longer))


def numbers(records: list[dict[str, Any]]) -> list[str]:
    """What must be the same in two runs that are the same."""
    return [json.dumps({k: v for k, v in record.items() if k not in VARIES}) for record in records]
