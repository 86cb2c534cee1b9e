"""A double of TransformerEngine, so that kernels/te.py runs on the CPU.

Names and parameters are those of ``kernels/te_signatures.json``: a call that the recorded version would not take raises
TypeError. What happens behind them is what TransformerEngine's sources say, computed by our definition: a recipe's
quantisers by slot (input, weight, output; grad output, grad input), row-wise codes along the last axis of the matrix
and column-wise codes along its first (rotated there, under NVFP4's recipe, except for weights), and a product that
takes one or the other by the letters of ``layout``.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowprec.kernels.te import TeBackend
from lowprec.linear import backends, load_precision
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.recipe import Gemm, LinearRecipe, Operand
from lowprec.numerics import ELEMENTS, FORMATS, Format, fixed_signs, rotate

RECORD = json.loads((Path(__file__).parents[2] / "kernels" / "te_signatures.json").read_text())["versions"]
VERSIONS = tuple(RECORD)
SLOTS = {"forward": ("x", "w", "y"), "backward": ("dy", "dx")}


def parameters(text: str) -> inspect.Signature:
    """The signature that a line of the record stands for."""
    scope: dict[str, Any] = {}
    exec(f"def recorded({text}): pass", scope)
    return inspect.signature(scope["recorded"])


class Recorded:
    """One recorded version; ``modules`` are what ``import`` finds, ``calls`` what was called with what."""

    def __init__(self, version: str) -> None:
        self.version, self.calls = version, []
        self.table = {place.rpartition(":")[2]: parameters(text) for place, text in RECORD[version].items()}
        self.recipes = self._recipes()
        self.modules = self._modules()

    def bound(self, place: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name, defaults included; TypeError as from the real one."""
        found = self.table[place].bind(*args, **kwargs)
        found.apply_defaults()
        self.calls.append((place, found.arguments))
        return found.arguments

    def _recipes(self) -> ModuleType:
        module = ModuleType("transformer_engine.common.recipe")
        module.Format = enum.Enum("Format", ["E2M1", "E4M3", "E5M2", "HYBRID"])  # type: ignore[attr-defined]
        double = self
        for name in ("MMParams", "QParams", *(n for n in self.table if n.endswith("Scaling"))):

            def fill(self: Any, *args: Any, _name: str = name, **kwargs: Any) -> None:
                for field, value in double.bound(_name, *args, **kwargs).items():
                    if isinstance(value, str) and value.startswith(("Format.", "MMParams(")):  # a default, as text
                        value = eval(value, vars(module))
                    setattr(self, field, value)
                squares = [
                    field for field in vars(self) if field.endswith("_block_scaling_dim") and vars(self)[field] == 2
                ]
                assert len(squares) < 2, "2D by 2D block gemm not supported"

            made = type(name, (), {"__init__": fill, "__signature__": self.table[name]})
            if name == "Float8BlockScaling":  # no fields: attributes of the class
                for slot in ("fwd_inp", "fwd_weight", "bwd_grad"):
                    setattr(made, f"fp8_quant_{slot}", module.QParams(power_2_scale=True))
            setattr(module, name, made)
        return module

    def _modules(self) -> dict[str, ModuleType]:
        names = ("", ".common", ".pytorch", ".pytorch.quantization", ".pytorch.cpp_extensions")
        modules = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
        modules["transformer_engine.common.recipe"] = self.recipes
        for module in modules.values():
            module.__path__ = []  # type: ignore[attr-defined]
        top, pytorch = modules["transformer_engine"], modules["transformer_engine.pytorch"]
        top.__version__ = self.version  # type: ignore[attr-defined]
        top.__spec__ = importlib_spec()
        for name in self.table:
            if name.startswith("is_"):
                setattr(pytorch, name, lambda *a, _name=name, **k: self.bound(_name, *a, **k) and (True, ""))
        pytorch.Float8Quantizer = lambda *a, **k: Float8Quantizer(self, *a, **k)  # type: ignore[attr-defined]
        state = type("RecipeState", (), {"create": staticmethod(self._create)})
        modules["transformer_engine.pytorch.quantization"].RecipeState = state  # type: ignore[attr-defined]
        modules["transformer_engine.pytorch.cpp_extensions"].general_gemm = self._gemm  # type: ignore[attr-defined]
        return modules

    def _create(self, *args: Any, **kwargs: Any) -> Any:
        given = self.bound("RecipeState.create", *args, **kwargs)
        slots = SLOTS[given["mode"]]
        assert len(slots) == given["num_quantizers"]
        made = [Quantizer(self, given["recipe"], slot) for slot in slots]
        return type("State", (), {"make_quantizers": lambda _: self.bound("RecipeState.make_quantizers") or made})()

    def _gemm(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None, None]:
        given = self.bound("general_gemm", *args, **kwargs)
        a, b = given["A"], given["B"]
        assert given["layout"] in ("TN", "NN", "NT") and given["use_split_accumulator"]
        left = b.column_wise if given["layout"][1] == "T" else b.row_wise
        right = a.row_wise if given["layout"][0] == "T" else a.column_wise
        return (left @ right.T).to(given["out_dtype"]), None, None, None


