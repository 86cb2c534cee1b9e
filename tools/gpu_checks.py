"""What `gpu_check` asks of a device, as a list of named checks, each of which finds a mismatch in words or nothing.

**definition**: the quantise kernels against ``Format.quantize`` in plain torch, bit for bit: formats, both directions,
both roundings, ragged and whole shapes, zeros, subnormals, huge values, infinity and NaN, swizzled scales, rotations;
codecs of the wire and the AdamW step against theirs.

**kernels**: every launch of every variant in the kernel report, against the executor of compiled PTX on the CPU, bit
for bit in all tensors that it was given.  It finds kernels that depend on an order of programs, and shows whether the
executor's reading of the PTX manual is the chip's: that of ``cvt.rs``, which byte of the random word belongs to which
element and how it rounds, was never compared with a chip by us.

**backends**: products as the start-up check of a run makes them (:func:`lowprec.linear.verify.mismatch`): operands bit
for bit, products within the bound of their fp32 sums, for each GPU backend and recipe that it serves.

**chip**: what :mod:`lowprec.kernels.testing.chips` says of SMs and shared memory against what the driver says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowprec.comm.codec import CODECS, Codec
from lowprec.linear import load_recipe
from lowprec.linear.backends import CHOICES, backend
from lowprec.linear.verify import Case, mismatch
from lowprec.numerics import FORMATS, QTensor, Stream, rotate
from lowprec.numerics.hadamard import fixed_signs
from lowprec.numerics.update import AdamW, adamw, stochastic_bf16
from lowprec.tools.kernel_measure import compile_launch, variants

STREAM = Stream(1, (1 << 31) + 5, 3, "layer")
NAMES = (
    "nvfp4", "nvfp4_2d", "mxfp4", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "fp8_tensor", "fp8_row", "fp8_1x128",
    "fp8_128x128",
)  # fmt: skip
RECIPES = ("nvfp4", "mxfp4", "mxfp8", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise")
BACKENDS = tuple(name for name in ("scaled_mm", "triton", "te") if name in CHOICES)


@dataclass(frozen=True)
class Check:
    group: str
    name: str
    run: Callable[[], str | None]  # a mismatch in words, or None; LeftOut where the device has nothing to compare


class LeftOut(Exception):
    """Why a check does not apply here."""


def checks(device: torch.device, groups: tuple[str, ...], only: str = "", small: bool = False) -> list[Check]:
    """All checks of the groups whose "group: name" contains `only`; small ones for the interpreter."""
    makers = {"definition": _definition, "kernels": _kernels, "backends": _backends, "chip": _chip}
    return [c for group in groups for c in makers[group](device, small) if only in f"{c.group}: {c.name}"]


# ---------------------------------------------------------------------------------------------------- the definition


def hard(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Random numbers with zero, subnormal, tiny and huge blocks, and ties."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k)).to(dtype)
    x[0, : k // 2] = 0
    x[-1, : k // 3] *= 1e-39
    x[rows // 2] *= 1e30
    x[rows // 3] = torch.tensor([0.25, -0.75, 1.25, 2.5, 3.5, -5.0, 6.0, -0.0]).repeat(-(-k // 8))[:k].to(dtype)
    return x


def _definition(device: torch.device, small: bool) -> Iterator[Check]:
    shapes = ((27, 75), (32, 64)) if small else ((27, 75), (512, 1024), (1, 4096))
    for name in NAMES:
        for rounding in ("nearest", "stochastic"):
            for shape in shapes[:1] if small and rounding == "nearest" else shapes[-1:] if small else shapes:
                for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float32):
                    x, stream = hard(*shape, dtype), STREAM if rounding == "stochastic" else None
                    label = f"{name} {rounding}, {shape[0]} x {shape[1]} {str(dtype).removeprefix('torch.')}"
                    yield Check("definition", label, _Quantised(name, x, stream, device))
    for bad in (float("nan"), float("inf")):
        for name in ("nvfp4", "mxfp8", "fp8_row"):
            x = hard(20, 64, torch.bfloat16)
            x[5, 17] = bad
            yield Check("definition", f"{name} with {bad}", _Quantised(name, x, None, device))
    yield Check("definition", "nvfp4 swizzled", _Quantised("nvfp4", hard(130, 80, torch.bfloat16), None, device, True))
    for name, size, step in (("nvfp4", 16, False), ("mxfp4", 32, True), ("nvfp4", 128, True))[: 2 if small else 3]:
        shape = (size, 2 * size) if small else (512, 1024)
        label = f"{name} rotated by {size}, {'signs of a step' if step else 'fixed signs'}"
        yield Check("definition", label, _Rotated(name, hard(*shape, torch.bfloat16), size, step, device))
    for codec in (CODECS["fp8"], CODECS["int8"], CODECS["int4"], Codec("nvfp4", rotation=64, rounding="stochastic")):
        for n in (100, 512) if small else (100, 4096, 5001):
            yield Check("definition", f"codec {codec}, rows of {n}", _Coded(codec, n, device))
    for dtypes in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        label = " weights, ".join(str(one).removeprefix("torch.") for one in dtypes)
        yield Check("definition", f"adamw, {label} moments", _Update(*dtypes, 203 if small else 5003, device))


@dataclass(frozen=True)
class _Quantised:
    name: str
    x: Tensor
    stream: Stream | None
    device: torch.device
    swizzle: bool = False

    def __call__(self) -> str | None:
        from lowprec.kernels.triton.launch import quantize

        f, x = FORMATS[self.name], self.x
        out = quantize(x.to(self.device), f, columns=True, stream=self.stream, swizzle=self.swizzle)
        assert out.rows and out.columns
        noise = STREAM.noise("rows", x.shape) if self.stream else None
        noise_t = STREAM.noise_like("columns", x.T) if self.stream else None
        found = differs(out.rows.qtensor(), f.quantize(x, noise))
        return found or differs(out.columns.qtensor(), f.quantize(x.T, noise_t))


@dataclass(frozen=True)
class _Rotated:
    """Rows rotated along what they contract, columns along theirs."""

    name: str
    x: Tensor
    size: int
    step: bool  # signs are given at run time
    device: torch.device

    def __call__(self) -> str | None:
        from lowprec.kernels.triton.launch import quantize
        from lowprec.kernels.triton.rotate import Turn

        f, x = FORMATS[self.name], self.x
        signs = STREAM.signs("signs", self.size) if self.step else fixed_signs(self.size, x.device)
        turn = Turn.of(self.size, signs, fixed=not self.step)
        out = quantize(x.to(self.device), f, columns=True, turn=turn, turn_columns=turn)
        assert out.rows and out.columns
        found = differs(out.rows.qtensor(), f.quantize(rotate(x, self.size, signs)))
        return found or differs(out.columns.qtensor(), f.quantize(rotate(x.T, self.size, signs)))


@dataclass(frozen=True)
class _Coded:
    """Rows of numbers to bytes and back, by the kernels and by the codec in plain torch."""

    codec: Codec
    n: int
    device: torch.device

    def __call__(self) -> str | None:
        x, n = hard(4, self.n, torch.float32), self.n
        wanted = self.codec.encode(x, STREAM, "key", kernels=False)
        payload = self.codec.encode(x.to(self.device), STREAM, "key", kernels=True)
        if not torch.equal(payload.cpu(), wanted):
            return f"{int((payload.cpu() != wanted).sum())} of {wanted.numel()} encoded bytes differ"
        for dtype in (torch.float32, torch.bfloat16):
            decoded = self.codec.decode(payload, n, dtype, kernels=True).cpu()
            if not same(decoded, self.codec.decode(wanted, n, dtype, kernels=False)):
                return f"values decoded to {dtype} differ"
        total = self.codec.decode_sum(payload, n, kernels=True).cpu()
        return None if same(total, self.codec.decode_sum(wanted, n, kernels=False)) else "the sum of rows differs"


@dataclass(frozen=True)
class _Update:
    """One AdamW step, rounded stochastically to bf16."""

    weights: torch.dtype
    moments: torch.dtype
    n: int
    device: torch.device

    def __call__(self) -> str | None:
        from lowprec.kernels.triton.update import ROLES, adamw_

        generator = torch.Generator().manual_seed(self.n)
        w, g, m, s = (torch.randn(self.n, generator=generator) for _ in range(4))
        before = [w.to(self.weights), g.to(self.weights), m.to(self.moments), s.abs().to(self.moments)]
        update, stream = AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1, 7), Stream(1, 7, 0, "layer")
        mine = [one.to(self.device, copy=True) for one in before]
        adamw_(mine[0], mine[1], mine[2], mine[3], update, stream)
        after = adamw(before[0].float(), before[1].float(), before[2].float(), before[3].float(), update)
        for role, kernel, wanted in zip(ROLES, (mine[0], mine[2], mine[3]), after):
            if kernel.dtype == torch.bfloat16:
                wanted = stochastic_bf16(wanted, stream.bits(role, wanted.shape))
            if not same(kernel.cpu(), wanted):
                return f"{int((kernel.cpu() != wanted).sum())} of {self.n} numbers of {role} differ"
        return None


def differs(a: QTensor, b: QTensor) -> str | None:
    """How two quantised tensors differ; one NaN is as good as another."""
    codes, scales = a.codes.cpu(), a.scales.cpu().float()
    wrong = (codes != b.codes).nonzero()
    if len(wrong):
        return f"{len(wrong)} of {codes.numel()} codes differ, the first at {wrong[0].tolist()}"
    if not same(scales, b.scales.float()):
        return f"{int((scales != b.scales.float()).sum())} of {scales.numel()} scales differ"
    levels = [one.tensor_scale for one in (a, b)]
    if all(level is not None for level in levels) and not same(levels[0].cpu(), levels[1]):  # type: ignore[union-attr, arg-type]
        return f"the tensor scale is {levels[0]}, not {levels[1]}"
    return None


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, one NaN being as good as another."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# ----------------------------------------------------------------------------------------- kernels, and the executor


def arch_of(device: torch.device) -> str:
    """The chip to compile for; without a GPU sm_100, whose code has all the instructions."""
    if device.type != "cuda":
        return "sm_100"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _kernels(device: torch.device, small: bool) -> Iterator[Check]:
    for variant in variants():
        if variant.executes:
            yield Check("kernels", f"{variant.kernel}: {variant.name}", _Executed(variant, device))


@dataclass(frozen=True)
class _Executed:
    """One variant on the device and in the executor, launch by launch."""

    variant: Any
    device: torch.device

    def __call__(self) -> str | None:
        from lowprec.kernels.testing.chips import ARCHES
        from lowprec.kernels.testing.ptx import run_ptx

        arch = arch_of(self.device)
        if arch not in self.variant.chips or arch not in ARCHES:
            raise LeftOut(f"not for {arch}")
        found: list[str] = []

        def start(launch: Any) -> None:
            mine = copied(launch.args, self.device)
            replace(launch, args=mine)()
            run_ptx(compile_launch(launch, arch), launch.grid, launch.args)
            for name, value in launch.args.items():
                if isinstance(value, Tensor) and not same(_comparable(mine[name].cpu()), _comparable(value)):
                    found.append(f"{name} of {launch.kernel.__name__} differs from the compiled PTX executed")

        self.variant.run(arch, start)
        return "; ".join(found) or None


def copied(args: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a launch on a device; strides are kept, and what shared memory shares it there."""
    storages: dict[int, Tensor] = {}
    out = dict(args)
    for name, x in args.items():
        if isinstance(x, Tensor):
            memory = x.untyped_storage()
            if memory.data_ptr() not in storages:
                storages[memory.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(memory).to(device, copy=True)
            there = storages[memory.data_ptr()].untyped_storage()
            out[name] = torch.empty(0, dtype=x.dtype, device=device).set_(
                there, x.storage_offset(), x.size(), x.stride()
            )
    return out


def _comparable(x: Tensor) -> Tensor:
    """fp8 tensors as bytes: torch compares few of their kinds."""
    return x.contiguous().view(torch.uint8) if x.dtype.itemsize == 1 else x


# ----------------------------------------------------------------------------------------------------------- backends


def _backends(device: torch.device, small: bool) -> Iterator[Check]:
    sizes = {"fprop": (32, 64, 128), "dgrad": (32, 128, 64), "wgrad": (64, 128, 128)} if small else {
        "fprop": (256, 256, 1024), "dgrad": (256, 1024, 256), "wgrad": (256, 1024, 512)}  # fmt: skip
    for name in RECIPES[:3] if small else RECIPES:
        for role, mnk in sizes.items():
            for one in ("triton",) if small else BACKENDS:
                if one in CHOICES:
                    yield Check("backends", f"{one}, {name} {role}", _Product(one, name, role, mnk, device))


@dataclass(frozen=True)
class _Product:
    backend: str
    recipe: str
    role: str
    sizes: tuple[int, int, int]
    device: torch.device

    def __call__(self) -> str | None:
        gemm, one, dtype = getattr(load_recipe(self.recipe), self.role), backend(self.backend), torch.bfloat16
        reason = one.refuses(gemm, self.role, *self.sizes, dtype, self.device)
        if reason:
            raise LeftOut(reason)
        case = Case(self.backend, gemm, self.role, self.sizes, self.sizes, dtype, self.device)
        return mismatch(one, case, STREAM)


# --------------------------------------------------------------------------------------------------------------- chip


def driver_properties(device: torch.device) -> dict[str, int]:
    """What Triton asks of the driver: max_shared_mem in bytes, mem_clock_rate in kHz, mem_bus_width in bits, ..."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index or 0)


def _chip(device: torch.device, small: bool) -> Iterator[Check]:
    def run() -> str | None:
        from lowprec.kernels.testing.chips import ARCHES

        if device.type != "cuda":
            raise LeftOut("there is no driver to ask")
        chip = ARCHES.get(arch_of(device))
        if chip is None:
            raise LeftOut(f"{arch_of(device)} is not described")
        known = torch.cuda.get_device_properties(device)
        pairs = {
            "shared memory of an SM": (known.shared_memory_per_multiprocessor, chip.shared_bytes),
            "shared memory of a program": (driver_properties(device)["max_shared_mem"], chip.shared_per_cta_bytes),
            "threads of an SM": (known.max_threads_per_multi_processor, 32 * chip.warps),
        }
        wrong = [f"{what} is {has}, described as {said}" for what, (has, said) in pairs.items() if has != said]
        return "; ".join(wrong) or None

    yield Check("chip", "limits", run)
