"""Pyramid pooling: a program sums the windows around some positions of one map, for some channels.

Tiles are [taps of a window, positions, channels]. Every tap is a load of its own, from the L1 cache after the first:
sums of sums would go through memory, differences of sums cancel, and products with zeros spread NaN. The compiler lays
lanes along channels where those are neighbours, and along taps, the first axis, elsewhere. Counted in the compiled
code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, activate, extent, index_type, locate_block, pick, pooled_size, rounded
from bcmfnet.kernels.autotune import AotCase

MANY = 128  # taps of a large window that are summed at once; 9 x 9 would fill 81 of them
LANES = 32 * MANY if INTERPRETED.value else MANY  # taps x positions that a program takes at once
CHANNELS = 32  # of a program; 32 values a thread, in 4 loads of 16 bytes in half precision
FEW = 32  # taps of a window that is summed along with others: those of 5 x 5 fill 25
PIXELS = 1024 if INTERPRETED.value else 32  # of a program of the gradient

WHOLE = tl.constexpr(2**30)  # a kernel and a stride beyond every map
GLOBAL = (WHOLE.value, WHOLE.value, 0)
"""The global average as a pool."""

STRIDES = ("stride_n", "stride_c", "stride_h", "stride_w")
ANY_NUMBERS = {"do_not_specialize": ["batch", "H", "W"]}


@triton.jit
def _offset(image, channel, position, channels, positions, CHANNELS_LAST: tl.constexpr):
    """Where an element of a packed map is, from its beginning."""
    if CHANNELS_LAST:
        return (image * positions + position) * channels + channel
    else:  # the compiler reads on after a return
        return (image * channels + channel) * positions + position


@triton.jit
def _pool(
    x, packed, norms, number, row, before, channel, batch, channels, H, W, strides,
    MAPS: tl.constexpr, NORMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, TAPS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Means of the windows of the positions from `row` on, TAPS taps at once. Of a window, the part in the map is a
    part of `height` x `width` from its first pixel in the map on."""
    kernel, stride, padding = pick(MAPS, number, 0), pick(MAPS, number, 1), pick(MAPS, number, 2)
    height, width = tl.minimum(kernel, H), tl.minimum(kernel, W)
    h, w = pooled_size(H, W, stride)
    row += tl.arange(0, POSITIONS)[None, :, None]
    inside = (row < batch * h * w) & (channel < channels)
    image, position = row // (h * w), row % (h * w)
    top, left = position // w * stride - padding, position % w * stride - padding
    bottom, right = tl.minimum(top + kernel, H), tl.minimum(left + kernel, W)
    top, left = tl.maximum(top, 0), tl.maximum(left, 0)
    begin = image * strides[0] + channel * strides[1]
    total = tl.zeros([TAPS, POSITIONS, channel.shape[2]], tl.float32)
    first = height * 0
    while first < height * width:  # the interpreter has no range of a number that it does not know
        tap = first + tl.arange(0, TAPS)[:, None, None]
        i, j = top + tap // width, left + tap % width
        reads = inside & (i < bottom) & (j < right)  # from tap height * width on, i is beyond the bottom
        total += tl.load(x + (begin + i * strides[2] + j * strides[3]), reads, 0.0).to(tl.float32)
        first += TAPS
    side = kernel.to(tl.float32)
    mean = tl.sum(total, 0, keep_dims=True) / tl.where(kernel == WHOLE, (H * W).to(tl.float32), side * side)
    if norms is not None:
        mean = activate(mean, norms, number * channels + channel, channel < channels, NORMS)
    packed += before * channels
    at = _offset(image, channel, position, channels, h * w, CHANNELS_LAST)
    tl.store(packed + at, rounded(mean, packed), inside)


