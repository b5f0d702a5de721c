"""Losses as modules: they hold the options and call the op."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor, nn

from bcmfnet.ops import BclStats, _options, boundary_corrected_loss, segmentation_loss
from bcmfnet.ops._loss_options import Where, checked_options, term_options
from bcmfnet.ops._losses import TermOptions, check_weight
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import BclMaps, BclOptions, Flip, Mode, Norm
from bcmfnet.reference.terms import Absent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Output = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor]
"""Logits of a network's head, or of all its heads."""


class _Loss(nn.Module):
    """What every loss holds: its options, and a class weight that moves with it and is no part of its state dict."""

    weight: Tensor | None

    def __init__(
        self,
        options: dict[str, Any],
        weight: Tensor | None,
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
        self.options = _options.plain(options)
        self.call = {
            "inplace_grad": _options.boolean("inplace_grad", inplace_grad),
            "validate": _options.boolean("validate", validate),
            "process_group": _options.process_group("process_group", process_group),
        }

    @property
    def checked_options(self) -> BclOptions:
        """The options as the kernels take them."""
        raise NotImplementedError

    @torch.no_grad()
    def maps(
        self, logits: Tensor, target: Tensor, *, teacher: Tensor | None = None, pixel_weight: Tensor | None = None
    ) -> BclMaps:
        """What the loss has of each pixel [N, H, W], for pictures and for mining: in plain PyTorch, without a gradient.

        Tensors are those of a call. The fields are ce, ce_r and ce_c (against the flipped labels), q (the score, in
        1/1024 nat), candidates, selected, focal, miss (1 - p of the label) and distillation; 0 where a pixel is void.
        """
        return reference.loss(logits, target, self.checked_options, self.weight, pixel_weight, teacher)[2]

    def extra_repr(self) -> str:
        plain = inspect.signature(boundary_corrected_loss).parameters
        known = plain | inspect.signature(segmentation_loss).parameters
        options = self.options | {name: self.call[name] for name in ("inplace_grad", "validate")}
        shown = {name: value for name, value in options.items() if value != known[name].default}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class BoundaryCorrectedLoss(_Loss):
    """Boundary Corrected Loss of logits [N, C, h, w] and target [N, H, W] (arXiv 2203.00436, section 2.3).

    Logits smaller than the target are upsampled inside. Options are those of `bcmfnet.ops.boundary_corrected_loss`,
    which documents them, shapes and errors; the class weight moves with the module and is no part of its state dict.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

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
        options: dict[str, Any] = {
            "ignore_index": ignore_index, "mode": mode, "ce_weight": ce_weight, "boundary_weight": boundary_weight,
            "alpha": alpha, "beta": beta, "step": step, "flip": flip, "nms": nms, "threshold": threshold,
            "ratio": ratio, "min_kept": min_kept, "max_kept": max_kept, "norm": norm, "per_image": per_image,
            "align_corners": align_corners,
        }  # fmt: skip
        checked_options(**options)
        super().__init__(options, weight, inplace_grad, validate, process_group)

    @property
    def checked_options(self) -> BclOptions:
        return checked_options(**self.options)

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
            logits, target, weight=self.weight, pixel_weight=pixel_weight, jitter=jitter, return_stats=return_stats,
            **self.call, **options,
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


class SegmentationLoss(_Loss):
    """A weighted sum of terms of low-resolution logits in one call, of one head or of several.

    SegmentationLoss(ce=1, dice=1, boundary=0.5)(logits, target)

    The options are the keywords of `bcmfnet.ops.segmentation_loss`, which documents terms, shapes and errors: weights
    of the terms (ce, focal, dice, jaccard, tversky, boundary, distillation), label_smoothing, focal_gamma,
    tversky_alpha, tversky_beta, overlap_smooth, overlap_log, overlap_absent, overlap_per_image,
    distillation_temperature, distillation_where, binary, pos_weight, boundary_term, align_corners, and those of the
    boundary term.

    Args:
        weight: float [C], weight of a pixel by its own label.
        ignore_index: label that does not count; None is 255, and is refused from 256 classes on.
        aux: weight of the loss of every head but the first.
        inplace_grad, validate, process_group: as in `bcmfnet.ops.boundary_corrected_loss`.

    Raises:
        TypeError, ValueError: a wrong name or value of an option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        aux: float = 0.4,
        inplace_grad: bool = False,
        validate: bool = False,
        process_group: ProcessGroup | None = None,
        **options: Unpack[TermOptions],
    ) -> None:
        kept: dict[str, Any] = {"ignore_index": ignore_index, **options}
        term_options(**kept)
        super().__init__(kept, weight, inplace_grad, validate, process_group)
        self.aux = _options.coefficient("aux", aux)

    @property
    def checked_options(self) -> BclOptions:
        return term_options(**self.options)

    def forward(
        self,
        output: Output,
        target: Tensor,
        *,
        teacher: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        boundary: float | None = None,
        jitter: int | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, BclStats]:
        """Scalar loss, or (loss, BclStats of the first head) with `return_stats`.

        Args:
            output: logits [N, C, h, w]; or those of several heads, the first of them the main one: a list, a tuple, a
                network's named result or a dict with the keys out or logits and, of the others, aux. None is no head.
            target: integer [N, H, W].
            teacher, pixel_weight, jitter: as in `bcmfnet.ops.segmentation_loss`.
            boundary: weight of the boundary term where it follows a schedule; None is the constructor's.
        """
        options = self.options if boundary is None else self.options | {"boundary": boundary}

        def loss_of(logits: Tensor) -> tuple[Tensor, BclStats]:
            return segmentation_loss(
                logits, target, weight=self.weight, pixel_weight=pixel_weight, teacher=teacher, jitter=jitter,
                return_stats=True, **self.call, **options,
            )  # fmt: skip

        main, *others = _heads(output)
        loss, stats = loss_of(main)
        for other in others:  # also at a weight of 0: each parameter has a gradient
            loss = loss + self.aux * loss_of(other)[0]
        return (loss, stats) if _options.boolean("return_stats", return_stats) else loss

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, output: Output, target: Tensor, *, teacher: Tensor | None = None, pixel_weight: Tensor | None = None,
            boundary: float | None = None, jitter: int | None = None, return_stats: Literal[False] = False,
        ) -> Tensor: ...  # fmt: skip
        @overload
        def __call__(
            self, output: Output, target: Tensor, *, teacher: Tensor | None = None, pixel_weight: Tensor | None = None,
            boundary: float | None = None, jitter: int | None = None, return_stats: Literal[True],
        ) -> tuple[Tensor, BclStats]: ...  # fmt: skip
        def __call__(self, output: Output, target: Tensor, **options: Any) -> Any: ...


