"""Bilinear upsampling and argmax: a lane holds the output pixels between four source pixels, class after class.

A class costs a pixel a multiply-add, a comparison and two selections, the last three at half rate, so a class that
cannot win is skipped. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import cell_source, in_cell, index_type, lerp, lerp_weight, load_corners
from bcmfnet.kernels.autotune import AotCase, autotune

CELLS = 32  # A lane has a cell and a program one warp: a class that none of 32 cells needs is skipped, no warp waits.
SIDE = 8  # The 64 pixels of a lane have four loads and their rows' lerps in common; larger cells are taken in pieces.
CHUNK = 4  # The corners of so many classes are loaded at once: the fewest instructions for 19 classes; 16 spill.

LIMIT = tl.constexpr(1e38)  # infinities count as this
NAN = tl.constexpr(2e38)  # NaN counts as this, above every number


@triton.jit
def _load_chunk(logits, corners, classes, stride_c, CLASSES: tl.constexpr):
    """Corners [cells, classes] of some classes: cells come first, so that lanes run along them if nothing is unit."""
    columns = (corners[0][:, None], corners[1][:, None], corners[2][:, None], corners[3][:, None])
    return load_corners(logits + classes.to(tl.int64) * stride_c, columns, classes < CLASSES, float("-inf"))


@triton.jit
def _score(plane, corners, weight_x, weight_y):
    """Scores [rows, columns, cells] of one class. A NaN corner is NaN in the whole cell, as in the lerp: 0 * NaN is."""
    a, b, c, d = load_corners(plane, corners)
    number = (a == a) & (b == b) & (c == c) & (d == d)
    a, b = tl.where(number, tl.clamp(a, -LIMIT, LIMIT), NAN), tl.where(number, tl.clamp(b, -LIMIT, LIMIT), NAN)
    c, d = tl.where(number, tl.clamp(c, -LIMIT, LIMIT), NAN), tl.where(number, tl.clamp(d, -LIMIT, LIMIT), NAN)
    upper = lerp(a[None, :], b[None, :], weight_x)
    lower = lerp(c[None, :], d[None, :], weight_x)
    return lerp(upper[None], lower[None], weight_y[:, None, :])


@triton.jit(
    do_not_specialize=["batch", "h", "w", "H", "W"],
    do_not_specialize_on_alignment=["stride_n", "stride_c", "stride_h", "stride_w"],
)
def upsample_argmax_kernel(
    batch, h, w, H, W,
    stride_n, stride_c, stride_h, stride_w,
    logits, labels, confidence,
    CLASSES: tl.constexpr, INDEX: tl.constexpr, SIDE: tl.constexpr, ALIGNED: tl.constexpr,
    CELLS: tl.constexpr, CHUNK: tl.constexpr, MOST_ROWS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the (h + 1) x (w + 1) cells, each is the output pixels that read the same four corners.

    A class whose corners are all below `bound`, the smallest corner of some other class, is skipped where only labels
    are asked for. That is exact: up to 2^21 pixels a side a lerp is between its ends in float32 too.
    """
    TILE: tl.constexpr = ROWS if ROWS < MOST_ROWS else MOST_ROWS
    h, w, H, W = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX)
    item = tl.program_id(0).to(INDEX) * CELLS + tl.arange(0, CELLS)
    cell_x, rest = item % (w + 1), item // (w + 1)
    cell_y, image = rest % (h + 1), (rest // (h + 1)).to(tl.int64)
    low_x, high_x, first_x = cell_source(cell_x, w, W)
    low_y, high_y, first_y = cell_source(cell_y, h, H)
    first_x += tl.program_id(1).to(INDEX) * SIDE
    first_y += tl.program_id(2).to(INDEX) * TILE
    origin = tl.minimum(image, batch - 1) * stride_n
    top, bottom = origin + low_y.to(tl.int64) * stride_h, origin + high_y.to(tl.int64) * stride_h
    left, right = low_x.to(tl.int64) * stride_w, high_x.to(tl.int64) * stride_w
    corners = (top + left, top + right, bottom + left, bottom + right)
    in_chunk = tl.arange(0, CHUNK)[None, :]

    bound = tl.full([CELLS], float("-inf"), tl.float32)
    if confidence is None:
        for start in range(0, CLASSES, CHUNK):
            a, b, c, d = _load_chunk(logits, corners, start + in_chunk, stride_c, CLASSES)
            bound = tl.maximum(bound, tl.max(tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), 1))
    bound = tl.where(bound > -LIMIT, tl.minimum(bound, LIMIT), float("-inf"))[:, None]

    weight_x = lerp_weight(first_x[None, :] + tl.arange(0, SIDE)[:, None], low_x[None, :], w, W)
    weight_y = lerp_weight(first_y[None, :] + tl.arange(0, TILE)[:, None], low_y[None, :], h, H)
    best = tl.full([TILE, SIDE, CELLS], float("-inf"), tl.float32)
    label = tl.zeros([TILE, SIDE, CELLS], tl.int32)
    total = tl.zeros([TILE, SIDE, CELLS], tl.float32)
    for start in range(0, CLASSES, CHUNK):
        a, b, c, d = _load_chunk(logits, corners, start + in_chunk, stride_c, CLASSES)
        skipped = (a < bound) & (b < bound) & (c < bound) & (d < bound) | (start + in_chunk >= CLASSES)
        needed = tl.sum(tl.max(tl.where(skipped, 0, 1 << in_chunk), 0), 0)
        for i in range(CHUNK):
            if (needed >> i) & 1:
                plane = logits + tl.cast(start + i, tl.int64) * stride_c
                score = _score(plane, corners, weight_x, weight_y)
                better = score > best
                if confidence is not None:
                    ratio = tl.exp(-tl.abs(score - best))
                    total = tl.where(better, total * ratio + 1, total + ratio)
                best = tl.where(better, score, best)
                label = tl.where(better, start + i, label)

    y = first_y[:, None, None] + tl.arange(0, TILE)[None, :, None]
    x = first_x[:, None, None] + tl.arange(0, SIDE)[None, None, :]
    mask = in_cell(y, cell_y[:, None, None], h, H) & in_cell(x, cell_x[:, None, None], w, W)
    mask = tl.max_constancy(mask & (image < batch)[:, None, None], [1, 1, ALIGNED])
    offset = tl.multiple_of((image[:, None, None] * H + y) * W + x, [1, 1, ALIGNED])
    tl.store(labels + offset, label.to(labels.dtype.element_ty).permute(2, 0, 1), mask)
    if confidence is not None:
        probability = tl.where(best > LIMIT, float("nan"), 1 / total)
        tl.store(confidence + offset, probability.to(tl.float16).permute(2, 0, 1), mask)


