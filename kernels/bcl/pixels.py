"""Pixels of the loss: labels, cross-entropies, sums, and what the gradient takes at a label."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from bcmfnet.kernels._common import INTERPRETED, lerp, load_corners

PIXELS = 2**14 if INTERPRETED.value else 512  # of a program; a lane has one where it reads logits
HELD = 32  # A lane holds so many classes; of more the gradient reads the others twice.

Q_MAX = tl.constexpr(65535)
LOG2_E = tl.constexpr(1.4426950408889634)
Q_SCALE = tl.constexpr(1024.0)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
SIZES = ["batch", "h", "w", "H", "W", "count", "plane", "programs", "selections"]
OPTIONS = ["ignore", "offset_y", "offset_x", "tau", "ratio", "min_kept", "max_kept", "parity_y", "parity_x"]
STRIDES = [f"{name}_{axis}" for name in ("stride", "result", "target") for axis in "nchw"]
ANY_NUMBERS = {"do_not_specialize": SIZES + OPTIONS, "do_not_specialize_on_alignment": [*STRIDES, "step_y", "step_x"]}


@triton.jit
def _exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:  # tl.exp spends four more operations on subnormal results
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1)


@triton.jit
def _place(pixel, H, W):
    return pixel // W // H, pixel // W % H, pixel % W


@triton.jit
def _flipped(position, length, step, offset, MIRROR: tl.constexpr):
    """The position that a flip reads along an axis; one that would leave the image stays."""
    i = position + offset
    block = i // step
    if MIRROR:
        other = (4 * (block // 2) + 2) * step - 1 - i - offset
    else:
        other = i + (1 - 2 * (block & 1)) * step - offset
    return tl.where((other < 0) | (other >= length), position, other)


@triton.jit
def _label(labels, image, y, x, mask, CLASSES: tl.constexpr):
    """Labels, -1 where they are masked or ignored, -2 where they are no class; `labels` are target, strides, ignore."""
    target, strides, ignore = labels
    label = tl.load(target + (image * strides[0] + y * strides[1] + x * strides[2]))
    label = label if label.dtype == tl.int64 else label.to(tl.int32)
    known = tl.where((label >= 0) & (label < CLASSES), label, -2)
    return tl.where(mask & (label != ignore), known, -1).to(tl.int32)


@triton.jit
def _row_flipped(labels, place, size, flip, mask, CLASSES: tl.constexpr, MIRROR: tl.constexpr):
    """Labels that the row flip reads; `flip` is steps of rows and columns, then their offsets."""
    image, y, x = place
    return _label(labels, image, _flipped(y, size[0], flip[0], flip[2], MIRROR), x, mask, CLASSES)


@triton.jit
def _column_flipped(labels, place, size, flip, mask, CLASSES: tl.constexpr, MIRROR: tl.constexpr):
    image, y, x = place
    return _label(labels, image, y, _flipped(x, size[1], flip[1], flip[3], MIRROR), mask, CLASSES)


@triton.jit
def _class_weights(weight, label):
    """Class weights of labels, 0 of those that do not count."""
    if weight is None:
        return (label >= 0).to(tl.float32)
    else:  # the compiler reads on after a return
        return tl.where(label >= 0, tl.load(weight + tl.maximum(label, 0)), 0.0)


@triton.jit
def _plus(total, coefficient, values, PRESENT: tl.constexpr):
    """Sum with a term that has a coefficient: of one that has none the values may be infinite."""
    return total + coefficient * values if PRESENT else total


@triton.jit
def _between(logits, corners, corner_weights):
    a, b, c, d = load_corners(logits, corners)
    return lerp(lerp(a, b, corner_weights[1]), lerp(c, d, corner_weights[1]), corner_weights[0])


@triton.jit
def _cross_entropy(logits, label, stride_c, corners, corner_weights, best, log_sum):
    at = tl.maximum(label, 0) * stride_c
    if corner_weights is None:
        z = tl.load(logits + (at + corners[0])).to(tl.float32)
    else:
        z = _between(logits, (at + corners[0], at + corners[1], at + corners[2], at + corners[3]), corner_weights)
    value = log_sum - (z - best)
    return tl.where(label >= 0, tl.where(value < 0, 0.0, value), 0.0)  # below 0 is a rounding


@triton.jit
def _sum(values):
    """Sum in float64 of the lanes' sums in float32."""
    return tl.sum(tl.sum(values, 1).to(tl.float64))


