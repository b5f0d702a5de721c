"""The Boundary Corrected Loss by loops over pixels, in Python floats: slow, and shares no line with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

# own, row-flipped, column-flipped label: weights of the score, then of the boundary term
COEFFICIENTS = {
    "detect": ((0, 1, 1), (1, 0, 0)),
    "detect0": ((1, 1, 1), (1, 0, 0)),
    "paper": ((0, 1, 1), (0, 1, 1)),
    "paper0": ((1, 1, 1), (1, 1, 1)),
    "ohem": ((1, 0, 0), (1, 0, 0)),
}


@dataclass
class Oracle:
    """Loss, its gradient [N, C, h, w], parts, and maps [N, H, W]; `grid` is 1024 * S + 1/2 before the floor."""

    loss: float
    gradient: np.ndarray
    ce_mean: float
    boundary: float
    valid: int
    thresholds: list[int]
    candidates: np.ndarray
    selected: np.ndarray
    grid: np.ndarray
    terms: dict[str, np.ndarray] = field(repr=False)


def oracle(
    logits: np.ndarray,
    target: np.ndarray,
    *,
    weight: list[float] | None = None,
    ignore_index: int = 255,
    mode: str = "detect",
    ce_weight: float = 1.0,
    boundary_weight: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    step: tuple[int, int] = (1, 1),
    flip: str = "swap",
    offset: tuple[int, int] = (0, 0),
    nms: int = 1,
    threshold: float = 0.3567,
    ratio: float = 0.0,
    min_kept: int = 0,
    max_kept: int | None = None,
    norm: str = "selected",
    per_image: bool = False,
    q: np.ndarray | None = None,
) -> Oracle:
    """Everything at once; `q`, where given, replaces the scores that decide."""
    n, height, width = target.shape
    pixels = list(np.ndindex(n, height, width))
    z = upsampled(logits, height, width)
    rows, columns = flip_table(height, step[0], flip, offset[0]), flip_table(width, step[1], flip, offset[1])

    labels = {(i, r, c): (target[i, r, c], target[i, rows[r], c], target[i, r, columns[c]]) for i, r, c in pixels}
    valid = {at: labels[at][0] != ignore_index for at in pixels}
    p, terms = {}, {}
    for at in pixels:
        p[at], lse, d = softmax(z[at[0], :, at[1], at[2]])
        terms[at] = [lse - d[label] if valid[at] and label != ignore_index else 0.0 for label in labels[at]]

    flips = (1.0, alpha, beta)
    score, share = ([k * f for k, f in zip(part, flips, strict=True)] for part in COEFFICIENTS[mode])
    grid = np.zeros(target.shape)
    for at in pixels:
        grid[at] = 1024 * combined(score, terms[at]) + 0.5
    if q is None:
        q = np.array([on_grid(v) for v in grid.flat]).reshape(grid.shape)

    candidates = np.array([is_candidate(q, valid, at, nms) for at in pixels]).reshape(target.shape)
    if boundary_weight == 0:  # plain cross-entropy: nothing is selected
        candidates[:] = False
    groups = [[at for at in pixels if at[0] == i] for i in range(n)] if per_image else [pixels]
    tau = on_grid(1024 * threshold + 0.5)
    thresholds = []
    selected = np.zeros(target.shape, dtype=bool)
    for group in groups:
        scores = sorted((int(q[at]) for at in group if candidates[at]), reverse=True)
        thresholds.append(smallest_selected(scores, tau, ratio, min_kept, max_kept))
        for at in group:
            selected[at] = candidates[at] and q[at] >= thresholds[-1]

    w = {at: (1.0 if weight is None else weight[labels[at][0]]) if valid[at] else 0.0 for at in pixels}
    vw = math.fsum(w.values())
    divisor = int(selected.sum()) if norm == "selected" else sum(map(bool, valid.values()))
    ce_mean = math.fsum(w[at] * terms[at][0] for at in pixels if w[at]) / vw if vw else 0.0
    chosen = [at for at in pixels if selected[at]]
    boundary = math.fsum(w[at] * combined(share, terms[at]) for at in chosen if w[at]) / divisor if divisor else 0.0

    full = np.zeros(z.shape)
    for at in pixels:
        if not w[at]:
            continue
        amounts = [boundary_weight * w[at] * k / divisor if selected[at] else 0.0 for k in share]
        amounts[0] += ce_weight * w[at] / vw
        for amount, label in zip(amounts, labels[at], strict=True):
            if label != ignore_index and amount:
                full[at[0], :, at[1], at[2]] += amount * p[at]
                full[at[0], label, at[1], at[2]] -= amount
    return Oracle(
        loss=combined((ce_weight, boundary_weight), (ce_mean, boundary)),
        gradient=scattered(full, *logits.shape[2:]),
        ce_mean=ce_mean,
        boundary=boundary,
        valid=sum(map(bool, valid.values())),
        thresholds=thresholds,
        candidates=candidates,
        selected=selected,
        grid=grid,
        terms={name: np.array([terms[at][k] for at in pixels]).reshape(target.shape)
               for k, name in enumerate(("ce", "ce_r", "ce_c"))},
    )  # fmt: skip


def flip_table(length: int, step: int, flip: str, offset: int = 0) -> list[int]:
    """Where each position reads from, window by window: the halves change places, or the window is reversed."""
    table = list(range(length))
    for start in range(-offset, length, 2 * step):
        window = list(range(start, start + 2 * step))
        partners = window[::-1] if flip == "mirror" else window[step:] + window[:step]
        for i, partner in zip(window, partners, strict=True):
            if 0 <= i < length and 0 <= partner < length:
                table[i] = partner
    return table


def softmax(z: np.ndarray) -> tuple[np.ndarray, float, list[float]]:
    """p, log sum exp(d) and d = z - max z; NaN where torch has it: any NaN or +inf, or every logit -inf."""
    top = max(z)
    if any(map(math.isnan, z)) or math.isinf(top):
        return np.full(len(z), np.nan), math.nan, [math.nan] * len(z)
    d = [float(v - top) for v in z]
    total = math.fsum(map(math.exp, d))
    return np.array([math.exp(v) / total for v in d]), math.log(total), d


def combined(coefficients, terms) -> float:
    return sum(k * term for k, term in zip(coefficients, terms, strict=True) if k)


def on_grid(value: float) -> int:
    if math.isnan(value):
        return 0
    return 65535 if value >= 65535 else math.floor(value)


def is_candidate(q: np.ndarray, valid: dict, at: tuple[int, int, int], nms: int) -> bool:
    if not valid[at] or q[at] <= 0:
        return False
    image, row, column = at
    for r in range(row - nms // 2, row + nms // 2 + 1):
        for c in range(column - nms // 2, column + nms // 2 + 1):
            if valid.get((image, r, c), False) and q[image, r, c] > q[at]:
                return False
    return True


def smallest_selected(scores: list[int], tau: int, ratio: float, min_kept: int, max_kept: int | None) -> int:
    """The threshold from the candidates' scores, largest first."""
    k = min(len(scores), max(min_kept, math.floor(ratio * len(scores))))
    t = min(tau, scores[k - 1]) if k else tau
    return t if max_kept is None or max_kept > len(scores) else max(t, scores[max_kept - 1])


