"""LEDNet (arXiv 1905.02423): split and shuffled bottlenecks of 1-D convolutions, and an attention pyramid.

922,821 parameters with 19 classes. Published are 0.94 M, 2 % more, which the code that the authors released does not
have either: with the classifier that only trains the encoder, 925,272. 44.8 G multiply-adds at 1024x2048, 11.2 at
512x1024; no count is published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import channel_shuffle, relu

from bcmfnet.benchmarks.peers._blocks import resize_like

DILATIONS = (1, 2, 5, 9, 2, 5, 9, 17)
"""Of the blocks at 1/8 of the image."""


def conv_bn_relu(in_channels: int, channels: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2)
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


class Downsampling(nn.Module):
    """A strided 3x3 beside a max pool."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels - in_channels, 3, stride=2, padding=1)
        self.pool, self.norm = nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.norm(torch.cat([self.conv(x), self.pool(x)], 1)))


class SplitShuffle(nn.Module):
    """Half of the channels through 3x1, 1x3 pairs, the other half through 1x3, 3x1 pairs; a skip and a shuffle."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        half = channels // 2

        def factorized(first: tuple[int, int], dilation: int) -> list[nn.Module]:
            layers: list[nn.Module] = []
            for kernel in (first, first[::-1]):
                padding = tuple(dilation * (k // 2) for k in kernel)
                layers += [nn.Conv2d(half, half, kernel, padding=padding, dilation=dilation), nn.ReLU()]
            return [*layers[:-1], nn.BatchNorm2d(half)]

        self.left, self.right = (
            nn.Sequential(*factorized(first, 1), nn.ReLU(), *factorized(first, dilation)) for first in ((3, 1), (1, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return channel_shuffle(relu(x + torch.cat([self.left(left), self.right(right)], 1)), 2)


class AttentionPyramid(nn.Module):
    """Class scores weighted by a map of one channel from a small pyramid, and the scores of the whole frame."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(in_channels, num_classes))
        self.scores = conv_bn_relu(in_channels, num_classes)
        self.down1, self.down2 = conv_bn_relu(in_channels, 1, 7, 2), conv_bn_relu(1, 1, 5, 2)
        self.down3 = nn.Sequential(conv_bn_relu(1, 1, 3, 2), conv_bn_relu(1, 1, 3))
        self.across1, self.across2 = conv_bn_relu(1, 1, 7), conv_bn_relu(1, 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        half = self.down1(x)
        quarter = self.down2(half)
        weight = resize_like(self.down3(quarter), quarter) + self.across2(quarter)
        weight = resize_like(weight, half) + self.across1(half)
        return self.scores(x) * resize_like(weight, x) + self.whole(x)


class LEDNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 8), ceil(W / 8)]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.encoder = nn.Sequential(
            Downsampling(3, 32), *(SplitShuffle(32, 1) for _ in range(3)),
            Downsampling(32, 64), *(SplitShuffle(64, 1) for _ in range(2)),
            Downsampling(64, 128), *(SplitShuffle(128, dilation) for dilation in DILATIONS),
        )  # fmt: skip
        self.decoder = AttentionPyramid(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))
