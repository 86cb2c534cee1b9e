"""Matrix products of packed codes: ``C = (A . s_A) (B . s_B)^T t_A t_B``, fp32 sums, one rounding to C's dtype.

    multiply(a, b, torch.bfloat16)              # two `Coded` operands (rows, k): kernels/coded.py

Three forms, by what the scales of the two formats span (`form`):

``scaled``   NVFP4 (e4m3 per 16) and MX (e8m0 per 32): `tl.dot_scaled`.  On sm_100 ``tcgen05.mma ... block_scale``, on
             sm_120 ``mma.sync ... block_scale``; on sm_90, which has neither, Triton widens to bf16, which holds an
             element times its scale exactly (six significant bits), and uses ``wgmma``.
``fp8``      one fp32 scale for the tensor or a row: `tl.dot` of fp8, the scales multiply the finished sum.
``blocks``   fp32 scales per 1 x 128 or 128 x 128 (DeepSeek-V3, arXiv:2412.19437): a sum over 128, times the two scales,
             added in fp32.

Sums are fp32 in an order of the hardware's own, so results equal the definition's up to ``2 k 2^-24 sum|a||b|``.
FP8 instructions of Ada and Hopper keep about 14 bits of a sum (arXiv:2412.19437, section 3.5.2, arXiv:2411.10958): here
their sums leave the tensor core every 128 elements, which bounds the loss and does not remove it.

Scales are read in rows, or swizzled (`layout`); a scale of a square block is read for each of its rows.  Edges are
masked, rows beyond the matrix wrap around; rows of codes that are no multiple of 16 bytes (k of 32 in FP4) are loaded
in narrow pieces.  Bytes of a program: (BM + BN) K (bits + scale bits) / 8 in, BM BN out;
programs of a column of `GROUP` tiles run together, so that their operand B comes from the second-level cache.

What this is not: the fastest GEMM for these chips (no TMA, no warp specialisation, no CTA pairs).  Where the library
has one, `scaled_mm` is asked first.  Not measured on a GPU by us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.kernels.coded import Coded, form
from lowprec.numerics.formats import FORMATS

from .memory import Launch, arch_of
from .variant import Variant


@triton.jit
def tile_scales(ptr, first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                FREE: tl.constexpr, SWIZZLED: tl.constexpr):  # fmt: skip
    """Stored scales (ROWS, COLUMNS) of a tile; beyond the matrix zero, which meets only zero codes."""
    if SWIZZLED:
        tile_row = first_row // 128 + tl.arange(0, ROWS // 128)[:, None, None]
        tile_column = first_column // 4 + tl.arange(0, COLUMNS // 4)[None, :, None]
        across = tl.cdiv(columns, 4)
        at = (tile_row.to(tl.int64) * across + tile_column) * 512 + tl.arange(0, 512)[None, None, :]
        inside = (tile_row < tl.cdiv(rows, 128)) & (tile_column < across)
        tiles = tl.reshape(tl.load(ptr + at, mask=inside, other=0), (ROWS // 128, COLUMNS // 4, 32, 4, 4))
        out = tl.reshape(tl.permute(tiles, (0, 3, 2, 1, 4)), (ROWS, COLUMNS))
    else:
        row = (first_row + tl.arange(0, ROWS)) % rows // FREE
        column = first_column + tl.arange(0, COLUMNS)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        out = tl.load(ptr + at, mask=(column < columns)[None, :], other=0)
    return out


@triton.jit
def level(ptr, first, size, COUNT: tl.constexpr, KIND: tl.constexpr):
    """What multiplies the finished sum: 1, one number, or one a row (COUNT,)."""
    if KIND == "row":
        out = tl.load(ptr + (first + tl.arange(0, COUNT)) % size)
    elif KIND == "one":
        out = tl.load(ptr) + tl.zeros((COUNT,), tl.float32)
    else:
        out = tl.full((COUNT,), 1.0, tl.float32)
    return out


@triton.jit
def fp8(codes, ELEMENT: tl.constexpr):
    return codes.to(tl.float8e4nv if ELEMENT == "e4m3" else tl.float8e5, bitcast=True)


@triton.jit
def gemm_kernel(a_ptr, b_ptr, sa_ptr, sb_ptr, la_ptr, lb_ptr, c_ptr, m, n, bytes_k, pitch_a, pitch_b, scales_k,
                A: tl.constexpr, B: tl.constexpr, FORM: tl.constexpr, SCALE: tl.constexpr, G: tl.constexpr,
                FREE_A: tl.constexpr, FREE_B: tl.constexpr, SWIZZLED_A: tl.constexpr, SWIZZLED_B: tl.constexpr,
                LEVEL_A: tl.constexpr, LEVEL_B: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """One tile (BM, BN) of C (m, n): codes a (m, bytes_k), b (n, bytes_k) as bytes, `scales_k` scales a row of blocks.

    UNIT: fp8 goes through the block-scaled instruction, all scales one (on sm_120 the only fp8 at full rate).
    """
    per_byte: tl.constexpr = 2 if A == "e2m1" else 1
    rows_of_tiles = tl.cdiv(m, BM)
    columns_of_tiles = tl.cdiv(n, BN)
    band = tl.program_id(0) // (GROUP * columns_of_tiles)
    height = tl.minimum(rows_of_tiles - band * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * columns_of_tiles)
    first_m = (band * GROUP + place % height) * BM
    first_n = place // height * BN

    row = (first_m + tl.arange(0, BM)) % m
    column = (first_n + tl.arange(0, BN)) % n
    kb = tl.arange(0, BK // per_byte)
    a_at = a_ptr + row.to(tl.int64)[:, None] * pitch_a + kb[None, :]
    b_at = b_ptr + column.to(tl.int64)[None, :] * pitch_b + kb[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(bytes_k, BK // per_byte), num_stages=STAGES):
        if EVEN:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            left = bytes_k - step * (BK // per_byte)
            a = tl.load(a_at, mask=(kb < left)[None, :], other=0)
            b = tl.load(b_at, mask=(kb < left)[:, None], other=0)
        if FORM == "scaled":
            sa = tile_scales(sa_ptr, first_m, step * (BK // G), m, scales_k, BM, BK // G, FREE_A, SWIZZLED_A)
            sb = tile_scales(sb_ptr, first_n, step * (BK // G), n, scales_k, BN, BK // G, FREE_B, SWIZZLED_B)
            if SCALE == "e4m3":
                sa = sa.to(tl.float8e4nv, bitcast=True)
                sb = sb.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(a, sa, A, b, sb, B, acc)
        else:
            total = tl.zeros((BM, BN), tl.float32) if FORM == "blocks" else acc
            if UNIT:
                one_a = tl.full((BM, BK // 32), 127, tl.uint8)
                one_b = tl.full((BN, BK // 32), 127, tl.uint8)
                total = tl.dot_scaled(a, one_a, A, b, one_b, B, total)
            else:
                total = tl.dot(fp8(a, A), fp8(b, B), total, max_num_imprecise_acc=BK)
            if FORM == "blocks":  # BK is the block
                sa = tl.load(sa_ptr + (row // FREE_A).to(tl.int64) * scales_k + step)
                sb = tl.load(sb_ptr + (column // FREE_B).to(tl.int64) * scales_k + step)
                acc += total * (sa[:, None] * sb[None, :])
            else:
                acc = total
        a_at += BK // per_byte
        b_at += BK // per_byte

    acc = acc * (level(la_ptr, first_m, m, BM, LEVEL_A)[:, None] * level(lb_ptr, first_n, n, BN, LEVEL_B)[None, :])
    row_c = first_m + tl.arange(0, BM)[:, None]
    column_c = first_n + tl.arange(0, BN)[None, :]
    c_at = c_ptr + row_c.to(tl.int64) * n + column_c
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(row_c < m) & (column_c < n))


class Tile(NamedTuple):
    """BM x BN of the output by a program, BK contracted elements a stage, stages in flight, warps."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int


