"""The Boundary Corrected Loss as a fixed sequence of kernels, without a wait:

score       labels and logits to the cross-entropy and the score of each pixel
candidates  non-maximum suppression, and a histogram of the scores that are left
threshold   the score from which candidates are selected, by rank
select      mask and boundary term of the selected pixels
finish      the loss, its figures, and the scales of its gradient
gradient    of upsampled logits; at full resolution `backward` has a kernel of its own

With upsampling, a cell is the output pixels that read the same four logits: there are (h + 1) x (w + 1). Tiles are
[pixels, classes] and [columns, rows]: the compiler lays lanes along the first axis where it sees no unit stride.
Atomics count integers alone, so every run gives the same bits. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import (
    INTERPRETED,
    cell_source,
    extent,
    in_cell,
    index_type,
    lerp,
    lerp_weight,
    load_corners,
    scratch,
)
from bcmfnet.kernels.autotune import AotCase

PIXELS = 2**14 if INTERPRETED.value else 512  # of a program; one a lane where it reads logits
HELD = 32  # classes that a lane holds; the gradient reads more of them twice
LANES = 2**12 if INTERPRETED.value else 128  # of a program of cells: the columns of a cell are neighbours
SIDE = 128 if INTERPRETED.value else 32  # most columns of a cell that are taken at once: they are summed within a warp
ROWS = 64 if INTERPRETED.value else 8  # most rows, which a lane holds

BYTE = tl.constexpr(256)
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
def _label(target, image, y, x, strides, mask, ignore, CLASSES: tl.constexpr):
    """Labels, -1 where they are masked or ignored, -2 where they are no class."""
    label = tl.load(target + (image * strides[0] + y * strides[1] + x * strides[2]))
    label = label if label.dtype == tl.int64 else label.to(tl.int32)
    known = tl.where((label >= 0) & (label < CLASSES), label, -2)
    return tl.where(mask & (label != ignore), known, -1).to(tl.int32)


@triton.jit
def _weights(weight, label):
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
def _between(logits, corners, shares):
    a, b, c, d = load_corners(logits, corners)
    return lerp(lerp(a, b, shares[1]), lerp(c, d, shares[1]), shares[0])


@triton.jit
def _cross_entropy(logits, label, stride_c, corners, shares, best, log_sum):
    at = tl.maximum(label, 0) * stride_c
    if shares is None:
        z = tl.load(logits + (at + corners[0])).to(tl.float32)
    else:
        z = _between(logits, (at + corners[0], at + corners[1], at + corners[2], at + corners[3]), shares)
    value = log_sum - (z - best)
    return tl.where(label >= 0, tl.where(value < 0, 0.0, value), 0.0)  # below 0 is a rounding


@triton.jit
def _sum(values):
    """Sum in float64 of the lanes' sums in float32."""
    return tl.sum(tl.sum(values, 1).to(tl.float64))


