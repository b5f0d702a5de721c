"""Bilinear upsampling and its adjoint, as every kernel of this package computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcmfnet.reference.precision import float32_products


def upsample(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear to size (H, W) as nested lerp a + t*(b - a), columns first.

    The four-weight form breaks plateaus: equal corners would not give exactly their value.
    """
    for dim, out in ((3, size[1]), (2, size[0])):
        if logits.shape[dim] != out:
            low, high, t = _source(logits.shape[dim], out, align_corners)
            shape = [1, 1, -1, 1] if dim == 2 else [1, 1, 1, -1]
            a = logits.index_select(dim, low.to(logits.device))
            b = logits.index_select(dim, high.to(logits.device))
            logits = b.sub_(a).mul_(t.to(logits).reshape(shape)).add_(a)  # fresh memory costs more than the sum
    return logits


@float32_products()
def downsample(gradient: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """The adjoint of upsample: gradient [N, C, H, W] of the upsampled map to that [N, C, h, w] of its source."""
    rows = interpolation_matrix(size[0], gradient.shape[2], align_corners).to(gradient)
    columns = interpolation_matrix(size[1], gradient.shape[3], align_corners).to(gradient)
    return torch.matmul(rows.T, gradient @ columns)


def interpolation_matrix(size: int, out: int, align_corners: bool = False) -> Tensor:
    """Weights float64 [out, size] of bilinear upsampling along one axis."""
    low, high, t = _source(size, out, align_corners)
    i = torch.arange(out)
    matrix = torch.zeros(out, size, dtype=torch.float64)
    matrix[i, low] = 1 - t
    matrix[i, high] += t
    return matrix


def _source(size: int, out: int, align_corners: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index, and the weight of the upper one, of each of `out` positions."""
    position = torch.arange(out, dtype=torch.float64)
    if align_corners:
        source = position * (size - 1) / max(out - 1, 1)
    else:
        source = ((position + 0.5) * size / out - 0.5).clamp(min=0)
    low = source.long()
    return low, (low + 1).clamp(max=size - 1), source - low
