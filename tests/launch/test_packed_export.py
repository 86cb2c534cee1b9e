"""Packed exports: the bytes are those of the layouts, and read back they are what `Format.quantize` says."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowprec.config import from_yaml
from lowprec.launch import packed, weights
from lowprec.launch.export import main
from lowprec.launch.export_folder import Options, packings, unlike
from lowprec.launch.packed_config import Choice, quantization_config
from lowprec.launch.train import main as train
from lowprec.model import hf
from lowprec.numerics import FORMATS
from lowprec.train.loaded import open_run

# ---- one matrix

HELD = {
    "nvfp4": "nvfp4", "nvfp4_2d": "nvfp4", "nvfp4_sr": "nvfp4", "nvfp4_46": "nvfp4", "nvfp4_eden": "nvfp4",
    "nvfp4_eden_46": "nvfp4", "mxfp4": "mxfp4", "mxfp4_floor": "mxfp4", "mxfp8": "mxfp8", "mxfp8_floor": "mxfp8",
    "mxfp8_ceil": "mxfp8", "mxfp8_even": "mxfp8", "fp8_tensor": "fp8_tensor", "fp8_tensor_pow2": "fp8_tensor",
    "fp8_row": "fp8_row", "fp8_128x128": "fp8_block", "fp8_128x128_pow2": "fp8_block",
}  # fmt: skip
"""What each format is stored as; no layout holds the others."""

SHAPES = {  # (rows, k) = (200, 256): part, dtype and shape by layout and scheme
    ("compressed-tensors", "nvfp4"): "weight_packed uint8 (200, 128) weight_scale float8_e4m3fn (200, 16) "
    "weight_global_scale float32 (1,)",
    ("modelopt", "nvfp4"): "weight uint8 (200, 128) weight_scale float8_e4m3fn (200, 16) weight_scale_2 float32 ()",
    ("compressed-tensors", "mxfp4"): "weight_packed uint8 (200, 128) weight_scale uint8 (200, 8)",
    ("compressed-tensors", "mxfp8"): "weight float8_e4m3fn (200, 256) weight_scale uint8 (200, 8)",
    ("modelopt", "mxfp8"): "weight float8_e4m3fn (200, 256) weight_scale uint8 (200, 8)",
    ("compressed-tensors", "fp8_tensor"): "weight float8_e4m3fn (200, 256) weight_scale float32 (1,)",
    ("modelopt", "fp8_tensor"): "weight float8_e4m3fn (200, 256) weight_scale float32 ()",
    ("compressed-tensors", "fp8_row"): "weight float8_e4m3fn (200, 256) weight_scale float32 (200, 1)",
    ("modelopt", "fp8_row"): "weight float8_e4m3fn (200, 256) weight_scale float32 (200,)",
    ("compressed-tensors", "fp8_block"): "weight float8_e4m3fn (200, 256) weight_scale float32 (2, 2)",
    ("modelopt", "fp8_block"): "weight float8_e4m3fn (200, 256) weight_scale float32 (2, 1, 2, 1)",
    ("deepseek", "fp8_block"): "weight float8_e4m3fn (200, 256) weight_scale_inv float32 (2, 2)",
}


def matrix() -> Tensor:
    """(200, 256) bf16 over many binades, with a zero block: rows are no whole number of 16 or 128."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(200, 256, generator=g) * 2.0 ** torch.randint(-6, 6, (200, 1), generator=g)
    w[3, :32] = 0
    return w.bfloat16()


def test_the_formats_that_a_layout_holds() -> None:
    """Neither more nor fewer: another element, scale, block or constant is none of them."""
    assert {name: scheme for name, f in FORMATS.items() if (scheme := packed.scheme_of(f))} == HELD


