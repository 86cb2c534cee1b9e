"""tools/kernel_report: the committed account holds for the kernels as they are, and reaches its targets."""

import json
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from lowprec.tools import kernel_measure, kernel_public, kernel_report
from lowprec.tools.kernel_page import page, table

ROOT = Path(kernel_report.__file__).resolve().parent.parent
COMMITTED = kernel_report.load(kernel_report.DOCS / "kernels.json")
KEYS = [
    "kernel", "variant", "arch", "bytes_per_element", "min_bytes_per_element", "instr_per_element", "registers",
    "stack_bytes", "shared_bytes", "instructions_wanted_found",
]  # fmt: skip
MEASURED = [  # measured anew by every run of the tests; --check measures all
    ("amax: of the tensor", "sm_90"),
    ("quantize: nvfp4 rows, nearest", "sm_100"),
    ("quantize: mxfp8 rows, nearest", "sm_120"),
    ("rotate: nvfp4 rows rotated by 16, nearest", "sm_100"),
    ("rotate: nvfp4 rows rotated by 16, hardware stochastic", "sm_100"),
    ("rotate: nvfp4 rows + columns rotated by 16, nearest", "sm_100"),
    ("rotate: nvfp4 rows + columns rotated by 16, hardware stochastic", "sm_100"),
    ("decode_sum: nvfp4, sum of 4 rows, fp32 out", "sm_90"),
]
TARGETS = {  # instructions an element on sm_100, at most
    "nvfp4 rows rotated by 16, nearest": 10,
    "nvfp4 rows rotated by 16, hardware stochastic": 14,
    "nvfp4 rows + columns rotated by 16, nearest": 18,
    "nvfp4 rows + columns rotated by 16, hardware stochastic": 27,
}
SPILLS = {  # bytes a thread, at most: known, few, and not to become more
    ("choose", "if4 rows, nearest", "sm_120"): 16,
    ("quantize", "nvfp4 rows + columns, stochastic", "sm_120"): 8,
}


@pytest.mark.parametrize(("name", "arch"), MEASURED)
def test_nothing_rises(name: str, arch: str) -> None:
    """The ratchet: bytes, instructions, registers, stack and shared memory are at most the committed ones."""
    ((variant, chip),) = [p for p in kernel_measure.chosen([name], [arch]) if f"{p[0].kernel}: {p[0].name}" == name]
    row = kernel_measure.measure(variant, chip)
    assert kernel_report.compare([row], COMMITTED)[0] == []


def test_every_variant_is_committed() -> None:
    wanted = {(variant.kernel, variant.name, chip) for variant, chip in kernel_measure.chosen()}
    assert {row.key for row in COMMITTED} == wanted and len(COMMITTED) == len(wanted)


def test_targets() -> None:
    """No spills but the known, the instructions that were meant, 1.05 of the least bytes, no pass over memory for a
    rotation, nearest kernels that a B200's memory can bind, stochastic ones within their instructions."""
    promises = {(v.kernel, v.name, chip): most for v in kernel_measure.variants() for chip, most in v.most.items()}
    found = {row.variant: row for row in COMMITTED if row.kernel == "rotate" and row.arch == "sm_100"}
    for name, most in TARGETS.items():
        assert found[name].instr_per_element <= most, name
    for row in COMMITTED:
        assert row.stack_bytes <= SPILLS.get(row.key, 0), row.key
        assert row.instructions_wanted_found and row.occupancy_warps > 0, row.key
        assert row.instr_per_element <= promises.get(row.key, row.instr_per_element), row.key
        if row.kernel in ("amax", "quantize", "rotate", "choose", "eden"):
            assert row.bytes_per_element and row.bytes_per_element <= 1.05 * row.min_bytes_per_element, row.key
            assert row.passes and row.passes <= 2, row.key
            if row.arch == "sm_100" and (row.kernel in ("amax", "quantize") or row.variant in TARGETS):
                assert row.bound == "memory" or "stochastic" in row.variant, row.key


def test_the_page_is_the_rows() -> None:
    text = (kernel_report.DOCS / "kernels.md").read_text()
    assert text == page(COMMITTED)
    assert "**None of this was measured on a GPU.**" in text
    assert all(row.variant in text for row in COMMITTED)


@pytest.mark.parametrize("command", [["tools/kernel_report.py"], ["-m", "lowprec.tools.kernel_report"]])
def test_json(command: list[str]) -> None:
    """A list of rows whose first keys are the documented ones, in their order."""
    words = ["--json", "--kernel", "amax: of the rows", "--arch", "sm_100"]
    done = subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert list(row)[: len(KEYS)] == KEYS and row["arch"] == "sm_100" and row["min_bytes_per_element"] == 2.0


