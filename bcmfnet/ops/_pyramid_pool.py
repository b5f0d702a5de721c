"""Average pools of several sizes and the global average from one read, with gradients of any order in reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bcmfnet.ops import _extension, _limits, _options, backends
from bcmfnet.ops._derivatives import refuse_forward_mode
from bcmfnet.ops._library import EVERY_DEVICE, LIBRARY, without_autocast
from bcmfnet.reference import pyramid_pool as reference
from bcmfnet.reference.pyramid_pool import Pools, pooled_sizes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARY.define("pyramid_pool(Tensor x, int[] pools, bool channels_last) -> Tensor")
LIBRARY.define("pyramid_pool_backward(Tensor grad, SymInt[4] shape, int[] pools, bool channels_last) -> Tensor")


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
    check_map(x, FLOATS)
    pools = checked_pools(pools)
    refuse_forward_mode("pyramid_pool", x=x)
    channels_last = is_channels_last(x)
    packed = torch.ops.bcmfnet.pyramid_pool(x, [number for pool in pools for number in pool], channels_last)
    return tuple(_maps(packed, x.shape, pools, channels_last))


def check_map(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _options.tensor("x", x)
    if x.dtype not in dtypes:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"x: expected {', '.join(first)} or {last}, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [N, C, H, W] with C, H, W >= 1, got {list(x.shape)}")
    _limits.check_extent("x", x.shape)
    _limits.check_channels("x", x.shape)


def checked_pools(pools: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Pools as tuples. Raises ValueError for what are none."""
    triples = tuple(map(_triple, pools)) if isinstance(pools, Iterable) and not isinstance(pools, str) else (None,)
    if None in triples:
        raise ValueError(f"pools: expected (kernel, stride, padding) triples, kernel = 2 * padding + 1, got {pools!r}")
    if len(triples) > _limits.MAX_POOLS:
        raise ValueError(f"pools: expected at most {_limits.MAX_POOLS}, got {len(triples)}")
    for kernel, stride, _ in triples:
        _limits.check_at_most("pools", max(kernel, stride), _limits.MAX_WINDOW)
    return triples


def _triple(pool: Sequence[int]) -> tuple[int, int, int] | None:
    numbers = _options.integers_of(pool)
    if numbers is None or len(numbers) != 3:
        return None
    kernel, stride, padding = numbers
    return numbers if stride >= 1 and padding >= 0 and kernel == 2 * padding + 1 else None


def is_channels_last(x: Tensor) -> bool:
    """Whether results of x should be channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _triples(pools: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(zip(pools[::3], pools[1::3], pools[2::3], strict=True))


def _packed(x: Tensor, pools: Sequence[int]) -> Tensor:
    """[N * C * L], not yet written: one map after the other, L positions in all."""
    positions = sum(h * w for h, w in pooled_sizes(*x.shape[2:], _triples(pools)))
    return torch.empty(x.shape[0] * x.shape[1] * positions, dtype=x.dtype, device=x.device)


def _maps(packed: Tensor, shape: Sequence[int], pools: Pools, channels_last: bool) -> list[Tensor]:
    """The maps [N, C, h, w] in a packed tensor, for x [N, C, H, W] of some shape."""
    batch, channels, *size = shape
    sizes = pooled_sizes(*size, pools)
    parts = packed.split([batch * channels * h * w for h, w in sizes])
    if channels_last:
        return [part.view(batch, h, w, channels).permute(0, 3, 1, 2) for part, (h, w) in zip(parts, sizes, strict=True)]
    return [part.view(batch, channels, h, w) for part, (h, w) in zip(parts, sizes, strict=True)]


def _gradient(grad: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """[N, C, H, W], not yet written."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=memory_format)


class _Kernels(NamedTuple):
    """Kernels that write into outputs given to them; float64 is served by the reference."""

    run_forward: Callable[[Tensor, list[int], bool, Tensor], None]
    """Of (x [N, C, H, W] of any strides, pools, channels_last, packed [N * C * L]), none of them empty.

    In `packed`, each map is [N, C, h, w], or [N, h, w, C] if `channels_last`.
    """
    run_backward: Callable[[Tensor, list[int], bool, Tensor], None]
    """Of (grad [N * C * L], packed likewise, contiguous, pools, channels_last, result [N, C, H, W] of any strides)."""


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


def _run_reference(x: Tensor, pools: list[int], channels_last: bool, packed: Tensor) -> None:
    triples = _triples(pools)
    maps = _maps(packed, x.shape, triples, channels_last)
    for to, value in zip(maps, reference.pyramid_pool(x, triples), strict=True):
        to.copy_(value)


def _run_reference_backward(grad: Tensor, pools: list[int], channels_last: bool, result: Tensor) -> None:
    triples = _triples(pools)
    grads = _maps(grad, result.shape, triples, channels_last)
    with without_autocast(grad):
        result.copy_(reference.pyramid_pool_backward(grads, result.shape[2:], triples))


_REFERENCE = _Kernels(_run_reference, _run_reference_backward)


def _serving(x: Tensor) -> _Kernels:
    serve = backends.implementation("pyramid_pool", x.device.type)
    return _REFERENCE if x.dtype == torch.float64 else serve


def _forward(x: Tensor, pools: list[int], channels_last: bool) -> Tensor:
    packed = _packed(x, pools)
    if packed.numel():
        _serving(x).run_forward(x, pools, channels_last, packed)
    return packed


def _backward(grad: Tensor, shape: list[int], pools: list[int], channels_last: bool) -> Tensor:
    result = _gradient(grad, shape, channels_last)
    if result.numel():
        _serving(grad).run_backward(grad.contiguous(), pools, channels_last, result)
    return result


@torch.library.register_fake("bcmfnet::pyramid_pool", lib=LIBRARY)
def _forward_fake(x: Tensor, pools: list[int], channels_last: bool) -> Tensor:
    return _packed(x, pools)


@torch.library.register_fake("bcmfnet::pyramid_pool_backward", lib=LIBRARY)
def _backward_fake(grad: Tensor, shape: list[int], pools: list[int], channels_last: bool) -> Tensor:
    return _gradient(grad, shape, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pools, channels_last = inputs
    ctx.arguments = (x.shape, pools, channels_last)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    refuse_forward_mode("pyramid_pool", grad=grad)
    return torch.ops.bcmfnet.pyramid_pool_backward(grad, *ctx.arguments), None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[2:]


def _differentiate_second(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    refuse_forward_mode("pyramid_pool", grad=grad)
    return torch.ops.bcmfnet.pyramid_pool(grad, *ctx.arguments), None, None, None


LIBRARY.impl("pyramid_pool", _forward, EVERY_DEVICE)
LIBRARY.impl("pyramid_pool_backward", _backward, EVERY_DEVICE)
backends.register("pyramid_pool", "cpu", "cpp", native(), _extension.load)
backends.register("pyramid_pool", "cpu", "reference", _REFERENCE)
backends.register("pyramid_pool", "cpu", "triton", _triton(), backends.no_interpreter)
backends.register("pyramid_pool", "cuda", "cuda", native(), _extension.load_cuda)
backends.register("pyramid_pool", "cuda", "triton", _triton(), backends.no_triton)
backends.register("pyramid_pool", "cuda", "reference", _REFERENCE)
torch.library.register_autograd("bcmfnet::pyramid_pool", _differentiate, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "bcmfnet::pyramid_pool_backward", _differentiate_second, setup_context=_setup_second, lib=LIBRARY
)
