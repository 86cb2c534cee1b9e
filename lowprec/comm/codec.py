"""Codec: numbers -> the bytes that cross the wire, and back.

A collective moves rows of numbers, one row for each destination. A codec turns a row of ``n`` fp32 or bf16 numbers
into ``payload_bytes(n)`` bytes, laid out as::

    | tensor scale: one fp32, where the format has one | block scales | codes, two to a byte if of 4 bits |

What is in there is what :meth:`lowprec.numerics.Format.quantize` makes of the row, no more and no less: real codes,
real scales, and a size that is counted and not estimated. The payload is bytes because no network library carries fp8
or fp4, and because sums must not be taken in them: :meth:`Codec.decode_sum` decodes and adds in fp32, row by row.

========= ============= ================================= ============== ===========================================
codec     codes         scales                            bits a value   relative squared error of Gaussian data
========= ============= ================================= ============== ===========================================
``fp32``  fp32          none                              32             0
``bf16``  bf16          none                              16             2.8e-6
``fp8``   E4M3          fp32, one a 128                   8.25           6.6e-4
``int8``  -127 .. 127   fp32, one a 128                   8.25           4.2e-5
``int4``  -7 .. 7       UE5M3, one a 32; fp32, one a row  4.25 + 32/n    9.5e-3
``nvfp4`` E2M1          E4M3, one a 16; fp32, one a row   4.5 + 32/n     9.1e-3
========= ============= ================================= ============== ===========================================

A row of a sharded model's gradient holds many parameters, whose gradients differ by orders of magnitude. Blocks with
an fp32 scale of their own (fp8, int8) do not mind. The E4M3 scales of NVFP4 reach 2e5 below the row's largest block:
what is 1e-7 of it becomes zero, unless error feedback collects it. So ``int4`` has scales of five exponent bits
(arXiv:2609.02846), which reach 8e9 below it with the same byte. Powers of two (E8M0) would reach further, but double
the error (2.1e-2), and an fp32 scale would cost 0.75 bits a value for an error of 9.4e-3.

``rotation`` multiplies blocks of so many values by a fixed orthogonal matrix first (:mod:`lowprec.numerics.hadamard`)
and undoes it after the sum, so that an outlier is shared out before it sets a scale. ``rounding="stochastic"`` is
unbiased: a value's mean over random bits is the value. (Four-bit formats then leave a block the room of 1/17 that its
scale may lose when it is rounded itself; in blocks 3e-5 (nvfp4) or 1e-9 (int4) of the row's largest, scales are
subnormal and may lose more.)

On a GPU, where Triton is installed, encode, decode and decode_sum are kernels (:mod:`lowprec.kernels.triton.wire`):
the same bytes and bits, every payload read once. Rotations other than by 16 to 128 are left to plain torch.

NaN and infinity make every value under their scale decode to NaN (with a tensor scale: the whole row's), visible to
whoever checks the sum. What this is not: entropy coding or sparsification; sizes do not depend on the data.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.kernels.cpu import qdq
from lowprec.numerics import ELEMENTS, FORMATS, Format, QTensor, Stream, fixed_signs, rotate
from lowprec.numerics.hadamard import check_size
from lowprec.numerics.scale import FLT_MAX, SCALE_BITS, load, store

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZED = {
    "fp8": FORMATS["fp8_1x128"],
    "int8": Format("int8_1x128", "int8", (1, 128)),
    "int4": Format("int4_1x32", "int4", (1, 32), "ue5m3", tensor_scale="row", tensor_max=61440.0, zero="min"),
    "nvfp4": replace(FORMATS["nvfp4_row"], zero="min"),
}
ROUNDINGS = ("nearest", "stochastic")
_PIECE = 1 << 17  # values that are decoded at a time, so that temporaries stay in cache; a multiple of every block


@dataclass(frozen=True)
class Codec:
    """How numbers travel. Frozen and hashable: it is data.

    Attributes:
        name: ``fp32``, ``bf16``, ``fp8``, ``int8``, ``int4`` or ``nvfp4``.
        rotation: values that are rotated together before they are quantised, a power of two; 0 = none.
        rounding: ``nearest`` or ``stochastic``.
    """

    name: str
    rotation: int = 0
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        names = (*PLAIN, *QUANTIZED)
        if self.name not in names:
            raise ValueError(f"unknown codec '{self.name}'; choose one of {', '.join(names)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"unknown rounding '{self.rounding}' of codec {self.name}; choose nearest or stochastic")
        if self.name in PLAIN and (self.rotation or self.rounding != "nearest"):
            raise ValueError(f"codec {self.name} does not quantise: it takes no rotation and rounds to nearest")
        if self.rotation:
            check_size(self.rotation)

    def __str__(self) -> str:
        rotated = f" rotated by {self.rotation}" if self.rotation else ""
        return f"{self.name}{rotated}{', stochastic' if self.rounding == 'stochastic' else ''}"

    @functools.cached_property
    def format(self) -> Format | None:
        """What rows are quantised to; None for fp32 and bf16."""
        format = QUANTIZED.get(self.name)
        if format and format.tensor_scale and self.rounding == "stochastic":
            return replace(format, guard=17 / 16)  # eight-bit scales are rounded, and must not make codes clip
        return format

    def width(self, n: int) -> int:
        """How many codes a row of n values becomes: rotated blocks are whole, and 4-bit codes come in pairs."""
        unit = self.rotation or (2 if self.format and self.format.bits <= 4 else 1)
        return -(-n // unit) * unit

    def payload_bytes(self, n: int) -> int:
        """Bytes of a row of n values."""
        return self._layout(n)[2]

    def bits_per_value(self, n: int) -> float:
        """Bits a value of a row of n values costs, scales and padding included."""
        return 8 * self.payload_bytes(n) / n

    def _layout(self, n: int) -> tuple[int, int, int]:
        """Where in a row's bytes the block scales begin, the codes begin, and the end is."""
        if self.format is None:
            return 0, 0, n * PLAIN[self.name].itemsize
        width, block = self.width(n), self.format.block[1]
        scales = 4 if n and self.format.tensor_scale else 0
        codes = scales + -(-width // block) * SCALE_BITS[self.format.scale] // 8
        return scales, codes, codes + (width // 2 if self.format.bits <= 4 else width)

    @torch.no_grad()
    def encode(self, x_RN: Tensor, stream: Stream | None = None, key: str = "", kernels: bool | None = None) -> Tensor:
        """Rows -> bytes.

        Args:
            x_RN: (rows, n), fp32 or bf16, any device.
            stream: random bits of stochastic rounding. key: what they are for; different for every rank.
            kernels: whether Triton's do it, if they serve; None: for tensors on a GPU, where Triton is installed.

        Returns:
            (rows, payload_bytes(n)) uint8.

        Raises:
            ValueError: if x is not such a matrix, or stochastic rounding has no stream.
        """
        if x_RN.dim() != 2 or x_RN.dtype not in PLAIN.values():
            raise ValueError(
                f"codec {self.name} encodes fp32 or bf16 rows (rows, n), got {x_RN.dtype} of shape"
                f" {tuple(x_RN.shape)}; reshape or cast it"
            )
        format = self.format
        if format is None:
            return x_RN.to(PLAIN[self.name]).contiguous().view(torch.uint8)
        if self.rounding == "stochastic" and stream is None:
            raise ValueError(f"codec {self} needs random bits: pass the step's Stream, or round to nearest")
        rows, n = x_RN.shape
        scales_at, codes_at, end = self._layout(n)
        payload_RB = x_RN.new_empty(rows, end, dtype=torch.uint8)
        if not payload_RB.numel():
            return payload_RB
        random = (stream, key) if self.rounding == "stochastic" and stream else None
        if fast := self._kernels(x_RN, n, kernels):
            return fast[0].encode(x_RN, fast[1], random)
        pad = self.width(n) - n
        x_RN = F.pad(x_RN, (0, pad)) if pad else x_RN
        q = _quantize(x_RN, format, self.rotation, random)
        if q.tensor_scale is not None:
            payload_RB[:, :scales_at] = q.tensor_scale.contiguous().view(torch.uint8)
        payload_RB[:, scales_at:codes_at] = q.scales.view(torch.uint8)
        if format.bits <= 4:  # as QTensor.pack, without strides: of the bytes (low, high) of a word, low | high << 4
            pairs = q.codes.view(torch.int16)
            payload_RB[:, codes_at:] = pairs | pairs >> 4
        else:
            payload_RB[:, codes_at:] = q.codes
        return payload_RB

    @torch.no_grad()
    def decode(
        self, payload_RB: Tensor, n: int, dtype: torch.dtype = torch.float32, kernels: bool | None = None
    ) -> Tensor:
        """Bytes (rows, payload_bytes(n)) -> values (rows, n) in ``dtype``: computed in fp32 and rounded once.

        Raises:
            ValueError: if the payload is not one of rows of n values.
        """
        self._check(payload_RB, n)
        if self.format is None:
            return _as(PLAIN[self.name], payload_RB).to(dtype)
        if fast := self._kernels(payload_RB, n, kernels, dtype):
            return fast[0].decode(payload_RB, fast[1], dtype)
        out = payload_RB.new_empty(len(payload_RB), self.width(n), dtype=dtype)
        for row, to in zip(payload_RB, out):
            for start, stop in self._pieces(row, n):
                values = to[start:stop]
                if self.rotation or dtype != torch.float32:
                    values.copy_(self._unrotate(self._values(row, n, start, stop)))
                else:
                    self._values(row, n, start, stop, values)
        return out[:, :n].contiguous()

    @torch.no_grad()
    def decode_sum(self, payload_RB: Tensor, n: int, kernels: bool | None = None) -> Tensor:
        """The sum of the rows, (n,) fp32, added in the order of the rows; what a reduce-scatter ends with.

        A rotation is undone once, after the sum.
        """
        self._check(payload_RB, n)
        if not len(payload_RB):
            raise ValueError("there is no row to sum; a group has at least one rank")
        if fast := self._kernels(payload_RB, n, kernels):
            return fast[0].decode(payload_RB, fast[1], sum_rows=True)
        out = payload_RB.new_empty(self.width(n), dtype=torch.float32)
        for start, stop in self._pieces(payload_RB, n):
            total = self._values(payload_RB[0], n, start, stop, out[start:stop])
            for row in payload_RB[1:]:
                total += self._values(row, n, start, stop)
            if self.rotation:
                total.copy_(self._unrotate(total))
        return out[:n]

    def _kernels(
        self, rows: Tensor, n: int, wanted: bool | None, dtype: torch.dtype = torch.float32
    ) -> tuple[ModuleType, Any] | None:
        """Triton's kernels, and a row of n values as they see it, where they are wanted and serve."""
        if wanted is None:
            wanted = rows.device.type == "cuda" and _has_triton()
        if (
            not wanted or not rows.numel() or len(rows) > 65535 or n >= 1 << 31
        ):  # CUDA's limit of programs; 32-bit places
            return None
        from lowprec.kernels.triton import wire

        row = wire.Row(self.format or PLAIN[self.name], self.rotation, n, self.width(n), *self._layout(n))
        return None if wire.refuse(row, dtype) else (wire, row)

    def _check(self, payload_RB: Tensor, n: int) -> None:
        if payload_RB.dtype != torch.uint8 or payload_RB.dim() != 2 or payload_RB.shape[1] != self.payload_bytes(n):
            raise ValueError(
                f"codec {self}: rows of {n} values are (rows, {self.payload_bytes(n)}) uint8, got {payload_RB.dtype} of"
                f" shape {tuple(payload_RB.shape)}; both sides must use the same codec and sizes"
            )

    def _unrotate(self, x: Tensor) -> Tensor:
        return rotate(x, self.rotation, fixed_signs(self.rotation, x.device), inverse=True) if self.rotation else x

    def _pieces(self, payload: Tensor, n: int) -> Iterator[tuple[int, int]]:
        width = self.width(n)
        step = max(_PIECE, self.rotation) if payload.device.type == "cpu" else max(width, 1)
        return ((start, min(start + step, width)) for start in range(0, width, step))

    def _values(self, row_B: Tensor, n: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Values ``start`` to ``stop`` of one row, fp32, still rotated; start is a multiple of the block."""
        out = row_B.new_empty(stop - start, dtype=torch.float32) if out is None else out
        scales_at, codes_at, _ = self._layout(n)
        format = self.format
        if format is None:
            itemsize = PLAIN[self.name].itemsize
            return out.copy_(_as(PLAIN[self.name], row_B[start * itemsize : stop * itemsize]))
        _decode_element(format.element, row_B[codes_at:], start, stop, out)
        block, bytes_each = format.block[1], SCALE_BITS[format.scale] // 8
        first, last = start // block, -(-stop // block)
        stored = row_B[scales_at + first * bytes_each : scales_at + last * bytes_each]
        scales = load(_as(_STORED[format.scale], stored), format.scale)
        whole = (stop - start) // block
        out[: whole * block].view(whole, block).mul_(scales[:whole, None])
        out[whole * block :].mul_(scales[-1])
        if format.tensor_scale:
            out.mul_(_as(torch.float32, row_B[:4]))
        return out.clamp_(-FLT_MAX, FLT_MAX)


CODECS: dict[str, Codec] = {name: Codec(name) for name in (*PLAIN, *QUANTIZED)}
"""Every codec by its name, without rotation, to nearest."""

_STORED = {"fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "ue5m3": torch.uint8}


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _as(dtype: torch.dtype, bytes_: Tensor) -> Tensor:
    """Bytes read as numbers, copied if they do not lie in one piece or not where such numbers may lie."""
    flat = bytes_.reshape(-1)
    flat = flat.clone() if flat.storage_offset() % dtype.itemsize else flat
    return flat.view(dtype).view(*bytes_.shape[:-1], bytes_.shape[-1] // dtype.itemsize)


def _quantize(x_RN: Tensor, format: Format, rotation: int, random: tuple[Stream, str] | None) -> QTensor:
    """``format.quantize`` of the rotated rows; by the C++ kernels where they serve: the same bits, but faster."""
    x_RN = x_RN.float() if rotation else x_RN
    if x_RN.device.type == "cpu" and qdq.refuses(format) is None and qdq.load()[0] is not None:
        factors = None
        if rotation and rotation <= qdq.LARGEST_ROTATION:
            factors = fixed_signs(rotation) * rotation**-0.5
        elif rotation:
            x_RN = rotate(x_RN, rotation, fixed_signs(rotation))
        q = qdq.run(x_RN.contiguous(), format, torch.uint8, random, factors=factors)
        return QTensor(q.values, store(q.scales, format.scale), q.level, format)
    x_RN = rotate(x_RN, rotation, fixed_signs(rotation, x_RN.device)) if rotation else x_RN
    noise = random[0].noise(random[1], x_RN.shape, x_RN.device) if random else None
    return format.quantize(x_RN, noise)


def _decode_element(name: str, codes_B: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Element values of the codes ``start`` to ``stop`` of a row into ``out`` (stop - start,) fp32."""
    if name == "int8":
        out.copy_(codes_B[start:stop].view(torch.int8))
    elif name == "e4m3":  # as an fp16 number its exponent is 8 less: sign to bit 15, the rest up by 7
        half = (codes_B[start:stop].view(torch.int8).to(torch.int16) << 7).bitwise_and_(~0x4000)
        out.copy_(half.view(torch.float16)).mul_(256.0)
    else:  # two 4-bit codes a byte: look both up at once
        pairs = codes_B[start // 2 : stop // 2].to(torch.int32)
        out.copy_(_pairs(name, codes_B.device).index_select(0, pairs).view(torch.float32))


@functools.cache
def _pairs(element: str, device: torch.device) -> Tensor:
    """(256,) int64: the two fp32 values of every byte of packed 4-bit codes, side by side."""
    byte = torch.arange(256, device="cpu")
    codes = torch.stack([byte & 15, byte >> 4], dim=1).to(torch.uint8)
    return ELEMENTS[element].decode(codes).view(torch.int64).flatten().to(device)
