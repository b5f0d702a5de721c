"""Augmentation on uint8 in the workers, normalisation on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from bcmfnet.errors import ConfigError
from bcmfnet.reference.stem_conv import affine

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
GRAY_WEIGHTS = np.array([[0.299, 0.587, 0.114]])  # ITU-R BT.601 luma


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, flip and colour; padding is ImageNet's mean colour and `ignore_index`.

    Only the source window of the crop is resized, so the cost follows the crop and not the frame.

    Args:
        crop: (height, width) of the output in pixels.
        scale: range of the random scale, drawn uniformly; the same for both axes.
        flip: probability of a horizontal flip.
        jitter: brightness, contrast and saturation are each scaled by a factor in [1 - jitter, 1 + jitter].
        balance: probability that the crop holds a pixel of a class drawn from those of the frame, each as likely as the
            others however few its pixels are.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.4
    balance: float = 0.0
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise ConfigError(f"crop: expected (height, width) >= 1, got {self.crop}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale: expected 0 < low <= high, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip: expected a probability in [0, 1], got {self.flip}")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter: expected a number in [0, 1), got {self.jitter}")
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance: expected a probability in [0, 1], got {self.balance}")

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [H, W, 3] and ids uint8 [H, W] -> contiguous uint8 [3, h, w] and [h, w], (h, w) = crop."""
        scale = rng.uniform(*self.scale)
        balanced = self.balance > 0 and rng.random() < self.balance
        row, col = _pixel_of_a_class(label, self.ignore_index, rng) if balanced else (None, None)
        rows = _place(image.shape[0], self.crop[0], scale, rng, row)
        cols = _place(image.shape[1], self.crop[1], scale, rng, col)
        flip = rng.random() < self.flip
        image = _resample(image, rows, cols, cv2.INTER_LINEAR, FILL)
        # INTER_NEAREST samples at pixel corners, half a pixel off INTER_LINEAR; the exact one samples at centres.
        label = _resample(label, rows, cols, cv2.INTER_NEAREST_EXACT, self.ignore_index)
        if flip:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        if self.jitter:
            image = cv2.transform(image, color_matrix(image, rng.uniform(1 - self.jitter, 1 + self.jitter, size=3)))
        return to_chw(image), label


@dataclass(frozen=True)
class EvalTransform:
    """The frame as it is: no resize, no crop."""

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return to_chw(image), label


@dataclass(frozen=True)
class _Axis:
    """One axis of a crop: source pixels [start, start + length) go to [offset, offset + size) of `crop`."""

    start: int
    length: int
    offset: int
    size: int
    crop: int

    @property
    def after(self) -> int:
        """Padding after the pixels, as `offset` is the padding before them."""
        return self.crop - self.offset - self.size


def _pixel_of_a_class(
    label: np.ndarray, ignore_index: int, rng: np.random.Generator
) -> tuple[int, int] | tuple[None, None]:
    """Row and column of a random pixel of a random class of the frame; None where all of it is ignored."""
    pixels = np.bincount(label.ravel(), minlength=256)
    pixels[ignore_index] = 0
    if not pixels.any():
        return None, None
    of_class = np.flatnonzero(label.ravel() == rng.choice(np.flatnonzero(pixels)))
    row, col = divmod(int(rng.choice(of_class)), label.shape[1])
    return row, col


def _place(source: int, crop: int, scale: float, rng: np.random.Generator, pixel: int | None = None) -> _Axis:
    """Where a crop lies along an axis: anywhere, or anywhere around a pixel of the source."""
    length = max(1, round(crop / scale))
    if length <= source:
        first, last = 0, source - length
        if pixel is not None:
            first, last = max(first, pixel - length + 1), min(last, pixel)
        return _Axis(int(rng.integers(first, last + 1)), length, 0, crop, crop)
    size = min(crop, max(1, round(source * scale)))
    return _Axis(0, source, int(rng.integers(crop - size + 1)), size, crop)


def _resample(source: np.ndarray, rows: _Axis, cols: _Axis, interpolation: int, fill) -> np.ndarray:
    window = source[rows.start : rows.start + rows.length, cols.start : cols.start + cols.length]
    resized = cv2.resize(window, (cols.size, rows.size), interpolation=interpolation)
    borders = (rows.offset, rows.after, cols.offset, cols.after)
    return cv2.copyMakeBorder(resized, *borders, cv2.BORDER_CONSTANT, value=fill) if any(borders) else resized


def color_matrix(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Brightness, contrast (about the mean luma) and saturation as one affine map of RGB, float64 [3, 4]."""
    brightness, contrast, saturation = factors
    luma = (GRAY_WEIGHTS @ cv2.mean(image)[:3]).item()
    linear = saturation * np.eye(3) + (1 - saturation) * np.repeat(GRAY_WEIGHTS, 3, axis=0)
    offset = np.full((3, 1), brightness * (1 - contrast) * luma)
    return np.hstack([brightness * contrast * linear, offset])


def to_chw(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> contiguous uint8 [3, H, W]."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return planes


def normalize(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """(images / 255 - mean) / std on the images' device: uint8 [N, 3, H, W] -> float32 in `memory_format`."""
    scale, shift = _affine(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=memory_format).mul_(scale).add_(shift)


@lru_cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, float32 [3, 1, 1]; kept, since making them on a GPU waits for it."""
    scale, shift = (torch.tensor(values, device=device).view(3, 1, 1) for values in affine(mean, std))
    return scale, shift
