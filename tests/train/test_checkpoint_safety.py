"""Checkpoints and configurations are data: whatever is in them, nothing of it runs."""

import ast
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from lowprec.config import from_yaml
from lowprec.launch.train import main
from lowprec.train import reader
from lowprec.train.integrity import COMMITTED, MANIFEST, Writer, damage

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Touch:
    """Pickled, it is a wish to make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.file), "w")


def state(**more: Any) -> dict[str, Any]:
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "eps": None, "fused": True, "params": ["weight"]}]
    return {"model": {"weight": torch.arange(6.0)}, "optim": {"param_groups": groups}, "progress": "{}", **more}


def empty(**more: Any) -> dict[str, Any]:
    return {"model": {"weight": torch.zeros(6)}, "optim": {"param_groups": [{"lr": 0.0}]}, "progress": "", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of one process."""
    dcp.save(state(), storage_writer=Writer(tmp_path / "step_00000001"), no_dist=True)
    return tmp_path / "step_00000001"


def forge(folder: Path, index: bytes) -> None:
    """Puts another .metadata there, and a manifest that says it is right: checksums do not stop a forger."""
    (folder / COMMITTED).write_bytes(index)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][COMMITTED] = {"bytes": len(index), "crc32": f"{zlib.crc32(index):08x}"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) is None


def genuine(folder: Path) -> Any:
    return reader.read_metadata(folder)


def test_what_is_saved_is_read(folder: Path) -> None:
    """Tensors, text and plain values of any kind that an optimizer has; by torch's own reader too."""
    found = empty()
    reader.read(found, folder)
    assert torch.equal(found["model"]["weight"], torch.arange(6.0)) and found["progress"] == "{}"
    assert found["optim"]["param_groups"][0]["lr"] == 1e-3
    theirs = empty()
    dcp.load(theirs, checkpoint_id=folder, no_dist=True)
    assert torch.equal(theirs["model"]["weight"], torch.arange(6.0)) and theirs["progress"] == "{}"


def test_an_index_that_is_a_program_is_refused(folder: Path, tmp_path: Path) -> None:
    """The name that it asks for is told, on loading and on looking alike; torch's own reader does what it asks."""
    forge(folder, pickle.dumps(Touch(tmp_path / "touched")))
    for look in (lambda: reader.read_metadata(folder), lambda: reader.read(empty(), folder)):
        with pytest.raises(ValueError, match=r"asks for _?io\.open, which no checkpoint is made of"):
            look()
    assert not (tmp_path / "touched").exists()
    with suppress(AttributeError):
        dcp.FileSystemReader(folder).read_metadata()
    assert (tmp_path / "touched").exists(), "this test could fail"


