"""lowprec-sweep: what a ladder stands for, what is started and what is not, and how it all ends."""

import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowprec.launch.ladder as ladders
from lowprec.config import load
from lowprec.launch.ladder import LADDERS, Cell, cells, read_ladder
from lowprec.launch.sweep import main
from lowprec.launch.sweep_runs import State, claim, seconds_left, state_of
from lowprec.launch.train import compose_run
from lowprec.model import count_parameters, flops_per_token
from lowprec.train.checkpoint import committed
from lowprec.train.metrics import read_metrics

SMALL = ["model.dim=32", "model.layers=1", "model.heads=1", "model.kv_heads=1", "model.ffn_dim=64"]
SIZES = {"d32": SMALL, "d64": ["model.dim=64", *SMALL[1:]]}
Sweep = Callable[..., int]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a few kilobytes of made-up text, a byte a token, 64 tokens a step."""
    folder, words = tmp_path_factory.mktemp("text"), ["one", "two", "three", "four", "five", "six", "seven"]
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(" ".join(words[(i * j * j + j) % 7] for j in range(60 + i)))
    source = ["data.sources.0.kind=text", f"data.sources.0.path={folder}", "data.tokenizer=byte", "data.seq_len=32"]
    sizes = ["data.validation_frac=0.3", "data.validation_sequences=2", "train.global_batch=2", "train.micro_batch=2"]
    return [*source, f"data.cache_dir={tmp_path_factory.mktemp('cache')}", *sizes, "model.vocab_size=320"]


@pytest.fixture
def ladder(tmp_path: Path, text: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """ladder(key=value, ...) writes a ladder of one small run, changed by these; a value of None removes the key."""
    monkeypatch.chdir(tmp_path)

    def write(**changes: Any) -> str:
        node = {"recipe": "ladder_tiny", "overrides": text, "sizes": {"d32": SMALL}, "tokens": [128],
                "precision": ["bf16"]} | changes  # fmt: skip
        (tmp_path / "l.yaml").write_text(yaml.safe_dump({key: node[key] for key in node if node[key] is not None}))
        return "l.yaml"

    return write


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A sweep in this process must put signal handlers back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], str]:
    """fake(script) -> a launcher that is this shell script; $dir, $name and $steps are of the run."""

    def write(script: str) -> str:
        head = 'for w in "$@"; do case $w in run.dir=*) dir=${w#*=};; name=*) name=${w#*=};; '
        head += "train.steps=*) steps=${w#*=};; esac; done\n"
        head += """finish() { echo "{\\"step\\": $steps, \\"tokens_per_s\\": 100.0}" >>"$dir/metrics.jsonl"
        echo 0 >"$dir/exit_code"; }; mkdir -p "$dir"; echo "$name" >>started\n"""
        (tmp_path / "fake").write_text(f"#!/bin/bash\n{head}{script}\n")
        (tmp_path / "fake").chmod(0o755)
        return str(tmp_path / "fake")

    return write


def started() -> list[str]:
    """The runs that a fake launcher was started for, in order."""
    return Path("started").read_text().split() if Path("started").exists() else []


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def alone(source: str, *more: str) -> Cell:
    """The only run of a ladder."""
    (cell,), _ = cells(read_ladder(source), Path("runs/l"), list(more), [])
    return cell


# ---- what a ladder stands for


def test_the_plan_counts(ladder, capsys) -> None:
    """N, tokens (whole steps), FLOP and their sum; cheapest first; seeds where asked for; nothing is written."""
    source = ladder(sizes=SIZES, tokens=[100, 1e3], precision=["bf16", "nvfp4"],
                    repeats=[{"seeds": [1, 2], "sizes": ["d32"], "tokens": [100]}])  # fmt: skip
    plan = plan_of(capsys, source)
    names = [run["name"] for run in plan["runs"]]
    assert len(names) == len(set(names)) == 8 + 4 and {"d32_100_nvfp4_s2", "d64_1k_bf16_s0"} < set(names)
    for run in plan["runs"][::3]:
        config = load(compose_run(run["words"], []))
        assert run["parameters"] == count_parameters(config.model)["non_embedding"]
        assert run["tokens"] == run["steps"] * 64 == {"100": 128, "1k": 1024}[run["name"].split("_")[1]]
        assert run["flops"] == run["tokens"] * flops_per_token(config.model, 32)["total"]
        assert (config.train.steps, config.seed, config.name) == (run["steps"], run["seed"], run["name"])
        assert config.run.dir == run["folder"] == f"runs/l/{run['name']}" and run["state"] == "new"
    costs = [run["flops"] for run in plan["runs"]]
    assert costs == sorted(costs) and plan["flops"] == plan["flops_left"] == sum(costs) and not Path("runs").exists()
    assert main([source]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["run", "N", "tokens", "steps", "tokens/N", "FLOP", "state"] and len(out) == 14
    assert out[-1].startswith(f"12 runs, {sum(costs):.2e} FLOP") and "12 are to be done" in out[-1]


def test_pairs_are_put_together_as_hydra_would_compose_them(ladder, monkeypatch, tmp_path: Path) -> None:
    """Each size and precision is composed once, but a run is what composing its own command gives, to the last key."""
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "more.yaml").write_text(
        "# @package _global_\nmodel: {norm_eps: 0.125}\nprecision: {rules: [{match: '*', recipe: bf16}]}\n"
    )
    sizes = {"a": SMALL, "b": SIZES["d64"], "c": [*SMALL, "precision.pad=refuse"]}
    source = ladder(sizes=sizes, precision=["bf16", "nvfp4", "more"])
    composed = []
    monkeypatch.setattr(ladders, "compose_run", lambda *a: composed.append(a) or compose_run(*a))
    runs, _ = cells(read_ladder(source), Path("x"), ["optim.weight_decay=0.3"], [tmp_path])
    assert len(composed) == 2 + 2 + 3 + 1, "a and b in bf16, other precisions with a, all of c, and b with `more`"
    assert len(runs) == 9
    for cell in runs:
        assert cell.words[:2] == ("--config-dir", str(tmp_path))
        assert load(compose_run(list(cell.words[2:]), [tmp_path])) == cell.run
    assert {cell.run.model.norm_eps for cell in runs if cell.precision == "more"} == {0.125}
    assert {cell.run.precision["pad"] for cell in runs if cell.size == "c" and cell.precision != "more"} == {"refuse"}


@pytest.mark.parametrize("path", sorted(LADDERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_ladder_is_planned(path: Path, monkeypatch) -> None:
    """Every ladder in recipes/sweep composes; each size and each precision is composed once."""
    composed = []
    monkeypatch.setattr(ladders, "compose_run", lambda *a: composed.append(a) or compose_run(*a))
    ladder = read_ladder(path.stem)
    runs, notes = cells(ladder, Path("runs"), [], [])
    axes = ladder.blocks[0]
    assert len(composed) == len(axes["sizes"]) + len(axes["precision"]) - 1
    assert len(runs) >= math.prod(map(len, axes.values())) and not notes


def test_tokens_per_parameter_and_budgets(ladder, capsys) -> None:
    """D = r N and D = C / FLOP per token, up to whole steps; what the ratio leaves out is said once."""
    n = {run["size"]: run["parameters"] for run in plan_of(capsys, ladder(sizes=SIZES))["runs"]}
    plan = plan_of(capsys, ladder(sizes=SIZES, tokens=None, tokens_per_param=[0.5, 20]))
    assert [run["name"] for run in plan["runs"] if run["size"] == "d32"] == ["d32_0.5tpp_bf16_s0", "d32_20tpp_bf16_s0"]
    for run in plan["runs"]:
        wanted = float(run["name"].split("_")[1].removesuffix("tpp")) * n[run["size"]]
        assert wanted <= run["tokens"] < wanted + 64
    source = ladder(sizes=SIZES, tokens=None, budgets=[1e8, 1e12], ratio=[0.01, 300], precision=["bf16", "nvfp4"])
    plan = plan_of(capsys, source)
    assert {run["name"] for run in plan["runs"]} == {
        f"{name}_{precision}_s0" for name in ("d32_1e08flop", "d64_1e08flop", "d64_1e12flop")
        for precision in ("bf16", "nvfp4")
    }  # fmt: skip
    for run in plan["runs"]:
        budget = float(run["name"].split("_")[1].removesuffix("flop"))
        assert budget <= run["flops"] < budget + 64 * run["flops_per_token"]
    assert len(plan["notes"]) == 1 and plan["notes"][0].startswith("left out: d32 at 1e12flop has ")
    assert main([ladder(ratio=[1e6, 2e6])]) == 2
    assert "ratio leaves nothing of the ladder: left out: d32 at 128 has 0.0123" in capsys.readouterr().err


def test_equal_runs_are_merged(ladder, capsys) -> None:
    """Twice the same point is one run; durations of the same steps are one run too, and that is said."""
    plan = plan_of(capsys, ladder(tokens=[100, 100.0, 128, 129], repeats=[{"seeds": [0]}]))
    assert [run["name"] for run in plan["runs"]] == ["d32_100_bf16_s0", "d32_129_bf16_s0"]
    assert plan["notes"] == ["merged: d32_128_bf16_s0 has the 2 steps of d32_100_bf16_s0"]


@pytest.mark.parametrize("folder", ["a b", "it's, (here)=1", "ä+b"])
def test_any_folder_will_do(ladder, tmp_path: Path, folder: str) -> None:
    """The run's folder survives Hydra's grammar."""
    runs, _ = cells(read_ladder(ladder()), tmp_path / folder, [], [])
    assert load(compose_run(list(runs[0].words), [])).run.dir == str(tmp_path / folder / runs[0].name)


def test_the_command_line_beats_a_size_and_a_size_the_ladder(ladder, text) -> None:
    """A key that is given again replaces the one before."""
    sizes = {"d32": [*SMALL, "optim.lr=0.5", "optim.eps=0.5"]}
    source = ladder(overrides=[*text, "optim.lr=0.25", "optim.weight_decay=0.25"], sizes=sizes)
    optim = alone(source, "optim.lr=0.125").run.optim
    assert (optim.lr, optim.eps, optim.weight_decay) == (0.125, 0.5, 0.25)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": [1]}, "l.yaml: there is no key 'token' (did you mean tokens?); a ladder has recipe, over"),
        ({"recipe": None}, "l.yaml: recipe is missing"),
        ({"sizes": None}, "sizes is missing"),
        ({"tokens": None}, "give one of tokens, tokens_per_param, budgets, not none"),
        ({"budgets": [1e9]}, "give one of tokens, tokens_per_param, budgets, not tokens and budgets"),
        ({"tokens": 1e6}, "tokens is a list with at least one entry, such as [1.0e6, 4.0e6], not 1000000.0"),
        ({"tokens": "1e6"}, "tokens is a list with at least one entry"),
        ({"tokens": []}, "tokens is a list with at least one entry, such as [1.0e6, 4.0e6], not []"),
        ({"tokens": [0]}, "tokens has 0, which is not a number above 0"),
        ({"tokens": ["many"]}, "tokens has 'many', which is not a number above 0"),
        ({"tokens": [True]}, "tokens has True, which is not a number"),
        ({"precision": "bf16"}, "precision is a list with at least one entry, such as [bf16, nvfp4], not 'bf16'"),
        ({"precision": ["nvfp5"]}, "size d32, precision nvfp5: there is no precision 'nvfp5' (did you mean nvfp4?)"),
        ({"precision": [4.0]}, "precision has 4.0, which is not a name"),
        ({"recipe": "ladder_tny"}, "there is no recipe 'ladder_tny' (did you mean ladder_tiny?)"),
        ({"sizes": ["d32"]}, "sizes maps names to lists of overrides, such as {d64: [model.dim=64]}, not ['d32']"),
        ({"sizes": {"d32": "model.dim=32"}}, "sizes.d32 is a list of overrides, such as [model.dim=64, optim"),
        ({"sizes": {"a/b": []}}, "sizes has 'a/b', which is not a name"),
        ({"sizes": {"d32": ["model.dimm=32"]}}, "size d32, precision bf16: there is no key 'model.dimm' (did you mean"),
        ({"sizes": {"d32": ["model.dim=abc"]}}, "size d32, precision bf16: model.dim: Value 'abc' of type 'str' could"),
        ({"sizes": {"d32": ["model.dim=32", "model.dim=64"]}}, "size d32, precision bf16: model.dim is given twice"),
        ({"sizes": {"d32": ["train.steps=3"]}}, "'train.steps=3' of sizes.d32: train.steps is decided by the ladder"),
        ({"sizes": {"d32": SMALL}, "overrides": "x=1"}, "overrides is a list of overrides"),
        ({"seeds": [-1]}, "seeds has -1, which is not a whole number of at least 0"),
        ({"seeds": [0.5]}, "seeds has 0.5, which is not a whole number"),
        ({"seeds": 3}, "seeds is a list with at least one entry, such as [0, 1], not 3"),
        ({"ratio": [3]}, "ratio is [smallest, largest] tokens a parameter"),
        ({"ratio": [3, 2]}, "ratio is [smallest, largest] tokens a parameter"),
        ({"repeats": {"seeds": [1]}}, "repeats is a list of mappings, such as [{seeds: [1, 2], sizes: [d64]}], not {"),
        ({"repeats": [[1]]}, "an entry of repeats is a mapping with the keys sizes, tokens, precision, seeds, not [1]"),
        ({"repeats": [{"seed": [1]}]}, "there is no key 'seed' (did you mean seeds?); an entry of repeats has sizes"),
        ({"repeats": [{"seeds": []}]}, "seeds is a list with at least one entry"),
        ({"repeats": [{"sizes": ["d64"]}]}, "repeats names 'd64', which is not among sizes: d32"),
        ({"repeats": [{"tokens": [256]}]}, "repeats names 256.0, which is not among tokens: 128"),
        ({"tokens": [1e6, 1e6 + 0.4, 1e6 + 100]}, "two different runs would be called d32_1"),
        ({"overrides": ["schedule.warmup_frac=null", "schedule.warmup_steps=500"]}, "The schedule's 500 warmup steps"),
        ({"precision": ["nvfp4"], "overrides": ["precision.rules=[{match: x, recipe: bf16}]"]}, "no rule matches the "),
    ],
)  # fmt: skip
def test_a_wrong_ladder_is_one_sentence(ladder, capsys, changes: dict[str, Any], said: str) -> None:
    """Unknown and missing keys, wrong types, empty lists, names that are not there, settings that cannot work."""
    refused(capsys, ladder(**changes), says=said)


def refused(capsys, *words: str, says: str) -> None:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lowprec-sweep: ") and err.count("\n") == 1 and says in err, err


def test_a_wrong_command_is_one_sentence(ladder, capsys) -> None:
    """Ladders that are not there or no YAML, options out of range, overrides that the ladder decides."""
    refused(capsys, "cpu", says="there is no ladder 'cpu': give the path of a YAML file, or one of cpu_ladder")
    refused(capsys, "nowhere.yaml", says="there is no ladder 'nowhere.yaml'")
    Path("broken.yaml").write_text("recipe: [x")
    refused(capsys, "broken.yaml", says="broken.yaml: is not valid YAML: while parsing")
    Path("list.yaml").write_text("- x")
    refused(capsys, "list.yaml", says="list.yaml: a ladder is a mapping with the keys recipe, overrides")
    source = ladder()
    refused(capsys, source, "--run", "--jobs", "0", says="--jobs 0 must be at least 1")
    refused(capsys, source, "--threads", "-1", says="--threads -1 must be at least 1")
    refused(capsys, source, "--task", "1", says="--task 1: the ladder has the runs 0 to 0")
    refused(capsys, source, "--task", "-1", says="--task -1: the ladder has the runs 0 to 0")
    refused(capsys, source, "--run", "--launcher", "no-such-thing -x", says="there is no such command")
    refused(capsys, source, "seed=3", says="'seed=3' of the command line: seed is decided by the ladder")
    refused(capsys, source, "--config-dir", "nowhere", says="--config-dir nowhere is not a folder")
    with pytest.raises(SystemExit, match="2"):
        main([source, "--run", "--slurm"])


# ---- how far a run is


def test_states(ladder, capsys) -> None:
    """By the folder: steps of the record (a torn line does not count) and exit code. What is left follows from them."""
    cell = alone(ladder(tokens=[640]))
    assert str(state_of(cell)) == "new"
    cell.folder.mkdir(parents=True)
    lines = [json.dumps({"step": i, "tokens_per_s": 10.0 * i}) for i in range(1, 11)]
    record, code = cell.folder / "metrics.jsonl", cell.folder / "exit_code"
    for steps, exit_code, said in [(4, "75", "stopped (4/10)"), (4, "", "stopped (4/10)"), (0, "75", "stopped (0/10)"),
                                   (4, "70", "diverged"), (4, "1", "failed (1)"), (10, "0", "finished"),
                                   (10, "75", "stopped (10/10)"), (0, "2", "failed (2)")]:  # fmt: skip
        record.write_text("\n".join([*lines[:steps], '{"step": 9, "tok']))
        code.write_text(exit_code + "\n")
        assert str(state_of(cell)) == said
    code.unlink()
    record.write_text("\n".join(lines[:4]))
    plan = plan_of(capsys, "l.yaml")
    assert plan["flops_left"] == pytest.approx(plan["flops"] * 0.6)
    assert plan["seconds_left"] == pytest.approx(640 * 0.6 / 25.0), "at the median of 10, 20, 30 and 40 tokens a second"
    record.write_text("x" * 200_000 + "\n" + lines[-1] + "\n")
    assert str(state_of(cell)) == "finished", "only the end of a long record is read"


def test_other_settings_are_not_taken_for_a_finished_run(ladder, fake, capsys) -> None:
    """A folder of the same name whose run would have had other numbers: named, and left alone."""
    from lowprec.config import to_yaml

    cell = alone(source := ladder())
    cell.folder.mkdir(parents=True)
    cell.run.model.vocab_size = 384  # what a run says when its tokenizer has more entries than were planned
    (cell.folder / "config.yaml").write_text(to_yaml(cell.run))
    (cell.folder / "metrics.jsonl").write_text('{"step": 2, "tokens_per_s": 1}\n')
    assert str(state_of(alone(source))) == "finished"
    assert str(state_of(alone(source, "optim.weight_decay=0.5"))) == "other settings (optim.weight_decay: 0.1 -> 0.5)"
    assert str(state_of(alone(source, "train.log_every=7"))) == "finished", "that changes no number"
    words = [source, "--run", "--launcher", fake("finish"), "optim.weight_decay=0.5"]
    assert main(words) == 1 and not started()
    assert f"{cell.folder} holds a run with other settings (optim.weight_decay: 0.1 -> 0.5)" in capsys.readouterr().err
    assert main([*words, "run.allow_change=true"]) == 0 and not started(), "it is finished"


def test_the_estimate_uses_the_nearest_speed(ladder) -> None:
    """FLOP left by the FLOP/s of the same precision and the nearest size; none is made before a step was measured."""
    runs, _ = cells(read_ladder(ladder(sizes=SIZES, precision=["bf16", "nvfp4"])), Path("x"), [], [])
    by_name = {cell.name: cell for cell in runs}
    new = dict.fromkeys(runs, State("new"))
    assert seconds_left(new) is None
    small, large = by_name["d32_128_bf16_s0"], by_name["d64_128_bf16_s0"]
    states = new | {small: State("finished", "", 2, 1000.0), large: State("stopped", "1/2", 1, 50.0)}
    per_s = large.flops_per_token * 50.0
    both = by_name["d64_128_nvfp4_s0"].flops / per_s + by_name["d32_128_nvfp4_s0"].flops / (small.flops_per_token * 1e3)
    assert seconds_left(states) == pytest.approx(large.flops / 2 / per_s + both)
    states[by_name["d64_128_nvfp4_s0"]] = State("diverged", "", 1, 25.0)
    slow = by_name["d32_128_nvfp4_s0"].flops / (large.flops_per_token * 25.0)
    assert seconds_left(states) == pytest.approx(large.flops / 2 / per_s + slow), "its own precision comes first"


# ---- what is started


def test_a_failed_run_is_named_with_the_end_of_its_log(ladder, fake, capsys) -> None:
    """Also one that was killed before it could say how it ended; the others are trained; the next start tries again."""
    script = """case $name in
    *s0) finish;;
    *s1) echo 'lowprec-train: the disk is full; see to that'; echo 74 >"$dir/exit_code"; echo '====='; exit 1;;
    *s2) kill -9 $$;; esac"""
    words = [ladder(seeds=[0, 1, 2]), "--run", "--jobs", "2", "--launcher", fake(script)]
    assert main(words) == 1 and len(started()) == 3
    err = capsys.readouterr().err.splitlines()
    full = "d32_128_bf16_s1 failed (74): lowprec-train: the disk is full; see to that (the end of runs/l/logs/"
    assert len(err) == 2 and any(line.startswith(f"lowprec-sweep: {full}") for line in err)
    assert any(line.startswith("lowprec-sweep: d32_128_bf16_s2 failed (137): it printed nothing") for line in err)
    assert main(words[:1]) == 0
    assert (out := capsys.readouterr().out).count("failed (137)") == 2 and full in out
    fake("finish")
    assert main(words) == 0 and sorted(started()[3:]) == ["d32_128_bf16_s1", "d32_128_bf16_s2"]
    assert main(words) == 0 and len(started()) == 5, "all are finished: nothing is started"


def test_a_run_that_diverged_is_a_result(ladder, fake, capsys) -> None:
    """It is not a failure, and is started again only if that is asked for."""
    words = [ladder(), "--run", "--launcher", fake('echo 70 >"$dir/exit_code"; exit 1')]
    assert main(words) == 0 and main(words) == 0 and len(started()) == 1
    assert "d32_128_bf16_s0: diverged" in capsys.readouterr().out
    assert main([*words, "--again"]) == 0 and len(started()) == 2


def test_a_lost_run_is_started_again(ladder, fake, capsys) -> None:
    """Code 75 that nobody asked for: as often as --retries says, then it has failed."""
    script = 'if [ $(wc -l <started) -gt 2 ]; then finish; else echo 75 >"$dir/exit_code"; fi'
    words = [ladder(), "--run", "--launcher", fake(script)]
    assert main([*words, "--retries", "1"]) == 1 and len(started()) == 2
    assert "d32_128_bf16_s0 stopped (0/2): it printed nothing" in capsys.readouterr().err
    assert main(words) == 0 and len(started()) == 3

    fake('if [ -e once ]; then kill -9 $$; fi; touch once; echo 75 >"$dir/exit_code"')
    assert main([ladder(seeds=[1]), *words[1:]]) == 1
    assert len(started()) == 5, "the code of the start before is not taken for this one's"
    assert "d32_128_bf16_s1 failed (137)" in capsys.readouterr().err


def test_jobs_and_what_they_are_given(ladder, fake, monkeypatch, capsys) -> None:
    """So many at a time, with threads and (without a launcher) a GPU each."""
    script = """echo "$OMP_NUM_THREADS" >>threads; echo 1 >>at_once
    while [ $(wc -l <at_once) -lt 2 ]; do sleep 0.05; done; sleep 0.3; echo -1 >>at_once; finish"""
    words = [ladder(seeds=[0, 1, 2, 3]), "--run", "--jobs", "2", "--threads", "3"]
    assert main([*words, "--launcher", fake(script)]) == 0
    assert Path("threads").read_text().split() == ["3"] * 4
    assert max(itertools.accumulate(map(int, Path("at_once").read_text().split()))) == 2

    script = 'echo "$CUDA_VISIBLE_DEVICES" >>gpus; while [ $(wc -l <gpus) -lt 2 ]; do sleep 0.05; done; finish'
    monkeypatch.setattr("lowprec.launch.sweep.HERE", [fake(script)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert main([ladder(seeds=[4, 5]), "--run", "--jobs", "2"]) == 0
    assert sorted(Path("gpus").read_text().split()) == ["4", "6"]


def test_two_sweeps_share_a_ladder(ladder, fake, capsys) -> None:
    """A run whose log is locked is passed over, waited for, and not trained again once it is finished."""
    source = ladder(seeds=[0, 1])
    cell = cells(read_ladder(source), Path("runs/l"), [], [])[0][0]
    log = claim(cell)
    assert log is not None and claim(cell) is None and str(state_of(cell)) == "running (0/2)"

    def finish_elsewhere() -> None:
        while not started():  # the other run: this one was passed over
            time.sleep(0.05)
        cell.folder.mkdir()
        (cell.folder / "metrics.jsonl").write_text('{"step": 2, "tokens_per_s": 1}\n')
        log.close()

    other = threading.Thread(target=finish_elsewhere, daemon=True)
    other.start()
    assert main([source, "--run", "--launcher", fake("finish")]) == 0
    other.join()
    assert started() == ["d32_128_bf16_s1"]
    out = capsys.readouterr().out
    assert "d32_128_bf16_s0: another sweep is training it; its end is waited for" in out
    assert "d32_128_bf16_s0: finished meanwhile; 2 of 2 done" in out


def test_the_lock_lives_as_long_as_the_process_that_trains(ladder) -> None:
    """It outlives the sweep that took it, and does not outlive the trainer, however that ends."""
    cell = alone(ladder())
    log = claim(cell)
    assert log is not None
    with log:
        trainer = subprocess.Popen(["sleep", "60"], stdout=log)
    assert claim(cell) is None, "the sweep has closed it, the trainer has not"
    trainer.kill()
    trainer.wait()
    again = claim(cell)
    assert again is not None
    again.close()


# ---- stopping


def gone(pid: int, within_s: float = 20.0) -> bool:
    """Whether a process has ended (or is a zombie)."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_second_interrupt_kills(ladder, fake, capsys) -> None:
    """Also what the run has started in a session of its own, and a run that does not listen. Nothing new is started."""
    script = """trap '' TERM; setsid sleep 100 & echo "$$ $!" >pids
    kill -INT $PPID; sleep 0.6; kill -INT $PPID; while :; do sleep 1; done"""
    assert main([ladder(seeds=[0, 1]), "--run", "--launcher", fake(script)]) == 75
    assert len(started()) == 1 and all(gone(int(pid)) for pid in Path("pids").read_text().split())
    assert capsys.readouterr().out.count("stopping: 1 runs save and end") == 1


