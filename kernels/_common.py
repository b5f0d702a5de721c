"""What the kernels of several ops share: element types, offsets, bilinear sources, and the maps of a pyramid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the interpreter runs the kernels: a program costs the same there whatever its size."""


def index_type(largest: int) -> tl.dtype:
    """The type that holds every offset up to the largest one."""
    return tl.int32 if largest < 2**31 else tl.int64


def extent(*tensors: Tensor) -> int:
    """Largest offset in one of the tensors."""
    return max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)


def scratch(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory [shape], or of the shape of `like`, that is not cleared."""
    return torch.empty(shape or like.shape, dtype=dtype, device=like.device)


@triton.jit
def rounded(value, to):
    """Float32 values in the type of a pointer's elements."""
    if INTERPRETED and to.dtype.element_ty == tl.bfloat16:  # the interpreter would cut off what is to be rounded
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # the compiler reads on after a return
        return value.to(to.dtype.element_ty)


@triton.jit
def lerp(a, b, weight):
    return a + weight * (b - a)


@triton.jit
def _quotient(numerator, denominator):
    """The rounded quotients of float32 integers; on a GPU the reciprocal is shared by all of one denominator."""
    if INTERPRETED:
        return tl.div_rn(numerator, denominator)
    else:  # Markstein: what is left of a quotient corrects its last bit
        reciprocal = tl.div_rn(1.0, denominator)
        quotient = numerator * reciprocal
        return tl.fma(tl.fma(-quotient, denominator, numerator), reciprocal, quotient)


@triton.jit
def lerp_weight(position, low, size, out, ALIGNED: tl.constexpr = False):
    """Weight of the upper source position: exact in integers, rounded once; ALIGNED is align_corners."""
    if ALIGNED:
        numerator, denominator = position * (size - 1) - low * (out - 1), tl.maximum(out - 1, 1)
    else:
        numerator, denominator = tl.maximum((2 * position + 1) * size - out, 0) - 2 * out * low, 2 * out
    return _quotient(numerator.to(tl.float32), denominator.to(tl.float32))


@triton.jit
def cell_source(cell, size, out, ALIGNED: tl.constexpr = False):
    """Lower and upper source position of a cell along one axis, and its first output position.

    ALIGNED the first cell is empty, and the last one has the last position alone.
    """
    low = tl.maximum(cell - 1, 0)
    high = tl.minimum(low + (out > size).to(cell.dtype), size - 1)
    if ALIGNED:
        first = tl.cdiv(low * (out - 1), tl.maximum(size - 1, 1))
    else:
        first = tl.maximum(out * (2 * cell - 1) + size - 1, 0) // (2 * size)
    return low, high, first


@triton.jit
def in_cell(position, cell, size, out, ALIGNED: tl.constexpr = False):
    """Whether an output position, from the cell's first one on, still belongs to the cell."""
    if ALIGNED:
        belongs = position * (size - 1) < tl.maximum(out - 1, 1) * cell
    else:
        belongs = (2 * position + 1) * size - out < 2 * out * cell
    return (position < out) & belongs


@triton.jit
def load_corners(plane, corners, mask=None, other=None):
    a = tl.load(plane + corners[0], mask, other).to(tl.float32)
    b = tl.load(plane + corners[1], mask, other).to(tl.float32)
    c = tl.load(plane + corners[2], mask, other).to(tl.float32)
    d = tl.load(plane + corners[3], mask, other).to(tl.float32)
    return a, b, c, d


@triton.jit
def pick(table: tl.constexpr, row, COLUMN: tl.constexpr):
    """A number of a constant table."""
    number = row * 0
    for i in tl.static_range(len(table)):
        number = tl.where(row == i, table[i][COLUMN], number)
    return number


@triton.jit
def pooled_size(H, W, stride):
    """Height and width of a pool's map."""
    return 1 + (H - 1) // stride, 1 + (W - 1) // stride


@triton.jit
def locate_block(block, batch, H, W, MAPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Number of the map that a block belongs to, the block's first position in it, and the positions, in all images, of
    the maps before; BLOCKS has the sizes of the maps' blocks."""
    number, row, before, start, end = block * 0, block, block * 0, block * 0, block * 0
    for i in tl.static_range(len(MAPS)):
        this = block >= start
        number, row = tl.where(this, i, number), tl.where(this, (block - start) * BLOCKS[i], row)
        before = tl.where(this, end, before)
        h, w = pooled_size(H, W, MAPS[i][1])
        end += batch * h * w
        start += tl.cdiv(batch * h * w, BLOCKS[i])
    return number, row, before


@triton.jit
def activate(value, norms, at, mask, NORMS: tl.constexpr):
    """relu(norm(value)), which keeps NaN; `norms` [2, NORMS] are multipliers and shifts."""
    value = value * tl.load(norms + at, mask, 0.0) + tl.load(norms + (NORMS + at), mask, 0.0)
    return tl.where(value < 0, 0.0, value)
