"""Logits at full resolution: scores and gradient, pixel by pixel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import extent, index_type
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl import terms as tm
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, HELD, INF, PIXELS, Inputs


@triton.jit
def _load_classes(pixels, first, stride_c, CLASSES: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr):
    """Logits [pixels, CHUNK] of the classes from `first` on; FIRST is the first one that has a channel."""
    classes = first + tl.arange(0, CHUNK)[None]
    if FIRST:
        z = tl.load(pixels + (classes - FIRST) * stride_c, (classes >= FIRST) & (classes < CLASSES), -INF)
        return tl.where(classes < FIRST, 0.0, z.to(tl.float32))
    else:
        return tl.load(pixels + classes * stride_c, classes < CLASSES, -INF).to(tl.float32)


@triton.jit
def _largest(pixels, stride_c, CLASSES: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr):
    best = tl.max(_load_classes(pixels, 0, stride_c, CLASSES, FIRST, CHUNK), 1, keep_dims=True)
    for first in range(CHUNK, CLASSES, CHUNK):
        other = _load_classes(pixels, first, stride_c, CLASSES, FIRST, CHUNK)
        best = tl.maximum(best, tl.max(other, 1, keep_dims=True))
    return best


@triton.jit
def _over_classes(
    pixels, stride_c, best, of_teacher, teacher_c, best_of_teacher, weight, slopes, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, KINDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums that terms take over the classes of pixels: see `terms._add_classes`."""
    zero = tl.zeros_like(best)
    sums = (zero, zero, zero, zero, zero)
    for first in range(0, CLASSES, CHUNK):
        z = _load_classes(pixels, first, stride_c, CLASSES, FIRST, CHUNK) - best
        t, class_weight, slope = _of_classes(
            first, of_teacher, teacher_c, best_of_teacher, weight, slopes, CLASSES, FIRST, KINDS, CHUNK
        )
        sums = tm._add_classes(sums, z, tm._exp(z), t, class_weight, slope, 1 / temperature, KINDS, True)
    return sums