KILLED_IN_STEP_3 = """
import os, signal, sys, time
from lowprec.launch.train import main
from lowprec.train import Stop

poll, polls = Stop.poll, []

def slow_poll(self, world):
    polls.append(1)
    if len(polls) == 3:  # two steps are done
        os.kill(os.getppid(), signal.SIGTERM)
        end_s = time.monotonic() + 60
        while not self.received and time.monotonic() < end_s:
            time.sleep(0.01)
    return poll(self, world)

Stop.poll = slow_poll
sys.exit(main(sys.argv[1:]))
"""


# ---- Slurm


def submit(script: Path, task: int, **more: str) -> tuple[int, list[str], str]:
    """(exit code, what scontrol was told, what the task printed) of an array task."""
    (script.parent / "bin").mkdir(exist_ok=True)
    scontrol = script.parent / "bin" / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$@" >>"$TOLD"\n')
    scontrol.chmod(0o755)
    told = script.parent / "told"
    told.write_text("")
    env = os.environ | {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(task), "TOLD": str(told)} | more
    env["PATH"] = f"{scontrol.parent}:{env['PATH']}"
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=120, cwd="/")
    return done.returncode, told.read_text().splitlines(), done.stdout + done.stderr


def array(capsys, *words: str) -> Path:
    """Writes an array job; the script that the command says to submit."""
    assert main([*words, "--slurm"]) == 0
    return Path(shlex.split(capsys.readouterr().out.splitlines()[-1])[-1])


