"""The Boundary Corrected Loss as an op: argument checks, packed options, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor

from bcmfnet.ops import _limits, _options, backends
from bcmfnet.ops._checks import check_dtype, dtype_name
from bcmfnet.ops._derivatives import asks_for_gradient, refuse_forward_mode, refuse_gradient
from bcmfnet.ops._op import EVERY_DEVICE, LIBRARY, Kernel, Op
from bcmfnet.ops._synced_bcl import synced_loss
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import BclOptions, BclStats, Flip, Mode, Norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


class LossOptions(TypedDict, total=False):
    """Keywords of `boundary_corrected_loss`, which documents them, but for `return_stats`."""

    size: int | tuple[int, int] | None
    weight: Tensor | None
    ignore_index: int | None
    mode: Mode
    ce_weight: float
    boundary_weight: float
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
    jitter: int | None
    inplace_grad: bool
    validate: bool
    process_group: ProcessGroup | None


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
    jitter: int | None = None,
    inplace_grad: bool = False,
    validate: bool = False,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BclStats]:
    """Cross-entropy plus a boundary term over online-selected boundary-hard pixels (arXiv 2203.00436, section 2.3).

    Args:
        logits: float16, bfloat16, float32 or float64 [N, C, H, W], or [N, C, h, w] with h <= H and w <= W, which are
            upsampled inside (bilinear, align_corners=False). Arithmetic is float32 (float64 for float64). C is at most
            4096 in C++ and CUDA C++.
        target: uint8, int16, int32 or int64 [N, H, W]: class ids in [0, C) or ignore_index. H and W at most 131072.
        size: (H, W) of the target, or an integer for both; if given it must be so.
        weight: float [C], weight of a pixel by its own label; score and counts are unweighted. One that is NaN or
            infinite makes the loss and its gradient NaN where a valid pixel has that label.
        ignore_index: label that does not count. None is 255, and is refused from 256 classes on, which have that label.
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
    _check_tensors(logits, target, size, weight)
    _limits.check_default_ignore_index(ignore_index, logits.shape[1])
    options = checked_options(
        ignore_index=ignore_index, mode=mode, ce_weight=ce_weight, boundary_weight=boundary_weight, alpha=alpha,
        beta=beta, step=step, flip=flip, nms=nms, threshold=threshold, ratio=ratio, min_kept=min_kept,
        max_kept=max_kept, norm=norm, per_image=per_image, inplace_grad=inplace_grad, validate=validate,
    )  # fmt: skip
    if jitter is not None:
        options = options._replace(offset=_offset(jitter, options.step))
    if validate:
        labels = target.long()
        reference.check_labels(labels, labels != options.ignore_index, logits.shape[1])
    refuse_forward_mode("boundary_corrected_loss", logits=logits, weight=weight)
    needs_grad, inplace_grad = asks_for_gradient(logits), bool(inplace_grad)
    if inplace_grad and needs_grad:
        _check_overwritable(logits, target)
    group = _options.process_group("process_group", process_group)
    evaluate = _evaluate if group is None else partial(synced_loss, _evaluate, group)
    loss, stats = evaluate(logits, target, weight, options, needs_grad, inplace_grad)
    return (loss, stats) if _options.boolean("return_stats", return_stats) else loss


def _evaluate(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: BclOptions, needs_grad: bool, inplace_grad: bool
) -> tuple[Tensor, BclStats]:
    arguments = (target, weight, *_pack(options))
    outputs = _FORWARD(logits, *arguments, inplace_grad) if needs_grad else _LOSS(logits.detach(), *arguments)
    return outputs[0], BclStats(*outputs[1:6])


def _check_tensors(logits: Tensor, target: Tensor, size: int | tuple[int, int] | None, weight: Tensor | None) -> None:
    _options.tensor("logits", logits)
    _options.tensor("target", target)
    if weight is not None:
        check_weight(weight)
    check_dtype("logits", logits)
    if target.dtype not in LABELS:
        raise TypeError(f"target: expected uint8, int16, int32 or int64 [N, H, W], got {_describe(target)}")
    if logits.ndim != 4 or min(logits.shape[1:]) < 1:
        raise ValueError(f"logits: expected [N, C, h, w] with C, h, w >= 1, got {list(logits.shape)}")
    if target.ndim != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target: expected [N, H, W] with N = {logits.shape[0]}, got {_describe(target)}")
    if logits.shape[2] > target.shape[1] or logits.shape[3] > target.shape[2]:
        raise ValueError(
            f"logits: expected at most the target's {list(target.shape[1:])} pixels, got {list(logits.shape[2:])}"
        )
    if size is not None and (sides := _options.pair("size", size)) != tuple(target.shape[1:]):
        raise ValueError(f"size: expected the target's {list(target.shape[1:])}, got {list(sides)}")
    if weight is not None and tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(f"weight: expected [{logits.shape[1]}], one for each class, got {list(weight.shape)}")
    _limits.check_extent("target", target.shape)
    _limits.check_label_type(target.dtype, logits.shape[1])
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name}: expected it on the logits' device {logits.device}, got {tensor.device}")


