"""Upsampled logits: scores and gradient, cell by cell. A cell is the output pixels that read the same four logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, cell_source, extent, in_cell, index_type, lerp_weight
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl import terms as tm
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, Inputs

LANES = 2**12 if INTERPRETED.value else 128  # of a program of cells: the columns of a cell are neighbours
SIDE = 128 if INTERPRETED.value else 32  # At most so many columns of a cell are taken at once: a warp sums them.
ROWS = 64 if INTERPRETED.value else 8  # A lane holds at most so many rows.


@triton.jit
def _cell(item, h, w, parity_y, parity_x, EVERY: tl.constexpr):
    """Image, row and column of a cell, numbered in every EVERY-th row and column."""
    rows, columns = (h + EVERY - parity_y) // EVERY, (w + EVERY - parity_x) // EVERY
    row = item // columns
    return row // rows, row % rows * EVERY + parity_y, item % columns * EVERY + parity_x


@triton.jit
def _piece(
    image, cell_y, cell_x, phase, piece_y, piece_x, batch, h, w, H, W,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Output pixels [LANES, ROWS] of a piece of cells [LANES, 1]: their number, place, and whether there is such a one;
    the place of the cell's corners, and the pixels' weights of the lower and of the right ones."""
    low_y, high_y, first_y = cell_source(cell_y, h, H, ALIGNED)
    low_x, high_x, first_x = cell_source(cell_x, w, W, ALIGNED)
    y = first_y + piece_y * ROWS + tl.arange(0, ROWS)[None]
    x = first_x + piece_x * SIDE + phase
    inside = in_cell(y, cell_y, h, H, ALIGNED) & in_cell(x, cell_x, w, W, ALIGNED) & (image < batch)
    weight_y = tl.where((cell_y > 0) & (cell_y < h), lerp_weight(y, low_y, h, H, ALIGNED), 0.0)
    weight_x = tl.where((cell_x > 0) & (cell_x < w), lerp_weight(x, low_x, w, W, ALIGNED), 0.0)
    image = tl.minimum(image, batch - 1)
    place = (image, tl.minimum(y, H - 1), tl.minimum(x, W - 1))
    return (image * H + y) * W + x, place, inside, (image, low_y, high_y, low_x, high_x), (weight_y, weight_x)


@triton.jit
def _corners(source, strides):
    """Offsets of the logits at a cell's corners."""
    image, low_y, high_y, low_x, high_x = source
    top, bottom = image * strides[0] + low_y * strides[2], image * strides[0] + high_y * strides[2]
    left, right = low_x * strides[3], high_x * strides[3]
    return top + left, top + right, bottom + left, bottom + right


@triton.jit
def _class(logits, c, stride_c, corners, corner_weights, FIRST: tl.constexpr):
    """Logits of a class; FIRST is the first one that has a channel."""
    if FIRST:
        z = px._between(logits + tl.maximum(c - FIRST, 0) * stride_c, corners, corner_weights)
        return tl.where(c < FIRST, 0.0, z)
    else:
        return px._between(logits + c * stride_c, corners, corner_weights)


@triton.jit
def _largest(logits, stride_c, corners, corner_weights, CLASSES: tl.constexpr, FIRST: tl.constexpr):
    best = px._between(logits, corners, corner_weights)
    if FIRST:
        best = tl.maximum(best, 0.0)
    for c in range(1, CLASSES - FIRST):
        best = tl.maximum(best, px._between(logits + c * stride_c, corners, corner_weights))
    return best


@triton.jit
def _of_class(
    c, teacher, corner_weights, weight, slopes, CLASSES: tl.constexpr, FIRST: tl.constexpr, KINDS: tl.constexpr
):
    """What terms read of a class: the teacher's logits less the largest, the weight, the slope; None where they are
    not. `teacher` is its logits, their stride, corners and largest ones."""
    t, class_weight, slope = 0.0, 0.0, 0.0
    if tm.DISTILLED & KINDS:
        t = _class(teacher[0], c, teacher[1], teacher[2], corner_weights, FIRST) - teacher[3]
    if tm.SMOOTHED & KINDS:
        class_weight = tm._class_weight(weight, c, CLASSES)
    if tm.OVERLAP & KINDS:
        slope = tl.load(slopes + c)
    return t, class_weight, slope


