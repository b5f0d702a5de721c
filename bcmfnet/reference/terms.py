"""Terms of a segmentation loss beside cross-entropy, each with its gradient written out: what every backend computes.

A term is a function of the probabilities of a pixel, or of their sums over pixels. Its gradient with respect to the
logits of a pixel is always one of two kinds:

- of a label: a number times p - e[label], as that of cross-entropy is;
- of the probabilities: p * (g - sum p * g) with g the gradient with respect to p.

Binary logits, of one class and a sigmoid, are softmax logits of two classes of which the first one's logit is 0
(`with_background`): cross-entropy, focal loss and distillation are the same, and overlap is that of class 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPS = 1e-7
"""Least denominator of an overlap score, and least score whose logarithm is taken; the gradient is 0 below."""

Absent = Literal["skip", "zero", "count"]


def with_background(logits: Tensor) -> Tensor:
    """Binary logits [N, 1, H, W] as those of two classes [N, 2, H, W]: the sigmoid is the softmax of 0 and z."""
    return torch.cat([torch.zeros_like(logits), logits], 1)


def smoothed_part(log_p: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """What label smoothing adds to (1 - e) w[y] ce: (e / C) sum_c w[c] (-log p[c]) [N, H, W], of log p [N, C, H, W].

    As `torch.nn.functional.cross_entropy` sums it up, but that a class of weight 0 is left out, not multiplied.
    """
    if class_weight is None:
        return -smoothing / log_p.shape[1] * log_p.sum(1)
    kept = class_weight.to(log_p).reshape(1, -1, 1, 1)
    return smoothing / log_p.shape[1] * torch.where(kept != 0, kept * -log_p, 0.0).sum(1)


def focal(ce: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma * ce [N, H, W] with p = exp(-ce); gamma 0 is the cross-entropy."""
    if gamma == 0:
        return ce
    miss = -torch.expm1(-ce)
    certain = miss == 0  # where a power below 1 has no finite derivative
    return torch.where(certain, 0.0, torch.where(certain, 1.0, miss) ** gamma * ce)


def focal_slope(ce: Tensor, gamma: float) -> Tensor:
    """Derivative of `focal` with respect to ce [N, H, W]: what its gradient has in place of cross-entropy's 1.

    (1 - p)^gamma + gamma (1 - p)^(gamma - 1) p ce, and 0 where p is 1 and gamma is not 0.
    """
    if gamma == 0:
        return torch.ones_like(ce)
    miss, p = -torch.expm1(-ce), torch.exp(-ce)
    slope = miss**gamma + gamma * miss ** (gamma - 1) * p * torch.where(p > 0, ce, 0.0)
    return torch.where(miss > 0, slope, 0.0)


class Overlap(NamedTuple):
    """A score of overlap, (hit * I + s) / (hits * I + predicted * P + labelled * Y + s), of the sums of a class.

    I = sum p [y = c] of its own pixels, P = sum p of all valid pixels, Y = sum [y = c].
    """

    hit: float
    hits: float
    predicted: float
    labelled: float


DICE = Overlap(2.0, 0.0, 1.0, 1.0)
JACCARD = Overlap(1.0, -1.0, 1.0, 1.0)


def tversky(alpha: float, beta: float) -> Overlap:
    """I / (I + alpha (P - I) + beta (Y - I)): alpha weighs false positives, beta false negatives."""
    return Overlap(1.0, 1 - alpha - beta, alpha, beta)


class OverlapOptions(NamedTuple):
    """How scores of classes become a loss."""

    smooth: float = 0.0
    """s, >= 0."""
    log: bool = False
    """-log(score) in place of 1 - score."""
    absent: Absent = "skip"
    """A class that no pixel has is left out of the mean ("skip"), counts as 0 ("zero") or as any other ("count")."""
    per_image: bool = False
    """The mean of the losses of the images that have a valid pixel, in place of the loss of the batch."""


class Sums(NamedTuple):
    """Sums over the pixels of a batch, or of each image: float [..., C]."""

    hits: Tensor
    predicted: Tensor
    labelled: Tensor


def overlap_sums(p: Tensor, labels: Tensor, pixel_weight: Tensor, per_image: bool) -> Sums:
    """I, P and Y of probabilities [N, C, H, W] and labels int64 [N, H, W]: [1, C], with per_image [N, C].

    The weight of a pixel [N, H, W] is 0 where it is not valid; there its label may be any class.
    """
    weight = pixel_weight[:, None]
    own = torch.zeros_like(p).scatter_(1, labels[:, None], weight.to(p))
    counted = torch.where(weight != 0, p, 0.0)
    sums = Sums(*(_sums(values) for values in (own * counted, weight * counted, own)))
    return sums if per_image else Sums(*(value.sum(0, keepdim=True) for value in sums))


