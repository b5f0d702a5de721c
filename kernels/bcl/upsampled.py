"""Upsampled logits: scores and gradient, cell by cell. A cell is the output pixels that read the same four logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, cell_source, extent, in_cell, index_type, lerp, lerp_weight
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl import terms as tm
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, INF, Inputs

LANES = 2**11 if INTERPRETED.value else 128  # of a program of cells: those of a cell are neighbours
SIDE = 64 if INTERPRETED.value else 32  # At most so many lanes have a cell: a warp adds up what they have.
COLUMNS = 2  # A lane holds at most so many columns, SIDE apart, which share what is read of the corners,
ROWS = 64 if INTERPRETED.value else 8  # and so many rows.
WARP = tl.constexpr(LANES if INTERPRETED.value else 32)  # lanes that add up without shared memory
FAR_BELOW = tl.constexpr(2.0**-60)
"""A sum of exponentials below this takes the largest logit in place of a bound: a float32 ends at 2^-126."""


@triton.jit
def _cell(item, h, w, parity_y, parity_x, EVERY: tl.constexpr):
    """Image, row and column of a cell, numbered in every EVERY-th row and column."""
    rows, columns = (h + EVERY - parity_y) // EVERY, (w + EVERY - parity_x) // EVERY
    row = item // columns
    return row // rows, row % rows * EVERY + parity_y, item % columns * EVERY + parity_x


@triton.jit
def _piece(
    image, cell_y, cell_x, phase, piece_y, piece_x, batch, h, w, H, W,
    ALIGNED: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Output pixels [LANES, COLUMNS, ROWS] of a piece of cells [LANES, 1, 1]: their number, place, and whether there is
    such a one; the place of the cell's corners, and the pixels' weights of the lower and of the right ones."""
    low_y, high_y, first_y = cell_source(cell_y, h, H, ALIGNED)
    low_x, high_x, first_x = cell_source(cell_x, w, W, ALIGNED)
    first_y, first_x = first_y + piece_y * ROWS, first_x + piece_x * (COLUMNS * SIDE) + phase
    down, right = tl.arange(0, ROWS)[None, None].to(W.dtype), tl.arange(0, COLUMNS)[None, :, None].to(W.dtype) * SIDE
    y, x = first_y + down, first_x + right
    inside = in_cell(y, cell_y, h, H, ALIGNED) & in_cell(x, cell_x, w, W, ALIGNED) & (image < batch)
    weight_y = tl.where((cell_y > 0) & (cell_y < h), lerp_weight(y, low_y, h, H, ALIGNED), 0.0)
    weight_x = tl.where((cell_x > 0) & (cell_x < w), lerp_weight(x, low_x, w, W, ALIGNED), 0.0)
    image = tl.minimum(image, batch - 1)
    place = (image, tl.minimum(y, H - 1), tl.minimum(x, W - 1))
    pixel = (image * H + first_y) * W + first_x + (down * W + right)  # the latter is common to all lanes
    return pixel, place, inside, (image, low_y, high_y, low_x, high_x), (weight_y, weight_x)


@triton.jit
def _corners(logits, source, strides):
    """Pointers to the logits at a cell's corners."""
    image, low_y, high_y, low_x, high_x = source
    top, bottom = image * strides[0] + low_y * strides[2], image * strides[0] + high_y * strides[2]
    left, right = low_x * strides[3], high_x * strides[3]
    return logits + (top + left), logits + (top + right), logits + (bottom + left), logits + (bottom + right)


@triton.jit
def _class(c, corners, stride_c, corner_weights, FIRST: tl.constexpr):
    """Logits of a class; FIRST is the first one that has a channel."""
    if FIRST:
        return tl.where(c < FIRST, 0.0, px._between(corners, tl.maximum(c - FIRST, 0) * stride_c, corner_weights))
    else:
        return px._between(corners, c * stride_c, corner_weights)


@triton.jit
def _largest(corners, stride_c, corner_weights, CLASSES: tl.constexpr, FIRST: tl.constexpr):
    best = px._between(corners, 0, corner_weights)
    if FIRST:
        best = tl.maximum(best, 0.0)
    for c in range(1, CLASSES - FIRST):
        best = tl.maximum(best, px._between(corners, c * stride_c, corner_weights))
    return best


