"""DFANet A (arXiv 1904.02216): a small Xception three times over, each fed with the maps of the one before.

1,831,032 parameters with 19 classes. Its paper prints 7.8 M, 4.3 times as many, which cannot be met with the widths
that it prints; no code of the authors was found. 7.34 G multiply-adds at 1024x2048; 3.67 at 1024x1024, for which 3.4
GFLOPs are published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bcmfnet.benchmarks.peers._blocks import ConvBN, ConvBNReLU, SeparableConvBN, conv, resize_like

STAGES = ((48, 4), (96, 6), (192, 4))
"""Channels and blocks of each stage of XceptionA."""
ATTENTION = 1000
"""The classes of ImageNet: the attention starts with the classifier of the pretrained backbone."""


class Block(nn.Module):
    """Three separable convolutions with a quarter of the channels inside, and a skip."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        inner = channels // 4
        self.branch = nn.Sequential(
            SeparableConvBN(in_channels, inner), nn.ReLU(), SeparableConvBN(inner, inner), nn.ReLU(),
            SeparableConvBN(inner, channels, stride),
        )  # fmt: skip
        self.skip = ConvBN(in_channels, channels, 1, stride) if stride > 1 or in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.branch(x) + (x if self.skip is None else self.skip(x)))


class Attention(nn.Module):
    """Each channel times what two layers make of the means."""

    def __init__(self, channels: int):
        super().__init__()
        self.classes = nn.Conv2d(channels, ATTENTION, 1)
        self.weight = ConvBNReLU(ATTENTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight(self.classes(x.mean((2, 3), keepdim=True)))


class XceptionA(nn.Module):
    """A map to those of the three stages, the last one weighted; what is given with it is put beside each stage's."""

    def __init__(self, in_channels: int, beside: tuple[int, ...]):
        super().__init__()
        self.stages = nn.ModuleList()
        for (channels, blocks), extra in zip(STAGES, beside, strict=True):
            more = (Block(channels, channels) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(Block(in_channels + extra, channels, stride=2), *more))
            in_channels = channels
        self.attention = Attention(in_channels)

    def forward(self, x: Tensor, beside: list[Tensor]) -> list[Tensor]:
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(torch.cat([x, beside[number]], 1) if beside else x)
            maps.append(x)
        return [*maps[:2], maps[2], self.attention(x)]


class DFANetA(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes, ceil(H / 4), ceil(W / 4)]."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = tuple(channels for channels, _ in STAGES)
        self.stem = ConvBNReLU(3, 8, 3, stride=2)
        self.backbones = nn.ModuleList([XceptionA(8, (0, 0, 0)), XceptionA(192, widths), XceptionA(192, widths)])
        self.details = nn.ModuleList(ConvBNReLU(widths[0], 32, 1) for _ in range(3))
        self.contexts = nn.ModuleList(ConvBNReLU(widths[2], 32, 1) for _ in range(3))
        self.merge = ConvBNReLU(32, 32, 1)
        self.classifier = conv(32, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, beside, details, contexts = self.stem(images), [], [], []
        for backbone in self.backbones:
            *beside, context = backbone(x, beside)
            x = resize_like(context, beside[0])
            details.append(beside[0])
            contexts.append(context)
        target = details[0]
        low = [resize_like(layer(x), target) for layer, x in zip(self.details, details, strict=True)]
        high = [resize_like(layer(x), target) for layer, x in zip(self.contexts, contexts, strict=True)]
        return self.classifier(self.merge(sum(low)) + sum(high))