def test_check_and_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Worse is exit code 1 and a sentence, better asks for --update, --update writes rows and page."""
    words = ["--kernel", "amax: of the rows", "--arch", "sm_100", "--docs", str(tmp_path)]
    assert kernel_report.main([*words, "--check"]) == 2 and "--update" in capsys.readouterr().err
    assert kernel_report.main([*words, "--update"]) == 0
    (row,) = kernel_report.load(tmp_path / "kernels.json")
    assert (tmp_path / "kernels.md").read_text() == page([row])
    assert kernel_report.main([*words, "--check"]) == 0
    lower = replace(row, registers=row.registers - 1, instr_per_element=row.instr_per_element + 1)
    (tmp_path / "kernels.json").write_text(kernel_report.dump([lower]))
    capsys.readouterr()
    assert kernel_report.main([*words, "--check"]) == 1
    out = capsys.readouterr().out
    assert f"WORSE: amax, of the rows, sm_100: registers {row.registers - 1} -> {row.registers}" in out
    assert "better: amax, of the rows, sm_100: instr_per_element" in out and "--update" in out
    assert kernel_report.main([*words, "--update"]) == 0 and "rose: " in capsys.readouterr().out


def test_what_counts_as_worse() -> None:
    row = COMMITTED[0]
    worse, better = kernel_report.compare([replace(row, shared_bytes=row.shared_bytes + 16)], [row])
    assert len(worse) == 1 and "shared_bytes" in worse[0] and not better
    assert "not comparable" in kernel_report.compare([replace(row, triton="0")], [row])[0][0]
    assert "not in the committed" in kernel_report.compare([replace(row, variant="new")], [row])[0][0]
    lost = replace(row, instructions_wanted_found=False, instructions_wanted={"cvt": 0})
    assert "is gone" in kernel_report.compare([lost], [row])[0][0]
    assert "None" in kernel_report.compare([replace(row, bytes_per_element=None)], [row])[0][0]
    assert kernel_report.check([], [row], whole=True) == 1  # committed, and no variant any more
    assert "NO" in table([lost]) and "–" in table([replace(row, bytes_per_element=None)])


@pytest.mark.parametrize(("words", "said"), [(["--kernel", "nothing"], "quantize"), (["--arch", "sm_70"], "sm_120")])
def test_unknown_names_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_report.main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_importing_the_tool_imports_no_triton() -> None:
    code = "import lowprec.tools.kernel_report, lowprec.tools.gpu_check, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ------------------------------------------------------------------------------------------------- kernels of others

SOURCE = """
import a_library_that_is_not_here

if a_library_that_is_not_here.flag():
    FACTOR = tl.constexpr(3.0)

    @triton.jit
    def _scaled(x):
        return x * FACTOR

    @triton.autotune(configs=[], key=["n"])
    @triton.jit
    def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, _scaled(tl.load(x_ptr + i, mask=i < n)), mask=i < n)

    @triton.jit
    def another_kernel(x_ptr):
        pass
"""


def _public() -> kernel_public.Public:
    def launch(kernel: object) -> object:
        import torch

        args = {"x_ptr": torch.ones(1024), "y_ptr": torch.empty(1024), "n": 1024}
        return kernel_public._launch(kernel, (2,), args, {"BLOCK": 512}, 4)

    return kernel_public.Public("pytorch/ao", ("some/file.py",), "scale_kernel", "scaled", launch, 1024, 8.0)  # type: ignore[arg-type]


def test_a_kernel_of_others_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel, what it calls and what that reads are cut out of a file that cannot be imported, and measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_public, "_all", lambda: [_public()])
    folder = kernel_public.cache_folder() / "pytorch+ao" / kernel_public.COMMITS["pytorch/ao"][0][:12]
    (folder / "some").mkdir(parents=True)
    (folder / "LICENSE").write_text("BSD")
    (folder / "some" / "file.py").write_text(SOURCE)
    (row,) = kernel_public.rows_of_others([], ["sm_90"])
    assert row.key == ("ao", "scaled", "sm_90") and row.bytes_per_element == 8.0 and row.passes == 1.0
    text = kernel_public.cut([SOURCE], "scale_kernel")
    assert "another_kernel" not in text and "autotune" not in text and "FACTOR = tl.constexpr(3.0)" in text
    assert "FACTOR = 2" in (given := kernel_public.cut([SOURCE], "scale_kernel", "FACTOR = 2")) and "3.0" not in given
    with pytest.raises(ValueError, match="pinned commit"):
        kernel_public.cut([SOURCE], "gone_kernel")


def test_offline_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    assert kernel_report.main(["--public"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no route to host" in err and "raw.githubusercontent.com" in err