@pytest.mark.parametrize("name", HELD)
def test_a_matrix_comes_back_bit_for_bit(name: str) -> None:
    """Through every layout that holds it; parts, dtypes and shapes are those written down above."""
    q = FORMATS[name].quantize(matrix())
    for layout in (layout for layout, schemes in packed.LAYOUTS.items() if HELD[name] in schemes):
        tensors = packed.pack(q, layout)
        found = " ".join(f"{part} {str(t.dtype)[6:]} {tuple(t.shape)}" for part, t in tensors.items())
        assert found == SHAPES[layout, HELD[name]]
        exact = None if q.tensor_scale is None else q.tensor_scale.item()
        assert torch.equal(packed.unpack(tensors, exact).dequantize(), q.dequantize())


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; exponent 0 is subnormal."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if byte & 128 else magnitude


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "mxfp4", "mxfp8", "fp8_128x128"])
def test_the_bytes_say_the_weight(name: str) -> None:
    """By the words of the layouts alone, in fp64: the nibbles, the scale bytes, and which scale divides."""
    w = matrix()
    q, layouts = FORMATS[name].quantize(w), packed.LAYOUTS
    for layout in (layout for layout in layouts if HELD[name] in layouts[layout]):
        t = packed.pack(q, layout)
        codes = (t["weight_packed"] if "weight_packed" in t else t["weight"]).view(torch.uint8)
        scales = t["weight_scale_inv" if layout == "deepseek" else "weight_scale"]
        for row, column in [(0, 0), (0, 1), (1, 15), (1, 16), (3, 5), (127, 255), (199, 128), (199, 254)]:
            if codes.dtype == torch.uint8 and codes.shape[1] == 128:
                byte = int(codes[row, column // 2])
                value = e2m1(byte >> 4 if column % 2 else byte & 15)
            else:
                value = e4m3(int(codes[row, column]))
            if HELD[name] == "nvfp4":
                value *= e4m3(int(scales.view(torch.uint8)[row, column // 16]))
                value = (
                    value * t["weight_scale_2"].item()
                    if layout == "modelopt"
                    else value / t["weight_global_scale"].item()
                )
            elif scales.dtype == torch.uint8:
                value *= 2.0 ** (int(scales[row, column // 32]) - 127)
            else:
                value *= scales.reshape(2, 2)[row // 128, column // 128].item()
            assert value == pytest.approx(q.dequantize()[row, column].item(), rel=2.0**-22, abs=0)


def test_global_scales_have_the_conventions_of_their_layouts() -> None:
    """weight_global_scale is 448 * 6 / amax, weight_scale_2 its reciprocal, to a rounding of fp32."""
    w = matrix()
    amax = w.abs().max().item()
    q = FORMATS["nvfp4"].quantize(w)
    assert packed.pack(q, "compressed-tensors")["weight_global_scale"].item() == pytest.approx(
        2688 / amax, rel=2.0**-22
    )
    assert packed.pack(q, "modelopt")["weight_scale_2"].item() == pytest.approx(amax / 2688, rel=2.0**-22)
    zero = packed.pack(FORMATS["nvfp4"].quantize(torch.full((16, 16), 1e-39)), "compressed-tensors")
    assert zero["weight_global_scale"].isfinite().all()  # where the reciprocal would overflow


def test_a_rounded_reciprocal_is_not_enough() -> None:
    """Of 64 maxima some come back only by the exact tensor scale, and all do with it."""
    lost = 0
    for i in range(64):
        q = FORMATS["nvfp4"].quantize(torch.full((1, 16), 1 + i / 64).bfloat16())
        assert q.tensor_scale is not None
        tensors = packed.pack(q, "compressed-tensors")
        assert torch.equal(packed.unpack(tensors, q.tensor_scale.item()).dequantize(), q.dequantize())
        lost += not torch.equal(packed.unpack(tensors).dequantize(), q.dequantize())
    assert lost > 0


def test_what_is_no_packed_weight_is_named() -> None:
    """An int8 weight of some other tool: dtypes and shapes are in the sentence."""
    with pytest.raises(ValueError, match=r"no layout here has a weight as weight int8 \(4, 4\), weight_scale float32"):
        packed.unpack({"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": torch.ones(4, 1)})


# ---- a run

WIDE = "model.dim=128 model.layers=2 model.heads=2 model.kv_heads=1 model.ffn_dim=256"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LAYERS = [
    f"layers.{i}.{of}.{part}" for i in (0, 1) for of, parts in (("attn", ATTENTION), ("mlp", MLP)) for part in parts
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny NVFP4 run of 4 steps, saved after 2 and 4, whose forward leaves NVFP4 in the last quarter."""
    text, r = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(10):
        (text / f"{i}.txt").write_text(" ".join(r.choices(["one", "two", "three", "four"], k=200)))
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = f"recipe=nvfp4_tiny {WIDE} model.tie_embeddings=false train.checkpoint_every=2 train.global_batch=2"
    words += " data=local_text data.tokenizer=byte data.seq_len=64 data.validation_frac=0.2 data.validation_sequences=2"
    words += " train.steps=4 train.micro_batch=2 precision.schedule=[{from:0.7,set:{nvfp4.fprop:bf16}}]"
    words += f" data.sources.0.path={text} data.cache_dir={text / 'cache'} run.dir={folder}"
    assert train(words.split()) == 0
    return folder


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exports the checkpoint of step 2 and returns the folder."""

    def go(*arguments: object, step: int = 2) -> Path:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["lowprec-export", run, "--step", step, "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        main()
        assert capsys.readouterr() == (f"{out}\n", "")
        return out

    return go


@pytest.fixture(scope="module")
def masters(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The fp32 weights of step 2, by our names."""
    out = tmp_path_factory.mktemp("plain") / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lowprec-export", str(run), "--step", "2", "--out", str(out)])
        main()
    return load_file(out)


def theirs(run: Path) -> dict[str, str]:
    return hf.names(open_config(run))


def open_config(run: Path) -> Any:
    return from_yaml((run / "config.yaml").read_text()).model


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("layout", "precision", "format"),
    [("compressed-tensors", None, "nvfp4_2d"), ("modelopt", None, "nvfp4_2d"), ("compressed-tensors", "mxfp4", "mxfp4"),
     ("compressed-tensors", "fp8_tensorwise", "fp8_tensor"), ("deepseek", "fp8_blockwise", "fp8_128x128"),
     ("modelopt", "fp8_rowwise", "fp8_row_pow2")],
)  # fmt: skip
def test_a_folder_read_back_is_what_the_format_says(
    export: Any, run: Path, masters: dict[str, Tensor], layout: str, precision: str | None, format: str
) -> None:
    """Every layer of the plan as training multiplied it, bit for bit, the rest in bf16, under the names of HF."""
    folder = export("--format", layout, "--own-scales", *(["--precision", precision] if precision else []))
    f = FORMATS[format] if format in FORMATS else load_format(format, str(precision))
    found = dict(packed.read(folder))
    assert found.keys() == set(theirs(run).values())
    for ours, name in theirs(run).items():
        w = masters[ours].bfloat16()
        packs = ours.removesuffix(".weight") in LAYERS
        assert torch.equal(found[name], f.quantize(w).dequantize() if packs else w), name
    config = said(folder)
    assert config.get("ignore", config.get("modules_to_not_convert")) == ["lm_head"]
    assert hf.read_config(folder) == replace(open_config(run), head_dim=64)


def load_format(name: str, precision: str) -> Any:
    from lowprec.linear import load_precision

    (found,) = {r.fprop.b.format for r in load_precision(precision).linear.values() if r.fprop.b.format}
    assert found.name == name
    return found


def test_layers_that_engines_join_share_a_scale(export: Any, run: Path, masters: dict[str, Tensor]) -> None:
    """q, k and v are quantised by their common maximum, gate and up by theirs, o and down by their own."""
    folder, f = export("--format", "compressed-tensors"), FORMATS["nvfp4_2d"]
    found, tensors = dict(packed.read(folder)), load_file(folder / "model.safetensors")
    for joined in (LAYERS[0:3], LAYERS[3:4], LAYERS[4:6], LAYERS[6:7]):
        weights = [masters[f"{layer}.weight"].bfloat16() for layer in joined]
        amax = torch.stack([w.abs().amax() for w in weights]).amax()
        names = [theirs(run)[f"{layer}.weight"] for layer in joined]
        assert len({tensors[n.replace(".weight", ".weight_global_scale")].item() for n in names}) == 1
        for name, w in zip(names, weights):
            assert torch.equal(found[name], f.quantize(w, amax=amax).dequantize())
    assert len({w.abs().amax().item() for w in (masters[f"{layer}.weight"] for layer in LAYERS[:3])}) == 3


def test_what_config_json_says_of_nvfp4(export: Any) -> None:
    """Without a calibration: weights in E2M1 by 16, inputs as they are, under the keys of compressed-tensors."""
    assert said(export("--format", "compressed-tensors")) == {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
                            "group_size": 16, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "nvfp4-pack-quantized",
            }
        },
        "ignore": ["lm_head"],
    }  # fmt: skip
    folder = export("--format", "modelopt")
    assert json.loads((folder / "hf_quant_config.json").read_text())["quantization"] == {
        "quant_algo": "W4A16_NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]
    }  # fmt: skip
    assert (said(folder)["quant_method"], said(folder)["quant_algo"]) == ("modelopt", "W4A16_NVFP4")


def test_calibration_measures_the_inputs_of_training(export: Any, run: Path) -> None:
    """One micro-batch: the maximum of what each layer multiplied, as 448 * 6 / amax or its reciprocal."""
    seen = open_run(run, 2).capture("layers.*")
    tensors = load_file(export("--format", "compressed-tensors", "--calibrate", 1) / "model.safetensors")
    opt = export("--format", "modelopt", "--calibrate", 1)
    reciprocals = load_file(opt / "model.safetensors")
    for layer in LAYERS:
        module, amax = theirs(run)[f"{layer}.weight"].removesuffix(".weight"), seen[layer].x_TK.abs().max().item()
        assert tensors[f"{module}.input_global_scale"].item() == pytest.approx(2688 / amax, rel=2.0**-22)
        assert reciprocals[f"{module}.input_scale"].item() == pytest.approx(amax / 2688, rel=2.0**-22)
    assert json.loads((opt / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "NVFP4"


def test_several_schemes_in_one_model(export: Any, run: Path, tmp_path: Path) -> None:
    """Attention in FP8 rows, MLP in MXFP8: two groups with their own targets, and every weight reads back."""
    file = tmp_path / "mixed.yaml"
    linear = {"rows": {"fprop": {"x": "fp8_row", "w": "fp8_row"}}, "mx": {"fprop": {"x": "mxfp8", "w": "mxfp8"}}}
    rules = [("lm_head", "bf16"), ("*.attn.*", "rows"), ("*", "mx")]
    file.write_text(yaml.safe_dump({"linear": linear, "rules": [{"match": m, "recipe": r} for m, r in rules]}))
    config = said(export("--format", "compressed-tensors", "--precision", file))
    groups = config["config_groups"]
    assert config["format"] == "mixed-precision"
    assert [g["format"] for g in groups.values()] == ["float-quantized", "mxfp8-quantized"]
    targets = [name for g in groups.values() for name in g["targets"]]
    assert sorted(targets) == sorted(theirs(run)[f"{layer}.weight"].removesuffix(".weight") for layer in LAYERS)
    folder = export("--format", "modelopt", "--precision", file)
    details = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert details["quant_algo"] == "MIXED_PRECISION"
    assert details["quantized_layers"]["model.layers.1.mlp.up_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    assert details["quantized_layers"]["model.layers.1.self_attn.q_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}


def test_what_a_controller_raised_is_not_packed(run: Path) -> None:
    """Of the run's own recipe, at the checkpoint; engines that join it with its like are warned of."""
    progress = {"step": 2, "controller": {"raised": [["layers.0.attn.k_proj", "fprop", "bf16", 0]]}}
    chosen, plain = packings(from_yaml((run / "config.yaml").read_text()), progress, Options("compressed-tensors"))
    assert sorted({*LAYERS} - chosen.keys()) == ["layers.0.attn.k_proj"] and "layers.0.attn.k_proj" in plain
    (remark,) = unlike(chosen, plain)
    assert remark.startswith("layers.0.attn.q_proj, layers.0.attn.k_proj, layers.0.attn.v_proj are not packed alike")


def test_modules_of_nemotron_h_are_named_as_in_files_and_in_transformers() -> None:
    """transformers 5 calls the part of the model `model.`, files and vLLM `backbone.`: both are left alone."""
    config = quantization_config("compressed-tensors", {"backbone.layers.1.mixer.up_proj": Choice("nvfp4", False)},
                                 ["backbone.layers.0.mixer.in_proj", "lm_head"])  # fmt: skip
    assert config["ignore"] == ["backbone.layers.0.mixer.in_proj", "lm_head", "model.layers.0.mixer.in_proj"]


def test_plain_folders_hold_the_weights_and_the_tokenizer(export: Any, run: Path, masters: dict[str, Tensor]) -> None:
    """bf16 and fp32 under HF's names, in several files with an index; the tokenizer is the run's."""
    folder = export("--format", "hf", "--max-shard-bytes", "1e5")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            assert name in opened.keys() and opened.metadata()["step"] == "2"  # noqa: SIM118 (no mapping)
    assert index["weight_map"].keys() == set(theirs(run).values()) and len(set(index["weight_map"].values())) > 3
    found = dict(hf.read_weights(folder, hf.read_config(folder)))
    assert all(torch.equal(found[name], masters[name].bfloat16()) for name in theirs(run))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    exact = dict(hf.read_weights(export("--format", "hf", "--dtype", "fp32"), open_config(run)))
    assert all(torch.equal(exact[name], masters[name]) for name in theirs(run))
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("one").ids == [111, 110, 101]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 256}


def test_transformers_computes_the_same(export: Any, run: Path) -> None:
    """Where transformers is installed: the logits of the exported folder are ours."""
    transformers = pytest.importorskip(
        "transformers", reason="an optional package; the folder's content is tested above"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(export("--format", "hf", "--dtype", "fp32"))
    loaded = open_run(run, 2)
    ids = torch.arange(64)[None]
    with torch.no_grad(), loaded.plan.high_precision():
        ours = loaded.model(ids).float()
    # training's weights are rounded to bf16, one part in 2**8
    assert torch.allclose(model(ids).logits, ours, atol=0.05 * ours.abs().max().item())


MISTAKES = {
    "--format compressed-tensors --precision fp8_delayed": "scaled by a remembered maximum (amax: delayed)",
    "--format compressed-tensors --precision halo1_fp8": "its weight is rotated (",
    "--format compressed-tensors --precision bitnet_158": "no layout holds format ternary;",
    "--format modelopt --precision mxfp4": "modelopt has no mxfp4 (it has nvfp4, mxfp8, fp8_tensor,",
    "--format modelopt --precision fp8_tensorwise": "measure it with --calibrate",
    "--format deepseek": "deepseek has no nvfp4 (it has fp8_block)",
    "--format compressed-tensors --step 4": "the run's recipe at step 4 quantises no weight in its forward product",
    "--format compressed-tensors --precision bf16": "bf16 quantises no weight in its forward product",
    "--format hf --precision nvfp4": "--precision is for packed weights, which --format hf has not",
    "--own-scales": "--own-scales is for packed weights, which --format safetensors has not",
    "--format modelopt --calibrate 0": "--calibrate 0 must be at least 1 micro-batch",
    "--format hf --out {run}": "exists already: remove it, or choose another --out",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, words: str) -> None:
    """What cannot be packed says which layer and why; nothing is written."""
    line = f"lowprec-export {run} --out {tmp_path / 'out'} --step 2 {words.format(run=run)}"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as caught:
        main()
    sentence = str(caught.value)
    assert sentence.startswith("lowprec-export: ") and MISTAKES[words] in sentence and "\n" not in sentence
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_no_number_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path
) -> None:
    """The last layer has an infinity: it is named, and what was written before it is gone."""
    load = weights.load

    def broken(wanted: weights.Sizes, *where: Any) -> dict[str, Tensor]:
        found = load(wanted, *where)
        for name in found.keys() & {"layers.1.mlp.down_proj.weight"}:
            found[name][5, 7] = torch.inf
        return found

    monkeypatch.setattr(weights, "load", broken)
    line = f"lowprec-export {run} --format modelopt --max-shard-bytes 1e4 --out {tmp_path / 'out'} --step 2"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match=r"layer layers\.1\.mlp\.down_proj holds NaN or infinity"):
        main()
    assert not list(tmp_path.iterdir())
