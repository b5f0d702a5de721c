"""PIDNet-S (arXiv 2206.02066): three branches, of details, context and boundaries; built of DDRNet's blocks.

7,625,715 parameters with 19 classes, the 7.6 M that are published, without the heads of the training. 47.2 G
multiply-adds at 1024x2048, for which 47.6 GFLOPs are published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, conv, resize_like
from bcmfnet.models.ddrnet import BasicBlock, Bottleneck, SegmentationHead

POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
"""Kernel, stride and padding of the context module's pools; the last one is the whole map."""


def stage(in_channels: int, channels: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Basic blocks; the result is before the ReLU."""
    widths = [in_channels] + (blocks - 1) * [channels]
    strides = [stride] + (blocks - 1) * [1]
    relus = (blocks - 1) * [True] + [False]
    return nn.Sequential(*(BasicBlock(w, channels, s, r) for w, s, r in zip(widths, strides, relus, strict=True)))


def norm_relu_conv(in_channels: int, channels: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    layer = conv(in_channels, channels, kernel, groups=groups)
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), layer)


class ParallelPyramid(nn.Module):
    """PAPPM: pools of growing windows, each with the map itself, fused by one grouped 3x3."""

    def __init__(self, in_channels: int, width: int, channels: int):
        super().__init__()
        self.scales = nn.ModuleList(norm_relu_conv(in_channels, width) for _ in range(5))
        self.process = norm_relu_conv(4 * width, 4 * width, 3, groups=4)
        self.compress = norm_relu_conv(5 * width, channels)
        self.shortcut = norm_relu_conv(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        base = self.scales[0](x)
        pools = [avg_pool2d(x, *pool) for pool in POOLS] + [x.mean((2, 3), keepdim=True)]
        scales = [resize_like(scale(pool), x) + base for scale, pool in zip(self.scales[1:], pools, strict=True)]
        return self.compress(torch.cat([base, self.process(torch.cat(scales, 1))], 1)) + self.shortcut(x)


class PixelAttention(nn.Module):
    """Pag: details where they disagree with the context, and the context where they agree."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.detail, self.context = ConvBN(channels, width, 1), ConvBN(channels, width, 1)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        likeness = self.detail(detail) * resize_like(self.context(context), detail)
        weight = likeness.sum(1, keepdim=True).sigmoid()
        return (1 - weight) * detail + weight * resize_like(context, detail)


class BoundaryFusion(nn.Module):
    """Light-Bag: details at boundaries, context elsewhere."""

    def __init__(self, channels: int):
        super().__init__()
        self.detail, self.context = ConvBN(channels, channels, 1), ConvBN(channels, channels, 1)

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        edge = boundary.sigmoid()
        return self.detail((1 - edge) * context + detail) + self.context(context + edge * detail)


class PIDNetS(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 8), ceil(W / 8)]; without the heads of the training."""

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        w = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, w, 3, stride=2, padding=1), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, w, 3, stride=2, padding=1), nn.BatchNorm2d(w), nn.ReLU(),
        )  # fmt: skip
        self.i1, self.i2 = stage(w, w, 2), stage(w, 2 * w, 2, stride=2)
        self.i3, self.i4 = stage(2 * w, 4 * w, 3, stride=2), stage(4 * w, 8 * w, 3, stride=2)
        self.i5 = nn.Sequential(Bottleneck(8 * w, 8 * w, 2), Bottleneck(16 * w, 8 * w))
        self.context = ParallelPyramid(16 * w, 96, 4 * w)

        self.p3, self.p4, self.p5 = stage(2 * w, 2 * w, 2), stage(2 * w, 2 * w, 2), Bottleneck(2 * w, 2 * w)
        self.compress3, self.compress4 = ConvBN(4 * w, 2 * w, 1), ConvBN(8 * w, 2 * w, 1)
        self.attend3, self.attend4 = PixelAttention(2 * w, w), PixelAttention(2 * w, w)

        self.d3, self.d4, self.d5 = stage(2 * w, w, 1), Bottleneck(w, w), Bottleneck(2 * w, 2 * w)
        self.difference3, self.difference4 = ConvBN(4 * w, w), ConvBN(8 * w, 2 * w)
        self.fusion, self.head = BoundaryFusion(4 * w), SegmentationHead(4 * w, num_classes, 128)

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.i2(relu(self.i1(self.stem(images)))))
        detail, boundary = self.p3(x), self.d3(x)

        x = relu(self.i3(x))
        detail = self.attend3(detail, self.compress3(x))
        boundary = boundary + resize_like(self.difference3(x), boundary)

        x = relu(self.i4(x))
        detail = self.attend4(self.p4(relu(detail)), self.compress4(x))
        boundary = self.d4(relu(boundary))
        boundary = boundary + resize_like(self.difference4(x), boundary)

        detail, boundary = self.p5(relu(detail)), self.d5(relu(boundary))
        return self.head(self.fusion(detail, resize_like(self.context(self.i5(x)), detail), boundary))
