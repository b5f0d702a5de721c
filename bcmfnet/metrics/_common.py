"""What every metric needs: checked label pairs, and ratios and means that know of absent classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from bcmfnet.errors import DataError


def valid_labels(
    prediction: Any, target: Any, num_classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check a pair of label arrays and drop the ignored pixels.

    Args:
        prediction, target: integer numpy arrays or torch tensors of one shape.
        num_classes: class ids are 0 .. num_classes - 1.
        ignore_index: target value of the pixels that do not count; the prediction there may be anything.

    Returns:
        prediction and target at the valid pixels, both [K], and the mask of valid pixels, bool.

    Raises:
        TypeError: labels that are not integers.
        ValueError: shapes that differ.
        DataError: a class id out of range.
    """
    prediction, target = _integer_array("prediction", prediction), _integer_array("target", target)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction: expected the target's shape {list(target.shape)}, got {list(prediction.shape)}")
    valid = target != ignore_index
    prediction, target = prediction[valid], target[valid]
    ids = f"class ids 0..{num_classes - 1}"
    _check_range("prediction", prediction, ids, num_classes)
    _check_range("target", target, f"{ids} or ignore_index {ignore_index}", num_classes)
    return prediction, target, valid


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator as float64, NaN where the denominator is 0."""
    out = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def mean_of_present(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN where there are none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _integer_array(name: str, labels: Any) -> np.ndarray:
    array = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer class ids, got {array.dtype} {list(array.shape)}")
    return array


def _check_range(name: str, labels: np.ndarray, expected: str, num_classes: int) -> None:
    if not labels.size:
        return
    for extreme in (labels.min(), labels.max()):
        if not 0 <= extreme < num_classes:
            raise DataError(f"{name}: expected {expected}, got {extreme}")
