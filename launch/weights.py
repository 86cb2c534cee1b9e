"""The weights of a checkpoint as tensors by name, read a few at a time; neither the model nor its recipe is built."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lowprec.config import from_yaml
from lowprec.train import reader
from lowprec.train.checkpoint import committed

_MODEL = "model."

Sizes = dict[str, tuple[torch.Size, torch.dtype]]


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


def sizes(index: Metadata, folder: Path) -> Sizes:
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


def load(wanted: Sizes, index: Metadata, folder: Path) -> dict[str, Tensor]:
    """These tensors, as stored."""
    found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in wanted.items()}
    reader.read({"model": found}, folder, index)
    return found


def cast(tensor: Tensor, to: torch.dtype) -> Tensor:
    return tensor.to(to) if tensor.is_floating_point() else tensor


def progress_of(folder: Path, index: Metadata) -> dict[str, Any]:
    """What a checkpoint says of its run: step, tokens, the controller's decisions and more."""
    held: dict[str, Any] = {"progress": ""}
    reader.read(held, folder, index)
    progress: dict[str, Any] = json.loads(held["progress"])
    return progress


def about(run_dir: Path, folder: Path, index: Metadata) -> dict[str, str]:
    """What the header of a file says of its origin."""
    progress, config = progress_of(folder, index), (run_dir / "config.yaml").read_text(encoding="utf-8")
    return {
        "run": from_yaml(config).name,
        "step": str(progress["step"]),
        "tokens": str(progress["tokens"]),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
    }


def put(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Writes one file whole or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    try:
        save_file(tensors, draft, header)
        os.replace(draft, file)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"{file} cannot be written: {error}") from error  # safetensors wraps a full disk in its own
