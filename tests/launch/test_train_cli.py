"""The command line: whatever is wrong is one sentence that names it and what is valid, before anything is built."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowprec.launch.train import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"


@pytest.fixture(autouse=True)
def nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowprec.launch.train.start_world", lambda *_: pytest.fail("something was built"))


def sentence(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a wrong command prints; exit code 2 and nothing else."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lowprec-train: ") and err.count("\n") == 1, out + err
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no recipe given: add recipe=NAME, one of bf16_1b2, "),
        (
            ["recipe=nvfp4_tny"],
            "no recipe 'nvfp4_tny' (did you mean nvfp4_tiny?); recipe can be bf16_1b2, bf16_1b2_tiny",
        ),
        (["model=llama_tin"], "no model 'llama_tin' (did you mean llama_tiny?); model can be llama"),
        (["precision=nvfp5"], "no precision 'nvfp5' (did you mean nvfp4?); precision can be averis, bf16, "),
        (["train.stepz=3"], "no key 'train.stepz' (did you mean train.steps?); train has the keys checkpoint_async, "),
        (
            ["trian.steps=3"],
            "no key 'trian.steps' (did you mean train.steps?); a run has the keys comm, data, guard, ",
        ),
        (["+train.extra=3"], "no key 'train.extra'; train has the keys "),
        (["train.steps.x=1"], "no key 'train.steps.x': train.steps is a single value"),
        (["data.sources.0.pathh=x"], "no key 'data.sources.0.pathh' (did you mean data.sources.0.path?)"),
        (["train.steps=abc"], "train.steps: Value 'abc' of type 'str' could not be converted to Integer"),
        (["train.steps=${steps:many}"], "is no number of tokens: write for example"),
        (["train.steps=null"], "train.steps: field 'train.steps' is not Optional"),
        (
            ["monitor.wandb=offlin"],
            "monitor.wandb: Invalid value 'offlin', expected one of [online, offline, disabled]",
        ),
        (
            ["schedule.shape=cosin"],
            "schedule.shape: Invalid value 'cosin', expected one of [constant, linear, cosine, wsd]",
        ),
        (["train.steps"], "'train.steps' cannot be read as key=value"),
        (["=5"], "'=5' has no key"),
        (["train.steps=1,2"], "'train.steps=1,2': every key of a run has one value"),
        (["~model"], "'~model': every key of a run has one value"),
        (["train.steps=1", "train.steps=2"], "train.steps is given twice"),
        (["precision.rulez=[]"], "precision: unknown key 'rulez'"),
        (["precision.backend=gpu"], "unknown backend 'gpu'"),
        (["precision.rules=[{match: 'layerz.*', recipe: nvfp4}, {match: '*', recipe: bf16}]"], "decides no layer"),
        (["precision.rules=[{match: lm_head, recipe: nvfp4}]"], "no rule matches the layer 'layers.0.attn.q_proj'"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.clip_norm=-1"], "train.clip_norm=-1.0 must not be negative (0 switches it off)"),
        (["train.micro_batch=3"], "train.global_batch=8 is not a multiple of train.micro_batch=3"),
        (["data.seq_len=4096"], "data.seq_len=4096 is longer than model.max_seq_len=2048"),
        (["data.validation_frac=2"], "data.validation_frac=2"),
        (["schedule.warmup_frac=null", "schedule.warmup_steps=500"], "500 warmup steps"),
        (["optim._target_=torch.optim.Adamm"], "torch.optim.Adamm"),
        (["optim.kwargs={beta: 3}"], "beta"),
        (["precision.save=codes", "parallel.recompute=full"], "choose one of the two"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
    ],
)
def test_a_wrong_command_is_one_sentence(capsys, words: list[str], said: str) -> None:
    """Unknown recipes, options, keys, types, values, rules and contradictions."""
    recipe = [] if not words or words[0].startswith("recipe") else ["recipe=nvfp4_tiny"]
    assert said in sentence(capsys, *recipe, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {stepz: 3}", "in recipe/mine: there is no key 'train.stepz' (did you mean train.steps?)"),
        ("trein: {steps: 3}", "in recipe/mine: there is no key 'trein' (did you mean train?)"),
        ("train: {steps: abc}", "in recipe/mine: train.steps: Value 'abc' of type 'str' could not be converted"),
        (
            "defaults: [{override /model: llama_tinyy}]",
            "no model 'llama_tinyy' (did you mean llama_tiny?); model can be",
        ),
        ("defaults: [{override /modell: x}]", "in recipe/mine: there is no group 'modell' (did you mean model?)"),
        ("train: {steps: [3", "a recipe is not valid YAML: "),
        ("precision: {linear: {mine: {fprop: {x: nvfp5}}}}", "unknown format 'nvfp5'"),
    ],
)
def test_a_wrong_recipe_file_is_one_sentence(capsys, tmp_path: Path, text: str, said: str) -> None:
    """The same for a user's own YAML, with the file's name."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert said in sentence(capsys, "--config-dir", str(tmp_path), "recipe=mine")


