"""relu(high + upsampled low): a program writes some columns and channels of one row, which read four corners each.

The corners of neighbouring columns and rows come from the caches: one read of `low` and `high` and one write are all
that memory sees. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, extent, index_type, lerp, lerp_weight, rounded
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


def upsample_add_relu(high: Tensor, low: Tensor, out: Tensor) -> None:
    """Write relu(high + upsampled low), [N, C, H, W] as `high`, of low [N, C, h, w]; any strides."""
    batch, channels, H, W = high.shape
    h, w = low.shape[2:]
    channels_last = out.stride(1) == 1
    block = min(triton.next_power_of_2(channels if channels_last else W), CHANNELS if channels_last else COLUMNS)
    columns, depth = (TILE // block, block) if channels_last else (block, TILE // block)
    largest = max(extent(high, low, out), (2 * H + 1) * h, (2 * W + 1) * w)
    with torch.cuda.device_of(high):
        upsample_add_relu_kernel[batch * H, triton.cdiv(W, columns), triton.cdiv(channels, depth)](
            channels, h, w, H, W, *high.stride(), *low.stride(), *out.stride(), high, low, out,
            INDEX=index_type(largest), COLUMNS=columns, CHANNELS=depth, num_warps=WARPS,
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
