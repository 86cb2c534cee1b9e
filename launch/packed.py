"""Packed weights: the codes and scales of a quantised matrix as the tensors that inference engines read, and back.

A quantised weight (N, K) is w = code x block scale (x tensor scale). Engines agree on the codes and differ in names,
shapes and in which way up a scale is stored. Three layouts are written here; a name stands after the module's,
"model.layers.0.mlp.up_proj" + ".weight_scale":

    nvfp4       E2M1, 1x16, E4M3 block scales, one fp32 scale      arXiv:2509.25149
      compressed-tensors  weight_packed uint8 (N, K/2)  weight_scale e4m3 (N, K/16)  weight_global_scale fp32 (1,)
      modelopt            weight uint8 (N, K/2)         weight_scale e4m3 (N, K/16)  weight_scale_2 fp32 ()
    mxfp4       E2M1, 1x32, E8M0 scales                            OCP MX v1.0
      compressed-tensors  weight_packed uint8 (N, K/2)  weight_scale uint8 (N, K/32)
    mxfp8       E4M3, 1x32, E8M0 scales
      both                weight e4m3 (N, K)            weight_scale uint8 (N, K/32)
    fp8_tensor  E4M3, one fp32 scale
      compressed-tensors  weight e4m3 (N, K)            weight_scale fp32 (1,)
      modelopt            weight e4m3 (N, K)            weight_scale fp32 ()
    fp8_row     E4M3, one fp32 scale a row
      compressed-tensors  weight e4m3 (N, K)            weight_scale fp32 (N, 1)
      modelopt            weight e4m3 (N, K)            weight_scale fp32 (N,)
    fp8_block   E4M3, 128x128, fp32 scales                         DeepSeek-V3, arXiv:2412.19437
      compressed-tensors  weight e4m3 (N, K)            weight_scale fp32 (N/128, K/128)
      modelopt            weight e4m3 (N, K)            weight_scale fp32 (N/128, 1, K/128, 1)
      deepseek            weight e4m3 (N, K)            weight_scale_inv fp32 (N/128, K/128)

Two codes share a byte, the even column in the low nibble; an E2M1 code is sign << 3 | index in (0, 0.5, 1, 1.5, 2, 3,
4, 6). An E8M0 scale is the byte e of 2**(e - 127). Every scale multiplies (DeepSeek's `_inv` too), but for
weight_global_scale, which divides: it is 448 * 6 / amax where weight_scale_2 is amax / (448 * 6). That reciprocal is
rounded to fp32, so a header of the file says the number itself (`tensor_scales`), which :func:`read` takes. A weight
that was quantised in 16x16 blocks is written with each scale in 16 rows: the values are the same.

What this is not: a kernel's layout. Engines swizzle scales for their GEMM when they load.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowprec.numerics import FORMATS, Format, QTensor

SCHEMES = {
    "nvfp4": FORMATS["nvfp4"],
    "mxfp4": FORMATS["mxfp4"],
    "mxfp8": FORMATS["mxfp8"],
    "fp8_tensor": FORMATS["fp8_tensor"],
    "fp8_row": FORMATS["fp8_row"],
    "fp8_block": FORMATS["fp8_128x128"],
}
"""What a matrix may be stored as, each with a format that decodes it."""

LAYOUTS = {
    "compressed-tensors": tuple(SCHEMES),
    "modelopt": ("nvfp4", "mxfp8", "fp8_tensor", "fp8_row", "fp8_block"),
    "deepseek": ("fp8_block",),
}
"""Layouts, and what each of them defines."""

TENSOR_SCALES = "tensor_scales"
"""Key of a file's header: JSON, {module: the tensor scale that weight_global_scale is the rounded reciprocal of}."""


def scheme_of(format: Format) -> str | None:
    """What a weight of this format is stored as; None if no layout here holds it."""
    if format.second is not None or (format.scale == "e8m0" and format.guard != 1):  # which has a constant besides
        return None
    block, scale = format.block, "fp32" if format.scale == "pow2" else format.scale
    if scale == "e4m3" and block == (16, 16):
        block = (1, 16)
    for name, f in SCHEMES.items():
        if (format.element, block, scale, format.tensor_scale) == (f.element, f.block, f.scale, f.tensor_scale):
            return name
    return None


