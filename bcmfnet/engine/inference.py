"""From frames to label maps, the same way for evaluation, prediction and the pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data import normalize
from bcmfnet.data.labels import LabelTable
from bcmfnet.engine.runtime import autocast, resolve_amp, resolve_device
from bcmfnet.errors import CheckpointError
from bcmfnet.models import model_from_weights
from bcmfnet.ops import upsample_argmax


class LabelPredictor:
    """A segmentation network with what it needs around it: mean, std, device and mixed precision.

    The model gives a `SegmentationOutput`, or the logits alone as what `for_inference` returns does.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        amp: torch.dtype | None,
    ) -> None:
        self.model = model
        self.mean = mean
        self.std = std
        self.device = device
        self.amp = amp

    @classmethod
    def from_weights(cls, path: Path, device: str = "auto", amp: str = "auto") -> tuple[LabelPredictor, dict[str, Any]]:
        """The predictor of a weights file of ours, as fast as `for_inference` makes it, and the file's metadata."""
        where = resolve_device(device)
        model, metadata = model_from_weights(path, where)
        dtype = resolve_amp(amp, where) or torch.float32
        model = model.for_inference(dtype=dtype, output="logits")
        return cls(model, metadata["mean"], metadata["std"], where, amp=None), metadata

    def __call__(self, images: Tensor) -> Tensor:
        """Label maps uint8 [N, H, W] on the device, of RGB frames uint8 [N, 3, H, W] of any size >= 64."""
        return upsample_argmax(self.logits(images), images.shape[-2:])

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w] on the device, at the network's own resolution, of such frames."""
        frames = normalize(images.to(self.device, non_blocking=True), self.mean, self.std, torch.channels_last)
        with autocast(self.device, self.amp):
            output = self.model(frames)
        return output if isinstance(output, Tensor) else output.logits


def label_table(metadata: dict[str, Any], path: Path) -> LabelTable:
    """Label table that weights were trained with. Raises CheckpointError when the file does not have one."""
    try:
        values = metadata["label_table"]
        colors = tuple(tuple(color) for color in values["colors"])
        return LabelTable(values["name"], tuple(values["classes"]), colors, values["ignore_index"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: expected weights with a label table, found none that can be used") from None