def _heads(output: Output) -> list[Tensor]:
    """Logits of each head, the main one first. Raises TypeError for what has none."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        heads = [output.get("out", output.get("logits")), output.get("aux")]
    else:
        heads = list(output) if isinstance(output, Sequence) else [None]
    if not heads or not isinstance(heads[0], Tensor):
        raise TypeError(
            "output: expected logits, a sequence that begins with them or a dict that has them as out or logits, "
            f"got {type(output).__name__}" + (f" of {sorted(output)}" if isinstance(output, Mapping) else "")
        )
    return [head for head in heads if head is not None]


class UpsampledCrossEntropy(SegmentationLoss):
    """Cross-entropy of logits [N, C, h, w], upsampled inside to the target [N, H, W], of the op's dtypes.

    The same as `torch.nn.CrossEntropyLoss` of bilinearly upsampled logits (HRNet's `CrossEntropy`) without ever
    building those, but for one case: where nothing is valid the loss is 0 with zero gradients, not NaN.

    Args:
        ignore_index: label of the pixels that do not count; None is 255, and is refused from 256 classes on.
        weight: float [C], weight of a pixel by its own label; the mean is over the sum of the weights, as torch's.
        process_group: processes whose batches are one, as `bcmfnet.ops.boundary_corrected_loss` says.
        label_smoothing: 0 to 1, 1 excluded, as torch's.
        align_corners: how logits are upsampled.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self,
        ignore_index: int | None = None,
        weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        *,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, weight=weight, process_group=process_group, label_smoothing=label_smoothing,
            align_corners=align_corners,
        )  # fmt: skip


