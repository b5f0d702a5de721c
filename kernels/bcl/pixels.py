"""Pixels of the loss: labels, cross-entropies, sums, and what the gradient takes at a label."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, lerp, load_corners, scratch
from bcmfnet.kernels.bcl import terms as tm

PIXELS = 2**14 if INTERPRETED.value else 512  # of a program; a lane has one where it reads logits
HELD = 32  # A lane holds so many classes; of more the gradient reads the others twice.

Q_MAX = tl.constexpr(65535)
Q_SCALE = tl.constexpr(1024.0)
INF = tl.constexpr(float("inf"))  # NaN can be no global: it is not equal to itself, so that Triton takes it for changed
SIZES = ["batch", "h", "w", "H", "W", "count", "plane", "programs", "selections"]
OPTIONS = ["ignore", "offset_y", "offset_x", "tau", "ratio", "min_kept", "max_kept", "parity_y", "parity_x"]
STRIDES = [f"{name}_{axis}" for name in ("stride", "result", "target", "teacher") for axis in "nchw"]
ANY_NUMBERS = {"do_not_specialize": SIZES + OPTIONS, "do_not_specialize_on_alignment": [*STRIDES, "step_y", "step_x"]}


@triton.jit
def _kept(x):
    """x, which the compiler is not to compute anew in a loop from what it depends on."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, True, 1)


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
    """Labels, -1 where they are masked or ignored, or weigh nothing, -2 where they are no class; `labels` are target,
    strides, ignore, weights of pixels and the size of their map."""
    target, strides, ignore, pixel_weight, size = labels
    label = tl.load(target + (image * strides[0] + y * strides[1] + x * strides[2]))
    label = label if label.dtype == tl.int64 else label.to(tl.int32)
    known = tl.where((label >= 0) & (label < CLASSES), label, -2)
    if pixel_weight is not None:
        mask &= tl.load(pixel_weight + ((image * size[0] + y) * size[1] + x)) != 0
    return tl.where(mask & (label != ignore), known, -1).to(tl.int32)


@triton.jit
def _row_flipped(labels, place, flip, mask, CLASSES: tl.constexpr, MIRROR: tl.constexpr):
    """Labels that the row flip reads; `flip` is steps of rows and columns, then their offsets."""
    image, y, x = place
    return _label(labels, image, _flipped(y, labels[4][0], flip[0], flip[2], MIRROR), x, mask, CLASSES)


@triton.jit
def _column_flipped(labels, place, flip, mask, CLASSES: tl.constexpr, MIRROR: tl.constexpr):
    image, y, x = place
    return _label(labels, image, y, _flipped(x, labels[4][1], flip[1], flip[3], MIRROR), mask, CLASSES)


@triton.jit
def _pixel_weights(labels, pixel, inside):
    if labels[3] is None:
        return tl.where(inside, 1.0, 0.0)
    else:  # the compiler reads on after a return
        return tl.load(labels[3] + pixel, inside, 0.0)


@triton.jit
def _weights(weight, labels, label, pixel):
    """Of pixels by the classes of their labels and their own, 0 where a label does not count."""
    counts = label >= 0
    of_pixels = _pixel_weights(labels, pixel, counts)
    if weight is not None:
        each = tl.load(weight + tl.maximum(label, 0))
        of_pixels = tl.where(counts, each if labels[3] is None else each * of_pixels, 0.0)
    return of_pixels


@triton.jit
def _plus(total, coefficient, values, PRESENT: tl.constexpr):
    """Sum with a term that has a coefficient: of one that has none the values may be infinite."""
    return total + coefficient * values if PRESENT else total


@triton.jit
def _between(corners, at, corner_weights, best):
    """Exponents of pixels, less `best` where it is given, between four pointers, that far behind them."""
    a, b, c, d = load_corners(at, corners)
    x = lerp(lerp(a, b, corner_weights[1]), lerp(c, d, corner_weights[1]), corner_weights[0])
    return x if best is None else x - best


