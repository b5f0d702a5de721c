"""The native library of bcmfnet as a kernel of the Hugging Face Hub: its ops on tensors that the caller allocates."""

from collections.abc import Sequence

import torch

from ._ops import ops

__all__ = ["ops", "upsample_argmax"]


def upsample_argmax(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Label map uint8 [N, H, W] of logits float16, bfloat16 or float32 [N, C, h, w], C <= 256, upsampled to (H, W)."""
    labels = torch.empty(logits.shape[0], *size, dtype=torch.uint8, device=logits.device)
    ops._upsample_argmax(logits, labels, None)
    return labels
