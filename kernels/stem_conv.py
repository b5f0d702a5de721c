"""The first convolution of a network on its frames: a program has neighbouring pixels of the result, and all that they
read as the rows of a matrix product, normalised on the way.

What neighbours read comes from the caches: the frame is read once from memory. Counted in the compiled code: no GPU has
run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import INTERPRETED, extent, index_type, rounded
from bcmfnet.kernels.autotune import AotCase

PIXELS = 2048 if INTERPRETED.value else 64  # of a program, in a row of the result
CHANNELS = 32  # of a program
TAPS = tl.constexpr(32)  # products of an element: 27, and what fills a tensor core's step
WARPS = 2  # Four would multiply as a group, from shared memory, and wait for each other over two steps of 16 taps.


@triton.jit
def stem_conv_kernel(
    channels, H, W, height, width,
    images_n, images_c, images_h, images_w, weight_n, weight_c, weight_h, weight_w, out_n, out_h, out_w,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    images, weight, bias, out,
    INDEX: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (row of the result, block of its columns, block of channels); the result is height x width."""
    image, y = tl.program_id(0).to(INDEX) // height, tl.program_id(0) % height
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    tap = tl.arange(0, TAPS)
    channel, row, column = tap % 3, tap // 9, tap // 3 % 3
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))[None, :]
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))[None, :]
    in_row, in_column = (2 * y - 1 + row)[None, :], 2 * x - 1 + column[None, :]
    inside = (in_row >= 0) & (in_row < H) & (in_column >= 0) & (in_column < W) & (tap < 27)[None, :]
    at = image * images_n + (channel * images_c)[None, :].to(INDEX) + in_row.to(INDEX) * images_h
    value = tl.load(images + (at + in_column.to(INDEX) * images_w), inside, 0).to(tl.float32)
    value = tl.where(inside, value * scale + shift, 0.0)  # around an image are zeros

    of = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = of < channels
    at = (channel * weight_c + row * weight_h + column * weight_w)[:, None].to(INDEX) + of.to(INDEX) * weight_n
    taps = tl.load(weight + at, there & (tap < 27)[:, None], 0.0)
    value = rounded(value, weight)
    if INTERPRETED:  # it would multiply the bits of bfloat16
        value, taps = value.to(tl.float32), taps.to(tl.float32)
    total = tl.dot(value, taps, input_precision="ieee")
    total += tl.load(bias + of, there, 0.0).to(tl.float32)
    total = tl.where(total < 0, 0.0, total)  # keeps NaN
    at = image * out_n + y.to(INDEX) * out_h + x.to(INDEX) * out_w + of
    tl.store(out + at, rounded(total, out), (x < width) & there)


def stem_conv(
    images: Tensor, weight: Tensor, bias: Tensor, scale: Sequence[float], shift: Sequence[float], out: Tensor
) -> None:
    """Write relu(conv2d(scale * images + shift, weight, bias, stride=2, padding=1)), channels innermost."""
    batch, channels, height, width = out.shape
    pixels = min(triton.next_power_of_2(max(width, 16)), PIXELS)
    with torch.cuda.device_of(images):
        stem_conv_kernel[batch * height, triton.cdiv(width, pixels), triton.cdiv(channels, CHANNELS)](
            channels, *images.shape[2:], height, width, *images.stride(), *weight.stride(),
            *(out.stride(axis) for axis in (0, 2, 3)),
            *scale, *shift, images, weight, bias, out,
            INDEX=index_type(extent(images, weight, out)), PIXELS=pixels, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Frames as bytes and as each dtype, planes or pixels, to each dtype; offsets of 64 bits."""
    constants = {"PIXELS": 64, "CHANNELS": CHANNELS}
    for of_images, dtype, unit in product(("u8", "fp32", "bf16"), ("fp32", "fp16", "bf16"), ("images_w", "images_c")):
        for index in (tl.int32, tl.int64):
            signature = {name: "i32" for name in stem_conv_kernel.arg_names if name not in (*constants, "INDEX")}
            signature |= {name: "fp32" for name in signature if name.startswith(("scale", "shift"))}
            signature |= {"images": f"*{of_images}", "weight": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}"}
            yield AotCase(
                f"{of_images} {unit} {dtype} {index}", stem_conv_kernel, signature | {unit: "constexpr"},
                constants | {"INDEX": index, unit: 1}, WARPS,
            )  # fmt: skip
