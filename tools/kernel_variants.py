"""Variants of kernels that the report counts beside those of quantisation: products, the wire, the optimizer.

Products are one tile and one stage: an element is a multiply-add, and tensor cores, which the executor of PTX does not
know, bound them.  Rows of the wire are 4 x 8192 values, long enough that the tensor scale of a row hardly counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowprec.comm.codec import CODECS, Codec
from lowprec.kernels.coded import Coded
from lowprec.kernels.triton import wire
from lowprec.kernels.triton.gemm import gemm_launch, tile_of
from lowprec.kernels.triton.update import adamw_
from lowprec.kernels.triton.variant import CHIPS, Variant
from lowprec.numerics import FORMATS, Stream
from lowprec.numerics.update import AdamW

Start = Callable[[Any], None]
STREAM = Stream(1, 2, 0, "layer")
ROWS, N = 4, 8192
GEMM_WANTED = {  # what multiplies: by format and chip
    "nvfp4": {"sm_90": r"wgmma\S*bf16", "sm_100": r"tcgen05\.mma\S*mxf4nvf4", "sm_120": r"mma\.sync\S*mxf4nvf4"},
    "mxfp8": {"sm_90": r"wgmma\S*bf16", "sm_100": r"tcgen05\.mma\S*mxf8f6f4", "sm_120": r"mma\.sync\S*mxf8f6f4"},
    "fp8_tensor": {"sm_90": r"wgmma\S*e4m3", "sm_100": r"tcgen05\.mma\S*f8f6f4", "sm_120": r"mma\.sync\S*mxf8f6f4"},
    "fp8_1x128": {"sm_90": r"wgmma\S*e4m3", "sm_100": r"tcgen05\.mma\S*f8f6f4", "sm_120": r"mma\.sync\S*mxf8f6f4"},
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _gemm(name: str, chip: str) -> Variant:
    format = FORMATS[name]
    swizzled = format.scale in ("e4m3", "e8m0")
    some = Coded.of(format.quantize(_random(16, 128)), False)
    tile = tile_of(chip, some)

    def run(arch: str, start: Start) -> None:
        a, b = (Coded.of(format.quantize(_random(rows, tile.bk)), swizzled) for rows in (tile.bm, tile.bn))
        start(gemm_launch(a, b, torch.bfloat16, arch)[0])

    elements = tile.bm * tile.bn * tile.bk
    bits = format.bits + (8 / format.block[1] if swizzled else 0)
    least = (tile.bm + tile.bn) * tile.bk * bits / 8 / elements
    wanted = {chip: (GEMM_WANTED[name][chip],)}
    title = f"{name}, {tile.bm} x {tile.bn} x {tile.bk}, {tile.stages} stages, {tile.warps} warps"
    return Variant("gemm", title, run, elements, least, wanted, {}, (chip,), "longest", False, "a_ptr", True)


def _row(codec: Codec, rows: Tensor) -> wire.Row:
    found = codec._kernels(rows, N, True)
    assert found, f"the kernels refuse codec {codec}"
    return found[1]


def _encode(codec: Codec) -> Variant:
    x = _random(ROWS, N)
    random = (STREAM, "key") if codec.rounding == "stochastic" else None

    def run(arch: str, start: Start) -> None:
        wire.encode(x, _row(codec, x), random, arch=arch, start=start)

    return Variant("encode", f"{codec}, fp32 in", run, ROWS * N, 4 + codec.bits_per_value(N) / 8)


def _decode(codec: Codec, summed: bool) -> Variant:
    payload = codec.encode(_random(ROWS, N), STREAM, "key", kernels=False)

    def run(arch: str, start: Start) -> None:
        wire.decode(payload, _row(codec, payload), sum_rows=summed, start=start)

    kernel, name, out = "decode", "", 4.0
    if summed:
        kernel, name, out = "decode_sum", f", sum of {ROWS} rows", 4 / ROWS
    least = out + codec.bits_per_value(N) / 8
    trips = ROWS if summed else 1  # of the loop over the rows of a sum
    return Variant(kernel, f"{codec}{name}, fp32 out", run, ROWS * N, least, trips=trips, input="words_ptr")


def _adamw(name: str, weight: torch.dtype, moments: torch.dtype) -> Variant:
    n = 1 << 14

    def run(arch: str, start: Start) -> None:
        w, g = _random(n).to(weight), _random(n).to(weight)
        mean, square = torch.zeros(n, dtype=moments), torch.zeros(n, dtype=moments)
        adamw_(w, g, mean, square, AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1, 7), STREAM, start=start)

    least = 3 * weight.itemsize + 4 * moments.itemsize
    return Variant("adamw", name, run, n, float(least), input="grad_ptr")


def variants() -> list[Variant]:
    out = [_gemm(name, chip) for name in GEMM_WANTED for chip in CHIPS]
    codecs: Iterable[Codec] = (CODECS["fp8"], CODECS["int8"], CODECS["int4"], CODECS["nvfp4"])
    out += [_encode(codec) for codec in codecs]
    out += [_encode(Codec("nvfp4", rotation=64, rounding="stochastic"))]
    out += [_decode(CODECS[name], False) for name in ("bf16", "fp8", "nvfp4")]
    out += [_decode(CODECS[name], True) for name in ("fp8", "int8", "int4", "nvfp4")]
    bf16 = torch.bfloat16
    return [*out, _adamw("bf16 weights, fp32 moments", bf16, torch.float32), _adamw("all in bf16", bf16, bf16)]
