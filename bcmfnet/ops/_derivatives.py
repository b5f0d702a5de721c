"""Which derivatives a call asks for: one that an op does not have is refused, where autograd would take it for zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad


def asks_for_gradient(tensor: Tensor) -> bool:
    """Whether reverse mode would differentiate by a tensor, also from outside of a transform of torch.func."""
    if not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or (_in_transform() and _is_wrapped_with_gradient(tensor))


def refuse_gradient(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor that has no gradient asks for one."""
    if not torch.is_grad_enabled():
        return
    transforms = _in_transform()
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.requires_grad or (transforms and _is_wrapped_with_gradient(tensor))):
            raise ValueError(f"{name}: expected a tensor without requires_grad, it has no gradient; detach it")


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _is_wrapped_with_gradient(tensor: Tensor) -> bool:
    """Whether a transform of torch.func further out would differentiate by it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):  # as each transform sees it, from the inside out
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def refuse_forward_mode(op: str, **tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor has a tangent of forward mode."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and _has_tangent(tensor):
            raise NotImplementedError(
                f"{op}: expected derivatives in reverse mode, got forward mode for {name} "
                "(torch.func.jvp, torch.autograd.forward_ad)"
            )


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    transform = None if torch.compiler.is_compiling() else _functorch.peek_interpreter_stack()
    if transform is None:
        return forward_ad.unpack_dual(tensor).tangent is not None
    if _functorch.maybe_get_level(tensor) == transform.level():
        if transform.key() == _functorch.TransformType.Jvp and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    with temporarily_pop_interpreter_stack():  # what is inside a wrapper is known to the transforms further out
        return _has_tangent(tensor)
