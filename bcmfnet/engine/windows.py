"""Label maps of images that are larger than memory: windows slide over them, and rows of labels come out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.engine.config import LOGIT_STRIDE, TTAConfig
from bcmfnet.engine.inference import LogitsPredictor, Predictor
from bcmfnet.engine.tta import TTAPredictor, argmax_of_mean, pixels, spans
from bcmfnet.errors import ConfigError
from bcmfnet.ops import upsample_argmax

WINDOW = (1024, 1024)
"""Height and width of the windows where the configuration names none."""
HALF = LOGIT_STRIDE // 2
"""Rows of labels at either end of a band of logits that also depend on the logits beyond it."""


class LargeImage(Protocol):
    """An image that is read in windows."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """RGB uint8 [h, w, 3] of these rows and columns; past the image its last ones are repeated."""


@torch.inference_mode()
def label_bands(predictor: Predictor, image: LargeImage) -> Iterator[Tensor]:
    """Labels of a large image, in bands uint8 [h, W] of its rows from the top on.

    They are what `TTAPredictor` with the same windows and mirror image makes of the whole image, but that one whose
    sides are no multiples of 8 is continued by its last pixels and not scaled. Memory grows with the width alone.

    Args:
        predictor: one that gives logits, or a TTAPredictor of such a one, whose windows and mirror image are taken.

    Raises:
        ConfigError: scales other than 1, a window that the image is too small for.
        DataError: a window that cannot be read.
    """
    plain, config = predictor, TTAConfig()
    if isinstance(predictor, TTAPredictor):
        plain, config = predictor.predictor, predictor.config
    if config.scales != (1,):
        expected = f"1 alone for an image of {image.width}x{image.height}, which is read in windows"
        raise ConfigError(f"tta.scales: expected {expected}, got {config.scales}")
    grid = [-(-side // LOGIT_STRIDE) for side in (image.height, image.width)]
    window = _window(config, [cells * LOGIT_STRIDE for cells in grid])
    steps = dataclasses.replace(config, window=window).steps()
    assert steps is not None
    rows, columns = map(spans, grid, window, steps)
    views = [
        _View(cast(LogitsPredictor, plain), image, flip, rows, columns) for flip in (False, True)[: 1 + config.flip]
    ]
    first = 0  # row of logits that a band starts with
    for span, following in itertools.zip_longest(rows, rows[1:]):
        stop = grid[0] if following is None else following.start
        for view in views:
            view.add(span)
        logits = [view.mean_to(stop) for view in views]
        size = [(stop - first) * LOGIT_STRIDE, grid[1] * LOGIT_STRIDE]
        labels = (upsample_argmax(logits[0], size) if len(views) == 1 else argmax_of_mean(logits, size))[0]
        ends = size[0] - HALF if following else image.height - first * LOGIT_STRIDE
        yield labels[HALF if span.start else 0 : ends, : image.width]
        first = stop - 1


def _window(config: TTAConfig, size: list[int]) -> tuple[int, int]:
    """Height and width of the windows for an image of such a size, in whole steps of the logits."""
    if config.window is None:
        return min(WINDOW[0], size[0]), min(WINDOW[1], size[1])
    if config.window[0] > size[0] or config.window[1] > size[1]:
        raise ConfigError(f"tta.window: expected at most {tuple(size)}, as the image has, got {config.window}")
    return config.window


class _View:
    """The mean of the windows' logits, of the image as it is or mirrored, for a few rows at a time.

    Args:
        rows, columns: of logits that the windows have, in the view.
    """

    def __init__(
        self, predictor: LogitsPredictor, image: LargeImage, flip: bool, rows: list[slice], columns: list[slice]
    ) -> None:
        self.predictor, self.image, self.flip = predictor, image, flip
        width = columns[-1].stop
        self.columns = [slice(width - span.stop, width - span.start) for span in columns] if flip else columns
        self.counts = [_windows_over(spans, spans[-1].stop) for spans in (rows, columns)]
        if flip:
            self.counts[1] = self.counts[1].flip(0)
        self.first = 0
        self.total: Tensor | None = None

    def add(self, rows: slice) -> None:
        """Add the logits of the windows of these rows."""
        for columns in self.columns:
            window = self.image.read(pixels(rows), pixels(columns))
            frame = torch.from_numpy(window).permute(2, 0, 1)[None]
            logits = self.predictor.logits(frame.flip(-1) if self.flip else frame).float()
            if self.total is None:
                self.total = logits.new_zeros(*logits.shape[:2], 0, len(self.counts[1]))
            missing = rows.stop - self.first - self.total.shape[2]
            self.total = F.pad(self.total, (0, 0, 0, missing)) if missing else self.total
            self.total[:, :, rows.start - self.first :, columns] += logits.flip(-1) if self.flip else logits

    def mean_to(self, stop: int) -> Tensor:
        """Means float32 [1, C, h, w] of the rows up to `stop`; of those only the last is kept for the next time."""
        assert self.total is not None
        count = self.counts[0][self.first : stop, None] * self.counts[1]
        mean = self.total[:, :, : stop - self.first] / count.to(self.total)
        self.total, self.first = self.total[:, :, stop - 1 - self.first :], stop - 1
        return mean


def _windows_over(spans: list[slice], cells: int) -> Tensor:
    """How many of the windows hold each of so many cells, int64 [cells]."""
    count = torch.zeros(cells, dtype=torch.int64)
    for span in spans:
        count[span] += 1
    return count