class FocalLoss(SegmentationLoss):
    """Focal loss, the mean of (1 - p)^gamma times the cross-entropy of each pixel (Lin et al., arXiv 1708.02002).

    Softmax over the classes, weighted by `weight` as the cross-entropy is; with `binary` a sigmoid of one class. The
    multiclass focal loss of segmentation_models_pytorch is another one, a sum of sigmoid terms.

    Args:
        gamma: exponent >= 0; 0 is the cross-entropy.
        weight, ignore_index, binary, align_corners, process_group: as in `SegmentationLoss`.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        binary: bool = False,
        align_corners: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            ce=0.0, focal=1.0, focal_gamma=_options.coefficient("gamma", gamma), weight=weight,
            ignore_index=ignore_index, binary=binary, align_corners=align_corners, process_group=process_group,
        )  # fmt: skip


class OverlapOptions(TypedDict, total=False):
    """Keywords of the overlap losses, which `DiceLoss` documents."""

    smooth: float
    log: bool
    absent: Absent
    per_image: bool
    weight: Tensor | None
    ignore_index: int | None
    binary: bool
    align_corners: bool
    process_group: ProcessGroup | None


class _OverlapLoss(SegmentationLoss):
    """The mean over classes of 1 - score, or of -log(score)."""

    def __init__(
        self,
        *,
        smooth: float = 0.0,
        log: bool = False,
        absent: Absent = "skip",
        per_image: bool = False,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        binary: bool = False,
        align_corners: bool = False,
        process_group: ProcessGroup | None = None,
        **term: Any,
    ) -> None:
        super().__init__(
            ce=0.0, overlap_smooth=_options.coefficient("smooth", smooth), overlap_log=_options.boolean("log", log),
            overlap_absent=_options.choice("absent", absent, get_args(Absent)),
            overlap_per_image=_options.boolean("per_image", per_image), weight=weight, ignore_index=ignore_index,
            binary=binary, align_corners=align_corners, process_group=process_group, **term,
        )  # fmt: skip


class DiceLoss(_OverlapLoss):
    """Soft Dice loss of the batch's sums: the score of a class is (2 I + s) / (P + Y + s).

    I = sum p [y = c], P = sum p, Y = sum [y = c] over the valid pixels. segmentation_models_pytorch's smooth is half
    of ours, and its rule for absent classes is absent="zero".

    Args:
        smooth: added to both sides of the fraction, >= 0.
        log: -log(score) in place of 1 - score.
        absent: a class that no pixel has is left out of the mean (skip), counts as 0 (zero) or as any other (count).
        per_image: the mean over the images that have a valid pixel, not that of the batch.
        weight: float [C], weights of the classes in the mean.
        ignore_index, binary, align_corners, process_group: as in `SegmentationLoss`.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(self, **options: Unpack[OverlapOptions]) -> None:
        super().__init__(dice=1.0, **options)


class JaccardLoss(_OverlapLoss):
    """Soft Jaccard (IoU) loss of the batch's sums: the score of a class is (I + s) / (P + Y - I + s).

    Options are those of `DiceLoss`.
    """

    def __init__(self, **options: Unpack[OverlapOptions]) -> None:
        super().__init__(jaccard=1.0, **options)


class TverskyLoss(_OverlapLoss):
    """Tversky loss: the score of a class is (I + s) / (I + alpha (P - I) + beta (Y - I) + s).

    alpha weighs false positives and beta false negatives, both >= 0; at 0.5 it is Dice, at 1 Jaccard.
    The other options are those of `DiceLoss`.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, **options: Unpack[OverlapOptions]) -> None:
        super().__init__(
            tversky=1.0, tversky_alpha=_options.coefficient("alpha", alpha),
            tversky_beta=_options.coefficient("beta", beta), **options,
        )  # fmt: skip


class DistillationLoss(SegmentationLoss):
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over pixels (Hinton et al., arXiv 1503.02531).

    Called with `teacher=`, logits of any resolution, which are upsampled before the softmax, too.

    Args:
        temperature: T > 0.
        where: valid, the pixels with a label, or all.
        ignore_index, binary, align_corners, process_group: as in `SegmentationLoss`.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        where: Where = "valid",
        *,
        ignore_index: int | None = None,
        binary: bool = False,
        align_corners: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not _options.coefficient("temperature", temperature) > 0:
            raise ValueError(f"temperature: expected > 0, got {temperature}")
        super().__init__(
            ce=0.0, distillation=1.0, distillation_temperature=temperature,
            distillation_where=_options.choice("where", where, get_args(Where)), ignore_index=ignore_index,
            binary=binary, align_corners=align_corners, process_group=process_group,
        )  # fmt: skip


class BinaryCrossEntropy(SegmentationLoss):
    """Binary cross-entropy of logits of one class [N, 1, h, w], upsampled inside, and labels 0, 1 or ignore_index.

    `torch.nn.BCEWithLogitsLoss` of the valid pixels of upsampled logits, without ever building those.

    Args:
        pos_weight: weight of a pixel of label 1, > 0.
        ignore_index, label_smoothing, align_corners, process_group: as in `SegmentationLoss`.

    Raises:
        TypeError, ValueError: a wrong option, here; a tensor of another dtype or shape, in a call.
        IndexError: on a CPU, a label that is none of the three, with its place.
    """

    def __init__(
        self,
        pos_weight: float = 1.0,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            binary=True, pos_weight=pos_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            align_corners=align_corners, process_group=process_group,
        )  # fmt: skip
