"""Losses as modules: they hold the options and call the op."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from bcmfnet.ops import BclStats, _options, boundary_corrected_loss
from bcmfnet.ops._loss_options import checked_options
from bcmfnet.ops._losses import check_weight
from bcmfnet.reference.bcl import Flip, Mode, Norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BoundaryCorrectedLoss(nn.Module):
    """Boundary Corrected Loss of logits [N, C, h, w] and target [N, H, W] (arXiv 2203.00436, section 2.3).

    Logits smaller than the target are upsampled inside. Options are those of `bcmfnet.ops.boundary_corrected_loss`,
    which documents them, shapes and errors; the class weight moves with the module and is no part of its state dict.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        mode: Mode = "detect",
        ce_weight: float = 1.0,
        boundary_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        step: int | tuple[int, int] = 1,
        flip: Flip = "swap",
        nms: int = 1,
        threshold: float = 0.3567,
        ratio: float = 0.0,
        min_kept: int = 0,
        max_kept: int | None = None,
        norm: Norm = "selected",
        per_image: bool = False,
        align_corners: bool = False,
        inplace_grad: bool = False,
        validate: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and (not isinstance(weight, Tensor) or weight.ndim != 1):
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight: expected a tensor [C] or None, got {got}")
        if weight is not None:
            check_weight(weight)
        self.register_buffer("weight", weight, persistent=False)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "mode": mode, "ce_weight": ce_weight, "boundary_weight": boundary_weight,
            "alpha": alpha, "beta": beta, "step": step, "flip": flip, "nms": nms, "threshold": threshold,
            "ratio": ratio, "min_kept": min_kept, "max_kept": max_kept, "norm": norm, "per_image": per_image,
            "align_corners": align_corners,
        }  # fmt: skip
        checked_options(**self.options)
        self.options = _options.plain(self.options)
        self.inplace_grad = _options.boolean("inplace_grad", inplace_grad)
        self.validate = _options.boolean("validate", validate)
        self.process_group = _options.process_group("process_group", process_group)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        boundary_weight: float | None = None,
        pixel_weight: Tensor | None = None,
        jitter: int | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, BclStats]:
        """Scalar loss, or (loss, BclStats) with `return_stats`.

        What may change from step to step is given here: `pixel_weight`, `jitter`, and a `boundary_weight` that follows
        a schedule (None: the constructor's).
        """
        options = self.options
        if boundary_weight is not None:
            options = options | {"boundary_weight": boundary_weight}
        return boundary_corrected_loss(
            logits, target, weight=self.weight, pixel_weight=pixel_weight, jitter=jitter,
            inplace_grad=self.inplace_grad, validate=self.validate, process_group=self.process_group,
            return_stats=return_stats, **options,
        )  # fmt: skip

    if TYPE_CHECKING:  # nn.Module says of a call that it takes and returns anything

        @overload
        def __call__(
            self, logits: Tensor, target: Tensor, *, boundary_weight: float | None = None,
            pixel_weight: Tensor | None = None, jitter: int | None = None, return_stats: Literal[False] = False,
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, logits: Tensor, target: Tensor, *, boundary_weight: float | None = None,
            pixel_weight: Tensor | None = None, jitter: int | None = None, return_stats: Literal[True],
        ) -> tuple[Tensor, BclStats]: ...  # fmt: skip
        @overload
        def __call__(
            self, logits: Tensor, target: Tensor, *, boundary_weight: float | None = None,
            pixel_weight: Tensor | None = None, jitter: int | None = None, return_stats: bool,
        ) -> Tensor | tuple[Tensor, BclStats]: ...  # fmt: skip
        def __call__(self, logits: Tensor, target: Tensor, **options: Any) -> Any: ...

    def extra_repr(self) -> str:
        parameters = inspect.signature(boundary_corrected_loss).parameters
        options = self.options | {"inplace_grad": self.inplace_grad, "validate": self.validate}
        shown = {name: value for name, value in options.items() if value != parameters[name].default}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


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
        ignore_index: label of the pixels that do not count; None is 255, and is refused from 256 classes on.
        weight: float [C], weight of a pixel by its own label; the selection and the count are unweighted.
        process_group: processes whose batches are one, as `bcmfnet.ops.boundary_corrected_loss` says.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self,
        thresh: float = 0.7,
        min_kept: int = 100_000,
        ignore_index: int | None = None,
        weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not 0 < _options.number("thresh", thresh) <= 1:
            raise ValueError(f"thresh: expected a probability, 0 < thresh <= 1, got {thresh!r}")
        super().__init__(
            weight=weight, mode="ohem", ce_weight=0.0, nms=1, ratio=0.0, threshold=-math.log(thresh),
            min_kept=min_kept, ignore_index=ignore_index, process_group=process_group,
        )  # fmt: skip


class UpsampledCrossEntropy(BoundaryCorrectedLoss):
    """Cross-entropy of logits [N, C, h, w], upsampled inside to the target [N, H, W], of the op's dtypes.

    The same as `torch.nn.CrossEntropyLoss` of bilinearly upsampled logits (align_corners=False; HRNet's `CrossEntropy`)
    without ever building those, but for one case: where nothing is valid the loss is 0 with zero gradients, not NaN.

    Args:
        ignore_index: label of the pixels that do not count; None is 255, and is refused from 256 classes on.
        weight: float [C], weight of a pixel by its own label; the mean is over the sum of the weights, as torch's.
        process_group: processes whose batches are one, as `bcmfnet.ops.boundary_corrected_loss` says.

    Raises:
        TypeError: a wrong option, here; TypeError, ValueError: a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self, ignore_index: int | None = None, weight: Tensor | None = None, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(weight=weight, boundary_weight=0.0, ignore_index=ignore_index, process_group=process_group)
