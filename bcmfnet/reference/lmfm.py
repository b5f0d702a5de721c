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
    the sum of `kernel`^2 over the branches; a convolution has one matrix [in, out] for each of its taps, row by row.
    """

    norms: Tensor
    """float32 [2, B * C + J * b + B * b (+ C)]: multiplier and shift of the batch norm, followed by a ReLU, before each
    convolution: `scale` by branch, `process` by branch that has one (J), `compression`, `shortcut` if there is one."""
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


def fusing_order(receives: tuple[int, ...]) -> list[list[int]]:
    """Branches in levels: those of a level receive from earlier levels alone. Raises ValueError for a circle."""
    levels: list[list[int]] = []
    done = {-1}
    while len(done) <= len(receives):
        level = [i for i, source in enumerate(receives) if i not in done and source in done]
        if not level:
            raise ValueError(f"receives: expected no circle, got {list(receives)}")
        levels.append(level)
        done.update(level)
    return levels


@float32_products()
def lmfm(x: Tensor, weights: PyramidWeights) -> Tensor:
    """[N, C, H, W] -> [N, O, H, W]; arithmetic is float32, float64 if so is x.

    Branch i is s_i = W_i relu(norm(pool_i(x))) at the size of its pool. A branch that has no fusing convolution is its
    result y_i; the others are y_i = conv_i(relu(norm(U(s_i) + U(y_receives)))), U bilinear to H x W. The result is
    the compression of relu(norm(U(y))), plus the shortcut of relu(norm(x)).
    """
    computed = x if x.dtype == torch.float64 else x.float()
    norms, scale, process, compression, shortcut, pools, kernels, receives = weights
    batch, channels, height, width = x.shape
    branches, _, branch_channels = scale.shape
    taken = iter(norms.to(computed).split(_norm_sizes(weights), dim=1))

    maps = pyramid_pool(computed, pools)
    if branches == len(maps) + 1:
        maps.insert(0, computed)
    scaled = [_point(y, next(taken), w) for y, w in zip(maps, scale, strict=True)]
    fusing = {i: next(taken) for i, kernel in enumerate(kernels) if kernel}

    taps = dict(zip(fusing, process.split([kernels[i] ** 2 for i in fusing]), strict=True))
    fused = list(scaled)
    for level in fusing_order(receives):
        for i in level:
            if kernels[i]:
                y = upsample(scaled[i], (height, width))
                if receives[i] >= 0:
                    y = y + upsample(fused[receives[i]], (height, width))
                fused[i] = _convolve(_activate(y, fusing[i]), taps[i], kernels[i])

    full = torch.cat([upsample(y, (height, width)).expand(batch, branch_channels, height, width) for y in fused], dim=1)
    out = _point(full, next(taken), compression)
    if shortcut is not None:
        out = out + _point(computed, next(taken), shortcut)
    return out.to(x.dtype)


def _norm_sizes(weights: PyramidWeights) -> list[int]:
    branches, channels, branch_channels = weights.scale.shape
    sizes = [channels] * branches + [branch_channels] * sum(map(bool, weights.kernels)) + [branches * branch_channels]
    return sizes + ([] if weights.shortcut is None else [channels])


def _activate(x: Tensor, norm: Tensor) -> Tensor:
    return (x * norm[0].view(1, -1, 1, 1) + norm[1].view(1, -1, 1, 1)).relu()


def _point(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,co->nohw", _activate(x, norm), weight.to(x))


def _convolve(x: Tensor, taps: Tensor, kernel: int) -> Tensor:
    _, i, o = taps.shape
    weight = taps.to(x).view(kernel, kernel, i, o).permute(3, 2, 0, 1)
    return torch.conv2d(x, weight, padding=kernel // 2)
