"""Losses of overlap scores, from sums over pixels: their values, and their derivatives by those sums."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS

ROWS, COLUMNS = (4096, 64) if INTERPRETED.value else (256, 16)  # programs and numbers that are added up at once
CHUNK = 1024  # classes
EPS = tl.constexpr(1e-7)  # See bcmfnet/reference/terms.py.


@triton.jit(**ANY_NUMBERS)
def sums_kernel(partials, sums, programs, NUMBERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [groups, NUMBERS] of those of a group's programs, in a fixed order."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None]
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    first = 0
    while first < programs:  # the interpreter takes no argument for the end of a range
        row = first + tl.arange(0, ROWS)[:, None]
        at = (group * programs + row) * NUMBERS + column
        total += tl.load(partials + at, (row < programs) & (column < NUMBERS), 0.0)
        first += ROWS
    at = group * NUMBERS + column
    tl.store(sums + at, tl.sum(total, 0, keep_dims=True).to(tl.float32), column < NUMBERS)


@triton.jit
def _score(hits, predicted, labelled, hit, of_hits, of_predicted, of_labelled, smooth, LOG: tl.constexpr):
    """The loss of (hit * I + s) / (of_hits * I + of_predicted * P + of_labelled * Y + s), and by P and I."""
    numerator = hit * hits + smooth
    sum = of_hits * hits + of_predicted * predicted + of_labelled * labelled + smooth
    denominator = tl.where(sum < EPS, EPS, sum)
    slope = tl.where(sum < EPS, 0.0, numerator / (denominator * denominator))
    score = numerator / denominator
    if LOG:
        cut = tl.where(score < EPS, EPS, score)
        loss, outer = -tl.log(cut), tl.where(score < EPS, 0.0, -1 / cut)
    else:
        loss, outer = 1 - score, tl.full(score.shape, -1.0, tl.float64)
    return loss, -outer * slope * of_predicted, outer * (hit / denominator - slope * of_hits)


@triton.jit
def _is_counted(sums, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Whether a group has a valid pixel."""
    labelled = tl.zeros([CHUNK], tl.float32)
    for first in range(0, CLASSES, CHUNK):
        classes = first + tl.arange(0, CHUNK)
        labelled = tl.maximum(labelled, tl.load(sums + (2 * CLASSES + classes), classes < CLASSES, 0.0))
    return tl.where(tl.max(labelled) > 0, 1.0, 0.0).to(tl.float64)


@triton.jit
def _weights(sums, weight, classes, CLASSES: tl.constexpr, FIRST: tl.constexpr, ABSENT: tl.constexpr):
    """Of classes, in the divisor of the mean and in the mean itself; ABSENT is skip, zero, count."""
    counts = (classes < CLASSES) & (classes >= FIRST)
    if weight is None:
        each = tl.where(counts, 1.0, 0.0).to(tl.float64)
    else:
        each = tl.load(weight + classes, counts, 0.0).to(tl.float64)
    present = tl.where(tl.load(sums + (2 * CLASSES + classes), counts, 0.0) > 0, each, 0.0)
    return present if ABSENT == 0 else each, each if ABSENT == 2 else present