def lerp_table(size: int, out: int) -> list[tuple[int, int, float]]:
    """Lower and upper source index and the upper one's share, for each of `out` positions."""
    table = []
    for o in range(out):
        source = max(0.0, (o + 0.5) * size / out - 0.5)
        low = int(source)
        table.append((low, min(low + 1, size - 1), source - low))
    return table


def upsampled(z: np.ndarray, height: int, width: int) -> np.ndarray:
    if z.shape[2:] == (height, width):
        return z
    out = np.empty((*z.shape[:2], height, width))
    for r, (top, bottom, t) in enumerate(lerp_table(z.shape[2], height)):
        for c, (left, right, u) in enumerate(lerp_table(z.shape[3], width)):
            a = z[:, :, top, left] + u * (z[:, :, top, right] - z[:, :, top, left])
            b = z[:, :, bottom, left] + u * (z[:, :, bottom, right] - z[:, :, bottom, left])
            out[:, :, r, c] = a + t * (b - a)
    return out


def scattered(gradient: np.ndarray, height: int, width: int) -> np.ndarray:
    """What each full-resolution gradient gives to the four corners that it was read from."""
    if gradient.shape[2:] == (height, width):
        return gradient
    out = np.zeros((*gradient.shape[:2], height, width))
    for r, (top, bottom, t) in enumerate(lerp_table(height, gradient.shape[2])):
        for c, (left, right, u) in enumerate(lerp_table(width, gradient.shape[3])):
            g = gradient[:, :, r, c]
            out[:, :, top, left] += (1 - t) * (1 - u) * g
            out[:, :, top, right] += (1 - t) * u * g
            out[:, :, bottom, left] += t * (1 - u) * g
            out[:, :, bottom, right] += t * u * g
    return out
