"""ENet (arXiv 1606.02147): bottlenecks of few channels at 1/8 of the image, a decoder that unpools.

360,306 parameters with 19 classes: the 0.4 M that are published, and the 0.37 M of its own paper with the running
statistics of the batch norms. 15.7 G multiply-adds at 1024x2048; at 360x640, for which 3.8 GFLOPs are published,
1.72, which are 3.45 G operations: 10 % fewer, and the paper does not say what else is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_unpool2d

from bcmfnet.benchmarks.peers._blocks import conv

SECTION = ({}, {"dilation": 2}, {"asymmetric": 5}, {"dilation": 4}, {}, {"dilation": 8}, {"asymmetric": 5},
           {"dilation": 16})  # fmt: skip
"""The bottlenecks of section 2 after its first, and of section 3."""


def normed(layers: Sequence[nn.Module], channels: int) -> list[nn.Module]:
    return [*layers, nn.BatchNorm2d(channels), nn.PReLU(channels)]


class Initial(nn.Module):
    """13 channels of a 3x3 with stride 2, and the 3 of the pooled image."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 13, 3, stride=2)
        self.norm = nn.Sequential(*normed([], 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(torch.cat([self.conv(images), max_pool2d(images, 2)], 1))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, a convolution, 1x1 back, and a skip."""

    def __init__(self, channels: int, dilation: int = 1, asymmetric: int = 0):
        super().__init__()
        inner = channels // 4
        if asymmetric:
            tall, wide = (asymmetric, 1), (1, asymmetric)
            middle = [nn.Conv2d(inner, inner, k, padding=(k[0] // 2, k[1] // 2), bias=False) for k in (tall, wide)]
        else:
            middle = [conv(inner, inner, 3, dilation=dilation)]
        self.branch = nn.Sequential(
            *normed([conv(channels, inner, 1)], inner),
            *normed(middle, inner),
            conv(inner, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))


class Downsampling(nn.Module):
    """The branch starts with a 2x2 of stride 2; the skip is pooled, and padded with channels of zeros."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        inner = in_channels // 4
        self.branch = nn.Sequential(
            *normed([nn.Conv2d(in_channels, inner, 2, stride=2, bias=False)], inner),
            *normed([conv(inner, inner, 3)], inner),
            conv(inner, channels, 1),
            nn.BatchNorm2d(channels),
        )
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map at half the size, and where its maxima were."""
        out = self.branch(x)
        pooled, places = max_pool2d(x, 2, return_indices=True)
        kept = out[:, : pooled.shape[1]] + pooled
        return self.act(torch.cat([kept, out[:, pooled.shape[1] :]], 1)), places


class Upsampling(nn.Module):
    """A transposed 3x3 in the branch, and a 1x1 whose result goes where the maxima were."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        inner = in_channels // 4
        self.reduce = nn.Sequential(*normed([conv(in_channels, inner, 1)], inner))
        self.up = nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1, bias=False)
        self.expand = nn.Sequential(*normed([], inner), conv(inner, channels, 1), nn.BatchNorm2d(channels))
        self.skip = nn.Sequential(conv(in_channels, channels, 1), nn.BatchNorm2d(channels))
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
        out = self.expand(self.up(self.reduce(x), output_size=size))
        return self.act(out + max_unpool2d(self.skip(x), places, 2, output_size=size))


class ENet(nn.Module):
    """Images [N, 3, H, W], H and W multiples of 8, to logits [N, classes, H, W]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.initial = Initial()
        self.down1, self.down2 = Downsampling(16, 64), Downsampling(64, 128)
        self.section1 = nn.Sequential(*(Bottleneck(64) for _ in range(4)))
        self.sections = nn.Sequential(*(Bottleneck(128, **options) for options in SECTION * 2))
        self.up4, self.section4 = Upsampling(128, 64), nn.Sequential(Bottleneck(64), Bottleneck(64))
        self.up5, self.section5 = Upsampling(64, 16), Bottleneck(16)
        self.classifier = nn.ConvTranspose2d(16, num_classes, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        half = self.initial(images)
        quarter, places1 = self.down1(half)
        quarter = self.section1(quarter)
        eighth, places2 = self.down2(quarter)
        eighth = self.sections(eighth)
        x = self.section4(self.up4(eighth, places2, quarter.shape[-2:]))
        x = self.section5(self.up5(x, places1, half.shape[-2:]))
        return self.classifier(x)
