"""Pyramid pooling in plain PyTorch: the definition that every backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.reference.precision import float32_products

Pools = Sequence[tuple[int, int, int]]
"""(kernel, stride, padding) of each average pool, kernel = 2 * padding + 1."""


def flat(pools: Pools) -> list[int]:
    """Pools as the integers of a schema."""
    return [number for pool in pools for number in pool]


def triples(numbers: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """What `flat` made flat."""
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def pooled_sizes(height: int, width: int, pools: Pools) -> list[tuple[int, int]]:
    """(h, w) of each pool's map, and of the global average."""
    return [(1 + (height - 1) // stride, 1 + (width - 1) // stride) for _, stride, _ in pools] + [(1, 1)]


def pyramid_pool(x: Tensor, pools: Pools) -> list[Tensor]:
    """Average pools (padding counts as zeros) and the global average of x [N, C, H, W], of `pooled_sizes`.

    Arithmetic is float32, float64 if so is x.
    """
    computed = x if x.dtype == torch.float64 else x.float()
    maps = [F.avg_pool2d(computed, *pool) for pool in pools] + [computed.mean((2, 3), keepdim=True)]
    return [y.to(x.dtype) for y in maps]


@float32_products()
def pyramid_pool_backward(grads: Sequence[Tensor], size: Sequence[int], pools: Pools) -> Tensor:
    """Gradient [N, C, H, W] of x from those of the maps: the adjoint, for `size` = (H, W)."""
    *parts, mean = (grad if grad.dtype == torch.float64 else grad.float() for grad in grads)
    result = mean / (size[0] * size[1])
    for (kernel, stride, padding), part in zip(pools, parts, strict=True):
        rows, columns = (
            _window(n, m, kernel, stride, padding).to(part) for n, m in zip(size, part.shape[2:], strict=True)
        )
        result = result + rows.T @ part @ columns / kernel**2
    return result.expand(*mean.shape[:2], *size).to(grads[0].dtype)


def _window(size: int, pooled: int, kernel: int, stride: int, padding: int) -> Tensor:
    """1 where a position [pooled, size] is in a pool's window."""
    first = torch.arange(pooled)[:, None] * stride - padding
    position = torch.arange(size)[None, :]
    return ((position >= first) & (position < first + kernel)).double()
