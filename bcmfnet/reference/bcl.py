"""The Boundary Corrected Loss in plain PyTorch: the definition that every backend is checked against.

Source: arXiv 2203.00436, section 2.3. The paper leaves choices open; each is stated where it is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Q_MAX = 65535
Q_SCALE = 1024.0


class Coefficients(NamedTuple):
    """What a mode weighs: the score by (s0, sr, sc), the boundary term by (g0, gr, gc); 0 means absent."""

    s0: float
    sr: float
    sc: float
    g0: float
    gr: float
    gc: float


MODES = {
    "detect": Coefficients(0, 1, 1, 1, 0, 0),
    "detect0": Coefficients(1, 1, 1, 1, 0, 0),
    "paper": Coefficients(0, 1, 1, 0, 1, 1),
    "paper0": Coefficients(1, 1, 1, 1, 1, 1),
    "ohem": Coefficients(1, 0, 0, 1, 0, 0),
}


class BclStats(NamedTuple):
    """Detached figures of a loss: ce and boundary (without lambda) float, selected and valid int64 counts,
    threshold int32 on the grid of q ([N] with per_image)."""

    ce: Tensor
    boundary: Tensor
    selected: Tensor
    valid: Tensor
    threshold: Tensor


class BclMaps(NamedTuple):
    """Per-pixel maps [N, H, W]: the three cross-entropies, the score on its grid, candidates and selected pixels."""

    ce: Tensor
    ce_r: Tensor
    ce_c: Tensor
    q: Tensor
    candidates: Tensor
    selected: Tensor


def boundary_corrected_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    mode: str = "detect",
    ce_weight: float = 1.0,
    boundary_weight: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    step: tuple[int, int] = (1, 1),
    flip: str = "swap",
    nms: int = 3,
    threshold: float = 0.3567,
    ratio: float = 1 / 16,
    min_kept: int = 0,
    max_kept: int | None = None,
    norm: str = "selected",
    per_image: bool = False,
    offset: tuple[int, int] = (0, 0),
    selected: Tensor | None = None,
) -> tuple[Tensor, BclStats, BclMaps]:
    """Loss, figures and maps; differentiable by autograd where the decisions are constants.

    logits [N, C, h, w] with h <= H and w <= W are upsampled to the target [N, H, W]; half precision is computed in
    float32. `offset` moves the flip windows (rows, columns). `selected`, bool [N, H, W], replaces the selection.
    Raises IndexError for a label that is neither a class nor ignore_index.
    """
    c = MODES[mode]
    labels = target.long()
    valid = labels != ignore_index
    check_labels(labels, valid, logits.shape[1])
    full = upsample(logits if logits.dtype == torch.float64 else logits.float(), labels.shape[1:])
    log_p = F.log_softmax(full, 1)

    labels_r = flip_labels(labels, 1, step[0], flip, offset[0])
    labels_c = flip_labels(labels, 2, step[1], flip, offset[1])
    flipped = boundary_weight != 0 and any((c.sr, c.sc, c.gr, c.gc))
    ce = cross_entropy_map(log_p, labels, valid, ignore_index)
    ce_r = cross_entropy_map(log_p, labels_r, valid, ignore_index) if flipped else torch.zeros_like(ce)
    ce_c = cross_entropy_map(log_p, labels_c, valid, ignore_index) if flipped else torch.zeros_like(ce)

    score = weighted_sum((c.s0, ce), (c.sr * alpha, ce_r), (c.sc * beta, ce_c)).detach()
    q = quantise(score).masked_fill(~valid, 0)
    candidates = suppress(q, nms) & valid & (q > 0)
    tau = int(quantise(torch.tensor(threshold, dtype=torch.float64)))
    groups = zip(q, candidates, strict=True) if per_image else [(q, candidates)]
    thresholds = [select_threshold(a, b, tau, ratio, min_kept, max_kept) for a, b in groups]
    t = torch.stack(thresholds) if per_image else thresholds[0]
    chosen = candidates & (q >= t.reshape(-1, 1, 1)) if selected is None else selected

    w = valid.to(ce.dtype) if weight is None else weight.to(ce.dtype)[labels.masked_fill(~valid, 0)] * valid
    count = (chosen if norm == "selected" else valid).sum()
    ce_term = _mean(weighted_sum((1, ce)), w, w.sum())
    hard = weighted_sum((c.g0, ce), (c.gr * alpha, ce_r), (c.gc * beta, ce_c))
    boundary = _mean(hard, w * chosen, count)
    loss = weighted_sum((ce_weight, ce_term), (boundary_weight, boundary))
    stats = BclStats(ce_term.detach(), boundary.detach(), chosen.sum(), valid.sum(), t)
    return loss, stats, BclMaps(ce, ce_r, ce_c, q, candidates, chosen)


def check_labels(labels: Tensor, valid: Tensor, classes: int) -> None:
    """Raise IndexError naming the first label that is neither a class nor ignore, and where it is."""
    wrong = valid & ((labels < 0) | (labels >= classes))
    if wrong.any():
        n, i, j = wrong.nonzero()[0].tolist()
        got = f"{int(labels[n, i, j])} at (n, row, column) = {n, i, j}"
        raise IndexError(f"target: expected a label in [0, {classes}) or ignore_index, got {got}")


def upsample(logits: Tensor, size: torch.Size) -> Tensor:
    """Bilinear (align_corners=False) to size (H, W) as nested lerp a + t*(b - a), columns first.

    The four-weight form breaks plateaus: equal corners would not give exactly their value.
    """
    for dim, out in ((3, size[1]), (2, size[0])):
        if logits.shape[dim] != out:
            logits = _lerp(logits, dim, out)
    return logits


def _lerp(x: Tensor, dim: int, out: int) -> Tensor:
    size = x.shape[dim]
    source = ((torch.arange(out, dtype=torch.float64, device=x.device) + 0.5) * size / out - 0.5).clamp(min=0)
    low = source.long()
    t = (source - low).to(x.dtype).reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    a = x.index_select(dim, low)
    b = x.index_select(dim, (low + 1).clamp(max=size - 1))
    return a + t * (b - a)


def flip_labels(labels: Tensor, dim: int, step: int, flip: str, offset: int) -> Tensor:
    """Labels [N, H, W] with neighbouring blocks of `step` exchanged along a dimension; see flip_index."""
    return labels.index_select(dim, flip_index(labels.shape[dim], step, flip, offset).to(labels.device))


def flip_index(length: int, step: int, flip: str, offset: int = 0) -> Tensor:
    """The involution pi [length] that the flip reads from; an index that would leave the image stays.

    swap: blocks of `step` change places in pairs; mirror: windows of 2 * step are reversed.
    """
    i = torch.arange(length) + offset
    if flip == "swap":
        pi = ((i // step) ^ 1) * step + i % step
    else:
        pi = 2 * step * (i // (2 * step)) + 2 * step - 1 - i % (2 * step)
    i, pi = i - offset, pi - offset
    return torch.where((pi < 0) | (pi >= length), i, pi)


def cross_entropy_map(log_p: Tensor, labels: Tensor, valid: Tensor, ignore_index: int) -> Tensor:
    """-log p of a label map [N, H, W]; 0 where the pixel or this label is ignore."""
    counted = valid & (labels != ignore_index)
    picked = log_p.gather(1, labels.masked_fill(~counted, 0)[:, None])[:, 0]
    return torch.where(counted, -picked, 0.0)


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of coefficient * term; a coefficient of 0 leaves its term out, so that 0 * inf never arises."""
    parts = [term if k == 1 else k * term for k, term in terms if k != 0]
    return sum(parts[1:], parts[0]) if parts else terms[0][1] * 0


