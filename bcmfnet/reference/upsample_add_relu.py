"""relu(high + upsampled low) in plain PyTorch: the definition that every backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcmfnet.reference.bilinear import downsample, upsample


def upsample_add_relu(high: Tensor, low: Tensor) -> Tensor:
    """[N, C, H, W] of high [N, C, H, W] and low [N, C, h, w]; arithmetic is float32, float64 if so are both."""
    computed = torch.promote_types(high.dtype, torch.float32)
    return torch.relu(high + upsample(low.to(computed), high.shape[2:])).to(high.dtype)


def upsample_add_relu_backward(grad: Tensor, out: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gradients [N, C, H, W] of high and [N, C, h, w] of low, of that of the result `out`, and of (h, w)."""
    computed = torch.promote_types(grad.dtype, torch.float32)
    masked = torch.where(out <= 0, 0.0, grad)
    return masked, downsample(masked.to(computed), size).to(grad.dtype)
