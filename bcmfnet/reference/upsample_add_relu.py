"""relu(high + upsampled low) in plain PyTorch: the definition that every backend is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from bcmfnet.reference.bilinear import upsample


def upsample_add_relu(high: Tensor, low: Tensor) -> Tensor:
    """[N, C, H, W] of high [N, C, H, W] and low [N, C, h, w]; arithmetic is float32, float64 if so are both."""
    computed = torch.promote_types(high.dtype, torch.float32)
    return torch.relu(high + upsample(low.to(computed), high.shape[2:])).to(high.dtype)
