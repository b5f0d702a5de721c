"""The Boundary Corrected Loss in plain PyTorch: the definition that every backend is checked against.

Source: arXiv 2203.00436, section 2.3. The paper leaves choices open; each is stated where it is made. `loss` is
differentiable by autograd; `forward` and `backward` serve the op, with the gradient written out.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.reference.bilinear import downsample, upsample

Q_MAX = 65535
Q_SCALE = 1024.0

Mode = Literal["detect", "detect0", "paper", "paper0", "ohem"]
Flip = Literal["swap", "mirror"]
Norm = Literal["selected", "valid"]

MODES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
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


def make_options(mode: Mode = "detect", alpha: float = 1.0, beta: float = 1.0, **others: Any) -> BclOptions:
    """Options of a mode; `others` are fields of BclOptions."""
    score, terms = ((float(own), alpha * rows, beta * columns) for own, rows, columns in MODES[mode])
    return BclOptions(score, terms, **others)


class BclStats(NamedTuple):
    """Detached statistics of a loss, on its device.

    ce and boundary (without lambda) in the loss's dtype; selected and valid int64 counts of pixels; threshold int32
    on the grid of q, [N] with per_image.
    """

    ce: Tensor
    boundary: Tensor
    selected: Tensor
    valid: Tensor
    threshold: Tensor

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
    """Per-pixel maps [N, H, W]: three cross-entropies, the score on its grid, candidates and selected pixels."""

    ce: Tensor
    ce_r: Tensor
    ce_c: Tensor
    q: Tensor
    candidates: Tensor
    selected: Tensor


def loss(
    logits: Tensor, target: Tensor, options: BclOptions, weight: Tensor | None = None, selected: Tensor | None = None
) -> tuple[Tensor, BclStats, BclMaps]:
    """Loss, stats and maps; differentiable by autograd, the decisions being constants.

    Logits [N, C, h, w] with h <= H and w <= W are upsampled to the target [N, H, W]; half precision is computed in
    float32. `selected`, bool [N, H, W], replaces the selection. Raises IndexError for a label that is neither a class
    nor ignore_index.
    """
    labels = _labels(target, options, logits.shape[1])
    z = upsample(_computed(logits), target.shape[1:])
    log_p = F.log_softmax(z.masked_fill(~labels.valid[:, None], 0.0), 1)  # an ignored NaN would reach the gradient
    return _loss(log_p, labels, options, weight, selected)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: BclOptions, needs_grad: bool
) -> tuple[Tensor, BclStats, Tensor, Tensor, Tensor, Tensor]:
    """Loss and stats, and what backward reads: lse, mask, scales, gradient.

    Full resolution: lse = log sum exp(z - max z) [N, H, W], mask uint8 [N, H, W] and scales [2] = 1 / the sum of the
    valid weights, 1 / the divisor of the boundary term. With upsampling: the gradient [N, C, h, w] of the loss. The
    others, and all where needs_grad is off, are empty.
    """
    log_p = _log_softmax(logits, target)
    labels = _labels(target, options, logits.shape[1])
    value, stats, maps = _loss(log_p, labels, options, weight, None)
    empty = log_p.new_empty
    if not needs_grad:
        return value, stats, empty(0), empty(0, dtype=torch.uint8), empty(0), empty(0)
    mask = maps.selected.byte()
    scales = _scales(labels, options, weight, mask, log_p.dtype)
    if logits.shape[2:] == target.shape[1:]:
        return value, stats, -log_p.amax(1), mask, scales, empty(0)
    full = _gradient(log_p.exp(), labels, options, weight, mask, scales)
    gradient = downsample(full, logits.shape[2:])
    return value, stats, empty(0), empty(0, dtype=torch.uint8), empty(0), gradient


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: BclOptions, lse: Tensor, mask: Tensor,
    scales: Tensor, result: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of full-resolution logits; times grad in float32, since 1 / valid underflows float16."""
    z = _computed(logits)
    p = torch.exp(z - z.amax(1, keepdim=True) - lse[:, None])
    gradient = _gradient(p, _labels(target, options, logits.shape[1]), options, weight, mask, scales)
    torch.mul(gradient, grad, out=result)


class _Labels(NamedTuple):
    """Label maps int64 [N, H, W], own and flipped, with ignore replaced by class 0; and where each counts."""

    own: Tensor
    rows: Tensor
    columns: Tensor
    valid: Tensor
    rows_valid: Tensor
    columns_valid: Tensor