def importlib_spec() -> Any:
    """What find_spec reads off a module that is loaded."""
    from importlib.machinery import ModuleSpec

    return ModuleSpec("transformer_engine", None, is_package=True)


class Quantizer:
    """The quantiser of one slot of a recipe, or a Float8Quantizer with a scale of its own."""

    storage = "NVFP4TensorStorage"

    def __init__(self, double: Recorded, recipe: Any, slot: str) -> None:
        self.double, self.recipe, self.slot = double, recipe, slot
        self.internal, self.usage = False, (True, True)
        hybrid = recipe is not None and recipe.fp8_format.name == "HYBRID"
        self.dtype = "e5m2" if slot in ("dy", "dx") and hybrid else "e4m3"

    def set_usage(self, *args: Any, **kwargs: Any) -> None:
        given = self.double.bound("Quantizer.set_usage", *args, **kwargs)
        self.usage = (given["rowwise"], given["columnwise"])

    def __call__(self, *args: Any) -> Quantized:
        x = self.double.bound("Quantizer.__call__", *args)["tensor"]
        assert x.is_contiguous() and x.dim() == 2 and self.internal
        assert self.usage[0], "quantizing in only the columnwise direction not supported"
        turned = self.rotated(x.T.contiguous()) if self.usage[1] else None
        return Quantized(self.double, self.codes(x), None if turned is None else self.codes(turned))

    def rotated(self, xt: Tensor) -> Tensor:
        """Column-wise codes of NVFP4 are of the rotated matrix, but for weights and where the recipe says no."""
        nvfp4 = type(self.recipe).__name__ == "NVFP4BlockScaling"
        if not nvfp4 or self.slot == "w" or self.recipe.disable_rht:
            return xt
        assert xt.dtype == torch.bfloat16
        return rotate(xt, 16, fixed_signs(16))

    def codes(self, x: Tensor) -> Tensor:
        """x, quantised along its last axis and back."""
        noise = None
        if type(self.recipe).__name__ == "NVFP4BlockScaling" and self.slot == "dy":
            noise = None if self.recipe.disable_stochastic_rounding else torch.rand(x.shape)
        return self.format().quantize(x, noise).dequantize().float()

    def format(self) -> Format:
        r, w = self.recipe, self.slot == "w"
        kind = type(r).__name__
        if kind == "NVFP4BlockScaling":
            scope = getattr(r, "nvfp4_4over6", "none")
            chosen = self.slot != "dy" and scope in ("all", "weights" if w else "activations")
            assert not chosen or r.disable_rht or w, "NVFP4 4over6 quantization does not support RHT"
            fields: dict[str, Any] = {}
            if chosen:
                wide = r.nvfp4_4over6_e4m3_use_256 in ("all", "weights" if w else "activations")
                fields = {"tensor_max": 256.0 if wide else 448.0, "select": r.nvfp4_4over6_err_mode.lower()}
                fields |= {"targets": (6.0, 4.0), "scale_rounding": "te_2_14"}
            block = (16, 16) if w and not r.disable_2d_quantization else (1, 16)
            return Format("fp4", "e2m1", block, "e4m3", True, **fields)
        if kind == "MXFP8BlockScaling":
            return Format("mx", self.dtype, (1, 32), "e8m0")
        if kind == "Float8BlockScaling":
            side = {"x": "x", "w": "w"}.get(self.slot, "grad")
            slot = {"x": "fwd_inp", "w": "fwd_weight"}.get(self.slot, "bwd_grad")
            block = (1, 128) if getattr(r, f"{side}_block_scaling_dim") == 1 else (128, 128)
            return Format("block", self.dtype, block, scale(getattr(r, f"fp8_quant_{slot}").power_2_scale))
        assert kind == "Float8CurrentScaling", (
            "delayed scales come from TransformerEngine's global state, not from here"
        )
        return Format("tensor", self.dtype, (0, 0), scale(r.use_power_2_scales))


