"""Losses as modules: they hold the options and call the op."""

from __future__ import annotations

import math
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


class OhemCrossEntropy(BoundaryCorrectedLoss):
    """Cross-entropy over hard pixels only: OHEM under the names that mmseg and HRNet use.

    Logits [N, C, h, w] (upsampled inside to the target's size) and target [N, H, W], of the dtypes that
    `bcmfnet.ops.boundary_corrected_loss` takes. The loss is the mean of weight * cross-entropy over the valid pixels
    whose probability of the true class is at most `thresh`, or over the `min_kept` hardest of the batch where those
    are fewer. Source: HRNet's `OhemCrossEntropy`, mmseg's `OHEMPixelSampler`. They differ in this:

    - Hardness is compared on a grid of 1/1024 nat of cross-entropy up to 64 nats, where p = thresh is hard too. All
      that tie at the limit are kept, so there is no order among equals. A pixel below 1/2048 nat is never kept.
    - Where nothing is valid the loss is 0 with zero gradients, neither NaN nor an error.
    - Both make `thresh` and the limit of `min_kept` exclusive; where no more than min_kept pixels are valid that
      leaves out the easiest, here none. mmseg takes min_kept for each image of the batch, and divides by all pixels.

    Args:
        thresh: probability up to which a pixel is hard, 0 < thresh <= 1.
        min_kept: number of pixels of the batch that are kept at least.
        ignore_index: label of the pixels that do not count.
        weight: float [C], weight of a pixel by its own label; the selection and the count are unweighted.

    Raises:
        ValueError: a thresh that is no such probability; in a call what the op raises.
    """

    def __init__(
        self, thresh: float = 0.7, min_kept: int = 100_000, ignore_index: int = 255, weight: Tensor | None = None
    ) -> None:
        if not 0 < thresh <= 1:
            raise ValueError(f"thresh: expected a probability, 0 < thresh <= 1, got {thresh}")
        super().__init__(
            weight=weight, mode="ohem", ce_weight=0.0, nms=1, ratio=0.0, threshold=-math.log(thresh),
            min_kept=min_kept, ignore_index=ignore_index,
        )  # fmt: skip


class UpsampledCrossEntropy(BoundaryCorrectedLoss):
    """Cross-entropy of logits [N, C, h, w], upsampled inside to the target [N, H, W], of the op's dtypes.

    The same as `torch.nn.CrossEntropyLoss` of bilinearly upsampled logits (align_corners=False; HRNet's `CrossEntropy`)
    without ever building those, but for one case: where nothing is valid the loss is 0 with zero gradients, not NaN.

    Args:
        ignore_index: label of the pixels that do not count.
        weight: float [C], weight of a pixel by its own label; the mean is over the sum of the weights, as torch's.

    Raises:
        What the op raises, in a call.
    """

    def __init__(self, ignore_index: int = 255, weight: Tensor | None = None) -> None:
        super().__init__(weight=weight, boundary_weight=0.0, ignore_index=ignore_index)
