"""Average pools of several sizes and the global average from one read, with gradients of any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bcmfnet.ops import backends
from bcmfnet.ops._library import LIBRARY
from bcmfnet.reference import pyramid_pool as reference
from bcmfnet.reference.pyramid_pool import pooled_sizes

OPS = ("pyramid_pool",)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_POOLS = 6

LIBRARY.define("pyramid_pool(Tensor x, int[] pools) -> Tensor")
LIBRARY.define("pyramid_pool_backward(Tensor grad, SymInt[2] size, int[] pools, bool channels_last) -> Tensor")


def pyramid_pool(x: Tensor, pools: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Every `avg_pool2d(x, kernel, stride, padding)` (padding counts as zeros) and the global average.

    Args:
        x: float16, bfloat16, float32 or float64 [N, C, H, W], H and W >= 1, of any strides. Arithmetic is float32
            (float64 for float64).
        pools: up to 6 (kernel, stride, padding), kernel = 2 * padding + 1.

    Returns:
        For each pool [N, C, ceil(H / stride), ceil(W / stride)], then [N, C, 1, 1]: views of one tensor, in the
        memory format of x.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or value.
    """
    check_map(x, FLOATS)
    pools = checked_pools(pools)
    sizes = pooled_sizes(*x.shape[2:], pools)
    packed = torch.ops.bcmfnet.pyramid_pool(x, [number for pool in pools for number in pool])
    parts = packed.split([h * w for h, w in sizes], dim=2)
    return tuple(part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True))


def check_map(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"x: expected {', '.join(first)} or {last}, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [N, C, H, W] with C, H, W >= 1, got {list(x.shape)}")


def checked_pools(pools: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Pools as tuples. Raises ValueError for what are none."""
    message = f"pools: expected (kernel, stride, padding) triples, kernel = 2 * padding + 1, got {pools!r}"
    if isinstance(pools, str) or not isinstance(pools, Sequence):
        raise ValueError(message)
    for pool in pools:
        if not isinstance(pool, Sequence) or [type(value) for value in pool] != [int] * 3:
            raise ValueError(message)
        kernel, stride, padding = pool
        if stride < 1 or padding < 0 or kernel != 2 * padding + 1:
            raise ValueError(message)
    if len(pools) > MAX_POOLS:
        raise ValueError(f"pools: expected at most {MAX_POOLS}, got {len(pools)}")
    return tuple(tuple(pool) for pool in pools)


def is_channels_last(x: Tensor) -> bool:
    """Whether results of x should be channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _triples(pools: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip(pools[::3], pools[1::3], pools[2::3], strict=True))


def _packed(x: Tensor, pools: Sequence[int]) -> Tensor:
    """[N, C, L], not yet written; channels are innermost if they are so in x."""
    length = sum(h * w for h, w in pooled_sizes(*x.shape[2:], _triples(pools)))
    if is_channels_last(x):
        return torch.empty((x.shape[0], length, x.shape[1]), dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty((*x.shape[:2], length), dtype=x.dtype, device=x.device)


def _gradient(grad: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """[N, C, H, W], not yet written."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*grad.shape[:2], *size)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


class _Kernels(NamedTuple):
    """Kernels that write into outputs given to them; float64 is served by the reference."""

    run_forward: Callable[[Tensor, list[int], Tensor], None]
    """Of (x [N, C, H, W] of any strides, pools, packed [N, C, L] of any strides), none of them empty."""
    run_backward: Callable[[Tensor, list[int], Tensor], None]
    """Of (grad [N, C, L] of any strides, pools, result [N, C, H, W] of any strides), none of them empty."""


def native(library: str = "bcmfnet") -> _Kernels:
    """Kernels of a native library, by the namespace of its private ops."""
    return _Kernels(
        lambda *arguments: getattr(torch.ops, library)._pyramid_pool(*arguments),
        lambda *arguments: getattr(torch.ops, library)._pyramid_pool_backward(*arguments),
    )


def _triton() -> _Kernels:
    """The Triton kernels, imported by the first call."""

    def forward(*arguments: Any) -> None:
        from bcmfnet.kernels import pyramid_pool

        pyramid_pool.forward(*arguments)

    def backward(*arguments: Any) -> None:
        from bcmfnet.kernels import pyramid_pool

        pyramid_pool.backward(*arguments)

    return _Kernels(forward, backward)


def _run_reference(x: Tensor, pools: list[int], packed: Tensor) -> None:
    packed.copy_(reference.pyramid_pool(x, _triples(pools)))


def _run_reference_backward(grad: Tensor, pools: list[int], result: Tensor) -> None:
    with torch.autocast(grad.device.type, enabled=False):
        result.copy_(reference.pyramid_pool_backward(grad, result.shape[2:], _triples(pools)))


_REFERENCE = _Kernels(_run_reference, _run_reference_backward)


def _serving(x: Tensor) -> _Kernels:
    serve = backends.implementation("pyramid_pool", x.device.type)
    return _REFERENCE if x.dtype == torch.float64 else serve


def _forward(x: Tensor, pools: list[int]) -> Tensor:
    packed = _packed(x, pools)
    if packed.numel():
        _serving(x).run_forward(x, pools, packed)
    return packed


def _backward(grad: Tensor, size: list[int], pools: list[int], channels_last: bool) -> Tensor:
    result = _gradient(grad, size, channels_last)
    if result.numel():
        _serving(grad).run_backward(grad, pools, result)
    return result


@torch.library.register_fake("bcmfnet::pyramid_pool", lib=LIBRARY)
def _forward_fake(x: Tensor, pools: list[int]) -> Tensor:
    return _packed(x, pools)


@torch.library.register_fake("bcmfnet::pyramid_pool_backward", lib=LIBRARY)
def _backward_fake(grad: Tensor, size: list[int], pools: list[int], channels_last: bool) -> Tensor:
    return _gradient(grad, size, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pools = inputs
    ctx.arguments = (x.shape[2:], pools, is_channels_last(x))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.bcmfnet.pyramid_pool_backward(grad, *ctx.arguments), None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.pools = inputs[2]


def _differentiate_second(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.bcmfnet.pyramid_pool(grad, ctx.pools), None, None, None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("pyramid_pool", _forward, _key)
    LIBRARY.impl("pyramid_pool_backward", _backward, _key)
backends.register("pyramid_pool", "cpu", "reference", _REFERENCE)
backends.register("pyramid_pool", "cuda", "reference", _REFERENCE)
torch.library.register_autograd("bcmfnet::pyramid_pool", _differentiate, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "bcmfnet::pyramid_pool_backward", _differentiate_second, setup_context=_setup_second, lib=LIBRARY
)
