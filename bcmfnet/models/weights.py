"""Weights files: safetensors of ours, read and written, and torch files, read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.errors import CheckpointError, MissingFileError

FORMAT = 1
BEST = "weights/best.safetensors"
"""Where the folder of a training run has its best weights."""
METADATA_KEY = "bcmfnet"
WRAPPERS = re.compile(r"^(module\.|model\.|_orig_mod\.)+")


def read_weights(path: str | PathLike) -> tuple[dict[str, Tensor], dict]:
    """State dict, on the CPU, and metadata of a weights file.

    A .safetensors of ours has metadata: format, model, num_classes, aux, options and what else was saved.
    Any other name is read as a torch file: a state dict, or one under "state_dict" or "model", no metadata.
    The folder of a training run stands for its best weights.

    Raises:
        MissingFileError: no file at the path. CheckpointError: an empty, truncated or foreign file.
    """
    path = _file_of(Path(path))
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty weights file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})


def _file_of(path: Path) -> Path:
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        found = f"a folder without {BEST}" if path.is_dir() else "no file"
        raise MissingFileError(f"{path}: expected a weights file or the folder of a run, found {found}")
    return file


def checked(path: str | PathLike, values: Any, key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
    """The value of a dotted key in nested dicts that were read from a file.

    Raises:
        CheckpointError: the key is missing or its value does not fit; names file, key, expected and got.
    """
    value, found = values, True
    for part in key.split("."):
        found = found and isinstance(value, Mapping) and part in value
        value = value[part] if found else None
    if not (found and fits(value)):
        raise CheckpointError(f"{path}: {key}: expected {expected}, got {reprlib.repr(value) if found else 'nothing'}")
    return value


def check_same_tensors(path: str | PathLike, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a file's tensors have the names, the shapes and the kind of number of one's own."""
    wrong = [key for key in own.keys() | state.keys() if not _same_kind(own.get(key), state.get(key))]
    if wrong:
        key, more = min(wrong), f" (and {len(wrong) - 1} other tensors)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{path}: {key}: expected {_kind(own.get(key))}, got {_kind(state.get(key))}{more}")


def _same_kind(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "nothing" if value is None else type(value).__name__


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
    checked(path, metadata, "format", str(FORMAT), lambda value: type(value) is int and value == FORMAT)
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
