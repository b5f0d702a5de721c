"""The loss in plain PyTorch: the definition that every backend is checked against.

It is a weighted sum of terms: the cross-entropy and the boundary term of the Boundary Corrected Loss (arXiv 2203.00436,
section 2.3; the paper leaves choices open, each is stated where it is made), and those of `bcmfnet.reference.terms`.
`loss` is differentiable by autograd; `forward` and `backward` serve the op, with the gradient written out.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.reference import terms
from bcmfnet.reference.bilinear import downsample, upsample
from bcmfnet.reference.terms import DICE, JACCARD, Absent, Overlap, tversky

Q_MAX = 65535
Q_SCALE = 1024.0

Mode = Literal["detect", "detect0", "paper", "paper0", "ohem"]
Flip = Literal["swap", "mirror"]
Norm = Literal["selected", "valid"]

MODES: dict[Mode, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "detect": ((0, 1, 1), (1, 0, 0)),
    "detect0": ((1, 1, 1), (1, 0, 0)),
    "paper": ((0, 1, 1), (0, 1, 1)),
    "paper0": ((1, 1, 1), (1, 1, 1)),
    "ohem": ((1, 0, 0), (1, 0, 0)),
}
"""What a mode weighs (own, row-flipped, column-flipped label): the score that selects, and the boundary term.

`paper` is the literal reading: flipped labels are also targets, which at lambda * (alpha + beta) * valid / selected > 1
teaches the neighbour's class. `detect` finds the boundary by the flipped labels and trains the true one.
"""


class BclOptions(NamedTuple):
    """Options as the op takes them: the mode resolved to coefficients, alpha and beta multiplied in, 0 = term absent.

    `step` and `offset` of the flip windows are (rows, columns).
    """

    score: tuple[float, float, float]
    terms: tuple[float, float, float]
    ce_weight: float = 1.0
    boundary_weight: float = 1.0
    ignore_index: int = 255
    step: tuple[int, int] = (1, 1)
    flip: Flip = "swap"
    offset: tuple[int, int] = (0, 0)
    nms: int = 1
    threshold: float = 0.3567
    ratio: float = 0.0
    min_kept: int = 0
    max_kept: int | None = None
    norm: Norm = "selected"
    per_image: bool = False
    focal_boundary: bool = False
    smoothing: float = 0.0
    focal_weight: float = 0.0
    gamma: float = 2.0
    dice_weight: float = 0.0
    jaccard_weight: float = 0.0
    tversky_weight: float = 0.0
    tversky_alpha: float = 0.5
    tversky_beta: float = 0.5
    smooth: float = 0.0
    log: bool = False
    absent: Absent = "skip"
    overlap_per_image: bool = False
    distillation_weight: float = 0.0
    temperature: float = 1.0
    everywhere: bool = False
    binary: bool = False
    pos_weight: float = 1.0
    align_corners: bool = False

    @property
    def overlaps(self) -> tuple[tuple[Overlap, float], ...]:
        """The overlap scores and the weights of their losses, in the order of the stats."""
        third = tversky(self.tversky_alpha, self.tversky_beta)
        return (DICE, self.dice_weight), (JACCARD, self.jaccard_weight), (third, self.tversky_weight)

    @property
    def has_overlap(self) -> bool:
        return any(weight != 0 for _, weight in self.overlaps)


def make_options(mode: Mode = "detect", alpha: float = 1.0, beta: float = 1.0, **others: Any) -> BclOptions:
    """Options of a mode; `others` are fields of BclOptions."""
    score, terms = ((float(own), alpha * rows, beta * columns) for own, rows, columns in MODES[mode])
    return BclOptions(score, terms, **others)


class BclStats(NamedTuple):
    """Detached statistics of a loss, on its device.

    selected and valid are int64 counts of pixels; threshold int32 on the grid of q, [N] with per_image; the others are
    the terms without their weights, in the loss's dtype, 0 where a term has none. With label smoothing ce is smoothed.
    """

    ce: Tensor
    boundary: Tensor
    selected: Tensor
    valid: Tensor
    threshold: Tensor
    focal: Tensor
    dice: Tensor
    jaccard: Tensor
    tversky: Tensor
    distillation: Tensor

    def selection(self) -> dict[str, Tensor]:
        """Scalars on the same device: the mean cross-entropy, and of the selected pixels their share of the valid ones,
        the threshold in nats (with per_image its mean) and their mean loss, which is their cross-entropy in all modes
        but the paper's, where it is that of the flipped labels too."""
        return {
            "ce": self.ce,
            "selected": self.selected / self.valid.clamp(min=1),
            "threshold": self.threshold.float().mean() / Q_SCALE,
            "selected_loss": self.boundary,
        }


