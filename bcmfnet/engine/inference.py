"""From frames to label maps, the same way for evaluation, prediction and the pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bcmfnet.data.labels import LabelTable
from bcmfnet.engine.config import DataConfig
from bcmfnet.engine.runtime import resolve_amp, resolve_device
from bcmfnet.errors import CheckpointError, ConfigError
from bcmfnet.inference import for_inference
from bcmfnet.models import model_from_weights
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.models.weights import checked

KEPT = "in its metadata (see save_weights)"
Predictor = Callable[[Tensor], Tensor]
"""Label maps uint8 [N, H, W] of RGB frames uint8 [N, 3, H, W]: a LabelPredictor, or what is made of one."""


class LogitsPredictor(Protocol):
    """A predictor that gives logits as well: of a network, or of an exported file."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, images: Tensor) -> Tensor: ...

    def logits(self, images: Tensor) -> Tensor: ...


class LabelPredictor:
    """A network in the form that users predict with (`for_inference`), which normalises frames itself.

    The copy computes in `dtype` (None: float32); later changes of the model do not reach it.
    """

    def __init__(
        self,
        model: DualResolutionNet,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.network = for_inference(model, dtype=dtype or torch.float32, mean=mean, std=std)
        self.device = device

    @classmethod
    def from_weights(cls, path: Path, device: str = "auto", amp: str = "auto") -> tuple[LabelPredictor, dict[str, Any]]:
        """The predictor of a weights file of ours, and the file's metadata.

        Raises CheckpointError for a file that cannot be used, ConfigError for a device or precision that is not here.
        """
        where = resolve_device(device)
        model, metadata = model_from_weights(path, where)
        mean = checked(path, metadata, "mean", f"three numbers {KEPT}", _is_triple)
        std = checked(path, metadata, "std", f"three numbers above 0 {KEPT}", lambda v: _is_triple(v) and min(v) > 0)
        return cls(model, mean, std, where, resolve_amp(amp, where)), metadata

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Label maps uint8 [N, H, W] on the device, of RGB frames uint8 [N, 3, H, W] of any size >= 64."""
        return self.network(images.to(self.device, non_blocking=True))

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w] on the device, at the network's own resolution, of such frames."""
        return self.network.logits(images.to(self.device, non_blocking=True))


def label_table(metadata: dict[str, Any], path: Path) -> LabelTable:
    """Label table that weights were trained with. Raises CheckpointError when the file has none that can be used."""
    count = metadata["num_classes"]

    def value(key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        return checked(path, metadata, f"label_table.{key}", f"{expected} {KEPT}", fits)

    name = value("name", "text", lambda v: isinstance(v, str))
    classes = value("classes", f"{count} names", lambda v: _is_list(v, str) and len(v) == count)
    colors = value(
        "colors",
        f"{count} RGB colours of 0..255",
        lambda v: _is_list(v, list) and len(v) == count and all(map(_is_color, v)),
    )
    ignore_index = value("ignore_index", "0..255", lambda v: type(v) is int and 0 <= v <= 255)
    return LabelTable(name, tuple(classes), tuple(map(tuple, colors)), ignore_index)


def trained_on(metadata: dict[str, Any], path: Path) -> DataConfig | None:
    """The dataset that weights were trained on, None where they do not say. Raises CheckpointError for half of it."""
    if "config" not in metadata:
        return None
    section = checked(path, metadata, "config.data", "a section of options", lambda v: isinstance(v, dict))
    kinds = {"name": str, "train_split": str, "val_split": str, "num_classes": int, "length": int}

    def option(key: str, kind: type) -> Any:
        return checked(path, metadata, f"config.data.{key}", kind.__name__, lambda v: type(v) is kind)

    options = {key: option(key, kind) for key, kind in kinds.items() if key in section or kind is str}
    try:
        return DataConfig(**options)
    except ConfigError as error:
        raise CheckpointError(f"{path}: config.{error}") from None


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    )


def _is_color(value: list) -> bool:
    return len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)
