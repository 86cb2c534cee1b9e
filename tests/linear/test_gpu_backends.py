"""The backends for GPUs, as far as a CPU can tell: what they refuse, what they call the library with, whole layers."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.kernels import scaled_mm
from lowprec.kernels.coded import Coded, kind
from lowprec.kernels.scaled_mm import ScaledMM, arguments
from lowprec.kernels.testing.interpreter import interpreted
from lowprec.kernels.triton_backend import TritonBackend, interpreting
from lowprec.linear import Policy, QuantizedLinear, load_recipe, oracle
from lowprec.linear.backends import CHOICES, ORDER, backend, choose
from lowprec.linear.codes import padded, transposed, transposes
from lowprec.linear.recipe import Gemm, Operand
from lowprec.numerics import FORMATS, Clock, Stream

STREAM = Stream(5, 1, 2, "layer")
CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was chosen for a chip, or while kernels are interpreted, holds for no other test."""
    choose.cache_clear()
    yield
    choose.cache_clear()


def gemm(a: str, b: str = "", rounding: str = "nearest") -> Gemm:
    return Gemm(Operand(FORMATS[a], rounding), Operand(FORMATS[b or a]))


def random(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(BF16)


def chip(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """torch now says that it sees a GPU of this capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


# ---- who is asked, and what they say


def test_planning_on_a_cpu_imports_no_gpu_library() -> None:
    """`auto` asks nobody who serves another device, and importing a backend imports neither Triton nor the library."""
    code = (
        "import sys, torch, lowprec.linear, lowprec.kernels.scaled_mm, lowprec.kernels.triton_backend\n"
        "from lowprec.linear.backends import choose\n"
        "from lowprec.linear import load_recipe\n"
        "cpu = torch.device('cpu')\n"
        "chosen, why = choose('auto', load_recipe('nvfp4').fprop, 'fprop', 64, 64, 64, torch.bfloat16, cpu)\n"
        "assert chosen.name in ('cpu', 'cpu_portable', 'torch') and not any('cuda' in w.lower() for w in why), why\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'transformer_engine')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr


def test_names_and_order() -> None:
    assert ORDER == ("native", "scaled_mm", "triton", "cpu", "cpu_portable", "torch", "oracle")
    assert set(CHOICES) == {"auto", "te", *ORDER[1:]} and not interpreting()
    assert [backend(name).name for name in ("scaled_mm", "triton")] == ["scaled_mm", "triton"]


def test_a_gpu_backend_on_a_cpu_says_what_it_needs() -> None:
    for name, said in (("triton", "it needs a CUDA device; the tensors are on cpu"), ("scaled_mm", "on the CPU the ")):
        with pytest.raises(ValueError, match=f"backend '{name}' refuses fprop .{name}: {said}"):
            choose(name, gemm("nvfp4"), "fprop", 64, 64, 64, BF16, CPU)


@pytest.mark.parametrize(
    ("capability", "name", "chosen", "why"),
    [
        ((10, 0), "nvfp4", "scaled_mm", ""),
        ((10, 0), "mxfp8", "scaled_mm", ""),
        ((12, 0), "fp8_row", "scaled_mm", ""),
        ((9, 0), "fp8_1x128", "scaled_mm", ""),
        ((10, 0), "fp8_1x128", "triton", "scaled_mm: the library multiplies FP8 in blocks of 128 on Hopper"),
        ((10, 0), "mxfp4", "triton", "scaled_mm: torch's CUDA builds multiply no MXFP4"),
        ((9, 0), "nvfp4", "triton", "scaled_mm: it needs compute capability 10.0, the GPU has 9.0"),
        ((9, 0), "fp8_tensor_e5m2", "triton", "scaled_mm: the library does not multiply E5M2 by E5M2"),
        ((8, 0), "fp8_tensor", "torch", "triton: it needs compute capability 8.9, the GPU has 8.0"),
        ((10, 0), "int8_row", "torch", "triton: tensor cores know no product of int8_row and int8_row"),
        ((10, 0), "nvfp4_double", "torch", "scaled_mm: tensor cores know no product of nvfp4_double"),
        ((10, 0), "if4", "torch", "scaled_mm: tensor cores know no product of if4"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capability: tuple[int, int], name: str, chosen: str, why: str) -> None:
    """The library where it serves, else Triton, else torch; each refusal is a sentence. The CPU's are not asked."""
    chip(monkeypatch, capability)
    served, refusals = choose("auto", gemm(name), "fprop", 256, 256, 256, BF16, CUDA)
    assert served.name == chosen and not any(word.startswith("cpu") for word in refusals)
    assert any(refusal.startswith(why) for refusal in refusals) if why else not refusals


def test_sizes_dtypes_and_unequal_operands_are_refused(monkeypatch) -> None:
    chip(monkeypatch, (10, 0))
    library, triton = ScaledMM(), TritonBackend()
    assert "k = 48 one of 32" in str(library.refuses(gemm("nvfp4"), "fprop", 64, 64, 48, BF16, CUDA))
    assert "n = 40 must be a multiple of 16" in str(library.refuses(gemm("mxfp8"), "fprop", 64, 40, 64, BF16, CUDA))
    assert library.refuses(gemm("mxfp8"), "fprop", None, 64, 64, BF16, CUDA) is None
    for one in (library, triton):
        assert "not quantised" in str(one.refuses(Gemm(gemm("nvfp4").a), "fprop", 64, 64, 64, BF16, CUDA))
        assert "mxfp8 and nvfp4" in str(one.refuses(gemm("mxfp8", "nvfp4"), "fprop", 64, 64, 64, BF16, CUDA))
        assert "float16" in str(one.refuses(gemm("mxfp8"), "fprop", 64, 64, 64, torch.float16, CUDA))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(triton.refuses(gemm("mxfp8"), "fprop", 64, 64, 64, BF16, CUDA))


# ---- the library


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("fp8_tensor", "fp8_tensor"),
        ("fp8_tensor_e5m2", "fp8_tensor"),
        ("fp8_row", "fp8_row"),
        ("fp8_row", "fp8_tensor"),
    ],
)
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32])
def test_the_library_multiplies_fp8_on_the_cpu(a: str, b: str, out_dtype: torch.dtype) -> None:
    """Really called: the oracle's product, within the bound of fp32 sums and one rounding of the output."""
    spec, library, (m, n, k) = gemm(a, b, "stochastic"), ScaledMM(), (48, 32, 160)
    x, w = random(m, k, 1), random(n, k, 2)
    assert library.refuses(spec, "fprop", m, n, k, BF16, CPU) is None
    packed = library.prepare(x, spec, "a", STREAM, "fprop"), library.prepare(w, spec, "b", STREAM, "fprop")
    both = oracle.prepare_both(x, w, spec, STREAM, "fprop")
    for one, wanted in zip(packed, both):
        values, scale = library.unpacked(one, torch.float32)
        assert torch.equal(values, wanted.blockscaled()) and torch.equal(scale, wanted.tensor_scale)
    out, wanted_out = library.multiply(*packed, spec, out_dtype), oracle.multiply(*both)
    bound = 2 * k * 2.0**-24 * (both[0].blockscaled().abs() @ both[1].blockscaled().abs().T)
    rounding = 0.0 if out_dtype == torch.float32 else 2.0**-8 * (wanted_out.abs() + bound)
    assert out.dtype == out_dtype and bool(((out.float() - wanted_out).abs() <= bound + rounding).all())