def quantise(score: Tensor) -> Tensor:
    """The grid that decisions are made on: min(65535, floor(1024 * S + 1/2)), int32; NaN is 0."""
    return torch.floor(Q_SCALE * score + 0.5).nan_to_num(nan=0.0, posinf=Q_MAX).clamp(max=Q_MAX).int()


def suppress(q: Tensor, window: int) -> Tensor:
    """Whether a pixel of q [N, H, W] is the maximum of its window x window neighbourhood; ties all are."""
    if window == 1:
        return torch.ones_like(q, dtype=torch.bool)
    scores = q.float()  # exact: q has 16 bits
    return F.max_pool2d(scores[:, None], window, 1, window // 2)[:, 0] == scores


def select_threshold(
    q: Tensor, candidates: Tensor, tau: int, ratio: float, min_kept: int, max_kept: int | None
) -> Tensor:
    """The score from which candidates are selected, int32 scalar.

    t = min(tau, K-th largest), K = min(M, max(min_kept, floor(ratio * M))); with max_kept at least that-th largest.
    """
    histogram = torch.bincount(q[candidates], minlength=Q_MAX + 1)
    at_least = histogram.flip(0).cumsum(0).flip(0)  # candidates with a score of at least the index
    m = int(at_least[0])
    k = min(m, max(min_kept, math.floor(ratio * m)))
    t = tau if k == 0 else min(tau, _kth_largest(at_least, k))
    if max_kept is not None and max_kept <= m:
        t = max(t, _kth_largest(at_least, max_kept))
    return torch.tensor(t, dtype=torch.int32, device=q.device)


def _kth_largest(at_least: Tensor, k: int) -> int:
    return int((at_least >= k).sum()) - 1


def _mean(values: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """sum(weights * values) / total over the pixels that weigh; an attached 0 where there are none."""
    summed = torch.where(weights != 0, weights * values, 0.0).sum()
    return summed / torch.where(total > 0, total, 1)
