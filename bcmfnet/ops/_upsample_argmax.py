"""Upsampling and argmax as one op: a label map from low-resolution logits, without the full-resolution ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from bcmfnet.ops import _limits, _options
from bcmfnet.ops._checks import HALF_AND_SINGLE, check_dtype
from bcmfnet.ops._derivatives import refuse_forward_mode, refuse_gradient
from bcmfnet.ops._op import Kernel, Op
from bcmfnet.reference import upsample_argmax as reference


@overload
def upsample_argmax(
    logits: Tensor, size: int | Sequence[int], *, return_confidence: Literal[False] = False
) -> Tensor: ...
@overload
def upsample_argmax(
    logits: Tensor, size: int | Sequence[int], *, return_confidence: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def upsample_argmax(
    logits: Tensor, size: int | Sequence[int], *, return_confidence: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def upsample_argmax(
    logits: Tensor, size: int | Sequence[int], *, return_confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map of low-resolution logits: bilinear upsampling (align_corners=False), then argmax over the classes.

    The first of equal classes wins; NaN wins over every number, as in torch.argmax, in each pixel whose interpolation
    reads it; infinities count as +-1e38, so that a class masked with -inf wins nowhere.

    Args:
        logits: float16, bfloat16 or float32 [N, C, h, w], C <= 32768, of any strides. Arithmetic is float32.
        size: (H, W) of the label map, H >= h and W >= w, or an integer for both.
        return_confidence: return (labels, confidence): the softmax of the winning class, float16 [N, H, W].

    Returns:
        Labels uint8 [N, H, W], int16 where there are more than 256 classes.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape; with `return_confidence`, logits that ask for a
            gradient, which the confidence does not have.
        NotImplementedError: with `return_confidence`, logits with a tangent of forward mode.
    """
    size = _checked_size(logits, size)
    if return_confidence := _options.boolean("return_confidence", return_confidence):
        refuse_gradient(logits=logits)
        refuse_forward_mode("upsample_argmax", logits=logits)
    labels, confidence = _FORWARD(logits.detach() if logits.requires_grad else logits, size, return_confidence)
    return (labels, confidence) if return_confidence else labels


def _checked_size(logits: Tensor, size: int | Sequence[int]) -> tuple[int, int]:
    _options.tensor("logits", logits)
    size = _options.pair("size", size)
    check_dtype("logits", logits, HALF_AND_SINGLE)
    shape = logits.shape
    batch, classes, height, width = shape if len(shape) == 4 else (0, 0, 0, 0)
    if min(classes, height, width) < 1 or classes > _limits.MAX_LABEL_MAP_CLASSES:
        known = f"C of 1 to {_limits.MAX_LABEL_MAP_CLASSES}"
        raise ValueError(f"logits: expected [N, C, h, w] with h, w >= 1 and {known}, got {list(shape)}")
    if size[0] < height or size[1] < width:
        raise ValueError(f"size: expected at least the logits' {[height, width]}, got {list(size)}")
    _limits.check_extent("size", (batch, *size))
    return size


def _outputs(logits: Tensor, size: tuple[int, int], with_confidence: bool) -> tuple[Tensor, Tensor]:
    batch, classes, _, _ = logits.shape
    shape, new = (batch, *size), logits.new_empty
    labels = new(shape, dtype=torch.uint8 if classes <= 256 else torch.int16)
    return labels, new(shape if with_confidence else 0, dtype=torch.float16)  # AOTInductor takes no None for a tensor


def _run(
    kernel: Kernel, logits: Tensor, size: tuple[int, int], with_confidence: bool, labels: Tensor, confidence: Tensor
) -> None:
    kernel(logits, labels, confidence if with_confidence else None)


def _reference(logits: Tensor, labels: Tensor, confidence: Tensor | None) -> None:
    winners, probability = reference.upsample_argmax(logits, labels.shape[1:])
    labels.copy_(winners)
    if confidence is not None:
        confidence.copy_(probability)


_FORWARD = Op("upsample_argmax").define(
    "upsample_argmax(Tensor logits, SymInt[2] size, bool confidence) -> (Tensor, Tensor)",
    outputs=_outputs, reference=_reference, run=_run,
)  # fmt: skip
