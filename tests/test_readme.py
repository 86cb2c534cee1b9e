"""Every command of the README is run here, at CPU size.

`HOW` says, command by command, what is done with it: run as it stands, run with a few words added that make it small,
or checked in another way, for the reason that the function it names gives. A command without an entry fails, and so
does an entry without a command: the page and this table cannot drift apart.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = (
    "train.steps=2 train.global_batch=2 train.micro_batch=1 train.sample_tokens=4 "
    "data.seq_len=64 data.validation_sequences=1"
)
MINE = """# @package _global_
defaults:
  - nvfp4_tiny
  - _self_
name: mine
"""


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[str]:
    """The lines of all sh blocks; a backslash continues a line, comments and empty lines are dropped."""
    lines = "\n".join(fenced("sh")).replace("\\\n", " ").splitlines()
    return [
        line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line and not line.startswith("#")
    ]


def local(command: str) -> list[str]:
    """The command's words, with this Python's programs in place of those of `.venv`, PATH and make."""
    words = shlex.split(command)
    program = Path(words[0]).name
    modules = {
        "torchrun": "torch.distributed.run",
        "lowprec-train": "lowprec.launch.train",
        "lowprec-prepare": "lowprec.launch.prepare",
        "lowprec-eval": "lowprec.launch.evaluate",
        "lowprec-export": "lowprec.launch.export",
        "lowprec-plan": "lowprec.tools.plan",
        "lowprec-report": "lowprec.tools.run_report",
        "lowprec-sweep": "lowprec.launch.sweep",
        "lowprec-scaling": "lowprec.tools.fit_scaling",
        "lowprec-numerics": "lowprec.tools.numerics",
        "lowprec-sensitivity": "lowprec.tools.sensitivity",
    }
    if program in modules:
        return [sys.executable, "-m", modules[program], *words[1:]]
    if program == "python":
        return [sys.executable, *words[1:]]
    return [*words, f"PY={sys.executable}"] if program == "make" else words


def run(words: list[str], tmp_path: Path) -> str:
    """Run from the checkout, as the README says; whatever it printed, or a failure with all of it."""
    words = [re.sub(r"\bmy_(?=recipes|texts|tokens|report)", f"{tmp_path}/my_", word) for word in words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(words)} returned {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def trains(command: str, tmp_path: Path, more: str = "") -> None:
    """The command as written, except that it takes two small steps into a folder of the test's own."""
    extra = f"{SMALL} run.dir={tmp_path / 'run'} {more}".strip()
    if command.startswith("make"):
        run([*local(command), f"ARGS={extra}"], tmp_path)
    else:
        replaced = {word.partition("=")[0] for word in extra.split()}  # a key may be given once
        kept = [word for word in local(command) if word.partition("=")[0] not in replaced]
        run([*kept, *extra.split()], tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def trains_on_own_recipe(command: str, tmp_path: Path) -> None:
    """The same, after the user has written a recipe."""
    (tmp_path / "my_recipes" / "recipe").mkdir(parents=True)
    (tmp_path / "my_recipes" / "recipe" / "mine.yaml").write_text(MINE)
    trains(command, tmp_path)


def prepares(command: str, tmp_path: Path) -> None:
    """The command exactly as written, on a few texts."""
    (tmp_path / "my_texts").mkdir()
    for number in range(200):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(f"Text number {number} of a small corpus. " * 9)
    run(local(command), tmp_path)
    assert (tmp_path / "my_tokens" / "manifest.json").exists()


def trains_on_prepared(command: str, tmp_path: Path) -> None:
    """The same, after the lowprec-prepare of the page; 200 texts need a larger share held out for validation."""
    prepares(next(c for c, how in HOW.items() if how is prepares), tmp_path)
    trains(command, tmp_path, "data.validation_frac=0.2")


def looks_at_a_run(command: str, tmp_path: Path) -> None:
    """The same, of a run of two small steps, with the fewest batches and probes."""
    trains("lowprec-train recipe=bf16_tiny", tmp_path)
    more = ["--batches", "1", "--probes", "2", "--tokens", "64"] if "sensitivity" in command else ["--tokens", "64"]
    words = [str(tmp_path / "run") if word.startswith("runs/") else word for word in local(command)]
    assert "layers.0.mlp.up_proj" in run([*words, *more], tmp_path)


def exports(command: str, tmp_path: Path) -> None:
    """The same, of a run of two small steps."""
    trains("lowprec-train recipe=bf16_tiny", tmp_path)
    file = tmp_path / "model.safetensors"
    run([str({"runs/long": tmp_path / "run", "model.safetensors": file}.get(w, w)) for w in local(command)], tmp_path)
    assert file.stat().st_size > 1_000_000


def packs(command: str, tmp_path: Path) -> None:
    """The same, of a run of two small steps."""
    trains("lowprec-train recipe=nvfp4_tiny", tmp_path)
    run(
        [str({"runs/long": tmp_path / "run", "packed": tmp_path / "packed"}.get(w, w)) for w in local(command)],
        tmp_path,
    )
    assert (tmp_path / "packed" / "config.json").exists()


def reads_a_run(command: str, tmp_path: Path) -> None:
    """The same, of a run of two small steps."""
    trains("lowprec-train recipe=nvfp4_tiny", tmp_path)
    words = [str(tmp_path / "run") if word.startswith("runs/") else word for word in local(command)]
    assert "mxfp4" in run(words, tmp_path) if "eval" in command else run(words, tmp_path)


def has_help(command: str, tmp_path: Path) -> None:
    """It takes a minute and has a test of its own: the same program prints its help."""
    run([*local(command)[:2], "--help"], tmp_path)


def prints(command: str, tmp_path: Path) -> None:
    """The command exactly as written: it prints something and ends."""
    assert run(local(command), tmp_path).strip()


def composes(command: str, tmp_path: Path) -> None:
    """Needs machines that are not here: its script and settings are composed and checked, nothing is started."""
    script = command.index("launch/train.py")
    words = shlex.split(command[script:])
    assert yaml.safe_load(run([sys.executable, words[0], "--cfg", "job", *words[1:]], tmp_path))


def is_this_run(command: str, tmp_path: Path) -> None:
    """Running it would run this test again: CI's script must call it, and the target must reach pytest."""
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "-m pytest" in run(["make", "--dry-run", "test", f"PY={sys.executable}"], tmp_path)


def is_set_up(command: str, tmp_path: Path) -> None:
    """Installing takes a minute and the network (CI does it before the tests): extras it names must exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\.\[([^\]]+)\]", command)
    assert all(extra in extras for group in named for extra in group.split(","))


def benches(command: str, tmp_path: Path) -> None:
    """The full sizes take minutes: the same program prints its help."""
    assert "--json" in run([*local(command), "ARGS=--help"], tmp_path)


HOW: dict[str, Callable[[str, Path], None]] = {
    "make quickstart": trains,
    "make check": is_this_run,
    "make bench": benches,
    "python tools/bench_step.py --help": prints,
    "python tools/bench_quantize.py --help": prints,
    "python tools/bench_comm.py --help": prints,
    "source .venv/bin/activate": is_set_up,
    "python3 -m venv .venv": is_set_up,
    ".venv/bin/pip install -e '.[gpu]'": is_set_up,
    ".venv/bin/lowprec-train recipe=quickstart precision=bf16 run.dir=runs/quickstart_bf16": trains,
    "lowprec-train --help": prints,
    "lowprec-prepare --help": prints,
    "lowprec-train recipe=nvfp4_tiny": trains,
    "lowprec-train recipe=bf16_tiny precision=fp8_blockwise train.steps=400 seed=7 run.dir=runs/blockwise": trains,
    "lowprec-train --plan recipe=nvfp4_130m": prints,
    "lowprec-train recipe=bf16_tiny precision=nvfp4 precision.linear.nvfp4.wgrad.inner=null run.dir=runs/plain": trains,
    "lowprec-numerics --recipes nvfp4,quartet2,lowprec_max --data channel_means": prints,
    "lowprec-numerics --capture runs/plain --recipes nvfp4,mxfp8 --layers 'layers.0.mlp.*'": looks_at_a_run,
    "lowprec-sensitivity runs/plain --precision nvfp4 --keep 15": looks_at_a_run,
    "lowprec-sweep cpu_ladder": prints,
    "lowprec-scaling fit --runs docs/ladder/runs.csv --law efficiency --bootstrap 200": prints,
    "lowprec-scaling report --runs docs/ladder/runs.csv --laws efficiency --bootstrap 200 --out my_report": prints,
    "lowprec-train --cfg job recipe=nvfp4_12b": prints,
    "lowprec-train --config-dir my_recipes recipe=mine": trains_on_own_recipe,
    "lowprec-prepare my_tokens --kind text --path 'my_texts/*.txt' --tokenizer byte": prepares,
    "lowprec-train recipe=nvfp4_tiny data=tokens data.sources.0.path=my_tokens": trains_on_prepared,
    "torchrun --nproc-per-node 2 launch/train.py recipe=nvfp4_tiny train.steps=50": trains,
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HOST "
    "launch/train.py recipe=nvfp4_130m": composes,
    "torchrun --nproc-per-node 2 launch/train.py recipe=nvfp4_tiny parallel=tp run.dir=runs/tp": trains,
    "torchrun --nproc-per-node 2 launch/train.py recipe=nvfp4_tiny comm=nvfp4_fp8 run.dir=runs/low_comm": trains,
    "python tools/plan.py recipe=nvfp4_130m comm=nvfp4_fp8 --world 8": prints,
    "python tools/plan.py --parallel recipe=nvfp4_130m --world 64 --per-node 8 --hardware h100_sxm": prints,
    "python tools/kill_table.py --quick": has_help,
    "lowprec-export runs/long --out model.safetensors": exports,
    "lowprec-export runs/long --format compressed-tensors --out packed": packs,
    "lowprec-eval runs/long --precision mxfp4": reads_a_run,
    "lowprec-plan recipe=nvfp4_12b devices=256 device=b200": prints,
    "lowprec-train recipe=nvfp4_12b_tiny probe.every=25": trains,
    "lowprec-report runs/nvfp4_12b_tiny": reads_a_run,
    ".venv/bin/torchrun --nproc-per-node 8 launch/train.py recipe=nvfp4_130m": composes,
    "lowprec-train recipe=nvfp4_tiny train.checkpoint_every=100 run.dir=runs/long": trains,
    "lowprec-train recipe=nvfp4_tiny monitor.wandb=offline": trains,
}


def test_the_table_is_the_page() -> None:
    """Each command of the README has its entry in HOW, and each entry is still on the page."""
    assert set(commands()) == set(HOW)


@pytest.mark.parametrize("command", HOW)
def test_command(command: str, tmp_path: Path) -> None:
    """The command does what the page says (see the function that HOW names)."""
    HOW[command](command, tmp_path)


def test_recipes_of_the_table_are_the_shipped_ones() -> None:
    """The table of recipes lists exactly the files of recipes/recipe/."""
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.M)) == {
        f.stem for f in (ROOT / "recipes" / "recipe").glob("*.yaml")
    }


def test_python_example_runs(tmp_path: Path) -> None:
    """The Python block runs as it stands."""
    assert "fprop" in run([sys.executable, "-c", "\n".join(fenced("python"))], tmp_path)
