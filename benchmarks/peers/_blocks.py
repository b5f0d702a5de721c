"""Layers that several peers are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate


def conv(
    in_channels: int, channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, padded so that a stride of 1 keeps the size."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(in_channels, channels, kernel, stride, padding, dilation, groups, bias=False)


class ConvBN(nn.Sequential):
    """Convolution and batch norm; the options are `conv`'s."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, stride: int = 1, **options: int):
        super().__init__(conv(in_channels, channels, kernel, stride, **options), nn.BatchNorm2d(channels))


class ConvBNReLU(nn.Sequential):
    """Convolution, batch norm and ReLU; the options are `conv`'s."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, stride: int = 1, **options: int):
        super().__init__(*ConvBN(in_channels, channels, kernel, stride, **options), nn.ReLU())


class SeparableConvBN(nn.Sequential):
    """A 3x3 for each channel by itself, its batch norm where it has one, and a 1x1 with batch norm."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, inner_norm: bool = True):
        inner = [nn.BatchNorm2d(in_channels)] if inner_norm else []
        super().__init__(
            conv(in_channels, in_channels, 3, stride, groups=in_channels), *inner, *ConvBN(in_channels, channels, 1)
        )


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Bilinear to the height and width of another map."""
    return interpolate(x, other.shape[-2:], mode="bilinear", align_corners=False)