@triton.jit
def _record(
    logits, stride_c, corners, corner_weights, best, total, pixel, place, inside, size, labels, flip, weight,
    lse, scores, terms, partials, program, programs, score_factors, term_factors,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """Maps of pixels, from max z and sum exp(z - max z); and their sums: weighted cross-entropy, weight (NaN with a
    label that is no class), valid pixels, and a NaN where the selection meets one, which it cannot see."""
    image, y, x = place
    log_sum = tl.log(total)
    if lse is not None:
        tl.store(lse + pixel, log_sum, inside)
    own = _label(labels, image, y, x, inside, CLASSES)
    ce = _cross_entropy(logits, own, stride_c, corners, corner_weights, best, log_sum)
    partials += program
    tl.store(partials + 2 * programs, tl.sum((own != -1).to(tl.int32)))
    w = _class_weights(weight, own)
    tl.store(partials, _sum(tl.where(w != 0, w * ce, 0.0)))
    tl.store(partials + programs, _sum(tl.where(own == -2, NAN, w)))
    hazard = tl.zeros_like(ce)
    if scores is not None:
        score, term = _plus(hazard, score_factors[0], ce, SCORE & 1), _plus(hazard, term_factors[0], ce, TERMS & 1)
        if (SCORE | TERMS) & 2:
            label = _row_flipped(labels, place, size, flip, own >= 0, CLASSES, MIRROR)
            ce = _cross_entropy(logits, label, stride_c, corners, corner_weights, best, log_sum)
            score, term = _plus(score, score_factors[1], ce, SCORE & 2), _plus(term, term_factors[1], ce, TERMS & 2)
        if (SCORE | TERMS) & 4:
            label = _column_flipped(labels, place, size, flip, own >= 0, CLASSES, MIRROR)
            ce = _cross_entropy(logits, label, stride_c, corners, corner_weights, best, log_sum)
            score, term = _plus(score, score_factors[2], ce, SCORE & 4), _plus(term, term_factors[2], ce, TERMS & 4)
        hazard = tl.where(score == score, 0.0, NAN)
        steps = tl.where(score == score, score * Q_SCALE + 0.5, 0.0)
        tl.store(scores + pixel, tl.where(steps > Q_MAX, Q_MAX, steps).to(tl.int32).to(tl.uint16), inside)
        tl.store(terms + pixel, tl.where(w != 0, w * term, 0.0), inside)
    tl.store(partials + 3 * programs, tl.sum(hazard))


@triton.jit
def _amounts(
    pixel, place, inside, size, labels, flip, weight, lse, mask, scales, ce_weight, boundary_weight, term_factors,
    CLASSES: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """Labels of pixels and what the gradient takes there; and the factor of exp(z - max z), which spreads their sum."""
    image, y, x = place
    own = _label(labels, image, y, x, inside, CLASSES)
    w = _class_weights(weight, own)
    boundary = tl.zeros_like(w)
    if mask is not None:
        selected = tl.load(mask + pixel, inside, 0) != 0
        boundary = tl.where(selected, w * (boundary_weight * tl.load(scales + 1)), 0.0)
    of_own = tl.where(ce_weight != 0, w * (ce_weight * tl.load(scales)), 0.0) + term_factors[0] * boundary
    rows, columns, of_rows, of_columns = own, own, tl.zeros_like(w), tl.zeros_like(w)
    if TERMS & 2:
        rows = _row_flipped(labels, place, size, flip, own >= 0, CLASSES, MIRROR)
        of_rows = tl.where(rows >= 0, term_factors[1] * boundary, 0.0)
    if TERMS & 4:
        columns = _column_flipped(labels, place, size, flip, own >= 0, CLASSES, MIRROR)
        of_columns = tl.where(columns >= 0, term_factors[2] * boundary, 0.0)
    total = of_own + of_rows + of_columns
    factor = tl.where(total != 0, total * _exp(-tl.load(lse + pixel, inside, 0.0)), 0.0)
    return (own, rows, columns), (of_own, of_rows, of_columns), factor


@triton.jit
def _gradient(z, best, classes, labels, amounts, factor, CLASSES: tl.constexpr, TERMS: tl.constexpr):
    """factor * exp(z - best) less what is taken at the labels; NaN may come of a factor of 0 too."""
    taken = tl.where(classes == labels[0], amounts[0], 0.0)
    if TERMS & 2:
        taken += tl.where(classes == labels[1], amounts[1], 0.0)
    if TERMS & 4:
        taken += tl.where(classes == labels[2], amounts[2], 0.0)
    return tl.zeros_like(z) if CLASSES == 1 else factor * _exp(z - best) - taken


def _labels(options: Any) -> tuple[int, ...]:
    return (options.ignore_index, *options.step, *options.offset)


def _floats(options: Any) -> tuple[float, ...]:
    return tuple(map(float, (options.ce_weight, options.boundary_weight, *options.terms)))


def _present(options: Any, coefficients: tuple[float, ...]) -> int:
    """A bit for each coefficient that there is; none without a boundary term."""
    return sum(1 << i for i, k in enumerate(coefficients) if k != 0 and options.boundary_weight != 0)


def _flip(options: Any) -> dict[str, Any]:
    return {"TERMS": _present(options, options.terms), "MIRROR": options.flip == "mirror"}


def _tau(options: Any) -> int:
    return math.floor(min(Q_SCALE.value * options.threshold + 0.5, Q_MAX.value))
