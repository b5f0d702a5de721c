"""The op of the losses: what it returns and saves, its kernels, its derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bcmfnet.ops import _limits, backends
from bcmfnet.ops._derivatives import refuse_forward_mode
from bcmfnet.ops._library import NAMESPACE, OPS
from bcmfnet.ops._loss_options import OVERLAP_WEIGHTS, Integers, pack, unpack
from bcmfnet.ops._op import EVERY_DEVICE, LIBRARY, Kernel, Op
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import BclOptions, BclStats

VALUES = 7
"""Terms of a loss whose means are returned: ce, boundary, then the last fields of BclStats."""
SCALES = 3
"""Divisors of terms whose inverses are saved: of ce, boundary and distillation."""


class Inputs(NamedTuple):
    """Tensors of a call; what is None has no part in it. The op's arguments begin with them.

    logits [N, C, h, w] and integer target [N, H, W], float weight [C], pixel_weight [N, H, W] and teacher [N, C, h, w];
    shared_slopes [groups, 2, C] are the derivatives of overlap terms by sums that other processes have a part in.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    pixel_weight: Tensor | None = None
    teacher: Tensor | None = None
    shared_slopes: Tensor | None = None


class Evaluated(NamedTuple):
    """What a call returns, beside what it saves."""

    loss: Tensor
    values: Tensor
    """Means of the terms [VALUES]."""
    counts: Tensor
    """Selected and valid pixels, int64 [2]."""
    threshold: Tensor
    """int32, [] or with per_image [N]."""
    sums: Tensor | None
    """Of the classes, for overlap [groups, 3, C]."""

    def stats(self) -> BclStats:
        ce, boundary, focal, dice, jaccard, tversky, distillation = self.values.unbind()
        selected, valid = self.counts.unbind()
        return BclStats(ce, boundary, selected, valid, self.threshold, focal, dice, jaccard, tversky, distillation)


def evaluate(inputs: Inputs, options: BclOptions, needs_grad: bool, inplace_grad: bool) -> Evaluated:
    """One call of the op."""
    if needs_grad:
        return Evaluated(*_FORWARD(*inputs, *pack(options), inplace_grad)[:5])
    return Evaluated(*_LOSS(inputs.logits.detach(), *inputs[1:], *pack(options)))


class Saved(NamedTuple):
    """What backward reads: lse, mask, scales and slopes at full resolution, the gradient with upsampling. Others are
    None, and slopes without an overlap term: to allocate a tensor takes longer than what writes into a small one."""

    lse: Tensor | None = None
    mask: Tensor | None = None
    scales: Tensor | None = None
    slopes: Tensor | None = None
    gradient: Tensor | None = None


def _outputs(logits: Tensor, *others: Any) -> Evaluated:
    """What a call without a gradient returns, not yet written."""
    *_, reals, integers = others
    new, computed, packed = logits.new_empty, _computed(logits), Integers.of(integers)  # costs less than torch.empty
    thresholds = logits.shape[:1] if packed.per_image else ()
    return Evaluated(
        new((), dtype=computed), new(VALUES, dtype=computed), new(2, dtype=torch.int64),
        new(thresholds, dtype=torch.int32), _by_class(logits, 3, reals, packed),
    )  # fmt: skip


def _by_class(logits: Tensor, count: int, reals: Sequence[float], integers: Sequence[int]) -> Tensor | None:
    """So many numbers of each class, for the batch or for each image; None without an overlap term."""
    if not any(reals[OVERLAP_WEIGHTS]):
        return None
    packed = Integers.of(integers)
    groups, classes = logits.shape[0] if packed.overlap_per_image else 1, 2 if packed.binary else logits.shape[1]
    return logits.new_empty((groups, count, classes), dtype=_computed(logits))


