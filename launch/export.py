"""lowprec-export: the weights of a checkpoint as safetensors, under the names of plain `nn.Linear` layers.

    lowprec-export runs/nvfp4                                    # runs/nvfp4/model_00000100.safetensors, fp32
    lowprec-export runs/nvfp4 --step 50 --dtype bf16 --out small.safetensors
    lowprec-export runs/big --out big/model.safetensors --max-shard-bytes 5e9

One process, whatever number of ranks and whatever layout wrote the checkpoint; neither the model nor its recipe is
built. The checksums of the whole checkpoint are looked at first, then only the keys of the model are read, one output
file's worth at a time. fp32 is exact: the master weights, bit for bit; bf16 rounds them to the nearest. Above
`--max-shard-bytes` there are several files, out-00001-of-00003.safetensors, ..., and out.safetensors.index.json that
says which tensor is where (the layout of Hugging Face). A head that is tied to the embedding is written under both
names.

The header of every file says: run, step, tokens, dtype, and config_sha256, the SHA-256 of the run's config.yaml.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of launch/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lowprec.config import from_yaml
from lowprec.train import reader
from lowprec.train.checkpoint import committed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MODEL = "model."


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("lowprec-export", description="Write a checkpoint's weights as safetensors.")
    p.add_argument("run_dir", type=Path, help="folder of a run (its run.dir)")
    p.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    p.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/model_<step>.safetensors)")
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights in the file (default: %(default)s)")
    p.add_argument("--max-shard-bytes", type=float, help="begin another file after this many (default: one file)")
    return p


def export(a: argparse.Namespace) -> list[Path]:
    """Writes the files and returns them, the index (if any) last. Raises ValueError with one sentence."""
    if a.max_shard_bytes is not None and a.max_shard_bytes < 1:
        raise ValueError(f"--max-shard-bytes {a.max_shard_bytes:g} must be at least 1")
    folder, step = checkpoint_of(a.run_dir, a.step)
    out = a.out or a.run_dir / f"model_{step:08d}.safetensors"
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    index = reader.open_index(folder)
    shards = divide(weights(index, folder), DTYPES[a.dtype], a.max_shard_bytes)
    files = [out]
    if len(shards) > 1:
        files = [out.with_name(f"{out.stem}-{i + 1:05d}-of-{len(shards):05d}{out.suffix}") for i in range(len(shards))]
        files.append(out.with_name(f"{out.name}.index.json"))
    if taken := next((file for file in files if file.exists()), None):
        raise ValueError(f"{taken} exists already: remove it, or choose another --out")

    header = about(a.run_dir, folder, index) | {"dtype": a.dtype, "format": "pt"}
    out.parent.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(files, shards):
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shard.items()}
        reader.read({"model": found}, folder, index)
        put(file, {name: cast(tensor, DTYPES[a.dtype]) for name, tensor in found.items()}, header)
    if len(shards) > 1:
        total_bytes = sum(bytes_of(size, dtype, DTYPES[a.dtype]) for s in shards for size, dtype in s.values())
        places = {name: file.name for file, shard in zip(files, shards) for name in shard}
        content = {"metadata": {**header, "total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        files[-1].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return files


def checkpoint_of(run_dir: Path, step: int | None) -> tuple[Path, int]:
    """The folder and the step of a run's newest checkpoint, or of that after `step` steps."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} holds no config.yaml: give the folder of a run (its run.dir)")
    found = committed(run_dir / "checkpoints")
    if not found:
        raise ValueError(f"{run_dir} holds no complete checkpoint: let the run reach one")
    if step is not None and step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}: it has {', '.join(map(str, found))}")
    step = max(found) if step is None else step
    return found[step], step


Weights = dict[str, tuple[torch.Size, torch.dtype]]


def weights(index: Metadata, folder: Path) -> Weights:
    """Shape and stored dtype of each of the model's tensors by name."""
    held = index.state_dict_metadata.items()
    found = {
        key.removeprefix(_MODEL): (entry.size, entry.properties.dtype)
        for key, entry in held
        if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    if not found:
        raise ValueError(f"the checkpoint {folder} holds no weights under the names that this version writes")
    return dict(sorted(found.items()))


def divide(held: Weights, to: torch.dtype, most_bytes: float | None) -> list[Weights]:
    """Cuts the list of weights into files of at most `most_bytes`; a larger tensor has a file of its own."""
    shards: list[Weights] = [{}]
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


def cast(tensor: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    return tensor.to(to) if tensor.is_floating_point() else tensor


def about(run_dir: Path, folder: Path, index: Metadata) -> dict[str, str]:
    """What the header of a file says of its origin."""
    held: dict[str, Any] = {"progress": ""}
    reader.read(held, folder, index)
    progress, config = json.loads(held["progress"]), (run_dir / "config.yaml").read_text(encoding="utf-8")
    return {
        "run": from_yaml(config).name,
        "step": str(progress["step"]),
        "tokens": str(progress["tokens"]),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
    }


def put(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """Writes one file whole or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    try:
        save_file(tensors, draft, header)
        os.replace(draft, file)
    except Exception as error:  # safetensors wraps a full disk in an error of its own
        draft.unlink(missing_ok=True)
        raise ValueError(f"{file} cannot be written: {error}") from error


def main() -> None:
    arguments = parser().parse_args()
    try:
        files = export(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"lowprec-export: {error}")
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
