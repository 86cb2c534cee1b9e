"""From YAML nodes to recipes: formats, operands, products. Strict: every misspelt key, name or value is one sentence.

The nodes, with all their keys::

    format    {element: e2m1 | [e2m1, if4_int], block: [free, contracted], scale, tensor_scale, tensor_max,
               scale_rounding, rule, coef, guard, targets, select, zero}
    operand   NAME | {format: NAME, rounding, group, source, split, gradient, clip, amax, window} | {reuse: fprop}
    product   {<operand>: ..., <operand>: ..., inner: {size, signs, rounds}, outer: {<operand>: {size, signs, rounds}}}
    split     {kind: mean, term, stat, decay} | {kind: lowrank, rank, term}
              | {kind: channels, top, format, collect: [first, last]} | {kind: residual, top, format}

``size: full`` rotates the whole axis. What the keys mean is said where the types are: :mod:`lowprec.numerics.format`,
:mod:`lowprec.linear.recipe`, :mod:`lowprec.linear.split`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowprec.linear.recipe import GEMM_OPERANDS, Gemm, LinearRecipe, Operand, Rotation
from lowprec.linear.split import ChannelSplit, LowRankSplit, MeanSplit, ResidualSplit, Split
from lowprec.numerics import Format

Formats = Mapping[str, Format]

SPLITS = {
    "mean": ("term", "stat", "decay"),
    "lowrank": ("rank", "term"),
    "channels": ("top", "format", "collect"),
    "residual": ("top", "format"),
}
_FORMAT_KEYS = tuple(f.name for f in dataclasses.fields(Format) if f.name not in ("name", "second"))
_OPERAND_KEYS = tuple(f.name for f in dataclasses.fields(Operand))


def pick(kind: str, name: object, valid: Iterable[str], where: str) -> str:
    """``name`` if valid, else one sentence with the nearest and all valid names."""
    valid = list(valid)
    if isinstance(name, str) and name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean '{near[0]}'? Valid" if near else "valid"
    raise ValueError(f"{where}: unknown {kind} '{name}'; {hint}: {', '.join(valid)}")


def mapping(node: object, keys: Iterable[str], where: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """A plain dict with no other keys than ``keys``."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{where}: expected a mapping with the keys {', '.join(keys)}, got {node!r}")
    for key in node:
        pick("key", key, keys, where)
    for key in required:
        if key not in node:
            raise ValueError(f"{where}: the key '{key}' is missing; give {', '.join(required)}")
    return {str(key): value for key, value in node.items()}


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Say where a recipe type's own refusal happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except TypeError as error:  # a value of a wrong type, such as size: [16]
        raise ValueError(f"{where}: a value has the wrong type ({error})") from None


def parse_format(name: str, node: object) -> Format:
    """One entry of ``formats:``."""
    where = f"formats.{name}"
    fields = mapping(node, _FORMAT_KEYS, where, ("element", "block"))
    block = fields.pop("block")
    if not isinstance(block, (list, tuple)) or not all(isinstance(size, int) for size in block):
        raise ValueError(f"{where}: block must be two whole numbers [free, contracted], got {block!r}")
    if isinstance(fields["element"], (list, tuple)):
        if len(fields["element"]) != 2:
            raise ValueError(f"{where}: element is one name or two to choose from per block, got {fields['element']!r}")
        fields["element"], fields["second"] = fields["element"]
    if "targets" in fields:
        fields["targets"] = tuple(float(t) for t in fields["targets"])
    for key in ("coef", "guard", "tensor_max"):
        if isinstance(fields.get(key), int):
            fields[key] = float(fields[key])
    with at(where):
        return Format(name, block=(block[0], block[1]) if len(block) == 2 else tuple(block), **fields)


def parse_linear_recipe(name: str, node: object, formats: Formats) -> LinearRecipe:
    """One entry of ``linear:``."""
    where = f"linear.{name}"
    if name == "bf16":
        raise ValueError(
            f"{where}: 'bf16' is the name of the unquantised recipe and cannot be redefined; choose another name"
        )
    fields = mapping(node, GEMM_OPERANDS, where)
    fprop = _gemm("fprop", fields.get("fprop"), formats, None, f"{where}.fprop")
    dgrad = _gemm("dgrad", fields.get("dgrad"), formats, fprop, f"{where}.dgrad")
    wgrad = _gemm("wgrad", fields.get("wgrad"), formats, fprop, f"{where}.wgrad")
    return LinearRecipe(name, fprop, dgrad, wgrad)


def parse_operand(node: object, formats: Formats, where: str) -> Operand:
    """An operand that reuses nothing: a format's name, ``bf16``, or a mapping."""
    if node is None or node == "bf16":
        return Operand()
    if isinstance(node, str):
        return Operand(formats[pick("format", node, ["bf16", *formats], where)])
    fields = mapping(node, _OPERAND_KEYS, where)
    name = fields.pop("format", "bf16")
    if name != "bf16":
        fields["format"] = formats[pick("format", name, ["bf16", *formats], where)]
    if fields.get("split") is not None:
        fields["split"] = _split(fields["split"], formats, f"{where}.split")
    if fields.pop("reuse", False):
        raise ValueError(
            f"{where}: codes can only be reused from the forward product, as {{reuse: fprop}} and nothing else"
        )
    with at(where):
        return Operand(**fields)