@triton.jit(**ANY_NUMBERS)
def pool_kernel(
    batch, channels, H, W,
    stride_n, stride_c, stride_h, stride_w,
    x, packed, norms,
    MAPS: tl.constexpr, NORMS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, BLOCKS: tl.constexpr, TAPS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (block of positions, block of channels)."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    channels, stride_c = tl.cast(channels, INDEX), tl.cast(stride_c, INDEX)
    number, row, before = locate_block(tl.program_id(0).to(INDEX), batch, H, W, MAPS, BLOCKS)
    channel = tl.program_id(1).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    for i in tl.static_range(len(TAPS)):
        if pick(MAPS, number, 3) == TAPS[i]:
            _pool(
                x, packed, norms, number, row, before, channel, batch, channels, H, W,
                (stride_n, stride_c, stride_h, stride_w), MAPS, NORMS, CHANNELS_LAST, TAPS[i], LANES // TAPS[i],
            )  # fmt: skip


@triton.jit
def _holding(place, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """First and last position, along an axis, of the windows that hold a place."""
    return tl.cdiv(tl.maximum(place - PADDING, 0), STRIDE), tl.minimum((place + PADDING) // STRIDE, length - 1)


@triton.jit
def _gathered(
    grad, image, channel, y, x, inside, channels, h, w, CHANNELS_LAST: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of the gradients of a pool's windows that hold a pixel: at most ROWS x COLUMNS."""
    top, bottom = _holding(y, h, KERNEL, STRIDE, PADDING)
    left, right = _holding(x, w, KERNEL, STRIDE, PADDING)
    total = tl.zeros(inside.shape, tl.float32)
    for i in range(ROWS):
        for j in range(COLUMNS):
            at = _offset(image, channel, (top + i) * w + (left + j), channels, h * w, CHANNELS_LAST)
            holds = inside & (top + i <= bottom) & (left + j <= right)
            total += tl.load(grad + at, holds, 0.0).to(tl.float32)
    return total / (KERNEL * KERNEL)


@triton.jit(**ANY_NUMBERS)
def gradient_kernel(
    batch, channels, H, W,
    stride_n, stride_c, stride_h, stride_w,
    grad, result,
    POOLS: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of channels). POOLS are kernel, stride, padding, and the most rows and columns of
    windows that a pixel is in."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    channels, stride_c = tl.cast(channels, INDEX), tl.cast(stride_c, INDEX)
    pixel = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < batch * H * W) & (channel < channels)
    image, y, x = pixel // W // H, pixel // W % H, pixel % W
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for i in tl.static_range(len(POOLS)):
        h, w = pooled_size(H, W, POOLS[i][1])
        total += _gathered(
            grad, image, channel, y, x, inside, channels, h, w, CHANNELS_LAST,
            POOLS[i][0], POOLS[i][1], POOLS[i][2], POOLS[i][3], POOLS[i][4],
        )  # fmt: skip
        grad += batch * channels * (h * w)
    mean = tl.load(grad + (image * channels + channel), inside, 0.0).to(tl.float32)
    total += mean / (H * W).to(tl.float32)
    at = image * stride_n + channel * stride_c + y * stride_h + x * stride_w
    tl.store(result + at, rounded(total, result), inside)


def forward(x: Tensor, pools: Sequence[int], channels_last: bool, packed: Tensor) -> None:
    """Write the maps of x [N, C, H, W], of any strides, one after the other: `pools` are (kernel, stride, padding)."""
    pool(x, [*_triples(pools), GLOBAL], channels_last, packed)


def pool(
    x: Tensor, maps: Sequence[tuple[int, int, int]], channels_last: bool, packed: Tensor, norms: Tensor | None = None
) -> None:
    """Write maps; with norms [2, maps, C], relu(norm(map))."""
    batch, channels, H, W = x.shape
    constants = windows(maps)
    counts = [batch * h * w for h, w in sizes(H, W, maps)]
    largest = max(extent(x), packed.numel()) + max(kernel for kernel, _, _ in maps) + LANES * CHANNELS
    with torch.cuda.device_of(x):
        pool_kernel[sum(map(triton.cdiv, counts, constants["BLOCKS"])), triton.cdiv(channels, CHANNELS)](
            batch, channels, H, W, *x.stride(), x, packed, norms, NORMS=0 if norms is None else norms[0].numel(),
            CHANNELS_LAST=channels_last, INDEX=index_type(largest), **constants, num_warps=4 if x.stride(1) == 1 else 8,
        )  # fmt: skip


def windows(maps: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Constants of the kernel that pools; it adds to each map how many taps are summed at once."""
    taps = [1 if kernel == 1 else FEW if kernel**2 <= FEW else MANY for kernel, _, _ in maps]
    table = tuple((*pool, number) for pool, number in zip(maps, taps, strict=True))
    blocks = tuple(LANES // number for number in taps)
    return {"MAPS": table, "BLOCKS": blocks, "TAPS": tuple(sorted(set(taps))), "LANES": LANES, "CHANNELS": CHANNELS}


def sizes(H: int, W: int, maps: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(1 + (H - 1) // stride, 1 + (W - 1) // stride) for _, stride, _ in maps]


def backward(grad: Tensor, pools: Sequence[int], channels_last: bool, result: Tensor) -> None:
    """Write the gradient [N, C, H, W], of any strides, from that of the maps that `forward` writes."""
    batch, channels, H, W = result.shape
    largest = max(extent(result), grad.numel()) + max(pools, default=0) + PIXELS * CHANNELS
    with torch.cuda.device_of(grad):
        gradient_kernel[triton.cdiv(batch * H * W, PIXELS), triton.cdiv(channels, CHANNELS)](
            batch, channels, H, W, *result.stride(), grad, result, POOLS=_holders(H, W, _triples(pools)),
            CHANNELS_LAST=channels_last, INDEX=index_type(largest), PIXELS=PIXELS, CHANNELS=CHANNELS,
        )  # fmt: skip


def _holders(H: int, W: int, pools: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, ...], ...]:
    """Pools, with the most rows and columns of windows that a pixel is in."""
    most = [triton.cdiv(kernel, stride) for kernel, stride, _ in pools]
    return tuple((*pool, min(n, h), min(n, w)) for pool, n, (h, w) in zip(pools, most, sizes(H, W, pools), strict=True))


def _triples(pools: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(pools[::3], pools[1::3], pools[2::3], strict=True))


def aot_cases() -> Iterator[AotCase]:
    """The network's pools: channels_last in every dtype, contiguous and 64-bit offsets once."""
    pools = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
    pooling = windows((*pools, GLOBAL)) | {"norms": None, "NORMS": 0}
    gathering = {"POOLS": _holders(16, 32, pools), "PIXELS": PIXELS, "CHANNELS": CHANNELS}
    last = {"channels": 512} | dict(zip(STRIDES, (512 * 512, 1, 512 * 32, 512), strict=True))
    kinds = [(dtype, last, tl.int32) for dtype in ("fp32", "fp16", "bf16")]
    kinds += [("fp32", {"stride_w": 1}, tl.int32), ("fp32", {}, tl.int64)]
    numbers = dict.fromkeys(("batch", "channels", "H", "W", *STRIDES), "i32")
    for (dtype, strides, index), (function, constants) in product(
        kinds, ((pool_kernel, pooling), (gradient_kernel, gathering))
    ):
        constants = constants | strides | {"CHANNELS_LAST": strides is last, "INDEX": index}
        types = {name: numbers.get(name, f"*{dtype}") for name in function.arg_names if name not in constants}
        warps = 8 if function is pool_kernel and strides is not last else 4
        yield AotCase(f"{function.__name__} {dtype} {strides} {index}", function, types, constants, warps)
