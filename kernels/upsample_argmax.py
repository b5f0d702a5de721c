"""Bilinear upsampling and argmax: a lane holds the output pixels between four source pixels, class after class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels.autotune import AotCase, autotune

CELLS = 32  # a cell a lane and a warp a program: what no cell of a warp needs is skipped, and nothing is shared
SIDE = 8  # 64 pixels a lane share four loads and share their lerps; larger cells are taken in pieces
CHUNK = 4  # classes whose corners are loaded at once; 8 costs as many instructions, 16 spills registers

LIMIT = tl.constexpr(1e38)  # infinities count as this
NAN = tl.constexpr(2e38)  # NaN counts as this, above every number


@triton.constexpr_function
def tile_rows(side, rows, confident, aligned):
    """Output rows of a lane: 4 where confidence or scattered stores need more registers a pixel; 2 spill as well."""
    return min(side, 4 if confident or aligned == 1 else rows)


@triton.jit
def _source(cell, size, out):
    """Lower and upper source position of a cell along one axis, and its first output position."""
    low = tl.maximum(cell - 1, 0)
    high = tl.minimum(low + (out > size).to(cell.dtype), size - 1)
    return low, high, tl.maximum(out * (2 * cell - 1) + size - 1, 0) // (2 * size)


@triton.jit
def _share(position, low, size, out):
    """Share of the upper source position: exact in integers, rounded once."""
    numerator = tl.maximum((2 * position + 1) * size - out, 0) - 2 * out * low
    return tl.div_rn(numerator.to(tl.float32), (2 * out).to(tl.float32))


@triton.jit
def _inside(position, cell, size, out):
    return (position < out) & ((2 * position + 1) * size - out < 2 * out * cell)


@triton.jit
def _lerp(a, b, share):
    return a + share * (b - a)


@triton.jit
def _load(plane, corners, mask=None, other=None):
    a = tl.load(plane + corners[0], mask, other).to(tl.float32)
    b = tl.load(plane + corners[1], mask, other).to(tl.float32)
    c = tl.load(plane + corners[2], mask, other).to(tl.float32)
    d = tl.load(plane + corners[3], mask, other).to(tl.float32)
    return a, b, c, d


@triton.jit
def _load_chunk(logits, corners, classes, stride_c, CLASSES: tl.constexpr):
    """Corners [cells, classes] of some classes: cells come first, so that lanes run along them if nothing is unit."""
    columns = (corners[0][:, None], corners[1][:, None], corners[2][:, None], corners[3][:, None])
    return _load(logits + classes.to(tl.int64) * stride_c, columns, classes < CLASSES, float("-inf"))


@triton.jit
def _score(plane, corners, share_x, share_y):
    """Scores [rows, columns, cells] of one class. A NaN corner is NaN in the whole cell, as in the lerp: 0 * NaN is."""
    a, b, c, d = _load(plane, corners)
    number = (a == a) & (b == b) & (c == c) & (d == d)
    a, b = tl.where(number, tl.clamp(a, -LIMIT, LIMIT), NAN), tl.where(number, tl.clamp(b, -LIMIT, LIMIT), NAN)
    c, d = tl.where(number, tl.clamp(c, -LIMIT, LIMIT), NAN), tl.where(number, tl.clamp(d, -LIMIT, LIMIT), NAN)
    upper = _lerp(a[None, :], b[None, :], share_x)
    lower = _lerp(c[None, :], d[None, :], share_x)
    return _lerp(upper[None], lower[None], share_y[:, None, :])


@triton.jit(
    do_not_specialize=["batch", "h", "w", "H", "W"],
    do_not_specialize_on_alignment=["stride_n", "stride_c", "stride_h", "stride_w"],
)
def upsample_argmax_kernel(
    logits, labels, confidence, batch, h, w, H, W, stride_n, stride_c, stride_h, stride_w,
    CLASSES: tl.constexpr, INDEX: tl.constexpr, SIDE: tl.constexpr, ALIGNED: tl.constexpr,
    CELLS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = tile_rows(SIDE, ROWS, confidence is not None, ALIGNED)
    h, w, H, W = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX)
    item = tl.program_id(0).to(INDEX) * CELLS + tl.arange(0, CELLS)
    cell_x, rest = item % (w + 1), item // (w + 1)
    cell_y, image = rest % (h + 1), (rest // (h + 1)).to(tl.int64)
    low_x, high_x, first_x = _source(cell_x, w, W)
    low_y, high_y, first_y = _source(cell_y, h, H)
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

    share_x = _share(first_x[None, :] + tl.arange(0, SIDE)[:, None], low_x[None, :], w, W)
    share_y = _share(first_y[None, :] + tl.arange(0, TILE)[:, None], low_y[None, :], h, H)
    best = tl.full([TILE, SIDE, CELLS], float("-inf"), tl.float32)
    label = tl.zeros([TILE, SIDE, CELLS], tl.int32)
    total = tl.zeros([TILE, SIDE, CELLS], tl.float32)
    for start in range(0, CLASSES, CHUNK):
        a, b, c, d = _load_chunk(logits, corners, start + in_chunk, stride_c, CLASSES)
        skipped = (a < bound) & (b < bound) & (c < bound) & (d < bound) | (start + in_chunk >= CLASSES)
        needed = tl.reduce_or(tl.sum(tl.where(skipped, 0, 1) << in_chunk, 1), 0)
        for i in range(CHUNK):
            if (needed >> i) & 1:
                plane = logits + tl.cast(start + i, tl.int64) * stride_c
                score = _score(plane, corners, share_x, share_y)
                better = score > best
                if confidence is not None:
                    ratio = tl.exp(-tl.abs(score - best))
                    total = tl.where(better, total * ratio + 1, total + ratio)
                best = tl.where(better, score, best)
                label = tl.where(better, start + i, label)

    y = first_y[:, None, None] + tl.arange(0, TILE)[None, :, None]
    x = first_x[:, None, None] + tl.arange(0, SIDE)[None, None, :]
    mask = _inside(y, cell_y[:, None, None], h, H) & _inside(x, cell_x[:, None, None], w, W)
    mask = tl.max_constancy(mask & (image < batch)[:, None, None], [1, 1, ALIGNED])
    offset = tl.multiple_of((image[:, None, None] * H + y) * W + x, [1, 1, ALIGNED])
    tl.store(labels + offset, label.to(labels.dtype.element_ty).permute(2, 0, 1), mask)
    if confidence is not None:
        share = tl.where(best > LIMIT, float("nan"), 1 / total)
        tl.store(confidence + offset, share.to(tl.float16).permute(2, 0, 1), mask)


CONFIGS = [triton.Config({"ROWS": rows}, num_warps=1) for rows in (8, 4)]
kernel = autotune(CONFIGS, ["CLASSES", "SIDE"])(upsample_argmax_kernel)


def upsample_argmax(logits: Tensor, labels: Tensor, confidence: Tensor | None) -> None:
    """Write labels, uint8 or int16 [N, H, W], and confidence, float16 [N, H, W] unless None, of logits [N, C, h, w]."""
    batch, classes, h, w = logits.shape
    H, W = labels.shape[1:]
    scale_y, scale_x = triton.cdiv(H, h), triton.cdiv(W, w)
    side = min(triton.next_power_of_2(max(scale_y, scale_x)), SIDE)
    aligned = 4 if W % (8 * w) == 0 else 1
    largest = max(batch * (h + 1) * (w + 1) + CELLS, 2 * (h + 1) * (H + 2 * SIDE), 2 * (w + 1) * (W + 2 * SIDE))

    def grid(meta):
        tile = tile_rows(side, meta["ROWS"], confidence is not None, aligned)
        return triton.cdiv(batch * (h + 1) * (w + 1), CELLS), triton.cdiv(scale_x, side), triton.cdiv(scale_y, tile)

    with torch.cuda.device_of(logits):
        kernel[grid](
            logits, labels, confidence, batch, h, w, H, W, *logits.stride(),
            CLASSES=classes, INDEX=tl.int32 if largest < 2**31 else tl.int64, SIDE=side,
            ALIGNED=aligned, CELLS=CELLS, CHUNK=CHUNK,
        )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Each configuration with the specialisations that images meet: aligned whole scales, any other, and no scale."""
    outputs = {"labels": ("*u8", None, 19), "confidence": ("*u8", "*fp16", 19), "wide": ("*i16", "*fp16", 300)}
    kinds = [("*fp32", name, 8, 4) for name in outputs] + [("*fp16", "labels", 8, 4), ("*bf16", "labels", 8, 4)]
    kinds += [("*fp32", name, side, 1) for name in ("labels", "confidence") for side in (8, 1)]
    numbers = ("batch", "h", "w", "H", "W", "stride_n", "stride_c", "stride_h", "stride_w")
    for logits, output, side, aligned in kinds:
        labels, confidence, classes = outputs[output]
        signature = {"logits": logits, "labels": labels, "confidence": confidence or "constexpr"}
        signature |= dict.fromkeys(numbers, "i32")
        constants = {"CLASSES": classes, "INDEX": tl.int32, "SIDE": side, "ALIGNED": aligned}
        constants |= {"CELLS": CELLS, "CHUNK": CHUNK} | ({} if confidence else {"confidence": None})
        different = CONFIGS if aligned > 1 and not confidence else CONFIGS[:1]  # tile_rows makes them equal
        for config in different:
            name = f"{logits[1:]} {output} side {side} aligned {aligned} rows {config.kwargs['ROWS']}"
            yield AotCase(name, upsample_argmax_kernel, signature, constants | config.kwargs, config.num_warps)
