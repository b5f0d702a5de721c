"""Test-time augmentation: label maps from several scales and mirror images of a frame, and from windows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.data.pairs import MIN_SIDE
from bcmfnet.engine.config import LOGIT_STRIDE, TTAConfig
from bcmfnet.engine.inference import LabelPredictor, Predictor
from bcmfnet.errors import ConfigError
from bcmfnet.ops import upsample_argmax
from bcmfnet.reference.bilinear import interpolation_matrix

BAND = 16
"""Rows of the frame that are scored at a time. Of 8 to 64 all take the same time (1024x2048, 19 classes, one thread),
a quarter of that of the whole frame at once, whose scores leave the cache.
"""


def with_tta(predictor: LabelPredictor, config: TTAConfig) -> Predictor:
    """The predictor under a configuration of test-time augmentation: itself where nothing is switched on."""
    return predictor if config == TTAConfig() else TTAPredictor(predictor, config)


class TTAPredictor:
    """A predictor that is called as the one it is made of, and averages over views of a frame: scales, mirror images.

    A view's logits are upsampled to the frame (bilinear, align_corners=False); the label of a pixel is the class whose
    softmax probability, averaged over the views, is the highest. That is the mean which published results are of. It
    is taken in bands of rows, so that no view has logits in full resolution.

    Frames are scaled as in training: bilinear, without antialiasing, rounded to uint8. The sides of a scaled frame, and
    of one that is cut into windows, are rounded to multiples of 8, so that the logits of all windows lie on one grid.
    There the logits of overlapping windows are averaged.
    """

    def __init__(self, predictor: LabelPredictor, config: TTAConfig) -> None:
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
        if self.config.window is None:
            return self.predictor.logits(frames).float()
        total = count = None
        height, width = self.config.window
        for top, left in self._corners(frames.shape[-2:]):
            logits = self.predictor.logits(frames[..., top : top + height, left : left + width]).float()
            if total is None:
                grid = [side // LOGIT_STRIDE for side in frames.shape[-2:]]
                total, count = logits.new_zeros((*logits.shape[:2], *grid)), logits.new_zeros(grid)
            rows, columns = (
                slice(start // LOGIT_STRIDE, start // LOGIT_STRIDE + length)
                for start, length in zip((top, left), logits.shape[-2:], strict=True)
            )
            total[..., rows, columns] += logits
            count[rows, columns] += 1
        return total / count

    def _corners(self, size: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Row and column at which each window begins; the last of an axis ends with the frame."""
        rows, columns = (
            [*range(0, side - window, stride), side - window]
            for side, window, stride in zip(size, self.config.window, self.config.steps(), strict=True)
        )
        return ((row, column) for row in rows for column in columns)


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
        scores = sum(_rows(view, matrix[rows], width).softmax(1) for view, matrix in zip(views, weights, strict=True))
        bands.append(scores.argmax(1).to(torch.uint8))
    return torch.cat(bands, 1)


def _rows(logits: Tensor, weights: Tensor, width: int) -> Tensor:
    """Rows [N, C, r, width] of upsampled logits, by their weights [r, h]: only the rows that these name are read."""
    used = weights.any(0).nonzero()
    used = slice(int(used[0]), int(used[-1]) + 1)
    source = logits[:, :, used]
    wide = F.interpolate(source, (source.shape[2], width), mode="bilinear", align_corners=False)
    return weights[:, used].to(wide) @ wide
