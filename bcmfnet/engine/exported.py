"""Prediction with an exported file, in the place of a predictor of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcmfnet.data import normalize
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.errors import ConfigError
from bcmfnet.export import ExportedFile, format_of, read_exported
from bcmfnet.ops import upsample_argmax


def load_predictor(weights: Path, device: str, amp: str) -> tuple[LabelPredictor | ExportedPredictor, dict[str, Any]]:
    """The predictor of a weights file or of an exported one, and the file's metadata.

    Raises CheckpointError for a file that cannot be used, ConfigError for a device or precision that is not here, or
    not the exported file's.
    """
    if format_of(weights) is None:
        return LabelPredictor.from_weights(weights, device, amp)
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device: expected auto or cpu with {weights}, which runs on the CPU, got {device}")
    if amp not in ("auto", "off"):
        raise ConfigError(f"amp: expected auto or off with {weights}, whose precision is its own, got {amp}")
    file = read_exported(weights, logits=True)
    return ExportedPredictor(file), file.metadata


class ExportedPredictor:
    """An exported file as a predictor: RGB uint8 [N, 3, H, W] to label maps uint8 [N, H, W], on the CPU."""

    device = torch.device("cpu")

    def __init__(self, file: ExportedFile) -> None:
        self.file = file

    def __call__(self, images: Tensor) -> Tensor:
        """Label maps of such frames. Raises ConfigError where the file takes frames of another size alone."""
        result = self._run(images)
        return result if self.file.metadata["output"] == "labels" else upsample_argmax(result, images.shape[-2:])

    def logits(self, images: Tensor) -> Tensor:
        """Logits of such frames. Raises ConfigError where the file has none, or takes another size."""
        if self.file.metadata["output"] != "logits":
            raise ConfigError(f"weights: expected a file of --output logits, got {self.file.path}, which gives labels")
        return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        metadata, size = self.file.metadata, list(images.shape[-2:])
        fixed, least = metadata["size"], metadata["least_side"]
        if fixed is not None and size != fixed:
            expected = f"frames of {fixed[1]}x{fixed[0]}, as {self.file.path} takes them"
            raise ConfigError(f"weights: expected {expected}, got {size[1]}x{size[0]}")
        if fixed is None and min(size) < least:
            expected = f"frames of at least {least}x{least}, as {self.file.path} takes them"
            raise ConfigError(f"weights: expected {expected}, got {size[1]}x{size[0]}")
        if not metadata["takes_uint8"]:
            images = normalize(images, tuple(metadata["mean"]), tuple(metadata["std"]))
        if fixed is None:
            return self.file.run(images)
        return torch.cat([self.file.run(image) for image in images.split(1)])