def test_a_program_inside_an_index_is_refused(folder: Path, tmp_path: Path) -> None:
    """A genuine index with one strange field."""
    index = genuine(folder)
    index.planner_data = {"progress": Touch(tmp_path / "touched")}
    forge(folder, pickle.dumps(index))
    with pytest.raises(ValueError, match=r"asks for _?io\.open"):
        reader.read(empty(), folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.Tensor", "torch.serialization.load"])
def test_only_what_an_index_is_made_of(folder: Path, name: str) -> None:
    """Not even torch's own functions; a dotted name does not reach through an allowed module."""
    module, _, attribute = name.rpartition(".")
    for program in (f"c{module}\n{attribute}\n.", f"ctorch\nserialization.{attribute}\n."):
        forge(folder, program.encode())
        with pytest.raises(ValueError, match="no checkpoint is made of"):
            reader.read_metadata(folder)


def test_an_entry_that_is_a_program_is_refused(tmp_path: Path) -> None:
    """What is no tensor is read as plain data; torch's own reader runs it."""
    folder = tmp_path / "step_00000001"
    dcp.save(state(progress=Touch(tmp_path / "touched")), storage_writer=Writer(folder), no_dist=True)
    assert damage(folder) is None
    with pytest.raises(ValueError, match=r"cannot be read: rank 0: progress is not plain data: it asks for _?io\.open"):
        reader.read(empty(), folder)
    assert not (tmp_path / "touched").exists()
    dcp.load(empty(), checkpoint_id=folder, no_dist=True)
    assert (tmp_path / "touched").exists(), "this test could fail"


def test_a_tensor_that_is_a_program_is_refused(folder: Path, tmp_path: Path) -> None:
    """The bytes of the weight are replaced by those of a program."""
    index = genuine(folder)
    place = next(place for key, place in index.storage_data.items() if key.fqn == "model.weight")
    program = io.BytesIO()
    torch.save(Touch(tmp_path / "touched"), program)
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(program.getvalue())
    file.write_bytes(file.read_bytes() + program.getvalue())
    (folder / MANIFEST).unlink()
    (folder / COMMITTED).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"cannot be read: rank 0: it asks for _?io\.open"):
        reader.read(empty(), folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/../../outside"])
def test_only_files_of_the_folder_are_opened(folder: Path, name: str) -> None:
    """An index, or a manifest, that points elsewhere is refused before anything there is touched."""
    index, manifest = genuine(folder), json.loads((folder / MANIFEST).read_text())
    for place in index.storage_data.values():
        place.relative_path = name
    forge(folder, pickle.dumps(index))
    with pytest.raises(ValueError, match="which is not in its folder"):
        reader.read(empty(), folder)
    manifest["files"][name] = {"bytes": 1, "crc32": "00000000"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) == "checksums.json is damaged"


# ---- configurations


@pytest.mark.parametrize("where", ["hydra", "optim", "target", "model", "data", "precision", "tag"])
def test_a_config_names_no_code(tmp_path: Path, capsys, where: str) -> None:
    """Wherever Hydra, logging or YAML would call what a file names, a file of a user's own cannot make them."""
    touched = tmp_path / "touched"
    call = {"_target_": "builtins.open", "file": str(touched), "mode": "w"}
    handler = {"()": "builtins.open", "file": str(touched), "mode": "w"}
    content: dict[str, dict[str, Any]] = {
        "hydra": {"hydra": {"callbacks": {"mine": call}, "job_logging": {"handlers": {"mine": handler}}}},
        "optim": {"optim": call},
        "target": {"optim": {"_target_": "builtins.open", "kwargs": {"mode": "w"}}},
        "model": {"model": call},
        "data": {"data": {"sources": [call]}},
        "precision": {"precision": {"linear": {"bf16": call}}},
    }
    text = yaml.safe_dump({"defaults": ["bf16_tiny"], **content.get(where, {})})
    if where == "tag":
        text += f"name: !!python/object/apply:builtins.open ['{touched}', 'w']\n"
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    stop_early = [] if where == "target" else ["--plan"]  # an optimizer is looked up after the plan, before any data
    code = main(["--config-dir", str(tmp_path), *stop_early, "recipe=mine", f"run.dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    if where == "hydra":
        assert code == 0, "Hydra's own settings are not used at all"
    else:
        assert code == 2 and error.count("\n") == 1, error
    assert not touched.exists()


def test_a_saved_config_names_no_code(tmp_path: Path) -> None:
    """config.yaml of a run folder is read again at every start: tags of Python are no YAML to it."""
    with pytest.raises((ValueError, yaml.YAMLError)):
        from_yaml(f"name: !!python/object/apply:builtins.open ['{tmp_path / 'touched'}', 'w']\n")
    assert not (tmp_path / "touched").exists()


# ---- no other way in


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, call) of every call in a Python file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


UNSAFE = ("pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "dill.load", "joblib.load",
          "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "hydra.utils.instantiate", "instantiate",
          "hydra.utils.call", "get_class", "get_method", "__import__", "torch.jit.load", "torch.hub.load")  # fmt: skip
SAFE_LOADERS = ("yaml.SafeLoader", "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)")  # the second: the same in C
ONE_PLACE = {
    "importlib.import_module": (
        "lowprec/optim/build.py",  # behind its list of allowed packages
        "lowprec/model/ssm_kernels.py",  # two names that are written there
    ),
    "exec": ("lowprec/kernels/testing/interpreter.py",),  # of kernels, from the source of the checkout
    "dcp.load": ("lowprec/train/reader.py",),
    "dcp.FileSystemReader": ("lowprec/train/reader.py",),
    "FileSystemReader": ("lowprec/train/reader.py",),
    "pickle.Unpickler": ("lowprec/train/reader.py",),
}


def unsafe(file: Path, where: str) -> Iterator[str]:
    for name, call in calls(file):
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        loader = ast.unparse(call.args[1]) if name == "yaml.load" and len(call.args) == 2 else ""
        bad = (name in UNSAFE and loader not in SAFE_LOADERS) or options.get("trust_remote_code", "False") != "False"
        bad |= name == "torch.load" and options.get("weights_only") != "True"
        bad |= options.get("allow_pickle", "False") != "False"
        bad |= name in ONE_PLACE and not any(place.endswith(where) for place in ONE_PLACE[name])
        if bad:
            yield f"{where}:{call.lineno}: {ast.unparse(call)}"


def test_the_sources_have_no_other_way_in(tmp_path: Path) -> None:
    """No call in the package can make code out of a file; the search finds those that would."""
    files = [p for name in ("lowprec", "launch", "tools", "kernels") for p in (ROOT / name).rglob("*.py")]
    assert len(files) > 80
    assert [line for file in files for line in unsafe(file, file.relative_to(ROOT).as_posix())] == []
    bad = ["pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f, yaml.Loader)",
           "np.load(f, allow_pickle=True)", "eval('1')", "exec('1')", "dcp.load(x)",
           "load_dataset('a', trust_remote_code=True)",
           "hydra.utils.instantiate(x)", "importlib.import_module(x)"]  # fmt: skip
    good = ["torch.load(f, weights_only=True)", "yaml.safe_load(f)", "np.load(f)", "model.eval()", "json.load(f)"]
    (tmp_path / "some.py").write_text("\n".join([*bad, *good]))
    assert len(list(unsafe(tmp_path / "some.py", "some.py"))) == len(bad)
