"""te: TransformerEngine computes a layer's products. Only ``backend: te`` asks for it, and nothing imports it before.

Which of its recipes a product is, or why none, is decided by :mod:`lowprec.kernels.te_recipe` from data alone. Here
that recipe becomes TransformerEngine's own quantisers (``RecipeState.create(recipe).make_quantizers()``) and its
``general_gemm``, one product at a time::

    fprop   y  = x w^T     general_gemm(w, x,  layout="TN")    both row-wise codes
    dgrad   dx = dy w      general_gemm(w, dy, layout="NN")    w column-wise: its codes along out_features
    wgrad   dw = dy^T x    general_gemm(x, dy, layout="NT")    both column-wise: along tokens, perhaps rotated

A transposed view is never copied: the matrix that it shows is quantised column-wise.

Why not ``te.Linear`` under ``te.autocast``. A module owns its parameters and one recipe for three products; autocast
keeps state of the process: every layer's history of maxima moves on when *any* region ends, is no part of our
checkpoint, and moves twice under recomputed activations. By products, padding, schedules that change one product,
delayed scales from the layer's own memory, sharded maxima and the start-up check work as for every backend. The price:
x and dy are read once per product instead of once, and TransformerEngine quantises along rows beside columns.

What differs from the definition (:mod:`lowprec.linear.oracle`), also where the recipe is the same:

* Random bits of stochastic rounding are drawn from torch's CUDA generator, not from ``Stream``: a resumed run gets the
  same ones only if that generator's state is restored, and no other backend gets them.
* The sixteen signs of the rotation are TransformerEngine's constant, ours are another vector. The product is the same
  in exact arithmetic, the codes are not.
* Kernels fuse casts. ``NVTE_USE_FAST_MATH`` and ``NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH`` are refused while set: they
  replace divisions and skip roundings, and no variable may change a run's numbers.
* Float8BlockScaling is converted to MXFP8 on compute capability 10 and later, hence fp32 scales are refused there.
* Sums have the order of cuBLASLt, with split accumulators.

What this is not: measured. No GPU has run it. Tests hold every call to signatures recorded from published versions
(``te_signatures.json``) and run this file on the CPU against a double built from that record.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels.te_recipe import BLOCK, CURRENT, DELAYED, MXFP8, NVFP4, OPERANDS, TeChoice, alone, te_product
from lowprec.numerics import QTensor, Stream, Window
from lowprec.numerics.scale import fp32_scale

OLDEST = (2, 15)
COLUMN_WISE = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}
"""Which operands of a product are transposes of the layer's x (T, K), w (N, K), dy (T, N)."""
MULTIPLES = {NVFP4: 32, MXFP8: 32, BLOCK: 128, CURRENT: 16, DELAYED: 16}
"""What rows, columns and the contracted axis must be multiples of: whole blocks both ways, rows of 16 bytes."""
HARDWARE = {
    NVFP4: "is_nvfp4_available",
    MXFP8: "is_mxfp8_available",
    BLOCK: "is_fp8_block_scaling_available",
    CURRENT: "is_fp8_available",
    DELAYED: "is_fp8_available",
}
FAST_MATH = ("NVTE_USE_FAST_MATH", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH")


@dataclass(frozen=True)
class Quantized:
    """A prepared operand: TransformerEngine's tensor, and which of its codes are multiplied."""

    tensor: Any
    column_wise: bool

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.tensor.get_metadata().values() if isinstance(part, Tensor))


@lru_cache(maxsize=1)
def engine() -> SimpleNamespace:
    """What is used of TransformerEngine; loads it, and CUDA with it."""
    load = importlib.import_module
    pytorch = load("transformer_engine.pytorch")
    return SimpleNamespace(
        version=load("transformer_engine").__version__,
        recipes=load("transformer_engine.common.recipe"),
        pytorch=pytorch,
        float8_quantizer=pytorch.Float8Quantizer,
        recipe_state=load("transformer_engine.pytorch.quantization").RecipeState,
        general_gemm=load("transformer_engine.pytorch.cpp_extensions").general_gemm,
    )


@lru_cache(maxsize=64)
def unavailable(choice: TeChoice) -> str | None:
    """Why this machine's TransformerEngine cannot run a recipe, or None."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed; pip install --no-build-isolation 'lowprec[te]'"
    try:
        te = engine()
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"TransformerEngine does not load ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if tuple(int(part) for part in te.version.split(".")[:2]) < OLDEST:
        return f"TransformerEngine {te.version} is too old; install {'.'.join(map(str, OLDEST))} or later"
    served, why = getattr(te.pytorch, HARDWARE[choice.recipe])(return_reason=True)
    return choice.missing(te.recipes) if served else f"TransformerEngine has no {choice.recipe} here: {why}"


@lru_cache(maxsize=64)
def quantizers(choice: TeChoice, device: torch.device) -> dict[str, Any]:
    """TransformerEngine's quantisers of x, w and dy for a recipe."""
    te = engine()
    recipe = choice.build(te.recipes)
    x, w, _ = te.recipe_state.create(recipe, mode="forward", num_quantizers=3, device=device).make_quantizers()
    dy, _ = te.recipe_state.create(recipe, mode="backward", num_quantizers=2, device=device).make_quantizers()
    return {"x": x, "w": w, "dy": dy}