class BclMaps(NamedTuple):
    """Per-pixel maps [N, H, W]: three cross-entropies, the score on its grid, candidates and selected pixels; the focal
    loss, 1 - p of the own label, which is what overlap is lost by, and the distillation loss (0 without a teacher)."""

    ce: Tensor
    ce_r: Tensor
    ce_c: Tensor
    q: Tensor
    candidates: Tensor
    selected: Tensor
    focal: Tensor
    miss: Tensor
    distillation: Tensor


def loss(
    logits: Tensor,
    target: Tensor,
    options: BclOptions,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    teacher: Tensor | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, BclStats, BclMaps]:
    """Loss, stats and maps; differentiable by autograd, the decisions being constants.

    Logits [N, C, h, w] with h <= H and w <= W are upsampled to the target [N, H, W], and so is the teacher; half
    precision is computed in float32. `selected`, bool [N, H, W], replaces the selection. Raises IndexError for a label
    that is neither a class nor ignore_index.
    """
    labels = _labels(target, options, logits.shape[1], pixel_weight)
    z = _upsampled(logits, target, options)
    unused = ~labels.valid if not options.everywhere or teacher is None else labels.weight == 0
    log_p = F.log_softmax(z.masked_fill(unused[:, None], 0.0), 1)  # an ignored NaN would reach the gradient
    total, stats, maps, *_ = _loss(log_p, labels, options, weight, _log_teacher(teacher, target, options), selected)
    return total, stats, maps


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, teacher: Tensor | None,
    slopes: Tensor | None, options: BclOptions, needs_grad: bool,
) -> tuple[Tensor, BclStats, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and stats, sums, and what backward reads: lse, mask, scales, slopes, gradient.

    Sums [groups, 3, C] are those of overlap, of the batch or of each image. Full resolution: lse = log sum
    exp(z - max z) [N, H, W], mask uint8 [N, H, W], scales [3] = 1 / the divisors of cross-entropy, boundary term and
    distillation, and slopes [groups, 2, C], derivatives of the overlap terms by P and I. With upsampling: the gradient
    [N, C, h, w] of the loss. The others, and all where needs_grad is off or no term has them, are empty. `slopes`,
    where given, replace those of the sums.
    """
    log_p, log_t = _log_softmax(logits, target, options), _log_teacher(teacher, target, options)
    labels = _labels(target, options, logits.shape[1], pixel_weight)
    value, stats, maps, overlap, sums = _loss(log_p, labels, options, weight, log_t, None)
    empty = log_p.new_empty
    if not needs_grad:
        return value, stats, sums, empty(0), empty(0, dtype=torch.uint8), empty(0), empty(0), empty(0)
    mask = maps.selected.byte()
    scales = _scales(labels, options, weight, mask, log_p.dtype)
    slopes = overlap.slopes if slopes is None else slopes
    if logits.shape[2:] == target.shape[1:]:
        return value, stats, sums, -log_p.amax(1), mask, scales, slopes, empty(0)
    full = _gradient(log_p, labels, options, weight, log_t, mask, scales, slopes)
    gradient = downsample(full, logits.shape[2:], options.align_corners)
    return value, stats, sums, empty(0), empty(0, dtype=torch.uint8), empty(0), empty(0), gradient


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None,
    teacher: Tensor | None, options: BclOptions, lse: Tensor, mask: Tensor, scales: Tensor, slopes: Tensor | None,
    result: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of full-resolution logits; times grad in float32, since 1 / valid underflows float16."""
    z = _upsampled(logits, target, options)
    log_p = z - z.amax(1, keepdim=True) - lse[:, None]
    labels = _labels(target, options, logits.shape[1], pixel_weight)
    log_t = _log_teacher(teacher, target, options)
    torch.mul(_gradient(log_p, labels, options, weight, log_t, mask, scales, slopes), grad, out=result)


class _Labels(NamedTuple):
    """Label maps int64 [N, H, W], own and flipped, with ignore replaced by class 0; where each counts; and the weight
    of each pixel, of which 0 makes a label one that is ignored."""

    own: Tensor
    rows: Tensor
    columns: Tensor
    valid: Tensor
    rows_valid: Tensor
    columns_valid: Tensor
    weight: Tensor


def _labels(target: Tensor, options: BclOptions, classes: int, pixel_weight: Tensor | None) -> _Labels:
    target = target.contiguous().long()  # sums run in memory order: equal bits for any layout
    classes = 2 if options.binary else classes
    if pixel_weight is not None:
        target = target.masked_fill(pixel_weight == 0, options.ignore_index)
    weight = target.new_ones((), dtype=torch.float32).expand_as(target) if pixel_weight is None else pixel_weight
    own = target
    rows, columns = (
        target.index_select(dim, flip_index(own.shape[dim], step, options.flip, offset).to(own.device))
        for dim, step, offset in zip((1, 2), options.step, options.offset, strict=True)
    )
    valid = own != options.ignore_index
    check_labels(own, valid, classes)
    counts = (valid, valid & (rows != options.ignore_index), valid & (columns != options.ignore_index))
    known, known_rows, known_columns = (
        label.masked_fill(~count, 0) for label, count in zip((own, rows, columns), counts, strict=True)
    )
    return _Labels(known, known_rows, known_columns, *counts, weight)


def check_labels(labels: Tensor, valid: Tensor, classes: int) -> None:
    """Raise IndexError naming the first label that is neither a class nor ignore, and where it is."""
    wrong = valid & ((labels < 0) | (labels >= classes))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"target: expected labels in [0, {classes}) or ignore_index, "
            f"got {int(labels[place])} at (image, row, column) = {place}"
        )


