"""The loss, value and gradient from logits at 1/8, against resolution, batch and classes: time, and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bcmfnet.benchmarks import bcl
from bcmfnet.benchmarks.bcl import BASELINE, Case, bytes_moved, disagreement, expected, make_inputs
from bcmfnet.benchmarks.harness import Provider, Unavailable

__all__ = ["AXES", "BASELINE", "CASES", "bytes_moved", "disagreement", "expected", "make_inputs", "providers"]

PROVIDERS = ("cpp", "cuda", "triton", "eager_best", "naive")


def _case(batch: int, classes: int, height: int, width: int) -> Case:
    return Case((batch, classes, height // 8, width // 8), (height, width), "smooth")


SIZES = [(512, 512), (512, 1024), (1024, 1024), (1024, 2048), (2048, 2048), (2048, 4096)]
AXES: dict[str, dict[float, Case]] = {
    "resolution, Mpx": {height * width / 1e6: _case(1, 19, height, width) for height, width in SIZES},
    "batch, of 1024x1024": {batch: _case(batch, 19, 1024, 1024) for batch in (1, 2, 4, 8, 16)},
    "classes, at 256x512": {classes: _case(1, classes, 256, 512) for classes in (2, 5, 19, 50, 150, 400, 1000)},
}
"""What is varied, the others kept -> its values -> the case."""
CASES = list(dict.fromkeys(case for cases in AXES.values() for case in cases.values()))


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends, the fastest form in eager PyTorch and the usual one, as `bcl` has them."""
    return {name: provider for name, provider in bcl.providers(case, device).items() if name in PROVIDERS}


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The power of a value that its cost grows with: the slope of a straight line through both logarithms."""
    xs, ys = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