@triton.jit
def _cross_entropy(corners, label, stride_c, corner_weights, best, log_sum, CLASSES: tl.constexpr, FIRST: tl.constexpr):
    """Of labels, 0 where there is none. At full resolution, without weights of corners, `best` are the largest logits
    and `log_sum` is less them; with upsampling `best` is what is taken from exponents: see `_between`."""
    if corner_weights is not None:
        below = _between(corners, tl.maximum(label, 0) * stride_c, corner_weights, best) * tm.LN_2
    else:
        z = tl.load(corners[0] + tl.maximum(label - FIRST, 0) * stride_c).to(tl.float32)
        below = tm._below(tl.where(label < FIRST, 0.0, z) if FIRST else z, tm._shift(best))
    # What is below 0 is a rounding.
    value = tl.maximum(log_sum - below, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if CLASSES == 1:  # 0 but where it is NaN, not a rounding
        value *= 0
    return tl.where(label >= 0, value, 0.0)


@triton.jit
def _sum(values):
    """Sum in float64 of the lanes' sums along their last axis in float32."""
    return tl.sum(tl.sum(values, len(values.shape) - 1).to(tl.float64))


@triton.jit
def _record(
    corners, stride_c, corner_weights, best, log_sum, sums, pixel, place, inside, labels, flip, weight,
    scores, terms, decided, partials, chosen, program, programs, tau, score_factors, term_factors,
    smoothing, gamma, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    KINDS: tl.constexpr,
):  # fmt: skip
    """Scores of pixels, from max z and log sum exp(z - max z); and their sums: weighted cross-entropy, weight (NaN with
    a label that is no class), valid pixels, and a NaN where the selection meets one, which it cannot see; then what
    smoothing adds, focal loss, divergence and its weights. What is selected where scores decide alone is `decided`, and
    its sums are `chosen`: boundary term and number."""
    image, y, x = place
    own = _label(labels, image, y, x, inside, CLASSES)
    ce = _cross_entropy(corners, own, stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
    partials += program
    tl.store(partials + 2 * programs, tl.sum((own != -1).to(tl.int32)))
    w = _weights(weight, labels, own, pixel)
    tl.store(partials, _sum(tl.where(w != 0, w * ce, 0.0)))
    divisor = _pixel_weights(labels, pixel, own >= 0) if FIRST else w  # pos_weight is in no divisor
    tl.store(partials + programs, _sum(tl.where(own == -2, float("nan"), divisor)))
    if tm.SMOOTHED & KINDS:
        u = _pixel_weights(labels, pixel, own >= 0)
        part = smoothing / CLASSES * (tm._sum_of_weights(weight, CLASSES) * log_sum + sums[0])
        tl.store(partials + 4 * programs, _sum(tl.where(u != 0, u * part, 0.0)))
    if tm.FOCAL & KINDS:
        tl.store(partials + 5 * programs, _sum(tl.where(w != 0, w * tm._focal(ce, gamma), 0.0)))
    if tm.DISTILLED & KINDS:
        u = _pixel_weights(labels, pixel, inside if tm.EVERYWHERE & KINDS else own >= 0)
        divergence = tm._divergence(sums, log_sum, temperature, KINDS)
        tl.store(partials + 6 * programs, _sum(tl.where(u != 0, u * divergence, 0.0)))
        tl.store(partials + 7 * programs, _sum(u))
    hazard = 0.0
    if scores is not None or decided is not None:
        zero = tl.zeros_like(ce)
        hard = tm._focal(ce, gamma) if tm.FOCAL_BOUNDARY & KINDS else ce
        score, term = _plus(zero, score_factors[0], ce, SCORE & 1), _plus(zero, term_factors[0], hard, TERMS & 1)
        if (SCORE | TERMS) & 2:
            label = _row_flipped(labels, place, flip, own >= 0, CLASSES, MIRROR)
            ce = _cross_entropy(corners, label, stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
            hard = tm._focal(ce, gamma) if tm.FOCAL_BOUNDARY & KINDS else ce
            score, term = _plus(score, score_factors[1], ce, SCORE & 2), _plus(term, term_factors[1], hard, TERMS & 2)
        if (SCORE | TERMS) & 4:
            label = _column_flipped(labels, place, flip, own >= 0, CLASSES, MIRROR)
            ce = _cross_entropy(corners, label, stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
            hard = tm._focal(ce, gamma) if tm.FOCAL_BOUNDARY & KINDS else ce
            score, term = _plus(score, score_factors[2], ce, SCORE & 4), _plus(term, term_factors[2], hard, TERMS & 4)
        steps, term = score * Q_SCALE + 0.5, tl.where(w != 0, w * term, 0.0)
        no_score = tl.where(score == score, 0.0, float("nan"))
        if decided is None:
            steps = tl.where(score == score, steps, 0.0)
            tl.store(scores + pixel, tl.where(steps > Q_MAX, Q_MAX, steps).to(tl.int32).to(tl.uint16), inside)
            tl.store(terms + pixel, term, inside)
            hazard = tl.sum(no_score)
        else:
            selected = inside & (steps >= tl.maximum(tau, 1).to(tl.float32))
            tl.store(decided + pixel, selected.to(tl.uint8), inside)
            chosen += program
            tl.store(chosen, _sum(tl.where(selected, term, no_score)))
            tl.store(chosen + programs, tl.sum(selected.to(tl.int32)))
    tl.store(partials + 3 * programs, hazard)


@triton.jit
def _amounts(
    corners, stride_c, corner_weights, best, log_sum, pixel, place, inside, labels, flip, weight, mask, scales,
    ce_weight, boundary_weight, term_factors, smoothing, focal_weight, gamma,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Labels of pixels, what the gradient takes there, and the sum of that, which probabilities spread."""
    image, y, x = place
    own = _label(labels, image, y, x, inside, CLASSES)
    w = _weights(weight, labels, own, pixel)
    boundary = tl.zeros_like(w)
    if mask is not None:
        selected = tl.load(mask + pixel, inside, 0) != 0
        boundary = tl.where(selected, w * (boundary_weight * tl.load(scales + 1)), 0.0)
    if tm.SMOOTHED & KINDS:
        ce_weight *= 1 - smoothing
    of_own = tl.where(ce_weight != 0, w * (ce_weight * tl.load(scales)), 0.0)
    at_own = term_factors[0] * boundary
    rows, columns, of_rows, of_columns = own, own, tl.zeros_like(w), tl.zeros_like(w)
    if (tm.FOCAL | tm.FOCAL_BOUNDARY) & KINDS:
        slope = tm._focal_slope(
            _cross_entropy(corners, own, stride_c, corner_weights, best, log_sum, CLASSES, FIRST), gamma
        )
        if tm.FOCAL & KINDS:
            of_own += slope * (w * (focal_weight * tl.load(scales)))
        if tm.FOCAL_BOUNDARY & KINDS:
            at_own *= slope
    of_own += at_own
    if TERMS & 2:
        rows = _row_flipped(labels, place, flip, own >= 0, CLASSES, MIRROR)
        of_rows = tl.where(rows >= 0, term_factors[1] * boundary, 0.0)
        if tm.FOCAL_BOUNDARY & KINDS:
            ce = _cross_entropy(corners, rows, stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
            of_rows *= tm._focal_slope(ce, gamma)
    if TERMS & 4:
        columns = _column_flipped(labels, place, flip, own >= 0, CLASSES, MIRROR)
        of_columns = tl.where(columns >= 0, term_factors[2] * boundary, 0.0)
        if tm.FOCAL_BOUNDARY & KINDS:
            ce = _cross_entropy(corners, columns, stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
            of_columns *= tm._focal_slope(ce, gamma)
    return (own, rows, columns), (of_own, of_rows, of_columns), of_own + of_rows + of_columns


@triton.jit
def _numbers(labels):
    """Labels as `_is` compares them, which are fewer than a float32 has integers."""
    return _kept(labels[0].to(tl.float32)), _kept(labels[1].to(tl.float32)), _kept(labels[2].to(tl.float32))


@triton.jit
def _is(labels, classes):
    """1 where float32 labels are those classes, else 0: of floats one operation has that."""
    if INTERPRETED:
        return tl.where(labels == classes, 1.0, 0.0)
    else:
        classes = classes.to(tl.float32)
        return tl.inline_asm_elementwise("set.eq.f32.f32 $0, $1, $2;", "=f,f,f", [labels, classes], tl.float32, True, 1)


@triton.jit
def _gradient(e, classes, labels, amounts, factor, CLASSES: tl.constexpr, TERMS: tl.constexpr):
    """factor * e, of e = exp(z - best), less what is taken at the labels; NaN may come of a factor of 0 too."""
    gradient = factor * e - amounts[0] * _is(labels[0], classes)
    if TERMS & 2:
        gradient -= amounts[1] * _is(labels[1], classes)
    if TERMS & 4:
        gradient -= amounts[2] * _is(labels[2], classes)
    return tl.zeros_like(e) if CLASSES == 1 else gradient


class Inputs(NamedTuple):
    """Tensors of a call as the kernels take them; what is None has no part in it."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    pixel_weight: Tensor | None
    teacher: Tensor | None


def make_inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, teacher: Tensor | None,
    options: Any,
) -> Inputs:  # fmt: skip
    """Weights of pixels in memory order; those of binary logits' two classes, made without a wait for the device."""
    if options.binary and options.pos_weight != 1:
        weight = torch.ones(2, dtype=torch.float32, device=logits.device)
        weight[1:].fill_(options.pos_weight)
    pixel_weight = None if pixel_weight is None else pixel_weight.contiguous()
    return Inputs(logits, target, weight, pixel_weight, teacher if options.distillation_weight != 0 else None)


def _classes(logits: Tensor, options: Any) -> dict[str, int]:
    """CLASSES, and FIRST, the first one that has a channel: binary logits have one, that of the second class."""
    return {"CLASSES": logits.shape[1] + options.binary, "FIRST": int(options.binary)}


def _labels(options: Any) -> tuple[int, ...]:
    return (options.ignore_index, *options.step, *options.offset)


def _floats(options: Any) -> tuple[float, ...]:
    return tuple(map(float, (options.ce_weight, options.boundary_weight, *options.terms)))


class Sums(NamedTuple):
    """Of each program of a score kernel: see `_record`; and those of overlap, I, P and Y of each class."""

    partials: Tensor
    chosen: Tensor | None
    overlap: Tensor | None


def _sums(like: Tensor, programs: int, warps: int, kinds: int, classes: int, decided: Tensor | None) -> Sums:
    """Their memory; overlap has sums of so many warps of a program."""
    return Sums(
        scratch(like, torch.float64, 8 if kinds & tm.OF_PIXELS.value else 4, programs),
        None if decided is None else scratch(like, torch.float64, 2, programs),
        scratch(like, torch.float32, programs * warps, 3, classes) if kinds & tm.OVERLAP.value else None,
    )


def _strides(teacher: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if teacher is None else teacher.stride()


def _present(options: Any, coefficients: tuple[float, ...]) -> int:
    """A bit for each coefficient that there is; none without a boundary term."""
    return sum(1 << i for i, k in enumerate(coefficients) if k != 0 and options.boundary_weight != 0)


def _flip(options: Any) -> dict[str, Any]:
    return {"TERMS": _present(options, options.terms), "MIRROR": options.flip == "mirror"}


def _term_floats(options: Any) -> tuple[float, ...]:
    return tuple(map(float, (options.smoothing, options.gamma, options.temperature)))


def _tau(options: Any) -> int:
    return math.floor(min(Q_SCALE.value * options.threshold + 0.5, Q_MAX.value))
