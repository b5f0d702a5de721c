"""Batches of images through a predictor: labels, and where they are asked for confidences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from bcmfnet.engine.exported import ExportedPredictor
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.tta import confidence
from bcmfnet.ops import upsample_argmax


class Kind(NamedTuple):
    """What images of one batch have in common: height and width, and whether confidences are wanted."""

    size: tuple[int, int]
    confidence: bool


class Prediction(NamedTuple):
    """Labels uint8 [H, W], indices of the classes; confidence uint8 [H, W], per cent, or None."""

    labels: np.ndarray
    confidence: np.ndarray | None


@dataclass(frozen=True)
class Network:
    """The predictor as the compute function of batches; `count` hears the size of each."""

    predictor: LabelPredictor | ExportedPredictor
    count: Callable[[int], object] = lambda size: None

    @property
    def gives_confidence(self) -> bool:
        """An exported file of labels has no logits to tell it from."""
        predictor = self.predictor
        return not isinstance(predictor, ExportedPredictor) or predictor.file.metadata["output"] == "logits"

    @torch.inference_mode()
    def __call__(self, kind: Kind, images: list[np.ndarray]) -> list[Prediction]:
        """Predictions of images, RGB uint8 [H, W, 3]. Raises ConfigError for a size that the weights do not take."""
        self.count(len(images))
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        if not (kind.confidence and self.gives_confidence):
            return [Prediction(labels, None) for labels in self.predictor(frames).cpu().numpy()]
        logits = self.predictor.logits(frames)
        labels = upsample_argmax(logits, kind.size).cpu().numpy()
        shares = (100 * confidence(logits.float(), kind.size)).round().to(torch.uint8).cpu().numpy()
        return [Prediction(*pair) for pair in zip(labels, shares, strict=True)]
