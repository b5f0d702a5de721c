"""Losses as modules: they hold the options and call the op."""

from __future__ import annotations

from torch import Tensor, nn

from bcmfnet.reference.bcl import boundary_corrected_loss


class BoundaryCorrectedLoss(nn.Module):
    """The Boundary Corrected Loss; options and shapes are those of `bcmfnet.ops.boundary_corrected_loss`."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        step = options.pop("step", 1)
        self.options = options | {"step": (step, step) if isinstance(step, int) else step}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return boundary_corrected_loss(logits, target, **self.options)[0]