def check_weight(weight: Tensor) -> None:
    """Raise TypeError for a class weight that is no tensor, ValueError for one that asks for a gradient."""
    refuse_gradient(weight=_options.tensor("weight", weight))


def checked_options(*, step: int | tuple[int, int], **others: Any) -> BclOptions:
    """Options of a loss as its kernels take them. Raises TypeError or ValueError for a wrong one."""
    options = others | {"step": _options.pair("step", step, "(rows, columns)")}
    if torch.compiler.is_compiling():
        return _checked(**options)
    try:
        return _checked_once(**options)
    except TypeError:  # of a wrong type, which is named here, or not hashable
        return _checked(**options)


def _checked(
    *, ignore_index: int | None, mode: Mode, ce_weight: float, boundary_weight: float, alpha: float, beta: float,
    step: tuple[int, int], flip: Flip, nms: int, threshold: float, ratio: float, min_kept: int, max_kept: int | None,
    norm: Norm, per_image: bool, inplace_grad: bool, validate: bool,
) -> BclOptions:  # fmt: skip
    _options.boolean("inplace_grad", inplace_grad)
    _options.boolean("validate", validate)
    _limits.check_at_least("step", min(step), 1)
    _limits.check_at_most("step", max(step), _limits.MAX_STEP)
    return reference.make_options(
        _options.choice("mode", mode, get_args(Mode)),
        _options.coefficient("alpha", alpha),
        _options.coefficient("beta", beta),
        ce_weight=_options.coefficient("ce_weight", ce_weight),
        boundary_weight=_options.coefficient("boundary_weight", boundary_weight),
        ignore_index=_ignore_index(ignore_index),
        step=step,
        flip=_options.choice("flip", flip, get_args(Flip)),
        nms=_window(nms),
        threshold=_threshold(threshold),
        ratio=_ratio(ratio),
        min_kept=_least(min_kept),
        max_kept=_most(max_kept),
        norm=_options.choice("norm", norm, get_args(Norm)),
        per_image=_options.boolean("per_image", per_image),
    )


_checked_once = lru_cache(typed=True)(_checked)
"""`typed` tells 1 from True and 1.0, but not inside of a tuple: `step` has integers already."""


def _ignore_index(value: int | None) -> int:
    if value is None:
        return _limits.DEFAULT_IGNORE_INDEX
    label = _options.integer("ignore_index", value)
    _limits.check_at_least("ignore_index", label, _limits.MIN_INTEGER)
    _limits.check_at_most("ignore_index", label, _limits.MAX_INTEGER)
    return label


def _window(value: int) -> int:
    side = _options.integer("nms", value)
    if side < 1 or side % 2 == 0:
        raise ValueError(f"nms: expected an odd window >= 1, got {side}")
    _limits.check_at_most("nms", side, _limits.MAX_WINDOW)
    return side


def _threshold(value: float) -> float:
    threshold = _options.number("threshold", value)
    if not threshold >= 0:
        raise ValueError(f"threshold: expected >= 0, got {threshold}")
    return threshold


def _ratio(value: float) -> float:
    ratio = _options.number("ratio", value)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected 0 to 1, got {ratio}")
    return ratio


def _least(value: int) -> int:
    count = _options.integer("min_kept", value)
    if count < 0:
        raise ValueError(f"min_kept: expected >= 0, got {count}")
    _limits.check_at_most("min_kept", count, _limits.MAX_INTEGER)
    return count


def _most(value: int | None) -> int | None:
    if value is None:
        return None
    count = _options.integer("max_kept", value)
    if count < 1:
        raise ValueError(f"max_kept: expected >= 1 or None, got {count}")
    _limits.check_at_most("max_kept", count, _limits.MAX_INTEGER)
    return count


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


class _Integers(NamedTuple):
    """Options that are no real numbers, in the order of the native kernels; for `max_kept` -1 is no limit."""

    ignore_index: int
    step_rows: int
    step_columns: int
    offset_rows: int
    offset_columns: int
    nms: int
    min_kept: int
    max_kept: int
    tau: int
    mirror: int
    by_valid: int
    per_image: int


