"""Triton kernels of other projects under the same account as ours: what they move and issue, by their machine code.

Nothing of them is in this repository.  `kernel_report --public` fetches the files named here from GitHub, each at a
pinned commit, with the licence, into ``~/.cache/lowprec/public_kernels`` (or under ``XDG_CACHE_HOME``), and takes from
them the kernel and the functions it calls; the rest of the file, which would want the whole library, is not run.  The
code of others then runs in your process: it is compiled, and executed on the CPU, so `COMMITS` is the list to read.

Tile sizes are ones that the project's own autotuner tries; on a GPU it may choose others.  Kernels that copy by TMA,
or hold an instruction that the executor does not know, are compiled and read, not executed; of a persistent loop one
trip is counted, without what stands before it.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lowprec.tools.kernel_measure import Row, measure

COMMITS = {  # repository -> commit, licence file
    "pytorch/ao": ("36027d82d1ad9949597ea16002ff4940374b1b94", "LICENSE"),  # BSD 3-clause
    "deepseek-ai/DeepSeek-V3": ("9b4e9788e4a3a731f7567338ed15d3ec549ce03b", "LICENSE-CODE"),  # MIT
}
_MX = ("torchao/prototype/mx_formats/kernels.py",)
_NVFP4 = "torchao/prototype/moe_training/nvfp4_training/"
_HEADER = "import torch\nimport triton\nimport triton.language as tl\n\n"


@dataclass(frozen=True)
class Public:
    """One kernel of others, one tile size."""

    repository: str
    files: tuple[str, ...]  # where the kernel and what it calls are
    function: str
    name: str
    launch: Callable[[Any], SimpleNamespace]  # the kernel -> a launch on CPU tensors
    elements: int
    min_bytes: float
    wanted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chips: tuple[str, ...] = ("sm_90", "sm_100", "sm_120")
    trips: int | Literal["longest"] | None = None
    executes: bool = True
    input: str = "x_ptr"
    defines: str = ""  # lines for names that the project computes from the machine
    tensor_cores: bool = False

    @property
    def kernel(self) -> str:
        return self.repository.split("/")[1]

    def run(self, arch: str, start: Callable[[Any], None]) -> None:
        start(self.launch(jit(self)))


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowprec" / "public_kernels"


def fetched(repository: str, path: str) -> Path:
    """The file in the cache, fetched now if it is not there.

    Raises:
        ValueError: if GitHub cannot be reached.
    """
    commit = COMMITS[repository][0]
    target = cache_folder() / repository.replace("/", "+") / commit[:12] / path
    if not target.exists():
        url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                text = answer.read()
        except OSError as error:
            raise ValueError(
                f"{url} could not be fetched ({error}); run this where GitHub answers, or put the file at {target}."
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
    return target


def cut(sources: Iterable[str], function: str, defines: str = "") -> str:
    """A module with `function`, the functions it calls and the constants they read, in the order of `sources`."""
    known: dict[str, str] = {}
    names: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                node.decorator_list = [d for d in node.decorator_list if "triton.jit" in ast.unparse(d)]
                name = node.name
            elif isinstance(node, ast.Assign) and "tl.constexpr(" in ast.unparse(node):
                name = ast.unparse(node.targets[0])
            else:
                continue
            known[name] = ast.unparse(node)
            names[name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    if function not in known:
        raise ValueError(f"no Triton kernel {function} is in the fetched files; the pinned commit does not fit.")
    wanted, todo = set[str](), [function]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += [n for n in names[name] if n in known]
    given = {ast.unparse(node.targets[0]) for node in ast.parse(defines).body if isinstance(node, ast.Assign)}
    parts = [text for name, text in known.items() if name in wanted and name not in given]
    return _HEADER + defines + "\n\n" + "\n\n\n".join(parts) + "\n"


def jit(one: Public) -> Any:
    """The kernel as Triton's JIT function, out of the cache."""
    fetched(one.repository, COMMITS[one.repository][1])
    paths = [fetched(one.repository, path) for path in one.files]
    text = cut([path.read_text() for path in paths], one.function, one.defines)
    file = paths[0].parent / f"cut_{one.function}.py"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"lowprec_public_{one.function}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, one.function)


def _launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constants: dict[str, Any], warps: int,
            **options: Any) -> SimpleNamespace:  # fmt: skip
    return SimpleNamespace(kernel=kernel, grid=grid, args=args, constants=constants, warps=warps, options=options)


def _matrix(rows: int, k: int) -> Any:
    import torch

    return torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).bfloat16()


def _act_quant(kernel: Any) -> SimpleNamespace:
    import torch

    y = torch.empty(128, 128, dtype=torch.float8_e4m3fn)
    args = {"x_ptr": _matrix(128, 128), "y_ptr": y, "s_ptr": torch.empty(128)}
    return _launch(kernel, (128,), args, {"BLOCK_SIZE": 128, "scale_fmt": None}, 4)


