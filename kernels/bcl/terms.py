"""Terms beside cross-entropy: what they take from the classes of a pixel, and what they add to its gradient."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED

SMOOTHED, FOCAL, FOCAL_BOUNDARY = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
DISTILLED, EVERYWHERE, TEMPERED = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
OVERLAP, BY_IMAGE = tl.constexpr(64), tl.constexpr(128)
"""Bits of KINDS, the terms that a kernel computes: label smoothing; the focal loss, and that in the boundary term's
place; distillation, of pixels without a label too, at a temperature other than 1; overlap, that of each image."""
OF_PIXELS = tl.constexpr(SMOOTHED.value | FOCAL.value | DISTILLED.value)  # means over pixels
OF_CLASSES = tl.constexpr(SMOOTHED.value | DISTILLED.value | OVERLAP.value)  # their gradients depend on all classes

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def _exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:  # tl.exp2 spends four more operations on subnormal results
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _exp(x):
    return tl.exp(x) if INTERPRETED else _exp2(x * LOG2_E)


@triton.jit
def _shift(best):
    """What `_exp_below` takes of the largest logits."""
    return best if INTERPRETED else best * LOG2_E


@triton.jit
def _exp_below(z, shift):
    """exp(z - best): on a GPU the exponent is z * log2(e) - shift, rounded once."""
    return tl.exp(z - shift) if INTERPRETED else _exp2(tl.fma(z, LOG2_E, -shift))


@triton.jit
def _below(z, shift):
    """z - best with the rounding of that exponent, so that it cancels against the logarithm of their sum."""
    return z - shift if INTERPRETED else LN_2 * tl.fma(z, LOG2_E, -shift)


@triton.jit
def _log(x):
    if INTERPRETED:
        return tl.log(x)
    else:  # tl.log spends 20 more operations on subnormal numbers and on the last bit
        return LN_2 * tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _miss(ce):
    """1 - exp(-ce), by its series where the difference would cancel."""
    near = 1 - ce * (1 / 3) * (1 - ce * (1 / 4) * (1 - ce * (1 / 5) * (1 - ce * (1 / 6) * (1 - ce * (1 / 7)))))
    return tl.where(ce < 0.35, ce * (1 - ce * (1 / 2) * near), 1 - _exp(-ce))


@triton.jit
def _power(miss, gamma):
    return tl.where(miss > 0, tl.exp2(gamma * tl.log2(miss)), 0.0)


@triton.jit
def _focal(ce, gamma):
    """(1 - p)^gamma * ce with p = exp(-ce)."""
    return tl.where(gamma == 0, ce, _power(_miss(ce), gamma) * ce)


@triton.jit
def _focal_slope(ce, gamma):
    """The derivative by ce: 0 where p is 1, and 1 for a gamma of 0."""
    miss, p = _miss(ce), _exp(-ce)
    slope = _power(miss, gamma) * (1 + gamma * tl.where((p > 0) & (miss > 0), p * ce / miss, 0.0))
    return tl.where(gamma == 0, 1.0, slope)


@triton.jit
def _class_weight(weight, classes, CLASSES: tl.constexpr):
    if weight is None:
        return tl.where(classes < CLASSES, 1.0, 0.0)
    else:  # the compiler reads on after a return
        return tl.load(weight + classes, classes < CLASSES, 0.0)


@triton.jit
def _sum_of_weights(weight, CLASSES: tl.constexpr):
    BLOCK: tl.constexpr = triton.next_power_of_2(CLASSES)
    return tl.sum(_class_weight(weight, tl.arange(0, BLOCK), CLASSES))


@triton.jit
def _over(values, CHUNKED: tl.constexpr):
    """Sums over a chunk of classes [pixels, classes]; a class alone has its pixels along both axes."""
    return tl.sum(values, 1, keep_dims=True) if CHUNKED else values


@triton.jit
def _add_classes(
    sums, z, e, t, class_weight, slope, cold, KINDS: tl.constexpr, CHUNKED: tl.constexpr = False
):  # fmt: skip
    """Sums over the classes of a pixel with those of z and t, logits of student and teacher less their largest ones,
    and e = exp(z): weights times -z, exp(z / T), exp(t / T), what the divergence takes of them, slopes times e."""
    spread, student, taught, divergence, inner = sums
    if SMOOTHED & KINDS:
        spread += _over(tl.where(class_weight != 0, class_weight * -z, 0.0), CHUNKED)
    if DISTILLED & KINDS:
        of_teacher = _exp(t * cold)
        taught += _over(of_teacher, CHUNKED)
        divergence += _over(tl.where(of_teacher > 0, of_teacher * ((t - z) * cold), 0.0), CHUNKED)
        if TEMPERED & KINDS:
            student += _over(_exp(z * cold), CHUNKED)
    if OVERLAP & KINDS:
        inner += _over(slope * e, CHUNKED)
    return spread, student, taught, divergence, inner


@triton.jit
def _divergence(sums, log_sum, temperature, KINDS: tl.constexpr):
    """T^2 KL(softmax(t / T) || softmax(z / T))."""
    spread, student, taught, divergence, inner = sums
    log_student = tl.log(student) if TEMPERED & KINDS else log_sum
    return temperature * temperature * (divergence / taught - tl.log(taught) + log_student)


@triton.jit
def _add_amounts(
    amounts, factor, own, pixel_weight, ce, scale, sums, weight, slopes, scales, ce_weight, smoothing,
    distillation_weight, temperature, CLASSES: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """What the gradient takes at labels, and its factor of e = exp(z), with those of terms of all classes; what these
    multiply slopes times e, class weights, exp(z / T) and exp(t / T) by; and whether a pixel has any part. A
    probability is `scale` times e."""
    spread, student, taught, divergence, inner = sums
    of_own, of_rows, of_columns = amounts
    zero = tl.zeros_like(factor)
    used, counted = factor != 0, tl.where(own >= 0, pixel_weight, 0.0)
    of_slopes, of_weights, of_student, of_teacher = zero, zero, zero, zero
    if OVERLAP & KINDS:
        hit = counted * tl.load(slopes + (CLASSES + tl.maximum(own, 0))) * _exp(-ce)
        of_own -= hit
        of_slopes = counted * scale
        factor -= (of_slopes * inner + hit) * scale
        used |= counted != 0
    if SMOOTHED & KINDS:
        of_weights = tl.where(ce_weight != 0, counted * (ce_weight * smoothing / CLASSES * tl.load(scales)), 0.0)
        factor += of_weights * _sum_of_weights(weight, CLASSES) * scale
        used |= of_weights != 0
    if DISTILLED & KINDS:
        share = pixel_weight if EVERYWHERE & KINDS else counted
        amount = share * (distillation_weight * temperature * tl.load(scales + 2))
        of_teacher = amount / taught
        if TEMPERED & KINDS:
            of_student = tl.where(amount != 0, amount / student, 0.0)  # where no pixel is there is no sum
        else:
            factor += amount * scale
        used |= share != 0
    return (of_own, of_rows, of_columns), factor, (of_slopes, of_weights, of_student, of_teacher), used


@triton.jit
def _gradient(z, e, t, class_weight, slope, parts, cold, KINDS: tl.constexpr):
    """What terms of all classes add to factor * e, e = exp(z), of z and t less their largest ones."""
    of_slopes, of_weights, of_student, of_teacher = parts
    gradient = tl.zeros_like(z)
    if OVERLAP & KINDS:
        gradient += of_slopes * slope * e
    if SMOOTHED & KINDS:
        gradient -= of_weights * class_weight
    if DISTILLED & KINDS:
        gradient -= of_teacher * _exp(t * cold)
        if TEMPERED & KINDS:
            gradient += of_student * _exp(z * cold)
    return gradient


def kinds(options: Any, teacher: Tensor | None) -> int:
    """KINDS of a call."""
    distilled, overlap = teacher is not None, options.has_overlap
    present = {
        SMOOTHED: options.smoothing != 0,
        FOCAL: options.focal_weight != 0,
        FOCAL_BOUNDARY: options.focal_boundary and options.boundary_weight != 0,
        DISTILLED: distilled,
        EVERYWHERE: distilled and options.everywhere,
        TEMPERED: distilled and options.temperature != 1,
        OVERLAP: overlap,
        BY_IMAGE: overlap and options.overlap_per_image,
    }
    return sum(bit.value for bit, there in present.items() if there)
