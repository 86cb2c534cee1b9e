"""lowprec-export: the exact weights of a run, under plain names, with where they are from."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowprec.launch.export import main
from lowprec.launch.train import main as train
from lowprec.train.checkpoint import Checkpoints
from lowprec.train.state import TrainState

TRAINED: dict[int, dict[str, Tensor]] = {}  # by step: the weights that the run below had in memory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny NVFP4 run of 4 steps, saved after 2 and 4."""
    text, r = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(10):
        (text / f"{i}.txt").write_text(" ".join(r.choices(["one", "two", "three", "four"], k=200)))
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = "recipe=nvfp4_tiny model.dim=64 model.layers=2 model.heads=2 model.kv_heads=2 model.ffn_dim=128"
    words += " data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.validation_sequences=2"
    words += " train.steps=4 train.checkpoint_every=2 train.global_batch=4 train.micro_batch=2"
    words += f" data.sources.0.path={text} data.cache_dir={text / 'cache'} run.dir={folder}"
    save = Checkpoints.save

    def save_and_remember(self: Checkpoints, state: TrainState) -> str | None:
        held = state.engine.model.state_dict()
        TRAINED[state.step] = {name: tensor.full_tensor().clone() for name, tensor in held.items()}
        return save(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_remember)
        assert train(words.split()) == 0
    return folder


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lowprec-export", *map(str, arguments)])
    main()


def fails(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        export(monkeypatch, *arguments)
    return str(caught.value)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_file_has_the_weights_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """fp32, bit for bit, of the newest checkpoint; names are those of nn.Linear; the header says where from."""
    export(monkeypatch, run)
    file = run / "model_00000004.safetensors"
    assert capsys.readouterr().out == f"{file}\n"
    found = load_file(file)
    assert same(found, TRAINED[4]) and not same(found, TRAINED[2])
    assert found["layers.1.mlp.down_proj.weight"].shape == (64, 128)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    digest = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert header == {
        "run": "nvfp4_tiny", "step": "4", "tokens": "1024", "dtype": "fp32", "format": "pt", "config_sha256": digest
    }  # fmt: skip


def test_bf16_rounds_to_nearest_and_shards_have_an_index(run: Path, monkeypatch, tmp_path: Path) -> None:
    """Step 2 in bf16 in files of at most 20 kB: all tensors once, each where the index says, none too large."""
    out = tmp_path / "new" / "small.safetensors"
    export(monkeypatch, run, "--step", 2, "--dtype", "bf16", "--out", out, "--max-shard-bytes", "2e4")
    index = json.loads((tmp_path / "new" / "small.safetensors.index.json").read_text())
    files = sorted(out.parent.glob("small-*.safetensors"))
    assert [f.name for f in files[:2]] == [f"small-0000{i}-of-{len(files):05d}.safetensors" for i in (1, 2)]
    found: dict[str, Tensor] = {}
    for file in files:
        part = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == part.keys()
        size_bytes = sum(tensor.nbytes for tensor in part.values())
        assert size_bytes <= 20_000 or len(part) == 1
        found |= part
    assert same(found, {name: tensor.bfloat16() for name, tensor in TRAINED[2].items()})
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["metadata"]["step"] == "2"


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path, monkeypatch) -> None:
    """No run, no such step, a file in the way, an odd name, a size of nothing: each says so and writes nothing."""
    out = tmp_path / "model.safetensors"
    assert "holds no config.yaml: give the folder of a run" in fails(monkeypatch, tmp_path)
    assert fails(monkeypatch, run, "--step", 3).endswith("has no checkpoint of step 3: it has 2, 4")
    assert "must end in .safetensors" in fails(monkeypatch, run, "--out", tmp_path / "model.bin")
    assert "--max-shard-bytes 0 must be at least 1" in fails(monkeypatch, run, "--out", out, "--max-shard-bytes", 0)
    out.write_text("mine")
    assert "exists already: remove it" in fails(monkeypatch, run, "--out", out)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and out.read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, monkeypatch) -> None:
    """A bit that changed in the optimizer's part is enough: the file is named and nothing is written."""
    (file,) = (run / "checkpoints" / "step_00000002").glob("*.distcp")
    sound = file.read_bytes()
    file.write_bytes(sound[:-100] + bytes([sound[-100] ^ 1]) + sound[-99:])
    said = fails(monkeypatch, run, "--step", 2, "--out", tmp_path / "model.safetensors")
    file.write_bytes(sound)
    assert "step_00000002 is damaged: __0_0.distcp has changed: its checksum is " in said
    assert not list(tmp_path.iterdir())


def test_the_script_runs(run: Path, tmp_path: Path) -> None:
    """As a file, from another folder, with a process of its own."""
    script = Path(__file__).parents[2] / "launch" / "export.py"
    command = [sys.executable, str(script), str(run), "--out", str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a.safetensors'}\n", "")
    assert same(load_file(tmp_path / "a.safetensors"), TRAINED[4])