@triton.jit
def _record(
    logits, stride_c, corners, shares, best, total, pixel, place, inside, H, W, target, strides, weight,
    lse, scores, terms, partials, program, programs, ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """Maps of pixels, from max z and sum exp(z - max z); and their sums: weighted cross-entropy, weight (NaN with a
    label that is no class), valid pixels, and a NaN where the selection meets one, which it cannot see."""
    image, y, x = place
    log_sum = tl.log(total)
    if lse is not None:
        tl.store(lse + pixel, log_sum, inside)
    own = _label(target, image, y, x, strides, inside, ignore, CLASSES)
    ce = _cross_entropy(logits, own, stride_c, corners, shares, best, log_sum)
    partials += program
    tl.store(partials + 2 * programs, tl.sum((own != -1).to(tl.int32)))
    w = _weights(weight, own)
    tl.store(partials, _sum(tl.where(w != 0, w * ce, 0.0)))
    tl.store(partials + programs, _sum(tl.where(own == -2, NAN, w)))
    hazard = tl.zeros_like(ce)
    if scores is not None:
        score, term = _plus(hazard, s0, ce, SCORE & 1), _plus(hazard, g0, ce, TERMS & 1)
        if (SCORE | TERMS) & 2:
            other = _flipped(y, H, step_y, offset_y, MIRROR)
            label = _label(target, image, other, x, strides, own >= 0, ignore, CLASSES)
            ce = _cross_entropy(logits, label, stride_c, corners, shares, best, log_sum)
            score, term = _plus(score, s1, ce, SCORE & 2), _plus(term, g1, ce, TERMS & 2)
        if (SCORE | TERMS) & 4:
            other = _flipped(x, W, step_x, offset_x, MIRROR)
            label = _label(target, image, y, other, strides, own >= 0, ignore, CLASSES)
            ce = _cross_entropy(logits, label, stride_c, corners, shares, best, log_sum)
            score, term = _plus(score, s2, ce, SCORE & 4), _plus(term, g2, ce, TERMS & 4)
        hazard = tl.where(score == score, 0.0, NAN)
        steps = tl.where(score == score, score * Q_SCALE + 0.5, 0.0)
        tl.store(scores + pixel, tl.where(steps > Q_MAX, Q_MAX, steps).to(tl.int32).to(tl.uint16), inside)
        tl.store(terms + pixel, tl.where(w != 0, w * term, 0.0), inside)
    tl.store(partials + 3 * programs, tl.sum(hazard))


@triton.jit
def _load_classes(pixels, first, stride_c, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Logits [pixels, CHUNK] of the classes from `first` on."""
    classes = first + tl.arange(0, CHUNK)[None]
    return tl.load(pixels + classes * stride_c, classes < CLASSES, -INF).to(tl.float32)


@triton.jit(**ANY_NUMBERS)
def score_pixels_kernel(
    logits, target, weight, lse, scores, terms, partials, count, H, W, stride_n, stride_c, stride_h, stride_w,
    target_n, target_h, target_w, ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """At full resolution; logits are read once."""
    stride_c = tl.cast(stride_c, INDEX)
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < count
    place = _place(tl.minimum(pixel, count - 1), H.to(INDEX), W.to(INDEX))
    at = place[0] * stride_n + place[1] * stride_h + place[2] * stride_w
    best, total = tl.full([PIXELS, 1], -INF, tl.float32), tl.zeros([PIXELS, 1], tl.float32)
    for first in range(0, CLASSES, CHUNK):
        z = _load_classes(logits + at, first, stride_c, CLASSES, CHUNK)
        largest = tl.maximum(best, tl.max(z, 1, keep_dims=True))
        base = tl.where(largest == -INF, 0.0, largest)  # without a finite one: -inf - -inf
        total = total * _exp(best - base) + tl.sum(_exp(z - base), 1, keep_dims=True)
        best = largest
    _record(
        logits, stride_c, (at,), None, best, total, pixel, place, inside, H, W, target,
        (target_n, target_h, target_w), weight, lse, scores, terms, partials, tl.program_id(0), tl.num_programs(0),
        ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2, CLASSES, SCORE, TERMS, MIRROR,
    )  # fmt: skip


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
    the offsets of the logits at the cell's corners, and the pixels' shares of the lower and of the right ones."""
    low_y, high_y, first_y = cell_source(cell_y, h, H)
    low_x, high_x, first_x = cell_source(cell_x, w, W)
    y = first_y + piece_y * ROWS + tl.arange(0, ROWS)[None]
    x = first_x + piece_x * SIDE + phase
    inside = in_cell(y, cell_y, h, H) & in_cell(x, cell_x, w, W) & (image < batch)
    share_y = tl.where((cell_y > 0) & (cell_y < h), lerp_weight(y, low_y, h, H), 0.0)
    share_x = tl.where((cell_x > 0) & (cell_x < w), lerp_weight(x, low_x, w, W), 0.0)
    image = tl.minimum(image, batch - 1)
    top, bottom = image * strides[0] + low_y * strides[2], image * strides[0] + high_y * strides[2]
    left, right = low_x * strides[3], high_x * strides[3]
    corners = (top + left, top + right, bottom + left, bottom + right)
    place = (image, tl.minimum(y, H - 1), tl.minimum(x, W - 1))
    return (image * H + y) * W + x, place, inside, corners, (share_y, share_x)


@triton.jit
def _largest(logits, stride_c, corners, shares, CLASSES: tl.constexpr):
    best = _between(logits, corners, shares)
    for c in range(1, CLASSES):
        best = tl.maximum(best, _between(logits + c * stride_c, corners, shares))
    return best


@triton.jit(**ANY_NUMBERS)
def score_cells_kernel(
    logits, target, weight, lse, scores, terms, partials, batch, h, w, H, W, stride_n, stride_c, stride_h, stride_w,
    target_n, target_h, target_w, ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2,
    CLASSES: tl.constexpr, SCORE: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With upsampling; program (cells, column of pieces, row of pieces)."""
    h, w, H, W, stride_c = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX), tl.cast(stride_c, INDEX)
    lane = tl.program_id(0).to(INDEX) * LANES + tl.arange(0, LANES)[:, None]
    image, cell_y, cell_x = _cell(lane // SIDE, h, w, 0, 0, 1)
    pixel, place, inside, corners, shares = _piece(
        image, cell_y, cell_x, lane % SIDE, tl.program_id(2), tl.program_id(1),
        (stride_n, stride_c, stride_h, stride_w), batch, h, w, H, W, ROWS, SIDE,
    )  # fmt: skip
    best = _largest(logits, stride_c, corners, shares, CLASSES)
    total = tl.zeros([LANES, ROWS], tl.float32)
    for c in range(CLASSES):
        total += _exp(_between(logits + c * stride_c, corners, shares) - best)
    columns = tl.num_programs(0)
    _record(
        logits, stride_c, corners, shares, best, total, pixel, place, inside, H, W, target,
        (target_n, target_h, target_w), weight, lse, scores, terms, partials,
        (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * columns + tl.program_id(0),
        columns * tl.num_programs(1) * tl.num_programs(2),
        ignore, step_y, step_x, offset_y, offset_x, s0, s1, s2, g0, g1, g2, CLASSES, SCORE, TERMS, MIRROR,
    )  # fmt: skip


@triton.jit(**ANY_NUMBERS)
def candidates_kernel(
    scores, mask, histogram, count, H, W,
    PER_IMAGE: tl.constexpr, REACH: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Pixels whose score is the largest around; and their number by score, [low byte, high byte]: neighbouring scores
    are frequent together, so their counts are not neighbours."""
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < count
    H, W = H.to(INDEX), W.to(INDEX)
    image, y, x = _place(pixel, H, W)
    q = tl.load(scores + pixel, inside, 0).to(tl.int32)
    largest = q
    for down in range(-REACH, REACH + 1):
        for right in range(-REACH, REACH + 1):
            near = inside & (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
            largest = tl.maximum(largest, tl.load(scores + (pixel + down * W + right), near, 0).to(tl.int32))
    candidate = (q == largest) & (q > 0)
    tl.store(mask + pixel, candidate.to(tl.uint8), inside)
    if PER_IMAGE:
        histogram += image * BYTE * BYTE
    tl.atomic_add(histogram + (q % BYTE * BYTE + q // BYTE), 1, candidate, sem="relaxed")


@triton.jit
def _kth_largest(histogram, by_high, rank):
    """The rank-th largest score of a histogram and its sums by high byte; any where there are fewer."""
    byte = tl.arange(0, BYTE)
    high = tl.maximum(tl.sum((tl.cumsum(by_high, 0, reverse=True) >= rank).to(tl.int32)) - 1, 0)
    above = tl.sum(tl.where(byte > high, by_high, 0))
    by_low = tl.load(histogram + byte * BYTE + high).to(tl.int64)
    low = tl.sum((above + tl.cumsum(by_low, 0, reverse=True) >= rank).to(tl.int32)) - 1
    return high * BYTE + tl.maximum(low, 0)


@triton.jit(**ANY_NUMBERS)
def threshold_kernel(histogram, threshold, tau, ratio, min_kept, max_kept, BLOCK: tl.constexpr):
    """t = min(tau, K-th largest) of M candidates, K = min(M, max(min_kept, floor(ratio * M))), tau where K is 0; at
    least the max_kept-th largest. `ratio` is the bits of a float64: an argument would be float32."""
    histogram += tl.program_id(0).to(tl.int64) * BYTE * BYTE
    by_high = tl.zeros([BYTE], tl.int64)
    for first in range(0, BYTE, BLOCK):
        low = first + tl.arange(0, BLOCK)[:, None]
        by_high += tl.sum(tl.load(histogram + low * BYTE + tl.arange(0, BYTE)[None]).to(tl.int64), 0)
    candidates = tl.sum(by_high)
    share = (ratio.to(tl.int64).to(tl.float64, bitcast=True) * candidates.to(tl.float64)).to(tl.int64)
    kept = tl.minimum(tl.maximum(share, min_kept), candidates)
    t = tl.where(kept > 0, tl.minimum(_kth_largest(histogram, by_high, kept), tau), tau)
    limit = _kth_largest(histogram, by_high, max_kept)
    tl.store(threshold + tl.program_id(0), tl.where(max_kept <= candidates, tl.maximum(t, limit), t))


@triton.jit(**ANY_NUMBERS)
def select_kernel(
    scores, terms, threshold, mask, partials, count, plane,
    PER_IMAGE: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of the candidates in the mask those from the threshold on; and their sums: boundary term and number."""
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < count
    t = tl.load(threshold + pixel // plane, inside, 0) if PER_IMAGE else tl.load(threshold)
    selected = (tl.load(mask + pixel, inside, 0) != 0) & (tl.load(scores + pixel, inside, 0).to(tl.int32) >= t)
    tl.store(mask + pixel, selected.to(tl.uint8), inside)
    partials += tl.program_id(0)
    tl.store(partials, tl.sum(tl.load(terms + pixel, selected, 0.0).to(tl.float64)))
    tl.store(partials + tl.num_programs(0), tl.sum(selected.to(tl.int32)))


@triton.jit(**ANY_NUMBERS)
def finish_kernel(
    partials, programs, select_partials, selections, ce_weight, boundary_weight,
    loss, ce, boundary, selected, valid, scales, BY_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, figures and scales from the sums of all programs, added in a fixed order."""
    ce_sum, weight, pixels = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    hard, chosen = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first = 0
    while first < programs:  # the interpreter takes no argument for the end of a range
        i = first + tl.arange(0, BLOCK)
        ce_sum += tl.load(partials + i, i < programs, 0.0)
        weight += tl.load(partials + programs + i, i < programs, 0.0)
        pixels += tl.load(partials + 2 * programs + i, i < programs, 0.0)
        hard += tl.load(partials + 3 * programs + i, i < programs, 0.0)
        first += BLOCK
    first = 0
    while first < selections:
        i = first + tl.arange(0, BLOCK)
        hard += tl.load(select_partials + i, i < selections, 0.0)
        chosen += tl.load(select_partials + selections + i, i < selections, 0.0)
        first += BLOCK
    weight, pixels, chosen = tl.sum(weight), tl.sum(pixels), tl.sum(chosen)
    weight = tl.where(tl.abs(weight) < INF, weight, NAN)
    divisor = pixels if BY_VALID else chosen
    ce_scale = 1 / tl.where(weight <= 0, 1.0, weight)
    boundary_scale = tl.where(weight == weight, 1 / tl.where(divisor > 0, divisor, 1.0), NAN)
    ce_mean, boundary_mean = tl.sum(ce_sum) * ce_scale, tl.sum(hard) * boundary_scale
    total = tl.where(ce_weight != 0, ce_weight * ce_mean, 0.0)
    total += tl.where(boundary_weight != 0, boundary_weight * boundary_mean, 0.0)
    tl.store(loss, tl.where(weight == weight, total, NAN))
    tl.store(ce, ce_mean)
    tl.store(boundary, boundary_mean)
    tl.store(selected, chosen.to(tl.int64))
    tl.store(valid, pixels.to(tl.int64))
    if scales is not None:
        tl.store(scales, ce_scale)
        tl.store(scales + 1, boundary_scale)


@triton.jit
def _amounts(
    pixel, place, inside, H, W, target, strides, weight, lse, mask, scales, ignore, step_y, step_x, offset_y, offset_x,
    ce_weight, boundary_weight, g0, g1, g2, CLASSES: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """Labels of pixels and what the gradient takes there; and the factor of exp(z - max z), which spreads their sum."""
    image, y, x = place
    own = _label(target, image, y, x, strides, inside, ignore, CLASSES)
    w = _weights(weight, own)
    hard = tl.zeros_like(w)
    if mask is not None:
        selected = tl.load(mask + pixel, inside, 0) != 0
        hard = tl.where(selected, w * (boundary_weight * tl.load(scales + 1)), 0.0)
    of_own = tl.where(ce_weight != 0, w * (ce_weight * tl.load(scales)), 0.0) + g0 * hard
    rows, columns, of_rows, of_columns = own, own, tl.zeros_like(w), tl.zeros_like(w)
    if TERMS & 2:
        rows = _label(target, image, _flipped(y, H, step_y, offset_y, MIRROR), x, strides, own >= 0, ignore, CLASSES)
        of_rows = tl.where(rows >= 0, g1 * hard, 0.0)
    if TERMS & 4:
        columns = _label(target, image, y, _flipped(x, W, step_x, offset_x, MIRROR), strides, own >= 0, ignore, CLASSES)
        of_columns = tl.where(columns >= 0, g2 * hard, 0.0)
    total = of_own + of_rows + of_columns
    share = tl.where(total != 0, total * _exp(-tl.load(lse + pixel, inside, 0.0)), 0.0)
    return (own, rows, columns), (of_own, of_rows, of_columns), share


@triton.jit
def _gradient(z, best, classes, labels, amounts, share, CLASSES: tl.constexpr, TERMS: tl.constexpr):
    """share * exp(z - best) less what is taken at the labels; NaN may come of a share of 0 too."""
    taken = tl.where(classes == labels[0], amounts[0], 0.0)
    if TERMS & 2:
        taken += tl.where(classes == labels[1], amounts[1], 0.0)
    if TERMS & 4:
        taken += tl.where(classes == labels[2], amounts[2], 0.0)
    return tl.zeros_like(z) if CLASSES == 1 else share * _exp(z - best) - taken


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
    logits, target, weight, lse, mask, scales, gradient, batch, h, w, H, W, stride_n, stride_c, stride_h, stride_w,
    target_n, target_h, target_w, ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2,
    parity_y, parity_x,
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
        pixel, place, inside, corners, shares = _piece(
            image, cell_y, cell_x, phase, piece // PIECES_X, piece % PIECES_X,
            (stride_n, stride_c, stride_h, stride_w), batch, h, w, H, W, ROWS, SIDE,
        )  # fmt: skip
        labels, amounts, share = _amounts(
            pixel, place, inside, H, W, target, (target_n, target_h, target_w), weight, lse, mask, scales,
            ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, CLASSES, TERMS, MIRROR,
        )  # fmt: skip
        best = _largest(logits, stride_c, corners, shares, CLASSES)
        some = tl.max((share != 0).to(tl.int32), 1, keep_dims=True) > 0  # the logits of the others may be NaN
        adds = parity_y + parity_x + piece > 0
        for c in range(CLASSES):
            z = _between(logits + c * stride_c, corners, shares)
            g = _gradient(z, best, c, labels, amounts, share, CLASSES, TERMS)
            upper = tl.where(some, tl.sum(g * (1 - shares[0]), 1, keep_dims=True), 0.0)
            lower = tl.where(some, tl.sum(g * shares[0], 1, keep_dims=True), 0.0)
            at = gradient + (corner + c * h * w)
            _add(at, upper * (1 - shares[1]), exists, adds, phase, SIDE)
            _add(at + 1, upper * shares[1], exists & right, adds, phase, SIDE)
            _add(at + w, lower * (1 - shares[1]), below, adds, phase, SIDE)
            _add(at + w + 1, lower * shares[1], below & right, adds, phase, SIDE)
        tl.debug_barrier()  # before the next piece reads what this one wrote


@triton.jit(**ANY_NUMBERS)
def gradient_pixels_kernel(
    grad, logits, target, weight, lse, mask, scales, result, count, H, W, stride_n, stride_c, stride_h, stride_w,
    result_n, result_c, result_h, result_w, target_n, target_h, target_w,
    ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2,
    CLASSES: tl.constexpr, TERMS: tl.constexpr, MIRROR: tl.constexpr,
    INDEX: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """At full resolution, times `grad`. The result may be the logits: a pixel's are all read before one is written."""
    stride_c, result_c = tl.cast(stride_c, INDEX), tl.cast(result_c, INDEX)
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < count
    place = _place(tl.minimum(pixel, count - 1), H.to(INDEX), W.to(INDEX))
    image, y, x = place
    pixels = logits + (image * stride_n + y * stride_h + x * stride_w)
    result += image * result_n + y * result_h + x * result_w
    labels, amounts, share = _amounts(
        pixel, place, inside, H, W, target, (target_n, target_h, target_w), weight, lse, mask, scales,
        ignore, step_y, step_x, offset_y, offset_x, ce_weight, boundary_weight, g0, g1, g2, CLASSES, TERMS, MIRROR,
    )  # fmt: skip
    z = _load_classes(pixels, 0, stride_c, CLASSES, CHUNK)
    best = tl.max(z, 1, keep_dims=True)
    for first in range(CHUNK, CLASSES, CHUNK):
        other = _load_classes(pixels, first, stride_c, CLASSES, CHUNK)
        best = tl.maximum(best, tl.max(other, 1, keep_dims=True))
    tl.debug_barrier()
    factor = tl.load(grad)
    for first in range(0, CLASSES, CHUNK):
        if CLASSES > CHUNK:
            z = _load_classes(pixels, first, stride_c, CLASSES, CHUNK)
        classes = first + tl.arange(0, CHUNK)[None]
        g = tl.where(share != 0, factor * _gradient(z, best, classes, labels, amounts, share, CLASSES, TERMS), 0.0)
        tl.store(result + classes * result_c, g.to(result.dtype.element_ty), inside & (classes < CLASSES))


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, needs_grad: bool, loss: Tensor, ce: Tensor,
    boundary: Tensor, selected: Tensor, valid: Tensor, threshold: Tensor, lse: Tensor, mask: Tensor, scales: Tensor,
    gradient: Tensor,
) -> None:  # fmt: skip
    """Write the loss, its figures and what backward reads, as bcmfnet/ops/bcl.py allocates them.

    logits float [N, C, h, w] and target integer [N, H, W] of any strides, weight float32 [C], options BclOptions.
    """
    upsampled, selects = logits.shape[2:] != target.shape[1:], options.boundary_weight != 0
    if upsampled or not needs_grad:
        lse = scratch(target, torch.float32) if needs_grad else None
        scales = scratch(target, torch.float32, 2) if needs_grad else None
        mask = scratch(target, torch.uint8) if selects else None
    scores = scratch(target, torch.uint16) if selects else None
    terms = scratch(target, torch.float32) if selects else None
    with torch.cuda.device_of(logits):
        score = _score_cells if upsampled else _score_pixels
        partials = score(logits, target, weight, options, lse, scores, terms)
        if selects:
            select_partials = _select(options, scores, terms, threshold, mask)
        else:
            select_partials = scratch(target, torch.float64, 2, 0)
            threshold.fill_(_tau(options))
            if mask is not None:
                mask.zero_()
        finish_kernel[(1,)](
            partials, partials.shape[1], select_partials, select_partials.shape[1], *_floats(options)[:2],
            loss, ce, boundary, selected, valid, scales, BY_VALID=options.norm == "valid", BLOCK=4096, num_warps=16,
        )  # fmt: skip
        if upsampled and needs_grad:
            _low_gradient(logits, target, weight, options, lse, mask, scales, gradient)


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor, mask: Tensor,
    scales: Tensor, result: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of full-resolution logits, times grad, of any strides; the result may be the logits."""
    with torch.cuda.device_of(logits):
        pixels = PIXELS // 2  # of 512 the channels_last ones spill
        gradient_pixels_kernel[(triton.cdiv(target.numel(), pixels),)](
            grad, logits, target, weight, lse, mask, scales, result, target.numel(), *target.shape[1:],
            *logits.stride(), *result.stride(), *_labels(target, options), *_floats(options),
            **_flip(options), **_pixels(pixels, target, logits, result),
        )  # fmt: skip


def _score_pixels(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor | None, scores: Tensor | None,
    terms: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the maps of pixels at full resolution; sums float64 [4, programs]."""
    programs = triton.cdiv(target.numel(), PIXELS)
    partials = scratch(target, torch.float64, 4, programs)
    score_pixels_kernel[(programs,)](
        logits, target, weight, lse, scores, terms, partials, target.numel(), *target.shape[1:], *logits.stride(),
        *_labels(target, options), *map(float, options.score), *map(float, options.terms),
        SCORE=_present(options, options.score), **_flip(options), **_pixels(PIXELS, target, logits),
    )  # fmt: skip
    return partials


def _score_cells(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor | None, scores: Tensor | None,
    terms: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the maps of upsampled pixels; sums float64 [4, programs]."""
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(logits, target)
    programs = triton.cdiv(batch * (h + 1) * (w + 1) * constants["SIDE"], LANES)
    partials = scratch(target, torch.float64, 4, programs * pieces_x * pieces_y)
    score_cells_kernel[programs, pieces_x, pieces_y](
        logits, target, weight, lse, scores, terms, partials, batch, h, w, *target.shape[1:], *logits.stride(),
        *_labels(target, options), *map(float, options.score), *map(float, options.terms),
        SCORE=_present(options, options.score), **_flip(options), **constants,
    )  # fmt: skip
    return partials


def _select(options: Any, scores: Tensor, terms: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
    """Write thresholds and mask; sums float64 [2, programs] of the selected pixels."""
    count, (_, H, W) = scores.numel(), scores.shape
    programs = triton.cdiv(count, PIXELS)
    constants = {"PER_IMAGE": options.per_image, "INDEX": index_type(count + PIXELS), "PIXELS": PIXELS}
    histogram = torch.zeros((threshold.numel(), BYTE.value**2), dtype=torch.int32, device=scores.device)
    reach = min(options.nms // 2, max(H, W))
    candidates_kernel[(programs,)](scores, mask, histogram, count, H, W, REACH=reach, **constants)
    ratio = struct.unpack("q", struct.pack("d", options.ratio))[0]
    most = 2**62 if options.max_kept is None else min(options.max_kept, 2**62)
    threshold_kernel[(threshold.numel(),)](
        histogram, threshold, _tau(options), ratio, min(options.min_kept, most), most, BLOCK=32, num_warps=8
    )
    partials = scratch(scores, torch.float64, 2, programs)
    select_kernel[(programs,)](scores, terms, threshold, mask, partials, count, H * W, **constants)
    return partials


def _low_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Any, lse: Tensor, mask: Tensor | None,
    scales: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    (batch, _, h, w), (pieces_y, pieces_x), constants = logits.shape, *_cells(logits, target)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cells = batch * ((h + 2 - parity_y) // 2) * ((w + 2 - parity_x) // 2)
        gradient_cells_kernel[(triton.cdiv(cells * constants["SIDE"], LANES),)](
            logits, target, weight, lse, mask, scales, gradient, batch, h, w, *target.shape[1:], *logits.stride(),
            *_labels(target, options), *_floats(options), parity_y, parity_x,
            PIECES_Y=pieces_y, PIECES_X=pieces_x, **_flip(options), **constants,
        )  # fmt: skip


def _tau(options: Any) -> int:
    return math.floor(min(Q_SCALE.value * options.threshold + 0.5, Q_MAX.value))


def _labels(target: Tensor, options: Any) -> tuple[int, ...]:
    return (*target.stride(), options.ignore_index, *options.step, *options.offset)


def _floats(options: Any) -> tuple[float, ...]:
    return tuple(map(float, (options.ce_weight, options.boundary_weight, *options.terms)))


def _present(options: Any, coefficients: tuple[float, ...]) -> int:
    """A bit for each coefficient that there is; none without a boundary term."""
    return sum(1 << i for i, k in enumerate(coefficients) if k != 0 and options.boundary_weight != 0)


def _flip(options: Any) -> dict[str, Any]:
    return {"TERMS": _present(options, options.terms), "MIRROR": options.flip == "mirror"}


def _pixels(pixels: int, target: Tensor, *logits: Tensor) -> dict[str, Any]:
    """Constants of a kernel over pixels at full resolution."""
    classes = logits[0].shape[1]
    return {
        "CLASSES": classes, "CHUNK": min(triton.next_power_of_2(classes), HELD), "PIXELS": pixels,
        "INDEX": index_type(max(target.numel() + PIXELS, extent(target, *logits))), "num_warps": max(pixels // 32, 1),
    }  # fmt: skip


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


def aot_cases() -> Iterator[AotCase]:
    """Each kernel as calls meet it: dtypes, layouts, scales, class weights and flipped labels or none, classes held or
    read twice, memory of more than 2^31 elements."""
    numbers = dict.fromkeys(SIZES + OPTIONS + ANY_NUMBERS["do_not_specialize_on_alignment"], "i32") | {"ratio": "i64"}
    floats = ("s0", "s1", "s2", "g0", "g1", "g2", "ce_weight", "boundary_weight")
    types = numbers | dict.fromkeys(floats, "fp32") | {"scores": "*u16", "mask": "*u8", "histogram": "*i32"}
    types |= dict.fromkeys(("weight", "lse", "terms", "scales", "gradient", "grad", "loss", "ce", "boundary"), "*fp32")
    types |= {"partials": "*fp64", "select_partials": "*fp64", "threshold": "*i32", "selected": "*i64", "valid": "*i64"}

    def case(function: Any, num_warps: int, logits: str = "fp32", target: str = "u8", **constants: Any) -> AotCase:
        known = types | {"logits": f"*{logits}", "result": f"*{logits}", "target": f"*{target}"}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {name: known[name] for name in function.arg_names if name in known and name not in constants}
        name = " ".join([function.__name__, logits, target, *(f"{key} {value}" for key, value in constants.items())])
        return AotCase(name, function, signature, constants, num_warps)

    usual = {"CLASSES": 19, "SCORE": 6, "TERMS": 7, "MIRROR": False, "INDEX": tl.int32, "step_y": 1, "target_w": 1}
    kinds = [("w", usual | {"logits": logits}) for logits in ("fp32", "fp16", "bf16")]
    kinds += [("c", usual), ("c", usual | {"logits": "bf16", "TERMS": 1}), ("w", usual | {"TERMS": 1, "weight": None})]
    kinds += [("w", usual | dict.fromkeys(("weight", "scores", "terms", "mask")) | {"SCORE": 0, "TERMS": 0})]
    kinds += [("w", usual | {"CLASSES": 150, "target": "i64", "MIRROR": True}), ("w", usual | {"INDEX": tl.int64})]
    for unit, kind in kinds:
        constants = kind | {f"stride_{unit}": 1, "CHUNK": min(triton.next_power_of_2(kind["CLASSES"]), HELD)}
        yield case(score_pixels_kernel, 16, **constants, PIXELS=PIXELS)
        yield case(gradient_pixels_kernel, 8, **constants | {f"result_{unit}": 1}, PIXELS=PIXELS // 2)
        for side in (2, 8) if kind == kinds[0][1] else (8,):
            cells = constants | {"LANES": LANES, "SIDE": side, "ROWS": side, "PIECES_Y": 1, "PIECES_X": 1}
            yield case(score_cells_kernel, 4, **cells)
            yield case(gradient_cells_kernel, 4, **cells)
    for per_image in (False, True):
        pixels = {"PER_IMAGE": per_image, "INDEX": tl.int32, "PIXELS": PIXELS}
        yield from (case(candidates_kernel, 4, REACH=reach, **pixels) for reach in range(4))
        yield case(select_kernel, 4, **pixels)
    yield case(threshold_kernel, 8, BLOCK=32)
    yield case(finish_kernel, 16, BY_VALID=False, BLOCK=4096)
