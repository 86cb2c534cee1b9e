"""bench_comm: what encoding for the wire costs, and what it saves.

    python tools/bench_comm.py
    python tools/bench_comm.py --codecs fp8,int4 --rotation 64 --threads 1
    python -m lowprec.tools.bench_comm --json

First table: each codec, to nearest and stochastically, on rows of fp32 numbers, against a plain copy of them into
memory that is there already (``y.copy_(x)``): encode, decode, and the sum of decoded rows, which a reduce-scatter
ends with. Every measurement stands beside one of the copy, and a row shows the median of the ratios of such
neighbours, which a busy machine disturbs far less than the times themselves. A row cannot be quick by being wrong:
decoded values must be those of the numeric format, bit for bit, on awkward rows; otherwise the exit code is 1 and a
sentence says which row.

Second table: bytes per parameter and step of every ``comm=``, by the convention of lowprec/comm/meter.py, for a
matrix that is quantised under the recipe and for one that is not, in blocks that are gathered for the forward and the
backward pass. Bits are those of real payloads: nothing is rounded but the print.
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
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

import lowprec
from lowprec.comm import CODECS, Codec, CommConfig
from lowprec.comm.codec import PLAIN
from lowprec.numerics import FORMATS, Stream, fixed_signs, rotate
from lowprec.tools.bench_quantize import awkward, broken, same_bits

STREAM = Stream(seed=0, step=3, micro=1, layer="bench_comm")
KEY = "bench"
RECIPES = Path(lowprec.__file__).parent / "recipes" / "comm"
LONG = 1 << 20  # values of a row whose bits are counted


@dataclass(frozen=True)
class Row:
    """One codec: bits, and how many copies of its input each direction takes."""

    codec: str
    rounding: str
    rotation: int
    bits_per_value: float
    encode_copies: float
    decode_copies: float
    sum_copies: float
    equal: bool


@dataclass(frozen=True)
class Bytes:
    """One comm= on one kind of matrix: bytes per parameter and step; those between nodes are part of the total."""

    comm: str
    matrix: str
    weights_forward: float
    weights_backward: float
    gradients: float
    total: float
    between_nodes: float


def variants(names: list[str], rotation: int) -> list[Codec]:
    """Codecs to measure. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in CODECS]
    if unknown:
        raise ValueError(f"unknown codec '{unknown[0]}'; choose from {', '.join(CODECS)}")
    quantised = [name for name in names if name not in PLAIN]
    return [
        *(CODECS[name] for name in names),
        *(Codec(name, rounding="stochastic") for name in quantised),
        *(Codec(name, rotation) for name in quantised if rotation),
    ]


def defined(codec: Codec, x: Tensor) -> Tensor:
    """Encoded and decoded by the numeric format alone."""
    if codec.format is None:
        return x.to(PLAIN[codec.name]).float()
    signs = fixed_signs(codec.rotation) if codec.rotation else None
    padded = F.pad(x, (0, codec.width(x.shape[1]) - x.shape[1]))
    padded = rotate(padded, codec.rotation, signs) if codec.rotation else padded
    noise = STREAM.noise(KEY, padded.shape) if codec.rounding == "stochastic" else None
    y = codec.format.quantize(padded, noise).dequantize()
    return (rotate(y, codec.rotation, signs, inverse=True) if codec.rotation else y)[:, : x.shape[1]]


def is_equal(codec: Codec) -> bool:
    """Whether payloads decode to the definition's bits, on awkward rows and on rows with NaN and infinity."""
    for x in (awkward(torch.float32), broken(torch.float32)):
        made = codec.decode(codec.encode(x, STREAM, KEY), x.shape[1])
        if not same_bits(made, defined(codec, x)):
            return False
    return True


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(codecs: list[Codec], rows: int, n: int, reps: int) -> list[Row]:
    """Benchmark codecs on fp32 rows (rows, n)."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
    copied, found = torch.empty_like(x), []
    for codec in codecs:
        payload = codec.encode(x, STREAM, KEY)
        runs = {
            "encode": partial(codec.encode, x, STREAM, KEY),
            "decode": partial(codec.decode, payload, n),
            "sum": partial(codec.decode_sum, payload, n),
        }
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for rep in range(reps + 1):
            for name, run in runs.items():
                copy, own = _seconds(partial(copied.copy_, x)), _seconds(run)
                if rep:  # the first touches the memory
                    ratios[name].append(own / copy)
        encode, decode, total = (statistics.median(ratios[name]) for name in runs)
        bits = codec.bits_per_value(n)
        found.append(Row(codec.name, codec.rounding, codec.rotation, bits, encode, decode, total, is_equal(codec)))
    return found


def read(path: Path) -> CommConfig:
    """A file of recipes/comm."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CommConfig), OmegaConf.load(path)))
    assert isinstance(config, CommConfig)
    config.check()
    return config


