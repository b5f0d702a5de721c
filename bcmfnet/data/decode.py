"""From label files to training ids: a value that a protocol does not know is an error, not a class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from bcmfnet.data.colors import ColorIds
from bcmfnet.data.io import read_label
from bcmfnet.data.labels import LabelTable
from bcmfnet.errors import DataError

UNKNOWN = 254


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
    """Reads colour-coded labels.

    Args:
        ids: training id, or void, of each known colour.
        source: what has these colours, for the error.
        void: id of stray pixels.
        strays: share of a label's pixels that may have unknown colours.
    """

    ids: ColorIds
    source: str
    void: int = 255
    strays: float = 0.0

    def __call__(self, path: Path) -> np.ndarray:
        """Training ids, uint8 [H, W]. Raises DataError with the file and its commonest unknown colour."""
        red, green, blue = (channel.astype(np.int32) for channel in cv2.split(read_label(path, color=True)))
        color = red << 16 | green << 8 | blue
        label = _id_of_color(self.ids)[color]
        unknown = label == UNKNOWN
        count = np.count_nonzero(unknown)
        if count > self.strays * label.size:
            values, counts = np.unique(color[unknown], return_counts=True)
            worst = int(values[counts.argmax()])
            row, column = np.argwhere(color == worst)[0]
            raise DataError(
                f"{path}: {100 * count / label.size:.3g} % of the pixels have colours outside {self.source}, most of "
                f"them {(worst >> 16, worst >> 8 & 255, worst & 255)} (red, green, blue), {counts.max()} pixels, "
                f"the first in row {row}, column {column}"
            )
        label[unknown] = self.void
        return label


@lru_cache(8)
def _id_of_color(ids: ColorIds) -> np.ndarray:
    """Training id, void or UNKNOWN of every 24-bit colour, uint8 [2 ** 24]: 16 MiB, of which few pages are read."""
    id_of = np.full(1 << 24, UNKNOWN, np.uint8)
    for (red, green, blue), value in ids:
        id_of[red << 16 | green << 8 | blue] = value
    return id_of
