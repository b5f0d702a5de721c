"""relu(high + upsampled low): a program writes some columns and channels of one row, which read four corners each.

The gradient sums rows before columns, in float32 between them: each element of the result is read twice, by the two
source rows that it has, and each sum is one program's.

The corners of neighbouring columns and rows come from the caches: one read of `low` and `high` and one write are all
that memory sees. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, extent, index_type, lerp, lerp_weight, rounded, scratch
from bcmfnet.kernels.autotune import AotCase

TILE = 2**14 if INTERPRETED.value else 1024  # elements of a program: 16 bytes a thread of 4 warps in 16 bits
CHANNELS = 64  # channels of a program in channels_last: 128 bytes, a line of the cache
COLUMNS = 256  # columns of a program in a contiguous map
WARPS = 4


@triton.jit
def _source(position, size, out):
    """Lower and upper source position, and the weight of the upper one. An axis that keeps its size has one alone."""
    low = tl.maximum((2 * position + 1) * size - out, 0) // (2 * out)
    high = tl.minimum(low + (out > size).to(low.dtype), size - 1)
    return low, high, lerp_weight(position, low, size, out)


@triton.jit(do_not_specialize=["h", "w", "H", "W"])
def upsample_add_relu_kernel(
    channels, h, w, H, W,
    high_n, high_c, high_h, high_w, low_n, low_c, low_h, low_w, out_n, out_c, out_h, out_w,
    high, low, out,
    INDEX: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (row of an image, block of columns, block of channels); strides of batch, channel, row and column."""
    h, w, H, W = h.to(INDEX), w.to(INDEX), H.to(INDEX), W.to(INDEX)
    image, y = tl.program_id(0).to(INDEX) // H, tl.program_id(0).to(INDEX) % H
    x = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(2).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (x < W) & (channel < channels)
    upper, lower, weight_y = _source(y, h, H)
    left, right, weight_x = _source(tl.minimum(x, W - 1), w, W)

    low += image * low_n + channel * low_c
    a = tl.load(low + (upper * low_h + left * low_w), inside, 0.0).to(tl.float32)
    b = tl.load(low + (upper * low_h + right * low_w), inside, 0.0).to(tl.float32)
    c = tl.load(low + (lower * low_h + left * low_w), inside, 0.0).to(tl.float32)
    d = tl.load(low + (lower * low_h + right * low_w), inside, 0.0).to(tl.float32)
    if w < W:  # an axis that keeps its size is copied
        a, c = lerp(a, b, weight_x), lerp(c, d, weight_x)
    if h < H:
        a = lerp(a, c, weight_y)
    a += tl.load(high + (image * high_n + channel * high_c + y * high_h + x * high_w), inside, 0.0).to(tl.float32)
    at = image * out_n + channel * out_c + y * out_h + x * out_w
    tl.store(out + at, rounded(tl.where(a < 0, 0.0, a), out), inside)  # keeps NaN