def parse_rotation(node: object, where: str) -> Rotation | None:
    """``{size: 16 | full, signs: none | fixed | step, rounds: 1 | 2}``."""
    if node is None:
        return None
    fields = mapping(node, ("size", "signs", "rounds"), where, ("size",))
    if fields["size"] == "full":
        fields["size"] = 0
    elif not isinstance(fields["size"], int) or fields["size"] < 1:
        raise ValueError(f"{where}: size is a power of two or 'full' (the whole axis), got {fields['size']!r}")
    with at(where):
        return Rotation(**fields)


def _split(node: object, formats: Formats, where: str) -> Split:
    kind = pick("split", node.get("kind") if isinstance(node, Mapping) else node, SPLITS, where)
    required = [key for key in SPLITS[kind] if key in ("rank", "top", "format")]
    fields = mapping(node, ("kind", *SPLITS[kind]), where, required)
    del fields["kind"]
    if "format" in fields:
        fields["format"] = formats[pick("format", fields["format"], formats, where)]
    if fields.get("collect") is not None:
        fields["collect"] = tuple(fields["collect"])
        if len(fields["collect"]) != 2:
            raise ValueError(f"{where}: collect is [first step, last step], got {list(fields['collect'])}")
    makers = {"mean": MeanSplit, "lowrank": LowRankSplit, "channels": ChannelSplit, "residual": ResidualSplit}
    with at(where):
        return makers[kind](**fields)


def _gemm(role: str, node: object, formats: Formats, fprop: Gemm | None, where: str) -> Gemm:
    if node is None or node == "bf16":
        return Gemm()
    names = GEMM_OPERANDS[role]
    fields = mapping(node, (*names, "inner", "outer"), where)
    inner = parse_rotation(fields.get("inner"), f"{where}.inner")
    outer = mapping(fields.get("outer") or {}, names, f"{where}.outer")
    operands = []
    for name in names:
        spec, here = fields.get(name), f"{where}.{name}"
        if isinstance(spec, Mapping) and "reuse" in spec:
            if spec["reuse"] != "fprop" or len(spec) > 1:
                raise ValueError(
                    f"{here}: codes can only be reused from the forward product, as {{reuse: fprop}} and nothing else"
                )
            if fprop is None:
                raise ValueError(f"{here}: the forward product has nothing before it to reuse; name a format")
            operand = _reused(role, name, fprop, inner, here)
        else:
            operand = parse_operand(spec, formats, here)
        _check_place(role, name, operand, here)
        operands.append(operand)
    a, b = (parse_rotation(outer.get(name), f"{where}.outer.{name}") for name in names)
    with at(where):
        return Gemm(operands[0], operands[1], inner, a, b)


def _check_place(role: str, name: str, operand: Operand, where: str) -> None:
    """What an operand may not be where it stands."""
    if operand.source == "fprop" and (role == "fprop" or name == "dy"):
        raise ValueError(
            f"{where}: source: fprop is for x and w of the backward products; {name} of {role} has no other"
        )
    if operand.gradient != "ste" and role != "fprop":
        raise ValueError(f"{where}: a gradient rule belongs to the forward operand whose gradient it shapes")
    if isinstance(operand.split, MeanSplit) and name == "w":
        raise ValueError(f"{where}: a weight has no token axis to take a mean over; split x or dy")


def _reused(role: str, name: str, fprop: Gemm, inner: Rotation | None, where: str) -> Operand:
    """The forward pass's operand for use across the transpose; refused where its codes would not survive it."""
    if name not in GEMM_OPERANDS["fprop"]:
        raise ValueError(
            f"{where}: the forward product has no operand '{name}' to reuse; it has {', '.join(GEMM_OPERANDS['fprop'])}"
        )
    source = fprop.a if GEMM_OPERANDS["fprop"][0] == name else fprop.b
    if source.format is None:
        return Operand()
    free, contracted = source.format.block
    if free != contracted or source.rounding != "nearest" or source.split or inner is not None:
        raise ValueError(
            f"{where}: the forward codes of {name} cannot be reused: {role} contracts the other axis, and only square "
            f"blocks, rounded to nearest, not split and not rotated for {role}, survive that (these are "
            f"{free}x{contracted}, {source.rounding} rounding); quantise the forward's value again with "
            f"{{source: fprop, format: ...}}, take it unquantised with {{source: fprop}}, or quantise the tensor anew "
            f"with {{format: {source.format.name}}}"
        )
    return dataclasses.replace(source, reuse=True, gradient="ste", clip=1.0)
