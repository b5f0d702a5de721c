"""The direct call of an op, past torch's dispatcher, where a small map would spend as long as in its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def only_autograd_looks_at(inputs: tuple[Any, ...]) -> bool:
    """Whether a call has no tracer, transform, mode or subclass of tensors, which know an op by its schema."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if is_in_torch_dispatch_mode() or torch._C._len_torch_function_stack():
        return False
    for x in inputs:  # a loop costs less than a generator here
        if isinstance(x, Tensor) and (type(x) not in PLAIN_TENSORS or x.is_neg()):
            return False
    return True


def differentiable(
    serve: Callable[..., Any], setup_context: Callable[..., None] | None, differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with the derivative that `torch.library.register_autograd` would give it, which costs more."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            results = serve(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, results)
            return results

        backward = staticmethod(differentiate)

    apply = super(torch.autograd.Function, Differentiable).apply  # without what is for transforms alone

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return apply(*inputs)
        return serve(*inputs)

    return call
