"""te_signatures: what of TransformerEngine we call, by name and signature; and docs/te.md, which recipe it serves.

    python -m lowprec.tools.te_signatures PATH [PATH ...]     # record these versions in kernels/te_signatures.json
    python -m lowprec.tools.te_signatures --check [PATH ...]  # exit code 1 where the record and a version disagree
    python -m lowprec.tools.te_signatures --page              # write docs/te.md

A PATH is a wheel (``pip download --no-deps transformer_engine``: the one without CUDA code has all Python parts) or a
folder that holds ``transformer_engine/``; without one, the installed package is read. Sources are parsed, never
imported: no CUDA, no compiled part, no side effect.

The record holds, for each version, ``place: parameters``, written as in a ``def``. Defaults are literals; what is none
(an enum's member, a call) is kept as text in a string, and a default that an environment variable sets is the one it
has where that is not set. ``tests/kernels/test_te.py`` binds every call of ``kernels/te.py`` to it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.kernels import te_recipe
from lowprec.linear import load_precision
from lowprec.linear.precision import RECIPES_FOLDER

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "kernels" / "te_signatures.json"
PAGE = ROOT / "docs" / "te.md"

WANTED = {
    "common/recipe/__init__.py": (
        "MMParams",
        "QParams",
        "DelayedScaling",
        "Float8CurrentScaling",
        "MXFP8BlockScaling",
        "Float8BlockScaling",
        "NVFP4BlockScaling",
    ),
    "pytorch/quantization.py": (
        "RecipeState.create",
        "RecipeState.make_quantizers",
        "is_fp8_available",
        "is_mxfp8_available",
        "is_fp8_block_scaling_available",
        "is_nvfp4_available",
    ),
    "pytorch/cpp_extensions/gemm.py": ("general_gemm",),
    "pytorch/tensor/float8_tensor.py": ("Float8Quantizer.__init__",),
    "pytorch/quantized_tensor.py": ("Quantizer.set_usage", "Quantizer.__call__"),
    "pytorch/tensor/storage/nvfp4_tensor_storage.py": tuple(
        f"NVFP4TensorStorage.{method}" for method in ("update_usage", "get_metadata", "dequantize")
    ),
    "pytorch/tensor/storage/mxfp8_tensor_storage.py": tuple(
        f"MXFP8TensorStorage.{method}" for method in ("update_usage", "get_metadata", "dequantize")
    ),
    "pytorch/tensor/storage/float8_tensor_storage.py": tuple(
        f"Float8TensorStorage.{method}" for method in ("update_usage", "get_metadata", "dequantize")
    ),
    "pytorch/tensor/storage/float8_blockwise_tensor_storage.py": tuple(
        f"Float8BlockwiseQTensorStorage.{method}" for method in ("update_usage", "get_metadata", "dequantize")
    ),
}
"""By file, what is recorded: functions, methods, and the fields of dataclasses."""
EXPORTED = ("Float8Quantizer", *(name for name in WANTED["pytorch/quantization.py"] if name.startswith("is_")))
"""What is taken from ``transformer_engine.pytorch`` itself."""

Reader = Callable[[str], str]


def opened(path: Path | None) -> tuple[str, Reader]:
    """(version, how to read a file of ``transformer_engine/``) of a wheel, a folder, or the installed package.

    Raises:
        ValueError: if there is none, or its version cannot be told.
    """
    if path is None:
        spec = importlib.util.find_spec("transformer_engine")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("transformer_engine is not installed; give the path of a wheel or of an unpacked one")
        path = Path(spec.submodule_search_locations[0]).parent
    if path.suffix == ".whl":
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        return _version(names, str(path)), lambda name: archive.read(f"transformer_engine/{name}").decode()
    names = [f"{folder.name}/" for folder in path.glob("transformer_engine-*.dist-info")]
    return _version(names, str(path)), lambda name: (path / "transformer_engine" / name).read_text()


def _version(names: Iterable[str], where: str) -> str:
    found = {m[1] for name in names if (m := re.match(r"transformer_engine-([0-9.]+)[^/]*\.dist-info/", name))}
    if len(found) != 1:
        raise ValueError(
            f"{where} does not say which version of transformer_engine it is; give its wheel or site-packages"
        )
    return found.pop()


def signatures(read: Reader) -> dict[str, str]:
    """``{"file:Name.method": "a, b=1, *, c"}`` of everything wanted.

    Raises:
        ValueError: if something wanted is not there.
    """
    out = {}
    for file, names in WANTED.items():
        tree = ast.parse(read(file))
        for name in names:
            node: ast.AST = tree
            for part in name.split("."):
                node = _child(node, part, f"{file}:{name}")
            out[f"{file}:{name}"] = _fields(node) if isinstance(node, ast.ClassDef) else _parameters(node)
    imported = [a.name for node in ast.walk(ast.parse(read("pytorch/__init__.py"))) for a in getattr(node, "names", ())]
    for name in EXPORTED:
        if name not in imported:
            raise ValueError(f"TransformerEngine no longer exports pytorch.{name}; change kernels/te.py")
    return out


def _child(node: ast.AST, name: str, place: str) -> ast.AST:
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name == name:
            return child
    raise ValueError(f"TransformerEngine has no {place} any more; find what took its place and change kernels/te.py")


def _parameters(node: ast.AST) -> str:
    assert isinstance(node, ast.FunctionDef)
    a = node.args
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    plain = [p.arg for p in a.posonlyargs + a.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    parts = [_parameter(name, default) for name, default in zip(plain, defaults)]
    parts = parts if static or plain[:1] != ["self"] else parts[1:]
    if a.vararg:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    parts += [_parameter(p.arg, default) for p, default in zip(a.kwonlyargs, a.kw_defaults)]
    return ", ".join(parts + ([f"**{a.kwarg.arg}"] if a.kwarg else []))


def _fields(node: ast.ClassDef) -> str:
    """A dataclass's annotated fields, as parameters."""
    return ", ".join(
        _parameter(line.target.id, line.value)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )


