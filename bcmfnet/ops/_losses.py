"""The losses: argument checks, and one call of the op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from bcmfnet.ops import _limits, _options, backends
from bcmfnet.ops._bcl import Inputs, evaluate
from bcmfnet.ops._checks import check_dtype, dtype_name
from bcmfnet.ops._derivatives import asks_for_gradient, refuse_forward_mode, refuse_gradient
from bcmfnet.ops._loss_options import BoundaryTerm, Where, checked_options, term_options
from bcmfnet.ops._synced_loss import synced_loss
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import BclOptions, BclStats, Flip, Mode, Norm
from bcmfnet.reference.terms import Absent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


class SelectionOptions(TypedDict, total=False):
    """Keywords about the boundary term, which `boundary_corrected_loss` documents."""

    mode: Mode
    alpha: float
    beta: float
    step: int | tuple[int, int]
    flip: Flip
    nms: int
    threshold: float
    ratio: float
    min_kept: int
    max_kept: int | None
    norm: Norm
    per_image: bool


class TermOptions(SelectionOptions, total=False):
    """Keywords about terms, which `segmentation_loss` documents."""

    ce: float
    focal: float
    dice: float
    jaccard: float
    tversky: float
    boundary: float
    distillation: float
    boundary_term: BoundaryTerm
    label_smoothing: float
    focal_gamma: float
    tversky_alpha: float
    tversky_beta: float
    overlap_smooth: float
    overlap_log: bool
    overlap_absent: Absent
    overlap_per_image: bool
    distillation_temperature: float
    distillation_where: Where
    binary: bool
    pos_weight: float
    align_corners: bool


class CallOptions(TypedDict, total=False):
    """Keywords that every loss has, but for `return_stats`; `boundary_corrected_loss` documents them."""

    size: int | tuple[int, int] | None
    weight: Tensor | None
    pixel_weight: Tensor | None
    ignore_index: int | None
    jitter: int | None
    inplace_grad: bool
    validate: bool
    process_group: ProcessGroup | None


class LossOptions(SelectionOptions, CallOptions, total=False):
    """Keywords of `boundary_corrected_loss`, but for `return_stats`."""

    ce_weight: float
    boundary_weight: float
    align_corners: bool


class SegmentationLossOptions(TermOptions, CallOptions, total=False):
    """Keywords of `segmentation_loss`, but for `return_stats`."""

    teacher: Tensor | None


@overload
def boundary_corrected_loss(
    logits: Tensor, target: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[LossOptions]
) -> Tensor: ...
@overload
def boundary_corrected_loss(
    logits: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> tuple[Tensor, BclStats]: ...
@overload
def boundary_corrected_loss(
    logits: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | tuple[Tensor, BclStats]: ...
def boundary_corrected_loss(
    logits: Tensor,
    target: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int | None = None,
    align_corners: bool = False,
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
    jitter: int | None = None,
    inplace_grad: bool = False,
    validate: bool = False,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BclStats]:
    """Cross-entropy plus a boundary term over online-selected boundary-hard pixels (arXiv 2203.00436, section 2.3).

    Args:
        logits: float16, bfloat16, float32 or float64 [N, C, H, W], or [N, C, h, w] with h <= H and w <= W, which are
            upsampled inside (bilinear). Arithmetic is float32 (float64 for float64). C is at most 4096 in C++ and CUDA
            C++.
        target: uint8, int16, int32 or int64 [N, H, W]: class ids in [0, C) or ignore_index. H and W at most 131072.
        size: (H, W) of the target, or an integer for both; if given it must be so.
        weight: float [C], weight of a pixel by its own label; score and counts are unweighted. One that is NaN or
            infinite makes the loss and its gradient NaN where a valid pixel has that label.
        pixel_weight: float [N, H, W], finite and >= 0, weight of each pixel, times that of its label; counts stay
            counts. A pixel of weight 0 counts as ignored.
        ignore_index: label that does not count. None is 255, and is refused from 256 classes on, which have that label.
        align_corners: how logits are upsampled, as in torch.nn.functional.interpolate.
        mode: detect (flipped labels find the boundary, the true label trains it), detect0 (the own cross-entropy scores
            too), paper (flipped labels are also targets: keep boundary_weight * (alpha + beta) * valid / selected below
            1), paper0, or ohem (selection by the cross-entropy itself).
        ce_weight: weight of the mean cross-entropy, finite as are boundary_weight, alpha and beta.
        boundary_weight: weight of the boundary term, lambda; 0 is plain cross-entropy: nothing is selected.
        alpha, beta: weights of the row-flipped and the column-flipped cross-entropy.
        step: pixels that the flip exchanges, or (rows, columns).
        flip: swap (neighbouring blocks of step change places) or mirror (windows of 2 * step are reversed).
        nms: side of the suppression window, odd; 1 is off. The paper suppresses: nms=3 with ratio=1/16.
        threshold: tau, the score from which a candidate is selected, nats.
        ratio: share of the candidates that is selected at least.
        min_kept, max_kept: least and largest number of selected candidates; ties at the limit are all in.
        norm: the boundary term is divided by the number of selected or of valid pixels.
        per_image: select within each image instead of over the batch.
        jitter: seed of a random offset of the flip windows; a new one each step lets every edge be seen.
        inplace_grad: backward writes the gradient over the logits, which saves as much memory as they take. For an
            eager call with a network's own full-resolution output, which nothing reads after the backward: a second
            backward, or another op that saved the logits, fails in autograd. Refused where it would be wrong or save
            nothing; without effect where no gradient is asked for.
        validate: check the labels' range and wait for the answer, also on a GPU.
        process_group: processes whose batches are one: loss, stats and the selection are those of all their images.
            Each process gets the loss of the whole batch, and of it the gradient of its own logits times the number of
            processes, so that the mean over the processes that DistributedDataParallel takes is the gradient of the
            whole batch. All of them call alike; jitter is the same. It costs a second evaluation without gradient
            where norm is selected, up to 16 more with ratio, min_kept or max_kept, and waiting for the device.
        return_stats: return (loss, BclStats) with detached, on the device.

    Returns:
        Scalar loss, float32 (float64 for float64). Where no pixel is valid or selected, that part is 0 with zero
        gradients (torch's cross_entropy gives NaN).

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range; a weight that asks for a gradient.
        NotImplementedError: a tensor with a tangent of forward mode.
        IndexError: on a CPU, a label that is neither a class nor ignore_index, with its place.
    """
    options = checked_options(
        ignore_index=ignore_index, mode=mode, ce_weight=ce_weight, boundary_weight=boundary_weight, alpha=alpha,
        beta=beta, step=step, flip=flip, nms=nms, threshold=threshold, ratio=ratio, min_kept=min_kept,
        max_kept=max_kept, norm=norm, per_image=per_image, align_corners=align_corners,
    )  # fmt: skip
    return _call(
        Inputs(logits, target, weight, pixel_weight), options, size, ignore_index, jitter, inplace_grad, validate,
        process_group, return_stats,
    )  # fmt: skip


@overload
def segmentation_loss(
    logits: Tensor, target: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[SegmentationLossOptions]
) -> Tensor: ...
@overload
def segmentation_loss(
    logits: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[SegmentationLossOptions]
) -> tuple[Tensor, BclStats]: ...
@overload
def segmentation_loss(
    logits: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[SegmentationLossOptions]
) -> Tensor | tuple[Tensor, BclStats]: ...
def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ce: float = 1.0,
    focal: float = 0.0,
    dice: float = 0.0,
    jaccard: float = 0.0,
    tversky: float = 0.0,
    boundary: float = 0.0,
    distillation: float = 0.0,
    size: int | tuple[int, int] | None = None,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    teacher: Tensor | None = None,
    ignore_index: int | None = None,
    align_corners: bool = False,
    label_smoothing: float = 0.0,
    focal_gamma: float = 2.0,
    tversky_alpha: float = 0.5,
    tversky_beta: float = 0.5,
    overlap_smooth: float = 0.0,
    overlap_log: bool = False,
    overlap_absent: Absent = "skip",
    overlap_per_image: bool = False,
    distillation_temperature: float = 1.0,
    distillation_where: Where = "valid",
    binary: bool = False,
    pos_weight: float = 1.0,
    boundary_term: BoundaryTerm = "ce",
    jitter: int | None = None,
    inplace_grad: bool = False,
    validate: bool = False,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
    **selection: Unpack[SelectionOptions],
) -> Tensor | tuple[Tensor, BclStats]:
    """A weighted sum of terms in one call, from low-resolution logits. A weight of 0 leaves its term out.

    With p = softmax of the upsampled logits, w the class weights and u the pixel weights (1 where none are given), and
    sums over the valid pixels. Equal to torch's and segmentation_models_pytorch's losses of upsampled logits where
    those exist; docs/loss.md has the formulas.

    Args:
        logits, target, size, weight, pixel_weight, ignore_index, align_corners: as in `boundary_corrected_loss`. The
            logits have two classes and more, or one with `binary`.
        ce: weight of the cross-entropy, sum(u w[y] ce) / sum(u w[y]), with `label_smoothing` in [0, 1) as torch has it.
        focal: weight of the focal loss, sum(u w[y] (1 - p[y])^focal_gamma ce) / sum(u w[y]).
        dice, jaccard, tversky: weights of overlap losses, 1 - score for each class and then their mean, weighted by w.
            With I = sum(u p[c] [y = c]), P = sum(u p[c]), Y = sum(u [y = c]) and s = `overlap_smooth` the scores are
            (2 I + s) / (P + Y + s), (I + s) / (P + Y - I + s) and
            (I + s) / (I + tversky_alpha (P - I) + tversky_beta (Y - I) + s).
        boundary: weight of the boundary term of `boundary_corrected_loss`, lambda.
        distillation: weight of T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over the valid pixels, or
            with distillation_where="all" over all, weighted by u.
        teacher: float [N, C, h, w] for `distillation`, of a resolution of its own up to the target's, detached.
        overlap_log: -log(score) in place of 1 - score.
        overlap_absent: a class that no pixel has is left out of the mean (skip), counts as 0 in it (zero, as in
            segmentation_models_pytorch) or as any other (count).
        overlap_per_image: the mean of the overlap losses of the images that have a valid pixel, not that of the batch.
        distillation_temperature: T > 0.
        binary: logits of one class are those of a sigmoid; labels are 0, 1 (foreground) or ignore_index. Cross-entropy
            is binary cross-entropy, overlap is that of the foreground. Without it one class has a softmax of 1.
        pos_weight: with `binary`, weight of a pixel of the foreground; divisors count pixels, as torch's. There is no
            class weight then.
        boundary_term: what is summed over the selected pixels, cross-entropy (ce) or the focal loss (focal). The score
            that selects stays the cross-entropy.
        jitter, inplace_grad, validate, process_group, return_stats, and `selection`: as in `boundary_corrected_loss`.

    Returns:
        Scalar loss, float32 (float64 for float64). A term that has no pixel or no class is 0 with zero gradients.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or range; a name that is no option.
        NotImplementedError, IndexError: as `boundary_corrected_loss`.
    """
    options = term_options(
        ce=ce, focal=focal, dice=dice, jaccard=jaccard, tversky=tversky, boundary=boundary, distillation=distillation,
        ignore_index=ignore_index, align_corners=align_corners, label_smoothing=label_smoothing,
        focal_gamma=focal_gamma, tversky_alpha=tversky_alpha, tversky_beta=tversky_beta, overlap_smooth=overlap_smooth,
        overlap_log=overlap_log, overlap_absent=overlap_absent, overlap_per_image=overlap_per_image,
        distillation_temperature=distillation_temperature, distillation_where=distillation_where, binary=binary,
        pos_weight=pos_weight, boundary_term=boundary_term, **selection,
    )  # fmt: skip
    _check_terms(logits, target, weight, teacher, options)
    teacher = teacher if options.distillation_weight != 0 else None
    return _call(
        Inputs(logits, target, weight, pixel_weight, teacher), options, size, ignore_index, jitter, inplace_grad,
        validate, process_group, return_stats,
    )  # fmt: skip


def _call(
    inputs: Inputs, options: BclOptions, size: int | tuple[int, int] | None, ignore_index: int | None,
    jitter: int | None, inplace_grad: bool, validate: bool, process_group: ProcessGroup | None, return_stats: bool,
) -> Tensor | tuple[Tensor, BclStats]:  # fmt: skip
    logits, target, weight, pixel_weight, *_ = inputs
    inplace_grad, validate = _options.boolean("inplace_grad", inplace_grad), _options.boolean("validate", validate)
    return_stats = _options.boolean("return_stats", return_stats)
    _check_tensors(logits, target, size, weight, options.binary)
    refuse_forward_mode("loss", logits=logits, weight=weight, pixel_weight=pixel_weight, teacher=inputs.teacher)
    if pixel_weight is not None:
        _check_pixel_weight(pixel_weight, target, validate)
    _limits.check_default_ignore_index(ignore_index, logits.shape[1])
    if jitter is not None:
        options = options._replace(offset=_offset(jitter, options.step))
    if validate:
        labels = target.long()
        reference.check_labels(labels, labels != options.ignore_index, 2 if options.binary else logits.shape[1])
    needs_grad = asks_for_gradient(logits)
    if inplace_grad and needs_grad:
        _check_overwritable(logits, target)
    group = _options.process_group("process_group", process_group)
    if group is not None:
        loss, stats = synced_loss(group, inputs, options, needs_grad, inplace_grad)
        return (loss, stats) if return_stats else loss
    outputs = evaluate(inputs, options, needs_grad, inplace_grad)
    return (outputs.loss, outputs.stats()) if return_stats else outputs.loss


def _check_tensors(
    logits: Tensor, target: Tensor, size: int | tuple[int, int] | None, weight: Tensor | None, binary: bool
) -> None:
    _options.tensor("logits", logits)
    _options.tensor("target", target)
    if weight is not None:
        check_weight(weight)
    check_dtype("logits", logits)
    if target.dtype not in LABELS:
        raise TypeError(f"target: expected uint8, int16, int32 or int64 [N, H, W], got {_describe(target)}")
    low, full = logits.shape, target.shape
    if len(low) != 4 or min(low[1:]) < 1:
        raise ValueError(f"logits: expected [N, C, h, w] with C, h, w >= 1, got {list(low)}")
    if len(full) != 3 or full[0] != low[0]:
        raise ValueError(f"target: expected [N, H, W] with N = {low[0]}, got {_describe(target)}")
    if low[2] > full[1] or low[3] > full[2]:
        raise ValueError(f"logits: expected at most the target's {list(full[1:])} pixels, got {list(low[2:])}")
    if size is not None and (sides := _options.pair("size", size)) != tuple(full[1:]):
        raise ValueError(f"size: expected the target's {list(full[1:])}, got {list(sides)}")
    if weight is not None and tuple(weight.shape) != (low[1],):
        raise ValueError(f"weight: expected [{low[1]}], one for each class, got {list(weight.shape)}")
    _limits.check_extent("target", full)
    _limits.check_label_type(target.dtype, 2 if binary else low[1])
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name}: expected it on the logits' device {logits.device}, got {tensor.device}")


def check_weight(weight: Tensor) -> None:
    """Raise TypeError for a class weight that is no tensor, ValueError for one that asks for a gradient."""
    refuse_gradient(weight=_options.tensor("weight", weight))


def _check_pixel_weight(pixel_weight: Tensor, target: Tensor, validate: bool) -> None:
    refuse_gradient(pixel_weight=_options.tensor("pixel_weight", pixel_weight))
    check_dtype("pixel_weight", pixel_weight)
    if pixel_weight.shape != target.shape:
        raise ValueError(
            f"pixel_weight: expected the target's shape {list(target.shape)}, got {list(pixel_weight.shape)}"
        )
    if pixel_weight.device != target.device:
        raise ValueError(f"pixel_weight: expected it on the target's device {target.device}, got {pixel_weight.device}")
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not (validate or pixel_weight.is_cpu):
        return  # to look at it would wait for the device, or cannot be done
    if not ((pixel_weight >= 0) & pixel_weight.isfinite()).all():
        raise ValueError("pixel_weight: expected finite numbers >= 0, got others among them")


def _check_terms(
    logits: Tensor, target: Tensor, weight: Tensor | None, teacher: Tensor | None, options: BclOptions
) -> None:
    _options.tensor("logits", logits)
    _options.tensor("target", target)
    classes = logits.shape[1] if logits.ndim == 4 else 2
    if options.binary and classes != 1:
        raise ValueError(f"logits: expected one class with binary, got {classes}")
    if not options.binary and classes == 1:
        raise ValueError("logits: expected two classes and more, or binary=True, got one class")
    if options.binary and weight is not None:
        raise ValueError("weight: expected None with binary, got a tensor; pos_weight weighs the foreground")
    if teacher is not None:
        refuse_gradient(teacher=_options.tensor("teacher", teacher))
        check_dtype("teacher", teacher)
        if teacher.ndim != 4 or teacher.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"teacher: expected [N, C, h, w] with N, C = {list(logits.shape[:2])}, got {list(teacher.shape)}"
            )
        low, full = list(teacher.shape[2:]), list(target.shape[1:])
        if min(low) < 1 or len(full) == 2 and (low[0] > full[0] or low[1] > full[1]):
            raise ValueError(f"teacher: expected one pixel and at most the target's {full}, got {low}")
        if teacher.device != logits.device:
            raise ValueError(f"teacher: expected it on the logits' device {logits.device}, got {teacher.device}")
    elif options.distillation_weight != 0:
        raise ValueError("teacher: expected logits of another network for distillation, got None")


def _check_overwritable(logits: Tensor, target: Tensor) -> None:
    """Raise ValueError where the gradient cannot be written over the logits."""
    if torch.compiler.is_compiling():
        raise ValueError("inplace_grad: expected an eager call, got a traced one (a compiler plans the memory itself)")
    backend, _ = backends.choose("bcl", logits.device.type)
    low, full = list(logits.shape[2:]), list(target.shape[1:])
    for wrong, expected, got in (
        (low != full, f"logits of the target's {full} pixels", f"{low}: their gradient is computed in forward already"),
        (logits.is_leaf, "logits that an op made", "a leaf, whose values would be lost"),
        (logits._is_view(), "logits that own their memory", "a view"),
        (torch._debug_has_internal_overlap(logits) != 0, "dense logits", f"strides {list(logits.stride())}"),
        (logits.dtype == torch.float64, "float16, bfloat16 or float32 logits", "float64, which the reference serves"),
        (backend == "reference", "a backend that writes into given memory", "one that allocates the gradient"),
    ):
        if wrong:
            raise ValueError(f"inplace_grad: expected {expected}, got {got}")


def _offset(jitter: int, step: tuple[int, int]) -> tuple[int, int]:
    """Offset of the flip windows, uniform in [0, 2 * step) for each axis, drawn on the host."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError("jitter: expected None while a CUDA graph is captured, the graph would repeat one offset")
    jitter = _options.integer("jitter", jitter)
    # Two rounds of a multiplicative hash: plain arithmetic, which torch.compile follows.
    mixed = jitter * 0x9E3779B1 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 % 2**32
    return (mixed // 2**8 % (2 * step[0]), mixed // 2**20 % (2 * step[1]))


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
