"""CABiNet (arXiv 2011.00993): a cheap spatial branch beside MobileNetV3-Small with attention to pooled keys.

2,584,864 parameters with 19 classes. Published are 2.64 M, 2 % more, which the code that the authors released does
not have either: with the classifiers of the training, 2,588,056. 13.2 G multiply-adds at 1024x2048, for which 12.0
GFLOPs are published; the products of the attention, 0.03 G, are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, hardsigmoid, relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, ConvBNReLU, conv, resize_like

BINS = (1, 3, 6, 8)
"""Sides of the grids that keys and values are averaged to."""


class Layer(NamedTuple):
    """A block of MobileNetV3: kernel, channels inside and after it, squeeze-and-excite, hard swish, stride."""

    kernel: int
    inner: int
    channels: int
    squeeze: bool
    swish: bool
    stride: int


SMALL = (
    Layer(3, 16, 16, True, False, 2), Layer(3, 72, 24, False, False, 2), Layer(3, 88, 24, False, False, 1),
    Layer(5, 96, 40, True, True, 2), Layer(5, 240, 40, True, True, 1), Layer(5, 240, 40, True, True, 1),
    Layer(5, 120, 48, True, True, 1), Layer(5, 144, 48, True, True, 1), Layer(5, 288, 96, True, True, 2),
    Layer(5, 576, 96, True, True, 1), Layer(5, 576, 96, True, True, 1),
)  # fmt: skip


class SqueezeExcite(nn.Module):
    """Each channel times a factor from the means of all."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * hardsigmoid(self.expand(relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """1x1 to the channels inside, a convolution of each by itself, 1x1; a skip where the shape stays."""

    def __init__(self, in_channels: int, layer: Layer):
        super().__init__()
        act = nn.Hardswish if layer.swish else nn.ReLU
        wide = layer.inner
        expand = [*ConvBN(in_channels, wide, 1), act()] if wide != in_channels else []
        squeeze = [SqueezeExcite(wide)] if layer.squeeze else []
        self.branch = nn.Sequential(
            *expand, *ConvBN(wide, wide, layer.kernel, layer.stride, groups=wide), *squeeze, act(),
            *ConvBN(wide, layer.channels, 1),
        )  # fmt: skip
        self.skips = layer.stride == 1 and in_channels == layer.channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.skips else self.branch(x)


def mobilenet(layers: Sequence[Layer]) -> nn.Sequential:
    """Images to as many channels as the last block has inside, at 1/32."""
    channels, blocks = 16, []
    for layer in layers:
        blocks.append(InvertedResidual(channels, layer))
        channels = layer.channels
    last = layers[-1].inner
    return nn.Sequential(ConvBN(3, 16, 3, stride=2), nn.Hardswish(), *blocks, ConvBN(channels, last, 1), nn.Hardswish())


def pooled(x: Tensor) -> Tensor:
    """A map as a row of its means over the grids: [N, C, 110]."""
    return torch.cat([adaptive_avg_pool2d(x, bins).flatten(2) for bins in BINS], 2)


class ContextAggregation(nn.Module):
    """Attention of every place to the pooled ones, and weights from a map of a quarter of the size."""

    def __init__(self, channels: int, value_channels: int):
        super().__init__()
        self.key = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.value, self.out = nn.Conv2d(channels, value_channels, 1), nn.Conv2d(value_channels, channels, 1)
        self.local = nn.Sequential(*(ConvBNReLU(channels, channels, 3, s, groups=channels) for s in (2, 2, 1)))

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key(x), pooled(self.value(x))
        near = key.flatten(2).transpose(1, 2) @ pooled(key) * key.shape[1] ** -0.5
        x = self.out((near.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]))
        weighted = x + x * resize_like(self.local(x), x).sigmoid()
        return weighted + x


class ContextBranch(nn.Module):
    """MobileNetV3's map to 128 channels, with its context."""

    def __init__(self, in_channels: int = SMALL[-1].inner, channels: int = 128):
        super().__init__()
        self.reduce, self.context = ConvBNReLU(in_channels, channels), ContextAggregation(channels, channels // 2)
        self.expand = nn.Conv2d(channels, channels, 1)
        self.fuse = ConvBNReLU(in_channels + channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat([x, self.expand(self.context(self.reduce(x)))], 1))


class Fusion(nn.Module):
    """Both branches side by side, each channel by itself, weighted on top."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvBNReLU(channels, channels, 3, groups=channels)
        self.gate = nn.Sequential(conv(channels, channels // 4, 1), nn.ReLU(), conv(channels // 4, channels, 1))

    def forward(self, *maps: Tensor) -> Tensor:
        x = self.conv(torch.cat(maps, 1))
        return x + x * self.gate(x.mean((2, 3), keepdim=True)).softmax(-1)


class CABiNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 8), ceil(W / 8)]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.spatial = nn.Sequential(
            ConvBNReLU(3, 64, 7, stride=2), ConvBNReLU(64, 64, 3, stride=2, groups=64),
            ConvBNReLU(64, 64, 3, stride=2, groups=64), ConvBNReLU(64, 128, 1),
        )  # fmt: skip
        self.backbone, self.context = mobilenet(SMALL), ContextBranch()
        self.fusion = Fusion(256)
        self.head = nn.Sequential(
            ConvBNReLU(256, 256, 3, groups=256), ConvBNReLU(256, 256, 1), conv(256, num_classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        spatial = self.spatial(images)
        return self.head(self.fusion(spatial, resize_like(self.context(self.backbone(images)), spatial)))
