"""From label files to training ids: a value that a protocol does not know is an error, not a class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from bcmfnet.data.io import read_label
from bcmfnet.data.labels import RGB, LabelTable
from bcmfnet.errors import DataError

UNKNOWN = 254
STRAY_SHARE = 0.01  # of a label's pixels that may have colours which no table knows


@dataclass(frozen=True)
class IdLabels:
    """Reads PNGs of ids, id `i` of the file becoming `mapping[i]`.

    Args:
        mapping: training id, void or UNKNOWN for each of the 256 values.
        allowed: the known values, in words, for the error.
    """

    mapping: tuple[int, ...]
    allowed: str

    def __call__(self, path: Path) -> np.ndarray:
        """Training ids, uint8 [H, W]. Raises DataError with the file, the unknown values and the allowed ones."""
        raw = read_label(path)
        label = cv2.LUT(raw, np.array(self.mapping, np.uint8))
        unknown = label == UNKNOWN
        if unknown.any():
            values = ", ".join(map(str, np.unique(raw[unknown])))
            raise DataError(f"{path}: label value {values} is outside the table: expected {self.allowed}")
        return label


def id_labels(table: LabelTable, void: tuple[int, ...] = ()) -> IdLabels:
    """Files that hold the table's ids, its ignore_index, and further `void` values."""
    mapping = np.full(256, UNKNOWN)
    mapping[: table.num_classes] = range(table.num_classes)
    mapping[[*void, table.ignore_index]] = table.ignore_index
    extra = ", ".join(f"{value} (void)" for value in (*void, table.ignore_index))
    return IdLabels(tuple(mapping.tolist()), f"0..{table.num_classes - 1} or {extra}")


@dataclass(frozen=True)
class ColorLabels:
    """Reads colour-coded labels: the table's colours are classes, those of `void` and stray pixels of others are void.

    Labels whose colours are others (swapped channels, another palette, interpolated when they were resized) have more
    of them than a few strays, and are refused.
    """

    table: LabelTable
    void: tuple[RGB, ...]

    def __call__(self, path: Path) -> np.ndarray:
        """Training ids, uint8 [H, W]. Raises DataError with the file and its commonest unknown colour."""
        red, green, blue = (channel.astype(np.int32) for channel in cv2.split(read_label(path, color=True)))
        color = red << 16 | green << 8 | blue
        label = _id_of_color(self.table, self.void)[color]
        unknown = label == UNKNOWN
        count = np.count_nonzero(unknown)
        if count > STRAY_SHARE * label.size:
            values, counts = np.unique(color[unknown], return_counts=True)
            worst = int(values[counts.argmax()])
            raise DataError(
                f"{path}: {100 * count / label.size:.3g} % of the pixels have colours outside the table "
                f"{self.table.name}, most of them {(worst >> 16, worst >> 8 & 255, worst & 255)} (red, green, blue)"
            )
        label[unknown] = self.table.ignore_index
        return label


@lru_cache
def _id_of_color(table: LabelTable, void: tuple[RGB, ...]) -> np.ndarray:
    """Training id, void or UNKNOWN of every 24-bit colour, uint8 [2 ** 24]: 16 MiB, of which few pages are read."""
    ids = np.full(1 << 24, UNKNOWN, np.uint8)
    named = [(color, table.ignore_index) for color in void] + [(color, i) for i, color in enumerate(table.colors)]
    for (red, green, blue), value in named:
        ids[red << 16 | green << 8 | blue] = value
    return ids