def bytes_of(name: str, config: CommConfig, codes: str, ranks_per_node: int) -> list[Bytes]:
    """Bytes per parameter of a matrix that is quantised (to the format ``codes``) and of one that is not."""
    square = FORMATS[codes].quantize(torch.zeros(1024, 1024))
    coded = (square.nbytes() - (4 if square.tensor_scale is not None else 0)) / square.codes.numel()
    plain = 2.0 if config.weight_codec is None else config.weight_codec.bits_per_value(LONG) / 8
    gradients = between = config.gradient_codec.bits_per_value(LONG) / 8
    if config.gradients_between:  # a node's sums: one for L gradients
        between = config.between_codec.bits_per_value(LONG) / 8 / ranks_per_node
        gradients += between
    found = []
    for matrix, weights in (("quantised", coded if config.codes else plain), ("other", plain)):
        total = 2 * weights + gradients
        crossing = (1 if config.hpz else 2) * weights + between
        found.append(Bytes(name, matrix, weights, weights, gradients, total, crossing))
    return found


def table(cells: list[tuple[str, ...]]) -> str:
    """Rows of text, aligned."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def codec_table(rows: list[Row]) -> str:
    """The measurements as text."""
    cells: list[tuple[str, ...]] = [("codec", "bits", "encode", "decode", "sum", "")]
    for r in rows:
        ratios = (f"{ratio:.2f}" for ratio in (r.encode_copies, r.decode_copies, r.sum_copies))
        mark = "" if r.equal else "WRONG: not the definition's bits"
        cells.append((str(Codec(r.codec, r.rotation, r.rounding)), f"{r.bits_per_value:.4f}", *ratios, mark))
    return table(cells)


def bytes_table(costs: list[Bytes]) -> str:
    """Bytes of every comm= as text."""
    cells: list[tuple[str, ...]] = [("comm", "matrix", "forward", "backward", "gradients", "total", "between nodes")]
    for c in costs:
        numbers = (c.weights_forward, c.weights_backward, c.gradients, c.total, c.between_nodes)
        cells.append((c.comm, c.matrix, *(f"{number:.3f}" for number in numbers)))
    return table(cells)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser("bench_comm", description="Time and check codecs against a copy; bytes of every comm=.")
    p.add_argument("--codecs", nargs="+", help="names, with spaces or commas (default: all)")
    p.add_argument("--rotation", type=int, default=64, help="also measure rotated blocks of so many; 0 = no")
    p.add_argument("--shape", type=int, nargs=2, default=(4, 1 << 20), metavar=("ROWS", "N"), help="one row a rank")
    p.add_argument("--reps", type=int, default=9, help="measurements of each row (default: %(default)s)")
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's own number)")
    p.add_argument("--codes", default="nvfp4_2d", help="format of quantised layers' weights (default: %(default)s)")
    p.add_argument("--ranks-per-node", type=int, default=8, help="for two-level comm= (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    a = p.parse_args(argv)
    if min(a.reps, a.ranks_per_node, *a.shape) < 1:
        p.error("--reps, --ranks-per-node and the sizes of --shape must be at least 1")
    if a.codes not in FORMATS:
        p.error(f"unknown format '{a.codes}'; choose from {', '.join(FORMATS)}")
    if a.threads:
        torch.set_num_threads(a.threads)
    names = [name for names in a.codecs or [] for name in names.split(",") if name] or list(CODECS)
    try:
        rows = measure(variants(names, a.rotation), a.shape[0], a.shape[1], a.reps)
    except ValueError as error:
        print(f"bench_comm: {error}", file=sys.stderr)
        return 2
    costs: list[Bytes] = []
    for path in sorted(RECIPES.glob("*.yaml")):
        costs += bytes_of(path.stem, read(path), a.codes, a.ranks_per_node)
    if a.json:
        print(
            json.dumps({"codecs": [asdict(row) for row in rows], "bytes": [asdict(cost) for cost in costs]}, indent=2)
        )
    else:
        print(f"{a.shape[0]} rows of {a.shape[1]} fp32 values, {torch.get_num_threads()} thread(s); time / copy\n")
        print(codec_table(rows))
        print(
            f"\nbytes per parameter and step; quantised layers' weights as {a.codes}, {a.ranks_per_node} ranks a node\n"
        )
        print(bytes_table(costs))
    bad = [f"{row.codec} {row.rounding} rotation {row.rotation}" for row in rows if not row.equal]
    if bad:
        print(f"bench_comm: not the bits of the definition: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
