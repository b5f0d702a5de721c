"""Fusing a low-resolution map into a high-resolution one as one op: upsampling, sum and ReLU in one pass."""

from __future__ import annotations

from torch import Tensor

from bcmfnet.ops import _options
from bcmfnet.ops._checks import check_map, dtype_name, empty_map
from bcmfnet.ops._derivatives import refuse_forward_mode, refuse_gradient
from bcmfnet.ops._op import Op
from bcmfnet.reference import upsample_add_relu as reference


def upsample_add_relu(high: Tensor, low: Tensor) -> Tensor:
    """relu(high + U(low)), U bilinear upsampling (align_corners=False) to the size of `high`. It has no gradient.

    Args:
        high: float16, bfloat16, float32 or float64 [N, C, H, W], of any strides. Arithmetic is float32 (float64 for
            float64), and is rounded once.
        low: [N, C, h, w], 1 <= h <= H and 1 <= w <= W, of any strides and the dtype and device of `high`.

    Returns:
        [N, C, H, W] in the dtype and memory format of `high`. NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device; one that asks for a gradient.
        NotImplementedError: one with a tangent of forward mode.
    """
    _check(high, low)
    refuse_gradient(high=high, low=low)
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


_FORWARD = Op("upsample_add_relu").define(
    "upsample_add_relu(Tensor high, Tensor low) -> Tensor", outputs=_output, reference=_reference
)