def pack(q: QTensor, layout: str) -> dict[str, Tensor]:
    """The tensors of a quantised weight by the last part of their names.

    q: (N, K), of a format that :func:`scheme_of` knows and `layout` defines, K a whole number of blocks.
    """
    scheme, n = scheme_of(q.format), q.shape[0]
    assert scheme in LAYOUTS[layout], (scheme, layout)
    if scheme in ("nvfp4", "mxfp4"):
        codes = {"weight_packed" if layout == "compressed-tensors" else "weight": q.pack()}
    else:
        codes = {"weight": q.codes.view(torch.float8_e4m3fn)}
    scales = q.scales
    if scheme == "nvfp4":
        assert q.tensor_scale is not None
        scales = scales.view(torch.uint8).repeat_interleave(q.format.block[0], dim=0)[:n].view(torch.float8_e4m3fn)
        if layout == "modelopt":
            return codes | {"weight_scale": scales, "weight_scale_2": q.tensor_scale}
        divisor = (1.0 / q.tensor_scale).clamp(max=torch.finfo(torch.float32).max)
        return codes | {"weight_scale": scales, "weight_global_scale": divisor.reshape(1)}
    if scheme in ("mxfp4", "mxfp8"):
        scales = scales.view(torch.uint8)
    elif scheme == "fp8_tensor":
        scales = scales.reshape(() if layout == "modelopt" else 1)
    elif scheme == "fp8_row" and layout == "modelopt":
        scales = scales.reshape(n)
    elif scheme == "fp8_block" and layout == "modelopt":
        scales = scales[:, None, :, None]
    return codes | {"weight_scale_inv" if layout == "deepseek" else "weight_scale": scales.contiguous()}


def unpack(tensors: Mapping[str, Tensor], tensor_scale: float | None = None) -> QTensor:
    """Inverse of :func:`pack`, of any layout: codes and scales, the latter a row each for NVFP4.

    tensor_scale: the exact one, where weight_global_scale holds its reciprocal.
    Raises ValueError if these are not tensors of a layout here.
    """
    codes = tensors.get("weight_packed", tensors.get("weight"))
    scales = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    scheme = None if codes is None or scales is None else _scheme_of_tensors(codes, scales)
    if scheme is None:
        held = ", ".join(f"{name} {str(t.dtype)[6:]} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"no layout here has a weight as {held}: it is none that lowprec-export wrote")
    assert codes is not None and scales is not None
    format, whole = SCHEMES[scheme], None
    if scheme == "nvfp4":
        if tensor_scale is not None:
            whole = torch.tensor(tensor_scale)
        elif "weight_scale_2" in tensors:
            whole = tensors["weight_scale_2"].reshape(())
        else:
            whole = 1.0 / tensors["weight_global_scale"].reshape(())
    if scheme in ("mxfp4", "mxfp8"):
        scales = scales.view(torch.float8_e8m0fnu)
    elif scheme == "fp8_block":
        scales = scales.reshape(scales.shape[0], -1)
    elif scheme != "nvfp4":
        scales = scales.reshape(-1, 1)
    return QTensor(QTensor.unpack(codes.view(torch.uint8), format), scales, whole, format)


def _scheme_of_tensors(codes: Tensor, scales: Tensor) -> str | None:
    """Dtypes and shapes tell the layouts apart."""
    kind = codes.dtype, scales.dtype
    if kind == (torch.uint8, torch.float8_e4m3fn):
        return "nvfp4"
    if scales.dtype == torch.uint8:
        return {torch.uint8: "mxfp4", torch.float8_e4m3fn: "mxfp8"}.get(codes.dtype)
    if kind != (torch.float8_e4m3fn, torch.float32):
        return None
    if scales.numel() == 1 and scales.dim() < 2:
        return "fp8_tensor"
    return "fp8_row" if scales.shape in ((codes.shape[0],), (codes.shape[0], 1)) else "fp8_block"


PARTS = ("weight_packed", "weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale")
"""Last parts of the names of what a packed weight is made of; `input_...` beside them is not the weight's."""


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name of the weight, values) of everything in a folder's safetensors, one at a time, packed or not.

    A packed weight comes back as fp32, (code x block scale) x tensor scale: what `Format.quantize(w).dequantize()` is,
    bit for bit. Other tensors come as they are stored. Raises ValueError if the folder holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors: give a folder that lowprec-export wrote")
    for file in files:
        with safe_open(file, "pt") as opened:
            exact = json.loads((opened.metadata() or {}).get(TENSOR_SCALES, "{}"))
            modules: dict[str, list[str]] = {}
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                module, _, part = key.rpartition(".")
                modules.setdefault(module, []).append(part)
            for module, parts in modules.items():
                if "weight_scale" in parts or "weight_scale_inv" in parts:
                    held = {part: opened.get_tensor(f"{module}.{part}") for part in parts if part in PARTS}
                    yield f"{module}.weight", unpack(held, exact.get(module)).dequantize()
                    parts = [part for part in parts if part not in PARTS]
                for part in parts:
                    key = f"{module}.{part}" if module else part
                    yield key, opened.get_tensor(key)
