"""Losses as modules: they hold the options and call the op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bcmfnet.ops import BclStats, boundary_corrected_loss


class BoundaryCorrectedLoss(nn.Module):
    """Boundary Corrected Loss of logits [N, C, h, w] and target [N, H, W] (arXiv 2203.00436, section 2.3).

    Logits smaller than the target are upsampled inside. Options are those of `bcmfnet.ops.boundary_corrected_loss`,
    which documents them, shapes and errors; the class weight moves with the module and is no part of its state dict.
    """

    def __init__(self, *, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.options = options

    def forward(self, logits: Tensor, target: Tensor, **overrides: Any) -> Tensor | tuple[Tensor, BclStats]:
        """Scalar loss; `overrides` replace options for this call, e.g. jitter=step."""
        return boundary_corrected_loss(logits, target, weight=self.weight, **self.options | overrides)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