def _pack(options: BclOptions) -> tuple[list[float], _Integers]:
    """Options as the native kernels take them."""
    reals = [*options.score, *options.terms, options.ce_weight, options.boundary_weight, options.ratio]
    tau = math.floor(min(reference.Q_SCALE * options.threshold + 0.5, reference.Q_MAX))
    max_kept = -1 if options.max_kept is None else options.max_kept
    return reals, _Integers(
        options.ignore_index, *options.step, *options.offset, options.nms, options.min_kept, max_kept, tau,
        int(options.flip == "mirror"), int(options.norm == "valid"), int(options.per_image),
    )  # fmt: skip


def _unpack(reals: Sequence[float], integers: Sequence[int]) -> BclOptions:
    """The options that were packed, the threshold on the grid of the scores."""
    packed = _Integers(*integers)
    s0, s1, s2, g0, g1, g2, ce_weight, boundary_weight, ratio = reals
    return BclOptions(
        (s0, s1, s2), (g0, g1, g2), ce_weight, boundary_weight, packed.ignore_index,
        (packed.step_rows, packed.step_columns), "mirror" if packed.mirror else "swap",
        (packed.offset_rows, packed.offset_columns), packed.nms, packed.tau / reference.Q_SCALE, ratio, packed.min_kept,
        None if packed.max_kept < 0 else packed.max_kept, "valid" if packed.by_valid else "selected",
        bool(packed.per_image),
    )  # fmt: skip


def _unpacked(tensors: int) -> Callable[..., tuple[Any, ...]]:
    """The arguments of a kernel with unpacked options, which come after so many tensors."""
    return lambda *arguments: (
        *arguments[:tensors], _unpack(*arguments[tensors : tensors + 2]), *arguments[tensors + 2 :]
    )  # fmt: skip


class Saved(NamedTuple):
    """What backward reads: lse, mask and scales at full resolution, the gradient with upsampling. Others are empty."""

    lse: Tensor
    mask: Tensor
    scales: Tensor
    gradient: Tensor


LossAndStats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, and the fields of BclStats."""


def _outputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float], integers: Sequence[int]
) -> LossAndStats:
    """What a call without a gradient returns, not yet written."""
    loss = torch.empty((), dtype=_computed(logits), device=logits.device)
    count = torch.empty((), dtype=torch.int64, device=logits.device)
    thresholds = target.shape[:1] if _Integers(*integers).per_image else ()
    threshold = torch.empty(thresholds, dtype=torch.int32, device=logits.device)
    return loss, torch.empty_like(loss), torch.empty_like(loss), count, torch.empty_like(count), threshold


def _outputs_and_saved(
    logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float], integers: Sequence[int],
    inplace_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What a call with one returns, not yet written."""
    loss, *stats = _outputs(logits, target, weight, reals, integers)
    dtype, device = loss.dtype, logits.device
    if logits.shape[2:] == target.shape[1:]:
        lse = torch.empty(target.shape, dtype=dtype, device=device)
        mask = torch.empty(target.shape, dtype=torch.uint8, device=device)
        scales = torch.empty(2, dtype=dtype, device=device)
        saved = Saved(lse, mask, scales, scales.new_empty(0))
    else:
        gradient = torch.empty(logits.shape, dtype=dtype, device=device)
        empty = gradient.new_empty(0)
        saved = Saved(empty, torch.empty(0, dtype=torch.uint8, device=device), torch.empty_like(empty), gradient)
    return (loss, *stats, *saved)


def _computed(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _gradient(grad: Tensor, logits: Tensor, *others: Any) -> Tensor:
    """Of the logits, not yet written."""
    return torch.empty_like(logits)


def _run(
    kernel: Kernel, logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float],
    integers: Sequence[int], *outputs: Tensor,
) -> None:  # fmt: skip
    """Without a gradient: nothing is saved."""
    empty = logits.new_empty(0)
    _write(kernel, logits, target, weight, reals, integers, False, *outputs, *Saved(empty, empty, empty, empty))


def _run_and_save(
    kernel: Kernel, logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float],
    integers: Sequence[int], inplace_grad: bool, *outputs: Tensor,
) -> None:  # fmt: skip
    _write(kernel, logits, target, weight, reals, integers, True, *outputs)


