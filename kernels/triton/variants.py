"""The variants of the quantise kernels that the report counts: formats, directions, rounding, on a matrix of bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowprec.numerics.format import Format
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.stream import Stream

from .eden import quantize_eden
from .launch import amax_launch, quantize
from .recipe import recipe_of
from .rotate import Turn
from .variant import Variant

SHAPE = (128, 128)
STREAM = Stream(1, 2, 3, "layer")
E2M1_NEAREST, E2M1_STOCHASTIC = r"cvt\.rn\.satfinite\.e2m1x2\.f32", r"cvt\.rs\.satfinite\.e2m1x4\.f32"
E4M3_NEAREST = r"cvt\.rn\.satfinite\.e4m3x2\.f32"


def matrix() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()


def least_bytes(format: Format, outputs: int) -> float:
    """Bytes an element: bf16 in, codes and scales out."""
    recipe = recipe_of(format)
    scale = (4 if format.scale in ("fp32", "pow2") else 1) / (recipe.free * recipe.con)
    return 2 + outputs * (recipe.bits / 8 + (scale if recipe.span == "block" else 0))


def _quantize(
    name: str, side: str, rounding: str, most: float | None = None, turn: Turn | None = None,
    turn_columns: Turn | None = None, word: str = "quantize",
) -> Variant:  # fmt: skip
    """side: what is made, beginning with the outputs; rounding: "nearest", "stochastic" (the bits of a Stream) or
    "hardware stochastic" (cvt.rs, sm_100)."""
    format, hardware, columns = FORMATS[name], rounding.startswith("hardware"), "columns" in side
    stream = None if rounding == "nearest" else STREAM

    def run(arch: str, start: Callable[[Any], None]) -> Any:
        return quantize(
            matrix(), format, columns=columns, stream=stream, hardware_noise=hardware, turn=turn,
            turn_columns=turn_columns, arch=arch, start=start,
        )  # fmt: skip

    wanted: dict[str, tuple[str, ...]] = {}
    if hardware:
        wanted = {"sm_100": (E2M1_STOCHASTIC,)}
    elif format.element == "e2m1" and not stream:
        wanted = {"sm_100": (E2M1_NEAREST,), "sm_120": (E2M1_NEAREST,)}
    elif format.element == "e4m3" and not stream:
        wanted = dict.fromkeys(("sm_90", "sm_100", "sm_120"), (E4M3_NEAREST,))
    return Variant(
        word, f"{name} {side}, {rounding}", run, SHAPE[0] * SHAPE[1], least_bytes(format, 1 + columns), wanted,
        {} if most is None else {"sm_100": most}, ("sm_100",) if hardware else ("sm_90", "sm_100", "sm_120"),
    )  # fmt: skip


def _eden(name: str, side: str, turn: Turn | None = None) -> Variant:
    """MS-EDEN: nearest codes, scales rounded stochastically."""
    format, columns = FORMATS[name], "columns" in side

    def run(arch: str, start: Callable[[Any], None]) -> Any:
        return quantize_eden(
            matrix(), format, STREAM, columns=columns, turn=turn, turn_columns=turn if columns else None, arch=arch,
            start=start,
        )  # fmt: skip

    wanted = {"sm_100": (E2M1_NEAREST,), "sm_120": (E2M1_NEAREST,)}
    return Variant("eden", f"{name} {side}", run, SHAPE[0] * SHAPE[1], least_bytes(format, 1 + columns), wanted)


def _amax(name: str, span: str, **turns: Any) -> Variant:
    def run(arch: str, start: Callable[[Any], None]) -> Any:
        start(amax_launch(matrix(), span, arch=arch, **turns)[0])

    return Variant("amax", name, run, SHAPE[0] * SHAPE[1], 2.0)


def variants() -> list[Variant]:
    signed, both = Turn(16, 0b1011_0010_0110_1001), "rows + columns rotated by 16"
    rht: dict[str, Any] = {"turn": signed, "word": "rotate"}
    turned: dict[str, Any] = {"turn_columns": signed, "word": "rotate"}
    return [
        _amax("of the tensor", "tensor"),
        _amax("of the rows", "row"),
        _amax("of the tensor, rotated by 16", "tensor", turn=signed),
        _amax("of the tensor, and of its columns rotated by 16", "tensor", columns=True, turn_columns=signed),
        _quantize("nvfp4", "rows", "nearest"),
        _quantize("nvfp4", "rows", "stochastic"),
        _quantize("nvfp4", "rows", "hardware stochastic", 14.0),
        _quantize("nvfp4", "rows + columns", "nearest", 18.0),
        _quantize("nvfp4", "rows + columns", "stochastic"),
        _quantize("nvfp4", "rows + columns", "hardware stochastic", 27.0),
        _quantize("nvfp4_2d", "rows + columns", "nearest"),
        _quantize("mxfp4", "rows", "nearest"),
        _quantize("mxfp8", "rows", "nearest"),
        _quantize("mxfp8", "rows + columns", "nearest"),
        _quantize("fp8_1x128", "rows", "nearest"),
        _quantize("fp8_128x128", "rows + columns", "nearest"),
        _quantize("fp8_tensor", "rows", "nearest"),
        _quantize("fp8_row", "rows", "nearest"),
        _quantize("nvfp4", "rows rotated by 16", "nearest", 10.0, **rht),
        _quantize("nvfp4", "rows rotated by 16", "stochastic", **rht),
        _quantize("nvfp4", "rows rotated by 16", "hardware stochastic", 14.0, **rht),
        _quantize("nvfp4", both, "nearest", 18.0, **turned),
        _quantize("nvfp4", both, "stochastic", **turned),
        _quantize("nvfp4", both, "hardware stochastic", 27.0, **turned),
        _quantize("mxfp4", "rows rotated by 32", "nearest", None, Turn(32, 0b1001_0110), word="rotate"),
        _quantize("nvfp4", "rows rotated by 128", "nearest", None, Turn(128, 0b1001_0110 << 60), word="rotate"),
        _quantize("nvfp4_46", "rows", "nearest", word="choose"),
        _quantize("nvfp4_46", "rows + columns", "nearest", word="choose"),
        _quantize("if4", "rows", "nearest", word="choose"),
        _eden("nvfp4_eden", "rows"),
    ]
