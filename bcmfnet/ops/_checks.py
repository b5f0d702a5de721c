"""Checks of tensors that several ops share; each names the argument in its message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bcmfnet.ops import _limits, _options

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*HALF_AND_SINGLE, torch.float64)


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError for a tensor of another dtype."""
    if tensor.dtype not in dtypes:
        *first, last = map(dtype_name, dtypes)
        raise TypeError(f"{name}: expected {', '.join(first)} or {last}, got {dtype_name(tensor.dtype)}")


def check_map(name: str, x: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError or ValueError for what is no map [N, C, H, W] of a size that the kernels take."""
    check_dtype(name, _options.tensor(name, x), dtypes)
    shape = x.shape
    _, channels, height, width = shape if len(shape) == 4 else (0, 0, 0, 0)
    if min(channels, height, width) < 1:
        raise ValueError(f"{name}: expected [N, C, H, W] with C, H, W >= 1, got {list(shape)}")
    _limits.check_extent(name, shape)
    _limits.check_channels(name, shape)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked_pools(pools: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Pools as tuples. Raises ValueError for what are none."""
    given = list(map(_triple, pools)) if isinstance(pools, Iterable) and not isinstance(pools, str) else [None]
    triples = tuple([triple for triple in given if triple is not None])
    if len(triples) < len(given):
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
    return (kernel, stride, padding) if stride >= 1 and padding >= 0 and kernel == 2 * padding + 1 else None


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A map [N, C, H, W] that is not yet written, in the dtype and memory format of another."""
    if is_channels_last(like):
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(tuple(shape))


def is_channels_last(x: Tensor) -> bool:
    """Whether results of x should be channels_last."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
