"""Confusion matrix pooled over a set, and the accuracies and IoU that follow from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bcmfnet.errors import DataError
from bcmfnet.metrics._common import mean_of_present, ratio, valid_labels


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """IoU of every class, float64 [..., C], from confusion matrices [..., C, C].

    NaN for a class that is in neither the prediction nor the ground truth.
    """
    intersection = np.diagonal(matrix, axis1=-2, axis2=-1)
    return ratio(intersection, matrix.sum(-1) + matrix.sum(-2) - intersection)


def frame_miou(matrix: np.ndarray) -> float:
    """Mean IoU of a single frame over the classes of its ground truth, from its confusion matrix [C, C].

    A class that a few wrong pixels alone bring in is not in the mean: it lowers the IoU of the class that it took them
    from. NaN for a frame without a valid pixel.
    """
    return mean_of_present(class_iou(matrix)[matrix.any(1)])


class ConfusionMatrix:
    """Streaming confusion matrix: every pixel of the set counts once, whatever image it is in.

    Args:
        num_classes: class ids are 0 .. num_classes - 1.
        ignore_index: target value of the pixels that do not count.

    Attributes:
        matrix: int64 [C, C], rows are ground truth, columns prediction. A plain sum, so ranks may all-reduce
            ``torch.from_numpy(matrix)`` in place.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: Any, target: Any) -> np.ndarray:
        """Count one image or batch, and return the counts of it alone, int64 [C, C].

        Args:
            prediction, target: integer torch tensors or numpy arrays of one shape. The prediction at ignored
                pixels may be anything.

        Raises:
            TypeError: labels that are not integers.
            ValueError: shapes that differ, or (DataError) a class id out of range; nothing is counted then.
        """
        predicted, truth, _ = valid_labels(prediction, target, self.num_classes, self.ignore_index)
        cell = truth * np.intp(self.num_classes) + predicted.astype(np.intp, copy=False)
        counts = np.bincount(cell, minlength=self.matrix.size).reshape(self.matrix.shape)
        self.matrix += counts
        return counts

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the set, for example another rank's."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"other: expected {self.num_classes} classes, got {other.num_classes}")
        self.matrix += other.matrix

    def iou(self) -> np.ndarray:
        """IoU per class, float64 [C]; NaN for a class absent from both prediction and ground truth."""
        return class_iou(self.matrix)

    def miou(self) -> float:
        """Mean IoU over the classes present in the prediction or the ground truth.

        Raises DataError when there is none: the set has no valid pixel.
        """
        if not self.matrix.any():
            raise DataError(
                f"mIoU: expected a pixel of a class in the set, got ignored ones ({self.ignore_index}) alone"
            )
        return mean_of_present(self.iou())

    def pixel_accuracy(self) -> float:
        """Share of valid pixels with the right class; NaN before the first one."""
        return float(ratio(np.trace(self.matrix), self.matrix.sum()))

    def class_accuracy(self) -> np.ndarray:
        """Recall per class, float64 [C]; NaN for a class absent from the ground truth."""
        return ratio(np.diagonal(self.matrix), self.matrix.sum(1))