def _parameter(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={_default(default)!r}"


def _default(node: ast.expr) -> object:
    """A literal's value; an ``os.getenv`` with no variable set; else the text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
    return _unset(node) if "getenv" in text else text


def _unset(node: ast.expr) -> Any:
    """What an expression of one ``os.getenv`` is worth while the variable is not set. Raises ValueError for others."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Call(func=ast.Attribute(attr="getenv"), args=[_, *rest]):
            return ast.literal_eval(rest[0]) if rest else None
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            return _unset(left) == _unset(right)
        case ast.Call(func=ast.Attribute(value=value, attr="upper"), args=[]):
            return _unset(value).upper()
        case ast.Call(func=ast.Name(id="int"), args=[value]):
            return int(_unset(value))
    raise ValueError(
        f"cannot read the default {ast.unparse(node)!r} of a recipe; teach tools/te_signatures.py its form"
    )


PAGE_HEAD = """# Recipes by TransformerEngine

Written by `python -m lowprec.tools.te_signatures --page`; a test holds it to the code.

`backend: te` gives the products of a recipe to TransformerEngine where one of its recipes is the same, and refuses the
run where none is. `auto` never chooses it: its random bits and the signs of its rotation are its own, so its codes
differ from the definition's where a product is stochastic or rotated. What else differs is said in `kernels/te.py`. We
have not run it on a GPU and know no speed of it: the code is held to signatures recorded from TransformerEngine
{versions}.

Options that are not shown have TransformerEngine's default; all are passed, so that no NVTE_ variable sets one.
"""


def page() -> str:
    """docs/te.md."""
    rows: dict[str, list[str]] = {"serves": [], "refuses,": []}
    for path in sorted(RECIPES_FOLDER.glob("*.yaml")):
        for name, recipe in load_precision(path.stem).linear.items():
            if recipe.quantized:
                verb, _, rest = te_recipe.describe(recipe).partition(" ")
                where = path.stem if name == path.stem else f"{path.stem}: {name}"
                rows[verb].append(f"| {where} | {rest.removeprefix('as ')} |")
    head = PAGE_HEAD.format(versions=" and ".join(json.loads(RECORD.read_text())["versions"]))
    served = ["| served | as |", "|---|---|", *rows["serves"], ""]
    return "\n".join([head, *served, "| refused | because |", "|---|---|", *rows["refuses,"], ""])


def main(argv: list[str] | None = None) -> int:
    """Record, check, or write the page; 1 if a check fails, 2 if there is nothing to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page())
        print(f"wrote {PAGE}")
        return 0
    try:
        sources = [opened(path) for path in args.paths or [None]]
        found = {version: signatures(read) for version, read in sources}
    except ValueError as error:
        print(f"te_signatures: {error}", file=sys.stderr)
        return 2
    if args.check:
        known = json.loads(RECORD.read_text())["versions"]
        wrong = [
            f"{version} {place}: recorded ({known.get(version, {}).get(place)}), it is ({now})"
            for version, places in found.items()
            for place, now in places.items()
            if known.get(version, {}).get(place) != now
        ]
        print("\n".join(wrong) or f"the record agrees with {', '.join(found)}")
        return 1 if wrong else 0
    about = "Parameters of what kernels/te.py calls of TransformerEngine; written by tools/te_signatures.py."
    RECORD.write_text(json.dumps({"about": about, "versions": found}, indent=1) + "\n")
    print(f"wrote {RECORD}: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
