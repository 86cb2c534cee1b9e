"""lowprec-export: the weights of a checkpoint as safetensors, under plain names or as a folder of Hugging Face.

    lowprec-export runs/nvfp4                                    # runs/nvfp4/model_00000100.safetensors, fp32
    lowprec-export runs/nvfp4 --step 50 --dtype bf16 --out small.safetensors
    lowprec-export runs/big --out big/model.safetensors --max-shard-bytes 5e9
    lowprec-export runs/nvfp4 --format hf --out my-model         # what transformers reads, bf16
    lowprec-export runs/nvfp4 --format compressed-tensors        # packed codes and scales, as vLLM reads them
    lowprec-export runs/bf16 --format modelopt --precision nvfp4 --calibrate 8     # post-training quantisation

One process, whatever number of ranks and whatever layout wrote the checkpoint. The checksums of the whole checkpoint
are looked at first, then only the keys of the model are read, one output file's worth at a time or less. The model is
built only for `--calibrate`, which runs it to see how large its inputs get.

`--format safetensors` (the default): one file under the names of `nn.Linear` layers. fp32 is exact: the master
weights, bit for bit; bf16 rounds them to the nearest. Above `--max-shard-bytes` there are several files,
out-00001-of-00003.safetensors, ..., and out.safetensors.index.json that says which tensor is where (the layout of
Hugging Face). A head that is tied to the embedding is written under both names.

The other formats write a folder: config.json, model*.safetensors, tokenizer.json. `hf` holds plain weights;
`compressed-tensors`, `modelopt` and `deepseek` hold packed ones (docs/export.md says which bytes).

The header of every file says: run, step, tokens, and config_sha256, the SHA-256 of the run's config.yaml.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of launch/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch
from torch.distributed.checkpoint.metadata import Metadata

from lowprec.launch import weights
from lowprec.launch.packed import LAYOUTS
from lowprec.launch.weights import Sizes, about, cast, checkpoint_of, put, sizes
from lowprec.train import reader

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN, FORMATS = "safetensors", ("safetensors", "hf", *LAYOUTS)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("lowprec-export", description="Write a checkpoint's weights as safetensors.")
    p.add_argument("run_dir", type=Path, help="folder of a run (its run.dir)")
    p.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    p.add_argument("--format", choices=FORMATS, default=PLAIN, help="what to write (default: %(default)s)")
    p.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/model_<step>.safetensors), or folder")
    p.add_argument("--dtype", choices=DTYPES, help="of weights that are not packed (default: fp32; bf16 in a folder)")
    p.add_argument(
        "--max-shard-bytes", type=float, help="begin another file after this many (default: in a folder 5e9)"
    )
    packed = p.add_argument_group("packed formats")
    packed.add_argument("--precision", help="quantise to this precision file, not as the run does at that step")
    packed.add_argument(
        "--calibrate", type=int, metavar="N", help="measure inputs over N micro-batches, for fixed scales"
    )
    packed.add_argument("--own-scales", action="store_true", help="a tensor scale for each of q, k, v and of gate, up")
    return p


def export(a: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """Writes and returns the files (the index, if any, last) or the folder, and remarks. ValueError: one sentence."""
    if a.max_shard_bytes is not None and a.max_shard_bytes < 1:
        raise ValueError(f"--max-shard-bytes {a.max_shard_bytes:g} must be at least 1")
    if a.calibrate is not None and a.calibrate < 1:
        raise ValueError(f"--calibrate {a.calibrate} must be at least 1 micro-batch")
    for flag in ("precision", "calibrate", "own_scales"):
        if a.format not in LAYOUTS and getattr(a, flag):
            name, others = flag.replace("_", "-"), ", ".join(LAYOUTS)
            raise ValueError(
                f"--{name} is for packed weights, which --format {a.format} has not: choose one of {others}"
            )
    if a.format == PLAIN:
        return export_file(a), []
    from lowprec.launch.export_folder import Options, export  # the model and all that belongs to it

    dtype, most_bytes = DTYPES[a.dtype or "bf16"], a.max_shard_bytes or 5e9
    layout = a.format if a.format in LAYOUTS else None
    options = Options(layout, dtype, most_bytes, a.precision, a.calibrate or 0, a.own_scales)
    out, remarks = export(a.run_dir, a.step, a.out, options)
    return [out], remarks


def export_file(a: argparse.Namespace) -> list[Path]:
    """Plain weights in one file, or several and their index, which is last."""
    folder, step = checkpoint_of(a.run_dir, a.step)
    out, to = a.out or a.run_dir / f"model_{step:08d}.safetensors", DTYPES[a.dtype or "fp32"]
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    index = reader.open_index(folder)
    shards = divide(sizes(index, folder), to, a.max_shard_bytes)
    files = [out]
    if len(shards) > 1:
        files = [out.with_name(f"{out.stem}-{i + 1:05d}-of-{len(shards):05d}{out.suffix}") for i in range(len(shards))]
        files.append(out.with_name(f"{out.name}.index.json"))
    if taken := next((file for file in files if file.exists()), None):
        raise ValueError(f"{taken} exists already: remove it, or choose another --out")

    header = about(a.run_dir, folder, index) | {"dtype": a.dtype or "fp32", "format": "pt"}
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(files, shards, index, folder, to, header)
    except BaseException:  # all or nothing; none was there before
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return files


def _write(
    files: list[Path], shards: list[Sizes], index: Metadata, folder: Path, to: torch.dtype, header: dict[str, str]
) -> None:
    """The files of an export, and their index if there are several."""
    for file, shard in zip(files, shards):
        found = weights.load(shard, index, folder)
        put(file, {name: cast(tensor, to) for name, tensor in found.items()}, header)
    if len(shards) > 1:
        total_bytes = sum(bytes_of(size, dtype, to) for s in shards for size, dtype in s.values())
        places = {name: file.name for file, shard in zip(files, shards) for name in shard}
        content = {"metadata": {**header, "total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        files[-1].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def divide(held: Sizes, to: torch.dtype, most_bytes: float | None) -> list[Sizes]:
    """Cuts the list of weights into files of at most `most_bytes`; a larger tensor has a file of its own."""
    shards: list[Sizes] = [{}]
    taken_bytes = 0
    for name, (size, dtype) in held.items():
        own_bytes = bytes_of(size, dtype, to)
        if most_bytes is not None and shards[-1] and taken_bytes + own_bytes > most_bytes:
            shards.append({})
            taken_bytes = 0
        shards[-1][name] = size, dtype
        taken_bytes += own_bytes
    return shards


def bytes_of(size: torch.Size, dtype: torch.dtype, to: torch.dtype) -> int:
    return size.numel() * (to if dtype.is_floating_point else dtype).itemsize


def main() -> None:
    arguments = parser().parse_args()
    try:
        files, remarks = export(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"lowprec-export: {error}")
    print(*files, sep="\n")
    for remark in remarks:
        print(f"lowprec-export: {remark}", file=sys.stderr)


if __name__ == "__main__":
    main()
