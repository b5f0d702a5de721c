"""BiSeNetV2 (arXiv 2004.02147): a detail branch to 1/8 of the image and a thin, deep semantic branch to 1/32.

3,358,627 parameters with 19 classes, without the heads of the training; no count is published. 98.4 G multiply-adds
at 1024x2048; 24.6 at 512x1024, for which 21.1 GFLOPs are published. The head takes 40 % of them: it has the 1024
channels of public implementations, and the published count would be met with some 660.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, ConvBNReLU, SeparableConvBN, conv, resize_like

DETAIL = ((3, 64, 2), (64, 64, 1), (64, 64, 2), (64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))
"""Channels before and after each 3x3 of the detail branch, and its stride."""
SEMANTIC = ((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1),
            (128, 128, 1))  # fmt: skip
"""The same of the gather-and-expansion layers."""
EXPANSION = 6
HEAD = 1024
"""Channels of the head's 3x3."""


class Stem(nn.Module):
    """Images to 16 channels at 1/4: a strided 3x3, then one more beside a max pool."""

    def __init__(self):
        super().__init__()
        self.first = ConvBNReLU(3, 16, 3, stride=2)
        self.left = nn.Sequential(ConvBNReLU(16, 8, 1), ConvBNReLU(8, 16, 3, stride=2))
        self.right = nn.MaxPool2d(3, 2, padding=1)
        self.fuse = ConvBNReLU(32, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.fuse(torch.cat([self.left(x), self.right(x)], 1))


class GatherExpansion(nn.Module):
    """A 3x3, one for each channel by itself to six times as many, a 1x1 back, and a skip."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        wide = EXPANSION * in_channels
        gather = [ConvBN(in_channels, wide, 3, stride, groups=in_channels)]
        if stride > 1:
            gather.append(ConvBN(wide, wide, 3, groups=wide))
        self.branch = nn.Sequential(
            ConvBNReLU(in_channels, in_channels), *gather[:-1], *gather[-1], nn.ReLU(), ConvBN(wide, channels, 1)
        )
        self.skip = SeparableConvBN(in_channels, channels, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.branch(x) + (x if self.skip is None else self.skip(x)))


class ContextEmbedding(nn.Module):
    """The mean of the map, through a 1x1, added to it everywhere; then a 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.mean = nn.BatchNorm2d(channels), ConvBNReLU(channels, channels, 1)
        self.last = ConvBNReLU(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.mean(self.norm(x.mean((2, 3), keepdim=True))))


class GuidedAggregation(nn.Module):
    """Each branch weighted by the other, at its own size, and their sum at the size of the details."""

    def __init__(self, channels: int):
        super().__init__()

        def own_size() -> nn.Sequential:
            return nn.Sequential(*ConvBN(channels, channels, 3, groups=channels), conv(channels, channels, 1))

        self.detail, self.semantic = own_size(), own_size()
        self.detail_down = nn.Sequential(ConvBN(channels, channels, 3, stride=2), nn.AvgPool2d(3, 2, padding=1))
        self.semantic_up = ConvBN(channels, channels)
        self.fuse = ConvBN(channels, channels)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        fine = self.detail(detail) * resize_like(self.semantic_up(semantic), detail).sigmoid()
        coarse = self.detail_down(detail) * self.semantic(semantic).sigmoid()
        return self.fuse(fine + resize_like(coarse, detail))


class BiSeNetV2(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 8), ceil(W / 8)]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.detail = nn.Sequential(*(ConvBNReLU(a, b, 3, stride) for a, b, stride in DETAIL))
        self.semantic = nn.Sequential(Stem(), *(GatherExpansion(*sizes) for sizes in SEMANTIC), ContextEmbedding(128))
        self.aggregate = GuidedAggregation(128)
        self.head = nn.Sequential(ConvBNReLU(128, HEAD), nn.Conv2d(HEAD, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.aggregate(self.detail(images), self.semantic(images)))
