"""Fusing a low-resolution map into a high-resolution one as one op: upsampling, sum and ReLU in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bcmfnet.ops import _extension, _limits, _options, backends
from bcmfnet.ops._derivatives import refuse_forward_mode, refuse_gradient
from bcmfnet.ops._library import EVERY_DEVICE, LIBRARY
from bcmfnet.reference import upsample_add_relu as reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARY.define("upsample_add_relu(Tensor high, Tensor low) -> Tensor")


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
    return torch.ops.bcmfnet.upsample_add_relu(high, low)


def _check(high: Tensor, low: Tensor) -> None:
    _options.tensor("high", high)
    _options.tensor("low", low)
    if high.dtype not in FLOATS:
        raise TypeError(f"high: expected float16, bfloat16, float32 or float64, got {_name(high.dtype)}")
    if low.dtype != high.dtype:
        raise TypeError(f"low: expected {_name(high.dtype)} as high, got {_name(low.dtype)}")
    if high.ndim != 4 or min(high.shape[1:]) < 1:
        raise ValueError(f"high: expected [N, C, H, W] with C, H, W >= 1, got {list(high.shape)}")
    if low.ndim != 4 or low.shape[:2] != high.shape[:2] or min(low.shape[2:]) < 1:
        batch, channels = high.shape[:2]
        raise ValueError(f"low: expected [{batch}, {channels}, h, w] with h, w >= 1, got {list(low.shape)}")
    if low.shape[2] > high.shape[2] or low.shape[3] > high.shape[3]:
        raise ValueError(f"low: expected at most the {list(high.shape[2:])} of high, got {list(low.shape[2:])}")
    _limits.check_extent("high", high.shape)
    _limits.check_channels("high", high.shape)
    if low.device != high.device:
        raise ValueError(f"low: expected it on {high.device} as high, got {low.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _output(high: Tensor) -> Tensor:
    channels_last = high.is_contiguous(memory_format=torch.channels_last) and not high.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(high.shape, dtype=high.dtype, device=high.device, memory_format=memory_format)


def _serve(high: Tensor, low: Tensor) -> Tensor:
    out = _output(high)
    if out.numel():
        write = backends.implementation("upsample_add_relu", high.device.type)
        (_reference if high.dtype == torch.float64 else write)(high, low, out)
    return out


def native(library: str = "bcmfnet") -> Callable[[Tensor, Tensor, Tensor], None]:
    """Kernels of a native library, by the namespace of its private ops."""
    return lambda *tensors: getattr(torch.ops, library)._upsample_add_relu(*tensors)


def _triton(high: Tensor, low: Tensor, out: Tensor) -> None:
    from bcmfnet.kernels.upsample_add_relu import upsample_add_relu as launch

    launch(high, low, out)


def _reference(high: Tensor, low: Tensor, out: Tensor) -> None:
    out.copy_(reference.upsample_add_relu(high, low))


@torch.library.register_fake("bcmfnet::upsample_add_relu", lib=LIBRARY)
def _fake(high: Tensor, low: Tensor) -> Tensor:
    return _output(high)


LIBRARY.impl("upsample_add_relu", _serve, EVERY_DEVICE)
backends.register("upsample_add_relu", "cpu", "cpp", native(), _extension.load)
backends.register("upsample_add_relu", "cpu", "reference", _reference)
backends.register("upsample_add_relu", "cpu", "triton", _triton, backends.no_interpreter)
backends.register("upsample_add_relu", "cuda", "cuda", native(), _extension.load_cuda)
backends.register("upsample_add_relu", "cuda", "triton", _triton, backends.no_triton)
backends.register("upsample_add_relu", "cuda", "reference", _reference)