@triton.jit
def _first(low, size, out):
    """First output position whose lower source is `low`, from -1 to `size`."""
    return (low > 0).to(low.dtype) * tl.minimum((out * (2 * low + 1) + size - 1) // (2 * size), out)


@triton.jit
def _weight(position, low, own, size, out):
    """What an output position of a cell, whose lower source is `low`, owes to the source position `own`."""
    upper = lerp_weight(position, low, size, out)
    if size == out:
        upper *= 0.0
    upper = tl.where(low + 1 < size, upper, 0.0)
    return tl.where(low == own, 1 - upper, upper)


@triton.jit(do_not_specialize=["h", "H", "W"])
def rows_kernel(
    channels, h, H, W,
    grad_n, grad_c, grad_h, grad_w, out_n, out_c, out_h, out_w, sums_n, sums_c, sums_h, sums_w,
    grad, out, high, sums,
    MOST: tl.constexpr, INDEX: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (source row of an image, block of columns, block of channels): what the rows of the result, at most MOST,
    owe to the source row; `high`, laid out as `out`, is written where this row is the upper one."""
    h, H, W = h.to(INDEX), H.to(INDEX), W.to(INDEX)
    image, row = tl.program_id(0).to(INDEX) // h, tl.program_id(0).to(INDEX) % h
    x = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(2).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (x < W) & (channel < channels)
    grad += image * grad_n + channel * grad_c + x * grad_w
    at = image * out_n + channel * out_c + x * out_w
    before, begin, end = _first(row - 1, h, H), _first(row, h, H), _first(row + 1, h, H)
    total = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for number in range(MOST):
        y = before + number
        reads = inside & (y < end)
        value = tl.load(grad + y * grad_h, reads, 0.0).to(tl.float32)
        value = tl.where(tl.load(out + (at + y * out_h), reads, 1.0).to(tl.float32) <= 0, 0.0, value)
        total += _weight(y, row - (y < begin).to(INDEX), row, h, H) * value
        tl.store(high + (at + y * out_h), rounded(value, high), reads & (y >= begin))
    tl.store(sums + (image * sums_n + channel * sums_c + row * sums_h + x * sums_w), total, inside)


@triton.jit(do_not_specialize=["h", "w", "W"])
def columns_kernel(
    channels, h, w, W, sums_n, sums_c, sums_h, sums_w, low_n, low_c, low_h, low_w, sums, low,
    MOST: tl.constexpr, INDEX: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (source row of an image, block of its columns, block of channels): at most MOST columns of the result
    owe something to one of these."""
    h, w, W = h.to(INDEX), w.to(INDEX), W.to(INDEX)
    image, row = tl.program_id(0).to(INDEX) // h, tl.program_id(0).to(INDEX) % h
    column = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(2).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (column < w) & (channel < channels)
    before, begin, end = _first(column - 1, w, W), _first(column, w, W), _first(column + 1, w, W)
    sums += image * sums_n + channel * sums_c + row * sums_h
    total = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for number in range(MOST):
        x = before + number
        value = tl.load(sums + x * sums_w, inside & (x < end), 0.0)
        total += _weight(x, column - (x < begin).to(INDEX), column, w, W) * value
    at = image * low_n + channel * low_c + row * low_h + column * low_w
    tl.store(low + at, rounded(total, low), inside)


def _blocks(channels_last: bool, channels: int, columns: int) -> tuple[int, int]:
    """Columns and channels of a program."""
    if channels_last:
        depth = min(triton.next_power_of_2(channels), CHANNELS)
        return TILE // depth, depth
    block = min(triton.next_power_of_2(columns), COLUMNS)
    return block, TILE // block


def _most(size: int, out: int) -> int:
    """Output positions that have a source position: the outermost ones have half a cell more."""
    return min(out, 2 * triton.cdiv(out, size) + triton.cdiv(out, 2 * size))


def upsample_add_relu(high: Tensor, low: Tensor, out: Tensor) -> None:
    """Write relu(high + upsampled low), [N, C, H, W] as `high`, of low [N, C, h, w]; any strides."""
    batch, channels, H, W = high.shape
    h, w = low.shape[2:]
    columns, depth = _blocks(out.stride(1) == 1, channels, W)
    largest = max(extent(high, low, out), (2 * H + 1) * h, (2 * W + 1) * w)
    with torch.cuda.device_of(high):
        upsample_add_relu_kernel[batch * H, triton.cdiv(W, columns), triton.cdiv(channels, depth)](
            channels, h, w, H, W, *high.stride(), *low.stride(), *out.stride(), high, low, out,
            INDEX=index_type(largest), COLUMNS=columns, CHANNELS=depth, num_warps=WARPS,
        )  # fmt: skip


def upsample_add_relu_backward(grad: Tensor, out: Tensor, high: Tensor, low: Tensor) -> None:
    """Write the gradients of high, [N, C, H, W] laid out as `out`, and of low [N, C, h, w]."""
    batch, channels, H, W = out.shape
    h, w = low.shape[2:]
    channels_last = out.stride(1) == 1
    sums = scratch(out, torch.float32, batch, channels, h, W)
    if channels_last:
        sums = scratch(out, torch.float32, batch, h, W, channels).permute(0, 3, 1, 2)
    index = index_type(max(extent(grad, out, low, sums), (2 * H + 1) * (h + 1), (2 * W + 1) * (w + 1)))
    with torch.cuda.device_of(out):
        columns, depth = _blocks(channels_last, channels, W)
        rows_kernel[batch * h, triton.cdiv(W, columns), triton.cdiv(channels, depth)](
            channels, h, H, W, *grad.stride(), *out.stride(), *sums.stride(), grad, out, high, sums,
            MOST=_most(h, H), INDEX=index, COLUMNS=columns, CHANNELS=depth, num_warps=WARPS,
        )  # fmt: skip
        columns, depth = _blocks(channels_last, channels, w)
        columns_kernel[batch * h, triton.cdiv(w, columns), triton.cdiv(channels, depth)](
            channels, h, w, W, *sums.stride(), *low.stride(), sums, low,
            MOST=_most(w, W), INDEX=index, COLUMNS=columns, CHANNELS=depth, num_warps=WARPS,
        )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Each dtype, in both layouts; mixed ones, and offsets of 64 bits."""
    strides = [f"{name}_{axis}" for name in ("high", "low", "out") for axis in "nchw"]
    layouts = {
        "channels_last": ("high_c", "low_c", "out_c"),
        "contiguous": ("high_w", "low_w", "out_w"),
        "low contiguous": ("high_c", "low_w", "out_c"),
        "high of any strides": ("low_c", "out_w"),
    }
    for dtype in ("fp32", "fp16", "bf16"):
        for layout, units in layouts.items():
            for index in (tl.int32, tl.int64):
                signature = dict.fromkeys(("channels", "h", "w", "H", "W", *strides), "i32")
                signature |= dict.fromkeys(("high", "low", "out"), f"*{dtype}") | dict.fromkeys(units, "constexpr")
                constants = dict.fromkeys(units, 1) | {"INDEX": index}
                constants |= {"COLUMNS": 16, "CHANNELS": 64} if "out_c" in units else {"COLUMNS": 256, "CHANNELS": 4}
                yield AotCase(f"{dtype} {layout} {index}", upsample_add_relu_kernel, signature, constants, WARPS)
    layouts = {"channels_last": "c", "contiguous": "w", "grad of any strides": None}
    for dtype, (layout, unit), index in product(("fp32", "fp16", "bf16"), layouts.items(), (tl.int32, tl.int64)):
        constants = {"MOST": 5, "INDEX": index}
        constants |= {"COLUMNS": 256, "CHANNELS": 4} if unit == "w" else {"COLUMNS": 16, "CHANNELS": 64}
        for function, maps in ((rows_kernel, ("grad", "out", "sums")), (columns_kernel, ("sums", "low"))):
            units = {f"{name}_{unit or 'c'}": 1 for name in maps if unit or name != "grad"}
            signature = {name: "i32" for name in function.arg_names if name not in constants}
            signature |= {name: f"*{dtype}" for name in ("grad", "out", "high", "low") if name in signature}
            signature |= {"sums": "*fp32"} | dict.fromkeys(units, "constexpr")
            yield AotCase(
                f"{function.__name__} {dtype} {layout} {index}", function, signature, constants | units, WARPS
            )
