"""A network's first convolution of its frames as one op: normalisation, a 3x3 of stride 2 and a ReLU in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from bcmfnet.ops import _limits, _options
from bcmfnet.ops._checks import HALF_AND_SINGLE, check_dtype, dtype_name
from bcmfnet.ops._derivatives import refuse_forward_mode, refuse_gradient
from bcmfnet.ops._library import OPS
from bcmfnet.ops._op import Op
from bcmfnet.reference import stem_conv as reference

Triple = tuple[float, ...]


def stem_conv(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """relu(conv2d(x, weight, bias, stride=2, padding=1)), x the normalised images. It has no gradient.

    Args:
        images: RGB [N, 3, H, W], H and W >= 1, of any strides: uint8, then x = (images / 255 - mean) / std; or float16,
            bfloat16 or float32 that are x.
        weight: float16, bfloat16 or float32 [C, 3, 3, 3], of any strides. Products are summed in float32; of 16 bits,
            x may be rounded to their dtype before.
        bias: [C], contiguous, in the dtype of `weight`.
        mean, std: three numbers each, of RGB in 0..1, where images are uint8.

    Returns:
        [N, C, ceil(H / 2), ceil(W / 2)], channels_last, in the dtype of `weight`. NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, value or device; a tensor that asks for a gradient.
        NotImplementedError: one with a tangent of forward mode.
    """
    _check(images, weight, bias)
    scale, shift = _affine(images.dtype, mean, std)
    refuse_gradient(images=images, weight=weight, bias=bias)
    refuse_forward_mode("stem_conv", images=images, weight=weight, bias=bias)
    return _FORWARD(images, weight, bias, scale, shift)


def _check(images: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_dtype("images", _options.tensor("images", images), (torch.uint8, *HALF_AND_SINGLE))
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
        raise ValueError(f"images: expected [N, 3, H, W] with H, W >= 1, got {list(images.shape)}")
    _limits.check_extent("images", images.shape)
    check_dtype("weight", _options.tensor("weight", weight), HALF_AND_SINGLE)
    if weight.ndim != 4 or weight.shape[0] < 1 or weight.shape[1:] != (3, 3, 3):
        raise ValueError(f"weight: expected [C, 3, 3, 3] with C >= 1, got {list(weight.shape)}")
    _limits.check_channels("weight", weight.shape[:1] * 2)
    _options.tensor("bias", bias)
    if bias.shape != weight.shape[:1] or not bias.is_contiguous():
        got = f"{list(bias.shape)} of strides {list(bias.stride())}"
        raise ValueError(f"bias: expected {list(weight.shape[:1])}, contiguous, got {got}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected {dtype_name(weight.dtype)} as weight, got {dtype_name(bias.dtype)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.device != images.device:
            raise ValueError(f"{name}: expected it on {images.device} as images, got {tensor.device}")


def _affine(dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Triple, Triple]:
    """Scale and shift of each channel."""
    if dtype != torch.uint8:
        for name, value in (("mean", mean), ("std", std)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None with {dtype_name(dtype)} images, which are normalised, got {value!r}"
                )
        return (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    return reference.affine(*_options.normalization(mean, std))


def _output(images: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    batch, _, height, width = images.shape
    shape = (batch, weight.shape[0], (height + 1) // 2, (width + 1) // 2)
    return torch.empty(shape, dtype=weight.dtype, device=images.device, memory_format=torch.channels_last)


def _reference(
    images: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float], out: Tensor
) -> None:
    out.copy_(reference.stem_conv(images, weight, bias, scale, shift))


_FORWARD = Op("stem_conv").define(
    "stem_conv(Tensor images, Tensor weight, Tensor bias, float[] scale, float[] shift) -> Tensor",
    outputs=_output, reference=_reference,
)  # fmt: skip


@register_flop_formula(OPS.stem_conv)
def _operations(images: Any, weight: Any, *others: Any, out_shape: Any = None, **keywords: Any) -> int:
    """Two for each multiply-add."""
    batch, _, height, width = images
    return 2 * batch * ((height + 1) // 2) * ((width + 1) // 2) * weight[0] * 27