@triton.jit
def _of_classes(
    first, of_teacher, teacher_c, best_of_teacher, weight, slopes,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, KINDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What terms read of a chunk of classes: the teacher's logits, class weights, slopes; 0 where they are not."""
    classes = first + tl.arange(0, CHUNK)[None]
    t, class_weight, slope = 0.0, 0.0, 0.0
    if tm.DISTILLED & KINDS:
        t = _load_classes(of_teacher, first, teacher_c, CLASSES, FIRST, CHUNK) - best_of_teacher
    if tm.SMOOTHED & KINDS:
        class_weight = tm._class_weight(weight, classes, CLASSES)
    if tm.OVERLAP & KINDS:
        slope = tl.load(slopes + classes, classes < CLASSES, 0.0)
    return t, class_weight, slope


@triton.jit
def _overlap_sums(
    sums, pixels, stride_c, best, total, own, u, CLASSES: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr
):
    """Store I, P and Y of a program's pixels [3, CLASSES]."""
    counts, share = own >= 0, u / total
    for first in range(0, CLASSES, CHUNK):
        classes = first + tl.arange(0, CHUNK)[None]
        z = _load_classes(pixels, first, stride_c, CLASSES, FIRST, CHUNK) - best
        p, mine = tl.where(counts, share * tm._exp(z), 0.0), classes == own
        inside = classes < CLASSES
        tl.store(sums + classes, tl.sum(tl.where(mine, p, 0.0), 0, keep_dims=True), inside)
        tl.store(sums + (CLASSES + classes), tl.sum(p, 0, keep_dims=True), inside)
        tl.store(sums + (2 * CLASSES + classes), tl.sum(tl.where(mine, u, 0.0), 0, keep_dims=True), inside)


@triton.jit(**ANY_NUMBERS)
def score_pixels_kernel(
    count, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w, teacher_n, teacher_c, teacher_h, teacher_w,
    logits, target, weight, pixel_weight, teacher, lse, scores, terms, decided, partials, chosen, sums,
    ignore, step_y, step_x, offset_y, offset_x, tau, s0, s1, s2, g0, g1, g2, smoothing, gamma, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    KINDS: tl.constexpr, INDEX: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Logits are read once: the softmax is an online one (Milakov and Gimelshein, arXiv 1805.02867)."""
    stride_c = tl.cast(stride_c, INDEX)
    if tm.BY_IMAGE & KINDS:  # a program has pixels of one image
        plane = H.to(INDEX) * W.to(INDEX)
        programs = tl.num_programs(0) // (count // plane)
        within = tl.program_id(0) % programs * PIXELS + tl.arange(0, PIXELS)[:, None]
        pixel, inside = tl.program_id(0) // programs * plane + within, within < plane
    else:
        pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
        inside = pixel < count
    place = px._place(tl.minimum(pixel, count - 1), H.to(INDEX), W.to(INDEX))
    at = place[0] * stride_n + place[1] * stride_h + place[2] * stride_w
    best, total = tl.full([PIXELS, 1], -INF, tl.float32), tl.zeros([PIXELS, 1], tl.float32)
    for first in range(0, CLASSES, CHUNK):
        z = _load_classes(logits + at, first, stride_c, CLASSES, FIRST, CHUNK)
        largest = tl.maximum(best, tl.max(z, 1, keep_dims=True))
        shift = tm._shift(tl.where(largest == -INF, 0.0, largest))  # without a finite one: -inf - -inf
        total = total * tm._exp_below(best, shift) + tl.sum(tm._exp_below(z, shift), 1, keep_dims=True)
        best = largest
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    over_classes = None
    if (tm.SMOOTHED | tm.DISTILLED) & KINDS:
        of_teacher, best_of_teacher = None, None
        if teacher is not None:
            teacher_c = tl.cast(teacher_c, INDEX)
            of_teacher = teacher + (place[0] * teacher_n + place[1] * teacher_h + place[2] * teacher_w)
            best_of_teacher = _largest(of_teacher, teacher_c, CLASSES, FIRST, CHUNK)
        over_classes = _over_classes(
            logits + at, stride_c, best, of_teacher, teacher_c, best_of_teacher, weight, None, temperature,
            CLASSES, FIRST, (tm.SMOOTHED | tm.DISTILLED | tm.TEMPERED) & KINDS, CHUNK,
        )  # fmt: skip
    if sums is not None:
        own = px._label(labels, place[0], place[1], place[2], inside, CLASSES)
        _overlap_sums(
            sums + tl.program_id(0).to(INDEX) * 3 * CLASSES, logits + at, stride_c, best, total, own,
            px._pixel_weights(labels, pixel, own >= 0), CLASSES, FIRST, CHUNK,
        )  # fmt: skip
    log_sum = tm._log(total)
    if lse is not None:
        tl.store(lse + pixel, log_sum, inside)
    px._record(
        (logits + at,), stride_c, None, best, log_sum, over_classes, pixel, place, inside,
        labels, (step_y, step_x, offset_y, offset_x), weight, scores, terms, decided, partials, chosen,
        tl.program_id(0), tl.num_programs(0), tau, (s0, s1, s2), (g0, g1, g2), smoothing, gamma, temperature,
        CLASSES, FIRST, SCORE, TERMS, MIRROR, KINDS,
    )  # fmt: skip


@triton.jit(**ANY_NUMBERS)
def gradient_pixels_kernel(
    count, H, W,
    stride_n, stride_c, stride_h, stride_w, result_n, result_c, result_h, result_w, target_n, target_h, target_w,
    teacher_n, teacher_c, teacher_h, teacher_w,
    grad, logits, target, weight, pixel_weight, teacher, lse, mask, scales, slopes, result,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, smoothing, gamma, temperature,
    focal_weight, distillation_weight,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr, KINDS: tl.constexpr,
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
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    z = _load_classes(pixels, 0, stride_c, CLASSES, FIRST, CHUNK)
    best = tl.max(z, 1, keep_dims=True)
    for first in range(CHUNK, CLASSES, CHUNK):
        other = _load_classes(pixels, first, stride_c, CLASSES, FIRST, CHUNK)
        best = tl.maximum(best, tl.max(other, 1, keep_dims=True))
    log_sum = tl.load(lse + pixel, inside, 0.0)
    indices, amounts, spread = px._amounts(
        (pixels,), stride_c, None, best, log_sum, pixel, place, inside, labels, (step_y, step_x, offset_y, offset_x),
        weight, mask, scales, ce_weight, boundary_weight, (g0, g1, g2), smoothing, focal_weight, gamma,
        CLASSES, FIRST, TERMS, MIRROR, KINDS,
    )  # fmt: skip
    scale = tm._exp(-log_sum)
    factor = tl.where(spread != 0, spread * scale, 0.0)
    used, of_teacher, best_of_teacher = factor != 0, None, None
    if tm.OF_CLASSES & KINDS:
        u = px._pixel_weights(labels, pixel, inside)
        ce = px._cross_entropy((pixels,), indices[0], stride_c, None, best, log_sum, CLASSES, FIRST)
        if tm.BY_IMAGE & KINDS:
            slopes += image * 2 * CLASSES
        if teacher is not None:
            teacher_c = tl.cast(teacher_c, INDEX)
            of_teacher = teacher + (image * teacher_n + y * teacher_h + x * teacher_w)
            best_of_teacher = _largest(of_teacher, teacher_c, CLASSES, FIRST, CHUNK)
        over_classes = _over_classes(
            pixels, stride_c, best, of_teacher, teacher_c, best_of_teacher, weight, slopes, temperature,
            CLASSES, FIRST, KINDS, CHUNK,
        )  # fmt: skip
        amounts, factor, parts, used = tm._add_amounts(
            amounts, factor, indices[0], u, ce, scale, over_classes, weight, slopes, scales, ce_weight, smoothing,
            distillation_weight, temperature, CLASSES, KINDS,
        )  # fmt: skip
    tl.debug_barrier()
    times, shift, indices = tl.load(grad), tm._shift(best), px._numbers(indices)
    for first in range(0, CLASSES, CHUNK):
        if CLASSES > CHUNK:
            z = _load_classes(pixels, first, stride_c, CLASSES, FIRST, CHUNK)
        classes = first + tl.arange(0, CHUNK)[None]
        e = tm._exp_below(z, shift)
        g = px._gradient(e, classes, indices, amounts, factor, CLASSES, TERMS)
        if tm.OF_CLASSES & KINDS:
            t, class_weight, slope = _of_classes(
                first, of_teacher, teacher_c, best_of_teacher, weight, slopes, CLASSES, FIRST, KINDS, CHUNK
            )
            g += tm._gradient(z - best, e, t, class_weight, slope, parts, 1 / temperature, KINDS)
        g = tl.where(used, times * g, 0.0)
        written = inside & (classes >= FIRST) & (classes < CLASSES) if FIRST else inside & (classes < CLASSES)
        tl.store(result + (classes - FIRST) * result_c, g.to(result.dtype.element_ty), written)


def score_pixels(
    inputs: Inputs, options: Any, lse: Tensor | None, scores: Tensor | None, terms: Tensor | None,
    decided: Tensor | None,
) -> px.Sums:  # fmt: skip
    """Write the maps of pixels at full resolution."""
    logits, target, *others = inputs
    kinds, classes = tm.kinds(options, inputs.teacher), px._classes(logits, options)
    images, pixels = max(target.shape[0], 1) if kinds & tm.BY_IMAGE.value else 1, scored_at_once(kinds)
    programs = images * triton.cdiv(target.numel() // images, pixels)
    sums = px._sums(target, programs, 1, kinds, classes["CLASSES"], decided)
    score_pixels_kernel[(programs,)](
        target.numel(), *target.shape[1:], *logits.stride(), *target.stride(), *px._strides(inputs.teacher),
        logits, target, *others, lse, scores, terms, decided, *sums, *px._labels(options), px._tau(options),
        *map(float, options.score), *map(float, options.terms), *px._term_floats(options),
        SCORE=px._present(options, options.score), KINDS=kinds, **px._flip(options), **classes,
        **_pixels(pixels, classes["CLASSES"], kinds, target, logits, *_present(inputs.teacher)),
        num_warps=scoring_warps(kinds),
    )  # fmt: skip
    return sums


def scored_at_once(kinds: int) -> int:
    """Pixels of a program: with terms of all classes a thread needs the registers of two."""
    return PIXELS // 2 if kinds & tm.OF_CLASSES.value else PIXELS


def scoring_warps(kinds: int) -> int:
    """Warps that score them: without terms a lane has two pixels, whose sums take half as many exchanges."""
    return max(scored_at_once(kinds) // (32 if kinds else 64), 1)


def write_gradient(
    grad: Tensor, inputs: Inputs, options: Any, lse: Tensor, mask: Tensor, scales: Tensor, slopes: Tensor | None,
    result: Tensor,
) -> None:  # fmt: skip
    pixels = PIXELS // 2  # of 512 the channels_last ones spill
    num_warps = max(pixels // 32, 1)
    logits, target, *others = inputs
    classes, kinds = px._classes(logits, options), tm.kinds(options, inputs.teacher)
    gradient_pixels_kernel[(triton.cdiv(target.numel(), pixels),)](
        target.numel(), *target.shape[1:], *logits.stride(), *result.stride(), *target.stride(),
        *px._strides(inputs.teacher), grad, logits, target, *others, lse, mask, scales,
        slopes if options.has_overlap else None, result, *px._labels(options), *px._floats(options),
        *px._term_floats(options), float(options.focal_weight), float(options.distillation_weight),
        KINDS=kinds, **px._flip(options), **classes,
        **_pixels(pixels, classes["CLASSES"], kinds, target, logits, result, *_present(inputs.teacher)),
        num_warps=num_warps,
    )  # fmt: skip


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def held_at_once(classes: int, kinds: int) -> int:
    """Classes of a pixel that a thread holds."""
    many = kinds & (tm.SMOOTHED.value | tm.DISTILLED.value)  # registers for what they take of a class
    return min(triton.next_power_of_2(classes), HELD // 2 if many else HELD)


def _pixels(pixels: int, classes: int, kinds: int, *tensors: Tensor) -> dict[str, Any]:
    """Constants of a kernel over pixels at full resolution: of the target, and of maps with channels."""
    return {
        "CHUNK": held_at_once(classes, kinds), "PIXELS": pixels,
        "INDEX": index_type(max(tensors[0].numel() + PIXELS, extent(*tensors))),
    }  # fmt: skip