def decoded(call: dict[str, Any], side: str, rows: int, k: int) -> Tensor:
    """What the library is told a matrix is, (rows, k) fp32, by its own documents: nibbles, swizzle, block sizes."""
    matrix = call["mat_a"] if side == "a" else call["mat_b"].t()
    scale, recipe, swizzled = (call.get(f"{what}_{side}") for what in ("scale", "scale_recipe", "swizzle"))
    one = 1.0
    if isinstance(scale, list):
        (scale, level), (recipe, second), swizzled = scale, recipe, swizzled[0]
        assert second == F.ScalingType.TensorWise
        one = level.item()
    if matrix.dtype == torch.float4_e2m1fn_x2:
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        byte = matrix.view(torch.uint8).int()
        nibbles = torch.stack([byte & 15, byte >> 4], -1).flatten(1)
        values = grid[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    else:
        values = matrix.float()
    block = {"BlockWise1x16": 16, "BlockWise1x32": 32, "BlockWise1x128": 128, "BlockWise128x128": 128}[recipe.name]
    blocks = k // block
    if swizzled is not None:
        assert swizzled == F.SwizzleType.SWIZZLE_32_4_4
        r, c = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
        tile = r // 128 * -(-blocks // 4) + c // 4
        scales = scale.float()[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]
    elif recipe == F.ScalingType.BlockWise128x128:
        scales = scale[:blocks].t().repeat_interleave(128, 0)
    else:
        scales = scale
    return values * scales.repeat_interleave(block, 1) * one


BLOCKS = [
    ("nvfp4", "nvfp4_2d"),
    ("nvfp4_46", "nvfp4"),
    ("mxfp8", "mxfp8_e5m2"),
    ("fp8_1x128", "fp8_128x128"),
    ("fp8_128x128", "fp8_1x128"),
    ("fp8_128x128", "fp8_128x128"),
    ("fp8_1x128", "fp8_1x128"),
]


@pytest.mark.parametrize(("a", "b"), BLOCKS)
def test_block_scaled_calls(a: str, b: str) -> None:
    """The CPU cannot run them: the library's own checks accept the arguments, and read by its documents they are the
    oracle's operands."""
    (m, n, k), spec = (256, 384, 640), gemm(a, b)
    library = ScaledMM()
    x, w = random(m, k, 3), random(n, k, 4)
    both = oracle.prepare_both(x, w, spec, STREAM, "fprop")
    packed = library.prepare(x, spec, "a", STREAM, "fprop"), library.prepare(w, spec, "b", STREAM, "fprop")
    call, outside = arguments(*packed, BF16)
    assert outside is None
    out = F.scaled_mm(**_on_meta(call))
    assert out.shape == (m, n) and out.dtype == BF16
    for side, one, rows in zip("ab", both, (m, n)):
        wanted = one.blockscaled() * one.tensor_scale.reshape(-1, 1)
        assert torch.equal(decoded(call, side, rows, k), wanted)
    broken = _on_meta(call)
    first = broken["scale_a"][0] if isinstance(broken["scale_a"], list) else broken["scale_a"]
    wrong = first[:-1] if first.dim() == 1 else first[:, :-1]
    broken["scale_a"] = [wrong, broken["scale_a"][1]] if isinstance(broken["scale_a"], list) else wrong
    with pytest.raises((RuntimeError, ValueError)):  # the checks can fail
        F.scaled_mm(**broken)


def _on_meta(call: dict[str, Any]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    return {key: moved(value) for key, value in call.items()}


def test_what_the_library_does_not_take_multiplies_an_fp32_product(monkeypatch) -> None:
    """The constant scale of a guarded MX format, and row scales of an NVFP4 tensor, stay outside."""
    format = FORMATS["mxfp8"].__class__("guarded", "e4m3", (1, 32), "e8m0", scale_rounding="floor", guard=4 / 3)
    for f, partner in ((format, FORMATS["mxfp8"]), (FORMATS["nvfp4_row"], FORMATS["nvfp4"])):
        spec = Gemm(Operand(f), Operand(partner))
        x, w = random(128, 128, 5), random(128, 128, 6)
        both = oracle.prepare_both(x, w, spec, STREAM, "fprop")
        packed = [Coded.of(q.quantize(t), True) for q, t in ((f, x), (partner, w))]
        call, outside = arguments(packed[0], packed[1], BF16)
        assert outside is not None and call["output_dtype"] == torch.float32
        monkeypatch.setattr(  # stands in for the library: the product of what it is told
            scaled_mm.F, "scaled_mm", lambda **c: decoded(c, "a", 128, 128) @ decoded(c, "b", 128, 128).T, raising=True
        )
        out = ScaledMM().multiply(packed[0], packed[1], spec, torch.float32)
        monkeypatch.undo()
        wanted = oracle.multiply(*both)
        assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_kinds() -> None:
    """Which of the shipped formats tensor cores know."""
    known = {name for name, format in FORMATS.items() if kind(format)}
    assert {"nvfp4", "nvfp4_2d", "nvfp4_46", "mxfp4_sr", "mxfp8_e5m2", "fp8_row_e5m2", "fp8_128x128_pow2"} <= known
    assert not known & {
        "if4",
        "nvfp4_double",
        "nvfp4_ue5m3",
        "ufp4",
        "mxfp6_e3m2",
        "int8_row",
        "quest_fp4",
        "fp6_tensor",
    }


@pytest.mark.parametrize("name", ["nvfp4_2d", "fp8_128x128", "fp8_tensor", "nvfp4"])
def test_operands_from_codes(name: str) -> None:
    """A gathered weight arrives as codes, for dgrad as a transposed view, perhaps padded: nothing changes."""
    q, spec = FORMATS[name].quantize(random(80, 150, 7)), gemm(name)
    views = [q, padded(q, 96, 160)] + ([transposed(q), transposed(padded(q, 96, 160))] if transposes(q.format) else [])
    for one in (TritonBackend(), ScaledMM()):
        for view in views:
            made, wanted = one.load(view, spec, "b"), oracle.prepared(view)
            values, scale = one.unpacked(made, torch.float32)
            assert torch.equal(values, wanted.blockscaled()) and torch.equal(scale, wanted.tensor_scale)
            assert one.stored(made, spec, "b") is made and made.nbytes < 2 * values.numel()


# ---- whole layers


def test_a_layer_trains_through_the_triton_kernels() -> None:
    """NVFP4 forward and backward, interpreted: outputs and gradients are those of the torch backend."""
    results = []
    for name in ("triton", "torch"):
        torch.manual_seed(0)
        layer = nn.Linear(64, 48, bias=False).to(BF16)
        recipe, policy = load_recipe("nvfp4"), Policy(name)
        module = QuantizedLinear.convert(layer, [recipe], Clock(7), "layer", policy)
        module.recipe = recipe
        x = random(32, 64, 8).requires_grad_()
        with interpreted():
            y = module(x)
            y.backward(random(32, 48, 9))
        assert x.grad is not None and module.weight.grad is not None
        results.append((y.detach(), x.grad, module.weight.grad))
    for mine, wanted in zip(*results):
        error = (mine.float() - wanted.float()).abs()
        assert wanted.any() and bool((error <= 2.0**-7 * wanted.float().abs() + 1e-6).all())
