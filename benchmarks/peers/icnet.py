"""ICNet (arXiv 1704.08545): PSPNet50 of half the channels at 1/4 of the frame's size, lifted by two shallower branches.

6,699,987 parameters with 19 classes. Published are 7.8 M, 1.1 M more, which cannot be met: the network that the
authors released has these widths. Others print 26.5 M, which is a ResNet-50 of full width. 29.0 G multiply-adds at
1024x2048, for which 28.3 GFLOPs are published elsewhere.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, ConvBNReLU, resize_like


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to four times the width, and a skip; the stride is that of the first 1x1."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            ConvBNReLU(in_channels, channels, 1, stride),
            ConvBNReLU(channels, channels, 3, dilation=dilation),
            ConvBN(channels, 4 * channels, 1),
        )
        changes = stride > 1 or in_channels != 4 * channels
        self.skip = ConvBN(in_channels, 4 * channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.branch(x) + (x if self.skip is None else self.skip(x)))


def stage(in_channels: int, channels: int, blocks: int, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, dilation=dilation)
    return nn.Sequential(first, *(Bottleneck(4 * channels, channels, dilation=dilation) for _ in range(blocks - 1)))


def half(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


class CascadeFusion(nn.Module):
    """A coarse map at the size of a finer one, both at 128 channels, and their sum."""

    def __init__(self, coarse_channels: int, fine_channels: int):
        super().__init__()
        self.coarse, self.fine = ConvBN(coarse_channels, 128, 3, dilation=2), ConvBN(fine_channels, 128, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return relu(self.coarse(resize_like(coarse, fine)) + self.fine(fine))


class ICNet(nn.Module):
    """Images [N, 3, H, W], H and W multiples of 32 and >= 192, to logits [N, classes, H / 4, W / 4].

    The branches share no weights but the first convolutions and `conv2`, which the half-size image goes through once.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(
            ConvBNReLU(3, 32, 3, stride=2), ConvBNReLU(32, 32), ConvBNReLU(32, 64), nn.MaxPool2d(3, 2, padding=1)
        )
        self.conv2, self.conv3_1 = stage(64, 32, 3), Bottleneck(128, 64, stride=2)
        self.low = nn.Sequential(
            *(Bottleneck(256, 64) for _ in range(3)), *stage(256, 128, 6, dilation=2), *stage(512, 256, 3, dilation=4)
        )
        self.compress = ConvBNReLU(1024, 256, 1)
        self.high = nn.Sequential(
            ConvBNReLU(3, 32, 3, stride=2), ConvBNReLU(32, 32, 3, stride=2), ConvBNReLU(32, 64, 3, stride=2)
        )
        self.fuse4, self.fuse2 = CascadeFusion(256, 256), CascadeFusion(128, 64)
        self.classifier = nn.Conv2d(128, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        middle = self.conv3_1(self.conv2(self.stem(half(images))))
        low = self.low(half(middle))
        low = low + sum(resize_like(adaptive_avg_pool2d(low, bins), low) for bins in (1, 2, 3, 6))
        x = self.fuse4(self.compress(low), middle)
        x = self.fuse2(x, self.high(images))
        return self.classifier(interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