# By form, `scaled` with 4 and with 8 bits.  Chosen so that it compiles without spills, within a program's shared memory
# (227 KiB on sm_90 and sm_100, 99 KiB on sm_120) and 512 columns of tensor memory.  Not tuned on a GPU.
TILES: dict[str, dict[str, Tile]] = {
    "sm_90": {
        "scaled4": Tile(128, 128, 128, 4, 8), "scaled8": Tile(128, 128, 128, 4, 8),
        "fp8": Tile(128, 128, 128, 4, 8), "blocks": Tile(128, 128, 128, 4, 8),
    },
    "sm_100": {
        "scaled4": Tile(128, 256, 256, 4, 8), "scaled8": Tile(128, 256, 128, 4, 8),
        "fp8": Tile(128, 256, 128, 4, 8), "blocks": Tile(128, 128, 128, 4, 8),
    },
    "sm_120": {
        "scaled4": Tile(128, 128, 128, 4, 8), "scaled8": Tile(128, 128, 128, 3, 8),
        "fp8": Tile(128, 128, 128, 3, 8), "blocks": Tile(128, 128, 128, 3, 8),
    },
}  # fmt: skip


def tile_of(arch: str, a: Coded) -> Tile:
    """The tile of a product on a chip; one that is not in the table gets that of the nearest older one, but
    sm_89, with the least shared memory, that of sm_120."""
    number = int(arch.removeprefix("sm_"))
    known = "sm_120" if number >= 120 or number < 90 else "sm_100" if number >= 100 else "sm_90"
    how = form(a.format, a.format)
    return TILES[known][f"scaled{a.format.bits}" if how == "scaled" else str(how)]