def _write(
    kernel: Kernel, logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float],
    integers: Sequence[int], saves: bool, *outputs: Tensor,
) -> None:  # fmt: skip
    """Call a kernel of the loss, which returns False where it found a label that is no class (on a CPU)."""
    if logits.shape[1] > _limits.MAX_LOSS_CLASSES and logits.dtype != torch.float64:
        if backends.choose("bcl", logits.device.type)[0] in ("cpp", "cuda"):
            _limits.check_loss_classes(logits.shape[1])
    if kernel(logits, target, _in_dtype(weight, logits), reals, integers, saves, *outputs) is False:
        labels = target.long()
        reference.check_labels(labels, labels != _Integers(*integers).ignore_index, logits.shape[1])


def _run_backward(
    kernel: Kernel, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float],
    integers: Sequence[int], lse: Tensor, mask: Tensor, scales: Tensor, gradient: Tensor, result: Tensor,
) -> None:  # fmt: skip
    if gradient.numel():
        torch.mul(gradient, grad, out=result)
    else:
        kernel(grad, logits, target, _in_dtype(weight, logits), reals, integers, lse, mask, scales, result)


def _overwrite(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, reals: Sequence[float],
    integers: Sequence[int], lse: Tensor, mask: Tensor, scales: Tensor,
) -> None:  # fmt: skip
    """Write the gradient over the logits: all classes of a pixel are read before its gradient is written."""
    kernel = _OP.kernel("bcl_backward", logits)
    kernel(grad, logits, target, _in_dtype(weight, logits), reals, integers, lse, mask, scales, logits)
    torch.autograd.graph.increment_version(logits)


def _in_dtype(weight: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(_computed(logits)).contiguous()


def _reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: BclOptions, saves: bool, *outputs: Tensor
) -> None:
    loss, stats, *saved = reference.forward(logits, target, weight, options, saves)
    for output, value in zip(outputs, (loss, *stats, *saved), strict=True):
        output.copy_(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, reals, integers, ctx.inplace_grad = inputs
    *_, lse, mask, scales, gradient = output
    ctx.save_for_backward(logits, target, weight, lse, mask, scales, gradient)
    ctx.options, ctx.overwritten = (reals, integers), False
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    refuse_forward_mode("boundary_corrected_loss", grad=grad)
    logits, target, weight, lse, mask, scales, gradient = ctx.saved_tensors
    arguments = (grad, logits, target, weight, *ctx.options, lse, mask, scales)
    if ctx.overwritten:  # autograd says so itself, but not of tensors that went through saved_tensors_hooks
        raise RuntimeError("inplace_grad: expected one backward, got another after the logits were overwritten")
    if ctx.inplace_grad and not torch.is_grad_enabled():  # a graph of the backward would hold what is overwritten
        _BACKWARD_(*arguments)
        result, ctx.overwritten = logits.detach(), True
    else:
        result = _BACKWARD(*arguments, gradient)
    return result, None, None, None, None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("boundary_corrected_loss: expected a first derivative, its selection has no second one")


_INPUTS = "Tensor target, Tensor? weight, float[] reals, SymInt[] integers"
_OUTPUTS = "Tensor loss, Tensor ce, Tensor boundary, Tensor selected, Tensor valid, Tensor threshold"
_SAVED = "Tensor lse, Tensor mask, Tensor scales"

_OP = Op("bcl")
_LOSS = _OP.define(
    f"bcl(Tensor logits, {_INPUTS}) -> ({_OUTPUTS})",
    outputs=_outputs, reference=_reference, kernel="bcl_forward", run=_run, unpack=_unpacked(3),
)  # fmt: skip
_FORWARD = _OP.define(
    f"bcl_forward(Tensor logits, {_INPUTS}, bool inplace_grad) -> ({_OUTPUTS}, {_SAVED}, Tensor gradient)",
    outputs=_outputs_and_saved, reference=_reference, run=_run_and_save, unpack=_unpacked(3),
    setup_context=_setup_context, differentiate=_differentiate,
)  # fmt: skip
_BACKWARD = _OP.define(
    f"bcl_backward(Tensor grad, Tensor logits, {_INPUTS}, {_SAVED}, Tensor gradient) -> Tensor",
    outputs=_gradient, reference=reference.backward, run=_run_backward, unpack=_unpacked(4), differentiate=_refuse,
)  # fmt: skip
LIBRARY.define(f"bcl_backward_(Tensor grad, Tensor(a!) logits, {_INPUTS}, {_SAVED}) -> ()")
LIBRARY.impl("bcl_backward_", _overwrite, EVERY_DEVICE)
torch.library.register_fake("bcmfnet::bcl_backward_", lambda *inputs: None, lib=LIBRARY)
_BACKWARD_ = torch.ops.bcmfnet.bcl_backward_.default