def test_a_name_that_would_hide_a_shipped_file_is_refused(capsys, tmp_path: Path) -> None:
    """Two files of one name in a group: neither silently wins."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "nvfp4_tiny.yaml").write_text("# @package _global_\nseed: 1\n")
    assert "rename it" in sentence(capsys, "--config-dir", str(tmp_path), "recipe=nvfp4_tiny")


def test_ranks_that_cannot_share_a_step_are_told(capsys, monkeypatch) -> None:
    """Two micro-batches on three ranks: the sentence gives a batch that would do. Other ranks stay silent."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 data-parallel ranks cannot share evenly: make it a multiple of 3, e.g. train.global_batch=12" in sentence(
        capsys, "recipe=nvfp4_tiny"
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert main(["recipe=nvfp4_tiny"]) == 2 and capsys.readouterr() == ("", "")


def test_the_12b_is_planned_without_being_built(capsys) -> None:
    """--plan prints its size and the rule of every layer; nothing is allocated."""
    assert main(["recipe=nvfp4_12b", "--plan"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("nvfp4_12b: 12,310.0M parameters")
    assert "from 82% of training, nvfp4.fprop as in bf16" in out


def test_overrides_beat_the_recipe_and_the_recipe_beats_the_defaults(capsys, tmp_path: Path) -> None:
    """--cfg job prints what would be run; a user's recipe builds on a shipped one."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [nvfp4_tiny, _self_]\ntrain: {steps: 7, log_every: 3}\noptim: {lr: 0.5}\n"
    )
    words = [
        "--config-dir",
        str(tmp_path),
        "recipe=mine",
        "train.log_every=5",
        "data.sources.0.limit=9",
        "--cfg",
        "job",
    ]
    assert main(words) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["name"] == "mine"
    assert config["train"]["steps"] == 7 and config["train"]["log_every"] == 5 and config["optim"]["lr"] == 0.5
    assert config["data"]["sources"][0]["limit"] == 9
    assert config["precision"]["rules"][-1] == {"match": "layers.*", "recipe": "default"}


def test_plan_prints_what_every_layer_would_do(capsys) -> None:
    """--plan: size, table, equations; nothing is trained."""
    assert main(["recipe=nvfp4_tiny", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nvfp4_tiny: 1.4M parameters") and "layers.0-3.mlp.down_proj" in out and "dy: nvfp4~" in out


def test_help_lists_every_recipe(capsys) -> None:
    """--help names all recipes with their first line, and the options of every group."""
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for path in (ROOT / "recipes" / "recipe").glob("*.yaml"):
        assert f"  {path.stem:<16}{path.read_text().splitlines()[1][2:]}\n" in out
    assert "precision=  averis, bf16, bitnet_158, " in out


def test_an_unknown_option_ends_with_usage(capsys) -> None:
    """An option that does not exist: usage and exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        main(["recipe=nvfp4_tiny", "--resume"])
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


@pytest.mark.parametrize("program", [[str(SCRIPT)], ["-m", "lowprec.launch.train"]])
def test_script_and_module_work_from_another_folder(tmp_path: Path, program: list[str]) -> None:
    """`python launch/train.py` finds its own checkout, and launch/ hides no module that bears the name of its files."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ndefaults: [nvfp4_tiny, _self_]\n")
    words = [sys.executable, *program, "--config-dir", ".", "recipe=mine", "--cfg", "job"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "name: mine" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["recipe"], "composing leaves no files"
    if program[0] != "-m":
        probe = f"import runpy, sys; sys.argv = ['x', '--help']; sys.path[0] = {str(SCRIPT.parent)!r}\n"
        probe += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        probe += f"assert {str(SCRIPT.parent)!r} not in sys.path, sys.path"
        subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, check=True, capture_output=True, timeout=60)
