"""A checkpoint as a folder of Hugging Face: config.json, safetensors and tokenizer; weights plain or packed.

Names are those of :mod:`lowprec.model.hf`, packed tensors those of :mod:`lowprec.launch.packed`. One weight is in
memory at a time, next to one file's worth of what was made of it.

Which layers are packed: those whose forward product quantises its weight under the plan of the checkpoint's step, each
to that very format, or under another precision file (post-training quantisation). The weight is first rounded to the
dtype that training multiplied in, as training does. Everything else is written as bf16 (or fp32).

Engines join q, k and v, and gate and up, into one matrix and keep *one* tensor scale of it, the largest number found:
under scales of their own the others would decode wrongly. So by default such layers are quantised by their common
maximum. Block scales are then rounded at another point than in training: other numbers of the same accuracy. With
`own_scales` every layer keeps the numbers that training computed with, for readers that join nothing.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.config import Run, from_yaml
from lowprec.data import SourceKind, Tokenizer
from lowprec.data.build import open_tokenizer
from lowprec.data.sources import open_source
from lowprec.data.store import TokenStore, cache_folder
from lowprec.launch import packed, packed_config, weights
from lowprec.launch.packed_config import Choice
from lowprec.linear import QuantizedLinear
from lowprec.linear.precision import read_file
from lowprec.model import hf
from lowprec.numerics import Format
from lowprec.train import reader
from lowprec.train.loaded import open_run
from lowprec.train.session import DTYPES, plan_model

JOINED = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Layers of one block that engines join into one matrix."""


@dataclass(frozen=True)
class Options:
    """What to write. layout: a key of packed.LAYOUTS; None = nothing is packed."""

    layout: str | None
    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: float = 5e9
    precision: str | None = None
    calibrate: int = 0  # micro-batches
    own_scales: bool = False


@dataclass(frozen=True)
class Packing:
    """How one layer is packed."""

    format: Format
    choice: Choice


# ---- which layers, and how


def packings(run: Run, progress: Mapping[str, Any], options: Options) -> tuple[dict[str, Packing], list[str]]:
    """Packings by layer, and the linear layers that stay as they are. Raises ValueError for what cannot be packed."""
    assert options.layout is not None
    if options.precision is not None:
        run = replace(run, precision=dict(read_file(options.precision)))
    _, plan = plan_model(run)
    if options.precision is None:
        raised = progress.get("controller", {}).get("raised", [])
        plan.raised = {(name, gemm): (to, int(rule)) for name, gemm, to, rule in raised
                       if to in plan.precision.linear}  # fmt: skip
        plan.at(min(progress["step"], run.train.steps - 1) / run.train.steps)
    found: dict[str, Packing] = {}
    for name, layer in plan.layers.items():
        if layer.recipe.fprop.b.format is None:
            continue
        tied = run.model.tie_embeddings and name == "lm_head"
        why = "it is the embedding too (model.tie_embeddings)" if tied else _refusal(layer, options)
        if why:
            raise ValueError(
                f"layer {name} (recipe {layer.recipe.name}) cannot be packed for {options.layout}: {why}; take "
                "--precision with a recipe whose weights are plain codes, such as nvfp4, or --format hf"
            )
        found[name] = _packing(layer, options)
    if not found:
        where = options.precision or f"the run's recipe at step {progress['step']}"
        raise ValueError(
            f"{where} quantises no weight in its forward product: give --precision to quantise after training, or "
            "--format hf"
        )
    return found, [name for name in plan.layers if name not in found]


def _packing(layer: QuantizedLinear, options: Options) -> Packing:
    fprop = layer.recipe.fprop
    assert fprop.b.format is not None
    scheme = packed.scheme_of(fprop.b.format)
    assert scheme is not None
    return Packing(fprop.b.format, Choice(scheme, inputs_quantised(scheme, fprop.a.format is not None, options)))


def inputs_quantised(scheme: str, wished: bool, options: Options) -> bool:
    """Whether the engine is to quantise inputs: as the recipe does, if what that needs is known."""
    return wished and not (scheme == "nvfp4" and not options.calibrate)


