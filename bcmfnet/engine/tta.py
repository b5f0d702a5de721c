"""Test-time augmentation: label maps from several scales and mirror images of a frame, and from windows of it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.data.pairs import MIN_SIDE
from bcmfnet.engine.config import LOGIT_STRIDE, TTAConfig
from bcmfnet.engine.inference import LogitsPredictor, Predictor
from bcmfnet.errors import ConfigError
from bcmfnet.ops import upsample_argmax
from bcmfnet.reference.bilinear import interpolation_matrix

BAND = 16
"""Rows of the frame that are scored at a time: of 4 to 128 the fastest. Twelve views of 1024x2048 pixels in 19 classes
take one thread 1.7 s, and 4.1 s where the whole frame is scored at once: 160 MB of scores leave the cache.
"""


def with_tta(predictor: LogitsPredictor, config: TTAConfig) -> Predictor:
    """The predictor under a configuration of test-time augmentation: itself where nothing is switched on."""
    return predictor if config == TTAConfig() else TTAPredictor(predictor, config)


class TTAPredictor:
    """A predictor that is called as the one it is made of, and averages over views of a frame: scales, mirror images.

    A view's logits are upsampled to the frame (bilinear, align_corners=False); the label of a pixel is the class whose
    softmax probability, averaged over the views, is the highest. That is the mean which published results are of, and
    it is taken in bands of rows, so that no view has logits in full resolution. Averaged at 1/8, where the logits are,
    and upsampled as logarithms, the same probabilities cost 0.3 points of boundary IoU (CamVid, four scales and flip).

    Frames are scaled as in training: bilinear, without antialiasing, rounded to uint8. The sides of a scaled frame, and
    of one that is cut into windows, are rounded to multiples of 8, so that the logits of all windows lie on one grid.
    There the logits of overlapping windows are averaged.
    """

    def __init__(self, predictor: LogitsPredictor, config: TTAConfig) -> None:
        self.predictor = predictor
        self.config = config

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Label maps uint8 [N, H, W] on the device, of RGB frames uint8 [N, 3, H, W].

        Raises ConfigError for a scale or a window that such frames are too small for.
        """
        size = images.shape[-2:]
        views = list(self._views(images.to(self.predictor.device)))
        return upsample_argmax(views[0], size) if len(views) == 1 else argmax_of_mean(views, size)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """Logits float32 [N, C, h, w] of each view, mirrored back."""
        for scale in self.config.scales:
            frames = self._scaled(images, scale)
            yield self._logits(frames)
            if self.config.flip:
                yield self._logits(frames.flip(-1)).flip(-1)

    def _scaled(self, images: Tensor, scale: float) -> Tensor:
        size, window = tuple(images.shape[-2:]), self.config.window
        if scale == 1 and window is None:
            return images
        scaled = tuple(round(side * scale / LOGIT_STRIDE) * LOGIT_STRIDE for side in size)
        if min(scaled) < MIN_SIDE:
            expected = f"scales that leave {MIN_SIDE}x{MIN_SIDE} pixels of a frame of {size[1]}x{size[0]}"
            raise ConfigError(f"tta.scales: expected {expected}, got {scale}")
        if window is not None and (window[0] > scaled[0] or window[1] > scaled[1]):
            expected = f"at most {scaled}, height and width of a frame at scale {scale:g}"
            raise ConfigError(f"tta.window: expected {expected}, got {window}")
        if scaled == size:
            return images
        resized = F.interpolate(images.float(), scaled, mode="bilinear", align_corners=False)
        return resized.round_().to(torch.uint8)

    def _logits(self, frames: Tensor) -> Tensor:
        """Logits of frames, or the mean of those of their windows."""
        window, steps = self.config.window, self.config.steps()
        if window is None or steps is None:
            return self.predictor.logits(frames).float()
        grid = [side // LOGIT_STRIDE for side in frames.shape[-2:]]
        spans_of_rows, spans_of_columns = map(spans, grid, window, steps)
        windows = list(itertools.product(spans_of_rows, spans_of_columns))
        parts = [self.predictor.logits(frames[..., pixels(rows), pixels(columns)]) for rows, columns in windows]
        total = torch.zeros(*parts[0].shape[:2], *grid, device=frames.device)
        count = torch.zeros(*grid, device=frames.device)
        for (rows, columns), logits in zip(windows, parts, strict=True):
            total[..., rows, columns] += logits
            count[rows, columns] += 1
        return total / count


def spans(cells: int, window: int, step: int) -> list[slice]:
    """The logits of each window along an axis of so many; the last window ends with the frame."""
    last = cells - window // LOGIT_STRIDE
    starts = [*range(0, last, step // LOGIT_STRIDE), last]
    return [slice(start, start + window // LOGIT_STRIDE) for start in starts]


def pixels(cells: slice) -> slice:
    return slice(cells.start * LOGIT_STRIDE, cells.stop * LOGIT_STRIDE)


def argmax_of_mean(views: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Labels uint8 [N, H, W] of the mean of the views' softmax probabilities at a size (H, W).

    Args:
        views: float32 logits [N, C, h, w], each of a resolution of its own.
    """
    height, width = size
    weights = [interpolation_matrix(view.shape[2], height) for view in views]
    bands = []
    for top in range(0, height, BAND):
        rows = slice(top, top + BAND)
        scores = (_rows(view, matrix[rows], width).softmax(1) for view, matrix in zip(views, weights, strict=True))
        bands.append(reduce(operator.add, scores).argmax(1).to(torch.uint8))
    return torch.cat(bands, 1)


def confidence(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Softmax probability float32 [N, H, W] of the class that wins at each pixel of a size (H, W).

    Args:
        logits: float32 [N, C, h, w].
    """
    height, width = size
    weights = interpolation_matrix(logits.shape[2], height)
    tops = range(0, height, BAND)
    return torch.cat([_rows(logits, weights[top : top + BAND], width).softmax(1).amax(1) for top in tops], 1)


def _rows(logits: Tensor, weights: Tensor, width: int) -> Tensor:
    """Rows [N, C, r, width] of upsampled logits, by their weights [r, h]: only the rows that these name are read."""
    numbers = weights.any(0).nonzero()
    used = slice(int(numbers[0]), int(numbers[-1]) + 1)
    source = logits[:, :, used]
    wide = F.interpolate(source, (source.shape[2], width), mode="bilinear", align_corners=False)
    return weights[:, used].to(wide) @ wide
