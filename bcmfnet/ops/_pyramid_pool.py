"""Average pools of several sizes and the global average from one read, with gradients of any order in reverse mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bcmfnet.ops._checks import check_map, checked_pools, is_channels_last
from bcmfnet.ops._derivatives import refuse_forward_mode
from bcmfnet.ops._op import Kernel, Op
from bcmfnet.reference import pyramid_pool as reference
from bcmfnet.reference.pyramid_pool import Pools, flat, pooled_sizes, triples


def pyramid_pool(x: Tensor, pools: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Every `avg_pool2d(x, kernel, stride, padding)` (padding counts as zeros) and the global average.

    Args:
        x: float16, bfloat16, float32 or float64 [N, C, H, W], H and W >= 1, of any strides. Arithmetic is float32
            (float64 for float64).
        pools: up to 6 (kernel, stride, padding), kernel = 2 * padding + 1.

    Returns:
        For each pool [N, C, ceil(H / stride), ceil(W / stride)], then [N, C, 1, 1], in the memory format of x; they
        are views of one tensor.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or value.
        NotImplementedError: a tensor with a tangent of forward mode.
    """
    check_map("x", x)
    pools = checked_pools(pools)
    refuse_forward_mode("pyramid_pool", x=x)
    channels_last = is_channels_last(x)
    return tuple(_maps(_FORWARD(x, flat(pools), channels_last), x.shape, pools, channels_last))


def _packed(x: Tensor, pools: Sequence[int], channels_last: bool) -> Tensor:
    """[N * C * L], not yet written: one map [N, C, h, w], or [N, h, w, C], after the other, L positions in all."""
    batch, channels, height, width = x.shape
    positions = sum(h * w for h, w in pooled_sizes(height, width, triples(pools)))
    return torch.empty(batch * channels * positions, dtype=x.dtype, device=x.device)


def _maps(packed: Tensor, shape: Sequence[int], pools: Pools, channels_last: bool) -> list[Tensor]:
    """The maps [N, C, h, w] in a packed tensor, for x [N, C, H, W] of some shape."""
    batch, channels, height, width = shape
    sizes = pooled_sizes(height, width, pools)
    parts = packed.split([batch * channels * h * w for h, w in sizes])
    if channels_last:
        return [part.view(batch, h, w, channels).permute(0, 3, 1, 2) for part, (h, w) in zip(parts, sizes, strict=True)]
    return [part.view(batch, channels, h, w) for part, (h, w) in zip(parts, sizes, strict=True)]


def _gradient(grad: Tensor, shape: Sequence[int], pools: Sequence[int], channels_last: bool) -> Tensor:
    """[N, C, H, W], not yet written."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _run_backward(
    kernel: Kernel, grad: Tensor, shape: Sequence[int], pools: Sequence[int], channels_last: bool, result: Tensor
) -> None:
    kernel(grad.contiguous(), pools, channels_last, result)


def _reference(x: Tensor, pools: Sequence[int], channels_last: bool, packed: Tensor) -> None:
    maps = _maps(packed, x.shape, triples(pools), channels_last)
    for to, value in zip(maps, reference.pyramid_pool(x, triples(pools)), strict=True):
        to.copy_(value)


def _reference_backward(grad: Tensor, pools: Sequence[int], channels_last: bool, result: Tensor) -> None:
    grads = _maps(grad, result.shape, triples(pools), channels_last)
    result.copy_(reference.pyramid_pool_backward(grads, result.shape[2:], triples(pools)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pools, channels_last = inputs
    ctx.arguments = (x.shape, pools, channels_last)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    refuse_forward_mode("pyramid_pool", grad=grad)
    return _BACKWARD(grad, *ctx.arguments), None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[2:]


def _differentiate_second(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    refuse_forward_mode("pyramid_pool", grad=grad)
    return _FORWARD(grad, *ctx.arguments), None, None, None


_OP = Op("pyramid_pool")
_FORWARD = _OP.define(
    "pyramid_pool(Tensor x, int[] pools, bool channels_last) -> Tensor",
    outputs=_packed, reference=_reference, setup_context=_setup_context, differentiate=_differentiate,
)  # fmt: skip
_BACKWARD = _OP.define(
    "pyramid_pool_backward(Tensor grad, SymInt[4] shape, int[] pools, bool channels_last) -> Tensor",
    outputs=_gradient, reference=_reference_backward, run=_run_backward,
    setup_context=_setup_second, differentiate=_differentiate_second,
)  # fmt: skip
