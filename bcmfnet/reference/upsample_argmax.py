"""Bilinear upsampling and argmax in plain PyTorch: the definition that every backend is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcmfnet.reference.bilinear import upsample

LIMIT = 1e38
"""Infinities count as this: between two of them, and at weight 0, an interpolation of infinities would be NaN."""


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Labels int64 [N, H, W] and their softmax [N, H, W] of logits [N, C, h, w]; arithmetic float32, float64 if so."""
    computed = logits if logits.dtype == torch.float64 else logits.float()
    scores = upsample(computed.clamp(-LIMIT, LIMIT), size)
    best, labels = scores.max(1)
    return labels, 1 / (scores - best.unsqueeze(1)).exp().sum(1)
