"""A pyramid context module's inference in plain PyTorch, from packed weights: what the kernels are checked against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bcmfnet.reference.bilinear import upsample
from bcmfnet.reference.precision import float32_products
from bcmfnet.reference.pyramid_pool import pyramid_pool


class PyramidWeights(NamedTuple):
    """What LMFM and DAPPM compute with in evaluation mode, in the order that the kernels read.

    There are B branches of b channels: the map itself (if B = P + 2), its P average pools, and its global average. K is
    the sum of the squares of `kernels`; a convolution has one matrix [in, out] for each of its taps, row by row.
    """

    scale_norms: Tensor
    """float32 [2, B (+ 1), C]: multipliers and shifts of the batch norms, followed by a ReLU, before the 1x1s of the
    branches, and before the shortcut if there is one."""
    fusion_norms: Tensor
    """float32 [2, J + B, b]: of those before the fusing convolutions, by branch that has one (J in all), and before the
    compression, by branch."""
    scale: Tensor
    """[B, C, b]: the 1x1s of the branches."""
    process: Tensor
    """[K, b, b]: the taps of the fusing convolutions, by branch."""
    compression: Tensor
    """[B * b, O]: the 1x1 of all branches."""
    shortcut: Tensor | None
    """[C, O], or None."""
    pools: tuple[tuple[int, int, int], ...]
    """(kernel, stride, padding) of each average pool, kernel = 2 * padding + 1."""
    kernels: tuple[int, ...]
    """For each branch, the side of its fusing convolution, 1 or 3 (padding 1), or 0: it has none."""
    receives: tuple[int, ...]
    """For each branch, the number (0 to B - 1) of the one whose result is added before that convolution, or -1."""


def fusing_levels(kernels: tuple[int, ...], receives: tuple[int, ...]) -> tuple[int, ...]:
    """Of each branch the level of its fusing convolution, which waits for those of lower levels alone: 1 is the lowest,
    0 has none. Raises ValueError for a circle."""

    levels = []
    for branch in range(len(receives)):
        level = 0
        while branch >= 0 and kernels[branch]:
            branch, level = receives[branch], level + 1
            if level > len(receives):
                raise ValueError(f"receives: expected no circle, got {list(receives)}")
        levels.append(level)
    return tuple(levels)


@float32_products()
def lmfm(x: Tensor, weights: PyramidWeights) -> Tensor:
    """[N, C, H, W] -> [N, O, H, W]; arithmetic is float32, float64 if so is x.

    Branch i is s_i = W_i relu(norm(pool_i(x))) at the size of its pool. A branch that has no fusing convolution is its
    result y_i; the others are y_i = conv_i(relu(norm(U(s_i) + U(y_receives)))), U bilinear to H x W. The result is
    the compression of relu(norm(U(y))), plus the shortcut of relu(norm(x)).
    """
    computed = x if x.dtype == torch.float64 else x.float()
    scale_norms, fusion_norms, scale, process, compression, shortcut, pools, kernels, receives = weights
    batch, channels, height, width = x.shape
    branches, _, branch_channels = scale.shape
    before_scale = scale_norms.to(computed).unbind(1)
    fusing = [i for i, kernel in enumerate(kernels) if kernel]
    before_process, before_compression = fusion_norms.to(computed).split([len(fusing), branches], dim=1)

    maps = pyramid_pool(computed, pools)
    if branches == len(maps) + 1:
        maps.insert(0, computed)
    scaled = [_point(y, norm, w) for y, norm, w in zip(maps, before_scale, scale, strict=False)]

    norm = dict(zip(fusing, before_process.unbind(1), strict=True))
    taps = dict(zip(fusing, process.split([kernels[i] ** 2 for i in fusing]), strict=True))
    fused = list(scaled)
    for i in sorted(fusing, key=fusing_levels(kernels, receives).__getitem__):
        y = upsample(scaled[i], (height, width))
        if receives[i] >= 0:
            y = y + upsample(fused[receives[i]], (height, width))
        fused[i] = _convolve(_activate(y, norm[i]), taps[i], kernels[i])

    full = torch.cat([upsample(y, (height, width)).expand(batch, branch_channels, height, width) for y in fused], dim=1)
    out = _point(full, before_compression.flatten(1), compression)
    if shortcut is not None:
        out = out + _point(computed, before_scale[-1], shortcut)
    return out.to(x.dtype)


def _activate(x: Tensor, norm: Tensor) -> Tensor:
    return (x * norm[0].view(1, -1, 1, 1) + norm[1].view(1, -1, 1, 1)).relu()


def _point(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,co->nohw", _activate(x, norm), weight.to(x))


def _convolve(x: Tensor, taps: Tensor, kernel: int) -> Tensor:
    _, i, o = taps.shape
    weight = taps.to(x).view(kernel, kernel, i, o).permute(3, 2, 0, 1)
    return torch.conv2d(x, weight, padding=kernel // 2)