def command_of(script: Path) -> list[str]:
    """The words of the script's command, but for --task."""
    line = next(line for line in script.read_text().splitlines() if "--task" in line)
    return shlex.split(line.rpartition(" --task")[0])


def test_the_array_job_is_written(ladder, capsys) -> None:
    """As many tasks as runs, each with the options given; it holds a copy of the ladder, for the file may change."""
    source = ladder(seeds=[0, 1, 2])
    options = ["--dir", "my runs", "--jobs", "4", "--launcher", "srun x", "--retries", "1", "optim.lr=0.5"]
    script = array(capsys, source, *options)
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], check=True) and script == Path("my runs/array.sbatch").resolve()
    assert "#SBATCH --array=0-2%4\n" in text and f'--output="{script.parent}/logs/task_%A_%a.out"' in text
    command = command_of(script)
    assert command[0] == sys.executable and command[2:] == [
        str(script.parent / "ladder.yaml"), "--dir", str(script.parent), "--retries", "1", "--launcher", "srun x",
        "optim.lr=0.5",
    ]  # fmt: skip
    assert read_ladder(command[2]) == read_ladder(source)
    assert "#SBATCH --array=0-2\n" in array(capsys, source).read_text(), "no limit unless one is given"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_only_75_is_requeued(ladder, capsys, monkeypatch, tmp_path: Path, code: int, requeued: bool) -> None:
    """How the task ends is how its sweep ends, but for 75, for which it is requeued."""
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "$PWD ${{*: -2}}"; exit {code}\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    ended, told, said = submit(array(capsys, ladder(seeds=[0, 1])), 1)
    assert (ended, told) == ((0, ["requeue 4711_1"]) if requeued else (code, []))
    assert f"{tmp_path} --task 1\n" in said, "from the folder it was written in"