def _refusal(layer: QuantizedLinear, options: Options) -> str | None:
    """Why a layer cannot be packed, or None."""
    fprop, layout = layer.recipe.fprop, options.layout
    w, format = fprop.b, fprop.b.format
    assert format is not None and layout is not None
    if w.rounding != "nearest":
        return f"its weight is rounded by {w.rounding}, with other random bits at every step"
    if w.amax != "current":
        return f"its weight is scaled by a remembered maximum (amax: {w.amax})"
    if w.split:
        return f"its weight is a sum of parts (split by {w.split})"
    if fprop.inner or fprop.outer_b:
        return f"its weight is rotated ({fprop.inner or fprop.outer_b}), and no engine would turn the inputs"
    scheme = packed.scheme_of(format)
    if scheme is None:
        return f"no layout holds format {format.name}"
    if scheme not in packed.LAYOUTS[layout]:
        return f"{layout} has no {scheme} (it has {', '.join(packed.LAYOUTS[layout])})"
    n, k = layer.out_features, layer.in_features
    along = packed.SCHEMES[scheme].block[1]
    if along and k % along:
        return f"in_features {k} is no multiple of {along}"
    if scheme == "fp8_block" and layout == "modelopt" and n % 128:
        return f"out_features {n} is no multiple of 128"
    if layout == "modelopt" and scheme == "fp8_tensor" and not options.calibrate:
        return "ModelOpt's FP8 has a fixed scale of the inputs: measure it with --calibrate 8"
    choice = Choice(scheme, inputs_quantised(scheme, fprop.a.format is not None, options))
    if layout == "modelopt" and packed_config.algorithm(choice) is None:
        return f"ModelOpt's {scheme} quantises inputs, which this recipe does not"
    return None


def joined(name: str) -> list[str]:
    """The layers that engines join with this one, itself among them; none if they do not."""
    for parts in JOINED:
        for part in parts:
            if name.endswith(part):
                return [name.removesuffix(part) + other for other in parts]
    return []


def unlike(chosen: Mapping[str, Packing], plain: list[str]) -> list[str]:
    """Remarks on layers that engines join but that are not packed alike."""
    how = {name: packing.choice for name, packing in chosen.items()}
    odd = [name for name in plain if any(other in how for other in joined(name))]
    odd += [name for name in how if len({how[other] for other in joined(name) if other in how}) > 1]
    names = dict.fromkeys(tuple(joined(name)) for name in odd)
    return [f"{', '.join(members)} are not packed alike: an engine that joins them refuses them" for members in names]


