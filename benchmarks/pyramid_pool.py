"""Average pools of several sizes and the global one: our op, and the pools that it replaces; also with the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends, word
from bcmfnet.nn.context import DEFAULT_POOLS
from bcmfnet.ops import pyramid_pool
from bcmfnet.reference.pyramid_pool import pooled_sizes

BASELINE = "eager_best"

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative; torch adds up gradients of the pools that are each rounded to half precision."""


@dataclass(frozen=True)
class Case:
    """A map, and whether its gradient is asked for too."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    backward: bool = False

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), word(self.dtype), word(self.memory_format)]
        return "-".join(words + ["backward"] * self.backward)


FRAME, BATCH = (1, 512, 16, 32), (12, 512, 16, 16)  # of one frame of Cityscapes, and of its training batch of 1024s
CASES = [
    Case(FRAME),
    Case(FRAME, memory_format=torch.contiguous_format),
    Case(FRAME, torch.bfloat16),
    Case(BATCH, backward=True),
    Case(BATCH, memory_format=torch.contiguous_format, backward=True),
    Case(BATCH, torch.bfloat16, backward=True),
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The map, normal noise, and a cotangent of each pooled map."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [case.shape] + [(*case.shape[:2], *size) for size in pooled_sizes(*case.shape[2:], DEFAULT_POOLS)]
    x, *cotangents = (torch.randn(shape, generator=generator, device=device).to(case.dtype) for shape in shapes)
    x = x.contiguous(memory_format=case.memory_format).requires_grad_(case.backward)
    return x, *(cotangent.contiguous(memory_format=case.memory_format) for cotangent in cotangents)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends, torch's pools, also compiled, and the fastest form of them in eager PyTorch."""

    def with_gradient(pool: Provider) -> Provider:
        def call(x: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
            pooled = tuple(pool(x))
            return (*pooled, *torch.autograd.grad(pooled, x, cotangents)) if case.backward else pooled

        return call

    found = op_backends("pyramid_pool", device, with_gradient(lambda x: pyramid_pool(x, DEFAULT_POOLS)))
    pools = compiled(_pools)
    return found | {
        "eager_best": with_gradient(lambda x: _best_pools(x, case.backward)),
        "eager": with_gradient(_pools),
        "compile": pools if isinstance(pools, Unavailable) else with_gradient(pools),
    }


def _pools(x: Tensor) -> list[Tensor]:
    return [F.avg_pool2d(x, *pool) for pool in DEFAULT_POOLS] + [F.adaptive_avg_pool2d(x, 1)]


def _best_pools(x: Tensor, backward: bool) -> list[Tensor]:
    """The fastest form that was found on a CPU."""
    # Tried on one thread, ms. Forward, 1x512x16x32 float32: channels_last `mean` 0.24, over flattened pixels 0.27, with
    # adaptive_avg_pool2d 0.34, contiguous between 6.9; contiguous through channels_last 1.1, `mean` 5.2. With the
    # gradient, 12x512x16x16 channels_last: over flattened pixels 24.1, adaptive_avg_pool2d 38.5, `mean` 40.3; bfloat16
    # 31.0, 56.7, 51.9, pools of float32 40.2; contiguous adaptive_avg_pool2d 49.3, `mean` 49.7, flattened 66.6, through
    # channels_last 99.0.
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if channels_last and backward:
        mean = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[..., None, None]
        return [F.avg_pool2d(x, *pool) for pool in DEFAULT_POOLS] + [mean]
    if channels_last or backward:
        return [F.avg_pool2d(x, *pool) for pool in DEFAULT_POOLS] + [x.mean((2, 3), keepdim=True)]
    return [pooled.contiguous() for pooled in _best_pools(x.contiguous(memory_format=torch.channels_last), False)]


def expected(case: Case, x: Tensor, *cotangents: Tensor) -> list[Tensor]:
    """The same in float64."""
    exact = x.detach().double().requires_grad_(case.backward)
    pooled = _pools(exact)
    if not case.backward:
        return pooled
    return [*pooled, *torch.autograd.grad(pooled, exact, [cotangent.double() for cotangent in cotangents])]


def disagreement(case: Case, provider: str, output: tuple[Tensor, ...], expected: list[Tensor]) -> str | None:
    """Every pooled map, and the gradient, is within the error of its dtype."""
    for number, (actual, exact) in enumerate(zip(output, expected, strict=True)):
        error = ((actual.detach().double() - exact.detach()).norm() / exact.detach().norm()).item()
        if not error <= ERROR[case.dtype]:
            what = "gradient" if number == len(DEFAULT_POOLS) + 1 else f"pool {number}"
            return f"{what} is off by {error:.2g} of its norm"
    return None


def bytes_moved(case: Case) -> int:
    """The map read once and the pooled maps written once; the other way round for the gradient."""
    n, c, h, w = case.shape
    positions = h * w + sum(a * b for a, b in pooled_sizes(h, w, DEFAULT_POOLS))
    return (1 + case.backward) * n * c * positions * case.dtype.itemsize