@triton.jit(**ANY_NUMBERS)
def overlap_kernel(
    sums, weight, slopes, loss, values, groups, dice, jaccard, tversky, alpha, beta, smooth,
    CLASSES: tl.constexpr, FIRST: tl.constexpr, LOG: tl.constexpr, ABSENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Values of the terms, their weighted sum added to the loss, and its derivatives by P and I."""
    images, group = tl.zeros([], tl.float64), 0
    while group < groups:
        images += _is_counted(sums + group * 3 * CLASSES, CLASSES, CHUNK)
        group += 1
    of_dice, of_jaccard, of_tversky = tl.zeros([], tl.float64), tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    group = 0
    while group < groups:
        of_group = sums + group * 3 * CLASSES
        divisor = tl.zeros([CHUNK], tl.float64)
        for first in range(0, CLASSES, CHUNK):
            divisor += _weights(of_group, weight, first + tl.arange(0, CHUNK), CLASSES, FIRST, ABSENT)[0]
        total = tl.sum(divisor)
        unit = _is_counted(of_group, CLASSES, CHUNK) / (tl.where(total > 0, total, 1.0) * tl.maximum(images, 1.0))
        for first in range(0, CLASSES, CHUNK):
            classes = first + tl.arange(0, CHUNK)
            inside = classes < CLASSES
            hits = tl.load(of_group + classes, inside, 0.0).to(tl.float64)
            predicted = tl.load(of_group + (CLASSES + classes), inside, 0.0).to(tl.float64)
            labelled = tl.load(of_group + (2 * CLASSES + classes), inside, 0.0).to(tl.float64)
            share = unit * _weights(of_group, weight, classes, CLASSES, FIRST, ABSENT)[1]
            loss_d, by_p_d, by_i_d = _score(hits, predicted, labelled, 2, 0, 1, 1, smooth, LOG)
            loss_j, by_p_j, by_i_j = _score(hits, predicted, labelled, 1, -1, 1, 1, smooth, LOG)
            loss_t, by_p_t, by_i_t = _score(hits, predicted, labelled, 1, 1 - alpha - beta, alpha, beta, smooth, LOG)
            of_dice += tl.sum(tl.where(inside, share * loss_d, 0.0))
            of_jaccard += tl.sum(tl.where(inside, share * loss_j, 0.0))
            of_tversky += tl.sum(tl.where(inside, share * loss_t, 0.0))
            if slopes is not None:
                at = slopes + (group * 2 * CLASSES + classes)
                by_p = _weighted(dice, jaccard, tversky, by_p_d, by_p_j, by_p_t)
                by_i = _weighted(dice, jaccard, tversky, by_i_d, by_i_j, by_i_t)
                tl.store(at, (share * by_p).to(tl.float32), inside)
                tl.store(at + CLASSES, (share * by_i).to(tl.float32), inside)
        group += 1
    tl.store(values + 3, tl.where(dice != 0, of_dice, 0.0))
    tl.store(values + 4, tl.where(jaccard != 0, of_jaccard, 0.0))
    tl.store(values + 5, tl.where(tversky != 0, of_tversky, 0.0))
    tl.store(loss, tl.load(loss) + _weighted(dice, jaccard, tversky, of_dice, of_jaccard, of_tversky))


@triton.jit
def _weighted(dice, jaccard, tversky, of_dice, of_jaccard, of_tversky):
    """A weight of 0 leaves its term out."""
    total = tl.where(dice != 0, dice * of_dice, 0.0) + tl.where(jaccard != 0, jaccard * of_jaccard, 0.0)
    return total + tl.where(tversky != 0, tversky * of_tversky, 0.0)


def write_overlap(
    partials: Tensor, weight: Tensor | None, options: Any, sums: Tensor, slopes: Tensor | None, loss: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """Sums [groups, 3, C] of partials float32 [programs, 3, C]; slopes [groups, 2, C]; values; added to the loss."""
    groups, _, classes = sums.shape
    rows, columns = min(ROWS, triton.next_power_of_2(max(partials.shape[0], 1))), COLUMNS
    sums_kernel[triton.cdiv(3 * classes, columns), groups](
        partials, sums, partials.shape[0] // max(groups, 1), NUMBERS=3 * classes, ROWS=rows, COLUMNS=columns
    )
    overlap_kernel[1,](
        sums, weight, slopes, loss, values, groups, *(float(weight) for _, weight in options.overlaps),
        float(options.tversky_alpha), float(options.tversky_beta), float(options.smooth),
        CLASSES=classes, FIRST=int(options.binary), LOG=options.log,
        ABSENT=("skip", "zero", "count").index(options.absent), CHUNK=min(triton.next_power_of_2(classes), CHUNK),
    )  # fmt: skip