def common_maxima(chosen: Mapping[str, Packing], run: Run, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """By layer, the maximum () of all layers that engines join with it, where one scale spans a tensor."""
    found: dict[str, Tensor] = {}
    for name, packing in chosen.items():
        if name in found or packing.format.amax_of != "tensor" or packing.format.rule != "absmax":
            continue
        members = [member for member in joined(name) if chosen.get(member) == packing]
        if len(members) > 1:
            maxima = [load(f"{member}.weight").to(DTYPES[run.train.dtype]).abs().amax() for member in members]
            found |= dict.fromkeys(members, torch.stack(maxima).amax().float())
    return found


def input_maxima(run_dir: Path, step: int, chosen: Mapping[str, Packing], options: Options) -> dict[str, Tensor]:
    """By layer, the largest magnitude () of its inputs over micro-batches of training data. Builds the whole model."""
    node = None if options.precision is None else read_file(options.precision)
    loaded = open_run(run_dir, step, precision=node)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            amax = inputs[0].detach().abs().amax().float()
            found[name] = torch.maximum(found[name], amax) if name in found else amax

        return hook

    hooks = [loaded.plan.layers[name].register_forward_pre_hook(keep(name)) for name in chosen]
    try:
        with torch.no_grad():
            for micro in loaded.micros(options.calibrate):
                loaded.forward(micro)
    finally:
        for handle in hooks:
            handle.remove()
    if odd := next((name for name, amax in found.items() if not 0 < amax < torch.inf), None):
        raise ValueError(f"the inputs of {odd} have the maximum {found[odd].item()}: there is no scale for them")
    return {name: amax.cpu() for name, amax in found.items()}


def input_scale(scheme: str, amax: Tensor, layout: str) -> dict[str, Tensor]:
    """What is written of a calibration, by the last part of the name; nothing where inputs are scaled as they come."""
    if scheme == "nvfp4":
        largest = torch.tensor(448.0 * 6.0)
        if layout == "compressed-tensors":
            return {"input_global_scale": (largest / amax).reshape(1)}
        return {"input_scale": amax / largest}
    return {"input_scale": amax / torch.tensor(448.0)} if (scheme, layout) == ("fp8_tensor", "modelopt") else {}


# ---- the folder


class Shards:
    """Tensors into files of at most so many bytes, in the order in which they come; a larger one has its own."""

    def __init__(self, folder: Path, most_bytes: float, header: dict[str, str]) -> None:
        self.folder, self.most_bytes, self.header = folder, most_bytes, header
        self.held: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}  # of modules in `held`
        self.written: list[list[str]] = []
        self.held_bytes = self.total_bytes = 0

    def add(self, tensors: dict[str, Tensor], scales: dict[str, float]) -> None:
        """Tensors that belong together."""
        own_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self.held and self.held_bytes + own_bytes > self.most_bytes:
            self._write()
        self.held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.scales |= scales
        self.held_bytes, self.total_bytes = self.held_bytes + own_bytes, self.total_bytes + own_bytes

    def _write(self) -> None:
        header = self.header | ({packed.TENSOR_SCALES: json.dumps(self.scales)} if self.scales else {})
        weights.put(self.folder / f"{len(self.written)}.part", self.held, header)
        self.written.append(list(self.held))
        self.held, self.scales, self.held_bytes = {}, {}, 0

    def close(self) -> None:
        """Gives the files their names, which say how many there are, and writes the index if they are several."""
        self._write()
        count = len(self.written)
        places: dict[str, str] = {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            os.replace(self.folder / f"{number}.part", self.folder / file)
            places |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
            _json(self.folder / "model.safetensors.index.json", index)


def export(run_dir: Path, step: int | None, out: Path | None, options: Options) -> tuple[Path, list[str]]:
    """Writes the folder, whole or not at all; returns it and remarks. Raises ValueError with one sentence."""
    checkpoint, step = weights.checkpoint_of(run_dir, step)
    out = out or run_dir / f"{options.layout or 'hf'}_{step:08d}"
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or choose another --out")
    run = from_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"))
    names = hf.names(run.model)  # says which models have no names there
    index = reader.open_index(checkpoint)
    held = weights.sizes(index, checkpoint)
    if missing := sorted(names.keys() - held.keys()):
        raise ValueError(f"the checkpoint {checkpoint} is not of the model in config.yaml: it lacks {missing[0]}")

    def load(name: str) -> Tensor:
        return weights.load({name: held[name]}, index, checkpoint)[name]

    chosen, plain = packings(run, weights.progress_of(checkpoint, index), options) if options.layout else ({}, [])
    inputs = input_maxima(run_dir, step, chosen, options) if options.calibrate else {}
    common = {} if options.own_scales else common_maxima(chosen, run, load)
    modules = {name: names[f"{name}.weight"].removesuffix(".weight") for name in chosen}
    plain_modules = [names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in plain]
    draft = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        shards = Shards(draft, options.max_shard_bytes, weights.about(run_dir, checkpoint, index) | {"format": "pt"})
        for name, theirs in names.items():
            layer = name.removesuffix(".weight")
            if layer not in chosen:
                shards.add({theirs: weights.cast(load(name), options.dtype)}, {})
                continue
            tensors, scale = _packed(load(name), layer, chosen[layer], run, options, common, inputs)
            module = modules[layer]
            named = {f"{module}.{part}": tensor for part, tensor in tensors.items()}
            shards.add(named, {} if scale is None else {module: scale})
        shards.close()
        remarks = _about_model(draft, run, options, {modules[n]: p.choice for n, p in chosen.items()}, plain_modules)
        remarks += unlike(chosen, plain)
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out, remarks


def _packed(
    w: Tensor,
    layer: str,
    packing: Packing,
    run: Run,
    options: Options,
    common: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float | None]:
    """The tensors of a layer, and its exact tensor scale where they hold a reciprocal."""
    assert options.layout is not None
    q = packing.format.quantize(w.to(DTYPES[run.train.dtype]), amax=common.get(layer))
    if not q.block_scales().isfinite().all():
        raise ValueError(f"layer {layer} holds NaN or infinity: there is nothing to quantise; take an earlier --step")
    tensors = packed.pack(q, options.layout)
    if packing.choice.inputs and layer in inputs:
        tensors |= input_scale(packing.choice.scheme, inputs[layer], options.layout)
    inexact = "weight_global_scale" in tensors and q.tensor_scale is not None
    return tensors, q.tensor_scale.item() if inexact and q.tensor_scale is not None else None


def _about_model(folder: Path, run: Run, options: Options, chosen: dict[str, Choice], plain: list[str]) -> list[str]:
    """config.json and what belongs to the tokenizer; returns remarks."""
    more: dict[str, Any] = {}
    if options.layout:
        more["quantization_config"] = packed_config.quantization_config(options.layout, chosen, plain)
    if options.layout == "modelopt":
        _json(folder / "hf_quant_config.json", packed_config.hf_quant_config(chosen, plain))
    remarks = []
    try:
        tokenizer = tokenizer_of(run)
    except (ValueError, OSError) as error:
        remarks.append(f"no tokenizer.json is written: {error}")
    else:
        tokenizer.save(folder / "tokenizer.json")
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
        _json(folder / "tokenizer_config.json", about | {"model_max_length": run.model.max_seq_len})
        _json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_id})
        more["eos_token_id"] = tokenizer.eos_id
    _json(folder / "config.json", hf.to_hf_config(run.model, options.dtype, **more))
    return remarks


def tokenizer_of(run: Run) -> Tokenizer:
    """The run's tokenizer. Raises ValueError or OSError if it cannot be had here."""
    opened = [
        TokenStore(Path(str(source.path)).expanduser())
        if source.kind is SourceKind.tokens
        else open_source(source, f"data.sources[{number}]")
        for number, source in enumerate(run.data.sources)
    ]
    return open_tokenizer(run.data, opened, cache_folder(run.data.cache_dir))


def _json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