def _labels(target: Tensor, options: BclOptions, classes: int) -> _Labels:
    target = target.contiguous()  # sums run in memory order: equal bits for any layout
    own = target.long()
    rows, columns = (
        target.index_select(dim, flip_index(own.shape[dim], step, options.flip, offset).to(own.device)).long()
        for dim, step, offset in zip((1, 2), options.step, options.offset, strict=True)
    )
    valid = own != options.ignore_index
    check_labels(own, valid, classes)
    counts = (valid, valid & (rows != options.ignore_index), valid & (columns != options.ignore_index))
    known, known_rows, known_columns = (
        label.masked_fill(~count, 0) for label, count in zip((own, rows, columns), counts, strict=True)
    )
    return _Labels(known, known_rows, known_columns, *counts)


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


def _log_softmax(logits: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(upsample(_computed(logits), target.shape[1:]), 1)


def _loss(
    log_p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None, selected: Tensor | None
) -> tuple[Tensor, BclStats, BclMaps]:
    ce = _cross_entropy(log_p, labels.own, labels.valid)
    ce_r = _cross_entropy(log_p, labels.rows, labels.rows_valid)
    ce_c = _cross_entropy(log_p, labels.columns, labels.columns_valid)

    score = _weighted(options.score, (ce, ce_r, ce_c)).detach()
    q = quantise(score)
    candidates = suppress(q, options.nms) & (q > 0) & (options.boundary_weight != 0)  # without the term none is needed
    threshold = select_threshold(q, candidates, options)
    chosen = candidates & (q >= threshold.reshape(-1, 1, 1)) if selected is None else selected

    w = _pixel_weights(labels, weight, ce.dtype)
    vw, d = _divisors(labels, options, w, chosen)
    ce_mean = _sum(w, ce) / vw
    boundary = _sum(w * chosen, _weighted(options.terms, (ce, ce_r, ce_c))) / d
    if options.boundary_weight != 0:
        boundary = torch.where(score.isnan().any(), torch.nan, boundary)  # it selects nothing, and must not pass for 0
    total = _weighted((options.ce_weight, options.boundary_weight), (ce_mean, boundary))
    total = torch.where(vw.isnan(), torch.nan, total)
    ce_figure, boundary_figure = ce_mean.detach().clone(), boundary.detach().clone()  # total may be one of them
    stats = BclStats(ce_figure, boundary_figure, chosen.sum(), labels.valid.sum(), threshold)
    return total, stats, BclMaps(ce, ce_r, ce_c, q, candidates, chosen)


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


def _pixel_weights(labels: _Labels, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Class weight of each pixel's own label [N, H, W], 0 where it is ignore."""
    return labels.valid.to(dtype) if weight is None else torch.where(labels.valid, weight.to(dtype)[labels.own], 0.0)


def _divisors(labels: _Labels, options: BclOptions, w: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Divisors of the cross-entropy (weighted) and of the boundary term (a count); 1 where there is nothing, NaN where
    the weight of a valid pixel is not finite."""
    vw, d = _total(w), (chosen if options.norm == "selected" else labels.valid).sum().to(w.dtype)
    finite = w.isfinite().all()
    vw, d = (torch.where(finite, torch.where(divisor > 0, divisor, 1.0), torch.nan) for divisor in (vw, d))
    return vw, d


def _scales(labels: _Labels, options: BclOptions, weight: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    divisors = _divisors(labels, options, _pixel_weights(labels, weight, dtype), mask.bool())
    return 1 / torch.stack(divisors)


def _gradient(
    p: Tensor, labels: _Labels, options: BclOptions, weight: Tensor | None, mask: Tensor, scales: Tensor
) -> Tensor:
    """A p - a0 e[y] - ar e[y_r] - ac e[y_c] over the classes of p [N, C, H, W], which is overwritten."""
    if p.shape[1] == 1:
        return torch.zeros_like(p)
    w = _pixel_weights(labels, weight, p.dtype)
    hard = w * mask * scales[1]
    own, rows, columns = (options.boundary_weight * k * hard for k in options.terms)
    own = own + options.ce_weight * w * scales[0]
    rows, columns = rows * labels.rows_valid, columns * labels.columns_valid
    total = (own + rows + columns)[:, None]
    gradient = p.mul_(total).masked_fill_(total == 0, 0.0)
    parts = ((1, labels.own, own), (options.terms[1], labels.rows, rows), (options.terms[2], labels.columns, columns))
    for coefficient, index, amount in parts:
        if coefficient != 0:
            gradient.scatter_add_(1, index[:, None], -amount[:, None])
    return gradient


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