def _sums(values: Tensor) -> Tensor:
    """Of [N, C, H, W] over pixels, by rows and then in float64 (on the CPU, which has it): the same bits for any number
    of threads."""
    return values.sum(3).cpu().double().sum(2).to(values)


class OverlapLoss(NamedTuple):
    """A scalar, and its derivatives with respect to P and I, of the shape of the sums."""

    value: Tensor
    of_predicted: Tensor
    of_hits: Tensor


def overlap_loss(
    sums: Sums, score: Overlap, options: OverlapOptions, class_weight: Tensor | None, first: int = 0
) -> OverlapLoss:
    """The loss of one score.

    Args:
        sums: of the batch [1, C] or of each image [N, C].
        score: see `Overlap`.
        options: see `OverlapOptions`.
        class_weight: [C], weights of the classes in the mean.
        first: class from which on they count; 1 for binary logits.
    """
    hits, predicted, labelled = sums
    present = labelled > 0
    weight = torch.ones_like(hits) if class_weight is None else class_weight.to(hits).expand_as(hits)
    weight = torch.where(torch.arange(hits.shape[1], device=hits.device) >= first, weight, 0.0)
    divided = weight if options.absent in ("zero", "count") else torch.where(present, weight, 0.0)
    counted = weight if options.absent == "count" else torch.where(present, weight, 0.0)
    images = (labelled.sum(1, keepdim=True) > 0).to(hits)  # those that have a valid pixel
    total = divided.sum(1, keepdim=True)
    share = images * counted / torch.where(total > 0, total, 1.0) / images.sum().clamp(min=1)
    numerator = score.hit * hits + options.smooth
    raw = score.hits * hits + score.predicted * predicted + score.labelled * labelled + options.smooth
    denominator = raw.clamp(min=EPS)
    slope = torch.where(raw >= EPS, numerator / denominator**2, 0.0)
    overlap = numerator / denominator
    losses = -overlap.clamp(min=EPS).log() if options.log else 1 - overlap
    outer = torch.where(overlap >= EPS, -1 / overlap.clamp(min=EPS), 0.0) if options.log else -torch.ones_like(overlap)
    of_hits = share * outer * (score.hit / denominator - slope * score.hits)
    return OverlapLoss((share * losses).sum(), -share * outer * slope * score.predicted, of_hits)


def overlap_gradient(p: Tensor, labels: Tensor, pixel_weight: Tensor, of_predicted: Tensor, of_hits: Tensor) -> Tensor:
    """Gradient [N, C, H, W] of an overlap loss with respect to the logits, of its derivatives by the sums."""
    of_predicted, of_hits = (values.expand(p.shape[:2]) for values in (of_predicted, of_hits))
    inner = of_predicted[:, :, None, None].expand_as(p).clone()
    inner.scatter_add_(1, labels[:, None], of_hits.gather(1, labels.flatten(1)).reshape_as(labels)[:, None])
    weight = pixel_weight[:, None]
    inner = torch.where(weight != 0, weight * inner, 0.0)
    return through_softmax(torch.where(weight != 0, p, 0.0), inner)


def through_softmax(p: Tensor, inner: Tensor) -> Tensor:
    """p * (g - sum p * g): a gradient with respect to probabilities [N, C, H, W] as one with respect to logits."""
    return p * (inner - (p * inner).sum(1, keepdim=True))


def distillation(log_p: Tensor, log_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(z / T)) of each pixel [N, H, W].

    Args:
        log_p: log softmax of the logits z [N, C, H, W], not divided by T.
        log_t: log softmax of the teacher's t / T [N, C, H, W]; it gets no gradient.
        temperature: T > 0.
    """
    t = log_t.exp()
    return temperature**2 * torch.where(t > 0, t * (log_t - _divided(log_p, temperature)), 0.0).sum(1)


def distillation_gradient(log_p: Tensor, log_t: Tensor, temperature: float) -> Tensor:
    """T (softmax(z / T) - softmax(t / T)) [N, C, H, W]: the gradient of `distillation` with respect to z."""
    return temperature * (_divided(log_p, temperature).exp() - log_t.exp())


def _divided(log_p: Tensor, temperature: float) -> Tensor:
    """Log softmax of z / T; the constant by which log p differs from z does not matter."""
    return log_p if temperature == 1 else torch.log_softmax(log_p / temperature, 1)
