"""A pyramid context module in evaluation mode, as a fixed sequence of kernels:

pool      relu(norm(.)) of the maps that the first 1x1s read (in kernels/pyramid_pool.py)
scale     those 1x1s: of all branches, and the shortcut
begin     inputs of the convolutions that wait for none, and what compression reads of branches without one
convolve  for each level of the fusing order: y = conv(input), and from it the inputs of those that receive it
compress  the 1x1 of all branches, plus the shortcut

Inputs of convolutions and of compression are kept activated at full size, one map [pixels, b] each, a slot: first one
for each convolution, then one for each branch, as their norms are in order. Upsampled by its reader instead, a 3x3's
input would be computed 9 times for each block of outputs: 5 us against 1.3 us of products at the network's size, where
`begin` and its launch cost 2. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import (
    INTERPRETED,
    activate,
    extent,
    index_type,
    lerp_weight,
    locate_block,
    pick,
    pooled_size,
    rounded,
    scratch,
)
from bcmfnet.kernels.autotune import AotCase, autotune
from bcmfnet.kernels.pyramid_pool import ANY_NUMBERS, GLOBAL, STRIDES, pool, pool_kernel, sizes, windows

IDENTITY = (1, 1, 0)
"""The map itself as a pool."""

PROCESSORS = 132  # multiprocessors of an H100 or H200
TILES = [(128, 64)] if INTERPRETED.value else [(16, 32), (32, 32), (32, 64), (64, 64)]  # rows x columns of products
IN_FLOAT32 = 3  # So many of TILES serve float32: 64 x 64 spill.
BEGIN = {"ROWS": 128 if INTERPRETED.value else 16, "COLUMNS": 128}  # 16 values a thread
MOST = 128  # A block leaves a map by at most so many rows or columns.


@triton.jit
def _gemm(
    maps, row, inside, place, apart, weights, column, width,
    SIDE: tl.constexpr, COUNT: tl.constexpr, IN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Sums [rows, columns], float32, of COUNT products of rows [.., IN] and weights [COUNT, IN, width], BYTES of a row
    at once: rows of the SIDE x SIDE pixels around one, zeros beyond the map; or of maps `apart`, where SIDE is 1."""
    DEPTH: tl.constexpr = BYTES * 8 // maps.dtype.element_ty.primitive_bitwidth
    CHUNKS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    total = tl.zeros([row.shape[0], column.shape[1]], tl.float32)
    for step in range(COUNT * CHUNKS):
        number, depth = step // CHUNKS, step % CHUNKS * DEPTH + tl.arange(0, DEPTH).to(row.dtype)
        if SIDE == 1:
            reads, at = inside, row + number * apart
        else:
            y, x, H, W = place
            down, right = number // SIDE - SIDE // 2, number % SIDE - SIDE // 2
            reads = inside & (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
            at = row + (down * W + right)
        a = tl.load(maps + (at * IN + depth[None, :]), reads & (depth < IN)[None, :], 0.0)
        depth = depth[:, None]
        b = tl.load(weights + ((number * IN + depth) * width + column), (depth < IN) & (column < width), 0.0)
        if INTERPRETED:  # it would multiply the bits of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _source(position, size, out):
    """Lower and upper source position along one axis, the weight of the upper one, and whether there is no other."""
    low = tl.maximum((2 * position + 1) * size - out, 0) // (2 * out)
    return low, tl.minimum(low + 1, size - 1), lerp_weight(position, low, size, out), size == out


@triton.jit
def _between(a, b, source):
    return tl.where(source[3], a, a + source[2] * (b - a))


@triton.jit
def _rows_before(number, batch, H, W, MAPS: tl.constexpr):
    """Positions, in all images, of the maps before one of them."""
    before = batch * 0
    for i in tl.static_range(len(MAPS)):
        h, w = pooled_size(H, W, MAPS[i][1])
        before += tl.where(number > i, batch * h * w, 0)
    return before


@triton.jit
def _upsampled(scaled, branch, place, column, mask, batch, MAPS: tl.constexpr, BRANCH_CHANNELS: tl.constexpr):
    """Bilinear values [pixels, columns] of a branch at (image, y, x) of (H, W)."""
    image, y, x, H, W = place
    h, w = pooled_size(H, W, pick(MAPS, branch, 1))
    rows, columns = _source(y, h, H), _source(x, w, W)
    first = _rows_before(branch, batch, H, W, MAPS) + image * (h * w)
    top, bottom = first + rows[0] * w, first + rows[1] * w
    a = tl.load(scaled + ((top + columns[0]) * BRANCH_CHANNELS + column), mask, 0.0).to(tl.float32)
    b = tl.load(scaled + ((top + columns[1]) * BRANCH_CHANNELS + column), mask, 0.0).to(tl.float32)
    c = tl.load(scaled + ((bottom + columns[0]) * BRANCH_CHANNELS + column), mask, 0.0).to(tl.float32)
    d = tl.load(scaled + ((bottom + columns[1]) * BRANCH_CHANNELS + column), mask, 0.0).to(tl.float32)
    return _between(_between(a, b, columns), _between(c, d, columns), rows)


@triton.jit
def _fill(
    slots, norms, slot, value, pixel, column, mask, pixels, NORMS: tl.constexpr, BRANCH_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write relu(norm(value)) [pixels, columns]."""
    value = activate(value, norms, slot * BRANCH_CHANNELS + column, column < BRANCH_CHANNELS, NORMS)
    tl.store(slots + ((slot * pixels + pixel) * BRANCH_CHANNELS + column), rounded(value, slots), mask)


@triton.jit
def _place(pixel, H, W):
    return pixel // W // H, pixel // W % H, pixel % W, H, W


@triton.jit(**ANY_NUMBERS)
def scale_kernel(
    batch, H, W,
    pooled, scale, shortcut, scaled, residual,
    MAPS: tl.constexpr, BRANCHES: tl.constexpr,
    CHANNELS: tl.constexpr, BRANCH_CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    INDEX: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Program (block of a map's positions, block of columns); the map after those of the branches is the shortcut's."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    number, row, before = locate_block(tl.program_id(0).to(INDEX), batch, H, W, MAPS, BLOCKS)
    h, w = pooled_size(H, W, pick(MAPS, number, 1))
    row += tl.arange(0, ROWS)[:, None]
    inside = row < batch * h * w
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weights, result, width = (
        scale + number * (CHANNELS * BRANCH_CHANNELS),
        scaled + before * BRANCH_CHANNELS,
        BRANCH_CHANNELS,
    )
    if shortcut is not None:
        weights, result = tl.where(number < BRANCHES, weights, shortcut), tl.where(number < BRANCHES, result, residual)
        width = tl.where(number < BRANCHES, BRANCH_CHANNELS, OUTPUTS)
    total = _gemm(pooled, before + row, inside, None, 0, weights, column, width, 1, 1, CHANNELS, BYTES)
    tl.store(result + (row * width + column), rounded(total, result), inside & (column < width))


@triton.jit(**ANY_NUMBERS)
def begin_kernel(
    batch, H, W,
    scaled, norms, slots,
    JOBS: tl.constexpr, MAPS: tl.constexpr, NORMS: tl.constexpr, BRANCH_CHANNELS: tl.constexpr,
    INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of columns, job). Jobs are slots, a branch, and one to be added or -1."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    pixel = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    job, place, mask = tl.program_id(2), _place(pixel, H, W), (pixel < batch * H * W) & (column < BRANCH_CHANNELS)
    value = _upsampled(scaled, pick(JOBS, job, 1), place, column, mask, batch, MAPS, BRANCH_CHANNELS)
    other = pick(JOBS, job, 2)
    if other >= 0:
        value += _upsampled(scaled, other, place, column, mask, batch, MAPS, BRANCH_CHANNELS)
    _fill(slots, norms, pick(JOBS, job, 0), value, pixel, column, mask, batch * H * W, NORMS, BRANCH_CHANNELS)


@triton.jit(**ANY_NUMBERS)
def convolve_kernel(
    batch, H, W,
    scaled, norms, process, slots,
    TASKS: tl.constexpr, JOBS: tl.constexpr, SIDE: tl.constexpr, MAPS: tl.constexpr,
    NORMS: tl.constexpr, BRANCH_CHANNELS: tl.constexpr,
    INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of columns, task). Tasks are branches, their slots and their first taps. Jobs are
    slots to fill, the branch whose result they take, and another to be added, or -1."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    pixels, task = batch * H * W, tl.program_id(2)
    pixel = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place, inside = _place(pixel, H, W), pixel < pixels
    maps = slots + pick(TASKS, task, 1) * pixels * BRANCH_CHANNELS
    weights = process + pick(TASKS, task, 2).to(INDEX) * (BRANCH_CHANNELS * BRANCH_CHANNELS)
    total = _gemm(
        maps,
        pixel,
        inside,
        (place[1], place[2], H, W),
        0,
        weights,
        column,
        BRANCH_CHANNELS,
        SIDE,
        SIDE * SIDE,
        BRANCH_CHANNELS,
        BYTES,
    )
    mask = inside & (column < BRANCH_CHANNELS)
    for i in tl.static_range(len(JOBS)):
        if pick(TASKS, task, 0) == JOBS[i][1]:
            value = total
            if JOBS[i][2] >= 0:
                value += _upsampled(scaled, JOBS[i][2], place, column, mask, batch, MAPS, BRANCH_CHANNELS)
            _fill(slots, norms, JOBS[i][0], value, pixel, column, mask, pixels, NORMS, BRANCH_CHANNELS)


@triton.jit(**ANY_NUMBERS)
def compress_kernel(
    batch, H, W,
    stride_n, stride_c, stride_h, stride_w,
    slots, compression, residual, out,
    FUSING: tl.constexpr, BRANCHES: tl.constexpr, BRANCH_CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of columns)."""
    batch, H, W = batch.to(INDEX), H.to(INDEX), W.to(INDEX)
    pixels = batch * H * W
    pixel = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, mask = pixel < pixels, (pixel < pixels) & (column < OUTPUTS)
    slots += FUSING * pixels * BRANCH_CHANNELS
    total = _gemm(slots, pixel, inside, None, pixels, compression, column, OUTPUTS, 1, BRANCHES, BRANCH_CHANNELS, BYTES)
    if residual is not None:
        total += tl.load(residual + (pixel * OUTPUTS + column), mask, 0.0).to(tl.float32)
    image, y, x, H, W = _place(pixel, H, W)
    at = image * stride_n + column * tl.cast(stride_c, INDEX) + y * stride_h + x * stride_w
    tl.store(out + at, rounded(total, out), mask)


CONFIGS = [triton.Config({"BYTES": size}, num_warps=4, num_stages=stages) for size, stages in ((256, 4), (128, 5))]
scale_products = autotune(CONFIGS, ["CHANNELS", "BRANCH_CHANNELS", "ROWS", "COLUMNS"])(scale_kernel)
convolve_products = autotune(CONFIGS, ["SIDE", "BRANCH_CHANNELS", "ROWS", "COLUMNS"])(convolve_kernel)
compress_products = autotune(CONFIGS, ["BRANCH_CHANNELS", "OUTPUTS", "ROWS", "COLUMNS"])(compress_kernel)


def lmfm(x: Tensor, weights: Any, out: Tensor) -> None:
    """Write out [N, O, H, W] of x [N, C, H, W], both of any strides; `weights` as in bcmfnet/reference/lmfm.py."""
    scale_norms, fusion_norms, scale, process, compression, shortcut, pools, kernels, receives = weights
    (batch, channels, H, W), (branches, _, width), outputs = x.shape, scale.shape, compression.shape[1]
    maps = ((IDENTITY,) if branches == len(pools) + 2 else ()) + (*pools, GLOBAL)
    read = maps if shortcut is None else (*maps, IDENTITY)
    rows, pixels, fusing = [batch * h * w for h, w in sizes(H, W, read)], batch * H * W, sum(map(bool, kernels))
    begin, levels = plan(kernels, receives)

    pooled, scaled = scratch(x, x.dtype, sum(rows), channels), scratch(x, x.dtype, sum(rows[:branches]), width)
    slots = scratch(x, x.dtype, fusing + branches, pixels, width)
    residual = None if shortcut is None else scratch(x, x.dtype, pixels, outputs)
    largest = max(extent(x, out, pooled, slots, scale, process, compression), 2 * max(H, W) ** 2)
    common = {"BRANCH_CHANNELS": width, "INDEX": index_type(largest + MOST * max(channels, width, outputs))}
    filling = {"MAPS": maps, "NORMS": fusion_norms[0].numel()} | common

    pool(x, read, True, pooled, scale_norms)
    with torch.cuda.device_of(x):
        size, blocks = tile(rows, max(width, outputs), x.dtype)
        scale_products[sum(triton.cdiv(n, size["ROWS"]) for n in rows), blocks](
            batch, H, W, pooled, scale, shortcut, scaled, residual, MAPS=read, BRANCHES=branches, CHANNELS=channels,
            OUTPUTS=outputs, BLOCKS=(size["ROWS"],) * len(read), **common, **size,
        )  # fmt: skip
        grid = triton.cdiv(pixels, BEGIN["ROWS"]), triton.cdiv(width, BEGIN["COLUMNS"]), len(begin)
        begin_kernel[grid](batch, H, W, scaled, fusion_norms, slots, JOBS=begin, **filling, **BEGIN)
        for side, tasks, jobs in levels:
            size, blocks = tile([pixels] * len(tasks), width, x.dtype)
            convolve_products[triton.cdiv(pixels, size["ROWS"]), blocks, len(tasks)](
                batch, H, W, scaled, fusion_norms, process, slots, TASKS=tasks, JOBS=jobs, SIDE=side, **filling, **size
            )
        size, blocks = tile([pixels], outputs, x.dtype)
        compress_products[triton.cdiv(pixels, size["ROWS"]), blocks](
            batch, H, W, *out.stride(), slots, compression, residual, out, FUSING=fusing, BRANCHES=branches,
            OUTPUTS=outputs, **common, **size,
        )  # fmt: skip


Job = tuple[int, int, int]


def plan(kernels: Sequence[int], receives: Sequence[int]) -> tuple[tuple[Job, ...], list[tuple[int, Any, Any]]]:
    """What `begin` fills, and side, tasks and jobs of each launch of `convolve`; see the kernels."""
    fusing = [i for i, kernel in enumerate(kernels) if kernel]
    taps = [0, *accumulate(kernel**2 for kernel in kernels)]
    level = [i for i in fusing if receives[i] < 0 or not kernels[receives[i]]]
    begin = [(fusing.index(i), i, receives[i]) for i in level]
    begin += [(len(fusing) + i, i, -1) for i, kernel in enumerate(kernels) if not kernel]
    launches = []
    while level:
        for side in sorted({kernels[i] for i in level}):
            same = [i for i in level if kernels[i] == side]
            jobs = [(len(fusing) + i, i, -1) for i in same]
            jobs += [(fusing.index(j), receives[j], j) for j in fusing if receives[j] in same]
            launches.append((side, tuple((i, fusing.index(i), taps[i]) for i in same), tuple(jobs)))
        level = [j for j in fusing if receives[j] in level]
    return tuple(begin), launches


def tile(rows: Sequence[int], columns: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Size of a block of products, and how many blocks make the columns: the one with which the busiest processor reads
    least, since reading takes longer than multiplying."""

    def cost(size: tuple[int, int]) -> int:
        blocks = sum(triton.cdiv(n, size[0]) for n in rows) * triton.cdiv(columns, size[1])
        return triton.cdiv(blocks, PROCESSORS) * sum(size)

    best = min(TILES[:IN_FLOAT32] if dtype == torch.float32 else TILES, key=cost)
    return {"ROWS": best[0], "COLUMNS": best[1]}, triton.cdiv(columns, best[1])


def aot_cases() -> Iterator[AotCase]:
    """LMFM at the network's width: `convolve`, which holds most, in every configuration, the others in the largest."""
    pools = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
    maps = (IDENTITY, *pools, GLOBAL, IDENTITY)
    begin, levels = plan((3, 3, 3, 0, 0), (2, 3, 4, -1, -1))
    known = {"BRANCH_CHANNELS": 128, "CHANNELS": 512, "OUTPUTS": 128, "BRANCHES": 5, "FUSING": 3, "MAPS": maps}
    known |= {"NORMS": 8 * 128, "JOBS": begin} | _strides(128)
    convolving = {"MAPS": maps[:-1]} | dict(zip(("SIDE", "TASKS", "JOBS"), levels[0], strict=True))
    pooling = windows(maps) | _strides(512) | {"channels": 512, "CHANNELS_LAST": True, "NORMS": 6 * 512}

    def case(function: Any, dtype: str, config: triton.Config, constants: dict[str, Any]) -> AotCase:
        numbers = {"batch": "i32", "H": "i32", "W": "i32", "norms": "*fp32"}
        shown = [f"{name} {value}" for name, value in constants.items() if not isinstance(value, tuple)]
        constants = {name: value for name, value in (known | constants).items() if name in function.arg_names}
        types = {name: numbers.get(name, f"*{dtype}") for name in function.arg_names if name not in constants}
        return AotCase(" ".join([function.__name__, dtype, *shown]), function, types, constants, config.num_warps)

    for dtype, tiles, index in (
        ("fp16", TILES, tl.int32), ("fp32", TILES[:IN_FLOAT32], tl.int32),
        ("bf16", TILES[:1], tl.int32), ("fp16", TILES[-1:], tl.int64),
    ):  # fmt: skip
        for (rows, columns), config in product(tiles, CONFIGS[::-1]):
            size = {"INDEX": index, "ROWS": rows, "COLUMNS": columns} | config.kwargs
            yield case(convolve_kernel, dtype, config, size | convolving)
        if dtype != "bf16":
            yield case(scale_kernel, dtype, config, size | {"BLOCKS": (rows,) * len(maps)})
            yield case(compress_kernel, dtype, config, size)
            plain = triton.Config({}, num_warps=4)
            yield case(begin_kernel, dtype, plain, {"INDEX": index} | BEGIN)
            yield case(pool_kernel, dtype, plain, pooling | {"INDEX": index})


def _strides(channels: int) -> dict[str, int]:
    """Of a channels_last map of the network's size."""
    return dict(zip(STRIDES, (channels * 512, 1, channels * 32, channels), strict=True))