@pytest.mark.parametrize("listens", [True, False])
def test_a_task_that_is_told_to_leave_is_requeued(ladder, capsys, monkeypatch, tmp_path: Path, listens: bool) -> None:
    """The batch script passes the signal on as TERM and waits; a sweep that does not listen yet has lost nothing."""
    save = """save() { trap '' TERM; kill -USR1 $PPID; sleep 0.5; echo saved >>"$TOLD"; exit 75; }; trap save TERM"""
    wait = "kill -USR1 $PPID; for i in {1..600}; do sleep 0.1; done"
    (tmp_path / "python").write_text(f"#!/bin/bash\n{save if listens else ''}\n{wait}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    told = ["saved"] * listens + ["requeue 4711_0"]
    assert submit(array(capsys, ladder()), 0)[:2] == (0, told), "it waits until the run is saved, though told twice"


def test_a_sweep_that_is_stopped_goes_on_as_an_array_task(ladder, capsys, tmp_path: Path) -> None:
    """Real runs: TERM to the sweep reaches the run, which saves; a task of the array job finishes it; that is that."""
    (tmp_path / "slow.py").write_text(KILLED_IN_STEP_3)
    source = ladder(tokens=[256], precision=["bf16", "nvfp4"])
    assert main([source, "--run", "--launcher", f"{sys.executable} {tmp_path / 'slow.py'}"]) == 75
    out = capsys.readouterr().out
    assert "d32_256_bf16_s0: stopped (2/4)" in out and "nvfp4" not in out, out
    folder = Path("runs/l/d32_256_bf16_s0")
    assert list(committed(folder / "checkpoints")) == [2]
    assert main([source]) == 0 and "stopped (2/4)" in capsys.readouterr().out

    task = command_of(array(capsys, source))[2:]
    assert main([*task, "--task", "0"]) == 0, capsys.readouterr()
    assert "d32_256_bf16_s0: finished" in capsys.readouterr().out
    steps = [(record["step"], record["attempt"]) for record in read_metrics(folder / "metrics.jsonl")]
    assert steps == [(1, 1), (2, 1), (3, 2), (4, 2)]
    facts, plan = json.loads((folder / "facts.json").read_text()), plan_of(capsys, source)
    for key, value in plan["runs"][0].items():
        planned = facts["parameters"]["non_embedding"] if key == "parameters" else facts.get(key, value)
        assert planned == value, key
    assert [run["state"] for run in plan["runs"]] == ["finished", "new"]
    assert main([*task, "--task", "0", "--launcher", "false"]) == 0, "a finished task ends at once"
