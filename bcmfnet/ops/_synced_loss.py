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

from bcmfnet.ops._bcl import Inputs, evaluate
from bcmfnet.reference.bcl import Q_MAX, Q_SCALE, BclOptions, BclStats, OverlapTerms, overlap_terms, quantise
from bcmfnet.reference.terms import Sums


def synced_loss(
    group: dist.ProcessGroup, inputs: Inputs, options: BclOptions, needs_grad: bool, inplace_grad: bool
) -> tuple[Tensor, BclStats]:
    """Loss and stats of the batch of all processes, the same in each (with per_image but for the thresholds).

    The gradient is that of this process's part of the loss, times the number of processes.
    """

    def count(options: BclOptions) -> Tensor:
        return evaluate(inputs, options, False, False).counts[0]

    options = _with_agreed_threshold(options, lambda options: int(_total(count(options), group)))
    weights, valid = _weights(inputs, options)
    of_selected = options.norm == "selected" and options.boundary_weight != 0
    images = valid.flatten(1).any(1).sum()
    everywhere = torch.ones_like(valid) if options.everywhere else valid
    plain = torch.ones_like(valid, dtype=torch.float64) if inputs.pixel_weight is None else inputs.pixel_weight.double()
    divisors = (
        torch.where(weights.isfinite().all(), weights.sum(), torch.nan),
        count(options) if of_selected else valid.sum(),
        torch.where(everywhere, plain, 0.0).sum(),
        images,
    )
    own = torch.stack([divisor.double() for divisor in divisors])
    total = _total(own, group)
    shares = torch.where(own > 0, own, 1) / torch.where(total > 0, total, 1)
    ce, boundary, distillation, overlap = torch.where(total[0].isnan(), torch.nan, shares).tolist()
    shared = None if options.overlap_per_image or not options.has_overlap else _shared_overlap(group, inputs, options)
    overlap = overlap if shared is None else 1.0
    local = options._replace(
        ce_weight=ce * options.ce_weight, focal_weight=ce * options.focal_weight,
        boundary_weight=boundary * options.boundary_weight,
        distillation_weight=distillation * options.distillation_weight, dice_weight=overlap * options.dice_weight,
        jaccard_weight=overlap * options.jaccard_weight, tversky_weight=overlap * options.tversky_weight,
    )  # fmt: skip
    result = evaluate(
        inputs if shared is None else inputs._replace(shared_slopes=shared.slopes), local, needs_grad, inplace_grad
    )
    share_of_each = (ce, boundary, ce, overlap, overlap, overlap, distillation)
    values = _total(result.values * result.values.new_tensor(share_of_each), group)
    if shared is not None:
        values[3:6] = torch.stack(shared.values)
    counts = _total(result.counts, group)
    weight_of_each = (
        options.ce_weight, options.boundary_weight, options.focal_weight, options.dice_weight, options.jaccard_weight,
        options.tversky_weight, options.distillation_weight,
    )  # fmt: skip
    value = values.new_zeros(())
    for weight, mean in zip(weight_of_each, values, strict=True):
        value = value + weight * mean if weight != 0 else value
    value = torch.where(total[0].isnan(), torch.nan, value)
    loss = _OfAll.apply(result.loss, value, dist.get_world_size(group))
    return loss, result._replace(values=values, counts=counts).stats()


def _weights(inputs: Inputs, options: BclOptions) -> tuple[Tensor, Tensor]:
    """Weight of each pixel in the mean of the cross-entropy, float64 [N, H, W], and whether it is valid.

    A label that is no class is left to the op, which refuses it.
    """
    logits, target, weight, pixel_weight, *_ = inputs
    target = target.long()
    classes = 2 if options.binary else logits.shape[1]
    valid = (target != options.ignore_index) & (target >= 0) & (target < classes)
    each = torch.ones_like(target, dtype=torch.float64)
    if weight is not None:
        each = weight.double()[torch.where(valid, target, 0)]
    if pixel_weight is not None:
        valid = valid & (pixel_weight != 0)
        each = each * pixel_weight.double()
    return torch.where(valid, each, 0.0), valid


def _shared_overlap(group: dist.ProcessGroup, inputs: Inputs, options: BclOptions) -> OverlapTerms:
    """The overlap terms of the batch of all processes."""
    alone = options._replace(ce_weight=0.0, boundary_weight=0.0, focal_weight=0.0, distillation_weight=0.0)
    own = evaluate(inputs, alone, False, False).sums
    assert own is not None  # there is an overlap term
    return overlap_terms(Sums(*_total(own, group).unbind(1)), options, inputs.weight)


def _total(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the processes."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


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
