"""Host time of a call: each op on maps of a few pixels, where nothing but the way to the kernel and back takes time.

python -m bcmfnet.benchmarks.calls [--number N]

Prints the median of N calls in microseconds, on one thread. The calls take turns, many of one at a time: what disturbs
the machine disturbs all of them, and each finds the caches as it left them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bcmfnet.benchmarks import _timing
from bcmfnet.nn import LMFM, BoundaryCorrectedLoss
from bcmfnet.ops import (
    boundary_corrected_loss,
    lmfm,
    pyramid_pool,
    segmentation_loss,
    stem_conv,
    upsample_add_relu,
    upsample_argmax,
)

NUMBER, TURNS, WARM_UP = 2000, 10, 20


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    low, high = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 4, 4)
    target, criterion = torch.zeros(1, 4, 4, dtype=torch.uint8), BoundaryCorrectedLoss()
    leaf = high.clone().requires_grad_()
    weights = LMFM(2, 2, branch_channels=2).eval().pyramid_weights(torch.float32)

    images, kernel, bias = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.randn(2)

    def train(loss: Callable[..., torch.Tensor], **options: Any) -> None:
        leaf.grad = None
        loss(leaf, target, **options).backward()

    return {
        "boundary_corrected_loss, forward and backward": lambda: train(boundary_corrected_loss),
        "BoundaryCorrectedLoss, forward and backward": lambda: train(criterion),
        "without a boundary term, forward and backward": lambda: train(boundary_corrected_loss, boundary_weight=0.0),
        "boundary_corrected_loss": lambda: boundary_corrected_loss(high, target),
        "without a boundary term": lambda: boundary_corrected_loss(high, target, boundary_weight=0.0),
        "segmentation_loss": lambda: segmentation_loss(high, target, dice=1.0),
        "lmfm": lambda: lmfm(low, weights),
        "pyramid_pool": lambda: pyramid_pool(low, ((5, 2, 2),)),
        "stem_conv": lambda: stem_conv(images, kernel, bias),
        "upsample_add_relu": lambda: upsample_add_relu(high, low),
        "upsample_argmax": lambda: upsample_argmax(low, (4, 4)),
    }


def measure(number: int = NUMBER) -> dict[str, float]:
    """Median microseconds of each call."""
    timed = calls()
    times: dict[str, list[int]] = {name: [] for name in timed}
    with _timing.threads(1):
        for _ in range(TURNS):
            for name, call in timed.items():
                for _ in range(WARM_UP):
                    call()
                for _ in range(number // TURNS):
                    start = time.perf_counter_ns()
                    call()
                    times[name].append(time.perf_counter_ns() - start)
    return {name: median(taken) / 1e3 for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=NUMBER, help="of calls")
    for name, microseconds in measure(parser.parse_args().number).items():
        print(f"{name:48}{microseconds:7.1f} us")


if __name__ == "__main__":
    main()
