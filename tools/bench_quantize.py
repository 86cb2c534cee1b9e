"""bench_quantize: what quantising a tensor costs, and whether it gives the right bits.

    python tools/bench_quantize.py
    python tools/bench_quantize.py --formats nvfp4,mxfp8 --dtypes bfloat16 --threads 1
    python -m lowprec.tools.bench_quantize --json

Quantise and dequantise a matrix, in fp32 and bf16, to nearest and stochastically, against a plain copy of it into
memory that is there already (``y.copy_(x)``). Every measurement stands beside one of the copy, and a row shows the
median of the ratios of such neighbours, which a busy machine disturbs far less than the times themselves.

A row cannot be quick by being wrong: the values must equal those of the definition (``Format.quantize``, plain
torch), bit for bit with the sign of zero, on a matrix of outliers, zeros, tiny and huge blocks, NaN and infinity, and
on a slice of the matrix that was timed. Otherwise the exit code is 1 and a sentence says which row.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in launch/train.py: waiting threads sleep after a short spin

import torch
from torch import Tensor

from lowprec.kernels.cpu import qdq
from lowprec.numerics import FORMATS, Format, Stream

KEY = "bench"
STREAM = Stream(seed=0, step=3, micro=1, layer="bench_quantize")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE_ROWS = 64  # of the timed matrix; the definition takes some forty passes over them
QUICK = ("nvfp4", "nvfp4_2d", "mxfp4", "mxfp8", "fp8_128x128", "int8_row")


@dataclass(frozen=True)
class Row:
    """One format: how many copies of the matrix quantising and dequantising it takes."""

    format: str
    rounding: str
    dtype: str
    ratio_copy: float
    equal: bool


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, one NaN being as good as another."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    bits = [torch.where(t.isnan(), 0, t).view(integer) for t in (a, b)]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


def awkward(dtype: torch.dtype) -> Tensor:
    """(130, 264): Gaussian with outliers, zero rows and columns, negative zeros, blocks from 1e-38 to 1e37, ties."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(130, 264, generator=generator)
    x[:, 3] *= 100
    x[20:40] = torch.randint(-24, 24, (20, 264), generator=generator) / 4
    x[40:44], x[:, 64:96], x[1] = 0.0, 0.0, -0.0
    x[64:80, :128] *= 1e-38
    x[64:80, 128:] *= 1e-6
    x[96:98] *= 1e37
    return x.to(dtype)


def broken(dtype: torch.dtype) -> Tensor:
    """(130, 264): Gaussian with a NaN and two infinities."""
    x = torch.randn(130, 264, generator=torch.Generator().manual_seed(2))
    x[5, 7], x[100, 200], x[129, 0] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def defined(x: Tensor, format: Format, rounding: str) -> Tensor:
    """Quantised and dequantised by the definition, in x's dtype."""
    noise = STREAM.noise(KEY, x.shape) if rounding == "stochastic" else None
    return format.quantize(x, noise).dequantize(x.dtype)


def fast(x: Tensor, format: Format, rounding: str, out: Tensor | None = None) -> Tensor:
    """... and by the kernels."""
    random = (STREAM, KEY) if rounding == "stochastic" else None
    return qdq.quantize_dequantize(x, format, random, out=out)


def is_equal(x: Tensor, format: Format, rounding: str) -> bool:
    """Whether the kernels give the definition's bits, on awkward matrices and on the first rows of x."""
    for t in (awkward(x.dtype), broken(x.dtype), x[:SAMPLE_ROWS].contiguous()):
        if not same_bits(fast(t, format, rounding), defined(t, format, rounding)):
            return False
    return True


def roundings(format: Format) -> tuple[str, ...]:
    """The roundings of elements that a format admits."""
    chooses, levels = len(format.targets) > 1 or format.second, len(format.element_type.values)
    return ("nearest",) if chooses or levels < 2 else ("nearest", "stochastic")


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(formats: list[str], dtypes: list[str], shape: tuple[int, int], reps: int) -> list[Row]:
    """Benchmark formats on matrices of one shape (rows, k).

    Raises:
        ValueError: if a format is unknown, or the kernels refuse it.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format '{unknown[0]}'; choose from {', '.join(FORMATS)}")
    rows = []
    for dtype in dtypes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
        copied, made = torch.empty_like(x), torch.empty_like(x)
        for name in formats:
            format = FORMATS[name]
            for rounding in roundings(format):
                equal = is_equal(x, format, rounding)
                ratios = []
                for rep in range(reps + 1):
                    copy, own = _seconds(partial(copied.copy_, x)), _seconds(partial(fast, x, format, rounding, made))
                    if rep:  # the first touches the memory
                        ratios.append(own / copy)
                rows.append(Row(name, rounding, dtype, statistics.median(ratios), equal))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [("format", "rounding", "dtype", "/copy", "")]
    cells += [
        (r.format, r.rounding, r.dtype, f"{r.ratio_copy:.2f}", "" if r.equal else "WRONG: not the definition's bits")
        for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    served = [name for name, format in FORMATS.items() if qdq.refuses(format) is None]
    p = argparse.ArgumentParser("bench_quantize", description="Time and check quantise-dequantise against a copy.")
    p.add_argument("--formats", nargs="+", help="names, with spaces or commas (default: all that the kernels serve)")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    p.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("ROWS", "K"))
    p.add_argument("--reps", type=int, default=9, help="measurements of each row (default: %(default)s)")
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's own number)")
    p.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, three measurements")
    p.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    a = p.parse_args(argv)
    if min(a.reps, *a.shape) < 1:
        p.error("--reps and the sizes of --shape must be at least 1")
    if a.threads:
        torch.set_num_threads(a.threads)
    named = [name for names in a.formats or [] for name in names.split(",") if name]
    formats = named or (list(QUICK) if a.quick else served)
    try:
        rows = measure(formats, a.dtypes, tuple(a.shape), min(a.reps, 3) if a.quick else a.reps)
    except (ValueError, RuntimeError) as error:
        print(f"bench_quantize: {error}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(
            f"quantise and dequantise {a.shape[0]} x {a.shape[1]}, {torch.get_num_threads()} thread(s); time / copy\n"
        )
        print(table(rows))
    wrong = [f"{row.format} {row.rounding} {row.dtype}" for row in rows if not row.equal]
    if wrong:
        print(f"bench_quantize: not the bits of the definition: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