@triton.jit
def _bound(corners, stride_c, corner_weights, CLASSES: tl.constexpr, FIRST: tl.constexpr):
    """What no logit of a pixel is above: the largest ones of its four corners, interpolated. It takes no pass over
    the pixels' own logits, and any number will do that is not so far above them that exponentials end."""
    a, b = tl.load(corners[0]).to(tl.float32), tl.load(corners[1]).to(tl.float32)
    c, d = tl.load(corners[2]).to(tl.float32), tl.load(corners[3]).to(tl.float32)
    if FIRST:
        a, b, c, d = tl.maximum(a, 0.0), tl.maximum(b, 0.0), tl.maximum(c, 0.0), tl.maximum(d, 0.0)
    for k in range(1, CLASSES - FIRST):
        a = tl.maximum(a, tl.load(corners[0] + k * stride_c).to(tl.float32))
        b = tl.maximum(b, tl.load(corners[1] + k * stride_c).to(tl.float32))
        c = tl.maximum(c, tl.load(corners[2] + k * stride_c).to(tl.float32))
        d = tl.maximum(d, tl.load(corners[3] + k * stride_c).to(tl.float32))
    return lerp(lerp(a, b, corner_weights[1]), lerp(c, d, corner_weights[1]), corner_weights[0])


@triton.jit
def _softmax(
    corners, stride_c, corner_weights, best, of_teacher, weight, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Sums over the classes of pixels: of exp(z - best), and those that terms take."""
    total, shift = tl.zeros_like(best), tm._shift(best)
    over_classes = (total, total, total, total, total)
    for c in range(CLASSES):
        z = _class(c, corners, stride_c, corner_weights, FIRST)
        e = tm._exp_below(z, shift)
        total += e
        if (tm.SMOOTHED | tm.DISTILLED) & KINDS:
            t, class_weight, slope = _of_class(c, of_teacher, corner_weights, weight, None, CLASSES, FIRST, KINDS)
            over_classes = tm._add_classes(over_classes, z - best, e, t, class_weight, slope, 1 / temperature, KINDS)
    return total, over_classes


@triton.jit
def _of_class(
    c, teacher, corner_weights, weight, slopes, CLASSES: tl.constexpr, FIRST: tl.constexpr, KINDS: tl.constexpr
):
    """What terms read of a class: the teacher's logits less the largest, the weight, the slope; None where they are
    not. `teacher` is its corners, their stride, and the largest ones."""
    t, class_weight, slope = 0.0, 0.0, 0.0
    if tm.DISTILLED & KINDS:
        t = _class(c, teacher[0], teacher[1], corner_weights, FIRST) - teacher[2]
    if tm.SMOOTHED & KINDS:
        class_weight = tm._class_weight(weight, c, CLASSES)
    if tm.OVERLAP & KINDS:
        slope = tl.load(slopes + c)
    return t, class_weight, slope


@triton.jit
def _over_warp(values):
    """Sums of the lanes of each warp."""
    LANES: tl.constexpr = values.shape[0]
    return tl.sum(tl.reshape(values, [LANES // WARP, WARP * (values.numel // LANES)]), 1)


@triton.jit
def _overlap_sums(
    sums, corners, stride_c, corner_weights, best, total, own, u, CLASSES: tl.constexpr, FIRST: tl.constexpr
):
    """Store I, P and Y of the pixels of each warp [warps, 3, CLASSES]."""
    counts, share, shift = own >= 0, u / total, tm._shift(best)
    warp = sums + tl.arange(0, u.shape[0] // WARP) * (3 * CLASSES)
    for c in range(CLASSES):
        z = _class(c, corners, stride_c, corner_weights, FIRST)
        p, mine = tl.where(counts, share * tm._exp_below(z, shift), 0.0), own == px._kept(c)
        tl.store(warp + c, _over_warp(tl.where(mine, p, 0.0)))
        tl.store(warp + (CLASSES + c), _over_warp(p))
        tl.store(warp + (2 * CLASSES + c), _over_warp(tl.where(mine, u, 0.0)))


@triton.jit(**ANY_NUMBERS)
def score_cells_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w, teacher_n, teacher_c, teacher_h, teacher_w,
    logits, target, weight, pixel_weight, teacher, largest, lse, scores, terms, decided, partials, chosen, sums,
    ignore, step_y, step_x, offset_y, offset_x, tau, s0, s1, s2, g0, g1, g2, smoothing, gamma, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    KINDS: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (cells, column of pieces, row of pieces)."""
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    columns, pieces = tl.num_programs(0), tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * columns + tl.program_id(0)
    if tm.BY_IMAGE & KINDS:  # a program has pixels of one image, and those of an image are neighbours
        columns = columns // batch
        group, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        lane = column.to(INDEX) * LANES + tl.arange(0, LANES)[:, None, None]
        image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
        image = tl.where(image > 0, batch, group)
        piece = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        program = (group * pieces + piece) * columns + column
    else:
        lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None, None]
        image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
    pixel, place, inside, source, corner_weights = _piece(
        image, cell_y, cell_x, lane % SIDE, tl.program_id(2), tl.program_id(1), batch, h, w, H, W,
        ALIGNED, SIDE, COLUMNS, ROWS,
    )  # fmt: skip
    corners = _corners(logits, source, (stride_n, stride_c, stride_h, stride_w))
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    of_teacher = None
    if teacher is not None:
        teacher_c = tl.cast(teacher_c, INDEX)
        corners_t = _corners(teacher, source, (teacher_n, teacher_c, teacher_h, teacher_w))
        of_teacher = corners_t, teacher_c, _largest(corners_t, teacher_c, corner_weights, CLASSES, FIRST)
    OF_PIXELS: tl.constexpr = (tm.SMOOTHED | tm.DISTILLED | tm.TEMPERED) & KINDS
    if tm.TEMPERED & KINDS:  # sums of other powers could end before
        best = _largest(corners, stride_c, corner_weights, CLASSES, FIRST)
    else:
        best = _bound(corners, stride_c, corner_weights, CLASSES, FIRST)
    total, over_classes = _softmax(
        corners, stride_c, corner_weights, best, of_teacher, weight, temperature, CLASSES, FIRST, OF_PIXELS
    )
    if tl.max((inside & (total < FAR_BELOW)).to(tl.int32)) > 0:
        best = _largest(corners, stride_c, corner_weights, CLASSES, FIRST)
        total, over_classes = _softmax(
            corners, stride_c, corner_weights, best, of_teacher, weight, temperature, CLASSES, FIRST, OF_PIXELS
        )
    if largest is not None:
        tl.store(largest + pixel, best, inside)
    if sums is not None:
        own = px._label(labels, place[0], place[1], place[2], inside, CLASSES)
        u, sums = px._pixel_weights(labels, pixel, own >= 0), sums + program.to(INDEX) * (LANES // WARP * 3 * CLASSES)
        _overlap_sums(sums, corners, stride_c, corner_weights, best, total, own, u, CLASSES, FIRST)
    px._record(
        corners, stride_c, corner_weights, best, total, over_classes, pixel, place, inside,
        labels, (step_y, step_x, offset_y, offset_x), weight, lse, scores, terms, decided, partials, chosen, program,
        tl.num_programs(0) * pieces, tau, (s0, s1, s2), (g0, g1, g2), smoothing, gamma, temperature,
        CLASSES, FIRST, SCORE, TERMS, MIRROR, KINDS,
    )  # fmt: skip


@triton.jit
def _add(at, values, mask, adds, phase, SIDE: tl.constexpr):
    """Store the sums of SIDE lanes [LANES, 1, 1] each, or add them to what is there."""
    LANES: tl.constexpr = values.shape[0]
    sums = tl.sum(tl.reshape(values, [LANES // SIDE, SIDE]), 1, keep_dims=True)
    sums = tl.reshape(tl.broadcast_to(sums, [LANES // SIDE, SIDE]), [LANES, 1, 1])
    mask &= phase == 0
    tl.store(at, tl.load(at, mask & adds, 0.0) + sums, mask)


@triton.jit(**ANY_NUMBERS)
def gradient_cells_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w, teacher_n, teacher_c, teacher_h, teacher_w,
    logits, target, weight, pixel_weight, teacher, largest, lse, mask, scales, slopes, gradient,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, smoothing, gamma, temperature,
    focal_weight, distillation_weight, parity_y, parity_x,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr, KINDS: tl.constexpr,
    ALIGNED: tl.constexpr, PIECES_Y: tl.constexpr, PIECES_X: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient float32 [batch, channels, h, w] of upsampled logits, from every second row and column of cells.

    They share no logit, so the gradient needs neither atomics nor scratch memory. Those of even rows and columns meet
    every logit, and come first: they set what the others add to.
    """
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None, None]
    phase = lane % SIDE
    image, cell_y, cell_x = _cell(lane // SIDE, h, w, parity_y, parity_x, 2)
    exists = image < batch
    below, right = exists & (cell_y > 0) & (cell_y < h), (cell_x > 0) & (cell_x < w)
    corner = (image * (CLASSES - FIRST) * h + tl.maximum(cell_y - 1, 0)) * w + tl.maximum(cell_x - 1, 0)
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    for piece in range(PIECES_Y * PIECES_X):
        pixel, place, inside, source, corner_weights = _piece(
            image, cell_y, cell_x, phase, piece // PIECES_X, piece % PIECES_X, batch, h, w, H, W,
            ALIGNED, SIDE, COLUMNS, ROWS,
        )  # fmt: skip
        corners = _corners(logits, source, (stride_n, stride_c, stride_h, stride_w))
        best = tl.load(largest + pixel, inside, INF)  # where no pixel is every exponential is 0
        shift = tm._shift(best)
        indices, amounts, factor = px._amounts(
            corners, stride_c, corner_weights, best, pixel, place, inside, labels,
            (step_y, step_x, offset_y, offset_x), weight, lse, mask, scales, ce_weight, boundary_weight, (g0, g1, g2),
            smoothing, focal_weight, gamma, CLASSES, FIRST, TERMS, MIRROR, KINDS,
        )  # fmt: skip
        used, of_teacher, of_slopes, parts = factor != 0, None, slopes, None
        if tm.OF_CLASSES & KINDS:
            if tm.BY_IMAGE & KINDS:
                of_slopes += place[0] * 2 * CLASSES
            if teacher is not None:
                step_t = tl.cast(teacher_c, INDEX)
                corners_t = _corners(teacher, source, (teacher_n, teacher_c, teacher_h, teacher_w))
                of_teacher = corners_t, step_t, _largest(corners_t, step_t, corner_weights, CLASSES, FIRST)
            zero = tl.zeros_like(factor)
            over_classes = (zero, zero, zero, zero, zero)
            for c in range(CLASSES):
                z = _class(c, corners, stride_c, corner_weights, FIRST)
                t, class_weight, slope = _of_class(
                    c, of_teacher, corner_weights, weight, of_slopes, CLASSES, FIRST, KINDS
                )
                over_classes = tm._add_classes(
                    over_classes, z - best, tm._exp_below(z, shift), t, class_weight, slope, 1 / temperature, KINDS
                )
            log_sum = tl.load(lse + pixel, inside, 0.0)
            ce = px._cross_entropy(corners, indices[0], stride_c, corner_weights, best, log_sum, CLASSES, FIRST)
            amounts, factor, parts, used = tm._add_amounts(
                amounts, factor, indices[0], px._pixel_weights(labels, pixel, inside), ce, log_sum, over_classes,
                weight, of_slopes, scales, ce_weight, smoothing, distillation_weight, temperature, CLASSES, KINDS,
            )  # fmt: skip
        some = (
            tl.max(tl.max(used.to(tl.int32), 2, keep_dims=True), 1, keep_dims=True) > 0
        )  # the logits of the others may be NaN
        adds = parity_y + parity_x + piece > 0
        amounts, factor = (px._kept(amounts[0]), px._kept(amounts[1]), px._kept(amounts[2])), px._kept(factor)
        for c in range(FIRST, CLASSES):
            z = _class(c, corners, stride_c, corner_weights, FIRST)
            e = tm._exp_below(z, shift)
            g = px._gradient(e, px._kept(c), indices, amounts, factor, CLASSES, TERMS)
            if tm.OF_CLASSES & KINDS:
                t, class_weight, slope = _of_class(
                    c, of_teacher, corner_weights, weight, of_slopes, CLASSES, FIRST, KINDS
                )
                g += tm._gradient(z - best, e, t, class_weight, slope, parts, 1 / temperature, KINDS)
            upper = tl.where(some, tl.sum(g * (1 - corner_weights[0]), 2, keep_dims=True), 0.0)
            lower = tl.where(some, tl.sum(g * corner_weights[0], 2, keep_dims=True), 0.0)
            at = gradient + (corner + (c - FIRST) * h * w)
            _add(at, tl.sum(upper * (1 - corner_weights[1]), 1), exists, adds, phase, SIDE)
            _add(at + 1, tl.sum(upper * corner_weights[1], 1), exists & right, adds, phase, SIDE)
            _add(at + w, tl.sum(lower * (1 - corner_weights[1]), 1), below, adds, phase, SIDE)
            _add(at + w + 1, tl.sum(lower * corner_weights[1], 1), below & right, adds, phase, SIDE)
        tl.debug_barrier()  # before the next piece reads what this one wrote


def score_cells(
    inputs: Inputs, options: Any, largest: Tensor | None, lse: Tensor | None, scores: Tensor | None,
    terms: Tensor | None, decided: Tensor | None,
) -> px.Sums:  # fmt: skip
    """Write the maps of upsampled pixels."""
    logits, target, *others = inputs
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(inputs, options, True)
    images = max(batch, 1) if constants["KINDS"] & tm.BY_IMAGE.value else 1
    programs = images * triton.cdiv(batch // images * (h + 1) * (w + 1) * constants["SIDE"], LANES)
    programs_of_all, warps = programs * pieces_x * pieces_y, LANES // WARP.value
    sums = px._sums(target, programs_of_all, warps, constants["KINDS"], constants["CLASSES"], decided)
    score_cells_kernel[programs, pieces_x, pieces_y](
        batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(), *px._strides(inputs.teacher),
        logits, target, *others, largest, lse, scores, terms, decided, *sums, *px._labels(options), px._tau(options),
        *map(float, options.score), *map(float, options.terms), *px._term_floats(options),
        SCORE=px._present(options, options.score), **px._flip(options), **constants,
    )  # fmt: skip
    return sums


def write_gradient(
    inputs: Inputs, options: Any, largest: Tensor, lse: Tensor, mask: Tensor | None, scales: Tensor,
    slopes: Tensor | None, gradient: Tensor,
) -> None:  # fmt: skip
    logits, target, *others = inputs
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(inputs, options, False)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cells = batch * ((h + 2 - parity_y) // 2) * ((w + 2 - parity_x) // 2)
        gradient_cells_kernel[(triton.cdiv(cells * constants["SIDE"], LANES),)](
            batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(), *px._strides(inputs.teacher),
            logits, target, *others, largest, lse, mask, scales, slopes, gradient,
            *px._labels(options), *px._floats(options), *px._term_floats(options),
            float(options.focal_weight), float(options.distillation_weight), parity_y, parity_x,
            PIECES_Y=pieces_y, PIECES_X=pieces_x, **px._flip(options), **constants,
        )  # fmt: skip


def scored_at_once(kinds: int, index: tl.dtype, score: int) -> int:
    """Columns that a lane scores at most: with terms or offsets of 64 bits registers are for one, and two of
    cross-entropy alone spill on sm_100."""
    return COLUMNS if kinds == 0 and index == tl.int32 and score else 1


def differentiated_at_once(kinds: int) -> int:
    """Columns that a lane has the gradient of at most."""
    return COLUMNS if kinds in (0, tm.OVERLAP.value) else 1


def _cells(inputs: Inputs, options: Any, scores: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """In how many rows and columns of pieces cells are taken, and constants of a kernel over cells."""
    (batch, channels, h, w), (H, W) = inputs.logits.shape, inputs.target.shape[1:]
    scale_y, scale_x = (_longest(*sides, options.align_corners) for sides in ((h, H), (w, W)))
    rows, width = min(triton.next_power_of_2(scale_y), ROWS), min(triton.next_power_of_2(scale_x), SIDE * COLUMNS)
    lanes = batch * (h + 1) * (w + 1) * width + LANES
    beyond = 2 * (h + 1) * (H + 2 * ROWS), 2 * (w + 1) * (W + 2 * width)
    maps = [map for map in (inputs.logits, inputs.target, inputs.teacher) if map is not None]
    index = index_type(max(lanes, batch * (H + 2 * ROWS) * W, *beyond, batch * channels * h * w, extent(*maps)))
    kinds = tm.kinds(options, inputs.teacher)
    score = px._present(options, options.score)
    columns = min(width, scored_at_once(kinds, index, score) if scores else differentiated_at_once(kinds))
    side = min(width // columns, SIDE)
    constants = {"INDEX": index, "LANES": LANES, "SIDE": side, "COLUMNS": columns, "ROWS": rows}
    constants |= {"ALIGNED": options.align_corners, "KINDS": kinds, **px._classes(inputs.logits, options)}
    return (triton.cdiv(scale_y, rows), triton.cdiv(scale_x, side * columns)), constants


def _longest(size: int, out: int, align_corners: bool) -> int:
    """Most output positions of a cell along an axis."""
    return triton.cdiv(out - 1, size - 1) if align_corners and size > 1 and out > 1 else triton.cdiv(out, size)
