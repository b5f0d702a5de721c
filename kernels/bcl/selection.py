"""Selection: non-maximum suppression, and the threshold by rank from a histogram of two bytes (radix select)."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import index_type, scratch
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, PIXELS

BYTE = tl.constexpr(256)
SELECTED = 2 * PIXELS  # pixels of a program
RUN = tl.constexpr(8)  # A lane reads so many neighbouring pixels, of 16-bit scores 16 bytes.


@triton.jit(**ANY_NUMBERS)
def candidates_kernel(
    scores, mask, histogram, count, H, W,
    PER_IMAGE: tl.constexpr, REACH: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pixels whose score is the largest around; and their number by score, [low byte, high byte]: neighbouring scores
    are frequent together, so their counts are not neighbours. Program (rows of all images, columns)."""
    H, W = H.to(INDEX), W.to(INDEX)
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None]
    y, pixel = row % H, row * W + x
    inside = (x < W) & (pixel < count)
    q = tl.load(scores + pixel, inside, 0).to(tl.int32)
    largest = q
    for down in range(-REACH, REACH + 1):
        near, line = inside & (y + down >= 0) & (y + down < H), scores + (pixel + down * W)
        for right in range(-REACH, REACH + 1):
            beside = near & (x + right >= 0) & (x + right < W)
            largest = tl.maximum(largest, tl.load(line + right, beside, 0).to(tl.int32))
    candidate = (q == largest) & (q > 0)
    tl.store(mask + pixel, candidate.to(tl.uint8), inside)
    if PER_IMAGE:
        histogram += row // H * BYTE * BYTE
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
    by_ratio = (ratio.to(tl.int64).to(tl.float64, bitcast=True) * candidates.to(tl.float64)).to(tl.int64)
    kept = tl.minimum(tl.maximum(by_ratio, min_kept), candidates)
    t = tl.where(kept > 0, tl.minimum(_kth_largest(histogram, by_high, kept), tau), tau)
    limit = _kth_largest(histogram, by_high, max_kept)
    tl.store(threshold + tl.program_id(0), tl.where(max_kept <= candidates, tl.maximum(t, limit), t))


@triton.jit(**ANY_NUMBERS)
def select_kernel(
    scores, terms, threshold, mask, partials, count, plane,
    PER_IMAGE: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of the candidates in the mask those from the threshold on; and their sums: boundary term and number."""
    lane = tl.program_id(0).to(INDEX) * (PIXELS // RUN) + tl.arange(0, PIXELS // RUN)[:, None]
    pixel = lane * RUN + tl.arange(0, RUN)[None]
    inside = pixel < count
    t = tl.load(threshold + pixel // plane, inside, 0) if PER_IMAGE else tl.load(threshold)
    selected = (tl.load(mask + pixel, inside, 0) != 0) & (tl.load(scores + pixel, inside, 0).to(tl.int32) >= t)
    tl.store(mask + pixel, selected.to(tl.uint8), inside)
    partials += tl.program_id(0)
    tl.store(partials, px._sum(tl.load(terms + pixel, selected, 0.0)))
    tl.store(partials + tl.num_programs(0), tl.sum(selected.to(tl.int32)))


def ranks(options: Any) -> bool:
    """Whether a pixel is selected by more than its own score: by those around it, or by its rank."""
    return options.nms > 1 or options.ratio != 0 or options.min_kept > 0 or options.max_kept is not None


def select(options: Any, scores: Tensor, terms: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
    """Write thresholds and mask; sums float64 [2, programs] of the selected pixels."""
    count, (_, H, W) = scores.numel(), scores.shape
    constants = {"PER_IMAGE": options.per_image, "INDEX": index_type(count + PIXELS * max(W, 1))}
    histogram = torch.zeros((threshold.numel(), BYTE.value**2), dtype=torch.int32, device=scores.device)
    reach = min(options.nms // 2, max(H, W))
    rows, columns = candidates_at_once(W)
    grid = triton.cdiv(len(scores) * H, rows), triton.cdiv(W, columns)
    candidates_kernel[grid](scores, mask, histogram, count, H, W, REACH=reach, ROWS=rows, COLUMNS=columns, **constants)
    ratio = struct.unpack("q", struct.pack("d", options.ratio))[0]
    most = 2**62 if options.max_kept is None else min(options.max_kept, 2**62)
    threshold_kernel[(threshold.numel(),)](
        histogram, threshold, px._tau(options), ratio, min(options.min_kept, most), most, BLOCK=32, num_warps=8
    )
    programs = triton.cdiv(count, SELECTED)
    partials = scratch(scores, torch.float64, 2, programs)
    select_kernel[(programs,)](scores, terms, threshold, mask, partials, count, H * W, PIXELS=SELECTED, **constants)
    return partials


def candidates_at_once(width: int) -> tuple[int, int]:
    """Rows and columns of a program, by the width of the images."""
    columns = min(triton.next_power_of_2(width), PIXELS)
    return PIXELS // columns, columns
