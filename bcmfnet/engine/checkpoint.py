"""The training state of a run: written whole or not at all, read back with weights_only."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bcmfnet.errors import CheckpointError
from bcmfnet.models.weights import replace_file

FORMAT = 1


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
    """Read what save_checkpoint wrote. Raises CheckpointError for a file that is missing, truncated or foreign."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a training checkpoint, found no file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable training checkpoint: {_first_line(error)}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a training checkpoint of format {FORMAT}; weights alone do not resume")
    return payload


def restore(
    payload: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainState:
    """Put a checkpoint's state into the model, the optimiser and the random generator."""
    model.load_state_dict(payload["model"])
    optimizer.load_state_dict(payload["optimizer"])
    scaler.load_state_dict(payload["scaler"])
    torch.set_rng_state(payload["rng"])
    return TrainState(**payload["state"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