def _outputs_and_saved(logits: Tensor, target: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    """What a call with one returns, not yet written."""
    *_, reals, integers, inplace_grad = others
    outputs = _outputs(logits, reals, integers)
    new = outputs.loss.new_empty
    if logits.shape[2:] == target.shape[1:]:
        mask = new(target.shape, dtype=torch.uint8)
        saved = Saved(new(target.shape), mask, new(SCALES), _by_class(logits, 2, reals, integers))
    else:
        saved = Saved(gradient=new(logits.shape))
    return (*outputs, *saved)


def _computed(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _gradient(grad: Tensor, logits: Tensor, *others: Any) -> Tensor:
    """Of the logits, not yet written."""
    return torch.empty_like(logits)


def _run(kernel: Kernel, *arguments: Any) -> None:
    """Without a gradient: nothing is saved."""
    _write(kernel, arguments[:_ARGUMENTS], False, *arguments[_ARGUMENTS:], *Saved())


def _run_and_save(kernel: Kernel, *arguments: Any) -> None:
    _write(kernel, arguments[:_ARGUMENTS], True, *arguments[_ARGUMENTS + 1 :])  # inplace_grad is backward's


def _kernel_for(kernel: Kernel, name: str, inputs: tuple[Any, ...]) -> Kernel:
    """The backend's kernel, but for a teacher of another size, which only CUDA C++ upsamples by itself."""
    logits, _, _, _, teacher, *_ = inputs
    if teacher is None or teacher.shape == logits.shape or backends.choose("bcl", logits.device.type)[0] == "cuda":
        return kernel
    return _OP.reference(name)


def _write(kernel: Kernel, inputs: tuple[Any, ...], saves: bool, *outputs: Tensor | None) -> None:
    """Call a kernel of the loss, which returns False where it found a label that is no class (on a CPU)."""
    logits, target, *_, integers = inputs
    packed = Integers.of(integers)
    kernel = _kernel_for(kernel, "bcl_forward", inputs)
    classes = 2 if packed.binary else logits.shape[1]
    if classes > _limits.MAX_LOSS_CLASSES and logits.dtype != torch.float64:
        if backends.choose("bcl", logits.device.type)[0] in ("cpp", "cuda"):
            _limits.check_loss_classes(classes)
    if kernel(*_converted(inputs), saves, *outputs) is False:
        labels = target.long()
        reference.check_labels(labels, labels != packed.ignore_index, classes)


def _converted(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A kernel's arguments: weights in the dtype of its arithmetic, a teacher of float64 too."""
    logits, target, weight, pixel_weight, teacher, *others = inputs
    dtype = _computed(logits)
    weight = None if weight is None else weight.to(dtype).contiguous()
    pixel_weight = None if pixel_weight is None else pixel_weight.to(dtype)
    teacher = teacher.to(dtype) if teacher is not None and teacher.dtype == torch.float64 else teacher
    return logits, target, weight, pixel_weight, teacher, *others


def _run_backward(kernel: Kernel, grad: Tensor, *arguments: Any) -> None:
    *inputs_and_saved, gradient, result = arguments
    if gradient is not None:
        torch.mul(gradient, grad, out=result)
    else:
        _write_gradient(kernel, grad, tuple(inputs_and_saved), result)


def _overwrite(grad: Tensor, logits: Tensor, *others: Any) -> None:
    """Write the gradient over the logits: all classes of a pixel are read before its gradient is written."""
    _write_gradient(_OP.kernel("bcl_backward", logits), grad, (logits, *others), logits)
    torch.autograd.graph.increment_version(logits)


def _write_gradient(kernel: Kernel, grad: Tensor, inputs_and_saved: tuple[Any, ...], result: Tensor) -> None:
    kernel = _kernel_for(kernel, "bcl_backward", inputs_and_saved)
    kernel(grad, *_converted(inputs_and_saved), result)


def _reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, teacher: Tensor | None,
    shared_slopes: Tensor | None, options: BclOptions, saves: bool, *outputs: Tensor | None,
) -> None:  # fmt: skip
    inputs = logits, target, weight, pixel_weight, teacher, shared_slopes
    loss, stats, *sums_and_saved = reference.forward(*inputs, options, saves)
    ce, boundary, selected, valid, threshold, *terms = stats
    written = (loss, torch.stack([ce, boundary, *terms]), torch.stack([selected, valid]), threshold, *sums_and_saved)
    for output, value in zip(outputs, written, strict=True):
        if output is not None:
            output.copy_(value)


def _unpacked(tensors: int) -> Callable[..., tuple[Any, ...]]:
    """The arguments of a kernel with unpacked options, which come after so many tensors."""
    return lambda *arguments: (
        *arguments[:tensors], unpack(*arguments[tensors : tensors + 2]), *arguments[tensors + 2 :]
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, reals, integers, ctx.inplace_grad = inputs
    ctx.save_for_backward(*tensors, *output[5:])
    ctx.options, ctx.overwritten = (reals, integers), False
    ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * _ARGUMENTS
    if grad is None:
        return (None, *nothing)
    refuse_forward_mode("loss", grad=grad)
    *tensors, lse, mask, scales, slopes, gradient = ctx.saved_tensors
    arguments = (grad, *tensors, *ctx.options, lse, mask, scales, slopes)
    if ctx.overwritten:  # autograd says so itself, but not of tensors that went through saved_tensors_hooks
        raise RuntimeError("inplace_grad: expected one backward, got another after the logits were overwritten")
    if ctx.inplace_grad and not torch.is_grad_enabled():  # a graph of the backward would hold what is overwritten
        _BACKWARD_(*arguments)
        result, ctx.overwritten = tensors[0].detach(), True
    else:
        result = _BACKWARD(*arguments, gradient)
    return (result, *nothing)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("loss: expected a first derivative, its selection has no second one")


_TENSORS = "Tensor target, Tensor? weight, Tensor? pixel_weight, Tensor? teacher"
_OPTIONS = "float[] reals, SymInt[] integers"
_INPUTS = f"{_TENSORS}, Tensor? shared_slopes, {_OPTIONS}"
_ARGUMENTS = len(Inputs._fields) + 2
_OUTPUTS = "Tensor loss, Tensor values, Tensor counts, Tensor threshold, Tensor sums"
_SAVED = "Tensor lse, Tensor mask, Tensor scales, Tensor slopes"  # what is None is one for torch's dispatcher
_READ = _SAVED.replace("Tensor", "Tensor?")

_OP = Op("bcl")
_LOSS = _OP.define(
    f"bcl(Tensor logits, {_INPUTS}) -> ({_OUTPUTS})",
    outputs=_outputs, reference=_reference, kernel="bcl_forward", run=_run, unpack=_unpacked(6),
)  # fmt: skip
_FORWARD = _OP.define(
    f"bcl_forward(Tensor logits, {_INPUTS}, bool inplace_grad) -> ({_OUTPUTS}, {_SAVED}, Tensor gradient)",
    outputs=_outputs_and_saved, reference=_reference, run=_run_and_save, unpack=_unpacked(6),
    setup_context=_setup_context, differentiate=_differentiate,
)  # fmt: skip
_BACKWARD = _OP.define(
    f"bcl_backward(Tensor grad, Tensor logits, {_TENSORS}, {_OPTIONS}, {_READ}, Tensor? gradient) -> Tensor",
    outputs=_gradient, reference=reference.backward, run=_run_backward, unpack=_unpacked(6), differentiate=_refuse,
)  # fmt: skip
LIBRARY.define(f"bcl_backward_(Tensor grad, Tensor(a!) logits, {_TENSORS}, {_OPTIONS}, {_READ}) -> ()")
LIBRARY.impl("bcl_backward_", _overwrite, EVERY_DEVICE)
torch.library.register_fake(f"{NAMESPACE}::bcl_backward_", lambda *inputs: None, lib=LIBRARY)
_BACKWARD_ = OPS.bcl_backward_.default
