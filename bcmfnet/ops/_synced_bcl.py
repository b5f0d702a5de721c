"""The loss of a batch that lies on several processes: weight sum, counts and threshold are those of all of it.

A composition of calls of the op, so it is right on every backend: what is decided over the whole batch is agreed upon
first, by counting; then each process evaluates its own images with coefficients that stand for their share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bcmfnet.reference.bcl import Q_MAX, Q_SCALE, BclOptions, BclStats, quantise


def synced_loss(
    evaluate: Callable[..., tuple[Tensor, BclStats]], group: dist.ProcessGroup, logits: Tensor, target: Tensor,
    weight: Tensor | None, options: BclOptions, needs_grad: bool, inplace_grad: bool,
) -> tuple[Tensor, BclStats]:  # fmt: skip
    """Loss and stats of the batch of all processes, the same in each (with per_image but for the thresholds).

    The gradient is that of this process's part of the loss, times the number of processes. `evaluate` gives a loss and
    its stats for this process's images alone.
    """

    def count(options: BclOptions) -> Tensor:
        return evaluate(logits, target, weight, options, False, False)[1].selected

    options = _with_agreed_threshold(options, lambda options: int(_total(count(options), group)))
    labels = _label_counts(target, options.ignore_index, logits.shape[1])
    of_selected = options.norm == "selected" and options.boundary_weight != 0
    divisor = count(options) if of_selected else labels.sum()
    own = torch.stack([_sum_of_weights(labels, weight), divisor.double()])
    total = _total(own, group)
    shares = torch.where(own > 0, own, 1) / torch.where(total > 0, total, 1)
    ce_share, boundary_share = torch.where(total[0].isnan(), torch.nan, shares).tolist()
    weights = {"ce_weight": ce_share * options.ce_weight, "boundary_weight": boundary_share * options.boundary_weight}
    loss, stats = evaluate(logits, target, weight, options._replace(**weights), needs_grad, inplace_grad)
    parts = torch.stack([loss.detach(), ce_share * stats.ce, boundary_share * stats.boundary])
    value, ce, boundary = _total(parts, group)
    selected, valid = _total(torch.stack([stats.selected, stats.valid]), group)
    loss = _OfAll.apply(loss, value, dist.get_world_size(group))
    return loss, BclStats(ce, boundary, selected, valid, stats.threshold)


def _total(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the processes."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def _label_counts(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Valid pixels of each class, int64 [C]; a label that is no class is left to the op, which refuses it."""
    counts = (target != ignore_index) & (target >= 0) & (target < classes)
    return torch.bincount(target[counts].long(), minlength=classes)


def _sum_of_weights(labels: Tensor, weight: Tensor | None) -> Tensor:
    """float64; NaN where a valid pixel's weight is not finite."""
    if weight is None:
        return labels.sum().double()
    total = torch.where(labels > 0, labels * weight.double(), 0.0).sum()
    return torch.where(total.isfinite(), total, torch.nan)


def _with_agreed_threshold(options: BclOptions, count: Callable[[BclOptions], int]) -> BclOptions:
    """Options that select by a threshold alone, that of all processes; unchanged where no other image decides.

    `count` is how many candidates all processes select together. The K-th largest score is found by bisection, in up
    to 16 counts.
    """
    by_rank = options.ratio > 0 or options.min_kept > 0 or options.max_kept is not None
    if options.per_image or options.boundary_weight == 0 or not by_rank:
        return options

    def at(t: int) -> BclOptions:
        return options._replace(threshold=t / Q_SCALE, ratio=0.0, min_kept=0, max_kept=None)

    @functools.cache
    def at_least(t: int) -> int:
        return count(at(t))

    tau = int(quantise(torch.tensor(options.threshold, dtype=torch.float64)))
    candidates = at_least(0)
    kept = min(candidates, max(options.min_kept, math.floor(options.ratio * candidates)))
    t = _kth_largest(at_least, kept, 0, tau)
    if options.max_kept is not None and options.max_kept <= candidates:
        t = _kth_largest(at_least, options.max_kept, t, Q_MAX)
    return at(t)


def _kth_largest(at_least: Callable[[int], int], k: int, low: int, high: int) -> int:
    """The k-th largest score, or the bound from low to high that is nearest to it; at_least(t) counts scores >= t."""
    if at_least(high) >= k:
        return high
    if at_least(low) < k:
        return low
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at_least(middle) >= k else (low, middle - 1)
    return low


class _OfAll(torch.autograd.Function):
    """The loss of all processes in the place of this one's part, with the gradient of that part times their number."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.processes, None, None