def _levels(x: Coded) -> tuple[Tensor | None, str]:
    """The fp32 number(s) that multiply the finished sum, and of what: "none", "one" or "row"."""
    scale = x.outside()
    return (None, "none") if scale is None else (scale.contiguous(), "one" if scale.numel() == 1 else "row")


def gemm_launch(a: Coded, b: Coded, out_dtype: torch.dtype, arch: str | None = None) -> tuple[Launch, Tensor]:
    """The product of (m, k) and (n, k), not yet started, and where it goes: (m, n)."""
    (m, k), n, how = a.shape, b.shape[0], form(a.format, b.format)
    assert k == b.shape[1] and how is not None, (a.shape, b.shape, how)
    arch = arch or arch_of(a.codes)
    tile = tile_of(arch, a)
    c = torch.empty(m, n, dtype=out_dtype, device=a.codes.device)
    (la, kind_a), (lb, kind_b) = _levels(a), _levels(b)
    per_byte, block = 8 // max(a.format.bits, 4), a.format.block[1]
    bytes_k = -(-k // per_byte)
    args: dict[str, Any] = {
        "a_ptr": a.codes, "b_ptr": b.codes, "sa_ptr": a.scales, "sb_ptr": b.scales,
        "la_ptr": a.scales if la is None else la, "lb_ptr": b.scales if lb is None else lb,
        "c_ptr": c, "m": m, "n": n, "bytes_k": bytes_k,
        "pitch_a": a.codes.stride(0), "pitch_b": b.codes.stride(0), "scales_k": -(-k // block) if block else 1,
    }  # fmt: skip
    constants = {
        "A": a.format.element, "B": b.format.element, "FORM": how, "SCALE": a.format.scale, "G": block or 128,
        "FREE_A": a.format.block[0] or 1, "FREE_B": b.format.block[0] or 1,
        "SWIZZLED_A": a.swizzled, "SWIZZLED_B": b.swizzled, "LEVEL_A": kind_a, "LEVEL_B": kind_b,
        "UNIT": how != "scaled" and int(arch.removeprefix("sm_")) >= 120,
        "EVEN": bytes_k % (tile.bk // per_byte) == 0,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": 8, "STAGES": tile.stages,
    }  # fmt: skip
    grid = (-(-m // tile.bm) * -(-n // tile.bn), 1)
    return Launch(gemm_kernel, grid, args, constants, tile.warps), c


def multiply(a: Coded, b: Coded, out_dtype: torch.dtype) -> Tensor:
    """(m, k), (n, k) -> (m, n) of ``out_dtype``, bf16 or fp32."""
    launch, c = gemm_launch(a, b, out_dtype)
    launch()
    return c


INSTRUCTIONS = {
    ("nvfp4", "sm_90"): r"wgmma\.mma_async\S+\.f32\.bf16\.bf16",
    ("mxfp4", "sm_90"): r"wgmma\.mma_async\S+\.f32\.bf16\.bf16",
    ("mxfp8", "sm_90"): r"wgmma\.mma_async\S+\.f32\.bf16\.bf16",
    ("fp8", "sm_90"): r"wgmma\.mma_async\S+\.f32\.e4m3\.e4m3",
    ("nvfp4", "sm_100"): r"tcgen05\.mma\S+kind::mxf4nvf4\.block_scale\.block16",
    ("mxfp4", "sm_100"): r"tcgen05\.mma\S+kind::mxf4\.block_scale\.block32",
    ("mxfp8", "sm_100"): r"tcgen05\.mma\S+kind::mxf8f6f4\.block_scale\.block32",
    ("fp8", "sm_100"): r"tcgen05\.mma\S+kind::f8f6f4",
    ("nvfp4", "sm_120"): r"mma\.sync\S+mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3",
    ("mxfp4", "sm_120"): r"mma\.sync\S+mxf4nvf4\.block_scale\.scale_vec::2X\.f32\.e2m1\.e2m1\.f32\.ue8m0",
    ("mxfp8", "sm_120"): r"mma\.sync\S+mxf8f6f4\.block_scale\.scale_vec::1X\.f32\.e4m3\.e4m3\.f32\.ue8m0",
    ("fp8", "sm_120"): r"mma\.sync\S+mxf8f6f4\.block_scale\.scale_vec::1X\.f32\.e4m3\.e4m3\.f32\.ue8m0",
}
"""The tensor-core instruction that a kind of operands is meant for, by chip, as a pattern of its PTX."""


def variants() -> list[Variant]:
    """For the kernel report: one product a form, 256 x 256 x 1024; "elements" are those of the output."""
    (m, n, k), out = (256, 256, 1024), []
    pairs = {
        ("nvfp4", "nvfp4_2d"): "nvfp4", ("mxfp4", "mxfp4"): "mxfp4", ("mxfp8", "mxfp8"): "mxfp8",
        ("fp8_tensor", "fp8_tensor"): "fp8", ("fp8_1x128", "fp8_128x128"): "fp8",
    }  # fmt: skip
    for (name_a, name_b), known in pairs.items():
        f, g = FORMATS[name_a], FORMATS[name_b]

        def run(arch: str, start: Callable[[Any], None], f: Any = f, g: Any = g) -> None:
            swizzled = form(f, g) == "scaled"
            a, b = (Coded.of(x.quantize(torch.zeros(rows, k)), swizzled) for x, rows in ((f, m), (g, n)))
            start(gemm_launch(a, b, torch.bfloat16, arch)[0])

        scale_bytes = (1 if form(f, g) == "scaled" else 4) / f.block[1] if f.block[1] else 0
        least = (m + n) * k * (f.bits / 8 + scale_bytes) / (m * n) + 2
        wanted = {chip: (INSTRUCTIONS[known, chip],) for chip in TILES}
        name = f"{name_a} x {name_b}, {m} x {n} x {k}"
        flags: dict[str, Any] = {"trips": "longest", "executes": False, "input": "a_ptr", "tensor_cores": True}
        out.append(Variant("gemm", name, run, m * n, least, wanted, **flags))
    return out
