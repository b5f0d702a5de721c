"""Upsampled logits: scores and gradient, cell by cell. A cell is the output pixels that read the same four logits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, cell_source, extent, in_cell, index_type, lerp_weight, scratch
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS

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
    image, cell_y, cell_x, phase, piece_y, piece_x, strides, batch, h, w, H, W, ROWS: tl.constexpr, SIDE: tl.constexpr
):
    """Output pixels [LANES, ROWS] of a piece of cells [LANES, 1]: their number, place, and whether there is such a one;
    the offsets of the logits at the cell's corners, and the pixels' weights of the lower and of the right ones."""
    low_y, high_y, first_y = cell_source(cell_y, h, H)
    low_x, high_x, first_x = cell_source(cell_x, w, W)
    y = first_y + piece_y * ROWS + tl.arange(0, ROWS)[None]
    x = first_x + piece_x * SIDE + phase
    inside = in_cell(y, cell_y, h, H) & in_cell(x, cell_x, w, W) & (image < batch)
    weight_y = tl.where((cell_y > 0) & (cell_y < h), lerp_weight(y, low_y, h, H), 0.0)
    weight_x = tl.where((cell_x > 0) & (cell_x < w), lerp_weight(x, low_x, w, W), 0.0)
    image = tl.minimum(image, batch - 1)
    top, bottom = image * strides[0] + low_y * strides[2], image * strides[0] + high_y * strides[2]
    left, right = low_x * strides[3], high_x * strides[3]
    corners = (top + left, top + right, bottom + left, bottom + right)
    place = (image, tl.minimum(y, H - 1), tl.minimum(x, W - 1))
    return (image * H + y) * W + x, place, inside, corners, (weight_y, weight_x)


@triton.jit
def _largest(logits, stride_c, corners, corner_weights, CLASSES: tl.constexpr):
    best = px._between(logits, corners, corner_weights)
    for c in range(1, CLASSES):
        best = tl.maximum(best, px._between(logits + c * stride_c, corners, corner_weights))
    return best


@triton.jit(**ANY_NUMBERS)
def score_cells_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w,
    logits, target, weight, lse, scores, terms, partials,
    ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (cells, column of pieces, row of pieces)."""
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
    image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
    pixel, place, inside, corners, corner_weights = _piece(
        image, cell_y, cell_x, lane % SIDE, tl.program_id(2), tl.program_id(1),
        (stride_n, stride_c, stride_h, stride_w), batch, h, w, H, W, ROWS, SIDE,
    )  # fmt: skip
    best = _largest(logits, stride_c, corners, corner_weights, CLASSES)
    total = tl.zeros([LANES, ROWS], tl.float32)
    for c in range(CLASSES):
        total += px._exp(px._between(logits + c * stride_c, corners, corner_weights) - best)
    columns = tl.num_programs(0)
    px._record(
        logits, stride_c, corners, corner_weights, best, total, pixel, place, inside, (H, W),
        (target, (target_n, target_h, target_w), ignore), (step_y, step_x, offset_y, offset_x), weight,
        lse, scores, terms, partials,
        (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * columns + tl.program_id(0),
        columns * tl.num_programs(1) * tl.num_programs(2), (s0, s1, s2), (g0, g1, g2), CLASSES, SCORE, TERMS, MIRROR,
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
    stride_n, stride_c, stride_h, stride_w, target_n, target_h, target_w,
    logits, target, weight, lse, mask, scales, gradient,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, parity_y, parity_x,
    CLASSES: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr, PIECES_Y: tl.constexpr, PIECES_X: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient float32 [batch, CLASSES, h, w] of upsampled logits, from every second row and column of cells.

    They share no logit, so the gradient needs neither atomics nor scratch memory. Those of even rows and columns meet
    every logit, and come first: they set what the others add to.
    """
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
    phase = lane % SIDE
    image, cell_y, cell_x = _cell(lane // SIDE, h, w, parity_y, parity_x, 2)
    exists = image < batch
    below, right = exists & (cell_y > 0) & (cell_y < h), (cell_x > 0) & (cell_x < w)
    corner = (image * CLASSES * h + tl.maximum(cell_y - 1, 0)) * w + tl.maximum(cell_x - 1, 0)
    for piece in range(PIECES_Y * PIECES_X):
        pixel, place, inside, corners, corner_weights = _piece(
            image, cell_y, cell_x, phase, piece // PIECES_X, piece % PIECES_X,
            (stride_n, stride_c, stride_h, stride_w), batch, h, w, H, W, ROWS, SIDE,
        )  # fmt: skip
        labels, amounts, factor = px._amounts(
            pixel, place, inside, (H, W), (target, (target_n, target_h, target_w), ignore),
            (step_y, step_x, offset_y, offset_x), weight, lse, mask, scales, ce_weight, boundary_weight, (g0, g1, g2),
            CLASSES, TERMS, MIRROR,
        )  # fmt: skip
        best = _largest(logits, stride_c, corners, corner_weights, CLASSES)
        some = tl.max((factor != 0).to(tl.int32), 1, keep_dims=True) > 0  # the logits of the others may be NaN
        adds = parity_y + parity_x + piece > 0
        for c in range(CLASSES):
            z = px._between(logits + c * stride_c, corners, corner_weights)
            g = px._gradient(z, best, c, labels, amounts, factor, CLASSES, TERMS)
            upper = tl.where(some, tl.sum(g * (1 - corner_weights[0]), 1, keep_dims=True), 0.0)
            lower = tl.where(some, tl.sum(g * corner_weights[0], 1, keep_dims=True), 0.0)
            at = gradient + (corner + c * h * w)
            _add(at, upper * (1 - corner_weights[1]), exists, adds, phase, SIDE)
            _add(at + 1, upper * corner_weights[1], exists & right, adds, phase, SIDE)
            _add(at + w, lower * (1 - corner_weights[1]), below, adds, phase, SIDE)
            _add(at + w + 1, lower * corner_weights[1], below & right, adds, phase, SIDE)
        tl.debug_barrier()  # before the next piece reads what this one wrote


def score_cells(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor | None, scores: Tensor | None,
    terms: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the maps of upsampled pixels; sums float64 [4, programs]."""
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(logits, target)
    programs = triton.cdiv(batch * (h + 1) * (w + 1) * constants["SIDE"], LANES)
    partials = scratch(target, torch.float64, 4, programs * pieces_x * pieces_y)
    score_cells_kernel[programs, pieces_x, pieces_y](
        batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(),
        logits, target, weight, lse, scores, terms, partials,
        *px._labels(options), *map(float, options.score), *map(float, options.terms),
        SCORE=px._present(options, options.score), **px._flip(options), **constants,
    )  # fmt: skip
    return partials


def write_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor, mask: Tensor | None,
    scales: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(logits, target)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cells = batch * ((h + 2 - parity_y) // 2) * ((w + 2 - parity_x) // 2)
        gradient_cells_kernel[(triton.cdiv(cells * constants["SIDE"], LANES),)](
            batch, h, w, *target.shape[1:], *logits.stride(), *target.stride(),
            logits, target, weight, lse, mask, scales, gradient,
            *px._labels(options), *px._floats(options), parity_y, parity_x,
            PIECES_Y=pieces_y, PIECES_X=pieces_x, **px._flip(options), **constants,
        )  # fmt: skip


def _cells(logits: Tensor, target: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """In how many rows and columns of pieces cells are taken, and constants of a kernel over cells."""
    (batch, classes, h, w), (H, W) = logits.shape, target.shape[1:]
    scale_y, scale_x = triton.cdiv(H, h), triton.cdiv(W, w)
    rows, side = min(triton.next_power_of_2(scale_y), ROWS), min(triton.next_power_of_2(scale_x), SIDE)
    lanes = batch * (h + 1) * (w + 1) * side + LANES
    largest = max(lanes, batch * (H + 2 * ROWS) * W, 2 * (h + 1) * (H + 2 * ROWS), 2 * (w + 1) * (W + 2 * SIDE))
    index = index_type(max(largest, batch * classes * h * w, extent(logits, target)))
    constants = {"CLASSES": classes, "INDEX": index, "LANES": LANES, "SIDE": side, "ROWS": rows}
    return (triton.cdiv(scale_y, rows), triton.cdiv(scale_x, side)), constants
