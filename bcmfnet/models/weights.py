"""Weights files: safetensors of ours, read and written, and torch files, read."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from bcmfnet.errors import CheckpointError

FORMAT = 1
METADATA_KEY = "bcmfnet"
WRAPPERS = re.compile(r"^(module\.|model\.|_orig_mod\.)+")


def read_weights(path: str | PathLike) -> tuple[dict[str, Tensor], dict]:
    """State dict, on the CPU, and metadata of a weights file.

    A .safetensors of ours has metadata: format, model, num_classes, aux, options and what else was saved.
    Any other name is read as a torch file: a state dict, or one under "state_dict" or "model", no metadata.

    Raises:
        CheckpointError: a missing, empty, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty weights file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})


def save_weights(path: str | PathLike, model: nn.Module, metadata: Mapping | None = None) -> None:
    """Write a model's state dict as safetensors; a former file stays until the new one is complete.

    Args:
        metadata: JSON values to keep beside the weights, e.g. label_table, mean, std. A model that
            `create_model` did not build needs `model` and `num_classes` in it.

    Raises:
        CheckpointError: the file cannot be written. ValueError: incomplete metadata.
    """
    from safetensors.torch import save

    metadata = {**getattr(model, "recipe", {}), **(metadata or {}), "format": FORMAT}
    if not {"model", "num_classes"} <= metadata.keys():
        raise ValueError("metadata: expected at least 'model' and 'num_classes' to rebuild the model from")
    # contiguous() also undoes channels_last, which safetensors cannot store
    state = unwrapped(model.state_dict())
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    replace_file(path, save(tensors, {METADATA_KEY: json.dumps(metadata)}))


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel, training wrappers and torch.compile."""
    return {WRAPPERS.sub("", key): tensor for key, tensor in state.items()}


def replace_file(path: str | PathLike, data: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: `path` is never half a file.

    Raises:
        CheckpointError: the write failed (disk full, no such folder, ...); a former file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({_first_line(error)})") from error
    if text is None:
        return state, {}
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise CheckpointError(f"{path}: expected metadata of format {FORMAT}, got {found!r}")
    return state, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on bytes that are not a checkpoint
        raise CheckpointError(f"{path}: not a complete torch weights file ({_first_line(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = content if isinstance(content, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: expected a state dict, or one under state_dict or model")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
