"""A network's first convolution of its frames in plain PyTorch: the definition that each backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel: scale * images + shift is (images / 255 - mean) / std."""
    return tuple([1 / (255 * s) for s in std]), tuple([-m / s for m, s in zip(mean, std, strict=True)])


def stem_conv(images: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    """relu(conv2d(x, weight, bias, stride=2, padding=1)) of x = scale * images + shift, images [N, 3, H, W].

    Arithmetic is float32, float64 if so are the weights.
    """
    computed = torch.promote_types(weight.dtype, torch.float32)
    channels = images.to(computed).unbind(1)
    x = torch.stack([channel * s + t for channel, s, t in zip(channels, scale, shift, strict=True)], 1)
    y = F.conv2d(x, weight.to(computed), bias.to(computed), stride=2, padding=1)
    return torch.relu(y).to(weight.dtype)
