"""How sure a difference between two models is: a paired bootstrap over the frames that both have labelled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bcmfnet.errors import DataError
from bcmfnet.metrics._common import ratio
from bcmfnet.metrics.boundary import BoundaryMetrics
from bcmfnet.metrics.confusion import ConfusionMatrix

BLOCK = 256
"""Draws that are scored at a time: enough for the calls to cost nothing, few enough to fit the cache."""


class FrameSums(NamedTuple):
    """Intersection and union of each class in one frame, int64 [2, C]; a sum over frames has the pooled IoU."""

    region: np.ndarray
    """Of the class's pixels."""
    boundary: np.ndarray
    """Of its boundary bands."""


def frame_sums(prediction: Any, target: Any, num_classes: int, ignore_index: int = 255) -> FrameSums:
    """What ConfusionMatrix and BoundaryMetrics count of one frame, both maps [H, W]; it raises what they raise."""
    confusion, edges = ConfusionMatrix(num_classes, ignore_index), BoundaryMetrics(num_classes, ignore_index)
    confusion.update(prediction, target)
    edges.update(prediction, target)
    intersection = np.diagonal(confusion.matrix)
    union = confusion.matrix.sum(0) + confusion.matrix.sum(1) - intersection
    bands = (edges.state["band_intersection"], edges.state["band_union"])
    return FrameSums(np.stack([intersection, union]), np.stack(bands))


def iou_of_sums(sums: np.ndarray) -> np.ndarray:
    """IoU of every class, float64 [..., C], of sums [..., 2, C]; NaN for one that is nowhere."""
    return ratio(sums[..., 0, :], sums[..., 1, :])


def mean_iou_of_sums(sums: np.ndarray) -> np.ndarray:
    """Mean IoU, float64 [...], of sums [..., 2, C], over the classes that are somewhere; NaN where none is."""
    present = sums[..., 1, :] > 0
    return ratio(np.nan_to_num(iou_of_sums(sums)).sum(-1), present.sum(-1))


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the difference in mean IoU, b minus a, over frames drawn like those of a set of F frames.

    The percentile bootstrap: F frames are drawn with replacement, the same for both models, whose mean IoUs are pooled
    over them; the interval holds the middle of such differences. It tells of the choice of frames alone: another seed
    of a training moves the weights as well.

    Args:
        a, b: intersections and unions of the models in each frame, integers [F, 2, C] (see `FrameSums`).
        samples: how often F frames are drawn.
        confidence: share of the differences that the interval holds.

    Raises:
        ValueError: arrays of other shapes. DataError: fewer than two frames, or no pixel of a class in them.
    """
    if a.ndim != 3 or a.shape[1] != 2 or b.shape != a.shape:
        raise ValueError(f"a, b: expected both [F, 2, C], got {list(a.shape)} and {list(b.shape)}")
    count = len(a)
    if count < 2:
        raise DataError(f"bootstrap: expected at least two frames to draw from, got {count}")
    both = np.stack([a, b], 1)
    if not both.any():
        raise DataError("bootstrap: expected a pixel of a class in the frames, got ignored ones alone")
    table = both.reshape(count, -1).astype(np.float64)  # sums of pixels are exact in it, and BLAS adds them
    rng = np.random.default_rng(seed)
    differences = []
    for start in range(0, samples, BLOCK):
        draws = (rng.integers(count, size=count) for _ in range(start, min(start + BLOCK, samples)))
        times = np.stack([np.bincount(draw, minlength=count) for draw in draws])
        scores = mean_iou_of_sums((times @ table).reshape(-1, *both.shape[1:]))
        differences.append(scores[:, 1] - scores[:, 0])
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.concatenate(differences), (tail, 1 - tail))
    return float(low), float(high)