def scale(power: bool) -> str:
    """How such a scale is stored."""
    return "pow2" if power else "fp32"


class Float8Quantizer(Quantizer):
    """One given scale."""

    def __init__(self, double: Recorded, *args: Any, **kwargs: Any) -> None:
        given = double.bound("Float8Quantizer.__init__", *args, **kwargs)
        super().__init__(double, None, "any")
        self.scale, self.dtype = given["scale"], given["fp8_dtype"]
        assert self.scale.dtype == given["amax"].dtype == torch.float32 and given["amax"].shape == (1,)

    def rotated(self, xt: Tensor) -> Tensor:
        return xt

    def codes(self, x: Tensor) -> Tensor:
        return ELEMENTS[self.dtype].round(x.float() * self.scale) / self.scale


class Quantized:
    """A quantised tensor with either or both of its codes."""

    def __init__(self, double: Recorded, row_wise: Tensor, column_wise: Tensor | None) -> None:
        self.double, self.row_wise, self.column_wise = double, row_wise, column_wise

    def update_usage(self, *args: Any, **kwargs: Any) -> None:
        given = self.double.bound("NVFP4TensorStorage.update_usage", *args, **kwargs)
        assert not given["columnwise_usage"] or self.column_wise is not None
        self.row_wise = self.row_wise if given["rowwise_usage"] else None

    def get_metadata(self) -> dict[str, Any]:
        self.double.bound("NVFP4TensorStorage.get_metadata")
        return {"rowwise_data": self.row_wise, "columnwise_data": self.column_wise, "fp4_dtype": "e2m1"}

    def dequantize(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.row_wise.to(self.double.bound("NVFP4TensorStorage.dequantize", *args, **kwargs)["dtype"])


def shipped() -> dict[str, LinearRecipe]:
    """Every quantised recipe of recipes/precision."""
    return {
        f"{path.stem}/{name}": recipe
        for path in sorted(RECIPES_FOLDER.glob("*.yaml"))
        for name, recipe in load_precision(path.stem).linear.items()
        if recipe.quantized
    }


def recipe_of(name: str, **products: dict) -> LinearRecipe:
    """The shipped recipe with other values of some products' fields."""
    recipe = load_precision(name).linear[name]
    for role, fields in products.items():
        recipe = dataclasses.replace(recipe, **{role: dataclasses.replace(getattr(recipe, role), **fields)})
    return recipe


def forward_only(source: str) -> LinearRecipe:
    """MXFP8 in the forward; the backward takes x and w as they were (``original``) or as they became (``fprop``)."""
    backward = {"a": Operand(), "b": Operand(source=source)}
    return recipe_of("mxfp8", dgrad=backward, wgrad=backward)


def four_six(x: str = "nvfp4_46", w: str = "nvfp4_46", **fields: Any) -> LinearRecipe:
    """NVFP4 without rotation, x and w (1x16) in these formats with other values of ``fields``."""
    a, b = (Operand(dataclasses.replace(FORMATS[name], **fields)) for name in (x, w))
    dy = Operand(FORMATS["nvfp4"], "stochastic")
    return LinearRecipe("four_six", Gemm(a, b), Gemm(dy, b), Gemm(dy, a))


def installed(version: str, monkeypatch: Any) -> Recorded:
    """The double in the place of the package, and the backend willing to serve the CPU."""
    made = Recorded(version)
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "_te", lambda: TeBackend(devices=("cpu",)))
    return made
