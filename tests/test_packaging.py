"""What a user installs is what stands in the checkout: links, wheel, imports, and the set-up part of the Makefile."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("kernels", "launch", "recipes", "tools")


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Run `command` in `cwd` and return what it printed; fail the test with all of it otherwise."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command} returned {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, built from a copy of the checkout (so no stale build/ folder leaks in)."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lowprec", *LINKS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding the wheel's content, as site-packages would."""
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_four_folders_are_relative_links() -> None:
    """lowprec/kernels and its like are links to ../kernels, not copies (which a checkout without links would have)."""
    for name in LINKS:
        link = ROOT / "lowprec" / name
        assert link.is_symlink(), f"{link} is a copy: git needs core.symlinks=true"
        assert os.readlink(link) == f"../{name}"


def test_wheel_holds_every_file_with_its_content(installed: Path) -> None:
    """Every file of the checkout's lowprec/, through the links, is in the wheel byte for byte: YAML, C++ and all."""
    files = []
    for folder, folders, names in os.walk(ROOT / "lowprec", followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        files += [Path(folder, name).relative_to(ROOT) for name in names]
    missing = [str(f) for f in files if not (installed / f).is_file()]
    assert not missing, f"not in the wheel; add their suffix to package-data in pyproject.toml: {missing}"
    assert all((installed / f).read_bytes() == (ROOT / f).read_bytes() for f in files)
    assert {f.suffix for f in files} >= {".py", ".yaml", ".cpp", ".typed"}


def test_wheel_owns_one_import_name(installed: Path) -> None:
    """`kernels`, `tools` and `recipes` are packages of other people: an installed lowprec brings `lowprec` only."""
    names = {entry.name for entry in installed.iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"lowprec"}


def test_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Away from the checkout, the wheel's packages import and each console script exists and prints its help."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) >= {"lowprec-train", "lowprec-prepare"}
    where = run(
        [sys.executable, "-c", "import lowprec.kernels as k; print(k.__file__)"], tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.strip()).is_relative_to(installed)
    for name, target in scripts.items():
        module, function = target.split(":")
        code = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function}; sys.exit({function}())"
        assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).strip(), name
    assert not list(tmp_path.iterdir()), "printing a help text left files behind"


def test_wheel_composes_its_recipes(installed: Path, tmp_path: Path) -> None:
    """The YAML is found inside the installed package: a shipped recipe composes from another folder."""
    command = [sys.executable, "-m", "lowprec.launch.train", "--cfg", "job", "recipe=nvfp4_tiny", "train.steps=7"]
    printed = run(command, tmp_path, PYTHONPATH=str(installed))
    assert "steps: 7" in printed and "rules:" in printed


def test_imports_stay_lean() -> None:
    """`import lowprec` loads only itself; numerics adds torch, and neither data, tracking nor kernel libraries."""
    code = "import sys, {0}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    bare = run([sys.executable, "-c", code.format("lowprec")], ROOT).split()
    assert "lowprec" in bare and "torch" not in bare and "numpy" not in bare
    heavy = {"wandb", "datasets", "tokenizers", "transformers", "triton", "hydra", "omegaconf", "rich", "matplotlib"}
    parts = "lowprec.linear, lowprec.model, lowprec.comm, lowprec.optim"  # not train: FSDP2 itself brings Triton
    found = run([sys.executable, "-c", code.format(parts)], ROOT).split()
    assert "torch" in found and not {"triton", "transformer_engine", "wandb", "transformers"} & set(found)
    numerics = run([sys.executable, "-c", code.format("lowprec.numerics")], ROOT).split()
    assert "torch" in numerics and not heavy & set(numerics)


# --- the Makefile's set-up, with a Python that only records what pip was asked for

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$*" >> "{log}" ;;
    *) exec "{python}" "$@" ;;
esac
"""


def pip_calls(tmp_path: Path, index: str, gpu: bool) -> tuple[list[str], str]:
    """`make dev` on a pretended Linux machine -> (the arguments of each pip call, what make printed)."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    log = tmp_path / "pip.log"
    programs = {
        "python3": FAKE_PYTHON.format(log=log, python=sys.executable),
        "nvidia-smi": f"#!/bin/sh\nexit {0 if gpu else 9}\n",
        "uname": "#!/bin/sh\necho Linux\n",
    }
    for name, text in programs.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    variables = [f"VENV={tmp_path / 'venv'}", f"PYTHON={fakes / 'python3'}", f"TORCH_CPU_INDEX={index}"]
    printed = run(["make", "dev", *variables], ROOT, PATH=f"{fakes}{os.pathsep}{os.environ['PATH']}")
    return log.read_text().splitlines(), printed


@pytest.fixture
def index(tmp_path: Path):
    """A package index that answers, on this machine."""
    (tmp_path / "index" / "torch").mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path / "index"), **kwargs)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_make_installs_cpu_torch_without_a_gpu(tmp_path: Path, index: str) -> None:
    """On Linux without an NVIDIA GPU, torch comes first and PyTorch's CPU index is offered: no CUDA download."""
    calls, _ = pip_calls(tmp_path, index, gpu=False)
    torch = next(
        d for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "torch" in d
    )
    assert calls[0] == f"-m pip install --extra-index-url {index} {torch}"
    assert [c.split()[-1] for c in calls[1:]] == [".", ".[dev,kernels]"]


def test_make_installs_cuda_torch_with_a_gpu(tmp_path: Path, index: str) -> None:
    """With an NVIDIA GPU the torch of PyPI, which brings CUDA, is wanted."""
    calls, _ = pip_calls(tmp_path, index, gpu=True)
    assert "index-url" not in calls[0] and "torch" in calls[0]


def test_make_says_when_the_cpu_index_is_unreachable(tmp_path: Path) -> None:
    """Offline or behind a mirror, set-up goes on with pip's own configuration and says so in one line."""
    calls, printed = pip_calls(tmp_path, "http://127.0.0.1:9", gpu=False)
    assert "index-url" not in calls[0] and "torch" in calls[0]
    assert "http://127.0.0.1:9 does not answer" in printed


def test_make_names_the_python_it_wants() -> None:
    """Without any Python in range, make stops with a sentence and creates nothing."""
    done = subprocess.run(
        ["make", "env", "PYTHON=", "VENV=/nonexistent/venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "needs Python 3.11 to 3.14" in done.stdout
