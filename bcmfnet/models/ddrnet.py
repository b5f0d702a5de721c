"""DDRNet-23-slim (arXiv 2101.06085): two branches fused twice, a context module and a head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcmfnet.nn.context import DAPPM, PyramidContext, fuse_relu, resize
from bcmfnet.ops import _limits, _options

MIN_SIZE = 64


class SegmentationOutput(NamedTuple):
    """Logits at 1/8 of the image, [N, classes, ceil(H / 8), ceil(W / 8)]; `aux` likewise, or None."""

    logits: Tensor
    aux: Tensor | None


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The skip of a block: None is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3s and a skip. The last block of a stage leaves the final ReLU to whoever consumes the stage."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, final_relu: bool = True):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample(in_channels, channels, stride)
        self.final_relu = final_relu

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out) if self.final_relu else out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to twice the width, and a skip; no final ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, 2 * channels)
        self.bn3 = nn.BatchNorm2d(2 * channels)
        self.downsample = downsample(in_channels, 2 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + (x if self.downsample is None else self.downsample(x))


def stage(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Two basic blocks; the result is before the ReLU."""
    return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, final_relu=False))


class DDRNetBackbone(nn.Module):
    """The two branches of DDRNet-23-slim: `layer*` halves the resolution at each stage, `high*` stays at 1/8.

    A stage's result is used both before and after its ReLU, so no ReLU here works in place.
    """

    high_channels = 128
    low_channels = 512
    aux_channels = 64

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.layer1 = stage(32, 32)
        self.layer2 = stage(32, 64, stride=2)
        self.layer3 = stage(64, 128, stride=2)
        self.layer4 = stage(128, 256, stride=2)
        self.layer5 = Bottleneck(256, 256, stride=2)

        self.high3 = stage(64, 64)
        self.high4 = stage(64, 64)
        self.high5 = Bottleneck(64, 64)

        self.down3 = nn.Sequential(conv3x3(64, 128, stride=2), nn.BatchNorm2d(128))
        self.down4 = nn.Sequential(
            conv3x3(64, 128, stride=2), nn.BatchNorm2d(128), nn.ReLU(), conv3x3(128, 256, stride=2), nn.BatchNorm2d(256)
        )
        self.compression3 = nn.Sequential(conv1x1(128, 64), nn.BatchNorm2d(64))
        self.compression4 = nn.Sequential(conv1x1(256, 64), nn.BatchNorm2d(64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 3, H, W] to the high branch after its first fusion, [N, 64, H/8, W/8], and at its end,
        [N, 128, H/8, W/8], and the low branch, [N, 512, H/64, W/64], sizes rounded up.
        """
        x2 = self.layer2(F.relu(self.layer1(self.stem(images))))

        x3 = self.layer3(F.relu(x2))
        h3 = self.high3(F.relu(x2))
        x = x3 + self.down3(F.relu(h3))
        h = first_fused = h3 + resize(self.compression3(F.relu(x3)), h3.shape[-2:])

        x4 = self.layer4(F.relu(x))
        h4 = self.high4(F.relu(h))
        x = x4 + self.down4(F.relu(h4))
        h = fuse_relu(h4, self.compression4(F.relu(x4)), self.training)

        return first_fused, self.high5(h), self.layer5(F.relu(x))


class SegmentationHead(nn.Module):
    """BN ReLU 3x3, BN ReLU 1x1 to the classes."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 64):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(x)))


class DualResolutionNet(nn.Module):
    """Backbone, a context module on its 1/64 map, and a head on the sum of both branches at 1/8.

    Args:
        context: maps [N, 512, h, w] to [N, 128, h, w].
        num_classes: classes of the heads.
        aux: also train a second head on the high branch after its first fusion (weight 0.4 in DDRNet).

    Raises:
        TypeError, ValueError: a wrong `num_classes` or `aux`.
    """

    recipe: dict[str, Any]
    """What `create_model` made it of."""

    def __init__(self, context: PyramidContext, num_classes: int, aux: bool = False):
        super().__init__()
        num_classes, aux = _options.integer("num_classes", num_classes), _options.boolean("aux", aux)
        _limits.check_at_least("num_classes", num_classes, 1)
        self.backbone = DDRNetBackbone()
        self.context = context
        self.head = SegmentationHead(DDRNetBackbone.high_channels, num_classes)
        self.aux_head = SegmentationHead(DDRNetBackbone.aux_channels, num_classes) if aux else None
        self.apply(init_weights)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Normalised float images [N, 3, H, W], H and W >= 64, to logits at 1/8.

        Raises:
            TypeError, ValueError: no tensor, another shape or dtype; a batch of 1 in training (unless the batch norms
                are frozen).
        """
        check_images(images)
        self.context.check_batch(images.shape[0])
        first_fused, high, low = self.backbone(images)
        logits = self.decode(high, low)
        aux = self.aux_head(first_fused) if self.aux_head is not None and self.training else None
        return SegmentationOutput(logits, aux)

    def decode(self, high: Tensor, low: Tensor) -> Tensor:
        """Logits of the backbone's two branches."""
        return self.head(high + resize(self.context(low), high.shape[-2:]))


class DDRNet23Slim(DualResolutionNet):
    """DDRNet-23-slim with the DAPPM: the paper's BASE. `options` are the DAPPM's."""

    context_class: type[PyramidContext] = DAPPM

    def __init__(self, num_classes: int, aux: bool = False, **options):
        context = self.context_class(DDRNetBackbone.low_channels, DDRNetBackbone.high_channels, **options)
        super().__init__(context, num_classes, aux)


def check_images(images: Tensor, name: str = "images", as_bytes: bool = False) -> None:
    """Raise TypeError or ValueError for what is no batch of normalised images, or of uint8 ones."""
    _options.tensor(name, images)
    shape = tuple(images.shape)
    right = images.dtype == torch.uint8 if as_bytes else images.is_floating_point()
    if not right or len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"{name}: expected {'uint8' if as_bytes else 'float'} [N, 3, H, W], H and W >= {MIN_SIZE}, "
            f"got {str(images.dtype).removeprefix('torch.')} {list(shape)}"
        )


def init_weights(module: nn.Module) -> None:
    """Kaiming normal by fan_out for convolutions, zero bias; batch norms keep torch's 1 and 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
