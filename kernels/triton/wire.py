"""Encode, decode and decode-and-sum of the codecs of :mod:`lowprec.comm.codec`: rows of numbers <-> rows of bytes.

A row of n numbers is, byte for byte as `Codec.encode` has it::

    | tensor scale: one fp32, where the format has one | block scales | codes, two to a byte if of 4 bits |

    encode       size = max |x| of a block;  (multiplier, scale) = rule(size);  code = round(x * multiplier)
    decode       value = clamp(code * scale * tensor scale)
    decode_sum   ((value of row 0 + value of row 1) + ...), fp32, in the order of the rows; a rotation undone after it

A thread owns *eights*, eight neighbouring values: one word of 4-bit codes or two of 8-bit codes, 16-byte accesses of x
and of the result.  A block's maximum is taken over the 2 to 16 threads that share it.

Memory, bytes a value, n long (in: 4 for fp32, 2 for bf16; out: 4, or 2 where bf16 is asked for)::

                                   fp32   bf16   fp8       int8      int4      nvfp4
    payload P                      4      2      1 + 4/128 1 + 4/128 1/2 + 1/32  1/2 + 1/16
    encode     passes over x       1      1      1         1         2         2          P written once
    decode     P + out             decode_sum of R rows   R P + 4: every payload once, the sum once

The second pass of int4 and nvfp4 is `row_amax_kernel`: their scales are relative to the row's maximum.

Where words may lie.  Rows follow one another without padding, so codes begin anywhere.  They move as one word an eight
(4 bits) or two at once (8 bits), neighbours in neighbouring threads, if the rows' pitch and the begin of the codes are
multiples of 4 (8) bytes: that is n a multiple of 128 for int4, of 64 for nvfp4, of 256 for fp8 and int8 (the tensor
scale shifts 4-bit rows by 4 bytes, so 16-byte accesses of codes are out of reach).  Else they move byte by byte: the
same bytes from memory, four times the instructions.  x and the result move by 16 bytes if n is a multiple of 16.

What this is not: the codec.  fp32 and bf16 are encoded by a cast, one pass as it is; rotations other than by 16 .. 128
are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.format import Format
from lowprec.numerics.hadamard import fixed_signs
from lowprec.numerics.stream import Stream

from .codes import four_byte_word, words_of
from .eights import join_eight, load_eights, store_eights
from .launch import conversion
from .memory import Launch, arch_of, signed
from .noise import element_noise, group_noise
from .recipe import recipe_of
from .scales import FLT_MAX, decode_scale, finite, fp32_scale, two_level_scale

ROTATIONS = (16, 32, 64, 128)
_TILE = 2048  # values of a program of four warps, two eights a thread


@triton.jit
def butterfly(x, N: tl.constexpr):
    """Blocks of N = 16 .. 128 along the flattened eights (E, 8) times Sylvester's matrix: sums and differences at
    distances 1, 2, 4 in a thread's registers, then of its eight with those of threads 1, 2, 4, 8 away."""
    E: tl.constexpr = x.shape[0]
    for _ in tl.static_range(3):  # pairs neighbours, and moves the lowest bit of the index to the top
        u, v = tl.split(tl.reshape(x, (E, 4, 2)))
        x = tl.reshape(tl.permute(tl.join(u + v, u - v), (0, 2, 1)), (E, 8))
    place = tl.arange(0, N // 8)[None, :, None]
    x = tl.reshape(x, (E * 8 // N, N // 8, 8))
    for i in tl.static_range(4):
        if 8 << i < N:
            other = tl.gather(x, tl.broadcast_to(place ^ (1 << i), x.shape), 1)
            x = other + tl.where((place & (1 << i)) == 0, x, -x)
    return tl.reshape(x, (E, 8))


@triton.jit
def factors(factors_ptr, e, N: tl.constexpr):
    return tl.load(factors_ptr + (e % (N // 8))[:, None] * 8 + tl.arange(0, 8)[None, :])


@triton.jit
def load_words(words_ptr, bytes_ptr, at, index, limit, UNIT: tl.constexpr):
    """Words `index` (any shape, int32) from byte `at` (int64) on; what lies beyond `limit` bytes is not read."""
    if UNIT >= 4:
        return tl.load(words_ptr + (at >> 2) + index, mask=index * 4 < limit, other=0)
    else:
        b0 = tl.load(bytes_ptr + at + index * 4, mask=index * 4 < limit, other=0).to(tl.int32)
        b1 = tl.load(bytes_ptr + at + index * 4 + 1, mask=index * 4 + 1 < limit, other=0).to(tl.int32)
        b2 = tl.load(bytes_ptr + at + index * 4 + 2, mask=index * 4 + 2 < limit, other=0).to(tl.int32)
        b3 = tl.load(bytes_ptr + at + index * 4 + 3, mask=index * 4 + 3 < limit, other=0).to(tl.int32)
        return four_byte_word(b0, b1, b2, b3)


@triton.jit
def store_words(words_ptr, bytes_ptr, at, index, word, limit, UNIT: tl.constexpr):
    """Inverse of `load_words`."""
    if UNIT >= 4:
        tl.store(words_ptr + (at >> 2) + index, word, mask=index * 4 < limit)
    else:
        for i in tl.static_range(4):
            byte = ((word >> (8 * i)) & 255).to(tl.uint8)
            tl.store(bytes_ptr + at + index * 4 + i, byte, mask=index * 4 + i < limit)


@triton.jit
def minifloat_value(top, MANTISSA: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr):
    """Minifloats of BITS bits in the highest bits of int32 -> fp32: their bits as those of a tiny fp32, grown."""
    field: tl.constexpr = (((1 << (BITS - 1)) - 1) << (23 - MANTISSA)) - (1 << 31)
    power: tl.constexpr = 2.0 ** (127 - BIAS)
    return ((top >> (9 + MANTISSA - BITS)) & field).to(tl.float32, bitcast=True) * power


@triton.jit
def element_value(top, ELEMENT: tl.constexpr):
    """Codes in the highest bits of int32, with anything below -> fp32."""
    if ELEMENT == "e2m1":
        return minifloat_value(top, 1, 4, 1)
    elif ELEMENT == "e4m3":
        return minifloat_value(top, 3, 8, 7)
    elif ELEMENT == "int8":  # the bits of 2^23 + (code + 128)
        return (((top >> 24) & 255) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    else:
        tl.static_assert(ELEMENT == "int4")
        return (((top >> 28) & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def scale_value(byte, SCALE: tl.constexpr):
    """Scale bytes (int32) -> fp32; NaN's byte is the largest."""
    if SCALE == "e4m3":
        return tl.where(byte == 0x7F, float("nan"), minifloat_value(byte << 24, 3, 8, 7))
    else:
        tl.static_assert(SCALE == "ue5m3")
        return tl.where(byte == 0xFF, float("nan"), minifloat_value(byte << 23, 3, 9, 15))


@triton.jit
def block_sizes(x, BLOCK: tl.constexpr):
    """Eights (E, 8) -> max |x| of their blocks, (E 8 / BLOCK,), as integer patterns: NaN and infinity win."""
    E: tl.constexpr = x.shape[0]
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.max(tl.reshape(bits, (E * 8 // BLOCK, BLOCK // 8)), 1)


@triton.jit
def rotated_eights(x_ptr, factors_ptr, e, n, WHOLE: tl.constexpr, ROTATION: tl.constexpr):
    x = load_eights(x_ptr, e, n, WHOLE)
    if ROTATION:
        x = butterfly(x * factors(factors_ptr, e, ROTATION), ROTATION)
    return x


@triton.jit
def row_amax_kernel(x_ptr, amax_ptr, factors_ptr, n, pitch, WHOLE: tl.constexpr, ROTATION: tl.constexpr,
                    TILE: tl.constexpr):  # fmt: skip
    """The first pass of formats with a scale for the row: max |x| of every row, as integer patterns into zeros."""
    row = tl.program_id(1)
    e = tl.program_id(0) * (TILE // 8) + tl.arange(0, TILE // 8)
    x = rotated_eights(x_ptr + row.to(tl.int64) * pitch, factors_ptr, e, n, WHOLE, ROTATION)
    tl.atomic_max(amax_ptr + row, tl.max(block_sizes(x, 8), 0), sem="relaxed")


@triton.jit
def quiet_bits(x):
    """fp32 -> its bits, every NaN the same."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit(do_not_specialize=["key_low", "key_high", "step", "micro"])
def encode_kernel(x_ptr, words_ptr, bytes_ptr, amax_ptr, factors_ptr, n, pitch, width, row_bytes, codes_at,
                  code_bytes, key_low, key_high, step, micro, F: tl.constexpr, UNIT: tl.constexpr,
                  WHOLE: tl.constexpr, GROUPS: tl.constexpr, CONVERT: tl.constexpr, STOCHASTIC: tl.constexpr,
                  ROTATION: tl.constexpr, INPUT_MAX: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Values TILE i .. of row j: programs (i, j).  GROUPS: noise of eight neighbours is of one Philox call."""
    E: tl.constexpr = TILE // 8
    row = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * E + tl.arange(0, E)
    start = row * row_bytes
    x = rotated_eights(x_ptr + row * pitch, factors_ptr, e, n, WHOLE, ROTATION)
    size = finite(block_sizes(x, F.con).to(tl.float32, bitcast=True))
    block = tl.program_id(0) * (TILE // F.con) + tl.arange(0, TILE // F.con)
    inside = block * F.con < width
    if F.scale == "fp32":
        multiplier, scale = fp32_scale(size, INPUT_MAX, F)
        store_words(words_ptr, bytes_ptr, start, block, quiet_bits(scale), codes_at, UNIT)
    else:
        amax = finite(tl.load(amax_ptr + row).to(tl.float32, bitcast=True))
        multiplier, scale = two_level_scale(size, amax, F)
        tl.store(bytes_ptr + start + 4 + block, scale, mask=inside)
        first = tl.arange(0, 1) + tl.program_id(0)
        level = tl.zeros((1,), tl.int32) + quiet_bits(decode_scale(amax, F))
        store_words(words_ptr, bytes_ptr, start, first, level, 4, UNIT)
    spread = tl.broadcast_to(multiplier[:, None], (TILE // F.con, F.con // 8))
    multiplier = tl.reshape(spread, (E,))
    y = x * multiplier[:, None]
    noise = y
    if STOCHASTIC and GROUPS:
        group = row * (width >> 3) + e
        noise = tl.reshape(group_noise(group, key_low, key_high, step, micro), (E, 8))
    elif STOCHASTIC:
        index = row * width + e[:, None] * 8 + tl.arange(0, 8)[None, :]
        noise = element_noise(index, key_low, key_high, step, micro)
    words = words_of(y, noise, 0, 0, F, CONVERT, STOCHASTIC)
    broken = multiplier != multiplier  # NaN has no code: poisoned blocks store zeros
    if F.bits == 4:
        store_words(words_ptr, bytes_ptr, start + codes_at, e, tl.where(broken, 0, words[0]), code_bytes, UNIT)
    else:
        pair = tl.where(broken[:, None], 0, tl.join(words[0], words[1]))
        index = e[:, None] * 2 + tl.arange(0, 2)[None, :]
        if UNIT == 8:
            at = words_ptr + (start + codes_at >> 3) * 2
            tl.store(at + index, pair, mask=(e * 8 < code_bytes)[:, None])
        else:
            store_words(words_ptr, bytes_ptr, start + codes_at, index, pair, code_bytes, UNIT)


@triton.jit
def clamped(value):
    return tl.clamp(value, -FLT_MAX, FLT_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_values(words_ptr, bytes_ptr, start, e, width, codes_at, code_bytes, ELEMENT: tl.constexpr,
               SCALE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Eights (E, 8) fp32 of the row whose bytes begin at `start`, still rotated."""
    at = start + codes_at
    if ELEMENT == "e2m1" or ELEMENT == "int4":
        w = load_words(words_ptr, bytes_ptr, at, e, code_bytes, UNIT)
        top = join_eight(w << 28, w << 24, w << 20, w << 16, w << 12, w << 8, w << 4, w)
    else:
        index = e[:, None] * 2 + tl.arange(0, 2)[None, :]
        if UNIT == 8:
            pair = tl.load(words_ptr + (at >> 3) * 2 + index, mask=(e * 8 < code_bytes)[:, None], other=0)
        else:
            pair = load_words(words_ptr, bytes_ptr, at, index, code_bytes, UNIT)
        a, b = tl.split(pair)
        top = join_eight(a << 24, a << 16, a << 8, a, b << 24, b << 16, b << 8, b)
    value = element_value(top, ELEMENT)
    block = e // (BLOCK // 8)
    if SCALE == "fp32":
        scale = load_words(words_ptr, bytes_ptr, start, block, codes_at, UNIT).to(tl.float32, bitcast=True)
        value = clamped(value * scale[:, None])
    else:
        byte = tl.load(bytes_ptr + start + 4 + block, mask=e * 8 < width, other=0).to(tl.int32)
        level = load_words(words_ptr, bytes_ptr, start, tl.zeros((), tl.int32), 4, UNIT).to(tl.float32, bitcast=True)
        value = (value * scale_value(byte, SCALE)[:, None]) * level
        if level > 1e30:  # the largest code times the largest scale is less than 1e6
            value = clamped(value)
    return value


@triton.jit
def decode_kernel(words_ptr, bytes_ptr, out_ptr, factors_ptr, count, n, width, row_bytes, codes_at, code_bytes,
                  ELEMENT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
                  WHOLE: tl.constexpr, ROTATION: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Values TILE i .. of the sum of rows count j .. count j + count - 1 into row j of out: programs (i, j).

    fp32 and bf16 rows (ELEMENT) come as `words_ptr` of their dtype, with `row_bytes` their pitch in numbers.
    """
    E: tl.constexpr = TILE // 8
    j = tl.program_id(1)
    e = tl.program_id(0) * E + tl.arange(0, E)
    total = tl.full((E, 8), -2147483648, tl.int32).to(tl.float32, bitcast=True)  # -0, which leaves the first row as is
    for row in range(j * count, j * count + count):
        start = (tl.zeros((), tl.int64) + row) * row_bytes
        if ELEMENT == "fp32" or ELEMENT == "bf16":
            total += load_eights(words_ptr + start, e, n, WHOLE)
        else:
            total += row_values(words_ptr, bytes_ptr, start, e, width, codes_at, code_bytes, ELEMENT, SCALE, BLOCK,
                                UNIT)  # fmt: skip
    if ROTATION:
        total = butterfly(total, ROTATION) * factors(factors_ptr, e, ROTATION)
    store_eights(out_ptr + j.to(tl.int64) * n, total, e, n, WHOLE)


class Row(NamedTuple):
    """Where a row of n values lies in its bytes: what a codec says of itself."""

    stored: Format | torch.dtype  # what the row is quantised to, or the dtype it is cast to
    rotation: int
    n: int
    width: int  # codes of a row
    scales_at: int
    codes_at: int
    end: int  # bytes of a row

    def unit(self, payload_RB: Tensor) -> int:
        """What the kernels may move codes by: 8 (8-bit codes) or 4 bytes, or 1."""
        assert isinstance(self.stored, Format)
        whole = self.width % 8 == 0
        for unit in (8, 4) if self.stored.bits == 8 else (4,):
            if whole and not any(v % unit for v in (payload_RB.data_ptr(), payload_RB.stride(0), self.codes_at)):
                return unit
        return 1


def refuse(row: Row, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels do not serve a codec's rows, or do not decode them to a dtype; or None."""
    if row.rotation and row.rotation not in ROTATIONS:
        return f"rotation by {row.rotation}: the wire kernels rotate blocks of 16 to 128 values"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype}: the wire kernels write fp32 and bf16"
    return None


def _serve(row: Row, dtype: torch.dtype = torch.float32) -> None:
    reason = refuse(row, dtype)
    if reason:
        raise ValueError(f"{reason[0].upper()}{reason[1:]}; use the codec itself.")


def _factors(row: Row, device: torch.device) -> Tensor:
    """What a rotation multiplies by; a dummy without one."""
    return fixed_signs(row.rotation, device) * row.rotation**-0.5 if row.rotation else torch.empty(1, device=device)


def _views(payload_RB: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """The payload from its first byte on as words and as bytes, one-dimensional."""
    bytes_B = payload_RB.as_strided(((len(payload_RB) - 1) * payload_RB.stride(0) + payload_RB.shape[1],), (1,))
    return (bytes_B[: bytes_B.numel() // 4 * 4].view(torch.int32) if unit > 1 else bytes_B), bytes_B


def encode(x_RN: Tensor, row: Row, random: tuple[Stream, str] | None = None, *, arch: str | None = None,
           start: Callable[[Launch], None] = Launch.__call__) -> Tensor:  # fmt: skip
    """Rows (R, n) of fp32 or bf16 -> bytes (R, row.end); random: stream and key of stochastic rounding.

    Raises:
        ValueError: where `refuse` has a reason.
    """
    _serve(row)
    assert isinstance(row.stored, Format)
    recipe = recipe_of(row.stored)
    x_RN = x_RN if x_RN.stride(1) == 1 else x_RN.contiguous()
    payload_RB = torch.empty(len(x_RN), row.end, dtype=torch.uint8, device=x_RN.device)
    amax = torch.zeros(len(x_RN), dtype=torch.int32, device=x_RN.device)
    shared = {"x_ptr": x_RN, "amax_ptr": amax, "factors_ptr": _factors(row, x_RN.device), "n": row.n,
              "pitch": x_RN.stride(0)}  # fmt: skip
    flags = {"WHOLE": row.n % 8 == 0, "ROTATION": row.rotation, "TILE": _TILE}
    grid = (-(-row.width // _TILE), len(x_RN))
    if row.stored.tensor_scale:
        start(Launch(row_amax_kernel, grid, shared, flags, 4))
    unit = row.unit(payload_RB)
    words, bytes_ = _views(payload_RB, unit)
    stream, key = random or (Stream(), "")
    low, high = stream.key(key)
    args = shared | {
        "words_ptr": words, "bytes_ptr": bytes_, "width": row.width, "row_bytes": payload_RB.stride(0),
        "codes_at": row.codes_at, "code_bytes": row.end - row.codes_at, "key_low": signed(low),
        "key_high": signed(high), "step": signed(stream.step), "micro": signed(stream.micro),
    }  # fmt: skip
    constants = flags | {
        "F": recipe, "UNIT": unit, "GROUPS": row.width % 8 == 0, "CONVERT": conversion(arch or arch_of(x_RN), recipe,
        False), "STOCHASTIC": random is not None,
        "INPUT_MAX": torch.finfo(torch.float32 if row.rotation else x_RN.dtype).max,
    }  # fmt: skip
    start(Launch(encode_kernel, grid, args, constants, 4))
    return payload_RB


def decode(payload_RB: Tensor, row: Row, dtype: torch.dtype = torch.float32, *, sum_rows: bool = False,
           start: Callable[[Launch], None] = Launch.__call__) -> Tensor:  # fmt: skip
    """Bytes (R, row.end) -> values (R, n) in dtype, or their sum over the rows, (n,).

    Raises:
        ValueError: where `refuse` has a reason.
    """
    _serve(row, dtype)
    payload_RB = payload_RB if payload_RB.stride(1) == 1 else payload_RB.contiguous()
    rows = len(payload_RB)
    out = torch.empty(1 if sum_rows else rows, row.n, dtype=dtype, device=payload_RB.device)
    if isinstance(row.stored, Format):
        unit, pitch = row.unit(payload_RB), payload_RB.stride(0)
        words, bytes_ = _views(payload_RB, unit)
        constants = {"ELEMENT": row.stored.element, "SCALE": row.stored.scale, "BLOCK": row.stored.block[1]}
    else:
        itemsize = row.stored.itemsize
        if any(v % itemsize for v in (payload_RB.data_ptr(), payload_RB.stride(0), payload_RB.storage_offset())):
            payload_RB = payload_RB.clone(memory_format=torch.contiguous_format)
        unit, pitch, bytes_ = 1, payload_RB.stride(0) // itemsize, _views(payload_RB, 1)[1]
        words = bytes_.view(row.stored)
        constants = {"ELEMENT": "fp32" if itemsize == 4 else "bf16", "SCALE": "none", "BLOCK": 8}
    args = {
        "words_ptr": words, "bytes_ptr": bytes_, "out_ptr": out, "factors_ptr": _factors(row, out.device),
        "count": rows if sum_rows else 1, "n": row.n, "width": row.width, "row_bytes": pitch,
        "codes_at": row.codes_at, "code_bytes": row.end - row.codes_at,
    }  # fmt: skip
    constants |= {"UNIT": unit, "WHOLE": row.n % 8 == 0, "ROTATION": row.rotation, "TILE": _TILE}
    start(Launch(decode_kernel, (-(-row.width // _TILE), len(out)), args, constants, 4))
    return out[0] if sum_rows else out