def flip_index(length: int, step: int, flip: str, offset: int = 0) -> Tensor:
    """The involution pi [length] that the flip reads from; an index that would leave the image stays.

    swap: neighbouring blocks of `step` change places; mirror: windows of 2 * step are reversed. offset moves the
    windows: an edge on a window's border is never seen by a fixed one.
    """
    i = torch.arange(length) + offset
    if flip == "swap":
        pi = ((i // step) ^ 1) * step + i % step
    else:
        pi = 2 * step * (i // (2 * step)) + 2 * step - 1 - i % (2 * step)
    i, pi = i - offset, pi - offset
    return torch.where((pi < 0) | (pi >= length), i, pi)


def _computed(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _upsampled(logits: Tensor, target: Tensor, options: BclOptions) -> Tensor:
    z = upsample(_computed(logits), target.shape[1:], options.align_corners)
    return terms.with_background(z) if options.binary else z


def _log_softmax(logits: Tensor, target: Tensor, options: BclOptions) -> Tensor:
    return F.log_softmax(_upsampled(logits, target, options), 1)


def _log_teacher(teacher: Tensor | None, target: Tensor, options: BclOptions) -> Tensor | None:
    """Log softmax of the teacher's logits over the temperature, at the target's size."""
    if teacher is None or options.distillation_weight == 0:
        return None
    return F.log_softmax(_upsampled(teacher.detach(), target, options) / options.temperature, 1)


class OverlapTerms(NamedTuple):
    """Values of the three terms, 0 where one has no weight; their weighted sum; slopes [groups, 2, C]."""

    values: tuple[Tensor, ...]
    total: Tensor
    slopes: Tensor


def overlap_terms(sums: terms.Sums, options: BclOptions, weight: Tensor | None) -> OverlapTerms:
    """The overlap terms of sums [groups, C]; the total is differentiable by autograd."""
    how = terms.OverlapOptions(options.smooth, options.log, options.absent, options.overlap_per_image)
    losses = [terms.overlap_loss(sums, score, how, weight, int(options.binary)) for score, _ in options.overlaps]
    weights = tuple(amount for _, amount in options.overlaps)
    values = tuple(loss.value for loss in losses)
    slopes = torch.stack([amount * torch.stack(loss[1:], 1) for amount, loss in zip(weights, losses, strict=True)])
    shown = tuple(value.detach() * (amount != 0) for amount, value in zip(weights, values, strict=True))
    return OverlapTerms(shown, _weighted(weights, values), slopes.detach().sum(0))


def _overlap(log_p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None) -> tuple[OverlapTerms, Tensor]:
    """The terms, and the sums of the classes [groups, 3, C]; both without numbers where no term has a weight."""
    zero = log_p.detach().new_zeros(())
    if not options.has_overlap:
        return OverlapTerms((zero,) * 3, zero, zero.new_empty(0)), zero.new_empty(0)
    counted = torch.where(labels.valid, labels.weight.to(log_p), 0.0)
    sums = terms.overlap_sums(log_p.exp(), labels.own, counted, options.overlap_per_image)
    return overlap_terms(sums, options, weight), torch.stack(sums, 1).detach()


def _loss(
    log_p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None, log_t: Tensor | None,
    selected: Tensor | None,
) -> tuple[Tensor, BclStats, BclMaps, OverlapTerms, Tensor]:  # fmt: skip
    ce = _cross_entropy(log_p, labels.own, labels.valid)
    ce_r = _cross_entropy(log_p, labels.rows, labels.rows_valid)
    ce_c = _cross_entropy(log_p, labels.columns, labels.columns_valid)

    score = _weighted(options.score, (ce, ce_r, ce_c)).detach()
    q = quantise(score)
    candidates = suppress(q, options.nms) & (q > 0) & (options.boundary_weight != 0)  # without the term none is needed
    threshold = select_threshold(q, candidates, options)
    chosen = candidates & (q >= threshold.reshape(-1, 1, 1)) if selected is None else selected

    w = _pixel_weights(labels, options, weight, ce.dtype)
    vw, d, vd = _divisors(labels, options, w, chosen)
    focal = terms.focal(ce, options.gamma)
    ce_mean = _sum(w, ce) / vw
    if options.smoothing != 0:
        ce_mean = (1 - options.smoothing) * ce_mean + _smoothed_part(log_p, labels, options, weight, w) / vw
    focal_mean = _sum(w, focal) / vw if options.focal_weight != 0 else torch.zeros_like(vw)
    hard = tuple(terms.focal(c, options.gamma) if options.focal_boundary else c for c in (ce, ce_r, ce_c))
    boundary = _sum(w * chosen, _weighted(options.terms, hard)) / d
    if options.boundary_weight != 0:
        boundary = torch.where(score.isnan().any(), torch.nan, boundary)  # it selects nothing, and must not pass for 0
    overlap, sums = _overlap(log_p, labels, options, weight)
    kl = torch.zeros_like(ce) if log_t is None else terms.distillation(log_p, log_t, options.temperature)
    kl_mean = _sum(_distilled(labels, options, ce.dtype), kl) / vd if log_t is not None else torch.zeros_like(vd)

    weights = (options.ce_weight, options.boundary_weight, options.focal_weight, options.distillation_weight)
    total = _weighted(weights, (ce_mean, boundary, focal_mean, kl_mean))
    if options.has_overlap:
        total = total + overlap.total
    total = torch.where(vw.isnan(), torch.nan, total)
    means = (ce_mean, boundary, focal_mean, kl_mean)
    ce_figure, boundary_figure, *others = (mean.detach().clone() for mean in means)  # total may be one of them
    selected_count, valid_count = chosen.sum(), labels.valid.sum()
    stats = BclStats(
        ce_figure, boundary_figure, selected_count, valid_count, threshold, others[0], overlap.values[0],
        overlap.values[1], overlap.values[2], others[1],
    )  # fmt: skip
    miss = torch.where(labels.valid, -torch.expm1(-ce), 0.0)
    return total, stats, BclMaps(ce, ce_r, ce_c, q, candidates, chosen, focal, miss, kl), overlap, sums


def _cross_entropy(log_p: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """-log p of each pixel's label [N, H, W]; 0 where it does not count."""
    return torch.where(counts, -log_p.gather(1, labels[:, None])[:, 0], 0.0)


def _weighted(coefficients: tuple[float, ...], terms: tuple[Tensor, ...]) -> Tensor:
    """Sum of coefficient * term; a coefficient of 0 leaves its term out: no 0 * inf; none is an attached 0."""
    parts = [term if k == 1 else k * term for k, term in zip(coefficients, terms, strict=True) if k != 0]
    return sum(parts[1:], parts[0]) if parts else torch.where(torch.zeros_like(terms[0]) != 0, terms[0], 0.0)


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    return _total(torch.where(weights != 0, weights * values, 0.0))


def _total(values: Tensor) -> Tensor:
    """Sum of [N, H, W] by rows, then float64: a full reduction is cut by the number of threads, with other bits.

    The latter on the CPU: not every device has float64.
    """
    return values.sum(2).cpu().double().sum().to(values)


def _pixel_weights(labels: _Labels, options: BclOptions, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of each pixel and of its own label [N, H, W], 0 where that is ignore."""
    return torch.where(labels.valid, labels.weight.to(dtype) * _own_weight(labels, options, weight, dtype), 0.0)


def _own_weight(labels: _Labels, options: BclOptions, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Class weight of each pixel's own label [N, H, W]."""
    weight = _class_weight(labels, options, weight)
    return torch.ones_like(labels.own, dtype=dtype) if weight is None else weight.to(dtype)[labels.own]


def _class_weight(labels: _Labels, options: BclOptions, weight: Tensor | None) -> Tensor | None:
    """Class weights [C], None where all are 1; of binary logits those of background and foreground."""
    return labels.weight.new_tensor([1.0, options.pos_weight]) if options.binary else weight


def _smoothed_part(log_p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None, w: Tensor) -> Tensor:
    """The sum over pixels of (e / C) sum_c w[c] (-log p[c]); 0 where the labels themselves have no weight."""
    spread = terms.smoothed_part(log_p, _class_weight(labels, options, weight), options.smoothing)
    return _sum(_smoothed_weights(labels, w), spread)


def _smoothed_weights(labels: _Labels, w: Tensor) -> Tensor:
    """Weight of each pixel [N, H, W] without that of its label, w having both."""
    return torch.where(labels.valid & (_total(w) > 0), labels.weight.to(w), 0.0)


def _distilled(labels: _Labels, options: BclOptions, dtype: torch.dtype) -> Tensor:
    """Weight of each pixel in the distillation loss [N, H, W]."""
    weight = labels.weight.to(dtype)
    return weight if options.everywhere else torch.where(labels.valid, weight, 0.0)


def _divisors(labels: _Labels, options: BclOptions, w: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divisors of the cross-entropy (weighted), of the boundary term (a count) and of distillation (weights of pixels);
    1 where there is nothing, NaN where the weight of a valid pixel is not finite. pos_weight is in none of them."""
    plain = torch.where(labels.valid, labels.weight.to(w), 0.0)
    d = (chosen if options.norm == "selected" else labels.valid).sum().to(w.dtype)
    sums = (_total(plain if options.binary else w), d, _total(_distilled(labels, options, w.dtype)))
    finite = w.isfinite().all()
    vw, d, vd = (torch.where(finite, torch.where(divisor > 0, divisor, 1.0), torch.nan) for divisor in sums)
    return vw, d, vd


def _scales(labels: _Labels, options: BclOptions, weight: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    divisors = _divisors(labels, options, _pixel_weights(labels, options, weight, dtype), mask.bool())
    return 1 / torch.stack(divisors)


def _gradient(
    log_p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None, log_t: Tensor | None, mask: Tensor,
    scales: Tensor, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """A p - a0 e[y] - ar e[y_r] - ac e[y_c] over the classes of log p [N, C, H, W], and what other terms add."""
    if log_p.shape[1] == 1:
        return torch.zeros_like(log_p)
    w, p = _pixel_weights(labels, options, weight, log_p.dtype), log_p.exp()
    hard = w * mask * scales[1]
    own, rows, columns = (options.boundary_weight * k * hard for k in options.terms)
    rows, columns = rows * labels.rows_valid, columns * labels.columns_valid
    if options.focal_boundary:
        own, rows, columns = (
            amount * terms.focal_slope(_cross_entropy(log_p, label, counts), options.gamma)
            for amount, label, counts in (
                (own, labels.own, labels.valid),
                (rows, labels.rows, labels.rows_valid),
                (columns, labels.columns, labels.columns_valid),
            )
        )
    own = own + options.ce_weight * (1 - options.smoothing) * w * scales[0]
    if options.focal_weight != 0:
        slope = terms.focal_slope(_cross_entropy(log_p, labels.own, labels.valid), options.gamma)
        own = own + options.focal_weight * torch.where(w != 0, slope, 0.0) * w * scales[0]
    total = (own + rows + columns)[:, None]
    gradient = (p * total).masked_fill_(total == 0, 0.0)
    parts = ((1, labels.own, own), (options.terms[1], labels.rows, rows), (options.terms[2], labels.columns, columns))
    for coefficient, index, amount in parts:
        if coefficient != 0:
            gradient.scatter_add_(1, index[:, None], -amount[:, None])
    if options.ce_weight != 0 and options.smoothing != 0:
        each = _class_weight(labels, options, weight)
        each = p.new_ones(p.shape[1]) if each is None else each.to(p)
        amount = (options.ce_weight * options.smoothing / p.shape[1] * scales[0] * _smoothed_weights(labels, w))[
            :, None
        ]
        gradient += torch.where(amount != 0, amount * (each.sum() * p - each.reshape(1, -1, 1, 1)), 0.0)
    if options.has_overlap:
        assert slopes is not None
        plain = torch.where(labels.valid, labels.weight.to(p), 0.0)
        gradient += terms.overlap_gradient(p, labels.own, plain, *slopes.unbind(1))
    if log_t is not None:
        amount = (options.distillation_weight * scales[2] * _distilled(labels, options, p.dtype))[:, None]
        of_kl = amount * terms.distillation_gradient(log_p, log_t, options.temperature)
        gradient += torch.where(amount != 0, of_kl, 0.0)
    return gradient[:, 1:] if options.binary else gradient


def quantise(score: Tensor) -> Tensor:
    """The grid that decisions are made on: min(65535, floor(1024 * S + 1/2)), int32; NaN is 0.

    Upsampled logits have exact plateaus where one rounding would decide a maximum; on the grid it does not.
    """
    return torch.floor(Q_SCALE * score + 0.5).nan_to_num(nan=0.0, posinf=Q_MAX).clamp(max=Q_MAX).int()


def suppress(q: Tensor, window: int) -> Tensor:
    """Whether each pixel of q [N, H, W] is the maximum of its window x window neighbourhood; ties all are."""
    if window == 1:
        return torch.ones_like(q, dtype=torch.bool)
    scores = q.float()  # exact: q has 16 bits
    return F.max_pool2d(scores[:, None], window, 1, window // 2)[:, 0] == scores


def select_threshold(q: Tensor, candidates: Tensor, options: BclOptions) -> Tensor:
    """The score from which candidates are selected, int32: a scalar, or [N] with per_image."""
    tau = int(quantise(torch.tensor(options.threshold, dtype=torch.float64)))
    if not options.per_image:
        return _threshold(q[candidates], tau, options)
    thresholds = q.new_empty(len(q))  # a batch may be empty
    for i, (image, kept) in enumerate(zip(q, candidates, strict=True)):
        thresholds[i] = _threshold(image[kept], tau, options)
    return thresholds


def _threshold(scores: Tensor, tau: int, options: BclOptions) -> Tensor:
    """t = min(tau, K-th largest), K = min(M, max(min_kept, floor(ratio * M))); at least the max_kept-th largest."""
    m = scores.numel()
    at_least = torch.bincount(scores, minlength=Q_MAX + 1).flip(0).cumsum(0)  # by score from Q_MAX down
    k = min(m, max(options.min_kept, math.floor(options.ratio * m)))
    t = min(tau, _kth_largest(at_least, k)) if k else tau
    if options.max_kept is not None and options.max_kept <= m:
        t = max(t, _kth_largest(at_least, options.max_kept))
    return torch.tensor(t, dtype=torch.int32, device=scores.device)


def _kth_largest(at_least: Tensor, k: int) -> int:
    return Q_MAX - int(torch.searchsorted(at_least, k))