def _mxfp8(axis: int, rows: int, columns: int, warps: int) -> Callable[[Any], SimpleNamespace]:
    """Rows (axis 0) or columns (1): the kernel has one tile per program."""

    def launch(kernel: Any) -> SimpleNamespace:
        import torch

        n, k = rows, columns
        out, scales = torch.empty(n * k, dtype=torch.float8_e4m3fn), torch.empty(n * k // 32, dtype=torch.uint8)
        names = ("output_ptr", "scale_ptr") if axis == 0 else ("output_col_major_ptr", "col_scale_ptr")
        args = {"x_ptr": _matrix(n, k), names[0]: out, names[1]: scales, "n_rows": n, "n_cols": k}
        block = "SCALE_BLOCK_SIZE" if axis == 0 else "INNER_BLOCK_SIZE"
        constants = {"ROW_TILE_SIZE": rows, "COL_TILE_SIZE": columns, block: 32, "SCALING_MODE": "rceil"}
        return _launch(kernel, (1, 1), args, constants, warps, num_stages=2)

    return launch


def _weight_2d(block_m: int, block_n: int, warps: int) -> Callable[[Any], SimpleNamespace]:
    def launch(kernel: Any) -> SimpleNamespace:
        import torch

        code, scale = torch.empty(block_m * block_n // 2, dtype=torch.uint8), torch.float8_e4m3fn
        args = {
            "a_ptr": _matrix(block_m, block_n), "out_ptr": code,
            "scales_ptr": torch.empty(block_m * block_n // 16, dtype=scale), "a_t_fp4_ptr": code.clone(),
            "a_t_sf_ptr": torch.empty(block_m * block_n // 16, dtype=scale), "global_amax_ptr": torch.ones(1),
            "M": block_m, "N": block_n,
        }  # fmt: skip
        constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_SIZE_N": 8, "NUM_SMS": 148, "NUM_STAGES": 2}
        return _launch(kernel, (1,), args, constants, warps, num_stages=2)

    return launch


def _all() -> list[Public]:
    fp4, fp8 = (r"cvt\.rn\.satfinite\.e2m1x2\.f32",), (r"cvt\.rn\.satfinite\.e4m3x2\.f32",)
    tiles = [(128, 128, 4), (128, 128, 8), (256, 128, 8)]
    out = [
        Public("deepseek-ai/DeepSeek-V3", ("inference/kernel.py",), "act_quant_kernel", "fp8_1x128 rows, nearest",
               _act_quant, 128 * 128, 3 + 4 / 128, {"sm_90": fp8})
    ]  # fmt: skip
    for axis, side in enumerate(("rows", "columns")):
        out += [
            Public("pytorch/ao", _MX, f"to_mxfp8_dim{axis}_kernel", f"mxfp8 {side}, tile {r}x{c}, {w} warps",
                   _mxfp8(axis, r, c, w), r * c, 3 + 1 / 32, {"sm_100": fp8}, ("sm_100",),
                   defines="IS_ROCM = tl.constexpr(False)")
            for r, c, w in tiles
        ]  # fmt: skip
    out += [
        Public("pytorch/ao", (_NVFP4 + "quantize_2d_triton.py", _NVFP4 + "hadamard_utils.py"),
               "triton_quantize_2d_weight", f"nvfp4_2d rows + columns, tile {r}x{c}, {w} warps",
               _weight_2d(r, c, w), r * c, 2 + 2 * (1 / 2 + 1 / 16), {"sm_100": fp4}, ("sm_100",), "longest", False)
        for r, c, w in tiles
    ]  # fmt: skip
    return out


def rows_of_others(kernels: Iterable[str], arches: Iterable[str]) -> list[Row]:
    """Rows of all public kernels, or of those whose name contains one of `kernels`.

    Raises:
        ValueError: if GitHub does not answer, or nothing is called so.
    """
    kernels, arches = list(kernels), list(arches)
    wanted = [p for p in _all() if not kernels or any(word in f"{p.kernel}: {p.name}" for word in kernels)]
    pairs = [(p, chip) for p in wanted for chip in p.chips if not arches or chip in arches]
    if not pairs:
        raise ValueError(f"no public kernel matches; they are of {', '.join(COMMITS)}.")
    return [_measure(one, chip) for one, chip in pairs]


def _measure(one: Public, chip: str) -> Row:
    """The row, without bytes where the executor does not know an instruction of the kernel."""
    from lowprec.kernels.testing.ptx import Fault

    try:
        return measure(one, chip)
    except Fault:
        return measure(replace(one, executes=False), chip)