class TeBackend:
    """Products by TransformerEngine.

    Args:
        devices: types of device that it is asked to serve; tests name the CPU.
    """

    name = "te"

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        self.devices = devices

    def refuses(
        self, gemm: Any, role: str, m: int | None, n: int, k: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this product cannot be served, or None; arguments as for every backend."""
        needs = te_product(gemm, role)
        if isinstance(needs, str):
            return needs
        choice = alone(gemm, role)
        if device.type not in self.devices:
            return f"TransformerEngine serves {choice} on CUDA devices, not on {device.type}"
        if dtype != torch.bfloat16 and (choice.recipe == NVFP4 or dtype not in (torch.float16, torch.float32)):
            return f"the operands are {dtype}; {choice.recipe} is served in bfloat16"
        multiple = MULTIPLES[choice.recipe]
        if any(size is not None and (size == 0 or size % multiple) for size in (m, n, k)):
            return f"{m} x {k} by {k} x {n}: {choice.recipe} needs sizes above 0 that {multiple} divides"
        for variable in FAST_MATH:
            if os.environ.get(variable, "0") not in ("", "0"):
                return f"{variable} is set, which changes TransformerEngine's numbers; unset it"
        return unavailable(choice) or _as_mx(choice, device)

    def prepare(
        self,
        x: Tensor,
        gemm: Any,
        side: str,
        stream: Stream,
        role: str,
        amax: Tensor | None = None,
        window: Window | None = None,
    ) -> Quantized:
        """Quantise x (rows, k), maybe a transposed view; as every backend does, but with its own random bits.

        Raises:
            ValueError: for a given maximum where TransformerEngine only takes that of what it sees.
        """
        choice, name = alone(gemm, role), OPERANDS[role][side == "b"]
        column_wise = COLUMN_WISE[role][side == "b"]
        matrix = (x.T if column_wise else x).contiguous()
        quantizer = quantizers(choice, x.device)[name]
        if choice.recipe == DELAYED or (choice.recipe == CURRENT and amax is not None):
            quantizer = _by(matrix.abs().amax() if amax is None else amax, quantizer, gemm, side, x.dtype)
        elif amax is not None:
            raise ValueError(
                f"te: {choice.recipe} takes the maximum of what it sees, but that of {name} in {role} is given (the "
                "layer is cut over ranks); use backend 'auto'"
            )
        # Row-wise codes are made in any case: some of TransformerEngine's kernels refuse to make the others alone.
        quantizer.set_usage(rowwise=True, columnwise=column_wise)
        quantizer.internal = True
        tensor = quantizer(matrix)
        if column_wise:
            tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
        return Quantized(tensor, column_wise)

    def load(self, q: QTensor, gemm: Any, side: str) -> Quantized:
        """Refused: TransformerEngine quantises what it multiplies.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"te: the weight arrived as codes of {q.format.name}, but TransformerEngine makes its own; gather weights "
            "in bf16, or use backend 'auto'"
        )

    def multiply(self, a: Quantized, b: Quantized, gemm: Any, out_dtype: torch.dtype) -> Tensor:
        """Prepared operands (m, k), (n, k) -> (m, n)."""
        out, *_ = engine().general_gemm(
            b.tensor,
            a.tensor,
            out_dtype=out_dtype,
            layout=("N" if b.column_wise else "T") + ("T" if a.column_wise else "N"),
            use_split_accumulator=True,
            grad=b.column_wise,
        )
        return out

    def stored(self, prepared: Quantized, gemm: Any, side: str) -> Quantized:
        """The same: codes and scales are packed already."""
        return prepared

    def unpacked(self, prepared: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a forward operand stands for, rounded to ``dtype`` as in TransformerEngine's ``dequantized``, and 1.

        Raises:
            ValueError: for the operand of a backward product, whose codes TransformerEngine cannot turn back.
        """
        if prepared.column_wise:
            raise ValueError("te: TransformerEngine turns back the codes of the forward only; use backend 'auto'")
        values = prepared.tensor.dequantize(dtype=dtype)
        return values, torch.ones((), device=values.device)

    def exact(self, gemm: Any) -> bool:
        """False: the start-up check judges its products by their error, as its codes cannot all be turned back."""
        return False


def _as_mx(choice: TeChoice, device: torch.device) -> str | None:
    """Why Float8BlockScaling cannot keep its fp32 scales on this GPU, or None."""
    if choice.recipe != BLOCK or device.type != "cuda" or all(power for _, power in choice.pow2):
        return None
    if torch.cuda.get_device_capability(device) < (10, 0):
        return None
    return "Float8BlockScaling becomes MXFP8 on this GPU, whose scales are powers of two; use fp8_blockwise_pow2"


def _by(amax: Tensor, like: Any, gemm: Any, side: str, dtype: torch.dtype) -> Any:
    """A quantiser with the scale of this maximum, () fp32: the largest of past steps, or of all ranks.

    The history is the layer's own, in our checkpoint (:mod:`lowprec.linear.state`); TransformerEngine gets its result.
    """
    format = getattr(gemm, side).format
    multiplier, _ = fp32_scale(amax.float().reshape(()), format.element_type.max, dtype, format.scale == "pow2")
    return engine().float8_quantizer(multiplier, torch.zeros(1, device=amax.device), like.dtype)
