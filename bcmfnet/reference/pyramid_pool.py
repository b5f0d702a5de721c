"""Pyramid pooling in plain PyTorch: the definition that every backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pools = Sequence[tuple[int, int, int]]
"""(kernel, stride, padding) of each average pool, kernel = 2 * padding + 1."""


def pooled_sizes(height: int, width: int, pools: Pools) -> list[tuple[int, int]]:
    """(h, w) of each pool's map, and of the global average."""
    return [(1 + (height - 1) // stride, 1 + (width - 1) // stride) for _, stride, _ in pools] + [(1, 1)]


def pyramid_pool(x: Tensor, pools: Pools) -> Tensor:
    """Average pools (padding counts as zeros) and the global average of x [N, C, H, W], packed as [N, C, L].

    Each map of `pooled_sizes` stands row by row, one after the other. Arithmetic is float32, float64 if so is x.
    """
    computed = x if x.dtype == torch.float64 else x.float()
    maps = [F.avg_pool2d(computed, *pool) for pool in pools] + [computed.mean((2, 3), keepdim=True)]
    return torch.cat([y.flatten(2) for y in maps], dim=2).to(x.dtype)


def pyramid_pool_backward(grad: Tensor, size: Sequence[int], pools: Pools) -> Tensor:
    """Gradient [N, C, H, W] of x from that of the packed maps [N, C, L]: the adjoint, for `size` = (H, W)."""
    computed = grad if grad.dtype == torch.float64 else grad.float()
    height, width = size
    result = 0
    at = 0
    for (kernel, stride, padding), (h, w) in zip(pools, pooled_sizes(height, width, pools), strict=False):
        part = computed[:, :, at : at + h * w].unflatten(2, (h, w))
        at += h * w
        rows, columns = (_window(n, m, kernel, stride, padding).to(part) for n, m in ((height, h), (width, w)))
        result = result + rows.T @ part @ columns / kernel**2
    return (result + computed[:, :, at:].unsqueeze(3) / (height * width)).expand(-1, -1, height, width).to(grad.dtype)


def _window(size: int, pooled: int, kernel: int, stride: int, padding: int) -> Tensor:
    """1 where a position [pooled, size] is in a pool's window."""
    first = torch.arange(pooled)[:, None] * stride - padding
    position = torch.arange(size)[None, :]
    return ((position >= first) & (position < first + kernel)).double()
