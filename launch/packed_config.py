"""What config.json says of packed weights: which modules hold codes, of which kind, and how inputs are to be quantised.

Layouts and tensors are those of :mod:`lowprec.launch.packed`. Inputs are quantised by the engine while it runs:

    nvfp4       blocks of 16 as they come, under one scale of the tensor that must be known before: a calibration's
                (`input_global_scale`, `input_scale`). Without one the weights alone are quantised (W4A16)
    mxfp4, 8    blocks of 32 as they come
    fp8_tensor  one scale a token as it comes (compressed-tensors); one of the tensor from a calibration (modelopt)
    fp8_row     one scale a token as it comes
    fp8_block   blocks of 128 of each token as they come

A recipe that leaves the input of its forward product unquantised (weight-only training) says so here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lowprec


@dataclass(frozen=True)
class Choice:
    """How one module is stored.

    scheme: a key of packed.SCHEMES. inputs: whether the engine is to quantise what the module multiplies.
    """

    scheme: str
    inputs: bool


_WEIGHTS: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "fp8_tensor": {"num_bits": 8, "strategy": "tensor"},
    "fp8_row": {"num_bits": 8, "strategy": "channel"},
    "fp8_block": {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
}
_INPUTS: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True},
    "fp8_tensor": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "fp8_row": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "fp8_block": {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True},
}
_FORMAT = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
_ALGO = {
    ("nvfp4", True): "NVFP4",
    ("nvfp4", False): "W4A16_NVFP4",
    ("mxfp8", True): "MXFP8",
    ("fp8_tensor", True): "FP8",
    ("fp8_row", True): "FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8_block", True): "FP8_PB_WO",
}
_PRODUCER = {"name": "lowprec", "version": lowprec.__version__}


def algorithm(choice: Choice) -> str | None:
    """ModelOpt's name of it; None if it has none."""
    return _ALGO.get((choice.scheme, choice.inputs))


def quantization_config(layout: str, packed: dict[str, Choice], plain: Sequence[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    packed: the modules that hold codes. plain: the linear layers that do not.
    """
    if layout != "modelopt":
        plain = _spellings(plain)
    if layout == "deepseek":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(plain),
        }
    kinds = list(dict.fromkeys(packed.values()))
    groups: dict[str, dict[str, Any]] = {}
    for number, kind in enumerate(kinds):
        members = [name for name, choice in packed.items() if choice == kind]
        targets = ["Linear"] if len(kinds) == 1 else members if layout == "modelopt" else _spellings(members)
        groups[f"group_{number}"] = {"targets": targets, **_group(kind)}
    if layout == "modelopt":
        details = _details(packed, plain)
        extra: dict[str, Any] = {
            key: details[key] for key in ("quant_algo", "group_size", "quantized_layers") if key in details
        }
        for group, kind in zip(groups.values(), kinds):  # it names no format; fixed scales of inputs are in the files
            del group["format"], group["output_activations"]
            if kind.inputs and kind.scheme in ("nvfp4", "fp8_tensor"):
                fixed = {"strategy": "tensor"} if kind.scheme == "fp8_tensor" else {}
                group["input_activations"] |= fixed | {"dynamic": False}
        named: dict[str, Any] = {"config_groups": groups, "ignore": list(plain), "producer": _PRODUCER}
        return {"quant_method": "modelopt"} | extra | named
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": list(plain),
    }


def _spellings(names: Sequence[str]) -> list[str]:
    """Nemotron-H begins with `backbone.` in files and `model.` inside transformers 5, which looks for the latter."""
    return [*names, *("model." + name.removeprefix("backbone.") for name in names if name.startswith("backbone."))]


def _group(kind: Choice) -> dict[str, Any]:
    """One of config_groups, but for its targets."""
    common: dict[str, Any] = {"type": "float", "symmetric": True}
    return {
        "weights": common | _WEIGHTS[kind.scheme] | {"dynamic": False},
        "input_activations": common | _INPUTS[kind.scheme] if kind.inputs else None,
        "output_activations": None,
        "format": _FORMAT.get(kind.scheme, "float-quantized" if kind.inputs else "naive-quantized"),
    }


def hf_quant_config(packed: dict[str, Choice], plain: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json, which ModelOpt writes beside config.json."""
    return {"producer": _PRODUCER, "quantization": _details(packed, plain)}


def _details(packed: dict[str, Choice], plain: Sequence[str]) -> dict[str, Any]:
    def one(choice: Choice) -> dict[str, Any]:
        size = _WEIGHTS[choice.scheme].get("group_size")
        return {"quant_algo": algorithm(choice)} | ({} if size is None else {"group_size": size})

    kinds = list(dict.fromkeys(packed.values()))
    if len(kinds) == 1:
        return one(kinds[0]) | {"kv_cache_quant_algo": None, "exclude_modules": list(plain)}
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "quantized_layers": {name: one(choice) for name, choice in packed.items()},
        "exclude_modules": list(plain),
    }
