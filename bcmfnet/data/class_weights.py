"""Weights of the classes in a loss, from how many pixels each has or from a file."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeGuard, get_args

import numpy as np

from bcmfnet.errors import ConfigError

Rule = Literal["enet", "median"]
RULES = get_args(Rule)
LARGEST = 10**9


def is_rule(name: str) -> TypeGuard[Rule]:
    """Whether `class_weights` has a rule of that name."""
    return name in RULES


def class_weights(rule: Rule, pixels: np.ndarray) -> np.ndarray:
    """Weights float64 [C] by a published rule, of any scale.

    `enet` is 1 / ln(1.02 + share of all pixels) (Paszke et al. 2016, section 5.2); `median` is median frequency
    balancing, median(f) / f with f the share within the frames that have the class (Eigen and Fergus 2015, section
    6.3.2). A class that no frame has gets the largest weight of the others.

    Args:
        pixels: int64 [frames, C], pixels of each class in each frame. Raises ConfigError where all are 0.
    """
    total = pixels.sum(0)
    present = total > 0
    if not present.any():
        raise ConfigError(f"class_weights: expected frames with labelled pixels for {rule}, got none")
    if rule == "enet":
        frequency = total / total.sum()
        weights = 1 / np.log(1.02 + frequency)
    else:
        in_frames = ((pixels > 0) * pixels.sum(1, keepdims=True)).sum(0)
        frequency = total / np.maximum(in_frames, 1)
        weights = np.median(frequency[present]) / np.where(present, frequency, 1)
    weights[~present] = weights[present].max()
    return weights


def mean_of_one(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The weights scaled so that their mean over the pixels int64 [frames, C] is 1.

    Cross-entropy is divided by the sum of the weights, but the boundary term by a count: at another mean the weights
    would change the balance of the two. Raises ConfigError where no pixel has a weight above 0.
    """
    total = pixels.sum(0)
    if not weights @ total > 0:
        raise ConfigError("class_weights: expected a weight above 0 for a class that the frames have, got 0 for all")
    return weights * total.sum() / (weights @ total)


def read_class_weights(path: Path, classes: Sequence[str]) -> np.ndarray:
    """Weights float64 [C] of a JSON file, {"class": weight} of every class or a list in their order.

    Raises ConfigError for a file that is not that, and for weights that are below 0, above LARGEST or all 0.
    """
    expected = f"class_weights: expected a JSON object with a weight for each of {', '.join(classes)}"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"class_weights: expected none, {', '.join(RULES)} or a file, got {path}: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{expected} in {path}: {error}") from None
    if isinstance(values, dict):
        if values.keys() != set(classes):
            odd = sorted(values.keys() ^ set(classes))
            raise ConfigError(f"{expected} in {path}, got {odd[0]!r} in one of the two alone")
        values = [values[name] for name in classes]
    if not isinstance(values, list) or len(values) != len(classes):
        got = f"{len(values)} of them" if isinstance(values, list) else type(values).__name__
        raise ConfigError(f"{expected}, or a list of {len(classes)}, in {path}, got {got}")
    for name, value in zip(classes, values, strict=True):
        if type(value) not in (int, float) or not 0 <= value <= LARGEST:
            got = reprlib.repr(value)
            raise ConfigError(f"class_weights: expected a number from 0 to {LARGEST} for {name} in {path}, got {got}")
    if not any(values):
        raise ConfigError(f"class_weights: expected a weight above 0 in {path}, got 0 for every class")
    return np.array(values, np.float64)