CONFIGS = [triton.Config({"ROWS": rows}, num_warps=1) for rows in (8, 4)]
kernel = autotune(CONFIGS, ["CLASSES", "SIDE"])(upsample_argmax_kernel)


def spills_with_8_rows(confident: bool, aligned: int, stride_c: int) -> bool:
    """Whether 8 rows a lane spill: by a third value a pixel, by scattered stores, by loads of several cells a lane."""
    return confident or aligned == 1 or stride_c == 1


def upsample_argmax(logits: Tensor, labels: Tensor, confidence: Tensor | None) -> None:
    """Write labels, uint8 or int16 [N, H, W], and confidence, float16 [N, H, W] unless None, of logits [N, C, h, w]."""
    batch, classes, h, w = logits.shape
    H, W = labels.shape[1:]
    scale_y, scale_x = triton.cdiv(H, h), triton.cdiv(W, w)
    side = min(triton.next_power_of_2(max(scale_y, scale_x)), SIDE)
    aligned = 4 if W % (8 * w) == 0 else 1
    most_rows = min(side, 4 if spills_with_8_rows(confidence is not None, aligned, logits.stride(1)) else SIDE)
    largest = max(batch * (h + 1) * (w + 1) + CELLS, 2 * (h + 1) * (H + 2 * SIDE), 2 * (w + 1) * (W + 2 * SIDE))

    def grid(meta):
        tile = min(most_rows, meta["ROWS"])
        return triton.cdiv(batch * (h + 1) * (w + 1), CELLS), triton.cdiv(scale_x, side), triton.cdiv(scale_y, tile)

    with torch.cuda.device_of(logits):
        kernel[grid](
            batch, h, w, H, W, *logits.stride(), logits, labels, confidence,
            CLASSES=classes, INDEX=index_type(largest), SIDE=side,
            ALIGNED=aligned, CELLS=CELLS, CHUNK=CHUNK, MOST_ROWS=most_rows,
        )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Each configuration as images meet it: dtypes, outputs, layouts, scales that 8 divides and others, and none.

    INDEX int64 is left out: where also the scale is not a multiple of 8, it spills 1 to 9 registers, outside the loops.
    """
    outputs = {"labels": ("*u8", None, 19), "confidence": ("*u8", "*fp16", 19), "wide": ("*i16", None, 300)}
    kinds = [("*fp32", name, "stride_w", 8, 4) for name in outputs]
    kinds += [(dtype, "labels", "stride_w", 8, 4) for dtype in ("*fp16", "*bf16")]
    kinds += [("*fp32", name, "stride_w", side, 1) for name in ("labels", "confidence") for side in (8, 1)]
    kinds += [("*fp32", "labels", "stride_c", 8, 4), ("*fp16", "confidence", "stride_c", 8, 4)]
    numbers = ("batch", "h", "w", "H", "W", "stride_n", "stride_c", "stride_h", "stride_w")
    for logits, output, unit, side, aligned in kinds:
        labels, confidence, classes = outputs[output]
        signature = dict.fromkeys(numbers, "i32") | {"logits": logits, "labels": labels, unit: "constexpr"}
        signature["confidence"] = confidence or "constexpr"
        few = spills_with_8_rows(bool(confidence), aligned, 1 if unit == "stride_c" else 0)
        constants = {unit: 1, "CLASSES": classes, "INDEX": tl.int32, "SIDE": side, "ALIGNED": aligned}
        constants |= {"CELLS": CELLS, "CHUNK": CHUNK, "MOST_ROWS": min(side, 4 if few else SIDE)}
        constants |= {} if confidence else {"confidence": None}
        for config in CONFIGS[few:]:  # those that MOST_ROWS makes different
            name = f"{logits[1:]} {output} {unit} 1 side {side} aligned {aligned} rows {config.kwargs['ROWS']}"
            yield AotCase(name, upsample_argmax_kernel, signature, constants | config.kwargs, config.num_warps)