@triton.jit
def _overlap_sums(
    sums, logits, stride_c, corners, corner_weights, best, total, own, u, CLASSES: tl.constexpr, FIRST: tl.constexpr
):
    """Store I, P and Y of a program's pixels [3, CLASSES]."""
    counts, share = own >= 0, u / total
    for c in range(CLASSES):
        z = _class(logits, c, stride_c, corners, corner_weights, FIRST) - best
        p, mine = tl.where(counts, share * px._exp(z), 0.0), own == c
        tl.store(sums + c, tl.sum(tl.sum(tl.where(mine, p, 0.0), 1)))
        tl.store(sums + (CLASSES + c), tl.sum(tl.sum(p, 1)))
        tl.store(sums + (2 * CLASSES + c), tl.sum(tl.sum(tl.where(mine, u, 0.0), 1)))


@triton.jit(**ANY_NUMBERS)
def score_cells_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w, teacher_n, teacher_c, teacher_h, teacher_w,
    logits, target, weight, pixel_weight, teacher, lse, scores, terms, partials, sums,
    ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2, smoothing, gamma, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    KINDS: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (cells, column of pieces, row of pieces)."""
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    columns, pieces = tl.num_programs(0), tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * columns + tl.program_id(0)
    if tm.BY_IMAGE & KINDS:  # a program has pixels of one image, and those of an image are neighbours
        columns = columns // batch
        group, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        lane = column.to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
        image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
        image = tl.where(image > 0, batch, group)
        piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        program = (group * pieces + piece) * columns + column
    else:
        lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
        image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
    pixel, place, inside, source, corner_weights = _piece(
        image, cell_y, cell_x, lane % SIDE, tl.program_id(2), tl.program_id(1), batch, h, w, H, W, ALIGNED, ROWS, SIDE
    )
    corners = _corners(source, (stride_n, stride_c, stride_h, stride_w))
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    best = _largest(logits, stride_c, corners, corner_weights, CLASSES, FIRST)
    of_teacher = None
    if teacher is not None:
        teacher_c = tl.cast(teacher_c, INDEX)
        corners_t = _corners(source, (teacher_n, teacher_c, teacher_h, teacher_w))
        best_t = _largest(teacher, teacher_c, corners_t, corner_weights, CLASSES, FIRST)
        of_teacher = teacher, teacher_c, corners_t, best_t
    total = tl.zeros([LANES, ROWS], tl.float32)
    over_classes = (total, total, total, total, total)
    OF_PIXELS: tl.constexpr = (tm.SMOOTHED | tm.DISTILLED | tm.TEMPERED) & KINDS
    for c in range(CLASSES):
        z = _class(logits, c, stride_c, corners, corner_weights, FIRST) - best
        total += px._exp(z)
        if (tm.SMOOTHED | tm.DISTILLED) & KINDS:
            t, class_weight, slope = _of_class(c, of_teacher, corner_weights, weight, None, CLASSES, FIRST, OF_PIXELS)
            over_classes = tm._add_classes(over_classes, z, t, class_weight, slope, 1 / temperature, OF_PIXELS)
    if sums is not None:
        own = px._label(labels, place[0], place[1], place[2], inside, CLASSES)
        _overlap_sums(
            sums + program.to(INDEX) * 3 * CLASSES, logits, stride_c, corners, corner_weights, best, total, own,
            px._pixel_weights(labels, pixel, own >= 0), CLASSES, FIRST,
        )  # fmt: skip
    px._record(
        logits, stride_c, corners, corner_weights, best, total, over_classes, pixel, place, inside,
        labels, (step_y, step_x, offset_y, offset_x), weight, lse, scores, terms, partials, program,
        tl.num_programs(0) * pieces, (s0, s1, s2), (g0, g1, g2), smoothing, gamma, temperature,
        CLASSES, FIRST, SCORE, TERMS, MIRROR, KINDS,
    )  # fmt: skip


@triton.jit
def _add(at, values, mask, adds, phase, SIDE: tl.constexpr):
    """Store the sums of SIDE lanes [LANES, 1] each, or add them to what is there."""
    LANES: tl.constexpr = values.shape[0]
    sums = tl.sum(tl.reshape(values, [LANES // SIDE, SIDE]), 1, keep_dims=True)
    sums = tl.reshape(tl.broadcast_to(sums, [LANES // SIDE, SIDE]), [LANES, 1])
    mask &= phase == 0
    tl.store(at, tl.load(at, mask & adds, 0.0) + sums, mask)


@triton.jit(**ANY_NUMBERS)
def gradient_cells_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w, teacher_n, teacher_c, teacher_h, teacher_w,
    logits, target, weight, pixel_weight, teacher, lse, mask, scales, slopes, gradient,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, smoothing, gamma, temperature,
    focal_weight, distillation_weight, parity_y, parity_x,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr, KINDS: tl.constexpr,
    ALIGNED: tl.constexpr, PIECES_Y: tl.constexpr, PIECES_X: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient float32 [batch, channels, h, w] of upsampled logits, from every second row and column of cells.

    They share no logit, so the gradient needs neither atomics nor scratch memory. Those of even rows and columns meet
    every logit, and come first: they set what the others add to.
    """
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
    phase = lane % SIDE
    image, cell_y, cell_x = _cell(lane // SIDE, h, w, parity_y, parity_x, 2)
    exists = image < batch
    below, right = exists & (cell_y > 0) & (cell_y < h), (cell_x > 0) & (cell_x < w)
    corner = (image * (CLASSES - FIRST) * h + tl.maximum(cell_y - 1, 0)) * w + tl.maximum(cell_x - 1, 0)
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    for piece in range(PIECES_Y * PIECES_X):
        pixel, place, inside, source, corner_weights = _piece(
            image, cell_y, cell_x, phase, piece // PIECES_X, piece % PIECES_X, batch, h, w, H, W, ALIGNED, ROWS, SIDE
        )
        corners = _corners(source, (stride_n, stride_c, stride_h, stride_w))
        best = _largest(logits, stride_c, corners, corner_weights, CLASSES, FIRST)
        indices, amounts, factor = px._amounts(
            logits, stride_c, corners, corner_weights, best, pixel, place, inside, labels,
            (step_y, step_x, offset_y, offset_x), weight, lse, mask, scales, ce_weight, boundary_weight, (g0, g1, g2),
            smoothing, focal_weight, gamma, CLASSES, FIRST, TERMS, MIRROR, KINDS,
        )  # fmt: skip
        used, of_teacher, of_slopes, parts = factor != 0, None, slopes, None
        if tm.OF_CLASSES & KINDS:
            if tm.BY_IMAGE & KINDS:
                of_slopes += place[0] * 2 * CLASSES
            if teacher is not None:
                corners_t = _corners(source, (teacher_n, teacher_c, teacher_h, teacher_w))
                best_t = _largest(teacher, tl.cast(teacher_c, INDEX), corners_t, corner_weights, CLASSES, FIRST)
                of_teacher = teacher, tl.cast(teacher_c, INDEX), corners_t, best_t
            zero = tl.zeros_like(factor)
            over_classes = (zero, zero, zero, zero, zero)
            for c in range(CLASSES):
                z = _class(logits, c, stride_c, corners, corner_weights, FIRST) - best
                t, class_weight, slope = _of_class(
                    c, of_teacher, corner_weights, weight, of_slopes, CLASSES, FIRST, KINDS
                )
                over_classes = tm._add_classes(over_classes, z, t, class_weight, slope, 1 / temperature, KINDS)
            log_sum = tl.load(lse + pixel, inside, 0.0)
            ce = px._cross_entropy(logits, indices[0], stride_c, corners, corner_weights, best, log_sum, FIRST)
            amounts, factor, parts, used = tm._add_amounts(
                amounts, factor, indices[0], px._pixel_weights(labels, pixel, inside), ce, log_sum, over_classes,
                weight, of_slopes, scales, ce_weight, smoothing, distillation_weight, temperature, CLASSES, KINDS,
            )  # fmt: skip
        some = tl.max(used.to(tl.int32), 1, keep_dims=True) > 0  # the logits of the others may be NaN
        adds = parity_y + parity_x + piece > 0
        for c in range(FIRST, CLASSES):
            z = _class(logits, c, stride_c, corners, corner_weights, FIRST)
            g = px._gradient(z, best, c, indices, amounts, factor, CLASSES, TERMS)
            if tm.OF_CLASSES & KINDS:
                t, class_weight, slope = _of_class(
                    c, of_teacher, corner_weights, weight, of_slopes, CLASSES, FIRST, KINDS
                )
                g += tm._gradient(z - best, t, class_weight, slope, parts, 1 / temperature, KINDS)
            upper = tl.where(some, tl.sum(g * (1 - corner_weights[0]), 1, keep_dims=True), 0.0)
            lower = tl.where(some, tl.sum(g * corner_weights[0], 1, keep_dims=True), 0.0)
            at = gradient + (corner + (c - FIRST) * h * w)
            _add(at, upper * (1 - corner_weights[1]), exists, adds, phase, SIDE)
            _add(at + 1, upper * corner_weights[1], exists & right, adds, phase, SIDE)
            _add(at + w, lower * (1 - corner_weights[1]), below, adds, phase, SIDE)
            _add(at + w + 1, lower * corner_weights[1], below & right, adds, phase, SIDE)
        tl.debug_barrier()  # before the next piece reads what this one wrote


def score_cells(
    inputs: Inputs, options: Any, lse: Tensor | None, scores: Tensor | None, terms: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Write the maps of upsampled pixels; sums float64 [8, programs], and of overlap [programs, 3, C]."""
    logits, target, *others = inputs
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(inputs, options)
    images = max(batch, 1) if constants["KINDS"] & tm.BY_IMAGE.value else 1
    programs = images * triton.cdiv(batch // images * (h + 1) * (w + 1) * constants["SIDE"], LANES)
    partials, sums = px._partials(target, programs * pieces_x * pieces_y, constants["KINDS"], constants["CLASSES"])
    score_cells_kernel[programs, pieces_x, pieces_y](
        batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(), *px._strides(inputs.teacher),
        logits, target, *others, lse, scores, terms, partials, sums,
        *px._labels(options), *map(float, options.score), *map(float, options.terms), *px._term_floats(options),
        SCORE=px._present(options, options.score), **px._flip(options), **constants,
    )  # fmt: skip
    return partials, sums


def write_gradient(
    inputs: Inputs, options: Any, lse: Tensor, mask: Tensor | None, scales: Tensor, slopes: Tensor | None,
    gradient: Tensor,
) -> None:  # fmt: skip
    logits, target, *others = inputs
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(inputs, options)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cells = batch * ((h + 2 - parity_y) // 2) * ((w + 2 - parity_x) // 2)
        gradient_cells_kernel[(triton.cdiv(cells * constants["SIDE"], LANES),)](
            batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(), *px._strides(inputs.teacher),
            logits, target, *others, lse, mask, scales, slopes, gradient,
            *px._labels(options), *px._floats(options), *px._term_floats(options),
            float(options.focal_weight), float(options.distillation_weight), parity_y, parity_x,
            PIECES_Y=pieces_y, PIECES_X=pieces_x, **px._flip(options), **constants,
        )  # fmt: skip


def _cells(inputs: Inputs, options: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """In how many rows and columns of pieces cells are taken, and constants of a kernel over cells."""
    (batch, channels, h, w), (H, W) = inputs.logits.shape, inputs.target.shape[1:]
    scale_y, scale_x = (_longest(*sides, options.align_corners) for sides in ((h, H), (w, W)))
    rows, side = min(triton.next_power_of_2(scale_y), ROWS), min(triton.next_power_of_2(scale_x), SIDE)
    lanes = batch * (h + 1) * (w + 1) * side + LANES
    largest = max(lanes, batch * (H + 2 * ROWS) * W, 2 * (h + 1) * (H + 2 * ROWS), 2 * (w + 1) * (W + 2 * SIDE))
    maps = [map for map in (inputs.logits, inputs.target, inputs.teacher) if map is not None]
    index = index_type(max(largest, batch * channels * h * w, extent(*maps)))
    constants = {"INDEX": index, "LANES": LANES, "SIDE": side, "ROWS": rows, "ALIGNED": options.align_corners}
    constants |= {"KINDS": tm.kinds(options, inputs.teacher), **px._classes(inputs.logits, options)}
    return (triton.cdiv(scale_y, rows), triton.cdiv(scale_x, side)), constants


def _longest(size: int, out: int, align_corners: bool) -> int:
    """Most output positions of a cell along an axis."""
    return triton.cdiv(out - 1, size - 1) if align_corners and size > 1 and out > 1 else triton.cdiv(out, size)
