"""Upsampled logits: scores and gradient, cell by cell. A cell is the output pixels that read the same four logits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, cell_source, extent, in_cell, index_type, lerp_weight, scratch
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl import terms as tm
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, INF, Inputs

LEAST = tl.constexpr(-(2.0**126))
"""Of exponents: of the least float32, that of a class that is left out, the product would be infinite, and no number
between two nodes. What is infinite itself stays so."""
NODES = 2**14 if INTERPRETED.value else 256  # of a program
LANES = 2**11 if INTERPRETED.value else 128  # of a program of cells: those of a cell are neighbours
SIDE = 64 if INTERPRETED.value else 32  # At most so many lanes have a cell: a warp adds up what they have.
COLUMNS = 2  # A lane holds at most so many columns, SIDE apart, which share what is read of the corners,
ROWS = 64 if INTERPRETED.value else 8  # and so many rows.
WARP = tl.constexpr(LANES if INTERPRETED.value else 32)  # lanes that add up without shared memory
FAR_BELOW = tl.constexpr(2.0**-60)
"""A sum of exponentials below this takes the largest one in place of the nodes': a float32 ends at 2^-126."""


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


@triton.jit(**ANY_NUMBERS)
def nodes_kernel(
    count, h, w, stride_n, stride_c, stride_h, stride_w, logits, nodes,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, INDEX: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Exponents of logits less the largest of their node [batch, CLASSES, h, w]; FIRST is the first class that has a
    channel: of those before logits are 0.

    Interpolated, they are the exponents of a pixel's classes less a number that is common to all of them, and none is
    above 0: a softmax needs no more.
    """
    stride_c, plane = tl.cast(stride_c, INDEX), h.to(INDEX) * w.to(INDEX)
    node = tl.program_id(0).to(INDEX) * NODES + tl.arange(0, NODES)
    exists = node < count
    image, y, x = px._place(node, h.to(INDEX), w.to(INDEX))
    logits += image * stride_n + y * stride_h + x * stride_w
    nodes += image * (CLASSES * plane) + node % plane
    best = tl.load(logits, exists).to(tl.float32)
    for c in range(1, CLASSES - FIRST):
        best = tl.maximum(best, tl.load(logits + c * stride_c, exists).to(tl.float32))
    if FIRST:
        best = tl.maximum(best, 0.0)
        tl.store(nodes, -best * tm.LOG2_E, exists)
    for c in range(FIRST, CLASSES):
        z = tl.load(logits + (c - FIRST) * stride_c, exists).to(tl.float32)
        exponent = (z - best) * tm.LOG2_E
        tl.store(nodes + c * plane, tl.where((exponent < LEAST) & (z > -INF), LEAST, exponent), exists)


@triton.jit
def _corners(nodes, source, h, w, CLASSES: tl.constexpr):
    """Pointers to the exponents of the first class at a cell's corners."""
    image, low_y, high_y, low_x, high_x = source
    nodes += image * (CLASSES * h * w)
    top, bottom = low_y * w, high_y * w
    return nodes + (top + low_x), nodes + (top + high_x), nodes + (bottom + low_x), nodes + (bottom + high_x)


@triton.jit
def _largest(corners, plane, corner_weights, CLASSES: tl.constexpr):
    best = px._between(corners, 0, corner_weights, None)
    for c in range(1, CLASSES):
        best = tl.maximum(best, px._between(corners, c * plane, corner_weights, None))
    return best


@triton.jit
def _softmax(
    corners, plane, corner_weights, best, of_teacher, weight, temperature, CLASSES: tl.constexpr, KINDS: tl.constexpr
):
    """Sums over the classes of pixels: of exponentials, of exponents less `best`, and those that terms take."""
    total = tl.zeros_like(corner_weights[0] + corner_weights[1])
    over_classes = (total, total, total, total, total)
    for c in range(CLASSES):
        x = px._between(corners, c * plane, corner_weights, best)
        e = tm._exp2(x)
        total += e
        if (tm.SMOOTHED | tm.DISTILLED) & KINDS:
            t, class_weight, slope = _of_class(c, of_teacher, plane, corner_weights, weight, None, CLASSES, KINDS)
            over_classes = tm._add_classes(over_classes, x * tm.LN_2, e, t, class_weight, slope, 1 / temperature, KINDS)
    return total, over_classes


@triton.jit
def _of_class(c, teacher, plane, corner_weights, weight, slopes, CLASSES: tl.constexpr, KINDS: tl.constexpr):
    """What terms read of a class: the teacher's logits less the largest, the weight, the slope; None where they are
    not. `teacher` is its corners, and the largest exponents."""
    t, class_weight, slope = 0.0, 0.0, 0.0
    if tm.DISTILLED & KINDS:
        t = px._between(teacher[0], c * plane, corner_weights, teacher[1]) * tm.LN_2
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
def _overlap_sums(sums, corners, plane, corner_weights, log_sum, own, u, CLASSES: tl.constexpr):
    """Store I, P and Y of the pixels of each warp [warps, 3, CLASSES]."""
    counts, best = own >= 0, log_sum * tm.LOG2_E
    warp = sums + tl.arange(0, u.shape[0] // WARP) * (3 * CLASSES)
    for c in range(CLASSES):
        x = px._between(corners, c * plane, corner_weights, best)
        p, mine = tl.where(counts, u * tm._exp2(x), 0.0), own == px._kept(c)
        tl.store(warp + c, _over_warp(tl.where(mine, p, 0.0)))
        tl.store(warp + (CLASSES + c), _over_warp(p))
        tl.store(warp + (2 * CLASSES + c), _over_warp(tl.where(mine, u, 0.0)))


@triton.jit(**ANY_NUMBERS)
def score_cells_kernel(
    batch, h, w, H, W, target_n, target_h, target_w,
    nodes, target, weight, pixel_weight, teacher_nodes, lse, scores, terms, decided, partials, chosen, sums,
    ignore, step_y, step_x, offset_y, offset_x, tau, s0, s1, s2, g0, g1, g2, smoothing, gamma, temperature,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    KINDS: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (cells, column of pieces, row of pieces)."""
    h, w, H, W = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX)
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
    corners, plane = _corners(nodes, source, h, w, CLASSES), h * w
    labels = target, (target_n, target_h, target_w), ignore, pixel_weight, (H, W)
    best, of_teacher = None, None
    if teacher_nodes is not None:
        corners_t = _corners(teacher_nodes, source, h, w, CLASSES)
        of_teacher = corners_t, _largest(corners_t, plane, corner_weights, CLASSES)
    if tm.TEMPERED & KINDS:  # sums of other powers could end before
        best = _largest(corners, plane, corner_weights, CLASSES)
    OF_PIXELS: tl.constexpr = (tm.SMOOTHED | tm.DISTILLED | tm.TEMPERED) & KINDS
    total, over_classes = _softmax(
        corners, plane, corner_weights, best, of_teacher, weight, temperature, CLASSES, OF_PIXELS
    )
    log_sum = tm._log(total)
    if best is None:
        if tl.max((inside & (total < FAR_BELOW)).to(tl.int32)) > 0:
            far = _largest(corners, plane, corner_weights, CLASSES)
            total, _ = _softmax(corners, plane, corner_weights, far, None, None, temperature, CLASSES, 0)
            log_sum = far * tm.LN_2 + tm._log(total)
        if lse is not None:
            tl.store(lse + pixel, log_sum, inside)
    elif lse is not None:
        tl.store(lse + pixel, best * tm.LN_2 + log_sum, inside)
    if sums is not None:
        own = px._label(labels, place[0], place[1], place[2], inside, CLASSES)
        u, sums = px._pixel_weights(labels, pixel, own >= 0), sums + program.to(INDEX) * (LANES // WARP * 3 * CLASSES)
        of_all = log_sum if best is None else best * tm.LN_2 + log_sum
        _overlap_sums(sums, corners, plane, corner_weights, of_all, own, u, CLASSES)
    px._record(
        corners, plane, corner_weights, best, log_sum, over_classes, pixel, place, inside,
        labels, (step_y, step_x, offset_y, offset_x), weight, scores, terms, decided, partials, chosen, program,
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
    batch, h, w, H, W, target_n, target_h, target_w,
    nodes, target, weight, pixel_weight, teacher_nodes, lse, mask, scales, slopes, gradient,
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
    h, w, H, W = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None, None]
    phase, plane = lane % SIDE, h * w
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
        corners = _corners(nodes, source, h, w, CLASSES)
        best = tl.load(lse + pixel, inside, INF) * tm.LOG2_E  # where no pixel is every exponential is 0
        log_sum = tl.zeros_like(best)  # exponentials of what is below these are probabilities
        own, amounts, total = px._amounts(
            corners, plane, corner_weights, best, log_sum, pixel, place, inside, labels,
            (step_y, step_x, offset_y, offset_x), weight, mask, scales, ce_weight, boundary_weight, (g0, g1, g2),
            smoothing, focal_weight, gamma, CLASSES, FIRST, TERMS, MIRROR, KINDS,
        )  # fmt: skip
        used, of_teacher, of_slopes, parts = total != 0, None, slopes, None
        if tm.OF_CLASSES & KINDS:
            if tm.BY_IMAGE & KINDS:
                of_slopes += place[0] * 2 * CLASSES
            if teacher_nodes is not None:
                corners_t = _corners(teacher_nodes, source, h, w, CLASSES)
                of_teacher = corners_t, _largest(corners_t, plane, corner_weights, CLASSES)
            over_classes = (log_sum, log_sum, log_sum, log_sum, log_sum)
            for c in range(CLASSES):
                x = px._between(corners, c * plane, corner_weights, best)
                t, class_weight, slope = _of_class(
                    c, of_teacher, plane, corner_weights, weight, of_slopes, CLASSES, KINDS
                )
                over_classes = tm._add_classes(
                    over_classes, x * tm.LN_2, tm._exp2(x), t, class_weight, slope, 1 / temperature, KINDS
                )
            ce = px._cross_entropy(corners, own[0], plane, corner_weights, best, log_sum, CLASSES, FIRST)
            amounts, total, parts, used = tm._add_amounts(
                amounts, total, own[0], px._pixel_weights(labels, pixel, inside), ce, 1.0, over_classes,
                weight, of_slopes, scales, ce_weight, smoothing, distillation_weight, temperature, CLASSES, KINDS,
            )  # fmt: skip
        some = (
            tl.max(tl.max(used.to(tl.int32), 2, keep_dims=True), 1, keep_dims=True) > 0
        )  # the logits of the others may be NaN
        adds = parity_y + parity_x + piece > 0
        own, lower_weight, upper_weight = px._numbers(own), corner_weights[0], 1 - corner_weights[0]
        ALONE: tl.constexpr = TERMS & 6 == 0 and tm.OF_CLASSES & KINDS == 0  # all is taken at the label of a pixel
        if ALONE:
            upper_weight, lower_weight = px._kept(total * upper_weight), px._kept(total * lower_weight)
        amounts, total = (px._kept(amounts[0]), px._kept(amounts[1]), px._kept(amounts[2])), px._kept(total)
        for c in range(FIRST, CLASSES):
            x = px._between(corners, c * plane, corner_weights, best)
            p = tm._exp2(x)
            if ALONE and CLASSES > 1:
                g = p - px._is(own[0], px._kept(c))
            else:
                g = px._gradient(p, px._kept(c), own, amounts, total, CLASSES, TERMS)
            if tm.OF_CLASSES & KINDS:
                t, class_weight, slope = _of_class(
                    c, of_teacher, plane, corner_weights, weight, of_slopes, CLASSES, KINDS
                )
                g += tm._gradient(x * tm.LN_2, p, t, class_weight, slope, parts, 1 / temperature, KINDS)
            upper, lower = tl.sum(g * upper_weight, 2, keep_dims=True), tl.sum(g * lower_weight, 2, keep_dims=True)
            at = gradient + (corner + (c - FIRST) * plane)
            left_weight = 1 - corner_weights[1]
            _add(at, _of_some(some, upper * left_weight), exists, adds, phase, SIDE)
            _add(at + 1, _of_some(some, upper * corner_weights[1]), exists & right, adds, phase, SIDE)
            _add(at + w, _of_some(some, lower * left_weight), below, adds, phase, SIDE)
            _add(at + w + 1, _of_some(some, lower * corner_weights[1]), below & right, adds, phase, SIDE)
        tl.debug_barrier()  # before the next piece reads what this one wrote


@triton.jit
def _of_some(some, values):
    """Sums over the columns of lanes, those that have any part."""
    return tl.where(some, tl.sum(values, 1, keep_dims=True), 0.0)


def nodes_of(logits: Tensor, options: Any) -> Tensor:
    """Exponents of nodes float32 [N, classes, h, w]."""
    (batch, _, h, w), constants = logits.shape, px._classes(logits, options)
    nodes = scratch(logits, torch.float32, batch, constants["CLASSES"], h, w)
    index = index_type(max(extent(logits), nodes.numel() + NODES))
    nodes_kernel[(triton.cdiv(batch * h * w, NODES),)](
        batch * h * w, h, w, *logits.stride(), logits, nodes, INDEX=index, NODES=NODES, **constants
    )
    return nodes


def score_cells(
    inputs: Inputs, options: Any, nodes: Tensor, teacher_nodes: Tensor | None, lse: Tensor | None,
    scores: Tensor | None, terms: Tensor | None, decided: Tensor | None,
) -> px.Sums:  # fmt: skip
    """Write the maps of upsampled pixels; nodes and teacher_nodes are what `nodes_of` makes."""
    (batch, _, h, w), target = nodes.shape, inputs.target
    (pieces_y, pieces_x), constants = _cells(inputs, options, True)
    images = max(batch, 1) if constants["KINDS"] & tm.BY_IMAGE.value else 1
    programs = images * triton.cdiv(batch // images * (h + 1) * (w + 1) * constants["SIDE"], LANES)
    programs_of_all, warps = programs * pieces_x * pieces_y, LANES // WARP.value
    sums = px._sums(target, programs_of_all, warps, constants["KINDS"], constants["CLASSES"], decided)
    score_cells_kernel[programs, pieces_x, pieces_y](
        batch, h, w, *target.shape[1:], *target.stride(),
        nodes, target, inputs.weight, inputs.pixel_weight, teacher_nodes, lse, scores, terms, decided, *sums,
        *px._labels(options), px._tau(options),
        *map(float, options.score), *map(float, options.terms), *px._term_floats(options),
        SCORE=px._present(options, options.score), **px._flip(options), **constants,
    )  # fmt: skip
    return sums


def write_gradient(
    inputs: Inputs, options: Any, nodes: Tensor, teacher_nodes: Tensor | None, lse: Tensor, mask: Tensor | None,
    scales: Tensor, slopes: Tensor | None, gradient: Tensor,
) -> None:  # fmt: skip
    (batch, _, h, w), target = nodes.shape, inputs.target
    (pieces_y, pieces_x), constants = _cells(inputs, options, False)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cells = batch * ((h + 2 - parity_y) // 2) * ((w + 2 - parity_x) // 2)
        gradient_cells_kernel[(triton.cdiv(cells * constants["SIDE"], LANES),)](
            batch, h, w, *target.shape[1:], *target.stride(),
            nodes, target, inputs.weight, inputs.pixel_weight, teacher_nodes, lse, mask, scales, slopes, gradient,
            *px._labels(options), *px._floats(options), *px._term_floats(options),
            float(options.focal_weight), float(options.distillation_weight), parity_y, parity_x,
            PIECES_Y=pieces_y, PIECES_X=pieces_x, **px._flip(options), **constants,
        )  # fmt: skip


def scored_at_once(kinds: int, index: tl.dtype, score: int) -> int:
    """Columns that a lane scores at most: with other terms, or overlap and a score, or offsets of 64 bits registers are
    for one."""
    few = kinds == 0 or kinds == tm.OVERLAP.value and not score
    return COLUMNS if few and index == tl.int32 else 1


def differentiated_at_once(kinds: int, terms: int) -> int:
    """Columns that a lane has the gradient of at most: the more, the fewer sums are exchanged between lanes."""
    if kinds == 0 and terms & 6 == 0:
        return 2 * COLUMNS
    return COLUMNS if kinds in (0, tm.OVERLAP.value) else 1


def _cells(inputs: Inputs, options: Any, scores: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """In how many rows and columns of pieces cells are taken, and constants of a kernel over cells."""
    (batch, _, h, w), (H, W) = inputs.logits.shape, inputs.target.shape[1:]
    scale_y, scale_x = (_longest(*sides, options.align_corners) for sides in ((h, H), (w, W)))
    rows, width = min(triton.next_power_of_2(scale_y), ROWS), min(triton.next_power_of_2(scale_x), SIDE * COLUMNS)
    lanes = batch * (h + 1) * (w + 1) * width + LANES
    beyond = 2 * (h + 1) * (H + 2 * ROWS), 2 * (w + 1) * (W + 2 * width)
    constants = px._classes(inputs.logits, options)
    nodes = batch * constants["CLASSES"] * h * w
    index = index_type(max(lanes, batch * (H + 2 * ROWS) * W, *beyond, nodes, extent(inputs.target)))
    kinds = tm.kinds(options, inputs.teacher)
    if scores:
        columns = scored_at_once(kinds, index, px._present(options, options.score))
    else:
        columns = differentiated_at_once(kinds, px._present(options, options.terms))
    columns = min(width, columns)
    side = min(width // columns, SIDE)
    constants |= {"INDEX": index, "LANES": LANES, "SIDE": side, "COLUMNS": columns, "ROWS": rows}
    constants |= {"ALIGNED": options.align_corners, "KINDS": kinds}
    return (triton.cdiv(scale_y, rows), triton.cdiv(scale_x, side * columns)), constants


def _longest(size: int, out: int, align_corners: bool) -> int:
    """Most output positions of a cell along an axis."""
    return triton.cdiv(out - 1, size - 1) if align_corners and size > 1 and out > 1 else triton.cdiv(out, size)
