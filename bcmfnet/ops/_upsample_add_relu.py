"""Fusing a low-resolution map into a high-resolution one as one op: upsampling, sum and ReLU in one pass, with
gradients of any order in reverse mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.ops import _options
from bcmfnet.ops._checks import check_map, dtype_name, empty_map
from bcmfnet.ops._derivatives import refuse_forward_mode
from bcmfnet.ops._op import Kernel, Op
from bcmfnet.reference import upsample_add_relu as reference


def upsample_add_relu(high: Tensor, low: Tensor) -> Tensor:
    """relu(high + U(low)), U bilinear upsampling (align_corners=False) to the size of `high`.

    Args:
        high: float16, bfloat16, float32 or float64 [N, C, H, W], of any strides. Arithmetic is float32 (float64 for
            float64), and is rounded once.
        low: [N, C, h, w], 1 <= h <= H and 1 <= w <= W, of any strides and the dtype and device of `high`.

    Returns:
        [N, C, H, W] in the dtype and memory format of `high`. NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device.
        NotImplementedError: one with a tangent of forward mode.
    """
    _check(high, low)
    refuse_forward_mode("upsample_add_relu", high=high, low=low)
    return _FORWARD(high, low)


def _check(high: Tensor, low: Tensor) -> None:
    _options.tensor("high", high)
    _options.tensor("low", low)
    check_map("high", high)
    if low.dtype != high.dtype:
        raise TypeError(f"low: expected {dtype_name(high.dtype)} as high, got {dtype_name(low.dtype)}")
    if low.ndim != 4 or low.shape[:2] != high.shape[:2] or min(low.shape[2:]) < 1:
        batch, channels = high.shape[:2]
        raise ValueError(f"low: expected [{batch}, {channels}, h, w] with h, w >= 1, got {list(low.shape)}")
    if low.shape[2] > high.shape[2] or low.shape[3] > high.shape[3]:
        raise ValueError(f"low: expected at most the {list(high.shape[2:])} of high, got {list(low.shape[2:])}")
    if low.device != high.device:
        raise ValueError(f"low: expected it on {high.device} as high, got {low.device}")


def _output(high: Tensor, low: Tensor) -> Tensor:
    return empty_map(high, high.shape)


def _reference(high: Tensor, low: Tensor, out: Tensor) -> None:
    out.copy_(reference.upsample_add_relu(high, low))


def _gradients(grad: Tensor, out: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of high and low, not yet written."""
    return empty_map(out, out.shape), empty_map(out, (*out.shape[:2], *size))


def _run_backward(kernel: Kernel, grad: Tensor, out: Tensor, size: Sequence[int], high: Tensor, low: Tensor) -> None:
    kernel(grad, out, high, low)


def _reference_backward(grad: Tensor, out: Tensor, high: Tensor, low: Tensor) -> None:
    for to, value in zip((high, low), reference.upsample_add_relu_backward(grad, out, low.shape[2:]), strict=True):
        to.copy_(value)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.size = inputs[1].shape[2:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    refuse_forward_mode("upsample_add_relu", grad=grad)
    (out,) = ctx.saved_tensors
    return _BACKWARD(grad, out, ctx.size)


def _setup_second(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int]], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_second(ctx: Any, high: Tensor, low: Tensor) -> tuple[Tensor, None, None]:
    """Both gradients are linear in that of the result; this is in torch's ops, whose derivatives autograd knows."""
    refuse_forward_mode("upsample_add_relu", high=high, low=low)
    (out,) = ctx.saved_tensors
    computed = torch.promote_types(low.dtype, torch.float32)
    total = high + F.interpolate(low.to(computed), out.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(out <= 0, 0.0, total).to(out.dtype), None, None


_OP = Op("upsample_add_relu")
_FORWARD = _OP.define(
    "upsample_add_relu(Tensor high, Tensor low) -> Tensor",
    outputs=_output, reference=_reference, setup_context=_setup_context, differentiate=_differentiate,
)  # fmt: skip
_BACKWARD = _OP.define(
    "upsample_add_relu_backward(Tensor grad, Tensor out, SymInt[2] size) -> (Tensor, Tensor)",
    outputs=_gradients, reference=_reference_backward, run=_run_backward,
    setup_context=_setup_second, differentiate=_differentiate_second,
)  # fmt: skip
