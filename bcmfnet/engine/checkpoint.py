"""The training state of a run: written whole or not at all, read back with weights_only."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcmfnet.errors import CheckpointError, ConfigError, MissingFileError
from bcmfnet.models.weights import check_same_tensors, checked, replace_file

FORMAT = 1
SAME = ("model.name", "model.aux", "optim.name", "optim.decay_1d")
"""Options without which the tensors of a checkpoint have no meaning."""


@dataclass
class TrainState:
    """Where a run stands.

    step is the number of optimiser steps done; evaluated the step of the last evaluation; best_miou the best
    validation mIoU so far (NaN before the first).
    """

    step: int = 0
    evaluated: int = 0
    best_miou: float = float("nan")


def save_checkpoint(
    path: Path,
    state: TrainState,
    config: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write the state of a run. Raises CheckpointError on a full disk, and the previous checkpoint stays."""
    payload = {
        "format": FORMAT,
        "state": vars(state),
        "config": config,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    replace_file(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote. Raises MissingFileError, or CheckpointError for a truncated or foreign file."""
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a training checkpoint, found no file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on bytes that are not a checkpoint
        raise CheckpointError(f"{path}: not a readable training checkpoint: {_first_line(error)}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a training checkpoint of format {FORMAT}; weights alone do not resume")
    return payload


def restore(
    path: Path,
    payload: dict[str, Any],
    config: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """Put the state of the checkpoint read from `path` into model, optimiser, loss scale and random generator.

    The optimiser's options stay those of the configuration. Nothing is changed where an error is raised: ConfigError
    for another model, optimiser or precision than the checkpoint's, CheckpointError for a part that is not whole.
    """
    for key in SAME:
        section, name = key.split(".")
        saved = checked(path, payload, f"config.{key}", "an option", lambda value: value is not None)
        if saved != config[section][name]:
            raise ConfigError(f"{key}: expected {saved!r}, as {path} has it, got {config[section][name]!r}")
    state = _train_state(path, payload)
    check_same_tensors(path, model.state_dict(), checked(path, payload, "model", "tensors", _is_dict))
    moments = _optimizer_state(path, payload, optimizer)
    _check_scaler(path, payload, scaler)
    size = torch.get_rng_state().shape
    rng = checked(path, payload, "rng", f"uint8 {list(size)}", lambda v: _is_tensor(v, size) and v.dtype == torch.uint8)

    model.load_state_dict(payload["model"])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(payload["scaler"])
    torch.set_rng_state(rng)
    return state


def _train_state(path: Path, payload: dict[str, Any]) -> TrainState:
    def count(key: str) -> int:
        return checked(path, payload, f"state.{key}", "a number of steps", lambda v: type(v) is int and v >= 0)

    best = checked(
        path, payload, "state.best_miou", "nan or 0 to 1", lambda v: type(v) is float and not (v < 0 or v > 1)
    )
    return TrainState(count("step"), count("evaluated"), best)


def _optimizer_state(path: Path, payload: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """What the optimiser keeps of each parameter; empty before the first step."""
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    expected = f"groups of {' and '.join(str(len(params)) for params in own)} parameters"
    checked(path, payload, "optimizer.param_groups", expected, lambda v: _parameters(v) == own)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = checked(
        path,
        payload,
        "optimizer.state",
        f"the state of {len(parameters)} parameters",
        lambda v: _is_dict(v) and v.keys() in (set(), set(range(len(parameters)))),
    )
    adamw = isinstance(optimizer, torch.optim.AdamW)
    for number, values in state.items():
        shape = parameters[number].shape
        shapes = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()} if adamw else {"momentum_buffer": shape}
        for key, shape in shapes.items():
            named = {"optimizer": {f"state[{number}]": values}}
            checked(
                path,
                named,
                f"optimizer.state[{number}].{key}",
                f"a tensor of {list(shape)}",
                lambda v, shape=shape: _is_tensor(v, shape),
            )
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
