"""SegNet (arXiv 1511.00561): VGG16's convolutions, and their mirror image behind unpooling.

Each decoder puts what it gets where its encoder's maximum was. 29,453,971 parameters with 19 classes, the 29.5 M that
are published. 1,302.2 G multiply-adds at 1024x2048; at 360x640, for which 286 GFLOPs are published, 142.8, which are
285.6 G operations.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_unpool2d

STAGES = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
"""Channels of VGG16 before and after each convolution."""


def conv_bn_relu(in_channels: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]


class SegNet(nn.Module):
    """Images [N, 3, H, W], H and W >= 32, to logits [N, classes, H, W]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(*(layer for pair in pairwise(stage) for layer in conv_bn_relu(*pair))) for stage in STAGES
        )
        mirrored = [tuple(reversed(stage)) for stage in reversed(STAGES)]
        mirrored[-1] = (64, 64)  # the classes' convolution is in place of the one to the colours
        self.decoders = nn.ModuleList(
            nn.Sequential(*(layer for pair in pairwise(stage) for layer in conv_bn_relu(*pair))) for stage in mirrored
        )
        self.classifier = nn.Conv2d(64, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x, pools = images, []
        for encoder in self.encoders:
            x = encoder(x)
            size = x.shape[-2:]
            x, places = max_pool2d(x, 2, return_indices=True)
            pools.append((places, size))
        for decoder, (places, size) in zip(self.decoders, reversed(pools), strict=True):
            x = decoder(max_unpool2d(x, places, 2, output_size=size))
        return self.classifier(x)
