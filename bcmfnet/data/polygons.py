"""Shapes drawn into label maps: a pixel belongs to a polygon when its centre does."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """A labelled area: the union of polygons, or runs of pixels.

    polygons are corners (x, y), float64 [n, 2], in pixels from the upper left corner of the image; runs are int64
    lengths, outside and inside by turns, down the columns from left to right (COCO's uncompressed RLE).
    """

    label: str
    polygons: tuple[np.ndarray, ...] = ()
    runs: np.ndarray | None = None

    @property
    def area(self) -> float:
        """In pixels; where polygons overlap, twice."""
        if self.runs is not None:
            return float(self.runs[1::2].sum())
        return sum(map(_area, self.polygons), 0.0)

    def draw(self, ids: np.ndarray, value: int) -> None:
        """Set the pixels of ids uint8 [H, W] that the shape covers."""
        if self.runs is not None:
            inside = np.arange(len(self.runs)) % 2 == 1
            ids[np.repeat(inside, self.runs).reshape(ids.shape[::-1]).T] = value
        for corners in self.polygons:
            fill_polygon(ids, corners, value)


def _area(corners: np.ndarray) -> float:
    (x, y), (x2, y2) = corners.T, np.roll(corners, -1, 0).T
    return float(abs(x @ y2 - x2 @ y) / 2)


def fill_polygon(ids: np.ndarray, corners: np.ndarray, value: int) -> None:
    """Set the pixels of ids uint8 [H, W] whose centres are inside the polygon by the even-odd rule.

    Of two polygons with a common edge each pixel is in one, so their order does not matter there. OpenCV's and
    Pillow's polygons have their outlines besides, which makes all that is drawn half a pixel larger on each side.
    """
    centres = corners - 0.5
    order = np.argsort(np.stack([centres[:, 1], np.roll(centres[:, 1], -1)]), 0)  # of an edge, the upper end first:
    ends = np.stack([centres, np.roll(centres, -1, 0)])  # the neighbour, which has it the other way round, rounds alike
    (x, y), (x2, y2) = (end.T for end in np.take_along_axis(ends, order[..., None], 0))
    first, last = max(0, math.ceil(y.min())), min(ids.shape[0], math.ceil(y2.max()))
    for row in range(first, last):
        cut = (y <= row) & (row < y2)
        columns = np.sort(x[cut] + (row - y[cut]) * (x2[cut] - x[cut]) / (y2[cut] - y[cut]))
        for left, right in np.clip(np.ceil(columns), 0, ids.shape[1]).astype(int).reshape(-1, 2):
            ids[row, left:right] = value
