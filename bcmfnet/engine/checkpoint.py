"""The training state of a run: written whole or not at all with its digest, read back with weights_only."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data import Dataset
from bcmfnet.engine.config import TrainConfig
from bcmfnet.errors import CheckpointError, ConfigError, MissingFileError
from bcmfnet.models.weights import check_same_tensors, checked, replace_file

log = logging.getLogger("bcmfnet.checkpoint")
FORMAT = 3
LAST = "checkpoints/last.pt"
"""Where the folder of a run has its last checkpoint."""
MAY_CHANGE = {
    "where it runs": ("device", "amp", "compile", "cuda_graph", "deterministic", "data.root", "data.colors",
                      "data.workers", "data.strict", "optim.accumulate"),
    "how long and how fast": ("patience", "optim.steps", "optim.epochs", "optim.lr", "optim.warmup_steps",
                              "optim.power"),
    "what each step reads of the optimiser's options": ("optim.momentum", "optim.weight_decay", "optim.clip"),
    "what is written": ("val_every", "log_every", "save_every_minutes", "tensorboard", "keep"),
}  # fmt: skip
"""Options that a resumed run may have other values of; it obeys them from its first step on. Any other would make it
a run that started differently, and is refused."""
SEAL = b"sha256:"
DIGITS = 2 * hashlib.sha256().digest_size


class DamagedFileError(CheckpointError):
    """A file whose content is not what was written."""


@dataclass
class TrainState:
    """Where a run stands.

    step is the number of optimiser steps done; evaluated the step of the last evaluation; best_miou the best
    validation mIoU so far (NaN before the first); frames tells the frames of the run from those of any other; batches
    is how many batches a step has, on all processes; threads how many a process computes with; stale how many
    evaluations have passed since the best one.
    """

    step: int = 0
    evaluated: int = 0
    best_miou: float = float("nan")
    frames: str = ""
    batches: int = 1
    threads: int = 1
    stale: int = 0

    def is_stale(self, patience: int | None) -> bool:
        """Whether so many evaluations have passed without a better one; None is never."""
        return patience is not None and self.stale >= patience


def name_frames(train_set: Dataset, val_set: Dataset) -> str:
    """The number of frames and a digest of their names in order, without the folders that they are in."""
    digest = hashlib.sha256()
    for dataset in (train_set, val_set):
        digest.update("".join(f"{dataset.name(i)}\n" for i in range(len(dataset))).encode(errors="surrogateescape"))
    return f"{len(train_set)} to train on and {len(val_set)} to validate on, names {digest.hexdigest()[:12]}"


def save_checkpoint(
    path: Path, state: TrainState, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, average: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write the state of a run, and keep as many checkpoints as the configuration says.

    average is the moving average of the model, where the run has one. Raises CheckpointError on a full disk, and the
    previous checkpoint stays.
    """
    payload = {
        "format": FORMAT,
        "state": vars(state),
        "config": config,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    if average is not None:
        payload["average"] = average.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _keep_earlier(path, config["keep"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be kept: {error.strerror}") from error
    replace_file(path, sealed(payload))


def sealed(payload: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint: what torch.save writes, and in the comment that ends a zip file the SHA-256 of all
    that precedes it. torch.load reads such a file, but checks nothing: a flipped bit of a tensor is another number."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    buffer.seek(-2, io.SEEK_END)  # the length of the comment, which torch.save leaves empty
    buffer.write((len(SEAL) + DIGITS).to_bytes(2, "little") + SEAL)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(digest.encode())
    return buffer.getbuffer()


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def earlier_checkpoints(path: Path) -> list[Path]:
    """Checkpoints that were kept beside the last one, the newest first."""
    found = {}
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        with contextlib.suppress(ValueError):
            found[int(other.stem.removeprefix(f"{path.stem}-"))] = other
    return [found[number] for number in sorted(found)]


def _keep_earlier(path: Path, keep: int) -> None:
    """Make room for a checkpoint: the last one becomes number 1, number 1 becomes number 2, and so on.

    The last one also stays in its place until it is replaced, except on file systems without hard links.
    """
    earlier = earlier_checkpoints(path)
    if not path.exists() or (earlier and earlier[0].samefile(path)):  # the former save came no further than this
        return
    for surplus in earlier[max(0, keep - 2) :]:
        surplus.unlink()
    places = [path.with_stem(f"{path.stem}-{number}") for number in range(1, keep)]
    for source, target in reversed(list(zip(earlier, places[1:], strict=False))):
        os.replace(source, target)
    if places:
        try:
            os.link(path, places[0])
        except OSError:
            os.replace(path, places[0])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote.

    Raises MissingFileError; DamagedFileError for a file that is not as it was written, or is none of ours; and
    CheckpointError for one that cannot be read.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a training checkpoint, found no file")
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    body, digest = content[:-DIGITS], bytes(content[-DIGITS:])
    if bytes(body[-len(SEAL) :]) != SEAL:
        raise DamagedFileError(
            f"{path}: no training checkpoint, or only the beginning of one: it ends without a digest"
        )
    if digest != _digest(body):
        raise DamagedFileError(f"{path}: damaged, its digest is not the one that was written with it")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on bytes that are not a checkpoint
        raise CheckpointError(f"{path}: not a readable training checkpoint: {_first_line(error)}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a training checkpoint of format {FORMAT}")
    return payload


@dataclass
class Checkpoint:
    """A checkpoint that was read, and the file it is from."""

    path: Path
    payload: dict[str, Any]


def last_checkpoint(folder: Path) -> Checkpoint:
    """The last checkpoint of a run; where it is damaged or missing the one before it, with a warning."""
    last = folder / LAST
    problem: CheckpointError | None = None
    for path in (last, *earlier_checkpoints(last)):
        try:
            checkpoint = Checkpoint(path, read_checkpoint(path))
        except (DamagedFileError, MissingFileError) as error:
            problem = problem or error
            continue
        if problem:
            log.warning("%s; the run goes on from %s", problem, path.name)
        return checkpoint
    assert problem is not None
    raise problem


def check_options(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """What changes of the options, a line each. Raises ConfigError for options that the run cannot go on with."""
    free = {key for keys in MAY_CHANGE.values() for key in keys}
    saved = checked(checkpoint.path, checkpoint.payload, "config", "sections of options", _is_dict)
    before, now = _options(TrainConfig().to_dict()) | _options(saved), _options(config.to_dict())
    changed = sorted(key for key in before.keys() | now.keys() if _plain(before.get(key)) != _plain(now.get(key)))
    refused = [key for key in changed if key not in free]
    if refused:
        keys, expected, got = (", ".join(words) for words in zip(
            *((key, repr(before.get(key)), repr(now.get(key))) for key in refused), strict=True
        ))  # fmt: skip
        raise ConfigError(f"{keys}: expected {expected}, as {checkpoint.path} has it, got {got}")
    return [f"{key}: {now.get(key)!r}, before {before.get(key)!r}" for key in changed]


def _options(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in sections.items():
        options |= _options(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return options


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    average: nn.Module | None = None,
) -> TrainState:  # fmt: skip
    """Put the state of a checkpoint into model, optimiser, loss scale, moving average and random generator.

    The optimiser's options stay those of the configuration. Nothing is changed where an error is raised: ConfigError
    for another precision than the checkpoint's, CheckpointError for a part that is not whole.
    """
    path, payload = checkpoint.path, checkpoint.payload
    state = _train_state(path, payload)
    networks = {"model": model} | ({"average": average} if average is not None else {})
    for key, network in networks.items():
        check_same_tensors(path, network.state_dict(), checked(path, payload, key, "tensors", _is_dict))
    moments = _optimizer_state(path, payload, optimizer)
    _check_scaler(path, payload, scaler)
    size = torch.get_rng_state().shape
    rng = checked(path, payload, "rng", f"uint8 {list(size)}", lambda v: _is_tensor(v, size) and v.dtype == torch.uint8)

    for key, network in networks.items():
        network.load_state_dict(payload[key])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(payload["scaler"])
    torch.set_rng_state(rng)
    return state


def _train_state(path: Path, payload: dict[str, Any]) -> TrainState:
    def count(key: str) -> int:
        return checked(path, payload, f"state.{key}", "a number of steps", lambda v: type(v) is int and v >= 0)

    def is_share(v: object) -> bool:
        return type(v) is float and not (v < 0 or v > 1)

    best = checked(path, payload, "state.best_miou", "nan or 0 to 1", is_share)
    frames = checked(path, payload, "state.frames", "text", lambda v: isinstance(v, str))
    counts = {key: count(key) for key in ("step", "evaluated", "batches", "threads", "stale")}
    return TrainState(best_miou=best, frames=frames, **counts)


def _optimizer_state(path: Path, payload: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """What the optimiser keeps of each parameter; empty before the first step."""
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    expected = f"groups of {' and '.join(str(len(params)) for params in own)} parameters"
    checked(path, payload, "optimizer.param_groups", expected, lambda v: _parameters(v) == own)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected, numbers = f"the state of {len(parameters)} parameters", set(range(len(parameters)))
    state = checked(path, payload, "optimizer.state", expected, lambda v: _is_dict(v) and v.keys() in (set(), numbers))
    adamw = isinstance(optimizer, torch.optim.AdamW)
    for number, values in state.items():
        shape = parameters[number].shape
        shapes = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()} if adamw else {"momentum_buffer": shape}
        for key, shape in shapes.items():
            named, expected = {"optimizer": {f"state[{number}]": values}}, f"a tensor of {list(shape)}"
            name = f"optimizer.state[{number}].{key}"
            checked(path, named, name, expected, partial(_is_tensor, shape=shape))
    return state


def _check_scaler(path: Path, payload: dict[str, Any], scaler: torch.amp.GradScaler) -> None:
    saved = checked(path, payload, "scaler", "the state of the loss scale", _is_dict)
    if scaler.is_enabled() and not saved:
        raise ConfigError(f"amp: expected bf16 or off, since {path} has no loss scale, got 'fp16'")
    for key in scaler.state_dict():
        checked(path, payload, f"scaler.{key}", "a number", lambda v: type(v) in (int, float) and math.isfinite(v))


def _parameters(groups: Any) -> list[Any] | None:
    if isinstance(groups, list) and all(map(_is_dict, groups)):
        return [group.get("params") for group in groups]
    return None


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_tensor(value: object, shape: Sequence[int]) -> bool:
    return isinstance(value, Tensor) and value.shape == torch.Size(shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
