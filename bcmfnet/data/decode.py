"""From label files to training ids: a value that a protocol does not know is an error, not a class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

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
    """Reads colour-coded labels; every colour outside the table is void."""

    table: LabelTable

    def __call__(self, path: Path) -> np.ndarray:
        """Training ids, uint8 [H, W]."""
        red, green, blue = cv2.split(read_label(path, color=True))
        return _id_of_color(self.table)[red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue]


@lru_cache
def _id_of_color(table: LabelTable) -> np.ndarray:
    """Training id of every 24-bit colour, uint8 [2 ** 24]: 16 MiB, of which a few pages are ever read."""
    ids = np.full(1 << 24, table.ignore_index, np.uint8)
    for i, (red, green, blue) in enumerate(table.colors):
        ids[red << 16 | green << 8 | blue] = i
    return ids
