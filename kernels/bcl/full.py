"""Logits at full resolution: scores and gradient, pixel by pixel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import extent, index_type, scratch
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, HELD, INF, PIXELS


@triton.jit
def _load_classes(pixels, first, stride_c, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Logits [pixels, CHUNK] of the classes from `first` on."""
    classes = first + tl.arange(0, CHUNK)[None]
    return tl.load(pixels + classes * stride_c, classes < CLASSES, -INF).to(tl.float32)


@triton.jit(**ANY_NUMBERS)
def score_pixels_kernel(
    count, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w,
    logits, target, weight, lse, scores, terms, partials,
    ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Logits are read once: the softmax is an online one (Milakov and Gimelshein, arXiv 1805.02867)."""
    stride_c = tl.cast(stride_c, INDEX)
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < count
    place = px._place(tl.minimum(pixel, count - 1), H.to(INDEX), W.to(INDEX))
    at = place[0] * stride_n + place[1] * stride_h + place[2] * stride_w
    best, total = tl.full([PIXELS, 1], -INF, tl.float32), tl.zeros([PIXELS, 1], tl.float32)
    for first in range(0, CLASSES, CHUNK):
        z = _load_classes(logits + at, first, stride_c, CLASSES, CHUNK)
        largest = tl.maximum(best, tl.max(z, 1, keep_dims=True))
        base = tl.where(largest == -INF, 0.0, largest)  # without a finite one: -inf - -inf
        total = total * px._exp(best - base) + tl.sum(px._exp(z - base), 1, keep_dims=True)
        best = largest
    px._record(
        logits, stride_c, (at,), None, best, total, pixel, place, inside, (H, W),
        (target, (target_n, target_h, target_w), ignore), (step_y, step_x, offset_y, offset_x), weight,
        lse, scores, terms, partials, tl.program_id(0), tl.num_programs(0), (s0, s1, s2), (g0, g1, g2),
        CLASSES, SCORE, TERMS, MIRROR,
    )  # fmt: skip


@triton.jit(**ANY_NUMBERS)
def gradient_pixels_kernel(
    count, H, W,
    stride_n, stride_c, stride_h, stride_w, result_n, result_c, result_h, result_w, target_n, target_h, target_w,
    grad, logits, target, weight, lse, mask, scales, result,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2,
    CLASSES: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Times `grad`. The result may be the logits: a pixel's are all read before one is written."""
    stride_c, result_c = tl.cast(stride_c, INDEX), tl.cast(result_c, INDEX)
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < count
    place = px._place(tl.minimum(pixel, count - 1), H.to(INDEX), W.to(INDEX))
    image, y, x = place
    pixels = logits + (image * stride_n + y * stride_h + x * stride_w)
    result += image * result_n + y * result_h + x * result_w
    labels, amounts, factor = px._amounts(
        pixel, place, inside, (H, W), (target, (target_n, target_h, target_w), ignore),
        (step_y, step_x, offset_y, offset_x), weight, lse, mask, scales, ce_weight, boundary_weight, (g0, g1, g2),
        CLASSES, TERMS, MIRROR,
    )  # fmt: skip
    z = _load_classes(pixels, 0, stride_c, CLASSES, CHUNK)
    best = tl.max(z, 1, keep_dims=True)
    for first in range(CHUNK, CLASSES, CHUNK):
        other = _load_classes(pixels, first, stride_c, CLASSES, CHUNK)
        best = tl.maximum(best, tl.max(other, 1, keep_dims=True))
    tl.debug_barrier()
    times = tl.load(grad)
    for first in range(0, CLASSES, CHUNK):
        if CLASSES > CHUNK:
            z = _load_classes(pixels, first, stride_c, CLASSES, CHUNK)
        classes = first + tl.arange(0, CHUNK)[None]
        g = tl.where(factor != 0, times * px._gradient(z, best, classes, labels, amounts, factor, CLASSES, TERMS), 0.0)
        tl.store(result + classes * result_c, g.to(result.dtype.element_ty), inside & (classes < CLASSES))


def score_pixels(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor | None, scores: Tensor | None,
    terms: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the maps of pixels at full resolution; sums float64 [4, programs]."""
    programs = triton.cdiv(target.numel(), PIXELS)
    partials = scratch(target, torch.float64, 4, programs)
    score_pixels_kernel[(programs,)](
        target.numel(), *target.shape[1:], *logits.stride(), *target.stride(),
        logits, target, weight, lse, scores, terms, partials,
        *px._labels(options), *map(float, options.score), *map(float, options.terms),
        SCORE=px._present(options, options.score), **px._flip(options), **_pixels(PIXELS, target, logits),
    )  # fmt: skip
    return partials


def write_gradient(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor, mask: Tensor,
    scales: Tensor, result: Tensor,
) -> None:  # fmt: skip
    pixels = PIXELS // 2  # of 512 the channels_last ones spill
    gradient_pixels_kernel[(triton.cdiv(target.numel(), pixels),)](
        target.numel(), *target.shape[1:], *logits.stride(), *result.stride(), *target.stride(),
        grad, logits, target, weight, lse, mask, scales, result, *px._labels(options), *px._floats(options),
        **px._flip(options), **_pixels(pixels, target, logits, result),
    )  # fmt: skip


def _pixels(pixels: int, target: Tensor, *logits: Tensor) -> dict[str, Any]:
    """Constants of a kernel over pixels at full resolution."""
    classes = logits[0].shape[1]
    return {
        "CLASSES": classes, "CHUNK": min(triton.next_power_of_2(classes), HELD), "PIXELS": pixels,
        "INDEX": index_type(max(target.numel() + PIXELS, extent(target, *logits))), "num_warps": max(pixels // 32, 1),
    }  # fmt: skip
