"""Weights files: safetensors of ours, read and written, and torch files, read."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.errors import CheckpointError, MissingFileError

FORMAT = 1
MSDOS_FOLDER = 0x10  # bit of a zip entry's external attributes
BEST = "weights/best.safetensors"
"""Where the folder of a training run has its best weights."""
SHIPPED = Path(__file__).with_name("shipped")
"""Weights that come with the package, each with a model card and the licence of the frames that it was trained on."""
METADATA_KEY, DIGEST_KEY = "bcmfnet", "bcmfnet_sha256"
WRAPPERS = ("module", "model", "_orig_mod")
"""Names under which DataParallel, averaged models, training wrappers and torch.compile keep the network."""
PREFIXES = re.compile(rf"^(({'|'.join(WRAPPERS)})\.)+|\b_orig_mod\.")


def list_weights() -> list[str]:
    """Names of the weights that come with the package; each stands for its file wherever a path of weights does."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def read_weights(path: str | PathLike) -> tuple[dict[str, Tensor], dict]:
    """State dict, on the CPU, and metadata of a weights file, safetensors or torch's, whatever its name.

    A safetensors file of ours has metadata: format, model, num_classes, aux, options and what else was saved, and the
    digest of all that it holds. Of others the state dict alone is read, in a torch file also one under "state_dict" or
    "model". The folder of a training run stands for its best weights, and a name of `list_weights` for those.

    Raises:
        MissingFileError: no file at the path. CheckpointError: an empty, truncated, damaged or foreign file, or a
            value that is not finite, or a variance below 0.
    """
    path = Path(path)
    try:
        path = _file_of(path)
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path}: empty weights file")
    if _is_text(start):
        text = reprlib.repr(start.decode().split("\n")[0])
        raise CheckpointError(f"{path}: expected a weights file, got a text that starts with {text}")
    state, metadata = _read_safetensors(path) if _is_safetensors(path, start) else (_read_torch(path), {})
    check_values(path, state)
    return state, metadata


def _file_of(path: Path) -> Path:
    if str(path) in list_weights():
        return SHIPPED / f"{path}.safetensors"
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        found = "a device or a pipe" if file.exists() else f"a folder without {BEST}" if path.is_dir() else "no file"
        *choices, last = ["a weights file", "the folder of a run", *list_weights()]
        near = difflib.get_close_matches(str(path), list_weights(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MissingFileError(f"{path}: expected {', '.join(choices)} or {last}, found {found}{hint}")
    return file


def _is_safetensors(path: Path, start: bytes) -> bool:
    """By its start, a length and JSON; the name decides where that is lost and it is no archive of torch's either."""
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK")


def _is_text(start: bytes) -> bool:
    """Whether a file starts as web pages and the pointers of git-lfs do, which are often taken for what they name."""
    return len(start) > 8 and start.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in start)


def check_values(path: str | PathLike, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a value that no trained network has: not finite in float32, or a variance below 0."""
    for key, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {key}: expected values, got a meta tensor")
        if tensor.is_floating_point() and tensor.numel():
            values = tensor.detach().float()  # as the network reads them: a float64 may be too large
            _check_bounds(path, key, *(bound.item() for bound in values.aminmax()))


def _check_bounds(path: str | PathLike, key: str, *bounds: float) -> None:
    least, least_named = (0, " of at least 0") if key.endswith("running_var") else (-math.inf, "")
    wrong = [bound for bound in bounds if not (math.isfinite(bound) and bound >= least)]
    if wrong:
        raise CheckpointError(f"{path}: {key}: expected finite values{least_named}, got {wrong[0]}")


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


def write_weights(path: str | PathLike, state: Mapping[str, Tensor], metadata: Mapping) -> None:
    """Write tensors and metadata (JSON values) as safetensors; a former file stays until the new one is complete.

    Raises:
        CheckpointError: the file cannot be written. ValueError: metadata that JSON cannot hold.
    """
    from safetensors.torch import save

    try:
        text = json.dumps({**metadata, "format": FORMAT})
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: expected JSON values: {error}") from error
    # safetensors stores neither channels_last nor two names of one tensor
    tensors = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    replace_file(path, save(tensors, {METADATA_KEY: text, DIGEST_KEY: _digest(tensors, text)}))


def _digest(state: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of metadata and of the tensors' names, dtypes, shapes and bytes, in the order of their names."""
    names = sorted(state)
    head = [text, [(name, str(state[name].dtype), list(state[name].shape)) for name in names]]
    digest = hashlib.sha256(json.dumps(head).encode())
    for name in names:
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unwrapped(path: str | PathLike, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of wrappers and of parts that were compiled.

    Raises:
        CheckpointError, which starts with `path`: two keys that differ in their prefixes alone, as of two networks.
    """
    whole: dict[str, str] = {}
    for key in state:
        if (first := whole.setdefault(PREFIXES.sub("", key), key)) != key:
            raise CheckpointError(f"{path}: expected the tensors of one network, got both {first} and {key}")
    return {key: state[name] for key, name in whole.items()}


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The network that wrappers hold, each under one of their names and as the only child with tensors."""
    holders = [name for name, child in model.named_children() if child.state_dict()]
    return unwrapped_model(model.get_submodule(holders[0])) if len(holders) == 1 and holders[0] in WRAPPERS else model


def replace_file(path: str | PathLike, data: bytes | memoryview) -> None:
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
            kept = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({_first_line(error)})") from error
    if not {METADATA_KEY, DIGEST_KEY} & kept.keys():
        return state, {}
    text = checked(path, kept, METADATA_KEY, "metadata", lambda value: True)
    digest = checked(path, kept, DIGEST_KEY, "the digest of what the file holds", lambda value: True)
    if digest != _digest(state, text):
        raise CheckpointError(f"{path}: damaged: its contents are not those that were saved (SHA-256)")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its metadata is not JSON ({error})") from error
    checked(path, metadata, "format", str(FORMAT), lambda value: type(value) is int and value == FORMAT)
    return state, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    content = _load_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = content if isinstance(content, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(key, str) and _is_dense(value)}
    if not state:
        raise CheckpointError(f"{path}: expected a state dict, or one under state_dict or model")
    return state


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # by its path, torch would go by the name's ending
            warnings.simplefilter("ignore")
            _check_archive(path)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on bytes that are not a checkpoint
        whole = re.search(r"GLOBAL (\S+)|TorchScript archive", str(error))
        if whole is None:
            raise CheckpointError(f"{path}: not a complete torch weights file ({_first_line(error)})") from error
        what = f"a pickled {whole[1]}, whose loading runs code" if whole[1] else "a TorchScript archive"
        advice = "torch.save(model.state_dict(), PATH) writes one"
        raise CheckpointError(f"{path}: expected a state dict, got {what}; {advice}") from error


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive whose contents are not those that were saved: torch does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged, CRC-32")
            for entry in archive.infolist():
                if entry.external_attr & MSDOS_FOLDER:  # torch would read nothing, into memory as it is
                    raise ValueError(f"{entry.filename} is damaged, a folder")


def _is_dense(value: Any) -> bool:
    """Whether a value is a tensor of plain numbers, neither sparse nor quantised nor without values."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and not value.is_quantized and not value.is_meta


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
