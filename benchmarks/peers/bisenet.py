"""BiSeNet1 (arXiv 1808.00897, with Xception39): a wide path to 1/8 of the image beside a deep one to 1/32.

1,541,963 parameters with 19 classes. Published are 5.8 M, 3.8 times as many, which cannot be met: the code that the
authors released has these widths, and 1.84 M parameters with its auxiliary heads. 27.8 G multiply-adds at 1024x2048;
15.6 at 768x1536, for which 14.8 GFLOPs are published.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, ConvBNReLU, SeparableConvBN, conv, resize_like

WIDTH = 128


class Xception39Block(nn.Module):
    """Three separable convolutions to four times the width, and a skip."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            SeparableConvBN(in_channels, channels, stride, inner_norm=False),
            nn.ReLU(),
            SeparableConvBN(channels, channels, inner_norm=False),
            nn.ReLU(),
            SeparableConvBN(channels, 4 * channels, inner_norm=False),
        )
        self.skip = SeparableConvBN(in_channels, 4 * channels, stride, inner_norm=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.branch(x) + (x if self.skip is None else self.skip(x)))


class Xception39(nn.Module):
    """Images to maps of 64, 128 and 256 channels at 1/8, 1/16 and 1/32."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(ConvBNReLU(3, 8, 3, stride=2), nn.MaxPool2d(3, 2, padding=1))
        self.stages = nn.ModuleList(
            nn.Sequential(
                Xception39Block(before, channels, 2), *(Xception39Block(4 * channels, channels, 1) for _ in range(more))
            )
            for before, channels, more in ((8, 16, 3), (64, 32, 7), (128, 64, 3))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class ChannelGate(nn.Sequential):
    """A factor from 0 to 1 for each channel, from its mean: [N, C, 1, 1]."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__(nn.AdaptiveAvgPool2d(1), *layers, nn.Sigmoid())


class AttentionRefinement(nn.Module):
    """A 3x3 whose channels are weighted."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.conv, self.gate = ConvBNReLU(in_channels, WIDTH), ChannelGate(ConvBN(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x)


class FeatureFusion(nn.Module):
    """Two maps side by side, a 1x1, and its channels weighted on top."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvBNReLU(channels, channels, 1)
        self.gate = ChannelGate([conv(channels, channels, 1), nn.ReLU(), conv(channels, channels, 1)])

    def forward(self, *maps: Tensor) -> Tensor:
        x = self.conv(torch.cat(maps, 1))
        return x + x * self.gate(x)


class BiSeNet1(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 8), ceil(W / 8)]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.spatial = nn.Sequential(
            ConvBNReLU(3, 64, 7, stride=2), ConvBNReLU(64, 64, 3, stride=2), ConvBNReLU(64, 64, 3, stride=2),
            ConvBNReLU(64, WIDTH, 1),
        )  # fmt: skip
        self.context = Xception39()
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBNReLU(256, WIDTH, 1))
        self.attend32, self.attend16 = AttentionRefinement(256), AttentionRefinement(128)
        self.refine32, self.refine16 = ConvBNReLU(WIDTH, WIDTH), ConvBNReLU(WIDTH, WIDTH)
        self.fusion = FeatureFusion(2 * WIDTH)
        self.head = nn.Sequential(ConvBNReLU(2 * WIDTH, 64), nn.Conv2d(64, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        spatial = self.spatial(images)
        _, x16, x32 = self.context(images)
        x = self.attend32(x32) + self.tail(x32)
        x = self.attend16(x16) + self.refine32(resize_like(x, x16))
        return self.head(self.fusion(spatial, self.refine16(resize_like(x, spatial))))
