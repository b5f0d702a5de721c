"""Bilinear upsampling against torch's, its adjoint, and plateaus."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from grids import UPSAMPLINGS

from bcmfnet.reference.bilinear import downsample, interpolation_matrix, upsample


@pytest.mark.parametrize(("grid", "size"), UPSAMPLINGS)
def test_upsample_is_interpolate(grid, size):
    z = torch.randn(2, 3, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(upsample(z, size), F.interpolate(z, size, mode="bilinear", align_corners=False))


@pytest.mark.parametrize(("grid", "size"), UPSAMPLINGS)
def test_downsample_is_the_adjoint_of_upsample(grid, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *grid, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    upped = (upsample(x, size) * y).sum()
    downed = (x * downsample(y, grid)).sum()
    assert_close(downed, upped)
    weights = interpolation_matrix(grid[0], size[0])
    torch.testing.assert_close(weights.sum(1), torch.ones(size[0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plateaus_stay_exact(dtype):
    """0.1 and 1/3 are no binary fractions: the four-weight form misses them by a rounding, and decides on it."""
    column = torch.tensor([0.1, 1 / 3, -7.7], dtype=dtype).reshape(1, 3, 1, 1)
    up = upsample(column.expand(1, 3, 3, 3), (7, 8))
    assert torch.equal(up, column.expand_as(up))
    edge = torch.cat([column.expand(1, 3, 3, 3), column.expand(1, 3, 3, 2) + 1], 3)
    up = upsample(edge, (12, 20))
    assert torch.equal(up[..., :10], column.expand(1, 3, 12, 10))  # up to the centre of cell 2
    assert torch.equal(up, up[:, :, :1].expand_as(up))  # rows are equal
